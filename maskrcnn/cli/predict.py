"""Detect and draw objects in your own images.

    maskrcnn predict CONFIG --weights runs/shapes/checkpoints/best.pt IMAGE_OR_FOLDER ... --out predictions

Writes one picture per image, and results.json in COCO's results format.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from maskrcnn.cli.arguments import add_config_arguments, add_device_argument
from maskrcnn.runtime.console import setup_logging


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_config_arguments(parser)
    parser.add_argument("inputs", nargs="+", type=Path, metavar="IMAGE_OR_FOLDER")
    parser.add_argument("--weights", type=Path, required=True, metavar="FILE", help="checkpoint of the model of CONFIG")
    parser.add_argument("--ema", action="store_true", help="use the averaged (EMA) weights of the checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="folder for the pictures and results.json")
    parser.add_argument("--min-score", type=float, default=0.5, help="omit detections with a lower score (default 0.5)")
    add_device_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Predict."""

    from maskrcnn.config import load_config
    from maskrcnn.experiment import ExperimentConfig, choose_device
    from maskrcnn.inference import load_predictor, predict_images

    setup_logging()
    config = load_config(args.config, ExperimentConfig, args.overrides)
    predictor = load_predictor(config, args.weights, choose_device(args.device), average=args.ema)
    predict_images(predictor, args.inputs, args.out, min_score=args.min_score)
