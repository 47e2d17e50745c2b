"""Export a trained model to a file that runs without this package: ONNX, or torch.export.

The same as `maskrcnn export`, for a checkout.
"""

from maskrcnn.cli import main

if __name__ == "__main__":
    main("export")
