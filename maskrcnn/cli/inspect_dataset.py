"""Check a dataset: every image and annotation, statistics, and what the settings make of the objects.

    maskrcnn inspect-dataset configs/shapes/mask_rcnn_r18_fpn.yaml --out scenes

Both splits are read once. The findings are printed and written to the page report.html, with pictures of them, and to
findings.jsonl. The first images are drawn before any transform: contact_sheet.png, and one file per image.
`--augmented` draws what the network sees instead: the first images of the training in their order, transformed.
The exit status is 2 if training would refuse the data. docs/data.md explains the findings.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from maskrcnn.cli.arguments import add_config_arguments, whole_number
from maskrcnn.paths import expand
from maskrcnn.runtime.console import setup_logging

if TYPE_CHECKING:
    from pathlib import Path

    from maskrcnn.data.dataset import DetectionDataset
    from maskrcnn.experiment import ExperimentConfig
    from maskrcnn.inspection.examination import Examination, Split
    from maskrcnn.structures import Example

SPLITS: tuple[Split, ...] = ("train", "validation")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add_config_arguments(parser)
    parser.add_argument(
        "--split", choices=SPLITS, help="check this split alone (default both; the validation images are drawn)"
    )
    parser.add_argument(
        "--augmented", action="store_true", help="draw training images as the network sees them; no checks"
    )
    parser.add_argument(
        "--count", type=whole_number(0, 10_000), default=12, help="number of images to draw (default 12)"
    )
    parser.add_argument("--out", type=expand, required=True, help="output folder")


def run(args: argparse.Namespace) -> None:
    """Check the dataset and draw images."""
    from maskrcnn.config import read_config
    from maskrcnn.engine.pictures import draw_ground_truth
    from maskrcnn.errors import InputError
    from maskrcnn.experiment import ExperimentConfig

    setup_logging()
    if args.augmented and args.split == "validation":
        raise InputError("--augmented draws training images: omit --split validation")
    config = read_config(args.config, ExperimentConfig, args.overrides)
    if args.augmented:
        dataset = config.data.build_train()
        draw_ground_truth(_augmented(config, dataset, args.count), dataset.classes, args.out)
    else:
        _examine(config, (args.split,) if args.split else SPLITS, args)
    print(f"the pictures are in {args.out}")


def _examine(config: ExperimentConfig, splits: Sequence[Split], args: argparse.Namespace) -> None:
    from maskrcnn.engine.pictures import draw_ground_truth
    from maskrcnn.errors import InputError
    from maskrcnn.inspection.examination import examine
    from maskrcnn.inspection.text import as_text
    from maskrcnn.runtime.outputs import output_folder
    from maskrcnn.runtime.threads import usable_cores

    with output_folder(args.out):  # refuses before the images are read
        pass
    examination = examine(config, splits, workers=usable_cores())
    print(as_text(examination))
    dataset = examination.datasets.get(f"data.{splits[-1]}")
    if dataset is not None:
        draw_ground_truth(_as_annotated(dataset, args.count), dataset.classes, args.out)
    with output_folder(args.out):
        _write(examination, args.out, title=f"Data of {args.config}", count=args.count)
    print(f"\nreport.html and findings.jsonl are in {args.out}")
    if examination.errors or examination.refusals:
        raise InputError(
            f"a training would refuse this data (errors: {examination.errors}); see {args.out}/report.html"
        )


def _write(examination: Examination, out: Path, *, title: str, count: int) -> None:
    """Write the page and the list of findings."""
    from maskrcnn.inspection.page import html_page
    from maskrcnn.inspection.text import as_json_lines
    from maskrcnn.runtime.files import write_text

    page = html_page(examination, title=title, count=count, provenance=shlex.join(sys.argv))
    write_text(out / "report.html", page)
    write_text(out / "findings.jsonl", as_json_lines(examination))


def _as_annotated(dataset: DetectionDataset, count: int) -> Iterator[tuple[str, str, Example]]:
    """Yield the first images of a dataset, with their ids as names and their files as titles.

    An image that cannot be read is left out.
    """
    from maskrcnn.engine.pictures import title_of
    from maskrcnn.errors import InputError

    for index in range(min(count, len(dataset))):
        try:
            example = dataset[index]
        except InputError:  # one of the findings
            continue
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
