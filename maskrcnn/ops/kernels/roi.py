"""RoI layers as Triton kernels: one for all levels of a pyramid, forward and backward. See `maskrcnn.ops.roi`.

A program computes the channels of one bin. It reads the maps as they are, in channels_last memory and any precision;
sums are float32. The backward pass adds to float32 maps with atomic additions, whose order differs from run to run, so
its last digits do, too; where torch asks for deterministic algorithms, it raises an error. A layer that takes maxima
looks for them again in the backward pass, so that nothing is stored but the maps.

Positions of points and bins are rounded as on a CPU (no fused multiply-add), so that a point is on the same side of the
border of a map.

Shapes: B images, C channels, H and W of a feature map, L levels, R boxes, S size of the output grid, N sample points
per bin and axis.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from maskrcnn.ops.kernels import Pooling

WARPS = 1  # of a program: 32 threads read 256 channels of a cell in bfloat16 with 16 bytes each
CHANNELS = 256  # at most, of a program
LAUNCH = {"num_warps": WARPS, "enable_fp_fusion": False}


def pool_levels(
    features: Sequence[Tensor],
    boxes: Tensor,
    images: Tensor,
    levels: Tensor,
    *,
    stride: float,
    size: int,
    pooling: Pooling,
) -> Tensor:
    """Pool each box from the feature map of its image and level.

    Args:
        features: one (B, C, H, W) float32, bfloat16 or float16 for each level; copied, if not in channels_last memory.
        boxes: (R, 4) float32, image pixels.
        images: (R,) int64, image index of each box, 0..B-1.
        levels: (R,) int64, level of each box, 0..L-1.
        stride: image pixels per cell of the first map, a power of two; each level has twice that of the one before.
        size: S.
        pooling: the RoI layer.

    Returns:
        (R, C, S, S) in channels_last memory, with the dtype of `features`.
    """
    return _pool_levels(list(features), boxes, images, levels, stride, size, *pooling)


# ---- Operators


ROIS = "Tensor boxes, Tensor images, Tensor levels"
SETTINGS = "float stride, int size, str reads, str quantize, int samples, bool aligned"


@torch.library.custom_op(
    "maskrcnn::pool_levels", mutates_args=(), schema=f"(Tensor[] features, {ROIS}, {SETTINGS}) -> Tensor"
)
def _pool_levels(
    features: list[Tensor], boxes: Tensor, images: Tensor, levels: Tensor, stride: float, size: int, *pooling: Any
) -> Tensor:
    pooled = _empty(features, boxes, size)
    maps = tuple(level.contiguous(memory_format=torch.channels_last) for level in features)
    sizes = [side for level in features for side in level.shape[2:]]
    _launch(pool_kernel, (maps, pooled), (boxes, images, levels), sizes, features[0].shape[1], stride, size, pooling)
    return pooled


@_pool_levels.register_fake
def _(
    features: list[Tensor], boxes: Tensor, images: Tensor, levels: Tensor, stride: float, size: int, *pooling: Any
) -> Tensor:
    return _empty(features, boxes, size)


def _empty(features: Sequence[Tensor], boxes: Tensor, size: int) -> Tensor:
    """Return room for the result, (R, C, S, S) in channels_last memory."""
    return features[0].new_empty(len(boxes), size, size, features[0].shape[1]).permute(0, 3, 1, 2)


@torch.library.custom_op(
    "maskrcnn::pool_levels_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor[] features, SymInt batch, SymInt[] sizes, {ROIS}, {SETTINGS}) -> Tensor[]",
)
def _pool_levels_backward(
    grad: Tensor,
    features: list[Tensor],
    batch: int,
    sizes: list[int],
    boxes: Tensor,
    images: Tensor,
    levels: Tensor,
    stride: float,
    size: int,
    *pooling: Any,
) -> list[Tensor]:
    _alert_not_deterministic()
    channels = grad.shape[1]
    sums = tuple(level.zero_() for level in _empty_maps(grad, batch, sizes, torch.float32))
    maps = tuple(level.contiguous(memory_format=torch.channels_last) for level in features) or sums  # not read
    grad = grad.contiguous(memory_format=torch.channels_last)
    _launch(pool_backward_kernel, (maps, sums, grad), (boxes, images, levels), sizes, channels, stride, size, pooling)
    return [level.to(grad.dtype) for level in sums]


@_pool_levels_backward.register_fake
def _(grad: Tensor, features: list[Tensor], batch: int, sizes: list[int], *rest: Any) -> list[Tensor]:
    return _empty_maps(grad, batch, sizes, grad.dtype)


def _empty_maps(grad: Tensor, batch: int, sizes: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """Return room for the gradient of each map, (B, C, H, W) in channels_last memory."""
    shapes = zip(sizes[::2], sizes[1::2], strict=True)
    return [
        grad.new_empty((batch, height, width, grad.shape[1]), dtype=dtype).permute(0, 3, 1, 2)
        for height, width in shapes
    ]


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, boxes, images, levels, *settings = inputs
    ctx.batch, ctx.sizes = len(features[0]), [side for level in features for side in level.shape[2:]]
    ctx.settings, ctx.levels = settings, len(features)
    takes_maxima = settings[2] != "average"
    ctx.save_for_backward(boxes, images, levels, *(features if takes_maxima else ()))


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    boxes, images, levels, *features = ctx.saved_tensors
    gradients = _pool_levels_backward(grad, features, ctx.batch, ctx.sizes, boxes, images, levels, *ctx.settings)
    return gradients, *(None,) * (3 + len(ctx.settings))


_pool_levels.register_autograd(_backward, setup_context=_set_up)


def _alert_not_deterministic() -> None:
    """Raise an error, or warn, if torch is asked for deterministic algorithms, as its own operators do."""
    if torch.are_deterministic_algorithms_enabled():
        message = "the backward pass of the RoI layers in Triton adds in any order: it is not deterministic"
        if not torch.is_deterministic_algorithms_warn_only_enabled():
            raise RuntimeError(message)
        warnings.warn(message, stacklevel=2)


def _launch(
    kernel: Any,
    tensors: tuple[Any, ...],
    rois: tuple[Tensor, Tensor, Tensor],
    sizes: Sequence[int],
    channels: int,
    stride: float,
    size: int,
    pooling: Sequence[Any],
) -> None:
    """Start a program for each bin and block of channels."""
    boxes, images, levels = rois
    # As floats: Triton would compile a kernel for each combination of whole numbers that are multiples of 16 or not.
    heights, widths = tuple(map(float, sizes[::2])), tuple(map(float, sizes[1::2]))
    bins = len(boxes) * size * size
    block = min(triton.next_power_of_2(channels), CHANNELS)
    if not bins:
        return
    reads, quantize, samples, aligned = pooling
    with torch.cuda.device_of(boxes):
        kernel[(bins, triton.cdiv(channels, block))](
            *tensors,
            heights,
            widths,
            tuple(1.0 / (stride * 2**level) for level in range(len(sizes) // 2)),
            boxes.float().contiguous(),
            images.contiguous(),
            levels.contiguous(),
            channels,
            SIZE=size,
            READS=reads,
            QUANTIZE=quantize,
            SAMPLES=samples,
            ALIGNED=aligned,
            BLOCK=block,
            **LAUNCH,
        )


# ---- Positions. A bin along one axis is a tuple: start of the box in cells, size of a bin in cells, number of the bin,
# length of the map.


@triton.jit
def _of_level(values: tl.tuple, level: tl.tensor) -> tl.tensor:
    """Return `values[level]`, where the GPU alone knows the level."""
    chosen = values[0]
    for index in tl.static_range(1, len(values)):
        chosen = tl.where(level == index, values[index], chosen)
    return chosen


@triton.jit
def _truncated(value: tl.tensor) -> tl.tensor:
    return tl.where(value < 0, tl.ceil(value), tl.floor(value))


@triton.jit
def _rounded(value: tl.tensor) -> tl.tensor:
    """Round halves away from zero."""
    whole = _truncated(value)
    return whole + _truncated(2 * (value - whole))


@triton.jit
def _range(
    first: tl.tensor,
    last: tl.tensor,
    scale: tl.tensor,
    READS: tl.constexpr,
    QUANTIZE: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return start and length in cells of what is read along one axis, for the sides of a box in pixels."""
    start, end = first * scale, last * scale
    if QUANTIZE == "round":
        start, end = _rounded(start), _rounded(end) + 1
    if QUANTIZE == "floor":
        start, end = tl.floor(start), tl.floor(end)
    if READS == "cells":
        return start, tl.maximum(end, start + 1) - start
    if ALIGNED:
        start, end = start - 0.5, end - 0.5
        return start, end - start
    return start, tl.maximum(end - start, 1.0)


@triton.jit
def _cells_of_bin(bin_: tl.tuple, QUANTIZE: tl.constexpr, SIZE: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Return the first cell of a bin and its exclusive end, inside the map. For "floor" `side` is that of the box."""
    start, side, index, length = bin_
    if QUANTIZE == "round":
        first, end = tl.floor(index * side) + start, tl.ceil((index + 1) * side) + start
    else:
        first = index * side.to(tl.int64) // SIZE + start.to(tl.int64)
        end = tl.maximum((index + 1) * side.to(tl.int64) // SIZE + start.to(tl.int64), first + 1)
    first, end = tl.maximum(first, 0), tl.maximum(end, 0)
    return tl.minimum(first, length).to(tl.int32), tl.minimum(end, length).to(tl.int32)


@triton.jit
def _around(bin_: tl.tuple, number: tl.tensor, count: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Return the two cells around point `number` (X,) of the `count` of a bin, and their weights, each (2, X).

    A point up to one cell outside of the map reads the border; further outside its weights are 0.
    """
    start, side, index, length = bin_
    point = start + index * side + tl.div_rn((number + 0.5) * side, count * 1.0)
    inside = (point >= -1) & (point <= length)
    point = tl.minimum(tl.maximum(point, 0.0), length - 1.0)
    low = tl.floor(point)
    second = tl.arange(0, 2)[:, None]
    weights = tl.where(second == 1, point - low, 1 - (point - low))
    return tl.minimum(low.to(tl.int32) + second, length - 1), tl.where(inside, weights, 0.0)


# ---- What a bin reads. `base` points to the channels of the first cell of an image, (BLOCK,).


@triton.jit
def _corners(y: tl.tuple, x: tl.tuple, width: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Return the four cells around points and their weights, each (2, 2, X)."""
    cells = y[0][:, None, :] * width + x[0][None, :, :]
    return cells, y[1][:, None, :] * x[1][None, :, :]


@triton.jit
def _read(base: tl.tensor, cells: tl.tensor, weights: tl.tensor, channels: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Return the weighted sum of the `_corners` of a point, (BLOCK,)."""
    values = tl.load(base + cells * channels, mask=mask, other=0.0).to(tl.float32)
    return tl.sum(tl.sum(values * weights, axis=1), axis=0)


@triton.jit
def _num_points(bin_: tl.tuple, SAMPLES: tl.constexpr) -> tl.tensor:
    """Return the number of points of a bin along one axis: N, or one for each cell, rounded up."""
    if SAMPLES > 0:
        return SAMPLES
    return tl.ceil(bin_[1]).to(tl.int32)


@triton.jit
def _average(
    base: tl.tensor,
    y_bin: tl.tuple,
    x_bin: tl.tuple,
    channels: tl.tensor,
    mask: tl.tensor,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Return the average of the points of a bin, 0 without points."""
    total = tl.zeros((BLOCK,), tl.float32)
    first = tl.zeros((1,), tl.int32)
    rows, columns = _num_points(y_bin, SAMPLES), _num_points(x_bin, SAMPLES)
    for row in range(rows):
        y = _around(y_bin, first + row, rows)
        for column in range(columns):
            cells, weights = _corners(y, _around(x_bin, first + column, columns), x_bin[3])
            total += _read(base, cells, weights, channels, mask)
    return tl.div_rn(total, tl.maximum(rows * columns, 1) * 1.0)


@triton.jit
def _add_average(
    base: tl.tensor,
    y_bin: tl.tuple,
    x_bin: tl.tuple,
    channels: tl.tensor,
    mask: tl.tensor,
    grad: tl.tensor,
    SAMPLES: tl.constexpr,
) -> None:
    """Add the gradient of an average to the cells around its points."""
    first = tl.zeros((1,), tl.int32)
    rows, columns = _num_points(y_bin, SAMPLES), _num_points(x_bin, SAMPLES)
    share = tl.div_rn(grad, tl.maximum(rows * columns, 1) * 1.0)
    for row in range(rows):
        y = _around(y_bin, first + row, rows)
        for column in range(columns):
            cells, weights = _corners(y, _around(x_bin, first + column, columns), x_bin[3])
            tl.atomic_add(base + cells * channels, share * weights, mask=mask, sem="relaxed")


@triton.jit
def _corners_of_fine_point(
    y_bin: tl.tuple, x_bin: tl.tuple, number: tl.tensor, SAMPLES: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Return the `_corners` of points `number` (X,) of a bin in a grid that is N times as fine; see `roi_align`."""
    y_start, side, row, height = y_bin
    y = _around((y_start, side, row * SAMPLES + number // SAMPLES, height), 0, 1)
    x_start, side, column, width = x_bin
    x = _around((x_start, side, column * SAMPLES + number % SAMPLES, width), 0, 1)
    return _corners(y, x, width)


@triton.jit
def _best_point(
    base: tl.tensor,
    y_bin: tl.tuple,
    x_bin: tl.tuple,
    channels: tl.tensor,
    mask: tl.tensor,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the maximum of the points of a bin, and the number of the point, the first of equal ones."""
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    winner = tl.zeros((BLOCK,), tl.int32)
    for number in range(SAMPLES * SAMPLES):
        cells, weights = _corners_of_fine_point(y_bin, x_bin, tl.zeros((1,), tl.int32) + number, SAMPLES)
        value = _read(base, cells, weights, channels, mask)
        takes = (value > best) | (value != value)  # nan, as in `max_pool2d`
        best, winner = tl.where(takes, value, best), tl.where(takes, number, winner)
    return best, winner


@triton.jit
def _best_cell(
    base: tl.tensor,
    y_bin: tl.tuple,
    x_bin: tl.tuple,
    channels: tl.tensor,
    mask: tl.tensor,
    QUANTIZE: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the maximum of the cells of a bin, 0 without cells, and the cell on the map; -1: there is none."""
    top, bottom = _cells_of_bin(y_bin, QUANTIZE, SIZE)
    left, right = _cells_of_bin(x_bin, QUANTIZE, SIZE)
    best = tl.full((BLOCK,), -3.4028234663852886e38, tl.float32)  # where torchvision's kernel begins
    winner = tl.full((BLOCK,), -1, tl.int32)
    for row in range(top, bottom):
        for column in range(left, right):
            cell = row * x_bin[3] + column
            value = tl.load(base + cell * channels, mask=mask, other=0.0).to(tl.float32)
            takes = value > best
            best, winner = tl.where(takes, value, best), tl.where(takes, cell, winner)
    return tl.where((bottom <= top) | (right <= left), 0.0, best), winner


# ---- Kernels


@triton.jit
def _bins(
    heights: tl.tuple,
    widths: tl.tuple,
    scales: tl.tuple,
    box: tl.tensor,
    level: tl.tensor,
    SIZE: tl.constexpr,
    READS: tl.constexpr,
    QUANTIZE: tl.constexpr,
    SAMPLES: tl.constexpr,
    ALIGNED: tl.constexpr,
) -> tuple[tl.tuple, tl.tuple]:
    """Return the bin of a program along y and along x, for a pointer to the box."""
    scale = _of_level(scales, level)
    y_start, y_side = _range(tl.load(box + 1), tl.load(box + 3), scale, READS, QUANTIZE, ALIGNED)
    x_start, x_side = _range(tl.load(box), tl.load(box + 2), scale, READS, QUANTIZE, ALIGNED)
    if READS != "cells" or QUANTIZE != "floor":  # which divides whole numbers
        divisor = SIZE * (SAMPLES if READS == "maximum" else 1) * 1.0
        y_side, x_side = tl.div_rn(y_side, divisor), tl.div_rn(x_side, divisor)
    row, column = tl.program_id(0) // SIZE % SIZE, tl.program_id(0) % SIZE
    height, width = _of_level(heights, level).to(tl.int32), _of_level(widths, level).to(tl.int32)
    return (y_start, y_side, row, height), (x_start, x_side, column, width)


@triton.jit
def pool_kernel(
    maps: tl.tuple,
    pooled: tl.tensor,
    heights: tl.tuple,
    widths: tl.tuple,
    scales: tl.tuple,
    boxes: tl.tensor,
    images: tl.tensor,
    levels: tl.tensor,
    channels: tl.tensor,
    SIZE: tl.constexpr,
    READS: tl.constexpr,
    QUANTIZE: tl.constexpr,
    SAMPLES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write the channels of bin `program_id(0)` to `pooled` (R, S, S, C); see `pool_levels`."""
    index = tl.program_id(0).to(tl.int64)
    roi = index // (SIZE * SIZE)
    level = tl.load(levels + roi)
    y_bin, x_bin = _bins(heights, widths, scales, boxes + roi * 4, level, SIZE, READS, QUANTIZE, SAMPLES, ALIGNED)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    base = _of_level(maps, level) + tl.load(images + roi) * y_bin[3] * x_bin[3] * channels + channel
    if READS == "average":
        value = _average(base, y_bin, x_bin, channels, mask, SAMPLES, BLOCK)
    elif READS == "maximum":
        value, _ = _best_point(base, y_bin, x_bin, channels, mask, SAMPLES, BLOCK)
    else:
        value, _ = _best_cell(base, y_bin, x_bin, channels, mask, QUANTIZE, SIZE, BLOCK)
    tl.store(pooled + index * channels + channel, value, mask=mask)


@triton.jit
def pool_backward_kernel(
    maps: tl.tuple,
    sums: tl.tuple,
    grad: tl.tensor,
    heights: tl.tuple,
    widths: tl.tuple,
    scales: tl.tuple,
    boxes: tl.tensor,
    images: tl.tensor,
    levels: tl.tensor,
    channels: tl.tensor,
    SIZE: tl.constexpr,
    READS: tl.constexpr,
    QUANTIZE: tl.constexpr,
    SAMPLES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Add the gradient of bin `program_id(0)` in `grad` (R, S, S, C) to the float32 gradients of the maps."""
    index = tl.program_id(0).to(tl.int64)
    roi = index // (SIZE * SIZE)
    level = tl.load(levels + roi)
    y_bin, x_bin = _bins(heights, widths, scales, boxes + roi * 4, level, SIZE, READS, QUANTIZE, SAMPLES, ALIGNED)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < channels
    offset = tl.load(images + roi) * y_bin[3] * x_bin[3] * channels + channel
    target = _of_level(sums, level) + offset
    base = _of_level(maps, level) + offset
    value = tl.load(grad + index * channels + channel, mask=mask, other=0.0).to(tl.float32)
    if READS == "average":
        _add_average(target, y_bin, x_bin, channels, mask, value, SAMPLES)
    elif READS == "maximum":
        _, winner = _best_point(base, y_bin, x_bin, channels, mask, SAMPLES, BLOCK)
        cells, weights = _corners_of_fine_point(y_bin, x_bin, winner, SAMPLES)
        tl.atomic_add(target + cells * channels, value * weights, mask=mask, sem="relaxed")
    else:
        _, winner = _best_cell(base, y_bin, x_bin, channels, mask, QUANTIZE, SIZE, BLOCK)
        tl.atomic_add(target + winner * channels, value, mask=mask & (winner >= 0), sem="relaxed")
