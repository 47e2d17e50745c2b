"""Pascal VOC: a folder with `SegmentationObject`, `SegmentationClass`, `Annotations`, `JPEGImages` and `ImageSets`.

Each value of a file of `SegmentationObject` but 0 and 255 is an object. The void pixels, 255, around it belong to none.
Its class is that of most of its pixels in `SegmentationClass`, whose values count the classes from 1: those that the
user gives, or else the 20 of VOC, if the file of `Annotations` agrees. Without `SegmentationClass`, object n is the
n-th of that file. The splits are `train` and `val` of `ImageSets/Segmentation`, where they exist.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np

from maskrcnn.data.converters.conversion import (
    CocoData,
    Conversion,
    ImageFolder,
    LabelledImage,
    assemble,
    numbered,
    require_size,
)
from maskrcnn.data.converters.objects import LabelledObject, label_masks
from maskrcnn.data.converters.reading import MOST_TEXT, Header, read_labels, read_text, read_xml
from maskrcnn.errors import InputError
from maskrcnn.paths import leaves_folder

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
VOID = 255


def read(conversion: Conversion) -> dict[str, CocoData]:
    """Return the annotations of a folder as VOC's."""
    if not (conversion.source / "SegmentationObject").is_dir():
        raise InputError(f"{conversion.source}: there is no folder SegmentationObject")
    photographs = conversion.photographs(conversion.source / "JPEGImages")
    has_classes = (conversion.source / "SegmentationClass").is_dir()
    declared = numbered(conversion.classes or CLASSES) if has_classes else []
    images = (_image(name, split, photographs, conversion) for split, name in _names(conversion.source))
    return assemble(images, conversion, declared)


def _names(source: Path) -> Iterator[tuple[str, str]]:
    """Yield split and name of each image."""
    lists = {split: source / "ImageSets" / "Segmentation" / f"{split}.txt" for split in ("train", "val")}
    existing = {split: path for split, path in lists.items() if path.is_file()}
    if not existing:
        yield from (("", path.stem) for path in sorted((source / "SegmentationObject").glob("*.png")))
    for split, path in existing.items():
        for line in read_text(path).splitlines():
            for name in line.split()[:1]:
                if leaves_folder(name):
                    raise InputError(f"{path}: the name {name[:100]!r} leads out of its folder")
                yield split, name


def _image(stem: str, split: str, photographs: ImageFolder, conversion: Conversion) -> LabelledImage:
    source = conversion.source
    path = source / "SegmentationObject" / f"{stem}.png"
    name = photographs.of_stem(stem)
    if name is None:
        raise InputError(f"{path}: there is no image {stem} in {photographs.path}; --images names another folder")
    header, labels = photographs.header(name), read_labels(path)
    height, width = labels.shape
    require_size(header, height, width, name, path)
    if labels.dtype not in (np.uint8, np.bool_):
        raise InputError(f"{path}: expected 8 bits for a pixel")
    labels = np.where(labels == VOID, 0, labels.astype(np.uint8))
    names = _class_names(stem, labels, header, conversion)
    objects = [LabelledObject.of_rle(names[value], rle) for value, rle in label_masks(labels)]
    return LabelledImage(name, header, objects, split)


def _class_names(stem: str, labels: np.ndarray, header: Header, conversion: Conversion) -> dict[int, str]:
    """Return the class of each value of the label image of the objects."""
    listed = conversion.source / "Annotations" / f"{stem}.xml"
    in_order = _listed_objects(listed, header) if listed.is_file() else None
    path = conversion.source / "SegmentationClass" / f"{stem}.png"
    values = [int(value) for value in np.unique(labels) if value]
    if not path.parent.is_dir():
        if in_order is None or (values and values[-1] > len(in_order)):
            raise InputError(f"{listed}: it does not list object {values[-1] if values else 0} of {stem}.png")
        return {value: in_order[value - 1] for value in values}
    classes = _classes_of_objects(path, labels)
    names = conversion.classes or CLASSES
    for value in values:
        if not 1 <= classes[value] <= len(names):
            raise InputError(f"{path}: object {value} has the class {classes[value]}, not one from 1 to {len(names)}")
        name = names[classes[value] - 1]
        if in_order is not None and name not in in_order:
            raise InputError(
                f"{path}: object {value} has the class {classes[value]}, '{name}', but {listed} lists "
                f"{', '.join(sorted(set(in_order))) or 'no object'}; --classes gives the names in order of their values"
            )
    return {value: names[classes[value] - 1] for value in values}


def _classes_of_objects(path: Path, labels: np.ndarray) -> Sequence[int]:
    """Return the most frequent value of the class image in the pixels of each object 0..255; 0 where all are void."""
    classes = read_labels(path)
    if classes.shape != labels.shape or classes.dtype not in (np.uint8, np.bool_):
        raise InputError(f"{path}: expected 8 bits for a pixel, and the size of the file in SegmentationObject")
    pairs = labels.astype(np.int64) * 256 + classes
    counts = np.bincount(pairs.ravel(), minlength=256 * 256).reshape(256, 256)
    counts[:, [0, VOID]] = 0
    return [int(value) for value in counts.argmax(axis=1)]


def _listed_objects(path: Path, header: Header) -> list[str]:
    """Return the class of each object of a file of `Annotations`."""
    annotation = next(read_xml(path, {"annotation"}, most=MOST_TEXT), None)
    if annotation is None:
        raise InputError(f"{path}: there is no element <annotation>")
    height, width = _side(annotation, "height", path), _side(annotation, "width", path)
    if height and width:
        require_size(header, height, width, path.stem, path)
    return [item.findtext("name", "").strip() for item in annotation.iter("object")]


def _side(annotation: Element, name: str, path: Path) -> int:
    text = annotation.findtext(f"size/{name}", "0")
    try:
        side = float(text)
    except ValueError:
        side = math.nan
    if not 0 <= side < 2**16:
        raise InputError(f"{path}: its {name} {text[:100]!r} is not a number of pixels")
    return round(side)
