"""Masks of single objects: their parts, areas and unions, and their pixels in another image.

A window is a box `(x1, y1, x2, y2)` of whole pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from maskrcnn.data.rle import empty_crop
from maskrcnn.ops.mask_tables import summed_area
from maskrcnn.structures import AxisAlignedMap, MaskCrop

Window = tuple[int, int, int, int]

ROUNDING = 1e-6  # px; a smaller distance to a pixel edge is a rounding error


def visible_box(
    mask: MaskCrop, placement: AxisAlignedMap, height: int, width: int
) -> tuple[float, float, float, float]:
    """Return the smallest box around the part of a mask that lies inside an image of `height x width`.

    Args:
        mask: in annotated pixels.
        placement: from annotated pixels to those of the image.
        height, width: size of the image.

    Returns:
        x1, y1, x2, y2 in pixels of the image; zeros if no part of the mask is visible.
    """
    columns = _visible_range(mask.x, mask.pixels.shape[1], placement.scale_x, placement.offset_x, width)
    rows = _visible_range(mask.y, mask.pixels.shape[0], placement.scale_y, placement.offset_y, height)
    part = mask.pixels[rows, columns]
    x, y = np.flatnonzero(part.any(axis=0)) + columns.start, np.flatnonzero(part.any(axis=1)) + rows.start
    if len(x) == 0:
        return 0.0, 0.0, 0.0, 0.0
    x1, x2 = (float(edge * placement.scale_x + placement.offset_x) for edge in (mask.x + x[0], mask.x + x[-1] + 1))
    y1, y2 = (float(edge * placement.scale_y + placement.offset_y) for edge in (mask.y + y[0], mask.y + y[-1] + 1))
    return max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))


def _visible_range(first: int, count: int, scale: float, offset: float, length: int) -> slice:
    """Return which of `count` annotated pixels from `first` on are at least partly in `0..length` of the image."""
    start = math.floor((0 - offset) / scale + ROUNDING) - first
    stop = math.ceil((length - offset) / scale - ROUNDING) - first
    start = min(max(start, 0), count)
    return slice(start, min(max(stop, start), count))


def rasterize(mask: MaskCrop, placement: AxisAlignedMap, height: int, width: int) -> MaskCrop:
    """Return a mask in the pixels of an image of `height x width`: those of which it covers at least half.

    See `visible_box` for the arguments. The covered area of each pixel is exact, as in `mask_tables.mask_coverage`.
    """
    x1, y1, x2, y2 = visible_box(mask, placement, height, width)
    left, top, right, bottom = math.floor(x1), math.floor(y1), math.ceil(x2), math.ceil(y2)
    if right <= left or bottom <= top:
        return empty_crop()
    columns = (np.arange(left, right + 1) - placement.offset_x) / placement.scale_x - mask.x
    rows = (np.arange(top, bottom + 1) - placement.offset_y) / placement.scale_y - mask.y
    table = summed_area(mask.pixels).astype(np.float64)
    covered = np.diff(np.diff(_interpolate(_interpolate(table, rows).T, columns).T, axis=0), axis=1)
    half = 0.5 / (placement.scale_x * placement.scale_y)  # in annotated pixels
    return tight(MaskCrop(left, top, (covered >= half * (1 - ROUNDING)).astype(np.uint8)))


def tight(mask: MaskCrop) -> MaskCrop:
    """Return a mask cropped to its pixels; without any, an empty one."""
    rows, columns = np.flatnonzero(mask.pixels.any(axis=1)), np.flatnonzero(mask.pixels.any(axis=0))
    if len(rows) == 0:
        return empty_crop()
    part = mask.pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return MaskCrop(mask.x + int(columns[0]), mask.y + int(rows[0]), np.ascontiguousarray(part))


def _interpolate(table: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Interpolate linearly between the rows of a table; beyond its ends, the value is that of the end."""
    position = position.clip(0, len(table) - 1)
    lower = np.minimum(position.astype(np.int64), len(table) - 2)
    return table[lower] + (table[lower + 1] - table[lower]) * (position - lower)[:, None]


def window_of(crop: MaskCrop) -> Window:
    """Return the window that the crop covers."""
    height, width = crop.pixels.shape
    return crop.x, crop.y, crop.x + width, crop.y + height


def area(crop: MaskCrop) -> int:
    """Return the number of pixels of the mask."""
    return int(np.count_nonzero(crop.pixels))


def within(crop: MaskCrop, window: Window) -> MaskCrop:
    """Return the part of a mask inside a window, as a view of its pixels."""
    x1, y1, x2, y2 = window_of(crop)
    left, top, right, bottom = max(x1, window[0]), max(y1, window[1]), min(x2, window[2]), min(y2, window[3])
    if left >= right or top >= bottom:
        return empty_crop()
    return MaskCrop(left, top, crop.pixels[top - y1 : bottom - y1, left - x1 : right - x1])


def intersection(first: MaskCrop, second: MaskCrop) -> int:
    """Return the number of pixels that two masks share."""
    first = within(first, window_of(second))
    second = within(second, window_of(first))
    return int(np.count_nonzero(first.pixels.astype(bool) & second.pixels.astype(bool)))


def iou(first: MaskCrop, second: MaskCrop) -> float:
    """Return the IoU of two masks; 0 for two empty ones."""
    shared = intersection(first, second)
    return shared / (area(first) + area(second) - shared) if shared else 0.0


def union(crops: Sequence[MaskCrop]) -> MaskCrop:
    """Return the union of masks, at least one."""
    windows = np.array([window_of(crop) for crop in crops if crop.pixels.size] or [(0, 0, 0, 0)])
    (left, top), (right, bottom) = windows[:, :2].min(axis=0).tolist(), windows[:, 2:].max(axis=0).tolist()
    pixels = np.zeros((bottom - top, right - left), np.uint8)
    for crop in crops:
        if crop.pixels.size:
            x1, y1, x2, y2 = window_of(crop)
            pixels[y1 - top : y2 - top, x1 - left : x2 - left] |= crop.pixels
    return MaskCrop(left, top, pixels)
