"""Transforms that change pixels and move nothing: colour, blur, JPEG artefacts, and erased rectangles.

Shapes: H x W image.
"""

from __future__ import annotations

import dataclasses
import io
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field, field_validator
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from maskrcnn.config import Size
from maskrcnn.data.crops import Share, ascending
from maskrcnn.data.rasters import occlude, rasterize_masks
from maskrcnn.data.transforms import Fill, Probability, RandomApply, TransformConfig
from maskrcnn.structures import Example

Strength = Annotated[float, Field(ge=0, le=1)]


class ColorJitterConfig(TransformConfig):
    """Random brightness, contrast, saturation and hue, in random order."""

    kind: Literal["color_jitter"] = "color_jitter"
    brightness: Strength = 0.2  # s draws a factor from 1 - s to 1 + s
    contrast: Strength = 0.2
    saturation: Strength = 0.2
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.05  # s draws a shift from -s to s turns of the colour circle
    probability: Probability = 1.0

    def build(self) -> RandomApply:
        """Return the transform."""
        return RandomApply(ColorJitter(self.brightness, self.contrast, self.saturation, self.hue), self.probability)


class GaussianBlurConfig(TransformConfig):
    """Gaussian blur."""

    kind: Literal["gaussian_blur"] = "gaussian_blur"
    sigma: tuple[Annotated[float, Field(gt=0, le=64)], Annotated[float, Field(gt=0, le=64)]] = (0.1, 2.0)  # px
    probability: Probability = 0.5

    check_sigma = field_validator("sigma")(ascending)

    def build(self) -> RandomApply:
        """Return the transform."""
        return RandomApply(GaussianBlur(self.sigma), self.probability)


Quality = Annotated[int, Field(ge=1, le=95)]


class JpegConfig(TransformConfig):
    """Artefacts of JPEG compression."""

    kind: Literal["jpeg"] = "jpeg"
    quality: tuple[Quality, Quality] = (30, 95)  # as Pillow counts it
    probability: Probability = 0.5

    check_quality = field_validator("quality")(ascending)

    def build(self) -> RandomApply:
        """Return the transform."""
        return RandomApply(Jpeg(self.quality), self.probability)


class CutoutConfig(TransformConfig):
    """Erases random rectangles, as if something covered them: masks lose these pixels too."""

    kind: Literal["cutout"] = "cutout"
    count: tuple[Size, Size] = (1, 4)  # range of the number of rectangles
    size: tuple[Share, Share] = (0.05, 0.2)  # range of their height and width, as shares of the image's
    fill: Fill = 128
    probability: Probability = 0.5

    check_ranges = field_validator("count", "size")(ascending)

    def build(self) -> RandomApply:
        """Return the transform."""
        return RandomApply(Cutout(self.count, self.size, self.fill), self.probability)


@dataclass(frozen=True)
class ColorJitter:
    """Changes brightness, contrast, saturation and hue by random amounts."""

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Return the changed example."""
        adjustments = (
            (tvf.adjust_brightness, self.brightness, 1.0),
            (tvf.adjust_contrast, self.contrast, 1.0),
            (tvf.adjust_saturation, self.saturation, 1.0),
            (tvf.adjust_hue, self.hue, 0.0),
        )
        pixels = example.pixels
        for index in rng.permutation(len(adjustments)).tolist():
            adjust, strength, neutral = adjustments[index]
            if strength > 0:
                pixels = adjust(pixels, neutral + rng.uniform(-strength, strength))
        return dataclasses.replace(example, pixels=pixels)


@dataclass(frozen=True)
class GaussianBlur:
    """Blurs an image with a random standard deviation in pixels."""

    sigma: tuple[float, float]

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Return the blurred example."""
        sigma = rng.uniform(*self.sigma)
        radius = min(math.ceil(3 * sigma), min(example.pixels.shape[1:]) - 1)  # the image is mirrored at its border
        pixels = tvf.gaussian_blur(example.pixels, [2 * radius + 1] * 2, [sigma, sigma])
        return dataclasses.replace(example, pixels=pixels)


@dataclass(frozen=True)
class Jpeg:
    """Compresses an image as JPEG with a random quality. Pillow does it: torchvision's encoder is deprecated."""

    quality: tuple[int, int]

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Return the compressed example."""
        quality = int(rng.integers(self.quality[0], self.quality[1] + 1))
        return dataclasses.replace(example, pixels=_through_jpeg(example.pixels, quality))


def _through_jpeg(pixels: Tensor, quality: int) -> Tensor:
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(file, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)


@dataclass(frozen=True)
class Cutout:
    """Erases random rectangles."""

    count: tuple[int, int]
    size: tuple[float, float]
    fill: int = 128

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Return the example with rectangles of grey."""
        covered = np.zeros(example.pixels.shape[1:], dtype=bool)
        for _ in range(int(rng.integers(self.count[0], self.count[1] + 1))):
            rows, columns = (max(1, round(side * rng.uniform(*self.size))) for side in covered.shape)
            top, left = (int(rng.integers(n + 1)) for n in (covered.shape[0] - rows, covered.shape[1] - columns))
            covered[top : top + rows, left : left + columns] = True
        pixels = example.pixels.masked_fill(torch.from_numpy(covered), self.fill)
        return occlude(rasterize_masks(dataclasses.replace(example, pixels=pixels)), covered)
