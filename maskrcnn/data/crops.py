"""Transforms that crop: random crops, and large-scale jitter. Masks stay exact, and boxes bound what is visible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, field_validator
from torch import Tensor

from maskrcnn.config import Size
from maskrcnn.data.transforms import Fill, Probability, RandomApply, TransformConfig, crop, pad, resize
from maskrcnn.structures import Example

Share = Annotated[float, Field(gt=0, le=1)]
Scale = Annotated[float, Field(gt=0, le=16)]


def ascending(limits: tuple[float, float]) -> tuple[float, float]:
    """Return a range of numbers. Raises ValueError if its first limit is above its second."""
    if limits[0] > limits[1]:
        raise ValueError(f"the lower limit {limits[0]:g} is above the upper limit {limits[1]:g}")
    return limits


class RandomCropConfig(TransformConfig):
    """A random window of the image. Its height and width are random shares of those of the image."""

    kind: Literal["random_crop"] = "random_crop"
    size: tuple[Share, Share] = (0.5, 1.0)  # range of the shares, each drawn for itself
    whole_objects: bool = False  # enlarge the window until it cuts no object
    probability: Probability = 1.0

    check_size = field_validator("size")(ascending)

    def build(self) -> RandomApply:
        """Return the transform."""
        return RandomApply(RandomCrop(self.size, self.whole_objects), self.probability)


class LargeScaleJitterConfig(TransformConfig):
    """Large-scale jitter: resize by a random factor, then crop or pad to a square of fixed size.

    Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation", CVPR 2021. It
    takes the place of `resize`.
    """

    kind: Literal["large_scale_jitter"] = "large_scale_jitter"
    side: Size = 1024  # px, of the result
    scale: tuple[Scale, Scale] = (0.1, 2.0)  # range of the longer side after resizing, as a multiple of `side`
    fill: Fill = 128

    check_scale = field_validator("scale")(ascending)

    def build(self) -> LargeScaleJitter:
        """Return the transform."""
        return LargeScaleJitter(self.side, self.scale, self.fill)


@dataclass(frozen=True)
class RandomCrop:
    """Crops an example to a random window."""

    size: tuple[float, float]
    whole_objects: bool = False

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Return the cropped example."""
        height, width = example.pixels.shape[1:]
        rows, columns = (max(1, round(side * rng.uniform(*self.size))) for side in (height, width))
        top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
        window = (left, top, left + columns, top + rows)
        if self.whole_objects:
            window = enlarged_to_whole_objects(window, example.boxes[example.labels > 0], height, width)
        left, top, right, bottom = window
        return crop(example, top, left, bottom - top, right - left)


def enlarged_to_whole_objects(
    window: tuple[int, int, int, int], boxes: Tensor, height: int, width: int
) -> tuple[int, int, int, int]:
    """Return the smallest window around `window` that cuts no box; at most the image.

    Args:
        window: x1, y1, x2, y2 in whole pixels.
        boxes: (G, 4).
        height, width: size of the image.
    """
    corners = boxes.double().numpy().reshape(-1, 4)
    corners = np.concatenate([np.floor(corners[:, :2]), np.ceil(corners[:, 2:])], axis=1)
    corners = corners.clip(0, [width, height, width, height]).astype(np.int64)
    while True:
        x1, y1, x2, y2 = window
        inside = (corners[:, 0] < x2) & (corners[:, 2] > x1) & (corners[:, 1] < y2) & (corners[:, 3] > y1)
        touched = np.concatenate([corners[inside], [window]])
        left, top = touched[:, :2].min(axis=0).tolist()
        right, bottom = touched[:, 2:].max(axis=0).tolist()
        if (left, top, right, bottom) == window:
            return window
        window = left, top, right, bottom


@dataclass(frozen=True)
class LargeScaleJitter:
    """Resizes an example by a random factor, and crops or pads it to a square of `side` pixels."""

    side: int
    scale: tuple[float, float] = (0.1, 2.0)
    fill: int = 128

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Return the example, `side x side`."""
        longest = max(example.pixels.shape[1:])
        factor = rng.uniform(*self.scale) * self.side / longest
        height, width = (max(1, round(length * factor)) for length in example.pixels.shape[1:])
        rows, columns = min(height, self.side), min(width, self.side)
        top, left = int(rng.integers(height - rows + 1)), int(rng.integers(width - columns + 1))
        cropped = crop(resize(example, (height, width)), top, left, rows, columns)
        return pad(cropped, self.side, self.side, self.fill)
