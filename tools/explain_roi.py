"""Draw how each RoI layer processes one box: the cells it reads, its bins, its sample points and the pooled values.

The same as `maskrcnn explain-roi`, for a checkout.
"""

from maskrcnn.cli import main

if __name__ == "__main__":
    main("explain-roi")
