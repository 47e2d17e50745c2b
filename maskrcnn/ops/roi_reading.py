"""What a RoI layer makes of one box, as numbers: the cells it reads, its bins, its sample points.

Everything is in cells of the map: the cell in column `j` covers `[j, j + 1)`, and its value stands at `j + 0.5`.

Shapes: H and W of the feature map, S size of the grid, N sample points a bin and axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from maskrcnn.ops.roi import RoIAlignConfig, RoIConfig, RoIPoolConfig, cut_bins, cut_cells, rounded_cells

Span = tuple[float, float]  # start and end


@dataclass(frozen=True)
class AxisReading:
    """What is read along one axis, in cells. It may reach beyond the map."""

    region: Span  # all of the box that is read, as the layer quantised it, or as it is
    bins: tuple[Span, ...]  # S; whole cells where the layer takes whole cells
    points: tuple[tuple[float, ...], ...]  # S times N, where the map is read bilinearly; N is 0 for whole cells


@dataclass(frozen=True)
class RoIReading:
    """What is read of one box. The bin in row i and column j is `y.bins[i]` by `x.bins[j]`, its points likewise."""

    x: AxisReading
    y: AxisReading
    pooled: Tensor  # (S, S), what the layer itself returns


def read_box(
    config: RoIConfig, features: Tensor, box: tuple[float, float, float, float], *, stride: float, size: int
) -> RoIReading:
    """Return what a layer reads of a box, and what comes out.

    Args:
        config: the layer.
        features: (H, W) float32, one channel of a feature map.
        box: (x1, y1, x2, y2) in pixels of the image.
        stride: image pixels per cell of the map.
        size: S.
    """
    boxes = torch.tensor([box])
    image = torch.zeros(1, dtype=torch.int64)
    pooled = config.build()(features[None, None], boxes, image, stride=stride, size=size)[0, 0]
    x1, y1, x2, y2 = _region(config, boxes, stride)
    return RoIReading(_read_axis(config, (x1, x2), size), _read_axis(config, (y1, y2), size), pooled)


def _region(config: RoIConfig, boxes: Tensor, stride: float) -> list[float]:
    """Return the box (1, 4) as the layer sees it, in cells."""
    if isinstance(config, RoIPoolConfig) and config.rounding == "floor":
        return cut_cells(boxes, stride)[0].tolist()
    if not isinstance(config, RoIAlignConfig):
        return rounded_cells(boxes, stride)[0].tolist()
    x1, y1, x2, y2 = (boxes[0] / stride).tolist()
    if config.aligned:
        return [x1, y1, x2, y2]
    # The first RoIAlign takes a corner for the index of a value, which stands half a cell further on.
    return [x1 + 0.5, y1 + 0.5, max(x2, x1 + 1) + 0.5, max(y2, y1 + 1) + 0.5]


def _read_axis(config: RoIConfig, region: Span, size: int) -> AxisReading:
    if isinstance(config, RoIPoolConfig):
        bins = _rounded_bins(region, size) if config.rounding == "round" else _cut_bins(region, size)
        return AxisReading(region, bins, ((),) * size)
    start, side = region[0], (region[1] - region[0]) / size
    bins = tuple((start + index * side, start + (index + 1) * side) for index in range(size))
    count = config.sampling_ratio or math.ceil(side)
    points = tuple(tuple(first + (n + 0.5) * side / count for n in range(count)) for first, _ in bins)
    return AxisReading(region, bins, points)


def _rounded_bins(region: Span, size: int) -> tuple[Span, ...]:
    start, side = region[0], torch.tensor(region[1] - region[0]) / size
    index = torch.arange(size)
    # In float32, as the kernel does it: of 57 cells in 7 bins, it gives a cell more to one bin than exact numbers do.
    first, end = (index * side).floor() + start, ((index + 1) * side).ceil() + start
    return tuple(zip(first.tolist(), end.tolist(), strict=True))


def _cut_bins(region: Span, size: int) -> tuple[Span, ...]:
    starts, ends = torch.tensor(region).long()[:, None]
    first, end = cut_bins(starts, ends, size)
    return tuple(zip(first[0].tolist(), end[0].tolist(), strict=True))
