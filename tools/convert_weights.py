"""Convert the weights of another framework to a file that every command reads.

The same as `maskrcnn convert-weights`, for a checkout.
"""

from maskrcnn.cli import main

if __name__ == "__main__":
    main("convert-weights")
