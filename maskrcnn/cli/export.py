"""Export a trained model to a file that runs without this package: ONNX, or torch.export.

    maskrcnn export --weights runs/shapes/checkpoints/best.pt --out model.onnx
    maskrcnn export --weights runs/shapes/checkpoints/best.pt --out model.pt2

The file takes images of any size and number as uint8 pixels, and returns boxes, labels, scores and masks. Its metadata
has the names of the classes, and how images are resized before. docs/export.md shows how to run it. Every file is
compared with the model on three images; one that differs is not written. --set changes a key of the configuration, such
as model.detection.score_threshold. Exit status: 0 success, 1 the file differs from the model, 2 invalid input.
"""

from __future__ import annotations

import argparse
import sys

from maskrcnn.cli.arguments import add_average_argument, add_set_argument
from maskrcnn.paths import expand
from maskrcnn.runtime.console import setup_logging


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("--weights", type=expand, required=True, metavar="FILE", help="weights of the model")
    add_average_argument(parser)
    parser.add_argument(
        "--out", type=expand, required=True, metavar="FILE", help="the new file, NAME.onnx or NAME.pt2 (torch.export)"
    )
    add_set_argument(parser, help="override a key of the stored configuration; may be repeated")


def run(args: argparse.Namespace) -> None:
    """Export."""
    from maskrcnn.experiment import load
    from maskrcnn.interop.deployment import INSTALL, export_model
    from maskrcnn.interop.export_check import CheckFailed

    setup_logging()
    predictor = load(args.weights, device="cpu", average=args.ema, overrides=args.overrides)
    try:
        checked = export_model(predictor, args.out)
    except CheckFailed as error:
        print(f"{args.out} was not written: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"wrote {args.out}")
    if checked:
        print("\n  ".join(["compared with the model:", *map(str, checked)]))
    else:
        print(f"it was not checked, because onnxruntime is not installed: {INSTALL}")
