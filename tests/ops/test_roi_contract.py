"""Tests for all RoI layers, with all backbone outputs, devices and precisions.

The expected outputs and gradients come from slow loops in float64 over single cells or sample points.

Shapes: B images, C channels, H and W of a feature map, R boxes, S size of the output grid, N sample points per
bin and axis.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from maskrcnn.ops.roi import RoIAlignConfig, RoILayer, RoILayerConfig, RoIPoolConfig, RoIPooler, RoIWarpConfig

CHOICES: list[RoILayerConfig] = [
    RoIPoolConfig(),
    RoIPoolConfig(rounding="floor"),
    RoIWarpConfig(),
    RoIWarpConfig(sampling_ratio=0),
    RoIWarpConfig(aggregate="maximum"),
    RoIAlignConfig(),
    RoIAlignConfig(sampling_ratio=0),
    RoIAlignConfig(aggregate="maximum"),
    RoIAlignConfig(aligned=False),
    RoIAlignConfig(aggregate="maximum", aligned=False, sampling_ratio=1),
]
OUTPUTS = [(4,), (8,), (16,), (32,), (64,), (4, 8, 16, 32, 64)]  # strides of single maps and of a pyramid
PRECISIONS = ["float64", "float32", "bfloat16", "float16", "autocast"]
SIZE = 2
HEIGHT, WIDTH = 48, 80  # of the image

# Boxes for each level of the pyramid, then special cases: the whole image, one pixel, no area, no width, partly
# outside at the corner, right of the image, above and left of it, and huge.
BOXES = [
    [13.3, 9.1, 22.9, 15.7],
    [30.2, 21.4, 51.8, 42.6],
    [6.6, 2.3, 57.1, 40.9],
    [-47.7, 11.2, 31.3, 101.9],
    [-60.7, -50.8, 95.3, 101.9],
    [0.0, 0.0, 80.0, 48.0],
    [5.0, 6.0, 6.0, 7.0],
    [9.0, 8.0, 9.0, 8.0],
    [3.0, 4.0, 3.0, 20.0],
    [-8.0, -8.0, 4.0, 4.0],
    [170.0, 0.0, 179.0, 9.0],
    [-99.0, -99.0, -90.0, -90.0],
    [-500.0, -700.0, 900.0, 1100.0],
]


def name(config: RoILayerConfig) -> str:
    return "-".join(f"{key}:{value}" if key != "kind" else value for key, value in config.model_dump().items())


every_choice = pytest.mark.parametrize("config", CHOICES, ids=name)
every_output = pytest.mark.parametrize("strides", OUTPUTS, ids=str)
every_precision = pytest.mark.parametrize("precision", PRECISIONS)
every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


# The slow loops


def loop(config: RoILayerConfig) -> RoILayer:
    """Return the reference implementation of a layer, differentiable with respect to the map."""
    if isinstance(config, RoIPoolConfig):
        return functools.partial(loop_over_cells, rounding=config.rounding)
    return functools.partial(loop_over_points, config=config)


def loop_over_cells(
    features: Tensor, boxes: Tensor, images: Tensor, *, stride: float, size: int, rounding: str
) -> Tensor:
    out = zeros_in_graph(features, len(boxes), size)
    for r, box in enumerate(boxes.tolist()):
        left, top, right, bottom = rounded(box, stride) if rounding == "round" else rounded_down(box, stride)
        ranges = overlapping_bins if rounding == "round" else disjoint_bins
        for (i, rows), (j, columns) in itertools.product(
            enumerate(ranges(top, bottom, size)), enumerate(ranges(left, right, size))
        ):
            inside = [
                features[images[r], :, row, column]
                for row, column in itertools.product(rows, columns)
                if 0 <= row < features.shape[2] and 0 <= column < features.shape[3]
            ]
            if inside:
                out[r, :, i, j] = torch.stack(inside).amax(dim=0)
    return out


def zeros_in_graph(features: Tensor, count: int, size: int) -> Tensor:
    """Return zeros (R, C, S, S) for the result that are part of the autograd graph of the map."""
    return features.new_zeros(count, features.shape[1], size, size) + features.sum() * 0


def rounded(box: list[float], stride: float) -> list[int]:
    """Return first cells and exclusive ends: left, top, right, bottom."""
    # Halves are rounded away from zero, as in C; Python rounds them to even.
    left, top, right, bottom = (int(math.copysign(math.floor(abs(side / stride) + 0.5), side)) for side in box)
    return [left, top, max(right, left) + 1, max(bottom, top) + 1]


def rounded_down(box: list[float], stride: float) -> list[int]:
    left, top, right, bottom = (math.floor(side / stride) for side in box)
    return [left, top, max(right, left + 1), max(bottom, top + 1)]


def overlapping_bins(start: int, end: int, size: int) -> list[range]:
    side = (end - start) / size
    # Rounding to 9 digits makes 3 * (7 / 3) equal to 7.
    borders = [round(index * side, 9) for index in range(size + 1)]
    return [range(start + math.floor(first), start + math.ceil(last)) for first, last in itertools.pairwise(borders)]


def disjoint_bins(start: int, end: int, size: int) -> list[range]:
    borders = [start + index * (end - start) // size for index in range(size + 1)]
    return [range(first, max(last, first + 1)) for first, last in itertools.pairwise(borders)]


def loop_over_points(
    features: Tensor,
    boxes: Tensor,
    images: Tensor,
    *,
    stride: float,
    size: int,
    config: RoIWarpConfig | RoIAlignConfig,
) -> Tensor:
    out = zeros_in_graph(features, len(boxes), size)
    for r, box in enumerate(boxes.tolist()):
        left, top, right, bottom = region(config, box, stride)
        bin_width, bin_height = (right - left) / size, (bottom - top) / size
        per_row = config.sampling_ratio or math.ceil(bin_width)
        per_column = config.sampling_ratio or math.ceil(bin_height)
        for i, j in itertools.product(range(size), repeat=2):
            points = [
                read_point(
                    features[images[r]],
                    top + i * bin_height + (m + 0.5) * bin_height / per_column,
                    left + j * bin_width + (n + 0.5) * bin_width / per_row,
                )
                for m, n in itertools.product(range(per_column), range(per_row))
            ]
            if points:
                stacked = torch.stack(points)
                # `max`, unlike `amax`, sends the gradient of tied points to the first; points of RoIWarp often tie.
                out[r, :, i, j] = stacked.mean(dim=0) if config.aggregate == "average" else stacked.max(dim=0).values
    return out


def region(config: RoIWarpConfig | RoIAlignConfig, box: list[float], stride: float) -> list[float]:
    """Return the region in cells, in coordinates with cell values at whole numbers."""
    if isinstance(config, RoIWarpConfig):
        return [side - 0.5 for side in rounded(box, stride)]
    left, top, right, bottom = (side / stride - (0.5 if config.aligned else 0.0) for side in box)
    smallest = 0.0 if config.aligned else 1.0
    return [left, top, max(right, left + smallest), max(bottom, top + smallest)]


def read_point(feature: Tensor, y: float, x: float) -> Tensor:
    """Interpolate a (C, H, W) map at row y and column x; cell values are at whole numbers."""
    height, width = feature.shape[1:]
    if not (-1 <= y <= height and -1 <= x <= width):
        return feature.new_zeros(feature.shape[0])
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    down, across = y - top, x - left
    upper = feature[:, top, left] * (1 - across) + feature[:, top, right] * across
    lower = feature[:, bottom, left] * (1 - across) + feature[:, bottom, right] * across
    return upper * (1 - down) + lower * down


# All combinations of layer, output, precision and device


def pooler(layer: RoILayer, strides: tuple[int, ...]) -> RoIPooler:
    return RoIPooler(layer, strides, SIZE, canonical_box=16.0, canonical_stride=8.0)


def case(config: RoILayerConfig, strides: tuple[int, ...]) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return maps of two images, boxes, and image indices. Values are integers below 256, exact in all precisions."""
    generator = torch.Generator().manual_seed(0)
    maps = []
    for stride in strides:
        height, width = -(-HEIGHT // stride), -(-WIDTH // stride)
        values = [torch.randperm(height * width, generator=generator) - 100 for _ in range(4)]  # all different
        maps.append(torch.stack(values).view(2, 2, height, width).double())
    boxes = torch.tensor(BOXES)
    if getattr(config, "sampling_ratio", 1) == 0:
        boxes = boxes[:-1]  # without the huge box: one point per cell would take minutes
    return maps, boxes, torch.arange(len(boxes)) % 2


def with_gradients(layer: RoIPooler, maps: list[Tensor], boxes: Tensor, images: Tensor) -> list[Tensor]:
    """Return the output of the layer and the gradient of each map for a fixed weighting of the output."""
    maps = [level.clone().requires_grad_() for level in maps]
    pooled = layer(maps, boxes, images)
    weighting = torch.arange(pooled.numel()) % 7 - 3  # exact in all precisions
    weighting = weighting.view(pooled.shape).to(pooled)
    return [pooled.detach(), *torch.autograd.grad((pooled * weighting).sum(), maps)]


@functools.cache
def expected(config: RoILayerConfig, strides: tuple[int, ...]) -> list[Tensor]:
    return with_gradients(pooler(loop(config), strides), *case(config, strides))


def in_precision(maps: list[Tensor], precision: str, device: str) -> list[Tensor]:
    dtype = torch.float32 if precision == "autocast" else getattr(torch, precision)
    return [level.to(device, dtype) for level in maps]


def autocast(precision: str, device: str) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast(device, torch.bfloat16) if precision == "autocast" else contextlib.nullcontext()


@every_device
@every_precision
@every_output
@every_choice
def test_contract(config: RoILayerConfig, strides: tuple[int, ...], precision: str, device: str):
    maps, boxes, images = case(config, strides)
    maps = in_precision(maps, precision, device)
    with autocast(precision, device):
        results = with_gradients(pooler(config.build(), strides), maps, boxes.to(device), images.to(device))
    assert results[0].shape == (len(boxes), 2, SIZE, SIZE)
    # Layers compute in float32 or float64; lower precisions round only once, at the end.
    dtype = maps[0].dtype
    tolerance = max(1e-4 if dtype == torch.float32 else 1e-10, 2 * torch.finfo(dtype).eps)
    for ours, theirs in zip(results, expected(config, strides), strict=True):
        assert ours.dtype == dtype
        assert ours.device.type == device
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=tolerance, atol=10 * tolerance)


@every_device
@every_precision
@every_output
@every_choice
def test_no_boxes_give_an_empty_result_in_the_graph(
    config: RoILayerConfig, strides: tuple[int, ...], precision: str, device: str
):
    maps, boxes, images = case(config, strides)
    maps = in_precision(maps, precision, device)
    with autocast(precision, device):
        results = with_gradients(pooler(config.build(), strides), maps, boxes[:0].to(device), images[:0].to(device))
    assert results[0].shape == (0, 2, SIZE, SIZE)
    assert all(tensor.dtype == maps[0].dtype for tensor in results)
    assert not any(gradient.any() for gradient in results[1:])


def test_the_boxes_of_the_contract_are_read_from_every_level():
    levels = pooler(RoIPoolConfig().build(), OUTPUTS[-1]).assign_levels(torch.tensor(BOXES))
    assert levels.unique().tolist() == [0, 1, 2, 3, 4]


# Other properties of all RoI layers


Case = tuple[Tensor, Tensor, Tensor]  # feature map, boxes, image index of each box


@every_choice
def test_memory_format_changes_nothing(config: RoILayerConfig, random_case: Case):
    features, boxes, images = random_case
    layer = RoIPooler(config.build(), (4,), size=4)
    contiguous = with_gradients(layer, [features], boxes, images)
    channels_last = with_gradients(layer, [features.contiguous(memory_format=torch.channels_last)], boxes, images)
    torch.testing.assert_close(channels_last, contiguous, rtol=1e-5, atol=1e-5)


@every_choice
def test_each_box_reads_its_own_image_and_order_does_not_matter(config: RoILayerConfig, random_case: Case):
    features, boxes, images = random_case
    layer = functools.partial(config.build(), stride=4, size=4)
    pooled = layer(features, boxes, images)
    for index in (0, 1):
        of_image = images == index
        alone = layer(features[index : index + 1], boxes[of_image], images[of_image] * 0)
        assert torch.equal(alone, pooled[of_image])
    order = torch.randperm(len(boxes))
    assert torch.equal(layer(features, boxes[order], images[order]), pooled[order])


@every_choice
def test_gradcheck(config: RoILayerConfig):
    features = torch.randn(2, 1, 3, 4, dtype=torch.float64, requires_grad=True)
    boxes = torch.tensor([[1.0, 2.0, 14.0, 11.0], [5.0, 6.0, 6.0, 7.0], [-3.0, -3.0, 5.0, 20.0]])
    images = torch.tensor([0, 1, 1])
    layer = config.build()
    assert torch.autograd.gradcheck(lambda features: layer(features, boxes, images, stride=4, size=2), features)


@every_choice
def test_boxes_have_no_gradient(config: RoILayerConfig, random_case: Case):
    features, boxes, images = random_case
    pooled = config.build()(features.requires_grad_(), boxes.requires_grad_(), images, stride=4, size=4)
    pooled.sum().backward()
    assert boxes.grad is None or not boxes.grad.any()


@every_choice
def test_a_constant_map_pools_to_the_constant_inside(config: RoILayerConfig):
    boxes = torch.tensor([[4.0, 4.0, 20.0, 12.0], [3.3, 5.1, 27.9, 26.7]])
    images = torch.zeros(2, dtype=torch.int64)
    pooled = config.build()(torch.full((1, 2, 8, 8), 0.7), boxes, images, stride=4, size=3)
    torch.testing.assert_close(pooled, torch.full((2, 2, 3, 3), 0.7))
