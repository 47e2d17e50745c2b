from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskrcnn.structures import MaskCrop
from maskrcnn.visualization.drawing import (
    GAP,
    IGNORED,
    LEGIBLE_SIDE,
    PALETTE,
    _overlap,
    _places,
    class_colour,
    contact_sheet,
    draw_objects,
    enlarge,
    save_image,
    shrink,
    side_by_side,
)

NAMES = ("cat", "dog")


def grey(height: int, width: int, value: int = 100) -> np.ndarray:
    return np.full((height, width, 3), value, dtype=np.uint8)


def square() -> MaskCrop:
    """Return a mask of the pixels 40..59 along both axes."""
    return MaskCrop(40, 40, np.ones((20, 20), dtype=np.uint8))


def test_a_mask_is_tinted_inside_and_outlined():
    image = grey(100, 100)
    drawn = draw_objects(image, [[30, 30, 70, 70]], [2], [square()], NAMES, scale=1)
    colour = np.array(class_colour(2))
    assert (drawn[50, 50] == np.rint(0.6 * 100 + 0.4 * colour)).all()
    assert (drawn[40, 45:55] == colour).all()
    assert (drawn[45:55, 59] == colour).all()
    assert (drawn[35:39, 50] == 100).all()  # between box and mask
    assert (image == 100).all()


def test_a_box_is_drawn_on_its_first_and_last_pixels():
    drawn = draw_objects(grey(100, 100), [[30, 30, 70, 70]], [1], [], NAMES, scale=1)
    assert (drawn[50, 30] == PALETTE[0]).all()
    assert (drawn[50, 69] == PALETTE[0]).all()
    assert (drawn[69, 50] == PALETTE[0]).all()
    assert (drawn[50, [29, 31, 68, 70]] == 100).all()


def test_crops_and_full_masks_are_drawn_alike():
    full = np.zeros((100, 100), dtype=bool)
    full[40:60, 40:60] = True
    boxes, labels = torch.tensor([[30.0, 30.0, 70.0, 70.0]]), torch.tensor([1])
    first = draw_objects(grey(100, 100), boxes, labels, [square()], NAMES, torch.tensor([0.5]))
    second = draw_objects(grey(100, 100), boxes.numpy(), [1], [full], NAMES, [0.5])
    assert (first == second).all()


def test_captions_name_class_and_score_above_the_box():
    plain = draw_objects(grey(100, 200), [[30, 60, 90, 90]], [1], [], NAMES, scale=1)
    scored = draw_objects(grey(100, 200), [[30, 60, 90, 90]], [1], [], NAMES, [0.87], scale=1)
    strip, longer = (np.all(drawn[50] == PALETTE[0], axis=-1).nonzero()[0] for drawn in (plain, scored))
    assert strip.min() == longer.min() == 30
    assert longer.max() > strip.max() + 10
    assert (plain[91:] == 100).all()


def test_small_images_are_enlarged_and_large_ones_are_not():
    drawn = draw_objects(grey(96, 128), [[10, 10, 20, 20]], [1], [], NAMES)
    assert drawn.shape == (3 * 96, 3 * 128, 3)
    assert (drawn[59, 45] == PALETTE[0]).all()  # the last row of the box, enlarged
    assert draw_objects(grey(20, LEGIBLE_SIDE), [], [], [], NAMES).shape == (20, LEGIBLE_SIDE, 3)
    checks = np.arange(4, dtype=np.uint8).reshape(2, 2)
    assert enlarge(checks, 2).tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]


def test_a_large_image_can_be_reduced_before_drawing():
    mask = np.zeros((480, 640), dtype=bool)
    mask[100:200, 300:400] = True
    crop = MaskCrop(300, 100, np.ones((100, 100), np.uint8))
    first, second = (
        draw_objects(grey(480, 640, 0), [[300, 100, 400, 200]], [1], [shape], NAMES, scale=0.5)
        for shape in (mask, crop)
    )
    assert first.shape == (240, 320, 3)
    assert first[75, 175].any()
    assert not first[75, 145].any()
    assert not first[:, 250:].any()  # where box and caption would be if they were not resized
    assert (first == second).all()


def test_large_pictures_are_shrunk_and_small_ones_are_not():
    picture = grey(50, 200)
    assert shrink(picture, 200) is picture
    assert (shrink(picture, 80) == grey(20, 80)).all()
    assert shrink(grey(1000, 1), 10).shape == (10, 1, 3)


def test_nothing_to_draw_leaves_the_image():
    image = grey(400, 400)
    drawn = draw_objects(image, torch.zeros(0, 4), torch.zeros(0), [], NAMES, torch.zeros(0))
    assert (drawn == image).all()
    assert drawn is not image


def test_the_first_object_lies_on_top():
    boxes, labels, masks = [[40, 40, 60, 60]] * 2, [1, 2], [square(), square()]
    drawn = draw_objects(grey(100, 100), boxes, labels, masks, NAMES, [0.9, 0.4], scale=1)
    assert (drawn[59, 50] == class_colour(1)).all()


def test_ignored_regions_are_grey_even_without_a_mask():
    empty = MaskCrop(0, 0, np.zeros((0, 0), dtype=np.uint8))
    drawn = draw_objects(grey(100, 100), [[30, 30, 70, 70]], [-1], [empty], NAMES, scale=1)
    assert (drawn[50, 30] == IGNORED).all()


@pytest.mark.parametrize("box", [[-20, -20, 5, 5], [95, 95, 140, 140], [50, 50, 50, 50]])
def test_boxes_at_and_beyond_the_edge_are_drawn(box: list[int]):
    assert draw_objects(grey(100, 100), [box], [1], [], NAMES, scale=1).shape == (100, 100, 3)


def test_captions_stay_inside_the_image_and_avoid_each_other():
    for place in _places((-5.0, -5.0, 98.0, 99.0), 40, 14, (100, 100)):
        assert 0 <= place[0] <= place[2] <= 100
        assert 0 <= place[1] <= place[3] <= 100
    assert _overlap((0, 0, 10, 10), (5, 8, 20, 20)) == 10
    assert _overlap((0, 0, 10, 10), (10, 0, 20, 10)) == 0
    twice = draw_objects(grey(100, 200), [[30, 40, 90, 60]] * 2, [1, 2], [], NAMES, scale=1)
    assert (twice[27, 31] == class_colour(1)).all()  # above the box
    assert (twice[27, 89] == class_colour(2)).all()  # above the right end of the box


def test_colours_are_distinct_and_repeat():
    assert len(set(PALETTE)) == len(PALETTE)
    assert class_colour(1) == class_colour(1 + len(PALETTE)) != class_colour(2)


def test_two_pictures_stand_side_by_side_under_their_titles():
    both = side_by_side(grey(50, 120, 0), grey(60, 100, 200), ("left", "right"))
    strip = both.shape[0] - 60
    assert strip > 0
    assert (both[strip : strip + 50, :120] == 0).all()
    assert (both[strip:, 120 + GAP : 220 + GAP] == 200).all()
    assert (both[:strip, :120] < 128).any()  # black title
    assert (both[:strip, 120 + GAP :] < 128).any()


def test_a_sheet_is_filled_in_reading_order():
    sheet = contact_sheet([grey(10, 20, value) for value in (1, 2, 3)], columns=2)
    assert sheet.shape == (20 + GAP, 40 + GAP, 3)
    assert (sheet[:10, :20] == 1).all()
    assert (sheet[:10, 20 + GAP :] == 2).all()
    assert (sheet[10 + GAP :, :20] == 3).all()
    assert (sheet[10 + GAP :, 20 + GAP :] == 255).all()
    assert contact_sheet([grey(10, 20)], columns=4).shape == (10, 20, 3)


def test_an_image_is_written(tmp_path: Path):
    save_image(tmp_path / "picture.png", grey(4, 5, 7))
    assert (np.array(Image.open(tmp_path / "picture.png")) == grey(4, 5, 7)).all()
