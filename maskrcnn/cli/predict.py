"""Detect and draw objects in your own images.

    maskrcnn predict --weights runs/shapes/checkpoints/best.pt IMAGE_OR_FOLDER ... --out predictions

Writes one picture per image, and results.json in COCO's results format. The model is built from the configuration that
the file of the weights holds; --set changes a key of it, for example model.detection.score_threshold. Exit status: 0
success, 1 some images could not be read and were skipped, 2 invalid input.
"""

from __future__ import annotations

import argparse
import sys

from maskrcnn.cli.arguments import add_average_argument, add_device_argument, add_set_argument, number
from maskrcnn.paths import expand
from maskrcnn.runtime.console import setup_logging


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("inputs", nargs="+", type=expand, metavar="IMAGE_OR_FOLDER")
    parser.add_argument("--weights", type=expand, required=True, metavar="FILE", help="weights of the model")
    add_average_argument(parser)
    parser.add_argument("--out", type=expand, required=True, help="folder for the pictures and results.json")
    parser.add_argument(
        "--min-score", type=number(0, 1), default=0.5, help="omit detections with a lower score (default 0.5)"
    )
    add_set_argument(parser, help="override a key of the stored configuration; may be repeated")
    add_device_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Predict."""
    from maskrcnn.engine.prediction import ImagesSkipped, predict_images
    from maskrcnn.experiment import load
    from maskrcnn.runtime.memory import keep_freed_memory

    setup_logging()
    keep_freed_memory()
    predictor = load(args.weights, device=args.device, average=args.ema, overrides=args.overrides)
    try:
        predict_images(predictor, args.inputs, args.out, min_score=args.min_score)
    except ImagesSkipped as error:
        print(error, file=sys.stderr)
        sys.exit(1)
