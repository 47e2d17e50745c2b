from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from maskrcnn.data.loader import collate
from maskrcnn.data.transforms import (
    Compose,
    HorizontalFlip,
    HorizontalFlipConfig,
    Resize,
    ResizeConfig,
    crop,
    flip_horizontally,
    resize,
    resized_size,
)
from maskrcnn.ops.mask_tables import full_masks, mask_coverage
from maskrcnn.structures import AxisAlignedMap, Example, MaskCrop


def example_with(*boxes: tuple[int, int, int, int], height: int = 12, width: int = 17) -> Example:
    """Return a noise image with random masks that touch all sides of their boxes (x1, y1, x2, y2)."""
    rng = np.random.default_rng(0)
    masks = []
    for x1, y1, x2, y2 in boxes:
        pixels = (rng.random((y2 - y1, x2 - x1)) < 0.5).astype(np.uint8)
        pixels[0, 0] = pixels[-1, -1] = 1
        masks.append(MaskCrop(x1, y1, pixels))
    return Example(
        image_id=4,
        pixels=torch.from_numpy(rng.integers(0, 256, (height, width, 3), np.uint8)).permute(2, 0, 1),
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.arange(1, len(boxes) + 1),
        masks=tuple(masks),
    )


BOXES = ((0, 0, 17, 12), (3, 2, 8, 9), (16, 11, 17, 12))


def assert_same(one: Example, other: Example) -> None:
    assert torch.equal(one.pixels, other.pixels)
    assert torch.equal(one.boxes, other.boxes)
    assert one.map == other.map
    assert one.original_size == other.original_size
    for a, b in zip(one.masks, other.masks, strict=True):
        assert a[:2] == b[:2]
        assert np.array_equal(a.pixels, b.pixels)


def test_flip_by_hand() -> None:
    flipped = flip_horizontally(example_with((3, 2, 8, 9)))
    assert flipped.boxes.tolist() == [[9, 2, 14, 9]]
    assert flipped.masks[0][:2] == (9, 2)


def test_two_flips_change_nothing() -> None:
    example = example_with(*BOXES)
    assert_same(flip_horizontally(flip_horizontally(example)), example)


def test_boxes_stay_tight_and_masks_stay_on_their_pixels_when_flipped() -> None:
    example = example_with(*BOXES)
    flipped = flip_horizontally(example)
    for before, after, box in zip(example.masks, flipped.masks, flipped.boxes.tolist(), strict=True):
        height, width = after.pixels.shape
        assert box == [after.x, after.y, after.x + width, after.y + height]
        assert np.array_equal(after.pixels, before.pixels[:, ::-1])
        before_colours = example.pixels[:, before.y : before.y + height, before.x : before.x + width]
        after_colours = flipped.pixels[:, after.y : after.y + height, after.x : after.x + width]
        assert torch.equal(after_colours, before_colours.flip(-1))


def test_flip_commutes_with_resize() -> None:
    example = example_with(*BOXES)
    one, other = flip_horizontally(resize(example, (25, 31))), resize(flip_horizontally(example), (25, 31))
    assert one.masks[1][:2] == other.masks[1][:2]
    torch.testing.assert_close(one.boxes, other.boxes)
    assert (one.pixels.int() - other.pixels.int()).abs().max() <= 1


def test_resize_moves_boxes_and_scale_but_no_mask() -> None:
    example = example_with(*BOXES)
    resized = resize(resize(example, (24, 17)), (24, 51))
    assert resized.pixels.shape == (3, 24, 51)
    assert resized.pixels.dtype == torch.uint8
    assert resized.map == AxisAlignedMap(3.0, 2.0)
    assert resized.original_size == (12, 17)
    assert resized.boxes[1].tolist() == [9, 4, 24, 18]
    assert resized.masks is example.masks


def test_the_size_by_hand() -> None:
    assert resized_size(480, 640, 800, 1333, "nearest") == (800, 1067)
    assert resized_size(480, 640, 800, 1333, "floor") == (800, 1066)
    assert resized_size(640, 480, 800, 1333, "nearest") == (1067, 800)
    assert resized_size(100, 1000, 800, 1333, "nearest") == (133, 1333)
    assert resized_size(1, 5000, 800, 1333, "floor") == (1, 1333)


def test_floor_and_no_antialias_is_what_torchvision_does() -> None:
    reference = GeneralizedRCNNTransform(60, 100, [0.0] * 3, [1.0] * 3)
    transform = Resize((60,), 100, rounding="floor", antialias=False)
    rng = np.random.default_rng(0)
    for height, width in rng.integers(20, 200, (40, 2)).tolist():
        example = example_with((1, 2, 9, 8), height=height, width=width)
        image, targets = reference.resize(example.pixels.float(), {"boxes": example.boxes})
        resized = transform(example, rng)
        assert resized.pixels.shape == image.shape
        torch.testing.assert_close(resized.boxes, targets["boxes"])
        assert (resized.pixels - image).abs().max() < 1.01  # uint8 rounding


def test_images_without_objects_pass() -> None:
    out = Compose((HorizontalFlip(1.0), Resize((20,), 1333)))(example_with(), np.random.default_rng(0))
    assert out.boxes.shape == (0, 4)
    assert out.masks == ()


def test_flips_and_sizes_are_drawn_as_told() -> None:
    transform = Compose((HorizontalFlip(0.5), Resize((24, 36), 100)))
    example = example_with((0, 0, 2, 12))
    heights, flips = [], 0
    for seed in range(400):
        out = transform(example, np.random.default_rng(seed))
        heights.append(out.pixels.shape[1])
        flips += int(out.masks[0].x > 0)
    assert set(heights) == {24, 36}
    assert 160 < heights.count(24) < 240
    assert 160 < flips < 240


def test_the_generator_alone_decides() -> None:
    transform = Compose((HorizontalFlip(0.5), Resize((20, 24, 28, 32), 99)))
    example = example_with(*BOXES)
    one, other = (transform(example, np.random.default_rng(5)) for _ in range(2))
    assert_same(one, other)


@pytest.mark.parametrize("settings", [{"short_side": ()}, {"short_side": (0,)}, {"rounding": "up"}])
def test_wrong_settings_of_resize_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        ResizeConfig(**settings)  # type: ignore[arg-type]


def test_a_wrong_probability_is_refused() -> None:
    with pytest.raises(ValueError, match="probability"):
        HorizontalFlipConfig(probability=1.5)


# ---- Crops, and chains of transforms: masks stay exact


def test_crop_by_hand() -> None:
    example = example_with((3, 2, 8, 9), (0, 0, 3, 3), (9, 5, 17, 12))
    cropped = crop(example, top=4, left=5, height=6, width=7)
    assert cropped.pixels.equal(example.pixels[:, 4:10, 5:12])
    assert cropped.boxes.tolist() == [[0, 0, 3, 5], [4, 1, 7, 6]]
    assert cropped.labels.tolist() == [1, 3]
    assert [mask.x for mask in cropped.masks] == [3, 9]
    assert cropped.map == AxisAlignedMap(1.0, 1.0, -5.0, -4.0)


def visible_masks(example: Example) -> torch.Tensor:
    """Return the masks in pixels of the example, (G, H, W)."""
    batch = collate([example], [0], size_divisor=1)
    return full_masks(batch.targets.masks, *example.pixels.shape[1:])[0]


@given(st.data())
def test_masks_follow_their_pixels_through_any_chain(data: st.DataObject) -> None:
    """Each pixel holds its original position, which shows where enlargements, crops and flips moved it."""
    rows, columns = torch.meshgrid(torch.arange(12), torch.arange(17), indexing="ij")
    positions = torch.stack([rows, columns, rows]).to(torch.uint8)
    example = dataclasses.replace(example_with((3, 2, 15, 11)), pixels=positions)
    original = visible_masks(example)[0]
    for _ in range(data.draw(st.integers(1, 5))):
        height, width = example.pixels.shape[1:]
        step = data.draw(st.sampled_from(["flip", "crop", "enlarge"]))
        if step == "flip":
            example = flip_horizontally(example)
        elif step == "enlarge" and height * width < 4000:  # whole factors repeat pixels: no rounding, no blur
            factor_y, factor_x = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
            pixels = example.pixels.repeat_interleave(factor_y, 1).repeat_interleave(factor_x, 2)
            example = dataclasses.replace(resize(example, (height * factor_y, width * factor_x)), pixels=pixels)
        else:
            top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
            size = data.draw(st.integers(1, height - top)), data.draw(st.integers(1, width - left))
            example = crop(example, top, left, *size)
    row, column = example.pixels[0].long(), example.pixels[1].long()
    visible = original[row, column]
    if len(example.labels) == 0:
        assert not visible.any()
    else:
        assert torch.equal(visible_masks(example)[0], visible)
    boxes = example.map.invert(example.boxes)
    assert ((boxes >= 0) & (boxes <= torch.tensor([17, 12, 17, 12]))).all()


def test_coverage_of_a_cropped_and_resized_image_is_that_of_the_whole() -> None:
    """The target of a box does not depend on what was cut off around it."""
    example = resize(example_with((3, 2, 15, 11)), (31, 40))
    cropped = crop(example, top=3, left=5, height=25, width=30)
    box = torch.tensor([[[9.3, 6.1, 30.2, 25.7]]])
    first = torch.zeros(1, 1, dtype=torch.int64)
    whole = mask_coverage(collate([example], [0], 1).targets.masks, box, first, 28)
    part = mask_coverage(collate([cropped], [0], 1).targets.masks, box - torch.tensor([5.0, 3, 5, 3]), first, 28)
    torch.testing.assert_close(part, whole, rtol=0, atol=1e-4)
