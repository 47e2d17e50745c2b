"""Masks in the pixels of a transformed image equal the rasterised, transformed polygon of the object."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskrcnn.data.loader import collate
from maskrcnn.data.mask_crops import rasterize, tight
from maskrcnn.data.photometric import ColorJitter, Cutout, CutoutConfig, GaussianBlur, Jpeg, JpegConfig
from maskrcnn.data.rasters import occlude, rasterize_masks
from maskrcnn.data.rle import crop_from_polygons, empty_crop
from maskrcnn.data.transforms import crop, flip_horizontally, flip_vertically, resize
from maskrcnn.ops.mask_tables import full_masks
from maskrcnn.structures import IDENTITY, AxisAlignedMap, Example, MaskCrop

HEIGHT, WIDTH = 180, 240


def polygon(rng: np.random.Generator) -> np.ndarray:
    """Return the corners of a star-shaped polygon of about 130 px without thin parts, (V, 2)."""
    count = int(rng.integers(5, 12))
    angles = 2 * np.pi * (np.arange(count) + rng.uniform(0, 0.5, count)) / count
    radii = rng.uniform(55, 80, count)
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1) + np.array((120.3, 91.7))


def example_of(corners: np.ndarray, height: int = HEIGHT, width: int = WIDTH) -> Example:
    """Return a noise image with one object."""
    mask = crop_from_polygons([corners.ravel()], height, width)
    rows, columns = mask.pixels.shape
    return Example(
        image_id=1,
        pixels=torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, height, width), np.uint8)),
        boxes=torch.tensor([[mask.x, mask.y, mask.x + columns, mask.y + rows]], dtype=torch.float32),
        labels=torch.tensor([1]),
        masks=(mask,),
    )


def full(mask: MaskCrop, height: int, width: int) -> np.ndarray:
    """Return a mask as (H, W) bool."""
    image = np.zeros((height, width), bool)
    rows, columns = mask.pixels.shape
    image[mask.y : mask.y + rows, mask.x : mask.x + columns] = mask.pixels
    return image


def overlap(example: Example, corners: np.ndarray) -> float:
    """Return the IoU of the mask of the first object with a polygon in pixels of the image."""
    height, width = example.pixels.shape[1:]
    ours = full(example.masks[0], height, width)
    theirs = full(crop_from_polygons([corners.ravel()], height, width), height, width)
    return (ours & theirs).sum() / (ours | theirs).sum()


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.data())
def test_the_mask_is_the_rasterised_transformed_polygon(seed: int, data: st.DataObject) -> None:
    corners = polygon(np.random.default_rng(seed))
    example = example_of(corners)
    for _ in range(data.draw(st.integers(1, 4))):
        height, width = example.pixels.shape[1:]
        step = data.draw(st.sampled_from(["flip horizontally", "flip vertically", "crop", "resize"]))
        if step == "flip horizontally":
            example, corners = flip_horizontally(example), corners * (-1, 1) + (width, 0)
        elif step == "flip vertically":
            example, corners = flip_vertically(example), corners * (1, -1) + (0, height)
        elif step == "resize":
            size = data.draw(st.integers(150, 300)), data.draw(st.integers(200, 400))
            example, corners = resize(example, size), corners * (size[1] / width, size[0] / height)
        else:
            top, left = data.draw(st.integers(0, height // 8)), data.draw(st.integers(0, width // 8))
            example, corners = crop(example, top, left, height * 3 // 4, width * 3 // 4), corners - (left, top)
    raster = rasterize_masks(example)
    assert raster.map == IDENTITY
    assert raster.original_size == tuple(raster.pixels.shape[1:])
    assert overlap(raster, corners) > 0.98
    mask, box = raster.masks[0], raster.boxes[0].tolist()
    right, bottom = mask.x + mask.pixels.shape[1], mask.y + mask.pixels.shape[0]
    assert min(mask.x - box[0], mask.y - box[1], box[2] - right, box[3] - bottom) > -0.51


def test_covered_halves_by_hand() -> None:
    """Pixels of 2 x 2 annotated ones, of which 3, 2, 1 and 0 are covered."""
    mask = MaskCrop(4, 6, np.array([[1, 1, 1, 0], [1, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], np.uint8))
    half = rasterize(mask, AxisAlignedMap(0.5, 0.5), 20, 20)
    assert half[:2] == (2, 3)
    assert half.pixels.tolist() == [[1, 1]]
    shifted = rasterize(mask, AxisAlignedMap(0.5, 0.5, -0.5, 1.0), 20, 20)
    assert shifted[:2] == (1, 4)
    assert shifted.pixels.tolist() == [[1, 1]]
    assert rasterize(mask, AxisAlignedMap(0.1, 0.1), 20, 20).pixels.size == 0
    assert rasterize(mask, AxisAlignedMap(offset_x=50), 20, 20).pixels.size == 0


@given(st.integers(0, 2**32), st.integers(1, 3), st.integers(1, 3))
def test_whole_factors_repeat_pixels(seed: int, factor_y: int, factor_x: int) -> None:
    rng = np.random.default_rng(seed)
    pixels = (rng.random(rng.integers(1, 9, 2)) < 0.6).astype(np.uint8)
    mask = MaskCrop(*rng.integers(0, 5, 2).tolist(), pixels)
    height, width = 20 * factor_y, 20 * factor_x
    enlarged = rasterize(mask, AxisAlignedMap(factor_x, factor_y), height, width)
    expected = full(mask, 20, 20).repeat(factor_y, axis=0).repeat(factor_x, axis=1)
    assert np.array_equal(full(enlarged, height, width), expected)
    back = rasterize(enlarged, AxisAlignedMap(1 / factor_x, 1 / factor_y), 20, 20)
    assert np.array_equal(full(back, 20, 20), full(mask, 20, 20))


def test_the_raster_is_what_training_reads() -> None:
    example = crop(resize(example_of(polygon(np.random.default_rng(3))), (320, 400)), 40, 60, 220, 250)
    targets = collate([example], [0], 1).targets.masks
    before = full_masks(targets, *example.pixels.shape[1:])[0, 0].bool().numpy()
    after = full(rasterize_masks(example).masks[0], *example.pixels.shape[1:])
    assert (before & after).sum() / (before | after).sum() > 0.98


def test_objects_without_a_pixel_go_with_all_their_fields() -> None:
    example = example_of(polygon(np.random.default_rng(0)))
    dot, none = MaskCrop(0, 0, np.ones((1, 1), np.uint8)), empty_crop()
    example = dataclasses.replace(
        example,
        boxes=torch.cat([torch.tensor([[0.0, 0, 1, 1], [5, 6, 9, 9]]), example.boxes]),
        labels=torch.tensor([2, -1, 1]),
        masks=(dot, none, *example.masks),
    )
    raster = rasterize_masks(resize(example, (45, 60)))
    assert raster.labels.tolist() == [-1, 1]
    assert raster.boxes[0].tolist() == [1.25, 1.5, 2.25, 2.25]
    assert [mask.pixels.size > 0 for mask in raster.masks] == [False, True]
    assert rasterize_masks(raster) is raster


def test_what_is_covered_leaves_masks_and_boxes() -> None:
    example = example_of(polygon(np.random.default_rng(0)))
    square, other = MaskCrop(10, 20, np.ones((6, 4), np.uint8)), MaskCrop(100, 20, np.ones((3, 3), np.uint8))
    example = dataclasses.replace(
        example,
        boxes=torch.tensor([[10, 20, 14, 26], [100.2, 20.1, 103, 23], [11, 20, 12, 21], [0, 0, 50, 50]]),
        labels=torch.tensor([1, 2, 3, -1]),
        masks=(square, other, MaskCrop(11, 20, np.ones((1, 1), np.uint8)), empty_crop()),
    )
    covered = np.zeros((HEIGHT, WIDTH), bool)
    covered[:23, :12] = covered[:22] = True
    covered[:, 100:] = False
    rest = occlude(example, covered)
    assert rest.labels.tolist() == [1, 2, -1]
    expected = torch.tensor([[10, 22, 14, 26], [100.2, 20.1, 103, 23], [0, 0, 50, 50]])
    torch.testing.assert_close(rest.boxes, expected)
    assert rest.masks[0].pixels.tolist() == [[0, 0, 1, 1], *[[1, 1, 1, 1]] * 3]
    assert rest.masks[1] is other
    assert tight(MaskCrop(3, 4, np.zeros((2, 2), np.uint8))).pixels.size == 0


# ---- Colour, blur, JPEG, erased rectangles


@pytest.mark.parametrize(
    "change", [ColorJitter(0.5, 0.5, 0.5, 0.2), GaussianBlur((0.5, 2.0)), Jpeg((10, 40))], ids=type
)
@pytest.mark.parametrize("size", [(30, 47), (1, 5)])
def test_photometric_changes_move_nothing(change: ColorJitter | GaussianBlur | Jpeg, size: tuple[int, int]) -> None:
    example = resize(example_of(polygon(np.random.default_rng(0))), size)
    before = example.pixels.clone()
    first, again, other = (change(example, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(example.pixels, before)
    assert first.pixels.dtype == torch.uint8
    assert first.pixels.shape == before.shape
    assert torch.equal(first.pixels, again.pixels)
    assert first.boxes is example.boxes
    assert first.masks is example.masks
    assert first.map == example.map
    if min(size) > 1:
        assert not torch.equal(first.pixels, before)
        assert not torch.equal(first.pixels, other.pixels)


def test_a_strength_of_zero_changes_no_colour() -> None:
    example = example_of(polygon(np.random.default_rng(0)))
    assert torch.equal(ColorJitter()(example, np.random.default_rng(0)).pixels, example.pixels)


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.booleans())
def test_cutout_takes_the_erased_pixels_from_the_masks(seed: int, resized: bool) -> None:
    example = example_of(polygon(np.random.default_rng(seed)))
    example = resize(example, (100, 150)) if resized else example
    example = dataclasses.replace(example, pixels=example.pixels.clamp(max=200))
    cut = Cutout((1, 3), (0.1, 0.9), 255)(example, np.random.default_rng(seed))
    erased = cut.pixels.eq(255).all(dim=0).numpy()
    assert erased.any()
    before = full(rasterize_masks(example).masks[0], *erased.shape)
    after = full(cut.masks[0], *erased.shape) if cut.masks else np.zeros_like(erased)
    assert np.array_equal(after, before & ~erased)
    assert len(cut.boxes) == len(cut.labels) == len(cut.masks)
    if len(cut.boxes) and not np.array_equal(after, before):
        rows, columns = np.flatnonzero(after.any(axis=1)), np.flatnonzero(after.any(axis=0))
        assert cut.boxes[0].tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="the lower limit 5 is above the upper limit 2"):
        CutoutConfig(count=(5, 2))
    with pytest.raises(ValueError, match="quality"):
        JpegConfig(quality=(0, 50))
