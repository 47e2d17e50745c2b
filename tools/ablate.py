"""Train the variants of an experiment, and report how each changes the AP, with confidence intervals.

The same as `maskrcnn ablate`, for a checkout.
"""

from maskrcnn.cli import main

if __name__ == "__main__":
    main("ablate")
