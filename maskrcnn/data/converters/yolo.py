"""YOLO segmentation text, as Ultralytics reads it: a file for each photograph, a line `class x y x y ...` an object.

The source is `data.yaml` with its splits, or a folder with it; or a folder with `classes.txt` and `labels/`, as of
`maskrcnn predict --format yolo`. Classes are in the order of the names there. Coordinates are parts of the width and
height of the photograph. A line of four numbers is a box: its object has no mask. A photograph without a file has no
objects.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from maskrcnn.config.yaml_text import MOST_BYTES
from maskrcnn.data.converters.conversion import (
    CocoData,
    Conversion,
    ImageFolder,
    LabelledImage,
    assemble,
    files_below,
    numbered,
)
from maskrcnn.data.converters.objects import LabelledObject, checked_polygon
from maskrcnn.data.converters.reading import Header, read_text
from maskrcnn.data.image_files import IMAGE_SUFFIXES
from maskrcnn.errors import InputError

SPLITS = ("train", "val", "test")
MARGIN = 0.01  # by which a coordinate may leave 0 to 1


def read(conversion: Conversion) -> dict[str, CocoData]:
    """Return the annotations of `data.yaml`, or of a folder."""
    source = conversion.source
    description = source / "data.yaml" if source.is_dir() else source
    if description.is_file():
        return _of_yaml(description, conversion)
    if (source / "classes.txt").is_file():
        return _of_folder(source, conversion)
    raise InputError(f"{source}: there is neither data.yaml nor classes.txt")


def _of_folder(source: Path, conversion: Conversion) -> dict[str, CocoData]:
    """Read `labels/NAME.txt` for each photograph NAME."""
    names = [line.strip() for line in read_text(source / "classes.txt").splitlines() if line.strip()]
    photographs = conversion.photographs(source / "images", source)
    labels = source / "labels"
    if not labels.is_dir():
        raise InputError(f"{labels}: no such folder")
    images = ((name, labels / f"{stem}.txt") for stem in photographs.by_stem if (name := photographs.of_stem(stem)))
    return assemble(_images(images, "", names, photographs, conversion), conversion, numbered(names))


def _of_yaml(description: Path, conversion: Conversion) -> dict[str, CocoData]:
    content = _mapping(description)
    names = _names(content.get("names"), description)
    root = description.parent
    photographs = conversion.photographs(root)
    splits = {split: content[split] for split in SPLITS if content.get(split)}
    if not splits:
        raise InputError(f"{description}: it names none of the splits {', '.join(SPLITS)}")

    def images() -> Iterator[LabelledImage]:
        for split, written in splits.items():
            entries = written if isinstance(written, list) else [written]
            listed = [_listed(entry, content.get("path"), photographs, description) for entry in entries]
            pairs = ((name, photographs.path / _label_file(name)) for name in chain.from_iterable(listed))
            yield from _images(pairs, split, names, photographs, conversion)

    return assemble(images(), conversion, numbered(names))


def _mapping(path: Path) -> dict[Any, Any]:
    """Return the YAML mapping of a file, with all scalars as text: nothing in it is interpreted or repeated."""
    try:
        content = yaml.BaseLoader(read_text(path, most=MOST_BYTES)).get_single_data()
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise InputError(f"{path}: not valid YAML: lists and mappings nest too deep") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a mapping (lines of `key: value`)")
    return content


def _names(written: Any, path: Path) -> list[str]:
    """Return the class names of a list, or of a mapping from 0, 1, 2, ..."""
    if isinstance(written, dict):
        numbers = [str(number) for number in range(len(written))]
        if set(written) != set(numbers):
            raise InputError(f"{path}: names: the keys must be the numbers from 0 to {len(written) - 1}")
        written = [written[number] for number in numbers]
    if not isinstance(written, list) or not written or not all(isinstance(name, str) for name in written):
        raise InputError(f"{path}: names: expected the names of the classes, as a list or by number")
    if len(set(written)) < len(written):
        raise InputError(f"{path}: names: a name is there twice")
    return written


def _listed(entry: Any, root: Any, photographs: ImageFolder, source: Path) -> list[str]:
    """Return the images of one entry of a split: a folder, or a text file with one path a line.

    Only what is below the folder of `data.yaml` is read. Of a path that leads elsewhere, such as `../train/images`, the
    rest is looked for there.
    """
    if not isinstance(entry, str):
        raise InputError(f"{source}: a split must be a path, or a list of paths")
    for name in (_inside(entry), _inside(f"{root if isinstance(root, str) else ''}/{entry}")):
        path = photographs.path / name
        if path.is_dir():
            return [posixpath.normpath(posixpath.join(name, image)) for image in files_below(path, IMAGE_SUFFIXES)]
        if path.suffix == ".txt" and path.is_file():
            lines = read_text(path).splitlines()
            return [photographs.name(_inside(line.strip()), path) for line in lines if line.strip()]
    raise InputError(f"{source}: there is no folder or list of images {entry!r} below {photographs.path}")


def _inside(path: str) -> str:
    """Return a path without what leads out of a folder: a drive, a root, and `..`."""
    parts = re.split(r"[/\\]", path.replace("\0", ""))
    return "/".join(part for part in parts if part not in ("", ".", "..") and ":" not in part) or "."


def _label_file(image: str) -> str:
    """Return the label file of an image: the last folder `images` of its path is `labels` there."""
    before, found, after = f"/{posixpath.splitext(image)[0]}.txt".rpartition("/images/")
    return (f"{before}/labels/{after}" if found else after).lstrip("/")


def _images(
    pairs: Iterator[tuple[str, Path]], split: str, names: list[str], photographs: ImageFolder, conversion: Conversion
) -> Iterator[LabelledImage]:
    for name, path in pairs:
        header = photographs.header(name)
        if not os.path.isfile(path):
            conversion.leave_out("photographs have no label file, so they are without objects", name)
            yield LabelledImage(name, header, [], split)
            continue
        lines = [(number, line.split()) for number, line in enumerate(read_text(path).splitlines(), start=1)]
        objects = [_object(words, names, header, f"{path}, line {number}") for number, words in lines if words]
        boxes = sum(item.segmentation is None for item in objects)
        if boxes:
            conversion.leave_out("label files have boxes, whose objects have no mask", str(path))
        yield LabelledImage(name, header, objects, split)


def _object(words: list[str], names: list[str], header: Header, where: str) -> LabelledObject:
    if not words[0].isdecimal() or len(words[0]) > 9 or int(words[0]) >= len(names):
        raise InputError(f"{where}: the class must be a number from 0 to {len(names) - 1}, not {words[0][:50]!r}")
    if len(words) != 5 and (len(words) < 7 or len(words) % 2 == 0):
        raise InputError(f"{where}: expected a class and a polygon of at least three points, x y x y ...; or a box")
    try:
        values = [float(word) for word in words[1:]]
    except ValueError:
        raise InputError(f"{where}: a coordinate is not a number") from None
    if not all(-MARGIN <= value <= 1 + MARGIN for value in values):
        raise InputError(f"{where}: a coordinate is not from 0 to 1, as a part of the width or height of the image")
    name, scale = names[int(words[0])], (header.width, header.height)
    if len(values) == 4:
        x, y, width, height = (value * side for value, side in zip(values, scale * 2, strict=True))
        return LabelledObject(name, (x - width / 2, y - height / 2, width, height), width * height)
    points = [(x * scale[0], y * scale[1]) for x, y in zip(values[::2], values[1::2], strict=True)]
    return LabelledObject.of_polygons(name, [checked_polygon(points, where)], header)
