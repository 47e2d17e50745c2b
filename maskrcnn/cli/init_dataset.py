"""Write a configuration for your own images, with settings that the annotations suggest.

    maskrcnn init-dataset cells --out cells.yaml
    maskrcnn init-dataset --train cells/train.json --validation cells/val.json --images photos --out cells.yaml

FOLDER holds two COCO files, with "train" and "val" in their paths, and the images. The configuration has the classes,
image size, anchor sizes, detections per image, batch size and schedule; a comment at each says from which figure of the
annotations it comes. Nothing is overwritten.
"""

from __future__ import annotations

import argparse
import os

from maskrcnn.errors import InputError
from maskrcnn.paths import expand
from maskrcnn.runtime.console import setup_logging


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("folder", type=expand, nargs="?", metavar="FOLDER", help="COCO files and images")
    parser.add_argument("--train", type=expand, metavar="FILE", help="annotations for training, in place of FOLDER")
    parser.add_argument("--validation", type=expand, metavar="FILE", help="annotations for validation")
    parser.add_argument("--images", type=expand, metavar="DIR", help="folder of the images of both files")
    parser.add_argument("--out", type=expand, required=True, metavar="FILE", help="the new configuration, NAME.yaml")


def run(args: argparse.Namespace) -> None:
    """Write the configuration."""
    from maskrcnn.cli.starter_config import config_lines, files_in, with_images
    from maskrcnn.data.coco import CocoDataset
    from maskrcnn.experiment import require_same_classes
    from maskrcnn.runtime.files import write_text
    from maskrcnn.runtime.outputs import explaining

    setup_logging()
    if args.out.suffix not in (".yaml", ".yml"):
        raise InputError(f"--out {args.out}: the name of a configuration ends in .yaml")
    if os.path.lexists(args.out):
        raise InputError(f"{args.out}: exists already; name another file with --out")
    if bool(args.folder) == bool(args.train) or bool(args.train) != bool(args.validation):
        raise InputError("name either FOLDER, or both files with --train and --validation")
    files = files_in(args.folder) if args.folder else (args.train, args.validation)
    splits = [with_images(path, args.folder, args.images) for path in files]
    train, validation = (CocoDataset(each.annotations, each.images, degenerate="drop") for each in splits)
    require_same_classes(train.classes, validation.classes, str(files[0]), str(files[1]))
    text = "\n".join(config_lines(args.out, args.folder, splits, (train, validation))) + "\n"
    with explaining(args.out.parent):
        write_text(args.out, text)
    print(f"wrote {args.out}; next: maskrcnn train {args.out} --out runs/{args.out.stem}")
