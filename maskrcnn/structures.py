"""What passes between the stages: dense batch tensors of fixed size, with padding.

Shapes: B images, P proposals, S samples, D detections, G objects, K classes, M mask side, T pixels of all tables.

Boxes are `(x1, y1, x2, y2)`, float32, in pixels of the resized image, in continuous coordinates: the pixel in row
`i` and column `j` covers `[j, j + 1) x [i, i + 1)`, so a box around it is `(j, i, j + 1, i + 1)`. Labels run from 1
to K; 0 is background and -1 is padding or "ignored". Scores of padding are -inf.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

Dense = TypeVar("Dense", bound="OnDevice")


@dataclass(frozen=True)
class OnDevice:
    """A record of tensors, and of other such records, that moves between devices as one."""

    def to(self: Dense, device: torch.device | str, *, non_blocking: bool = False) -> Dense:
        """Return the record with every tensor on `device`; `non_blocking` is safe towards a GPU alone."""
        return self._each(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self: Dense) -> Dense:
        """Return the record in page-locked memory (the data loader calls this)."""
        return self._each(lambda part: part.pin_memory())

    def _each(self: Dense, move: Callable[[Any], Any]) -> Dense:
        parts = {field.name: move(getattr(self, field.name)) for field in dataclasses.fields(self)}
        return dataclasses.replace(self, **parts)


@dataclass(frozen=True)
class ImageBatch(OnDevice):
    """Images of one batch, padded at the right and the bottom to a common size."""

    pixels: Tensor  # (B, 3, H, W) RGB in 0..255, uint8 (or float); H and W are multiples of the model's `size_divisor`
    sizes: Tensor  # (B, 2) int64: height and width of each image without padding
    seeds: Tensor  # (B,) int64: all randomness in the model comes from these, so it does not depend on the batch

    def __len__(self) -> int:
        return self.pixels.shape[0]


@dataclass(frozen=True)
class MaskTables(OnDevice):
    """Ground-truth masks as summed-area tables, in the pixels in which they were annotated; never resized.

    The mask of an object is cut to a box of whole pixels, `height x width`, and stored as its summed-area table of
    `(height + 1) x (width + 1)`: entry `(i, j)` counts the mask's pixels above row `i` and left of column `j`. The
    area that a mask covers inside any real-valued rectangle is then four bilinear look-ups, whatever its size.

    A point `x` of the resized image lies at column `x / scale_x - origin_x` of the object's table.
    """

    sums: Tensor  # (T,) int32: the tables of all objects, row-major, one after another
    starts: Tensor  # (B, G) int64: where in `sums` an object's table begins; 0 for padding
    sizes: Tensor  # (B, G, 2) int64: height and width of the cut mask; 0 for padding
    origins: Tensor  # (B, G, 2) float32: x and y of the cut's corner, in annotated pixels
    scales: Tensor  # (B, 2) float32: resized pixels per annotated pixel, along x and y


@dataclass(frozen=True)
class Targets(OnDevice):
    """Ground truth of one batch. G is the largest number of objects of an image in it (at least 1)."""

    boxes: Tensor  # (B, G, 4); zeros for padding
    labels: Tensor  # (B, G) int64, 1..K; -1 for padding, and for regions to ignore (crowds), which have area
    masks: MaskTables

    @property
    def valid(self) -> Tensor:
        """(B, G) bool: the objects, without padding and ignored regions."""
        return self.labels > 0


@dataclass(frozen=True)
class Proposals(OnDevice):
    """Regions that the RPN found, best first."""

    boxes: Tensor  # (B, P, 4), clipped to the image
    scores: Tensor  # (B, P) objectness logits; -inf for padding

    @property
    def valid(self) -> Tensor:
        """(B, P) bool: the proposals, without padding."""
        return self.scores > -torch.inf


@dataclass(frozen=True)
class RoISamples(OnDevice):
    """Regions drawn for training the heads; an image's positives come first, then negatives, then padding."""

    boxes: Tensor  # (B, S, 4)
    labels: Tensor  # (B, S) int64: class of the matched object, 0 background, -1 padding
    matched: Tensor  # (B, S) int64: index of the matched object in the image's targets; 0 where there is none

    @property
    def valid(self) -> Tensor:
        """(B, S) bool: positives and negatives, without padding."""
        return self.labels >= 0


@dataclass(frozen=True)
class Detections(OnDevice):
    """Objects that the model found, best first, in pixels of the resized image."""

    boxes: Tensor  # (B, D, 4), clipped to the image
    scores: Tensor  # (B, D) class probability; -inf for padding
    labels: Tensor  # (B, D) int64, 1..K; -1 for padding
    masks: Tensor  # (B, D, M, M) probability of the object's own class in each cell of its box

    @property
    def valid(self) -> Tensor:
        """(B, D) bool: the detections, without padding."""
        return self.labels > 0


class Losses(NamedTuple):
    """The five terms of the loss, each a scalar, each of weight 1."""

    loss_objectness: Tensor  # RPN: is there an object at this anchor
    loss_rpn_box_reg: Tensor  # RPN: how the anchor must move to fit it
    loss_classifier: Tensor  # box head: which class
    loss_box_reg: Tensor  # box head: how the proposal must move
    loss_mask: Tensor  # mask head: which pixels

    @property
    def total(self) -> Tensor:
        """The sum of the terms: what training minimises."""
        return torch.stack(self).sum()


class Diagnostics(NamedTuple):
    """How well the first stages feed the heads in one batch: figures for people, without gradient.

    A figure is nan where there is nothing to measure.
    """

    proposal_recall: Tensor  # scalar: share of the objects that a proposal of the RPN overlaps with IoU 0.5 or more
    positive_fraction: Tensor  # scalar: share of positives among the regions that train the heads


class MaskCrop(NamedTuple):
    """A binary mask cut to a box of whole pixels: row 0, column 0 of `pixels` is pixel `(x, y)` of the image."""

    x: int
    y: int
    pixels: np.ndarray  # (h, w) uint8, 0 or 1; (0, 0) where a region has no mask


@dataclass(frozen=True)
class Example:
    """One image with its objects, as a dataset returns it and as transforms change it.

    Boxes and labels follow the image when it is resized; masks stay in the pixels in which they were annotated
    (they follow flips alone), and `scale` says how the two relate.
    """

    image_id: int
    pixels: Tensor  # (3, H, W) uint8 RGB
    boxes: Tensor  # (G, 4) float32, in pixels of this image
    labels: Tensor  # (G,) int64, 1..K; -1 for regions to ignore
    masks: tuple[MaskCrop, ...]  # G of them
    scale: tuple[float, float] = (1.0, 1.0)  # pixels of this image per annotated pixel, along x and y


class Batch(NamedTuple):
    """What the loader yields and what `model(batch.images, batch.targets)` takes."""

    image_ids: tuple[int, ...]
    images: ImageBatch
    targets: Targets
    scales: tuple[tuple[float, float], ...]  # resized pixels per original pixel of each image, along x and y
    original_sizes: tuple[tuple[int, int], ...]  # height and width of each image before resizing


@dataclass(frozen=True)
class ClassTable:
    """The classes of a dataset: label `i` (from 1) is named `names[i - 1]` and is category `category_ids[i - 1]`."""

    names: tuple[str, ...]
    category_ids: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class ClassRows:
    """How the first dimension of a parameter is shared out: `per_class` rows for each class, in the order of labels."""

    per_class: int
    background: bool  # whether as many rows for background come before those of class 1

    def count(self, num_classes: int) -> int:
        """Return the number of rows for classes 1..`num_classes`."""
        return (num_classes + self.background) * self.per_class

    def of(self, labels: Sequence[int]) -> list[int]:
        """Return the rows that belong to `labels`, in their order; those of background, if any, come first."""
        places = [0, *labels] if self.background else [label - 1 for label in labels]
        return [place * self.per_class + row for place in places for row in range(self.per_class)]
