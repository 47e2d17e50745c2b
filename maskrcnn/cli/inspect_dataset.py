"""Validate a dataset, print its statistics, and draw some of its images with their ground truth.

    maskrcnn inspect-dataset configs/shapes/mask_rcnn_r18_fpn.yaml --out scenes

The images are drawn before any transform: contact_sheet.png, and one file per image. `--augmented` draws what the
network sees instead: the first images of the training in their order, transformed.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

from maskrcnn.cli.arguments import add_config_arguments, whole_number
from maskrcnn.paths import expand
from maskrcnn.runtime.console import setup_logging

if TYPE_CHECKING:
    from maskrcnn.data.dataset import DetectionDataset
    from maskrcnn.experiment import ExperimentConfig
    from maskrcnn.structures import Example


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_config_arguments(parser)
    parser.add_argument(
        "--split", choices=("train", "validation"), help="dataset split (default validation; train with --augmented)"
    )
    parser.add_argument(
        "--augmented", action="store_true", help="draw training images as the network sees them; no statistics"
    )
    parser.add_argument(
        "--count", type=whole_number(0, 10_000), default=12, help="number of images to draw (default 12)"
    )
    parser.add_argument("--out", type=expand, required=True, help="output folder")


def run(args: argparse.Namespace) -> None:
    """Print statistics and draw images."""

    from maskrcnn.config import read_config
    from maskrcnn.data.statistics import summarize
    from maskrcnn.engine.pictures import draw_ground_truth
    from maskrcnn.errors import InputError
    from maskrcnn.experiment import ExperimentConfig

    setup_logging()
    if args.augmented and args.split == "validation":
        raise InputError("--augmented draws training images: omit --split validation")
    config = read_config(args.config, ExperimentConfig, args.overrides)
    dataset = config.data.build_train() if args.augmented or args.split == "train" else config.data.build_validation()
    if not args.augmented:
        print(summarize(dataset.ground_truth()))
    examples = _augmented(config, dataset, args.count) if args.augmented else _as_annotated(dataset, args.count)
    draw_ground_truth(examples, dataset.classes, args.out)
    print(f"the pictures are in {args.out}")


def _as_annotated(dataset: DetectionDataset, count: int) -> Iterator[tuple[str, str, Example]]:
    """Yield the first images of a dataset, with their ids as names and their files as titles."""
    from maskrcnn.engine.pictures import title_of

    for index in range(min(count, len(dataset))):
        example = dataset[index]
        yield str(example.image_id), title_of(dataset, index), example


def _augmented(config: ExperimentConfig, dataset: DetectionDataset, count: int) -> Iterator[tuple[str, str, Example]]:
    """Yield the first images of the training; an id can occur twice, so the name begins with their number."""
    from maskrcnn.data.loader import training_examples
    from maskrcnn.data.sampling import image_weights

    transform, settings = config.data.build_train_transform(dataset), config.training
    weights = image_weights(settings.sampler, dataset)
    examples = training_examples(
        dataset, transform, batch_size=settings.batch_size, seed=settings.seed, weights=weights
    )
    for number, example in enumerate(itertools.islice(examples, count), start=1):
        name = f"{number:04}_{example.image_id}"
        yield name, name, example
