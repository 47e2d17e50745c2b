"""Backbones: networks that map images to feature maps."""
