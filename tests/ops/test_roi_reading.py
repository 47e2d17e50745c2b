"""`read_box`: pooling by its bins and points must give the output of the layer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from maskrcnn.ops.roi import RoIAlignConfig, RoILayerConfig, RoIPoolConfig, RoIWarpConfig
from maskrcnn.ops.roi_reading import RoIReading, read_box

CHOICES = [
    RoIPoolConfig(),
    RoIPoolConfig(rounding="floor"),
    RoIWarpConfig(),
    RoIWarpConfig(aggregate="maximum", sampling_ratio=3),
    RoIAlignConfig(),
    RoIAlignConfig(aligned=False),
    RoIAlignConfig(sampling_ratio=0),
    RoIAlignConfig(aggregate="maximum", sampling_ratio=1),
]


def pool_by_reading(config: RoILayerConfig, features: Tensor, reading: RoIReading) -> list[list[float]]:
    """Pool a feature map (H, W) using only the reading: the cells of its bins, or its sample points."""
    size = len(reading.x.bins)
    grid = [[0.0] * size for _ in range(size)]
    for i, j in itertools.product(range(size), repeat=2):
        if isinstance(config, RoIPoolConfig):
            values = cell_values(features, reading.y.bins[i], reading.x.bins[j])
        else:
            values = [interpolate(features, y, x) for y in reading.y.points[i] for x in reading.x.points[j]]
        average = isinstance(config, RoIWarpConfig | RoIAlignConfig) and config.aggregate == "average"
        if values:
            grid[i][j] = sum(values) / len(values) if average else max(values)
    return grid


def cell_values(features: Tensor, rows: tuple[float, float], columns: tuple[float, float]) -> list[float]:
    height, width = features.shape
    inside = [
        (row, column)
        for row in range(int(rows[0]), int(rows[1]))
        for column in range(int(columns[0]), int(columns[1]))
        if 0 <= row < height and 0 <= column < width
    ]
    return [features[cell].item() for cell in inside]


def interpolate(features: Tensor, y: float, x: float) -> float:
    """Interpolate bilinearly; the value of cell j is located at j + 0.5."""
    (height, width), (y, x) = features.shape, (y - 0.5, x - 0.5)
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    corners = itertools.product((math.floor(y), math.ceil(y)), (math.floor(x), math.ceil(x)))
    weights = {(row, column): max(1 - abs(y - row), 0) * max(1 - abs(x - column), 0) for row, column in corners}
    return sum(weight * features[cell].item() for cell, weight in weights.items())


@pytest.mark.parametrize("config", CHOICES, ids=str)
def test_the_reading_gives_what_the_layer_returns(config: RoILayerConfig, random_boxes: Callable[..., Tensor]):
    features = torch.randn(9, 13)
    for stride, size in ((4, 3), (4, 1), (3.7, 2)):
        # Without the last three boxes: points exactly on the border depend on rounding.
        for box in random_boxes(12, height=36.0, width=52.0)[:-3].tolist():
            if isinstance(config, RoIPoolConfig) or config.sampling_ratio or box[2] - box[0] < 100:
                reading = read_box(config, features, tuple(box), stride=stride, size=size)
                expected = torch.tensor(pool_by_reading(config, features, reading))
                torch.testing.assert_close(reading.pooled, expected, rtol=1e-4, atol=1e-4)


def test_the_bins_of_roi_pool_are_those_of_the_kernel_to_the_last_bit():
    features = torch.arange(64.0).expand(64, 64).contiguous()
    for cells_in_box in range(1, 64):
        for size in (2, 7, 14):
            box = (0.0, 0.0, cells_in_box - 1.0, 1.0)
            reading = read_box(RoIPoolConfig(), features, box, stride=1, size=size)
            assert reading.pooled[0].tolist() == [
                end - 1 for _, end in reading.x.bins
            ]  # on a ramp the maximum is the last cell


def read(config: RoILayerConfig, box: tuple[float, float, float, float], stride: float, size: int) -> RoIReading:
    return read_box(config, torch.zeros(25, 25), box, stride=stride, size=size)


def test_by_hand_whole_cells():
    box = (0.0, 3.0, 7.0, 8.0)
    rounded = read(RoIPoolConfig(), box, 1, 2)
    assert (rounded.x.region, rounded.x.bins) == ((0, 8), ((0, 4), (4, 8)))
    assert (rounded.y.region, rounded.y.bins) == ((3, 9), ((3, 6), (6, 9)))
    assert rounded.x.points == ((), ())
    cut = read(RoIPoolConfig(rounding="floor"), box, 1, 2)
    assert (cut.x.region, cut.x.bins) == ((0, 7), ((0, 3), (3, 7)))
    assert (cut.y.region, cut.y.bins) == ((3, 8), ((3, 5), (5, 8)))
    small = read(RoIPoolConfig(rounding="floor"), (1.2, 1.3, 1.8, 3.9), 1, 2)  # inside column 1
    assert (small.x.region, small.x.bins) == ((1, 2), ((1, 2), (1, 2)))
    assert (small.y.region, small.y.bins) == ((1, 3), ((1, 2), (2, 3)))


def test_by_hand_points():
    box = (0.0, 3.0, 7.0, 8.0)
    warp = read(RoIWarpConfig(), box, 1, 2)
    assert (warp.y.region, warp.y.bins) == ((3, 9), ((3, 6), (6, 9)))
    assert warp.y.points == ((3.75, 5.25), (6.75, 8.25))
    align = read(RoIAlignConfig(), box, 1, 2)
    assert (align.y.region, align.y.bins) == ((3, 8), ((3, 5.5), (5.5, 8)))
    assert align.y.points == ((3.625, 4.875), (6.125, 7.375))
    assert align.x.points == ((0.875, 2.625), (4.375, 6.125))


def test_by_hand_legacy_roi_align_shifts_by_half_a_cell_and_widens_small_boxes():
    legacy = read(RoIAlignConfig(aligned=False, sampling_ratio=1), (4.0, 8.0, 4.8, 16.0), 4, 1)
    assert legacy.x.region == (1.5, 2.5)
    assert legacy.x.points == ((2.0,),)
    assert legacy.y.region == (2.5, 4.5)


def test_adaptive_sampling_takes_one_point_per_cell():
    reading = read(RoIAlignConfig(sampling_ratio=0), (0.0, 0.0, 10.0, 4.0), 1, 4)
    assert [len(points) for points in reading.x.points] == [3] * 4  # 2.5 cells per bin
    assert [len(points) for points in reading.y.points] == [1] * 4
