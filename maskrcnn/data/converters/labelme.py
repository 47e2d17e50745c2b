"""LabelMe: a JSON file for each photograph. Classes are sorted by name.

Polygons stay polygons, and rectangles become polygons of four points. A circle has the pixels whose centres lie inside.
A `mask` has those of its PNG. Shapes with the same label and `group_id` are one object. Points and lines have no area
and are left out.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import os
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter
from typing_extensions import NotRequired, TypedDict

from maskrcnn.data.converters.conversion import (
    CocoData,
    Conversion,
    ImageFolder,
    LabelledImage,
    assemble,
    files_below,
    require_size,
)
from maskrcnn.data.converters.objects import Polygon, checked_polygon, ellipse_mask, grouped
from maskrcnn.data.converters.reading import Header, decode_labels, read_json
from maskrcnn.data.rle import rle_of_crop
from maskrcnn.errors import InputError
from maskrcnn.paths import leaves_folder
from maskrcnn.structures import MaskCrop

Point = Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=2, max_length=2)]


class Shape(TypedDict):
    """One shape."""

    label: str
    points: list[Point]
    shape_type: NotRequired[str | None]
    group_id: NotRequired[int | str | None]
    mask: NotRequired[str | None]  # base64 of a PNG, of the bounding box that `points` are


class LabelMeFile(TypedDict):
    """One file."""

    shapes: list[Shape]
    imagePath: str
    imageHeight: NotRequired[int | None]
    imageWidth: NotRequired[int | None]


_SCHEMA = TypeAdapter(LabelMeFile)


def read(conversion: Conversion) -> dict[str, CocoData]:
    """Return the annotations of a folder of JSON files, or of one file."""
    source = conversion.source
    folder = source if source.is_dir() else source.parent
    names = files_below(source, [".json"]) if source.is_dir() else [source.name]
    photographs = conversion.photographs(folder)
    return assemble((_image(folder / name, photographs, conversion) for name in names), conversion)


def _image(path: Path, photographs: ImageFolder, conversion: Conversion) -> LabelledImage:
    content = read_json(path, _SCHEMA, "a LabelMe file")
    name = _photograph(content["imagePath"], path, photographs)
    header = photographs.header(name)
    height, width = content.get("imageHeight"), content.get("imageWidth")
    if height is not None and width is not None:
        require_size(header, height, width, name, path)
    parts = _parts(content["shapes"], header, path, conversion)
    return LabelledImage(name, header, list(grouped(parts, header)))


def _photograph(written: str, path: Path, photographs: ImageFolder) -> str:
    """Return the image that a file names by a path relative to itself; elsewhere, the one with this file name."""
    written = written.replace("\\", "/")
    absolute = os.path.abspath(path.parent / written)
    relative = os.path.relpath(absolute, os.path.abspath(photographs.path))
    inside = not leaves_folder(relative) and "\0" not in relative and os.path.isfile(absolute)
    return photographs.name(relative if inside else posixpath.basename(written), path)


def _parts(
    shapes: list[Shape], header: Header, path: Path, conversion: Conversion
) -> Iterator[tuple[str, int | str | None, Polygon | dict[str, Any]]]:
    for number, shape in enumerate(shapes):
        part = _part(shape, header, f"{path}: shapes[{number}]")
        if part is None:
            kind = shape.get("shape_type") or "polygon"
            conversion.leave_out(f"shapes of type {kind} without area are left out", str(path))
        else:
            yield shape["label"], shape.get("group_id"), part


def _part(shape: Shape, header: Header, where: str) -> Polygon | dict[str, Any] | None:
    """Return the polygon or the mask of a shape; None if it has no area."""
    kind, points = shape.get("shape_type") or "polygon", shape["points"]
    if kind in ("rectangle", "circle", "mask") and len(points) != 2:
        raise InputError(f"{where}: a {kind} has two points, not {len(points)}")
    if kind == "polygon" and len(points) >= 3:
        return checked_polygon(points, where)
    if kind == "rectangle":
        (x1, y1), (x2, y2) = points
        return checked_polygon([(x1, y1), (x2, y1), (x2, y2), (x1, y2)], where) if x1 != x2 and y1 != y2 else None
    if kind == "circle":
        (x, y), rim = checked_polygon(points, where)[:2], points[1]
        radius = math.dist((x, y), rim)
        return ellipse_mask((x, y), (radius, radius), 0.0, header) if radius > 0 else None
    if kind == "mask":
        return _mask(shape, header, where)
    return None


def _mask(shape: Shape, header: Header, where: str) -> dict[str, Any] | None:
    try:
        png = base64.b64decode(shape.get("mask") or "", validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"{where}: its mask is not base64") from None
    pixels = decode_labels(io.BytesIO(png), f"{where}: the PNG of its mask").astype(bool)
    checked_polygon(shape["points"], where)
    x, y = (round(value) for value in shape["points"][0])
    height, width = pixels.shape
    if x < 0 or y < 0 or x + width > header.width or y + height > header.height:
        raise InputError(f"{where}: its mask of {width} x {height} pixels at ({x}, {y}) reaches out of the image")
    if not pixels.any():
        return None
    return rle_of_crop(MaskCrop(x, y, pixels.astype(np.uint8)), header.height, header.width)
