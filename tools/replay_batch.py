"""Repeat a training step that was skipped because a loss or the gradient was not finite.

The same as `maskrcnn replay-batch`, for a checkout.
"""

from maskrcnn.cli import main

if __name__ == "__main__":
    main("replay-batch")
