"""Records that the stages of the model exchange: dense batch tensors of fixed size, with padding.

Shapes: B images, P proposals, S samples, D detections, G objects, K classes, M mask side, T entries of all
summed-area tables.

Boxes are `(x1, y1, x2, y2)`, float32, in pixels of the resized image, in continuous coordinates: the pixel in row
`i` and column `j` covers `[j, j + 1) x [i, i + 1)`, so its box is `(j, i, j + 1, i + 1)`. Labels run from 1 to K; 0 is
background and -1 is padding or an ignored region. The score of padding is -inf.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

Dense = TypeVar("Dense", bound="OnDevice")


@dataclass(frozen=True)
class OnDevice:
    """A record of tensors, or of other such records, that moves between devices as a unit."""

    def to(self: Dense, device: torch.device | str, *, non_blocking: bool = False) -> Dense:
        """Return the record with every tensor on `device`. Use `non_blocking` only for copies to a GPU."""
        return self._each(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self: Dense) -> Dense:
        """Return the record in page-locked memory (the data loader calls this)."""
        return self._each(lambda value: value.pin_memory())

    def tensors(self) -> list[Tensor]:
        """Return the tensors of the record, those of inner records included, in the order of the fields."""
        values = [getattr(self, each.name) for each in dataclasses.fields(self)]
        return [tensor for value in values for tensor in (value.tensors() if isinstance(value, OnDevice) else [value])]

    def with_tensors(self: Dense, tensors: Iterator[Tensor]) -> Dense:
        """Return the record with the next tensors of an iterator in place of `tensors()`."""
        return self._each(lambda old: old.with_tensors(tensors) if isinstance(old, OnDevice) else next(tensors))

    def _each(self: Dense, move: Callable[[Any], Any]) -> Dense:
        moved = {each.name: move(getattr(self, each.name)) for each in dataclasses.fields(self)}
        return dataclasses.replace(self, **moved)


@dataclass(frozen=True)
class ImageBatch(OnDevice):
    """Images of one batch, padded at the right and the bottom to a common size."""

    pixels: Tensor  # (B, 3, H, W) RGB in 0..255, uint8 (or float); H and W are multiples of the model's `size_divisor`
    sizes: Tensor  # (B, 2) int64: height and width of each image without padding
    seeds: Tensor  # (B,) int64: seed of all random sampling for each image, so it does not depend on the batch

    def __len__(self) -> int:
        return self.pixels.shape[0]


@dataclass(frozen=True)
class MaskTables(OnDevice):
    """Ground-truth masks as summed-area tables, in annotated pixels (the original resolution); never resized.

    The mask of an object is cropped to a box of whole pixels, `height x width`, and stored as its summed-area table of
    `(height + 1) x (width + 1)`: entry `(i, j)` counts the mask's pixels above row `i` and left of column `j`. The
    area of the mask inside any real-valued rectangle then takes four bilinear look-ups, independent of its size.

    A point `x` of the transformed image lies at column `x / scale_x - origin_x` of the object's table.
    """

    sums: Tensor  # (T,) int32: the tables of all objects, row-major, one after another
    starts: Tensor  # (B, G) int64: index in `sums` where the object's table begins; 0 for padding
    sizes: Tensor  # (B, G, 2) int64: height and width of the cropped mask; 0 for padding
    origins: Tensor  # (B, G, 2) float32: x and y of the crop's top left corner and the image's offset, annotated pixels
    scales: Tensor  # (B, 2) float32: transformed pixels per annotated pixel, along x and y


@dataclass(frozen=True)
class Targets(OnDevice):
    """Ground truth of one batch. G is the largest number of objects in one of its images (at least 1)."""

    boxes: Tensor  # (B, G, 4); zeros for padding
    labels: Tensor  # (B, G) int64, 1..K; -1 for padding (area 0) and for ignored regions (crowds)
    masks: MaskTables
    has_mask: Tensor  # (B, G) bool: False for objects that are annotated with a box alone, and for padding

    @property
    def valid(self) -> Tensor:
        """(B, G) bool: True for objects, False for padding and ignored regions."""
        return self.labels > 0


@dataclass(frozen=True)
class Proposals(OnDevice):
    """Proposals of the RPN, sorted by score in descending order."""

    boxes: Tensor  # (B, P, 4), clipped to the image
    scores: Tensor  # (B, P) objectness logits; -inf for padding

    @property
    def valid(self) -> Tensor:
        """(B, P) bool: True for proposals, False for padding."""
        return self.scores > -torch.inf


@dataclass(frozen=True)
class RoISamples(OnDevice):
    """RoIs sampled to train the heads: in each image positives first, then negatives, then padding."""

    boxes: Tensor  # (B, S, 4)
    labels: Tensor  # (B, S) int64: class of the matched object, 0 background, -1 padding
    matched: Tensor  # (B, S) int64: index of the matched object in the image's targets; 0 if there is none

    @property
    def valid(self) -> Tensor:
        """(B, S) bool: True for positives and negatives, False for padding."""
        return self.labels >= 0


@dataclass(frozen=True)
class Detections(OnDevice):
    """Detections in pixels of the resized image, sorted by score in descending order."""

    boxes: Tensor  # (B, D, 4), clipped to the image
    scores: Tensor  # (B, D) class probability; -inf for padding
    labels: Tensor  # (B, D) int64, 1..K; -1 for padding
    masks: Tensor  # (B, D, M, M) mask probability of the predicted class in each cell of the box; M = 0: no mask head

    @property
    def valid(self) -> Tensor:
        """(B, D) bool: True for detections, False for padding."""
        return self.labels > 0


class Losses(NamedTuple):
    """The five loss terms, scalars."""

    loss_objectness: Tensor  # RPN: cross entropy of object or background
    loss_rpn_box_reg: Tensor  # RPN: regression from anchor to object
    loss_classifier: Tensor  # box head: cross entropy of the classes
    loss_box_reg: Tensor  # box head: regression from proposal to object
    loss_mask: Tensor  # mask head: cross entropy of the mask cells

    def weighted(self, weights: Mapping[str, float]) -> Losses:
        """Return the terms times their weights by name; a term without one has weight 1."""
        return Losses(*(term * weights.get(name, 1.0) for name, term in zip(self._fields, self, strict=True)))

    @property
    def total(self) -> Tensor:
        """Return the sum of the terms, which training minimises."""
        return torch.stack(self).sum()


class Diagnostics(NamedTuple):
    """Quality of the proposals and RoI samples of one batch, for logging; without gradient.

    A value is nan if the batch has no objects or no samples.
    """

    proposal_recall: Tensor  # scalar: fraction of the objects that an RPN proposal overlaps with IoU >= 0.5
    positive_fraction: Tensor  # scalar: fraction of positives among the RoI samples


class MaskCrop(NamedTuple):
    """A binary mask cropped to a box of whole pixels: `pixels[0, 0]` is pixel `(x, y)` of the image."""

    x: int
    y: int
    pixels: np.ndarray  # (h, w) uint8, 0 or 1; (0, 0) if the object has no mask


class AxisAlignedMap(NamedTuple):
    """A map from annotated to current pixels: `x` goes to `scale_x * x + offset_x`, and `y` likewise."""

    scale_x: float = 1.0
    scale_y: float = 1.0
    offset_x: float = 0.0
    offset_y: float = 0.0

    def then(self, scale_x: float, scale_y: float, offset_x: float = 0.0, offset_y: float = 0.0) -> AxisAlignedMap:
        """Return the map that applies this one first and then another scale and offset."""
        return AxisAlignedMap(
            self.scale_x * scale_x,
            self.scale_y * scale_y,
            self.offset_x * scale_x + offset_x,
            self.offset_y * scale_y + offset_y,
        )

    def apply(self, boxes: Tensor) -> Tensor:
        """Return boxes `(N, 4)` of annotated pixels in current pixels."""
        scale = boxes.new_tensor((self.scale_x, self.scale_y) * 2)
        return boxes * scale + boxes.new_tensor((self.offset_x, self.offset_y) * 2)

    def invert(self, boxes: Tensor) -> Tensor:
        """Return boxes `(N, 4)` of current pixels in annotated pixels."""
        offset = boxes.new_tensor((self.offset_x, self.offset_y) * 2)
        return (boxes - offset) / boxes.new_tensor((self.scale_x, self.scale_y) * 2)


IDENTITY = AxisAlignedMap()


@dataclass(frozen=True)
class Example:
    """One image with its objects. Datasets return it; transforms map it to another `Example`.

    Resizing and cropping change pixels and boxes. Masks stay in annotated pixels, those of the image as the dataset
    returns it (only flips change them); `map` relates the two. A transform that is not axis-aligned, such as a
    rotation, returns new masks in the pixels of its result, the identity as `map`, and that size as `original_size`.

    `has_mask` says which objects are annotated with a mask. The others train the boxes alone, and have an empty mask.
    A mask may also be empty because it covers no pixel.
    """

    image_id: int
    pixels: Tensor  # (3, H, W) uint8 RGB
    boxes: Tensor  # (G, 4) float32, in pixels of this image
    labels: Tensor  # (G,) int64, 1..K; -1 for ignored regions
    masks: tuple[MaskCrop, ...]  # G of them
    map: AxisAlignedMap = IDENTITY
    original_size: tuple[int, int] = (0, 0)  # height and width in annotated pixels; by default those of `pixels`
    has_mask: Tensor = field(default_factory=partial(torch.ones, 0, dtype=torch.bool))  # (G,) bool; by default all True

    def __post_init__(self) -> None:
        if self.original_size == (0, 0):
            object.__setattr__(self, "original_size", tuple(self.pixels.shape[1:]))
        if len(self.has_mask) != len(self.labels):
            assert self.has_mask.all(), f"{len(self.has_mask)} flags `has_mask` of {len(self.labels)} objects"
            object.__setattr__(self, "has_mask", torch.ones(len(self.labels), dtype=torch.bool))


class Batch(NamedTuple):
    """One batch of the data loader; training calls `model(batch.images, batch.targets)`."""

    image_ids: tuple[int, ...]
    images: ImageBatch
    targets: Targets
    maps: tuple[AxisAlignedMap, ...]  # from original pixels to those of `images`, for each image
    original_sizes: tuple[tuple[int, int], ...]  # height and width of each image before any transform


@dataclass(frozen=True)
class ClassTable:
    """The classes of a dataset: label `i` (from 1) has name `names[i - 1]` and COCO id `category_ids[i - 1]`."""

    names: tuple[str, ...]
    category_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class ClassRows:
    """Layout of a parameter's first dimension: `per_class` rows for each class, in the order of the labels."""

    per_class: int
    background: bool  # whether `per_class` rows for background precede those of class 1

    def count(self, num_classes: int) -> int:
        """Return the number of rows for classes 1..`num_classes`."""
        return (num_classes + self.background) * self.per_class

    def of(self, labels: Sequence[int]) -> list[int]:
        """Return the row indices of `labels`, in the given order, after those of background if there are any."""
        blocks = [0, *labels] if self.background else [label - 1 for label in labels]
        return [block * self.per_class + row for block in blocks for row in range(self.per_class)]
