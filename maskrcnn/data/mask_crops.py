"""Masks of single objects: which part of them an image shows, and their pixels in another image."""

from __future__ import annotations

import math

import numpy as np

from maskrcnn.data.rle import empty_crop
from maskrcnn.ops.mask_tables import summed_area
from maskrcnn.structures import AxisAlignedMap, MaskCrop

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
