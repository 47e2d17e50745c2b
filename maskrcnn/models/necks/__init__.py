"""Necks: layers between a backbone and the heads."""
