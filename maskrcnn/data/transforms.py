"""Image transforms: the parts of `data.train_transforms` and `data.validation_transforms`.

A transform takes an example and a random generator and returns a new example. Masks are flipped but not resized or
cropped: they stay at the resolution of the annotation, and `Example.map` says where they are.

This module has the contract, flips and resizing; `crops`, `photometric`, `affine` and `mixing` have further kinds.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from maskrcnn.config import Part, Size
from maskrcnn.data.dataset import DetectionDataset
from maskrcnn.data.mask_crops import visible_box
from maskrcnn.errors import InputError
from maskrcnn.structures import ClassTable, Example, MaskCrop

Transform = Callable[[Example, np.random.Generator], Example]

Rounding = Literal["nearest", "floor"]
Probability = Annotated[float, Field(ge=0, le=1)]
Fill = Annotated[int, Field(ge=0, le=255)]  # grey level of pixels that no image covers

# px; an object that is cut to less in width or height is gone. No detector finds it there, and the regression targets
# of such a sliver are extreme.
LEAST_VISIBLE = 1.0


class TransformConfig(Part):
    """Base class of the configs of transforms, an extension point."""

    @abstractmethod
    def build(self) -> Transform:
        """Return a function from an example and a random generator to a new example.

        It draws random numbers from that generator alone. Boxes stay inside the image, and an object that leaves the
        image goes with its box, label and mask. It updates `map`, or returns new masks (see `Example`).

        Raises:
            InputError: the transform needs the training set (see `build_for`).
        """

    def build_for(self, dataset: DetectionDataset, before: Transform) -> Transform:
        """Return the function for the training set; by default that of `build`.

        A kind overrides this if it needs the classes, or other images of the dataset.

        Args:
            dataset: the training set.
            before: the transforms that stand before this one in the list.

        Raises:
            InputError: the settings do not fit the dataset.
        """
        return self.build()


class FlipConfig(TransformConfig):
    """Base class of the random flips. Before `resize` a flip is cheaper than after it: most images are enlarged."""

    probability: Probability = 0.5
    swap: tuple[tuple[str, str], ...] = ()  # pairs of classes that a flip turns into each other: [[left, right]]

    @field_validator("swap")
    @classmethod
    def _check_swap(cls, pairs: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
        names = [name for pair in pairs for name in pair]
        if len(set(names)) < len(names):
            raise ValueError("a class stands there twice; it has one partner")
        return pairs

    @abstractmethod
    def flip(self, partners: tuple[int, ...]) -> Transform:
        """Return the flip of every example; `partners[label]` is the label after it, empty if no label changes."""

    def build(self) -> Transform:
        """Return the transform. Raises InputError if it swaps classes."""
        if self.swap:
            raise InputError(f"{self.kind}: `swap` names classes of the training set; it is for data.train_transforms")
        return RandomApply(self.flip(()), self.probability)

    def build_for(self, dataset: DetectionDataset, before: Transform) -> Transform:
        """Return the transform. Raises InputError if `swap` names an unknown class."""
        return RandomApply(self.flip(_partners(self.kind, self.swap, dataset.classes)), self.probability)


class HorizontalFlipConfig(FlipConfig):
    """Random horizontal flip."""

    kind: Literal["horizontal_flip"] = "horizontal_flip"

    def flip(self, partners: tuple[int, ...]) -> HorizontalFlip:
        """Return the flip."""
        return HorizontalFlip(partners)


class VerticalFlipConfig(FlipConfig):
    """Random vertical flip."""

    kind: Literal["vertical_flip"] = "vertical_flip"

    def flip(self, partners: tuple[int, ...]) -> VerticalFlip:
        """Return the flip."""
        return VerticalFlip(partners)


def _partners(kind: str, pairs: tuple[tuple[str, str], ...], classes: ClassTable) -> tuple[int, ...]:
    """Return the label after a flip of each label 0..K; empty if no class changes."""
    unknown = [name for pair in pairs for name in pair if name not in classes.names]
    if unknown:
        raise InputError(
            f"data.train_transforms: `swap` of {kind} names '{unknown[0]}', which is no class; the classes are "
            f"{', '.join(classes.names)}"
        )
    partners = list(range(len(classes) + 1))
    for pair in pairs:
        first, second = (classes.names.index(name) + 1 for name in pair)
        partners[first], partners[second] = second, first
    return tuple(partners) if pairs else ()


class ResizeConfig(TransformConfig):
    """Resize of the short side, with a limit on the long side."""

    kind: Literal["resize"] = "resize"
    short_side: tuple[Size, ...] = Field((800,), min_length=1)  # one size is drawn per image
    long_side: Size = 1333  # upper limit; takes precedence over `short_side`
    rounding: Rounding = "nearest"  # of the new size: "nearest" as in Detectron2, "floor" as in torchvision
    antialias: bool = True  # true as in Detectron2 (through Pillow); torchvision resizes without

    def build(self) -> Resize:
        """Return the transform."""
        return Resize(self.short_side, self.long_side, rounding=self.rounding, antialias=self.antialias)


@dataclass(frozen=True)
class Compose:
    """Applies transforms in order, with one random generator."""

    steps: tuple[Transform, ...]

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Return the transformed example."""
        for step in self.steps:
            example = step(example, rng)
        return example


@dataclass(frozen=True)
class RandomApply:
    """Applies a transform with a probability. Otherwise the example stays as it is."""

    transform: Transform
    probability: float

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Return the transformed or the unchanged example."""
        return self.transform(example, rng) if rng.random() < self.probability else example


@dataclass(frozen=True)
class HorizontalFlip:
    """Flips an example horizontally. Empty `partners`: labels do not change."""

    partners: tuple[int, ...] = ()

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Return the flipped example."""
        return swap_labels(flip_horizontally(example), self.partners)


@dataclass(frozen=True)
class VerticalFlip:
    """Flips an example vertically. Empty `partners`: labels do not change."""

    partners: tuple[int, ...] = ()

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Return the flipped example."""
        return swap_labels(flip_vertically(example), self.partners)


@dataclass(frozen=True)
class Resize:
    """Resizes the short side to a random value of `short_side`, with the long side limited to `long_side`."""

    short_side: tuple[int, ...]
    long_side: int
    rounding: Rounding = "nearest"
    antialias: bool = True

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Return the resized example."""
        short_side = self.short_side[int(rng.integers(len(self.short_side)))]
        height, width = example.pixels.shape[1:]
        size = resized_size(height, width, short_side, self.long_side, self.rounding)
        return resize(example, size, antialias=self.antialias)


def resized_size(height: int, width: int, short_side: int, long_side: int, rounding: Rounding) -> tuple[int, int]:
    """Return the resized height and width in pixels, each at least 1."""
    scale = min(short_side / min(height, width), long_side / max(height, width))
    half = 0.5 if rounding == "nearest" else 0.0
    return max(1, int(height * scale + half)), max(1, int(width * scale + half))


def resize(example: Example, size: tuple[int, int], *, antialias: bool = True) -> Example:
    """Resize the image bilinearly to `size` (height, width) and scale its boxes; masks are not resized.

    The pixels stay uint8, which is many times faster than float at COCO's image sizes.
    """
    height, width = example.pixels.shape[1:]
    scale_x, scale_y = size[1] / width, size[0] / height
    return dataclasses.replace(
        example,
        pixels=tvf.resize(example.pixels, list(size), antialias=antialias),
        boxes=example.boxes * torch.tensor([scale_x, scale_y, scale_x, scale_y]),
        map=example.map.then(scale_x, scale_y),
    )


def keep_objects(example: Example, keep: Tensor) -> Example:
    """Return the example with the objects for which `keep` (G,) is True; the others go with all their fields."""
    return dataclasses.replace(
        example,
        boxes=example.boxes[keep],
        labels=example.labels[keep],
        masks=tuple(mask for mask, kept in zip(example.masks, keep.tolist(), strict=True) if kept),
        has_mask=example.has_mask[keep],
    )


def crop(example: Example, top: int, left: int, height: int, width: int) -> Example:
    """Crop the image to a window inside it.

    The window has at least one pixel. Masks are not cropped. The box of an object that the window cuts bounds the part
    of its mask that stays visible; without a mask, it is clipped. An object of which less than `LEAST_VISIBLE` is left
    is removed.
    """
    assert 0 <= top < top + height <= example.pixels.shape[1], (top, height)
    assert 0 <= left < left + width <= example.pixels.shape[2], (left, width)
    boxes = example.boxes - torch.tensor([left, top, left, top])
    clipped = boxes.clamp(min=torch.zeros(4), max=torch.tensor([width, height, width, height], dtype=torch.float32))
    placement = example.map.then(1.0, 1.0, -left, -top)
    cut = (clipped != boxes).any(dim=1)
    for index in cut.nonzero()[:, 0].tolist():
        if example.masks[index].pixels.size:
            clipped[index] = torch.tensor(visible_box(example.masks[index], placement, height, width))
    pixels = example.pixels[:, top : top + height, left : left + width]
    cropped = dataclasses.replace(example, pixels=pixels, boxes=clipped, map=placement)
    return keep_objects(cropped, ~cut | _are_visible(clipped))


def _are_visible(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2] > LEAST_VISIBLE - 1e-3).all(dim=1)  # the boxes are rounded to float32


def pad(example: Example, height: int, width: int, fill: int) -> Example:
    """Pad the image at the right and the bottom to `height x width` with a grey level; a larger one is unchanged."""
    right, bottom = max(0, width - example.pixels.shape[2]), max(0, height - example.pixels.shape[1])
    return dataclasses.replace(example, pixels=tvf.pad(example.pixels, [0, 0, right, bottom], fill=fill))


def flip_horizontally(example: Example) -> Example:
    """Flip image, boxes and masks horizontally."""
    width = example.pixels.shape[2]
    annotated_width = example.original_size[1]
    placement = example.map
    x1, y1, x2, y2 = example.boxes.unbind(dim=1)
    return dataclasses.replace(
        example,
        pixels=example.pixels.flip(-1),
        boxes=torch.stack([width - x2, y1, width - x1, y2], dim=1),
        masks=tuple(_flip_columns(mask, annotated_width) for mask in example.masks),
        map=placement._replace(offset_x=width - placement.scale_x * annotated_width - placement.offset_x),
    )


def flip_vertically(example: Example) -> Example:
    """Flip image, boxes and masks vertically."""
    height = example.pixels.shape[1]
    annotated_height = example.original_size[0]
    placement = example.map
    x1, y1, x2, y2 = example.boxes.unbind(dim=1)
    return dataclasses.replace(
        example,
        pixels=example.pixels.flip(-2),
        boxes=torch.stack([x1, height - y2, x2, height - y1], dim=1),
        masks=tuple(_flip_rows(mask, annotated_height) for mask in example.masks),
        map=placement._replace(offset_y=height - placement.scale_y * annotated_height - placement.offset_y),
    )


def swap_labels(example: Example, partners: tuple[int, ...]) -> Example:
    """Return the example with label `partners[label]` in place of each label above 0; unchanged without partners."""
    if not partners:
        return example
    swapped = torch.tensor(partners)[example.labels.clamp(min=0)]
    return dataclasses.replace(example, labels=torch.where(example.labels > 0, swapped, example.labels))


def _flip_columns(mask: MaskCrop, width: int) -> MaskCrop:
    return MaskCrop(width - mask.x - mask.pixels.shape[1], mask.y, np.ascontiguousarray(mask.pixels[:, ::-1]))


def _flip_rows(mask: MaskCrop, height: int) -> MaskCrop:
    return MaskCrop(mask.x, height - mask.y - mask.pixels.shape[0], np.ascontiguousarray(mask.pixels[::-1]))
