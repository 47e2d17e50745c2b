"""What happens to an image before it is batched: a flip at random, then the resize.

A transform takes an example and a random generator and returns a new example. Masks are flipped but never resized:
they stay in the pixels in which they were annotated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from maskrcnn.config import Section
from maskrcnn.structures import Example, MaskCrop

Transform = Callable[[Example, np.random.Generator], Example]

Rounding = Literal["nearest", "floor"]


class TransformsConfig(Section):
    """Flip and resize. The defaults are those of training at one scale; set `flip: 0` for evaluation."""

    short_side: tuple[PositiveInt, ...] = Field((800,), min_length=1)  # one is drawn per image
    long_side: PositiveInt = 1333  # at most; it wins over the short side
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5  # probability
    rounding: Rounding = "nearest"  # of the new size: Detectron2 takes the nearest, torchvision the floor
    antialias: bool = True  # Detectron2 does (by Pillow), torchvision does not

    def build(self) -> Transform:
        """Return the transforms as one."""
        resize = Resize(self.short_side, self.long_side, rounding=self.rounding, antialias=self.antialias)
        # Flipping first is cheaper: most images grow.
        return Compose((HorizontalFlip(self.flip), resize))


@dataclass(frozen=True)
class Compose:
    """Transforms one after another, all drawing from the same generator."""

    steps: tuple[Transform, ...]

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Apply the steps in order."""
        for step in self.steps:
            example = step(example, rng)
        return example


@dataclass(frozen=True)
class HorizontalFlip:
    """Mirrors left and right with the given probability."""

    probability: float

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Flip the example, or return it as it is."""
        return flip_horizontally(example) if rng.random() < self.probability else example


@dataclass(frozen=True)
class Resize:
    """Scales the short side to one of `short_side`, drawn at random, unless the long side would pass `long_side`."""

    short_side: tuple[int, ...]
    long_side: int
    rounding: Rounding = "nearest"
    antialias: bool = True

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Return the example at its new size."""
        short_side = self.short_side[int(rng.integers(len(self.short_side)))]
        height, width = example.pixels.shape[1:]
        size = resized_size(height, width, short_side, self.long_side, self.rounding)
        return resize(example, size, antialias=self.antialias)


def resized_size(height: int, width: int, short_side: int, long_side: int, rounding: Rounding) -> tuple[int, int]:
    """Return the height and width to which an image is resized, each at least 1."""
    scale = min(short_side / min(height, width), long_side / max(height, width))
    half = 0.5 if rounding == "nearest" else 0.0
    return max(1, int(height * scale + half)), max(1, int(width * scale + half))


def resize(example: Example, size: tuple[int, int], *, antialias: bool = True) -> Example:
    """Resize the image bilinearly to `size` (height, width); boxes follow, masks stay, `scale` says the difference.

    The pixels stay uint8: at COCO's sizes that is many times as fast as by way of floats.
    """
    height, width = example.pixels.shape[1:]
    along_x, along_y = size[1] / width, size[0] / height
    return dataclasses.replace(
        example,
        pixels=tvf.resize(example.pixels, list(size), antialias=antialias),
        boxes=example.boxes * torch.tensor([along_x, along_y, along_x, along_y]),
        scale=(example.scale[0] * along_x, example.scale[1] * along_y),
    )


def flip_horizontally(example: Example) -> Example:
    """Mirror image, boxes and masks left and right."""
    width = example.pixels.shape[2]
    annotated_width = round(width / example.scale[0])
    return dataclasses.replace(
        example,
        pixels=example.pixels.flip(-1),
        boxes=_flip_boxes(example.boxes, width),
        masks=tuple(_flip_mask(mask, annotated_width) for mask in example.masks),
    )


def _flip_boxes(boxes: Tensor, width: int) -> Tensor:
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    return torch.stack([width - x2, y1, width - x1, y2], dim=1)


def _flip_mask(mask: MaskCrop, width: int) -> MaskCrop:
    return MaskCrop(width - mask.x - mask.pixels.shape[1], mask.y, np.ascontiguousarray(mask.pixels[:, ::-1]))
