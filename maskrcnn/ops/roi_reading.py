"""Explain what a RoI layer reads for one box: the quantised region, its bins and its sample points.

Coordinates are cells of the feature map: column `j` covers `[j, j + 1)`, and its value is located at `j + 0.5`.

Shapes: H and W of the feature map, S size of the output grid, N sample points per bin and axis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from maskrcnn.ops.roi import RoIAlignConfig, RoIPoolConfig, SamplingLayerConfig, cut_bins, cut_cells, rounded_cells

Span = tuple[float, float]  # start and end


@dataclass(frozen=True)
class AxisReading:
    """What is read along one axis, in cells. It may extend beyond the feature map."""

    region: Span  # the box as the layer reads it: quantised (RoIPool, RoIWarp) or exact (RoIAlign)
    bins: tuple[Span, ...]  # S; whole cells for RoIPool
    points: tuple[tuple[float, ...], ...]  # S times N bilinear sample points; N is 0 for RoIPool


@dataclass(frozen=True)
class RoIReading:
    """What is read for one box. The bin in row i and column j is `y.bins[i]` x `x.bins[j]`; points likewise."""

    x: AxisReading
    y: AxisReading
    pooled: Tensor  # (S, S), output of the layer


def read_box(
    config: RoIPoolConfig | SamplingLayerConfig,
    features: Tensor,
    box: tuple[float, float, float, float],
    *,
    stride: float,
    size: int,
) -> RoIReading:
    """Return the region, bins and sample points that a RoI layer reads for a box, and its output.

    Args:
        config: config of the layer.
        features: (H, W) float32, one channel of a feature map.
        box: (x1, y1, x2, y2) in pixels of the image.
        stride: image pixels per cell of the feature map.
        size: S.
    """
    boxes = torch.tensor([box])
    image = torch.zeros(1, dtype=torch.int64)
    pooled = config.build()(features[None, None], boxes, image, stride=stride, size=size)[0, 0]
    x1, y1, x2, y2 = _region(config, boxes, stride)
    return RoIReading(_read_axis(config, (x1, x2), size), _read_axis(config, (y1, y2), size), pooled)


def _region(config: RoIPoolConfig | SamplingLayerConfig, boxes: Tensor, stride: float) -> list[float]:
    """Return x1, y1, x2, y2 of the region that the layer reads for the box (1, 4), in cells."""
    if isinstance(config, RoIPoolConfig) and config.rounding == "floor":
        return cut_cells(boxes, stride)[0].tolist()
    if not isinstance(config, RoIAlignConfig):
        return rounded_cells(boxes, stride)[0].tolist()
    x1, y1, x2, y2 = (boxes[0] / stride).tolist()
    if config.aligned:
        return [x1, y1, x2, y2]
    # Legacy RoIAlign uses coordinates as indices of values, and values are located half a cell further.
    return [x1 + 0.5, y1 + 0.5, max(x2, x1 + 1) + 0.5, max(y2, y1 + 1) + 0.5]


def _read_axis(config: RoIPoolConfig | SamplingLayerConfig, region: Span, size: int) -> AxisReading:
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
    # Float32 as in the kernel: for 57 cells in 7 bins, one bin gets a cell more than in exact arithmetic.
    first, end = (index * side).floor() + start, ((index + 1) * side).ceil() + start
    return tuple(zip(first.tolist(), end.tolist(), strict=True))


def _cut_bins(region: Span, size: int) -> tuple[Span, ...]:
    starts, ends = torch.tensor(region).long()[:, None]
    first, end = cut_bins(starts, ends, size)
    return tuple(zip(first[0].tolist(), end[0].tolist(), strict=True))
