"""COCO results, average precision and bootstrap comparisons."""
