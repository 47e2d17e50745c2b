"""Readers of what annotation tools write. Each returns data in COCO format; one module each, named as its format.

A reader is a function `read(conversion) -> {split: data in COCO format}` (see `conversion`). A source without splits
has the single split "".
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskrcnn.data.converters.conversion import Conversion

# What the path of each format is. The modules need numpy and Pillow, and are imported when they are used.
FORMATS = {
    "cityscapes": "the folder with gtFine and leftImg8bit",
    "coco": "a COCO file, to split it with --validation",
    "cvat": "annotations.xml of CVAT for images 1.1",
    "labelme": "a folder of JSON files, or one of them",
    "lvis": "a JSON file of LVIS v1",
    "masks": "a folder of label images: each value but 0 is an object; one file for a photo, or several",
    "voc": "the folder with SegmentationObject, SegmentationClass, Annotations and JPEGImages",
    "yolo": "data.yaml, a folder with it, or a folder with classes.txt, labels and images",
}


def reader(name: str) -> Callable[[Conversion], dict[str, dict[str, Any]]]:
    """Return the function `read` of a format, a key of `FORMATS`."""
    read: Callable[[Conversion], dict[str, dict[str, Any]]] = import_module(f"{__name__}.{name}").read
    return read
