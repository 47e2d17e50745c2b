"""CVAT for images 1.1: one XML file. Classes are the labels of the task, in their order.

Polygons stay polygons. A mask has the pixels of its run lengths, which run along the rows of its box. An ellipse has
the pixels whose centres lie inside. A box is an object without a mask. Shapes with the same label and `group_id` are
one object. Points, polylines, skeletons and cuboids are left out. A subset of the task is a split.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from maskrcnn.data.converters.conversion import CocoData, Conversion, ImageFolder, LabelledImage, assemble, require_size
from maskrcnn.data.converters.objects import FARTHEST, LabelledObject, Polygon, checked_polygon, ellipse_mask, grouped
from maskrcnn.data.converters.reading import MOST_LABELS, Header, read_xml
from maskrcnn.data.rle import rle_of_crop
from maskrcnn.errors import InputError
from maskrcnn.structures import MaskCrop

WITHOUT_AREA = {"points", "polyline", "skeleton", "cuboid"}
NO_CLASS = {*WITHOUT_AREA, "tag"}  # types of labels
SUBSET = re.compile(r"[0-9A-Za-z_-]{1,64}")  # it becomes the name of a file

Part = tuple[str, str | None, Polygon | dict[str, Any]]  # class name, group, polygon or mask


def read(conversion: Conversion) -> dict[str, CocoData]:
    """Return the annotations of an XML file."""
    if conversion.source.is_dir():
        raise InputError(f"{conversion.source}: expected a file, such as annotations.xml")
    folder = conversion.source.parent
    photographs = conversion.photographs(folder / "images", folder)
    categories: list[dict[str, Any]] = []
    return assemble(_images(photographs, conversion, categories), conversion, categories)


def _images(
    photographs: ImageFolder, conversion: Conversion, categories: list[dict[str, Any]]
) -> Iterator[LabelledImage]:
    """Yield the images, and append the labels, which precede them in the file, to the categories."""
    path = conversion.source
    for element in read_xml(path, {"labels", "image", "track"}):
        if element.tag == "track":
            raise InputError(f"{path}: this is CVAT for video; export the task as CVAT for images 1.1")
        if element.tag == "labels":
            labels = (label for label in element.iter("label") if label.findtext("type") not in NO_CLASS)
            for name in (label.findtext("name") for label in labels):
                if name and name not in (category["name"] for category in categories):
                    categories.append({"id": len(categories) + 1, "name": name})
        else:
            yield _image(element, photographs, conversion)


def _image(element: Element, photographs: ImageFolder, conversion: Conversion) -> LabelledImage:
    path = conversion.source
    name = photographs.name(element.get("name", ""), path)
    where = f"{path}: image {name}"
    header = photographs.header(name)
    require_size(header, round(_number(element, "height", where)), round(_number(element, "width", where)), name, path)
    subset = element.get("subset", "")
    if subset and not SUBSET.fullmatch(subset):
        raise InputError(f"{where}: its subset {subset[:100]!r} is no name of letters, digits, - and _")
    parts = _parts(element, header, where, conversion)
    boxes = [_box(child, where) for child in element.iter("box")]
    return LabelledImage(name, header, [*grouped(parts, header), *boxes], subset.lower())


def _parts(image: Element, header: Header, where: str, conversion: Conversion) -> Iterator[Part]:
    for number, shape in enumerate(image):
        here = f"{where}, shape {number}"
        if shape.tag in WITHOUT_AREA:
            conversion.leave_out(f"shapes of type {shape.tag} are left out", where)
            continue
        if shape.tag == "polygon":
            part: Polygon | dict[str, Any] | None = _polygon(shape, here)
        elif shape.tag == "mask":
            part = _mask(shape, header, here)
        elif shape.tag == "ellipse":
            part = _ellipse(shape, header, here)
        else:
            continue
        if part is None:
            conversion.leave_out(f"shapes of type {shape.tag} without area are left out", where)
            continue
        group = shape.get("group_id")
        yield _label(shape, here), None if group in (None, "0") else group, part


def _label(shape: Element, where: str) -> str:
    label = shape.get("label")
    if not label:
        raise InputError(f"{where}: it has no label")
    return label


def _number(element: Element, key: str, where: str, default: str = "") -> float:
    try:
        number = float(element.get(key, default))
    except ValueError:
        number = math.nan
    if not abs(number) <= FARTHEST:
        raise InputError(f"{where}: {key} is not a number from -{FARTHEST:g} to {FARTHEST:g}")
    return number


def _polygon(shape: Element, where: str) -> Polygon | None:
    try:
        points = [tuple(map(float, point.split(","))) for point in shape.get("points", "").split(";")]
    except ValueError:
        raise InputError(f"{where}: its points are not numbers x,y;x,y;...") from None
    if any(len(point) != 2 for point in points):
        raise InputError(f"{where}: its points are not numbers x,y;x,y;...")
    return checked_polygon(points, where) if len(points) >= 3 else None


def _ellipse(shape: Element, header: Header, where: str) -> dict[str, Any] | None:
    x, y, a, b = (_number(shape, key, where) for key in ("cx", "cy", "rx", "ry"))
    # A radius far below a pixel has no area, and its square would not be a number.
    return ellipse_mask((x, y), (a, b), _number(shape, "rotation", where, "0"), header) if min(a, b) > 1e-3 else None


def _mask(shape: Element, header: Header, where: str) -> dict[str, Any] | None:
    x, y, width, height = (round(_number(shape, key, where)) for key in ("left", "top", "width", "height"))
    fits = x >= 0 and y >= 0 and x + width <= header.width and y + height <= header.height
    if not fits or min(width, height) < 1 or width * height > MOST_LABELS:
        raise InputError(f"{where}: its mask of {width} x {height} pixels at ({x}, {y}) does not lie in the image")
    try:
        counts = np.array([int(count) for count in shape.get("rle", "").split(",")], np.int64)
    except (ValueError, OverflowError):
        raise InputError(f"{where}: its rle is not a list of numbers") from None
    if not ((counts >= 0) & (counts <= width * height)).all() or counts.sum() != width * height:
        raise InputError(f"{where}: its run lengths do not add up to {width} x {height} pixels")
    pixels = np.repeat(np.arange(len(counts)) % 2, counts).astype(np.uint8).reshape(height, width)
    return rle_of_crop(MaskCrop(x, y, pixels), header.height, header.width) if pixels.any() else None


def _box(shape: Element, where: str) -> LabelledObject:
    """Return a box, or the bounds of one that is turned, without a mask."""
    x1, y1, x2, y2 = (_number(shape, key, where) for key in ("xtl", "ytl", "xbr", "ybr"))
    angle = math.radians(_number(shape, "rotation", where, "0"))
    cosine, sine = abs(math.cos(angle)), abs(math.sin(angle))
    width, height = (x2 - x1) * cosine + (y2 - y1) * sine, (x2 - x1) * sine + (y2 - y1) * cosine
    x, y = (x1 + x2 - width) / 2, (y1 + y2 - height) / 2
    return LabelledObject(_label(shape, where), (x, y, width, height), width * height)
