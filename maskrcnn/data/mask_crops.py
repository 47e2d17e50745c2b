"""Masks of single objects: which part of them an image shows."""

from __future__ import annotations

import math

import numpy as np

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
