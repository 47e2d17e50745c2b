from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from maskrcnn.config import Part
from maskrcnn.data.crops import (
    LargeScaleJitter,
    LargeScaleJitterConfig,
    RandomCrop,
    RandomCropConfig,
    enlarged_to_whole_objects,
)
from maskrcnn.data.loader import collate
from maskrcnn.data.mask_crops import visible_box
from maskrcnn.data.transforms import (
    Compose,
    FlipConfig,
    HorizontalFlip,
    HorizontalFlipConfig,
    RandomApply,
    Resize,
    ResizeConfig,
    VerticalFlipConfig,
    crop,
    flip_horizontally,
    flip_vertically,
    resize,
    resized_size,
)
from maskrcnn.errors import InputError
from maskrcnn.ops.mask_tables import full_masks, mask_coverage
from maskrcnn.structures import AxisAlignedMap, ClassTable, Example, MaskCrop


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


def test_a_transform_is_applied_with_its_probability() -> None:
    example = example_with()
    assert RandomApply(HorizontalFlip(), 0.0)(example, np.random.default_rng(0)) is example
    rng = np.random.default_rng(0)
    unchanged = [RandomApply(HorizontalFlip(), 0.25)(example, rng) is example for _ in range(400)]
    assert 270 < sum(unchanged) < 330


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
    out = Compose((HorizontalFlip(), Resize((20,), 1333)))(example_with(), np.random.default_rng(0))
    assert out.boxes.shape == (0, 4)
    assert out.masks == ()


def test_flips_and_sizes_are_drawn_as_told() -> None:
    transform = Compose((RandomApply(HorizontalFlip(), 0.5), Resize((24, 36), 100)))
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
    transform = Compose((RandomApply(HorizontalFlip(), 0.5), Resize((20, 24, 28, 32), 99)))
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
    full = tuple(mask._replace(pixels=np.ones_like(mask.pixels)) for mask in example.masks)
    cropped = crop(dataclasses.replace(example, masks=full), top=4, left=5, height=6, width=7)
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
        step = data.draw(st.sampled_from(["flip", "flip vertically", "crop", "enlarge"]))
        if step == "flip":
            example = flip_horizontally(example)
        elif step == "flip vertically":
            example = flip_vertically(example)
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


# ---- Vertical flips, and flips that turn classes into each other


def test_a_vertical_flip_is_a_horizontal_one_of_the_transposed_image() -> None:
    example = resize(example_with(*BOXES), (24, 51))
    flipped, transposed = flip_vertically(example), flip_horizontally(transpose(example))
    assert_same(flipped, transpose(transposed))
    assert_same(flip_vertically(flipped), example)


def transpose(example: Example) -> Example:
    scale_x, scale_y, offset_x, offset_y = example.map
    return dataclasses.replace(
        example,
        pixels=example.pixels.mT,
        boxes=example.boxes[:, [1, 0, 3, 2]],
        masks=tuple(MaskCrop(y, x, pixels.T) for x, y, pixels in example.masks),
        map=AxisAlignedMap(scale_y, scale_x, offset_y, offset_x),
        original_size=example.original_size[::-1],
    )


SIDES = SimpleNamespace(classes=ClassTable(("left hand", "nose", "right hand"), (1, 2, 3)))


@pytest.mark.parametrize("config", [HorizontalFlipConfig, VerticalFlipConfig])
def test_a_flip_turns_classes_into_each_other(config: type[FlipConfig]) -> None:
    flip = config(probability=1.0, swap=(("left hand", "right hand"),)).build_for(SIDES, Compose(()))  # type: ignore
    example = dataclasses.replace(example_with(*BOXES, BOXES[0]), labels=torch.tensor([1, 2, 3, -1]))
    rng = np.random.default_rng(0)
    assert flip(example, rng).labels.tolist() == [3, 2, 1, -1]
    twice = flip(flip(example, rng), rng)
    assert_same(twice, example)
    assert torch.equal(twice.labels, example.labels)


def test_wrong_classes_of_a_flip_are_refused() -> None:
    config = HorizontalFlipConfig(swap=(("left hand", "rigth hand"),))
    with pytest.raises(InputError, match=r"swap` of horizontal_flip names 'rigth hand', which is no class.*nose"):
        config.build_for(SIDES, Compose(()))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="names classes of the training set"):
        config.build()
    with pytest.raises(ValueError, match="a class stands there twice"):
        HorizontalFlipConfig(swap=(("left hand", "right hand"), ("nose", "left hand")))


# ---- Random crops and large-scale jitter


@given(st.integers(0, 2**32), st.booleans())
def test_a_random_crop_cuts_no_object_that_is_to_stay_whole(seed: int, flipped: bool) -> None:
    example = resize(example_with((3, 2, 8, 9), (9, 5, 17, 12), (0, 0, 2, 3)), (36, 34))
    example = flip_horizontally(example) if flipped else example
    cropped = RandomCrop((0.1, 0.9), whole_objects=True)(example, np.random.default_rng(seed))
    lengths = dict(zip(example.labels.tolist(), sizes(example), strict=True))
    assert sizes(cropped) == [lengths[label] for label in cropped.labels.tolist()]
    assert_inside(cropped)


def sizes(example: Example) -> list[list[float]]:
    return (example.boxes[:, 2:] - example.boxes[:, :2]).tolist()


def assert_inside(example: Example) -> None:
    """Nothing leaves the image, objects have all their fields, and boxes bound what the image shows of the masks."""
    height, width = example.pixels.shape[1:]
    assert len(example.boxes) == len(example.labels) == len(example.masks)
    assert ((example.boxes >= 0) & (example.boxes <= torch.tensor([width, height, width, height]))).all()
    for box, mask in zip(example.boxes.tolist(), example.masks, strict=True):
        if mask.pixels.size:
            assert box == pytest.approx(visible_box(mask, example.map, height, width), abs=1e-3)


@given(st.integers(0, 2**32))
def test_what_a_random_crop_cuts_is_bounded_by_its_box(seed: int) -> None:
    example = resize(example_with(*BOXES), (30, 41))
    cropped = RandomCrop((0.1, 0.9))(example, np.random.default_rng(seed))
    assert_inside(cropped)
    gone = set(example.labels.tolist()) - set(cropped.labels.tolist())
    x1, y1 = -cropped.map.offset_x, -cropped.map.offset_y
    width, height = cropped.pixels.shape[2], cropped.pixels.shape[1]
    for label in gone:  # less than a pixel of its mask was left
        box = visible_box(example.masks[label - 1], example.map.then(1, 1, -x1, -y1), height, width)
        assert min(box[2] - box[0], box[3] - box[1]) < 1


def test_the_window_that_cuts_no_object_by_hand() -> None:
    boxes = torch.tensor([[2.5, 3.0, 6.0, 8.0], [6.0, 1.0, 9.0, 4.5], [20.0, 0.0, 30.0, 9.0]])
    assert enlarged_to_whole_objects((4, 4, 5, 5), boxes, 40, 40) == (2, 3, 6, 8)
    assert enlarged_to_whole_objects((4, 4, 7, 5), boxes, 40, 40) == (2, 1, 9, 8)
    assert enlarged_to_whole_objects((10, 4, 20, 5), boxes, 40, 40) == (10, 4, 20, 5)
    assert enlarged_to_whole_objects((1, 1, 2, 2), boxes[:0], 40, 40) == (1, 1, 2, 2)


def test_an_object_without_a_mask_is_clipped() -> None:
    example = dataclasses.replace(example_with((0, 0, 17, 12)), masks=(MaskCrop(0, 0, np.zeros((0, 0), np.uint8)),))
    assert crop(example, 3, 4, 5, 6).boxes.tolist() == [[0, 0, 6, 5]]


def test_a_cut_box_bounds_the_visible_part_of_the_mask() -> None:
    pixels = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], np.uint8)
    example = dataclasses.replace(example_with((2, 3, 6, 6)), masks=(MaskCrop(2, 3, pixels),))
    example = resize(example, (24, 34))
    assert crop(example, 7, 0, 17, 34).boxes.tolist() == [[4, 0, 12, 5]]  # half of the first row is visible
    assert crop(example, 8, 0, 16, 34).boxes.tolist() == [[8, 0, 12, 4]]
    assert crop(example, 8, 5, 2, 20).boxes.tolist() == [[3, 0, 5, 2]]
    assert len(crop(example, 6, 6, 2, 2).boxes) == 0  # inside the box, but the mask has no pixel there


@given(st.integers(0, 2**32))
def test_large_scale_jitter_gives_a_square_with_exact_masks(seed: int) -> None:
    example = example_with(*BOXES)
    jittered = LargeScaleJitter(24, (0.5, 3.0), fill=7)(example, np.random.default_rng(seed))
    assert jittered.pixels.shape == (3, 24, 24)
    assert_inside(jittered)
    scale = jittered.map.scale_x
    assert 0.4 < scale * 17 / 24 < 3.1
    if scale * 17 < 23:  # padded
        assert jittered.pixels[:, :, math.ceil(scale * 17) + 1 :].eq(7).all()
        assert jittered.map.offset_x == 0
    assert all(mask is example.masks[label - 1] for mask, label in zip(jittered.masks, jittered.labels, strict=True))


@pytest.mark.parametrize(
    ("config", "settings", "words"),
    [
        (RandomCropConfig, {"size": (0.9, 0.5)}, "the lower limit 0.9 is above the upper limit 0.5"),
        (RandomCropConfig, {"size": (0.0, 0.5)}, "size"),
        (LargeScaleJitterConfig, {"scale": (2.0, 0.1)}, "the lower limit 2 is above the upper limit 0.1"),
        (LargeScaleJitterConfig, {"scale": (1.0, 1e9)}, "scale"),
        (LargeScaleJitterConfig, {"fill": 256}, "fill"),
    ],
)
def test_wrong_settings_of_crops_are_refused(config: type[Part], settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config(**settings)
