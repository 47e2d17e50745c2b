"""Objects of images in the formats of annotation tools: polygons and masks.

Coordinates are continuous pixels `(x, y)` of the upright image: the pixel in row i and column j covers
`[j, j + 1) x [i, i + 1)`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as cocoapi

from maskrcnn.data.converters.reading import Header
from maskrcnn.data.rle import rle_of_positions, rle_of_runs
from maskrcnn.errors import InputError

FARTHEST = 1e5  # px, of a coordinate; the schema of COCO files has the same limit
LONGEST_OUTLINE = 4e6  # px; rasterising takes about 40 bytes for each

Polygon = list[float]  # x0, y0, x1, y1, ...


class LabelledObject(NamedTuple):
    """An object of an image."""

    class_name: str
    box: tuple[float, float, float, float]  # x, y, width, height
    area: float  # px
    segmentation: list[Polygon] | dict[str, Any] | None = None  # the polygons' union, or a compressed RLE
    crowd: bool = False

    @classmethod
    def of_rle(cls, class_name: str, rle: dict[str, Any], *, crowd: bool = False) -> LabelledObject:
        """Return the object with a mask of image size."""
        return cls(class_name, tuple(cocoapi.toBbox(rle).tolist()), int(cocoapi.area(rle)), rle, crowd)

    @classmethod
    def of_polygons(cls, class_name: str, polygons: Sequence[Polygon], header: Header) -> LabelledObject:
        """Return the object that the polygons cover together. They stay polygons; the area is that of the pixels."""
        points = np.concatenate([np.reshape(polygon, (-1, 2)) for polygon in polygons])
        (x1, y1), (x2, y2) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
        area = float(cocoapi.area(_rasterised(polygons, header)))
        return cls(class_name, (x1, y1, x2 - x1, y2 - y1), area, list(polygons))


def checked_polygon(points: Sequence[Sequence[float]], where: str) -> Polygon:
    """Return points (x, y) as a polygon.

    Raises:
        InputError: a coordinate is not finite or too far away, or the outline is too long. The message begins with
            `where`, the file and the place in it.
    """
    array = np.asarray(points, np.float64).reshape(-1, 2)
    if not (np.abs(array) <= FARTHEST).all():  # False for NaN
        raise InputError(f"{where}: a coordinate is not a number from -{FARTHEST:g} to {FARTHEST:g} px")
    if np.linalg.norm(array - np.roll(array, 1, axis=0), axis=1).sum() > LONGEST_OUTLINE:
        raise InputError(f"{where}: the outline is longer than {LONGEST_OUTLINE:g} px")
    return [float(value) for value in array.flatten()]


def union(class_name: str, parts: Sequence[Polygon | dict[str, Any]], header: Header) -> LabelledObject:
    """Return the object of several polygons and masks (RLE). Polygons alone stay polygons."""
    polygons = [part for part in parts if isinstance(part, list)]
    if len(polygons) == len(parts):
        return LabelledObject.of_polygons(class_name, polygons, header)
    codes = [part for part in parts if isinstance(part, dict)]
    if not polygons and len(codes) == 1:
        return LabelledObject.of_rle(class_name, codes[0])
    merged = cocoapi.merge([*codes, *([_rasterised(polygons, header)] if polygons else [])])
    return LabelledObject.of_rle(class_name, {"size": merged["size"], "counts": merged["counts"].decode()})


def grouped(
    parts: Iterable[tuple[str, Hashable | None, Polygon | dict[str, Any]]], header: Header
) -> Iterator[LabelledObject]:
    """Yield an object for each part (class name, group, polygon or mask); those of a class and group are one object.

    A part whose group is None is an object of its own.
    """
    groups: dict[tuple[str, bool, Hashable], list[Polygon | dict[str, Any]]] = {}
    for number, (class_name, group, part) in enumerate(parts):
        key = (class_name, group is None, number if group is None else group)
        groups.setdefault(key, []).append(part)
    for (class_name, *_), members in groups.items():
        yield union(class_name, members, header)


def _rasterised(polygons: Sequence[Polygon], header: Header) -> dict[str, Any]:
    code: dict[str, Any] = cocoapi.merge(cocoapi.frPyObjects(list(polygons), header.height, header.width))
    return code


def label_masks(labels: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each value but 0 of a label image (H, W), ascending, and the RLE of its pixels.

    The work grows with the number of pixels, not with that of the values.
    """
    height, width = labels.shape
    flat = labels.ravel(order="F")  # RLE runs along columns
    inside = np.flatnonzero(flat)
    if len(inside) == 0:
        return
    values = flat[inside].astype(np.int64)
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[order], prepend=values[order][0] - 1))
    for value, positions in zip(values[order][starts].tolist(), np.split(inside[order], starts[1:]), strict=True):
        yield value, rle_of_positions(positions, height, width)


def ellipse_mask(
    centre: tuple[float, float], radii: tuple[float, float], degrees: float, header: Header
) -> dict[str, Any] | None:
    """Return the RLE of the pixels whose centres lie in an ellipse; None if there are none.

    Args:
        centre: x and y.
        radii: positive, along x and y before the ellipse is turned.
        degrees: by which it is turned clockwise.
        header: of the image.
    """
    (x, y), (a, b) = centre, radii
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    # The ellipse is p u^2 + 2 q u v + r v^2 <= 1, where (u, v) is the offset from the centre: v solves it for each u.
    p, r = (cosine / a) ** 2 + (sine / b) ** 2, (sine / a) ** 2 + (cosine / b) ** 2
    q = cosine * sine * (1 / a**2 - 1 / b**2)
    u = np.arange(header.width) + 0.5 - x
    root = (q * u) ** 2 - r * (p * u**2 - 1)
    columns = np.flatnonzero(root >= 0)
    middle, half = y - q * u[columns] / r, np.sqrt(root[columns]) / r
    first = np.ceil(middle - half - 0.5).clip(0, header.height).astype(np.int64)
    after = np.floor(middle + half + 0.5).clip(0, header.height).astype(np.int64)
    columns, first, after = (array[after > first] for array in (columns, first, after))
    if len(columns) == 0:
        return None
    return rle_of_runs(columns * header.height + first, columns * header.height + after, header.height, header.width)
