"""Examples whose masks are in the pixels of the image, for transforms that need more than a scale and an offset.

Shapes: G objects, H x W image.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from maskrcnn.data.mask_crops import rasterize, tight
from maskrcnn.data.transforms import LEAST_VISIBLE, keep_objects
from maskrcnn.structures import IDENTITY, Example, MaskCrop


def rasterize_masks(example: Example) -> Example:
    """Return the example with its masks in the pixels of its image, and the identity as `map`.

    Its boxes do not change, so a mask may stick out of its box by half a pixel. An object whose mask has no pixel left
    goes.
    """
    height, width = example.pixels.shape[1:]
    if example.map == IDENTITY and example.original_size == (height, width):
        return example
    masks = tuple(rasterize(mask, example.map, height, width) if mask.pixels.size else mask for mask in example.masks)
    lost = [
        not mask.pixels.size and bool(before.pixels.size) for mask, before in zip(masks, example.masks, strict=True)
    ]
    example = dataclasses.replace(example, masks=masks, map=IDENTITY, original_size=(height, width))
    return keep_objects(example, ~torch.tensor(lost, dtype=torch.bool))


def with_masks(example: Example, masks: Sequence[MaskCrop], boxes: Tensor) -> Example:
    """Return the example with new masks in pixels of its image, and boxes that bound them.

    An object whose box changes to less than `LEAST_VISIBLE` goes.

    Args:
        example: with G objects.
        masks: G masks.
        boxes: (G, 4), for objects without a mask and for those whose mask is the same object as before.
    """
    boxes = boxes.clone()
    for index, (mask, before) in enumerate(zip(masks, example.masks, strict=True)):
        if mask is not before:
            height, width = mask.pixels.shape
            boxes[index] = torch.tensor([mask.x, mask.y, mask.x + width, mask.y + height])
    changed = (boxes != example.boxes).any(dim=1)
    visible = (boxes[:, 2:] - boxes[:, :2] >= LEAST_VISIBLE).all(dim=1)
    return keep_objects(dataclasses.replace(example, masks=tuple(masks), boxes=boxes), visible | ~changed)


def occlude(example: Example, covered: np.ndarray) -> Example:
    """Remove the pixels that something covers from the masks; boxes bound what is left.

    An object that is annotated with a box alone goes if its whole box is covered.

    Args:
        example: with masks in pixels of its image.
        covered: (H, W) bool.
    """
    hidden = torch.zeros_like(example.has_mask)
    for index in (~example.has_mask & (example.labels > 0)).nonzero()[:, 0].tolist():
        x1, y1, x2, y2 = example.boxes[index].tolist()
        hidden[index] = bool(covered[math.floor(y1) : math.ceil(y2), math.floor(x1) : math.ceil(x2)].all())
    example = keep_objects(example, ~hidden)
    return with_masks(example, [_uncovered(mask, covered) for mask in example.masks], example.boxes)


def _uncovered(mask: MaskCrop, covered: np.ndarray) -> MaskCrop:
    """Return the rest of a mask, or the mask itself if nothing of it is covered."""
    height, width = mask.pixels.shape
    hidden = mask.pixels & covered[mask.y : mask.y + height, mask.x : mask.x + width]
    return tight(mask._replace(pixels=mask.pixels ^ hidden)) if hidden.any() else mask
