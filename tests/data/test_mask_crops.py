"""Cropped masks: areas, intersections, unions and parts equal those of full-size masks."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as cocoapi

from maskrcnn.data import mask_crops as crops
from maskrcnn.data.rle import empty_crop, rle_of_crop
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


@pytest.mark.parametrize("seed", range(40))
def test_the_code_of_a_crop_is_that_of_its_mask(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width = rng.integers(1, 6, 2).tolist()
    mask = rng.integers(0, 2, (height, width), dtype=np.uint8)
    top, left = (int(rng.integers(0, side)) for side in (height, width))
    if seed % 2:
        top = 0  # a crop as high as the image
    crop = MaskCrop(left, top, mask[top:, left:])
    inside = np.zeros_like(mask)
    inside[top:, left:] = crop.pixels
    code = rle_of_crop(crop, height, width)
    expected = cocoapi.encode(np.asfortranarray(inside))
    assert code == {"size": [height, width], "counts": expected["counts"].decode()}


def test_empty_masks() -> None:
    empty = empty_crop()
    assert rle_of_crop(empty, 4, 5) == {"size": [4, 5], "counts": "d0"}
    assert crops.area(crops.union([empty, empty])) == crops.intersection(empty, empty) == 0
    assert crops.iou(empty, empty) == 0
