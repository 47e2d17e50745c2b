"""Image transforms: the parts of `data.train_transforms` and `data.validation_transforms`.

A transform takes an example and a random generator and returns a new example. Masks are flipped but not resized or
cropped: they stay at the resolution of the annotation, and `Example.map` says where they are.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from maskrcnn.config import Part, Size
from maskrcnn.structures import Example, MaskCrop

Transform = Callable[[Example, np.random.Generator], Example]

Rounding = Literal["nearest", "floor"]


class TransformConfig(Part):
    """Base class of the configs of transforms, an extension point."""

    @abstractmethod
    def build(self) -> Transform:
        """Return a function from an example and a random generator to a new example.

        It draws random numbers from that generator alone. Boxes stay inside the image, and an object that leaves the
        image goes with its box, label and mask. It updates `map`, or returns new masks (see `Example`).
        """


class HorizontalFlipConfig(TransformConfig):
    """Random horizontal flip. Before `resize` it is cheaper than after it, because most images are enlarged."""

    kind: Literal["horizontal_flip"] = "horizontal_flip"
    probability: Annotated[float, Field(ge=0, le=1)] = 0.5

    def build(self) -> HorizontalFlip:
        """Return the transform."""
        return HorizontalFlip(self.probability)


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
class HorizontalFlip:
    """Flips an example horizontally with the given probability."""

    probability: float

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Return the flipped or the unchanged example."""
        return flip_horizontally(example) if rng.random() < self.probability else example


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


def crop(example: Example, top: int, left: int, height: int, width: int) -> Example:
    """Crop the image to a window inside it, clip the boxes, and remove objects of which no box is left.

    The window has at least one pixel. Masks are not cropped. A box is not tightened to the part of the mask that is
    visible.
    """
    assert 0 <= top < top + height <= example.pixels.shape[1], (top, height)
    assert 0 <= left < left + width <= example.pixels.shape[2], (left, width)
    boxes = example.boxes - torch.tensor([left, top, left, top])
    boxes = boxes.clamp(min=torch.zeros(4), max=torch.tensor([width, height, width, height], dtype=torch.float32))
    visible = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    return dataclasses.replace(
        example,
        pixels=example.pixels[:, top : top + height, left : left + width],
        boxes=boxes[visible],
        labels=example.labels[visible],
        masks=tuple(mask for mask, shown in zip(example.masks, visible.tolist(), strict=True) if shown),
        map=example.map.then(1.0, 1.0, -left, -top),
    )


def flip_horizontally(example: Example) -> Example:
    """Flip image, boxes and masks horizontally."""
    width = example.pixels.shape[2]
    annotated_width = example.original_size[1]
    placement = example.map
    return dataclasses.replace(
        example,
        pixels=example.pixels.flip(-1),
        boxes=_flip_boxes(example.boxes, width),
        masks=tuple(_flip_mask(mask, annotated_width) for mask in example.masks),
        map=placement._replace(offset_x=width - placement.scale_x * annotated_width - placement.offset_x),
    )


def _flip_boxes(boxes: Tensor, width: int) -> Tensor:
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    return torch.stack([width - x2, y1, width - x1, y2], dim=1)


def _flip_mask(mask: MaskCrop, width: int) -> MaskCrop:
    return MaskCrop(width - mask.x - mask.pixels.shape[1], mask.y, np.ascontiguousarray(mask.pixels[:, ::-1]))
