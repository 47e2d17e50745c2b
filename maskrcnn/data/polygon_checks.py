"""Checks of the polygons of annotations, without an image.

A polygon is `(x0, y0, x1, y1, ...)` in pixels of the image. The polygons of all objects stand one after another in one
array, as in `coco_arrays`. Shapes: A objects, P polygons, V coordinates, n points.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from pycocotools import mask as cocoapi

SURE = 1.0  # px; the radius of a circle that has the centre of a pixel inside, wherever it is, and some more
BLOCK = 2**20  # coordinates that are checked at a time, which bounds the memory


def without_pixels(
    coordinates: np.ndarray, coordinate_starts: np.ndarray, polygon_starts: np.ndarray, sizes: np.ndarray
) -> np.ndarray:
    """Return whether an object has polygons that cover no pixel, (A,) bool.

    Only small, thin and partly outside polygons are rasterised, as pycocotools does it: any other polygon encloses a
    circle with the centre of a pixel, because its area is at most its perimeter times the radius of such a circle.

    Args:
        coordinates: (V,) float64, of polygons of three or more points.
        coordinate_starts: (P + 1,) the first coordinate of each polygon.
        polygon_starts: (A + 1,) the first polygon of each object.
        sizes: (A, 2) height and width of their images.
    """
    numbers = np.diff(polygon_starts)
    owners = np.repeat(np.arange(len(sizes)), numbers)
    is_settled = numbers == 0
    for block in _blocks(coordinate_starts):
        starts, owner = coordinate_starts[block.start : block.stop + 1], owners[block]
        points = coordinates[starts[0] : starts[-1]].reshape(-1, 2)
        is_settled[owner[_surely_cover(points, (starts[:-1] - starts[0]) // 2, sizes[owner])]] = True
    empty = np.zeros(len(sizes), bool)
    for row in np.flatnonzero(~is_settled).tolist():
        ends = coordinate_starts[polygon_starts[row] : polygon_starts[row + 1] + 1].tolist()
        codes = cocoapi.frPyObjects([coordinates[start:end] for start, end in pairwise(ends)], *sizes[row].tolist())
        empty[row] = not cocoapi.area(codes).any()
    return empty


def _blocks(starts: np.ndarray) -> Iterator[slice]:
    """Yield slices of successive polygons that have about `BLOCK` coordinates; `starts` is (P + 1,)."""
    edges = np.searchsorted(starts, np.arange(0, starts[-1] + BLOCK, BLOCK)).clip(max=len(starts) - 1)
    yield from (slice(start, end) for start, end in pairwise(np.unique(edges).tolist()))


def _surely_cover(points: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return whether each polygon lies inside its image and is thick enough to cover a pixel, (P,) bool.

    Args:
        points: (n, 2) x, y of all polygons.
        starts: (P,) the first point of each.
        sizes: (P, 2) height and width of their images.
    """
    lengths = np.diff(starts, append=len(points))
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
