"""Write a configuration for your own images, with settings that the annotations suggest.

The same as `maskrcnn init-dataset`, for a checkout.
"""

from maskrcnn.cli import main

if __name__ == "__main__":
    main("init-dataset")
