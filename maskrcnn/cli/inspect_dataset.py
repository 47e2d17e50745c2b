"""Validate a dataset, print its statistics, and draw some of its images with their ground truth.

    maskrcnn inspect-dataset configs/shapes/mask_rcnn_r18_fpn.yaml --out scenes

The images are drawn before any transform: contact_sheet.png, and one file per image.
"""

from __future__ import annotations

import argparse

from maskrcnn.cli.arguments import add_config_arguments, whole_number
from maskrcnn.paths import expand
from maskrcnn.runtime.console import setup_logging


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_config_arguments(parser)
    parser.add_argument("--split", choices=("train", "validation"), default="validation", help="dataset split")
    parser.add_argument(
        "--count", type=whole_number(0, 10_000), default=12, help="number of images to draw (default 12)"
    )
    parser.add_argument("--out", type=expand, required=True, help="output folder")


def run(args: argparse.Namespace) -> None:
    """Print statistics and draw images."""

    from maskrcnn.config import read_config
    from maskrcnn.data.statistics import summarize
    from maskrcnn.engine.pictures import draw_ground_truth
    from maskrcnn.experiment import ExperimentConfig

    setup_logging()
    data = read_config(args.config, ExperimentConfig, args.overrides).data
    dataset = data.build_train() if args.split == "train" else data.build_validation()
    print(summarize(dataset.ground_truth()))
    draw_ground_truth(dataset, args.count, args.out)
    print(f"the pictures are in {args.out}")
