"""Convert annotations of another format to COCO's, which training and evaluation read.

    maskrcnn convert-dataset masks --from masks --images photos --classes cell --out cells --validation 0.2

SOURCE is the file or folder of the annotations. Masks are converted pixel by pixel, and polygons stay polygons. Image
sizes come from the image files; annotations are those of the upright image, with its EXIF orientation applied. Nothing
is overwritten. datasets/README.md has a page on it.
"""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING

from maskrcnn.cli.arguments import class_names, number
from maskrcnn.data.converters import FORMATS
from maskrcnn.errors import InputError
from maskrcnn.paths import expand
from maskrcnn.runtime.console import setup_logging

if TYPE_CHECKING:
    from maskrcnn.data.converters.conversion import CocoData


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    described = "; ".join(f"{name}: {text}" for name, text in FORMATS.items())
    parser.add_argument("source", type=expand, metavar="SOURCE", help=f"by format: {described}")
    parser.add_argument("--from", dest="format", choices=tuple(FORMATS), required=True, help="format of SOURCE")
    parser.add_argument(
        "--images", type=expand, metavar="DIR", help="folder of the photographs; by default where the format has them"
    )
    parser.add_argument(
        "--classes",
        type=class_names,
        default=(),
        metavar="NAME,...",
        help="all classes in their order; by default that of the format, or by name. Any other class is an error",
    )
    parser.add_argument(
        "--out",
        type=expand,
        required=True,
        metavar="DIR_OR_FILE",
        help="a folder, which gets a file for each split, or a new file NAME.json",
    )
    parser.add_argument(
        "--validation",
        type=number(0, 1),
        metavar="SHARE",
        help="share of the images for val.json, if the format has no splits: chosen by the hash of their names",
    )


def run(args: argparse.Namespace) -> None:
    """Convert."""
    from maskrcnn.data.converters import reader
    from maskrcnn.data.converters.conversion import Conversion
    from maskrcnn.data.converters.splits import files_of_splits, require_new
    from maskrcnn.runtime.files import json_text, write_text
    from maskrcnn.runtime.outputs import explaining

    setup_logging()
    if args.validation is not None and args.out.suffix == ".json":
        raise InputError("--validation writes two files: name a folder with --out")
    require_new([args.out] if args.out.suffix == ".json" else [])  # before any work; the files of a folder follow
    conversion = Conversion(args.source, args.images, args.classes)
    files = files_of_splits(reader(args.format)(conversion), args.out, args.validation)
    with explaining(args.out):
        for path, data in files.items():
            write_text(path, json_text(data) + "\n")
    for path, data in files.items():
        print(f"{path}: {_counts(data)}")
    for notice in conversion.notices():
        print(f"note: {notice}")
    by_name = {path.stem: path for path in files}
    if {"train", "val"} <= set(by_name):
        words = ("--train", by_name["train"], "--validation", by_name["val"], "--images", conversion.folder.path)
        print(f"next: maskrcnn init-dataset {shlex.join(map(str, words))} --out NAME.yaml")


def _counts(data: CocoData) -> str:
    names = [category["name"] for category in data["categories"]]
    shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
    return f"{len(data['images'])} images, {len(data['annotations'])} objects, {len(names)} classes: {shown}"
