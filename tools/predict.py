"""Detect and draw objects in your own images.

The same as `maskrcnn predict`, for a checkout.
"""

from maskrcnn.cli import main

if __name__ == "__main__":
    main("predict")
