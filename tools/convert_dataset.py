"""Convert annotations of another format to COCO's, which training and evaluation read.

The same as `maskrcnn convert-dataset`, for a checkout.
"""

from maskrcnn.cli import main

if __name__ == "__main__":
    main("convert-dataset")
