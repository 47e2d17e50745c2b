"""Compute COCO box and mask AP of a checkpoint or of a results file.

The same as `maskrcnn eval`, for a checkout.
"""

from maskrcnn.cli import main

if __name__ == "__main__":
    main("eval")
