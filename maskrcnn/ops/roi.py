"""RoI layers: read a feature map inside a box and return a small grid of fixed size. `docs/roi_layers.md` explains.

Shapes: B images, C channels, H and W of a feature map, R regions, S size of the grid, N sample points a bin and axis.

Boxes are `(x1, y1, x2, y2)` in continuous pixels of the image, and finite. No layer has a gradient for its boxes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import torch
import torch.nn.functional as F
import torchvision.ops
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from maskrcnn.config import Section

Aggregate = Literal["average", "maximum"]
Rounding = Literal["round", "floor"]


class RoILayer(Protocol):
    """What every RoI layer is: one feature map and R boxes in, one grid of S x S a box out."""

    def __call__(self, features: Tensor, boxes: Tensor, images: Tensor, *, stride: float, size: int) -> Tensor:
        """Pool each box from the map of its image.

        Args:
            features: (B, C, H, W) float of any precision and memory format.
            boxes: (R, 4) float32, pixels of the image; they may lie outside the map, and R may be 0.
            images: (R,) int64: the image of each box, 0..B-1.
            stride: image pixels per cell of the map.
            size: S.

        Returns:
            (R, C, S, S) in the precision of `features`. Inside, everything is float32 (float64 if `features` is),
            autocast or not: bfloat16 could not tell pixel 665 from pixel 666.
        """
        ...


def roi_pool(
    features: Tensor, boxes: Tensor, images: Tensor, *, stride: float, size: int, rounding: Rounding = "round"
) -> Tensor:
    """Make whole cells of the box and take the maximum of each bin: RoIPool (Fast R-CNN, section 2.1).

    A bin outside the map is 0. The other arguments and the result: `RoILayer`.

    Args:
        features, boxes, images, stride, size: as in `RoILayer`.
        rounding: how the box and its bins become whole cells. "round", as Fast R-CNN's code does it: corners go to the
            nearest cell, the last cell belongs to the box, and bins begin at the floor and end at the ceiling of their
            borders, so that neighbours may share cells. "floor", as Mask R-CNN tells it: corners and borders of bins
            are cut to whole cells, the last corner's cell is not in the box, and bins are disjoint as long as the box
            has as many cells as bins.
    """
    with torch.autocast(features.device.type, enabled=False):
        precise = _precise(features)
        if rounding == "floor":
            pooled = _maximum_of_cut_bins(precise, boxes, images, stride, size)
        else:
            pooled = torchvision.ops.roi_pool(precise, _numbered(boxes, images, precise), size, 1.0 / stride)
    return pooled.to(features.dtype)


def roi_warp(
    features: Tensor,
    boxes: Tensor,
    images: Tensor,
    *,
    stride: float,
    size: int,
    aggregate: Aggregate = "average",
    sampling_ratio: int = 2,
) -> Tensor:
    """Round the box as RoIPool does, then read it bilinearly: RoIWarp (MNC, arXiv 1512.04412; Mask R-CNN, section 3).

    The first and the last cell are those of `roi_pool` with `rounding="round"`, both whole; this box is read as
    `roi_align` with `aligned=True` reads it. Arguments and result: `RoILayer` and `roi_align`.
    """
    cells = rounded_cells(boxes.to(_precise(features).dtype), stride)
    return roi_align(features, cells, images, stride=1.0, size=size, aggregate=aggregate, sampling_ratio=sampling_ratio)


def roi_align(
    features: Tensor,
    boxes: Tensor,
    images: Tensor,
    *,
    stride: float,
    size: int,
    aggregate: Aggregate = "average",
    sampling_ratio: int = 2,
    aligned: bool = True,
) -> Tensor:
    """Read the map bilinearly at regular points of each bin, nothing rounded: RoIAlign (Mask R-CNN, section 3).

    Points more than one cell outside the map count as 0. The other arguments and the result: `RoILayer`.

    Args:
        features, boxes, images, stride, size: as in `RoILayer`.
        aggregate: what is made of the points of a bin.
        sampling_ratio: N, for N x N points a bin; 0 takes as many as the bin has cells (rounded up), for the average.
        aligned: a cell's value stands at its centre, half a cell from its corner. False is the first RoIAlign: the
            value stands at the corner, and boxes narrower than a cell are widened to one.
    """
    with torch.autocast(features.device.type, enabled=False):
        precise = _precise(features)
        if aggregate == "maximum":
            assert sampling_ratio > 0, "the maximum needs a fixed number of points a bin"
            # One point in each bin of a grid N times as fine: the very points of N x N a bin.
            points = _average(precise, boxes, images, stride, size * sampling_ratio, 1, aligned)
            pooled = F.max_pool2d(points, sampling_ratio)
        else:
            pooled = _average(precise, boxes, images, stride, size, sampling_ratio, aligned)
    return pooled.to(features.dtype)


def rounded_cells(boxes: Tensor, stride: float) -> Tensor:
    """Return the cells that RoIPool makes of boxes: (R, 4) pixels -> (R, 4) whole numbers, ends exclusive.

    Corners are rounded to the nearest cell, halves away from zero as torchvision's kernel does, and the last cell
    belongs to the box.
    """
    corners = boxes * (1.0 / stride)
    corners = corners.trunc() + (2 * corners.frac()).trunc()  # torch.round would send halves to the even cell
    return torch.cat((corners[:, :2], corners[:, 2:] + 1), dim=1)


def cut_cells(boxes: Tensor, stride: float) -> Tensor:
    """Return the cells of boxes with cut corners: (R, 4) pixels -> (R, 4) whole numbers, ends exclusive.

    A box has at least one cell.
    """
    corners = (boxes / stride).floor()
    return torch.cat((corners[:, :2], torch.maximum(corners[:, 2:], corners[:, :2] + 1)), dim=1)


def cut_bins(starts: Tensor, ends: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Cut runs of cells into bins of whole cells, along one axis.

    Args:
        starts: (R,) int64, the first cell of each run.
        ends: (R,) int64, the cell behind the last.
        size: S.

    Returns:
        First cells and ends (exclusive) of the bins: two of (R, S). Borders are at `floor(i * cells / S)`; a bin that
        would have no cell gets the one at its start.
    """
    borders = torch.arange(size + 1, device=starts.device) * (ends - starts)[:, None] // size + starts[:, None]
    first = borders[:, :-1]
    return first, torch.maximum(borders[:, 1:], first + 1)


class RoIPoolConfig(Section):
    """RoIPool: boxes of whole cells, maximum of whole cells."""

    kind: Literal["roi_pool"] = "roi_pool"
    rounding: Rounding = "round"

    def build(self) -> RoILayer:
        """Return the layer."""
        return roi_pool if self.rounding == "round" else functools.partial(roi_pool, rounding=self.rounding)


class SamplingLayerConfig(Section):
    """What the layers share that read the map bilinearly at N x N points a bin."""

    kind: str
    aggregate: Aggregate = "average"
    sampling_ratio: int = Field(2, ge=0)

    @model_validator(mode="after")
    def _fixed_points_for_maximum(self) -> Self:
        if self.aggregate == "maximum" and self.sampling_ratio == 0:
            raise ValueError("aggregate 'maximum' needs a sampling_ratio of at least 1; 0 is for 'average' alone")
        return self


class RoIWarpConfig(SamplingLayerConfig):
    """RoIWarp: rounded boxes, bilinear reading."""

    kind: Literal["roi_warp"] = "roi_warp"

    def build(self) -> RoILayer:
        """Return the layer."""
        return functools.partial(roi_warp, aggregate=self.aggregate, sampling_ratio=self.sampling_ratio)


class RoIAlignConfig(SamplingLayerConfig):
    """RoIAlign: exact boxes, bilinear reading."""

    kind: Literal["roi_align"] = "roi_align"
    aligned: bool = True

    def build(self) -> RoILayer:
        """Return the layer."""
        return functools.partial(
            roi_align, aggregate=self.aggregate, sampling_ratio=self.sampling_ratio, aligned=self.aligned
        )


RoIConfig = Annotated[RoIPoolConfig | RoIWarpConfig | RoIAlignConfig, Field(discriminator="kind")]


@dataclass(frozen=True)
class RoIPooler:
    """A RoI layer over one feature map, or over the levels of a pyramid, each box read from the level of its size.

    A box of `canonical_box` x `canonical_box` pixels is read at `canonical_stride`; twice the side, twice the stride
    (FPN, equation 1, with torchvision's tolerance of 1e-6, so that the choice is the same to the bit).
    """

    layer: RoILayer
    strides: tuple[int, ...]  # image pixels per cell of each level, finest first, each twice the one before
    size: int
    canonical_box: float = 224.0
    canonical_stride: float = 16.0

    def __post_init__(self) -> None:
        pairs = zip(self.strides, self.strides[1:], strict=False)
        assert all(coarse == 2 * fine for fine, coarse in pairs), self.strides

    def __call__(self, features: Sequence[Tensor], boxes: Tensor, images: Tensor) -> Tensor:
        """Pool R boxes.

        Args:
            features: one (B, C, H, W) a stride; H and W differ from level to level.
            boxes: (R, 4) float32, pixels of the image.
            images: (R,) int64, the image of each box.

        Returns:
            (R, C, S, S), in the order of `boxes`; every level stays in the graph, also one without boxes.
        """
        assert len(features) == len(self.strides), (len(features), self.strides)
        if len(self.strides) == 1:
            return self.layer(features[0], boxes, images, stride=self.strides[0], size=self.size)
        levels = self.assign_levels(boxes)
        order = levels.argsort(stable=True)
        counts = levels.bincount(minlength=len(self.strides)).tolist()
        pooled = [
            self.layer(level, own_boxes, own_images, stride=stride, size=self.size)
            for level, own_boxes, own_images, stride in zip(
                features, boxes[order].split(counts), images[order].split(counts), self.strides, strict=True
            )
        ]
        # Joined and put in order as (R, S, S, C), the layout in which roi_align leaves its result: no transposition.
        grids = torch.cat([part.permute(0, 2, 3, 1) for part in pooled])
        # A lookup of rows, because the backward pass of any indexing adds up single numbers, ten times as slow.
        rows = F.embedding(order.argsort(), grids.flatten(1))
        return rows.view_as(grids).permute(0, 3, 1, 2)

    def assign_levels(self, boxes: Tensor) -> Tensor:
        """Return the index into `strides` for each box: (R, 4) -> (R,) int64. Boxes without area get the finest."""
        width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
        octaves = torch.log2(torch.sqrt(width * height) / self.canonical_box)
        level = torch.floor(math.log2(self.canonical_stride) + octaves + 1e-6)
        finest = math.log2(self.strides[0])
        return (level - finest).clamp(0, len(self.strides) - 1).long()


def _precise(features: Tensor) -> Tensor:
    return features if features.dtype == torch.float64 else features.float()


def _numbered(boxes: Tensor, images: Tensor, features: Tensor) -> Tensor:
    """Return the boxes as torchvision's kernels take them: (R, 5), the number of the image in front."""
    return torch.cat((images[:, None].to(features.dtype), boxes.to(features.dtype)), dim=1)


def _maximum_of_cut_bins(features: Tensor, boxes: Tensor, images: Tensor, stride: float, size: int) -> Tensor:
    """Pool each bin as a region of its own, R * S * S of them, with whole cells as corners.

    torchvision's kernel then has nothing left to round. Returns (R, C, S, S) in channels_last memory.
    """
    height, width = features.shape[2:]
    with torch.no_grad():
        cells = cut_cells(boxes.to(features.dtype), stride).long()
        left, right = _inside(*cut_bins(cells[:, 0], cells[:, 2], size), width)
        top, bottom = _inside(*cut_bins(cells[:, 1], cells[:, 3], size), height)
        grid = (len(boxes), size, size)
        axes = (left[:, None], top[:, :, None], right[:, None], bottom[:, :, None])
        bins = torch.stack([axis.expand(grid) for axis in axes], dim=-1).view(-1, 4)
        owners = images[:, None, None].expand(grid).reshape(-1)
    pooled = torchvision.ops.roi_pool(features, _numbered(bins, owners, features), 1, 1.0)  # (R * S * S, C, 1, 1)
    return pooled.view(*grid, features.shape[1]).permute(0, 3, 1, 2)


def _inside(first: Tensor, end: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return the first and the last cell of bins, at most one cell outside the map: further out, all reads 0."""
    return first.clamp(-1, length), (end - 1).clamp(-1, length)


def _average(
    features: Tensor, boxes: Tensor, images: Tensor, stride: float, size: int, samples: int, aligned: bool
) -> Tensor:
    """RoIAlign with the average, by the faster way on each device.

    torchvision's kernel serves the GPU and the adaptive number of points. On a CPU it is an order of magnitude slower
    than a weighted sum of rows (1000 boxes, 7 x 7, forward and backward: 1.6 s against 0.1 s on two threads).
    """
    if features.device.type == "cpu" and samples > 0:
        return _average_of_rows(features, boxes, images, stride, size, samples, aligned)
    rois = _numbered(boxes, images, features)
    return torchvision.ops.roi_align(features, rois, size, 1.0 / stride, samples, aligned)


def _average_of_rows(
    features: Tensor, boxes: Tensor, images: Tensor, stride: float, size: int, samples: int, aligned: bool
) -> Tensor:
    """RoIAlign as a sparse matrix product: each bin is a weighted sum of the C-vectors of the cells it reads.

    With the map laid out as (B * H * W, C), `embedding_bag` sums rows, vectorised over C and parallel over bins, and
    its backward does the same. Returns (R, C, S, S) in channels_last memory.
    """
    channels = features.shape[1]
    with torch.no_grad():
        indices, weights = _cells_of_bins(features, boxes, images, stride, size, samples, aligned)
    # `contiguous` matters: with one image the rows of a contiguous map would be a view whose entries lie H * W apart.
    rows = features.permute(0, 2, 3, 1).contiguous().view(-1, channels)
    bins = F.embedding_bag(indices, rows, mode="sum", per_sample_weights=weights)  # (R * S * S, C)
    return bins.view(len(boxes), size, size, channels).permute(0, 3, 1, 2)


def _cells_of_bins(
    features: Tensor, boxes: Tensor, images: Tensor, stride: float, size: int, samples: int, aligned: bool
) -> tuple[Tensor, Tensor]:
    """Return which cells each bin reads, with what weight: two of (R * S * S, 4 * N * N).

    Bilinear reading is separable: the cells of a bin are the product of its 2 * N rows and its 2 * N columns.
    """
    height, width = features.shape[2:]
    corners = boxes.to(features.dtype) * (1.0 / stride) - (0.5 if aligned else 0.0)
    starts, sides = corners[:, :2], corners[:, 2:] - corners[:, :2]
    if not aligned:
        sides = sides.clamp(min=1.0)
    columns, column_weights = _cells_along_axis(starts[:, 0], sides[:, 0], width, size, samples)
    rows, row_weights = _cells_along_axis(starts[:, 1], sides[:, 1], height, size, samples)
    rows = rows * width + images.int()[:, None, None] * (height * width)
    indices = rows[:, :, None, :, None] + columns[:, None, :, None, :]  # (R, S, S, 2 * N, 2 * N)
    weights = row_weights[:, :, None, :, None] * column_weights[:, None, :, None, :]
    flat = (len(boxes) * size * size, 4 * samples * samples)
    return indices.reshape(flat), weights.reshape(flat)


def _cells_along_axis(start: Tensor, side: Tensor, length: int, size: int, samples: int) -> tuple[Tensor, Tensor]:
    """Return the cells that the sample points lie between, and their shares in the bin: (R, S, 2 * N) int32, float.

    The order of operations and the treatment of the border are those of torchvision's kernel, so that a point lands
    on the same side of the border: one cell outside it reads the border cell, further out it reads 0.
    """
    bins = torch.arange(size, dtype=start.dtype)[:, None]
    offsets = torch.arange(samples, dtype=start.dtype) + 0.5
    bin_side = (side / size)[:, None, None]
    points = start[:, None, None] + bins * bin_side + offsets * bin_side / samples  # (R, S, N)
    share = ((points >= -1) & (points <= length)).to(start.dtype) / samples
    points = points.clamp(0, length - 1)
    low = points.floor()
    above = points - low
    cells = torch.stack((low, (low + 1).clamp(max=length - 1)), dim=-1)
    weights = torch.stack((1 - above, above), dim=-1) * share[..., None]
    return cells.int().flatten(2), weights.flatten(2)
