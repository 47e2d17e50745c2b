"""RoI layers: pool the features inside a box to a grid of fixed size. See `docs/roi_layers.md`.

Shapes: B images, C channels, H and W of a feature map, R boxes, S size of the output grid, N sample points
per bin and axis.

Boxes are `(x1, y1, x2, y2)` in continuous image pixels, and finite. No layer has a gradient for its boxes.
"""

from __future__ import annotations

import functools
import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
import torchvision.ops
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from maskrcnn.config import Part
from maskrcnn.ops import cpu
from maskrcnn.ops.kernels import Pooling

Aggregate = Literal["average", "maximum"]
Rounding = Literal["round", "floor"]

FAR = -(2.0**16)  # px; a box at this point is outside every map, so a layer reads nothing for it


class RoILayer(Protocol):
    """Interface of a RoI layer: one feature map and R boxes in, one S x S grid per box out."""

    def __call__(self, features: Tensor, boxes: Tensor, images: Tensor, *, stride: float, size: int) -> Tensor:
        """Pool each box from the feature map of its image.

        Args:
            features: (B, C, H, W) float of any precision and memory format.
            boxes: (R, 4) float32, image pixels; they may lie outside the feature map, and R may be 0.
            images: (R,) int64, image index of each box, 0..B-1.
            stride: image pixels per cell of the feature map.
            size: S.

        Returns:
            (R, C, S, S) with the dtype of `features`. The computation uses float32 (float64 for float64 features),
            also under autocast: bfloat16 cannot distinguish pixel 665 from pixel 666.
        """
        ...


def roi_pool(
    features: Tensor, boxes: Tensor, images: Tensor, *, stride: float, size: int, rounding: Rounding = "round"
) -> Tensor:
    """RoIPool: quantise the box to whole cells and return the maximum of each bin (Fast R-CNN, section 2.1).

    A bin outside the feature map is 0.

    Args:
        features, boxes, images, stride, size: as in `RoILayer`.
        rounding: how the box and its bins are quantised. "round", as in the code of Fast R-CNN: corners are rounded to
            the nearest cell, and the last cell belongs to the box. Bins begin at the floor and end at the ceiling of
            their borders, so neighbours may share cells. "floor", as in the text of Mask R-CNN: corners and borders
            are rounded down, and the cell of the second corner is not in the box. Bins are disjoint if the box has at
            least as many cells as bins along each axis.

    Returns:
        See `RoILayer`.
    """
    with torch.autocast(features.device.type, enabled=False):
        features_float = _to_float(features)
        if rounding == "floor":
            pooled = _roi_pool_floor(features_float, boxes, images, stride, size)
        else:
            pooled = torchvision.ops.roi_pool(
                features_float, _with_image_index(boxes, images, features_float), size, 1.0 / stride
            )
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
    """RoIWarp: quantise the box, then interpolate bilinearly (MNC, arXiv 1512.04412; Mask R-CNN, section 3).

    The box is quantised to whole cells as in `roi_pool` with `rounding="round"`, then pooled as in `roi_align` with
    `aligned=True`. See `RoILayer` and `roi_align` for arguments and result.
    """
    cells = rounded_cells(boxes.to(_to_float(features).dtype), stride)
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
    """RoIAlign: interpolate bilinearly at regular points of each bin, without quantisation (Mask R-CNN, section 3).

    Points more than one cell outside the feature map count as 0.

    Args:
        features, boxes, images, stride, size: as in `RoILayer`.
        aggregate: average or maximum of the points of a bin.
        sampling_ratio: N, for N x N points per bin. 0 (only with average): one point per cell of the bin, rounded up.
        aligned: if True, the value of a cell is located at the centre of the cell. False is the first version of
            RoIAlign: the value is located at the corner, and box sides shorter than one cell are extended to one.

    Returns:
        See `RoILayer`.
    """
    with torch.autocast(features.device.type, enabled=False):
        features_float = _to_float(features)
        if aggregate == "maximum":
            assert sampling_ratio > 0, "the maximum needs a fixed number of points per bin"
            # One point per bin of an N times finer grid: the same points as N x N per bin.
            points = _average(features_float, boxes, images, stride, size * sampling_ratio, 1, aligned)
            pooled = F.max_pool2d(points, sampling_ratio)
        else:
            pooled = _average(features_float, boxes, images, stride, size, sampling_ratio, aligned)
    return pooled.to(features.dtype)


def rounded_cells(boxes: Tensor, stride: float) -> Tensor:
    """Quantise boxes as RoIPool with `rounding="round"` does: (R, 4) pixels -> (R, 4) whole cells, ends exclusive.

    Corners are rounded to the nearest cell, halves away from zero as in torchvision's kernel. The last cell belongs to
    the box.
    """
    corners = boxes * (1.0 / stride)
    corners = corners.trunc() + (2 * corners.frac()).trunc()  # torch.round rounds halves to even
    return torch.cat((corners[:, :2], corners[:, 2:] + 1), dim=1)


def cut_cells(boxes: Tensor, stride: float) -> Tensor:
    """Quantise boxes as RoIPool with `rounding="floor"` does: (R, 4) pixels -> (R, 4) whole cells, ends exclusive.

    A box has at least one cell.
    """
    corners = (boxes / stride).floor()
    return torch.cat((corners[:, :2], torch.maximum(corners[:, 2:], corners[:, :2] + 1)), dim=1)


def cut_bins(starts: Tensor, ends: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Split ranges of cells into S bins of whole cells, along one axis.

    Args:
        starts: (R,) int64, first cell of each range.
        ends: (R,) int64, end of each range, exclusive.
        size: S.

    Returns:
        First cells and exclusive ends of the bins, each (R, S). Borders are at `floor(i * cells / S)`; a bin that would
        be empty gets the cell at its start.
    """
    borders = torch.arange(size + 1, device=starts.device) * (ends - starts)[:, None] // size + starts[:, None]
    first = borders[:, :-1]
    return first, torch.maximum(borders[:, 1:], first + 1)


class RoILayerConfig(Part):
    """Base class of the configs of RoI layers, an extension point."""

    @abstractmethod
    def build(self) -> RoILayer:
        """Return the layer."""

    def pooling(self) -> Pooling | None:
        """Return the layer as the Triton kernel takes it; by default None, and a GPU runs what `build` returns."""
        return None


class RoIPoolConfig(RoILayerConfig):
    """RoIPool: quantised boxes, maximum of the cells of a bin."""

    kind: Literal["roi_pool"] = "roi_pool"
    rounding: Rounding = "round"

    def build(self) -> RoILayer:
        """Return the layer."""
        return roi_pool if self.rounding == "round" else functools.partial(roi_pool, rounding=self.rounding)

    def pooling(self) -> Pooling:
        """Return the layer as the Triton kernel takes it."""
        return Pooling("cells", self.rounding)


class SamplingLayerConfig(RoILayerConfig):
    """Settings of the layers that interpolate bilinearly at N x N points per bin."""

    aggregate: Aggregate = "average"
    sampling_ratio: int = Field(2, ge=0, le=100)

    @model_validator(mode="after")
    def _fixed_points_for_maximum(self) -> Self:
        if self.aggregate == "maximum" and self.sampling_ratio == 0:
            raise ValueError("aggregate 'maximum' needs a sampling_ratio of at least 1; 0 is only for 'average'")
        return self


class RoIWarpConfig(SamplingLayerConfig):
    """RoIWarp: quantised boxes, bilinear interpolation."""

    kind: Literal["roi_warp"] = "roi_warp"

    def build(self) -> RoILayer:
        """Return the layer."""
        return functools.partial(roi_warp, aggregate=self.aggregate, sampling_ratio=self.sampling_ratio)

    def pooling(self) -> Pooling:
        """Return the layer as the Triton kernel takes it."""
        return Pooling(self.aggregate, "round", self.sampling_ratio)


class RoIAlignConfig(SamplingLayerConfig):
    """RoIAlign: exact boxes, bilinear interpolation."""

    kind: Literal["roi_align"] = "roi_align"
    aligned: bool = True

    def build(self) -> RoILayer:
        """Return the layer."""
        return functools.partial(
            roi_align, aggregate=self.aggregate, sampling_ratio=self.sampling_ratio, aligned=self.aligned
        )

    def pooling(self) -> Pooling:
        """Return the layer as the Triton kernel takes it."""
        return Pooling(self.aggregate, samples=self.sampling_ratio, aligned=self.aligned)


@dataclass(frozen=True)
class RoIPooler:
    """Applies a RoI layer to one feature map, or to the levels of a pyramid, where the box size selects the level.

    A box of `canonical_box` x `canonical_box` pixels is pooled at `canonical_stride`; twice the side means twice the
    stride (FPN, equation 1). The tolerance of 1e-6 is torchvision's, so that both select the same level.
    """

    layer: RoILayer
    strides: tuple[int, ...]  # image pixels per cell of each level, ascending; each is twice the previous one
    size: int
    canonical_box: float = 224.0
    canonical_stride: float = 16.0
    pooling: Pooling | None = None  # the layer as the Triton kernel takes it, to use that elsewhere than on a CPU

    def __post_init__(self) -> None:
        pairs = zip(self.strides, self.strides[1:], strict=False)
        assert all(coarse == 2 * fine for fine, coarse in pairs), self.strides

    def __call__(self, features: Sequence[Tensor], boxes: Tensor, images: Tensor) -> Tensor:
        """Pool R boxes.

        Args:
            features: one (B, C, H, W) per stride; H and W differ between levels.
            boxes: (R, 4) float32, image pixels.
            images: (R,) int64, image index of each box.

        Returns:
            (R, C, S, S), in the order of `boxes`. All levels are part of the autograd graph, also those without boxes.
        """
        assert len(features) == len(self.strides), (len(features), self.strides)
        if self._takes_kernel(features):
            return self._with_triton(features, boxes, images)
        if len(self.strides) == 1:
            return self.layer(features[0], boxes, images, stride=self.strides[0], size=self.size)
        pool = self._each_on_its_level if cpu.takes_short_cuts(boxes) else self._all_on_every_level
        return pool(features, boxes, images, self.assign_levels(boxes))

    def _takes_kernel(self, features: Sequence[Tensor]) -> bool:
        if self.pooling is None or cpu.takes_short_cuts(features[0]):
            return False
        return features[0].dtype != torch.float64  # the sums of the kernel are float32

    def _with_triton(self, features: Sequence[Tensor], boxes: Tensor, images: Tensor) -> Tensor:
        """Pool all boxes with one kernel, which reads each box from its level."""
        from maskrcnn.ops.kernels.roi import pool_levels

        assert self.pooling is not None
        levels = self.assign_levels(boxes)
        stride, size = self.strides[0], self.size
        return pool_levels(features, boxes, images, levels, stride=stride, size=size, pooling=self.pooling)

    def _each_on_its_level(self, features: Sequence[Tensor], boxes: Tensor, images: Tensor, levels: Tensor) -> Tensor:
        """Pool the boxes of each level, whose number is read from the device."""
        order = levels.argsort(stable=True)
        counts = levels.bincount(minlength=len(self.strides)).tolist()
        pooled = [
            self.layer(level, level_boxes, level_images, stride=stride, size=self.size)
            for level, level_boxes, level_images, stride in zip(
                features, boxes[order].split(counts), images[order].split(counts), self.strides, strict=True
            )
        ]
        # Concatenated as (R, S, S, C), the memory layout of roi_align's result: no transposition.
        grids = torch.cat([grid.permute(0, 2, 3, 1) for grid in pooled])
        # An embedding look-up of rows: the backward pass of tensor indexing is ten times as slow.
        rows = F.embedding(order.argsort(), grids.flatten(1))
        return rows.view_as(grids).permute(0, 3, 1, 2)

    def _all_on_every_level(self, features: Sequence[Tensor], boxes: Tensor, images: Tensor, levels: Tensor) -> Tensor:
        """Pool all boxes from each level, where those of other levels are empty and far outside of the map.

        So shapes do not depend on the boxes. A box outside costs a layer its zeros and no read of the map.
        """
        pooled: Tensor | None = None
        for index, (level, stride) in enumerate(zip(features, self.strides, strict=True)):
            on_level = levels == index
            moved = torch.where(on_level[:, None], boxes, FAR)
            grids = self.layer(level, moved, images, stride=stride, size=self.size)
            pooled = grids if pooled is None else torch.where(on_level[:, None, None, None], grids, pooled)
        assert pooled is not None
        return pooled

    def assign_levels(self, boxes: Tensor) -> Tensor:
        """Return the index into `strides` for each box: (R, 4) -> (R,) int64; 0 for boxes without area."""
        width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
        octaves = torch.log2(torch.sqrt(width * height) / self.canonical_box)
        level = torch.floor(math.log2(self.canonical_stride) + octaves + 1e-6)
        finest = math.log2(self.strides[0])
        return (level - finest).clamp(0, len(self.strides) - 1).long()


def _to_float(features: Tensor) -> Tensor:
    return features if features.dtype == torch.float64 else features.float()


def _with_image_index(boxes: Tensor, images: Tensor, features: Tensor) -> Tensor:
    """Return the boxes in the format of torchvision's kernels: (R, 5), image index first."""
    return torch.cat((images[:, None].to(features.dtype), boxes.to(features.dtype)), dim=1)


def _roi_pool_floor(features: Tensor, boxes: Tensor, images: Tensor, stride: float, size: int) -> Tensor:
    """Return RoIPool with `rounding="floor"`, (R, C, S, S) in channels_last memory.

    Each of the R * S * S bins is passed to torchvision's kernel as a separate box with integer corners, so that the
    kernel rounds nothing.
    """
    height, width = features.shape[2:]
    with torch.no_grad():
        cells = cut_cells(boxes.to(features.dtype), stride).long()
        left, right = _inside(*cut_bins(cells[:, 0], cells[:, 2], size), width)
        top, bottom = _inside(*cut_bins(cells[:, 1], cells[:, 3], size), height)
        grid = (boxes.shape[0], size, size)
        axes = (left[:, None], top[:, :, None], right[:, None], bottom[:, :, None])
        bins = torch.stack([axis.expand(grid) for axis in axes], dim=-1).view(-1, 4)
        bin_images = images[:, None, None].expand(grid).reshape(-1)
    rois = _with_image_index(bins, bin_images, features)
    pooled = torchvision.ops.roi_pool(features, rois, 1, 1.0)  # (R * S * S, C, 1, 1)
    return pooled.view(*grid, features.shape[1]).permute(0, 3, 1, 2)


def _inside(first: Tensor, end: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return first and last cell of bins, clamped to one cell outside the map; outside, the result is 0 anyway."""
    return first.clamp(-1, length), (end - 1).clamp(-1, length)


def _average(
    features: Tensor, boxes: Tensor, images: Tensor, stride: float, size: int, samples: int, aligned: bool
) -> Tensor:
    """Return RoIAlign with the average, with the faster implementation for each device.

    torchvision's kernel is used on a GPU and for an adaptive number of points. On a CPU it is an order of magnitude
    slower than a weighted sum of rows (1000 boxes, 7 x 7, forward and backward: 1.6 s against 0.1 s on two threads).
    """
    if cpu.takes_short_cuts(features) and samples > 0:
        return _average_of_rows(features, boxes, images, stride, size, samples, aligned)
    rois = _with_image_index(boxes, images, features)
    return torchvision.ops.roi_align(features, rois, size, 1.0 / stride, samples, aligned)


def _average_of_rows(
    features: Tensor, boxes: Tensor, images: Tensor, stride: float, size: int, samples: int, aligned: bool
) -> Tensor:
    """Return RoIAlign as a sparse matrix product, (R, C, S, S) in channels_last memory.

    Each bin is a weighted sum of the feature vectors of the cells it reads. With the map as (B * H * W, C),
    `embedding_bag` sums rows, vectorised over C and parallel over bins, in the forward and in the backward pass.
    """
    channels = features.shape[1]
    with torch.no_grad():
        indices, weights = _cells_of_bins(features, boxes, images, stride, size, samples, aligned)
    # `contiguous` is needed: otherwise, for one image in contiguous memory, the entries of a row are H * W apart.
    rows = features.permute(0, 2, 3, 1).contiguous().view(-1, channels)
    bins = F.embedding_bag(indices, rows, mode="sum", per_sample_weights=weights)  # (R * S * S, C)
    return bins.view(len(boxes), size, size, channels).permute(0, 3, 1, 2)


def _cells_of_bins(
    features: Tensor, boxes: Tensor, images: Tensor, stride: float, size: int, samples: int, aligned: bool
) -> tuple[Tensor, Tensor]:
    """Return indices and weights of the cells that each bin reads, each (R * S * S, 4 * N * N).

    Bilinear interpolation is separable: the cells of a bin are the product of its 2 * N rows and its 2 * N columns.
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
    """Return the cells around the sample points, (R, S, 2 * N) int32, and their weights in the bin, of equal shape.

    The order of operations and the border handling are the same as in torchvision's kernel, so that a point is on the
    same side of the border: up to one cell outside it reads the border cell, further outside it reads 0.
    """
    bins = torch.arange(size, dtype=start.dtype)[:, None]
    offsets = torch.arange(samples, dtype=start.dtype) + 0.5
    bin_side = (side / size)[:, None, None]
    points = start[:, None, None] + bins * bin_side + offsets * bin_side / samples  # (R, S, N)
    point_weight = ((points >= -1) & (points <= length)).to(start.dtype) / samples
    points = points.clamp(0, length - 1)
    low = points.floor()
    fraction = points - low
    cells = torch.stack((low, (low + 1).clamp(max=length - 1)), dim=-1)
    weights = torch.stack((1 - fraction, fraction), dim=-1) * point_weight[..., None]
    return cells.int().flatten(2), weights.flatten(2)
