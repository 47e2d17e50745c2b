"""Train and evaluate a model and write the run directory.

The same as `maskrcnn train`, for a checkout.
"""

from maskrcnn.cli import main

if __name__ == "__main__":
    main("train")
