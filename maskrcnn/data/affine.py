"""Rotation and shear, which need new masks: they are rasterised again in the pixels of the result.

Shapes: G objects, H x W image, h x w part of an image.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torchvision.transforms.v2 import functional as tvf

from maskrcnn.data.mask_crops import tight
from maskrcnn.data.rasters import rasterize_masks, with_masks
from maskrcnn.data.rle import empty_crop
from maskrcnn.data.transforms import Fill, Probability, RandomApply, TransformConfig
from maskrcnn.structures import Example, MaskCrop


class AffineConfig(TransformConfig):
    """Random rotation about the centre of the image, and shear along its rows. The image keeps its size.

    Before `resize` the masks are rasterised once, at the resolution of the annotation.
    """

    kind: Literal["affine"] = "affine"
    degrees: Annotated[float, Field(ge=0, le=180)] = 10.0  # the angle is drawn from -degrees to degrees
    shear: Annotated[float, Field(ge=0, le=60)] = 0.0  # degrees; likewise
    fill: Fill = 128
    probability: Probability = 0.5

    def build(self) -> RandomApply:
        """Return the transform."""
        return RandomApply(Affine(self.degrees, self.shear, self.fill), self.probability)


@dataclass(frozen=True)
class Affine:
    """Rotates and shears an example by random angles in degrees."""

    degrees: float
    shear: float = 0.0
    fill: int = 128

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Return the transformed example."""
        angle, shear = rng.uniform(-self.degrees, self.degrees), rng.uniform(-self.shear, self.shear)
        return rotate_and_shear(example, angle, shear, self.fill)


def rotate_and_shear(example: Example, angle: float, shear: float, fill: int = 128) -> Example:
    """Shear an image along its rows, then rotate it about its centre. Boxes bound the new masks.

    A box without a mask becomes the smallest one around its four corners.

    Args:
        example: any example; its masks are rasterised in the pixels of its image.
        angle: in degrees, clockwise.
        shear: in degrees: the upper half moves to the right if it is positive.
        fill: grey level of what lies outside the image.
    """
    example = rasterize_masks(example)
    height, width = example.pixels.shape[1:]
    move = _Map.about_centre(angle, shear, height, width)
    pixels = tvf.affine(
        example.pixels,
        angle=angle,
        translate=[0, 0],
        scale=1.0,
        shear=[shear, 0.0],
        interpolation=tvf.InterpolationMode.BILINEAR,
        fill=[float(fill)] * len(example.pixels),
    )
    masks = [_moved_mask(mask, move, height, width) if mask.pixels.size else mask for mask in example.masks]
    boxes = _bounds(move, example.boxes, height, width)
    return with_masks(dataclasses.replace(example, pixels=pixels), masks, boxes)


@dataclass(frozen=True)
class _Map:
    """The map from `p` to `matrix @ (p - centre) + centre`, for points (x, y)."""

    matrix: np.ndarray  # (2, 2)
    centre: np.ndarray  # (2,)

    @staticmethod
    def about_centre(angle: float, shear: float, height: int, width: int) -> _Map:
        cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        rotation = np.array([[cosine, -sine], [sine, cosine]])
        return _Map(rotation @ [[1.0, -math.tan(math.radians(shear))], [0.0, 1.0]], np.array([width / 2, height / 2]))

    def __call__(self, points: np.ndarray) -> np.ndarray:
        return (points - self.centre) @ self.matrix.T + self.centre

    def inverse(self) -> _Map:
        return _Map(np.linalg.inv(self.matrix), self.centre)


def _bounds(move: _Map, boxes: Tensor, height: int, width: int) -> Tensor:
    """Return the smallest boxes, clipped to the image, around the moved corners of boxes (G, 4)."""
    corners = move(boxes.double().numpy()[:, [[0, 1], [2, 1], [2, 3], [0, 3]]])  # (G, 4, 2)
    bounds = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    return torch.from_numpy(bounds.clip(0, [width, height, width, height]).astype(np.float32))


def _moved_mask(mask: MaskCrop, move: _Map, height: int, width: int) -> MaskCrop:
    """Return the mask in the moved image: bilinear between the centres of its pixels, at least one half."""
    rows, columns = mask.pixels.shape
    box = torch.tensor([[mask.x, mask.y, mask.x + columns, mask.y + rows]])
    x1, y1, x2, y2 = _bounds(move, box, height, width)[0].tolist()
    left, top, right, bottom = math.floor(x1), math.floor(y1), math.ceil(x2), math.ceil(y2)
    if right <= left or bottom <= top:
        return empty_crop()
    x, y = np.meshgrid(np.arange(left, right) + 0.5, np.arange(top, bottom) + 0.5)
    source = move.inverse()(np.stack([x, y], axis=-1)) - (mask.x, mask.y)  # (h, w, 2)
    grid = torch.from_numpy(source / (columns, rows) * 2 - 1).float()[None]
    values = F.grid_sample(torch.from_numpy(mask.pixels)[None, None].float(), grid, align_corners=False)
    return tight(MaskCrop(left, top, values[0, 0].ge(0.5).to(torch.uint8).numpy()))
