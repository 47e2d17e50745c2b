"""Checks of the polygons of annotations, without an image.

A polygon is `[x0, y0, x1, y1, ...]` in pixels of the image. Shapes: A objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np
from pycocotools import mask as cocoapi

SURE = 1.0  # px; the radius of a circle that has the centre of a pixel inside, wherever it is, and some more


def without_pixels(objects: Sequence[Sequence[Sequence[float]]], sizes: np.ndarray) -> np.ndarray:
    """Return whether the polygons of each object cover no pixel, (A,) bool.

    Only small, thin and partly outside polygons are rasterised, as pycocotools does it: any other polygon encloses a
    circle with the centre of a pixel, because its area is at most its perimeter times the radius of such a circle.

    Args:
        objects: at least one polygon of three or more points for each of A objects.
        sizes: (A, 2) height and width of their images.
    """
    if not objects:
        return np.zeros(0, bool)
    owner = np.repeat(np.arange(len(objects)), [len(polygons) for polygons in objects])
    covers = _surely_cover(list(chain.from_iterable(objects)), sizes[owner])
    sure = np.zeros(len(objects), bool)
    np.logical_or.at(sure, owner, covers)
    empty = np.zeros(len(objects), bool)
    for index in np.flatnonzero(~sure).tolist():
        codes = cocoapi.frPyObjects([list(polygon) for polygon in objects[index]], *sizes[index].tolist())
        empty[index] = not cocoapi.area(codes).any()
    return empty


def _surely_cover(polygons: Sequence[Sequence[float]], sizes: np.ndarray) -> np.ndarray:
    """Return whether each polygon (P,) lies inside its image and is thick enough to cover a pixel."""
    lengths = np.array([len(polygon) // 2 for polygon in polygons])
    starts = np.cumsum(lengths) - lengths
    points = np.fromiter(chain.from_iterable(polygons), np.float64, 2 * lengths.sum()).reshape(-1, 2)
    following = np.arange(1, len(points) + 1)
    following[starts + lengths - 1] = starts  # the last point of a polygon is followed by its first one
    steps = points[following] - points
    perimeters = np.add.reduceat(np.hypot(steps[:, 0], steps[:, 1]), starts)
    origins = points[np.repeat(starts, lengths)]  # coordinates near zero keep the precision of the products
    x, y = (points - origins).T
    areas = np.abs(np.add.reduceat(x * steps[:, 1] - y * steps[:, 0], starts)) / 2
    lowest, highest = np.minimum.reduceat(points, starts), np.maximum.reduceat(points, starts)
    inside = (lowest >= 0).all(axis=1) & (highest <= sizes[:, ::-1]).all(axis=1)
    return inside & (areas >= SURE * perimeters)
