"""Print the resolved and validated configuration of an experiment, or the JSON Schema of all configurations.

The same as `maskrcnn show-config`, for a checkout.
"""

from maskrcnn.cli import main

if __name__ == "__main__":
    main("show-config")
