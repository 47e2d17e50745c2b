"""Datasets, transforms and data loaders."""
