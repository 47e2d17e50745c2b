"""Convert weights: those of another framework to a file that every command reads, or those of a run to another format.

    maskrcnn convert-weights maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth --out coco.pt
    maskrcnn convert-weights runs/mine/checkpoints/best.pt --to torchvision --out mine.pth
    maskrcnn convert-weights mine.pth --out mine.pt --classes cell,nucleus

The file holds the weights, the classes and the configuration with the conventions that the weights need. Beside it,
NAME.certificate.json says what was done with each tensor. Other commands read the original file, too; conversion lets
you state what the file does not say, by --classes and --set. docs/weights.md lists the frameworks.
"""

from __future__ import annotations

import argparse

from maskrcnn.cli.arguments import add_set_argument, class_names
from maskrcnn.paths import expand
from maskrcnn.runtime.console import setup_logging


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("weights", type=expand, metavar="FILE", help="weights of another framework, or a checkpoint")
    parser.add_argument("--out", type=expand, required=True, metavar="FILE", help="the new file, such as coco.pt")
    parser.add_argument(
        "--classes",
        type=class_names,
        default=(),
        metavar="NAME,...",
        help="names of the classes in the order of their rows",
    )
    parser.add_argument(
        "--to",
        choices=("maskrcnn", "safetensors", "torchvision", "detectron2"),
        default="maskrcnn",
        help="format of the new file (default maskrcnn, a checkpoint)",
    )
    add_set_argument(parser, help="override a key of the configuration that follows from the file; may be repeated")


def run(args: argparse.Namespace) -> None:
    """Convert."""
    from maskrcnn.experiment import converted
    from maskrcnn.interop.files import write_weights

    setup_logging()
    weights = converted(args.weights, class_names=args.classes, overrides=args.overrides)
    files = write_weights(args.out, weights, args.to)
    if weights.certificate is not None:
        print(weights.certificate.describe())
    print(f"wrote {' and '.join(map(str, files))}")
