"""Mask R-CNN, composed from YAML and trained from the command line. Start reading at `structures.py`."""
