"""Validate a dataset, print its statistics, and draw some of its images with their ground truth.

The same as `maskrcnn inspect-dataset`, for a checkout.
"""

from maskrcnn.cli import main

if __name__ == "__main__":
    main("inspect-dataset")
