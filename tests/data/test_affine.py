from __future__ import annotations

import dataclasses

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskrcnn.data.affine import Affine, rotate_and_shear
from maskrcnn.data.rle import crop_from_polygons, empty_crop
from maskrcnn.data.transforms import RandomApply, resize
from maskrcnn.structures import IDENTITY, Example, MaskCrop


def full(mask: MaskCrop, height: int, width: int) -> np.ndarray:
    """Return a mask as (H, W) bool."""
    image = np.zeros((height, width), bool)
    rows, columns = mask.pixels.shape
    image[mask.y : mask.y + rows, mask.x : mask.x + columns] = mask.pixels
    return image


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return (one & other).sum() / (one | other).sum()


def triangle_on(height: int, width: int, corners: np.ndarray) -> Example:
    """Return a black image with a white triangle, which is its object."""
    mask = crop_from_polygons([corners.ravel()], height, width)
    rows, columns = mask.pixels.shape
    return Example(
        image_id=1,
        pixels=torch.from_numpy(full(mask, height, width).astype(np.uint8) * 255).repeat(3, 1, 1),
        boxes=torch.tensor([[mask.x, mask.y, mask.x + columns, mask.y + rows]], dtype=torch.float32),
        labels=torch.tensor([1]),
        masks=(mask,),
    )


def moved(points: np.ndarray, angle: float, shear: float, height: int, width: int) -> np.ndarray:
    """Return points (N, 2) that are sheared along x, then turned clockwise, about the centre."""
    x, y = (points - (width / 2, height / 2)).T
    x = x - np.tan(np.radians(shear)) * y
    turned = (x + 1j * y) * np.exp(1j * np.radians(angle))
    return np.stack([turned.real + width / 2, turned.imag + height / 2], axis=1)


angles = st.floats(-180, 180)


@settings(max_examples=60)
@given(angles, st.floats(-30, 30), st.integers(0, 2**32), st.booleans())
def test_mask_and_pixels_are_the_rasterised_moved_polygon(angle: float, shear: float, seed: int, resized: bool) -> None:
    height, width = 200, 260
    corners = np.array([[60, 30], [210, 80], [95, 170]]) + np.random.default_rng(seed).uniform(-20, 20, (3, 2))
    example = triangle_on(height, width, corners)
    if resized:
        example, corners = resize(example, (300, 390)), corners * 1.5
        height, width = 300, 390
    turned = rotate_and_shear(example, angle, shear, fill=0)
    assert turned.pixels.shape == (3, height, width)
    assert turned.map == IDENTITY
    assert turned.original_size == (height, width)
    mask = full(turned.masks[0], height, width)
    expected = crop_from_polygons([moved(corners, angle, shear, height, width).ravel()], height, width)
    assert iou(mask, full(expected, height, width)) > 0.98
    assert iou(mask, turned.pixels[0].numpy() >= 128) > 0.98
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    assert turned.boxes.tolist() == [[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]]


def test_quarter_turns_are_exact() -> None:
    rng = np.random.default_rng(0)
    pixels = (rng.random((8, 12)) < 0.5).astype(np.uint8)
    pixels[0, 0] = pixels[-1, -1] = 1
    example = triangle_on(40, 40, np.array([[5, 5], [30, 8], [12, 33]]))
    example = dataclasses.replace(example, masks=(MaskCrop(20, 10, pixels),), boxes=torch.tensor([[20.0, 10, 32, 18]]))
    turned = rotate_and_shear(example, 90.0, 0.0)
    assert torch.equal(turned.pixels, example.pixels.rot90(-1, (1, 2)))
    assert np.array_equal(full(turned.masks[0], 40, 40), np.rot90(full(example.masks[0], 40, 40), -1))
    assert turned.boxes.tolist() == [[22, 20, 30, 32]]


def test_objects_that_leave_the_image_go_with_all_their_fields() -> None:
    example = triangle_on(100, 200, np.array([[70, 20], [130, 30], [100, 80]]))
    corner = MaskCrop(0, 0, np.ones((10, 10), np.uint8))
    example = dataclasses.replace(
        example,
        boxes=torch.cat([example.boxes, torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [90, 40, 110, 60]])]),
        labels=torch.tensor([1, 2, -1, -1]),
        masks=(*example.masks, corner, empty_crop(), empty_crop()),
    )
    turned = rotate_and_shear(example, 90.0, 0.0, fill=7)
    assert turned.labels.tolist() == [1, -1]
    assert [mask.pixels.size > 0 for mask in turned.masks] == [True, False]
    torch.testing.assert_close(turned.boxes[1], torch.tensor([90.0, 40, 110, 60]))
    assert turned.pixels[:, 0, 0].tolist() == [7, 7, 7]
    empty = dataclasses.replace(example, boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), masks=())
    assert rotate_and_shear(empty, 30.0, 10.0).boxes.shape == (0, 4)


def test_angles_are_drawn_as_told() -> None:
    example = triangle_on(60, 60, np.array([[10, 10], [50, 15], [20, 48]]))
    transform = RandomApply(Affine(20.0, 5.0), 0.5)
    results = [transform(example, np.random.default_rng(seed)) for seed in range(60)]
    assert 15 < sum(result is example for result in results) < 45
    assert torch.equal(results[0].pixels, transform(example, np.random.default_rng(0)).pixels)
    nothing = Affine(0.0, 0.0)(example, np.random.default_rng(0))
    assert torch.equal(nothing.pixels, example.pixels)
    assert np.array_equal(nothing.masks[0].pixels, example.masks[0].pixels)
