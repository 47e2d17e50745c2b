"""Cropped masks: areas, intersections, unions and parts equal those of full-size masks."""

from __future__ import annotations

import numpy as np
import pytest

from maskrcnn.data import mask_crops as crops
from maskrcnn.data.rle import empty_crop
from maskrcnn.structures import MaskCrop


def crop_of(rng: np.random.Generator) -> MaskCrop:
    x, y, width, height = rng.integers(0, 15, 4).tolist()
    return MaskCrop(x, y, rng.integers(0, 2, (height, width), dtype=np.uint8))


def full(crop: MaskCrop) -> np.ndarray:
    mask = np.zeros((32, 32), bool)
    x1, y1, x2, y2 = crops.window_of(crop)
    mask[y1:y2, x1:x2] = crop.pixels
    return mask


@pytest.mark.parametrize("seed", range(40))
def test_crops_are_sets_of_pixels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = crop_of(rng), crop_of(rng)
    a, b = full(first), full(second)
    assert crops.area(first) == a.sum()
    assert crops.intersection(first, second) == (a & b).sum()
    assert crops.iou(first, second) == pytest.approx((a & b).sum() / max((a | b).sum(), 1))
    assert (full(crops.union([first, second])) == (a | b)).all()
    x1, y1, x2, y2 = window = tuple(sorted(rng.integers(0, 32, 2).tolist()) * 2)
    inside = np.zeros_like(a)
    inside[y1:y2, x1:x2] = True
    assert (full(crops.within(first, window)) == (a & inside)).all()


def test_empty_masks() -> None:
    empty = empty_crop()
    assert crops.area(crops.union([empty, empty])) == crops.intersection(empty, empty) == 0
    assert crops.iou(empty, empty) == 0
