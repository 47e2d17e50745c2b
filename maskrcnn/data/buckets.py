"""Buckets: the few shapes to which training batches are padded.

A GPU can replay a training step as one graph only with tensors of the same shapes, and `torch.compile` compiles a step
for each of them. The tensors of batches differ in height and width, in the number of objects G, and in the number of
entries T of all mask tables.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field, field_validator

from maskrcnn.config import Section, Size
from maskrcnn.errors import InputError
from maskrcnn.structures import Batch, Example

NEARLY = 0.99  # scales that differ by less are equal: a side of a resized image is a whole number of pixels


class BatchShape(NamedTuple):
    """The sizes in which the tensors of batches differ."""

    height: int  # of the padded images
    width: int
    objects: int  # G, of each image
    entries: int  # T, of all mask tables


class BucketsConfig(Section):
    """The shapes of training batches. A batch that fits in none of them keeps its own shape."""

    shapes: Annotated[tuple[tuple[Size, Size], ...], Field(min_length=1)] = Field(
        description="padded height and width of the images, such as [[800, 1344], [1344, 800]]"
    )
    objects: Annotated[tuple[Size, ...], Field(min_length=1)] = Field(
        (16, 32, 64, 100), description="padded number of objects of an image, ascending"
    )
    mask_entries: int = Field(
        2**19,
        ge=1,
        le=2**26,
        description="entries of the mask tables for each image of a batch, four bytes each; a mask takes the area of "
        "its box in annotated pixels",
    )

    @field_validator("objects")
    @classmethod
    def _ascend(cls, objects: tuple[int, ...]) -> tuple[int, ...]:
        if any(later <= earlier for earlier, later in pairwise(objects)):
            raise ValueError(f"objects must ascend, but are {list(objects)}")
        return objects

    def assign(self, sizes: np.ndarray) -> np.ndarray:
        """Return for each image the index of the shape in which it is shown largest; of equal ones, the smallest shape.

        So images of a batch share a shape by their aspect ratio, whatever size they are resized to.

        Args:
            sizes: (N, 2) height and width of the images.
        """
        shapes = np.array(self.shapes)
        scales = (shapes / np.maximum(sizes[:, None], 1)).min(axis=2)  # (N, shapes)
        is_largest = scales >= NEARLY * scales.max(axis=1, keepdims=True)
        return np.where(is_largest, shapes.prod(axis=1), np.inf).argmin(axis=1)

    def fit(self, shape: BatchShape, images: int) -> BatchShape | None:
        """Return the shape of the smallest bucket into which a batch fits, or None.

        Args:
            shape: the smallest shape of the batch.
            images: number of images.
        """
        fitting = [(h, w) for h, w in self.shapes if shape.height <= h and shape.width <= w]
        objects = next((count for count in self.objects if count >= shape.objects), None)
        entries = images * self.mask_entries
        if not fitting or objects is None or shape.entries > entries:
            return None
        height, width = min(fitting, key=lambda sides: sides[0] * sides[1])
        return BatchShape(height, width, objects, entries)

    def holds(self, batch: Batch) -> bool:
        """Return whether the tensors of a batch have the shapes of a bucket."""
        images, _, height, width = batch.images.pixels.shape
        shape = BatchShape(height, width, batch.targets.labels.shape[1], len(batch.targets.masks.sums))
        return self.fit(shape, images) == shape

    def require_multiples(self, divisor: int) -> None:
        """Raise InputError if a side is no multiple of `divisor`, the largest stride of the model."""
        for height, width in self.shapes:
            if height % divisor or width % divisor:
                needed = " x ".join(str(-(-side // divisor) * divisor) for side in (height, width))
                raise InputError(
                    f"training.buckets.shapes: {height} x {width}: the sides must be multiples of {divisor}, the "
                    f"largest stride of the model; use {needed}"
                )

    def require_fit(self, examples: Iterable[Example]) -> None:
        """Raise InputError if none of some transformed images of the training set fits in a shape."""
        sizes = np.array([tuple(example.pixels.shape[1:]) for example in examples]).reshape(-1, 2)
        fits = (sizes[:, None] <= np.array(self.shapes)).all(axis=2)  # (N, shapes)
        if len(sizes) and not fits.any():
            names = ", ".join(f"{height} x {width}" for height, width in self.shapes)
            height, width = sizes[sizes.prod(axis=1).argmin()].tolist()
            raise InputError(
                f"training.buckets.shapes: no image fits in {names}: the smallest of {len(sizes)} transformed training "
                f"images has {height} x {width} px; data.train_transforms and the shapes must match"
            )

    def unused_shapes(self, sizes: np.ndarray) -> list[str]:
        """Return a warning for each shape that none of the images of `sizes` (N, 2) is assigned to."""
        counts = np.bincount(self.assign(sizes), minlength=len(self.shapes))
        return [
            f"training.buckets.shapes: no training image has the aspect ratio of {height} x {width}, which is not used"
            for (height, width), count in zip(self.shapes, counts, strict=True)
            if count == 0
        ]
