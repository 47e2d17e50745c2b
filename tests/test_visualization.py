from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskrcnn.structures import MaskCrop
from maskrcnn.visualization.captions import FONT_SIZE, _places, font_size_of, overlaps, place_captions
from maskrcnn.visualization.colours import (
    IGNORED,
    INSTANCE_COLOURS,
    PALETTE,
    UNMATCHED,
    class_colour,
    instance_colours,
    oklab,
    palette,
)
from maskrcnn.visualization.drawing import LEGIBLE_SIDE, draw_objects, enlarge, save_image, shrink
from maskrcnn.visualization.pairs import IGNORED as IN_IGNORED_REGION
from maskrcnn.visualization.pairs import NONE, Objects, draw_pair, match_objects
from maskrcnn.visualization.sheets import (
    GAP,
    ROW_HEIGHT,
    SHEET_WIDTH,
    THUMBNAILS,
    Thumbnail,
    _shortened,
    contact_sheet,
    grid,
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
    drawn = draw_objects(image, [[30, 30, 70, 70]], [2], [square()], NAMES, scale=1, colour_by="class")
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


def test_lines_and_captions_grow_with_the_picture():
    small, large = (
        draw_objects(grey(side, side), [[side / 4, side / 4, side / 2, side / 2]], [1], [], NAMES, scale=1)
        for side in (500, 4000)
    )
    assert (np.all(small[187, 120:130] == PALETTE[0], axis=-1)).sum() == 1
    assert (np.all(large[1500, 990:1020] == PALETTE[0], axis=-1)).sum() == 8
    assert (font_size_of((320, 200)), font_size_of((4000, 3000))) == (FONT_SIZE, 53)


def test_captions_stay_inside_the_image_and_avoid_each_other():
    for place in _places((-5.0, -5.0, 98.0, 99.0), 40, 14, (100, 100)):
        assert 0 <= place[0] <= place[2] <= 100
        assert 0 <= place[1] <= place[3] <= 100
    first, second = np.array([[0, 0, 10, 10]]), np.array([[5, 8, 20, 20], [10, 0, 20, 10]])
    assert overlaps(first, second).tolist() == [[10, 0]]
    twice = draw_objects(grey(100, 200), [[30, 40, 90, 60]] * 2, [1, 2], [], NAMES, scale=1)
    assert (twice[27, 31] == PALETTE[0]).all()  # above the box
    assert (twice[27, 89] == PALETTE[1]).all()  # above the right end of the box


def test_captions_do_not_hide_dense_objects():
    boxes = np.array([(x, y, x + 12, y + 12) for y in range(100, 160, 14) for x in range(100, 200, 14)], dtype=float)
    captions = [caption for caption in place_captions(["broccoli"] * len(boxes), boxes, (320, 320)) if caption]
    rectangles = np.array([caption.rectangle for caption in captions])
    assert 0 < len(captions) < len(boxes)  # those at the edge have room
    assert (overlaps(rectangles, boxes) <= 0.25 * 12 * 12).all()
    assert (np.triu(overlaps(rectangles, rectangles), 1) == 0).all()


def test_a_caption_without_room_is_smaller():
    sizes = {
        caption.font_size
        for caption in place_captions(["word"] * 30, np.array([[0, 0, 400, 60]] * 30), (2000, 60))
        if caption
    }
    assert sizes == {27, 19}


def test_colours_tell_classes_apart():
    assert palette(10) == PALETTE
    assert palette(3) == PALETTE[:3]
    colours = oklab(np.array([*palette(80), IGNORED, UNMATCHED]))
    distances = np.linalg.norm(colours[:, None] - colours, axis=-1) + np.eye(len(colours))
    assert distances.min() > 0.07  # 0.1 for the ten chosen by hand
    assert class_colour(1) == class_colour(81) != class_colour(11)
    assert class_colour(-1) == IGNORED


def test_oklab_of_white_and_red():
    """The values of colour.js 0.5."""
    expected = [[1, 0, 0], [0.627955, 0.224863, 0.125846]]
    np.testing.assert_allclose(oklab(np.array([[255, 255, 255], [255, 0, 0]])), expected, atol=1e-4)


def test_instances_that_touch_have_different_colours():
    row = np.array([(10 * i, 0, 10 * i + 10, 10) for i in range(30)], dtype=float)
    colours = instance_colours(row, [1] * 30)
    assert all(first != second for first, second in itertools.pairwise(colours))
    assert len(set(colours)) == INSTANCE_COLOURS
    crowd = instance_colours(np.tile(row[:1], (INSTANCE_COLOURS, 1)), [1] * INSTANCE_COLOURS)
    assert len(set(crowd)) == INSTANCE_COLOURS
    assert instance_colours(row[:2], [-1, 1]) == [IGNORED, PALETTE[0]]


def test_colours_by_class():
    boxes = [[10, 10, 40, 40], [40, 10, 70, 40]]
    by_class, by_instance = (
        draw_objects(grey(100, 100), boxes, [2, 2], [], NAMES, scale=1, colour_by=colour_by)
        for colour_by in ("class", "instance")
    )
    assert (by_class[25, [10, 69]] == class_colour(2)).all()
    assert (by_instance[25, [10, 69]] == PALETTE[:2]).all()


# Pairs of ground truth and prediction.


def objects(
    boxes: list[list[float]], labels: list[int], scores: list[float] | None = None, *, masks: bool = True
) -> Objects:
    """Return objects whose masks fill their boxes."""
    crops = [MaskCrop(x1, y1, np.ones((y2 - y1, x2 - x1), np.uint8)) for x1, y1, x2, y2 in boxes]
    return Objects(np.array(boxes, dtype=float).reshape(-1, 4), labels, crops if masks else [], scores)


@pytest.mark.parametrize("masks", [True, False])
def test_matches_are_greedy_by_score_within_a_class(masks: bool):
    truth = objects([[0, 0, 10, 10], [20, 0, 30, 10], [50, 50, 90, 90]], [1, 1, -1], masks=masks)
    prediction = objects(
        [[0, 0, 10, 9], [0, 0, 10, 10], [20, 0, 30, 10], [20, 0, 25, 10], [60, 60, 70, 70], [20, 0, 30, 4]],
        [1, 1, 2, 1, 1, 1],
        [0.9, 0.8, 0.7, 0.6, 0.5, 0.4],
        masks=masks,
    )
    matches = match_objects(truth, prediction)
    # The second is a duplicate, the third of another class; the fourth has an IoU of exactly 0.5; the last has 0.4.
    assert matches.detections == [0, NONE, NONE, 1, IN_IGNORED_REGION, NONE]
    assert matches.objects == [0, 3, IN_IGNORED_REGION]


def test_masks_decide_where_there_are_masks():
    (box,) = boxes = [[0, 0, 10, 10]]
    other = Objects(np.array(boxes, dtype=float), [1], [MaskCrop(0, 6, np.ones((4, 10), np.uint8))], [0.9])
    assert match_objects(objects([box], [1]), other).detections == [NONE]
    assert match_objects(objects([box], [1], masks=False), other).detections == [0]


def test_both_sides_of_a_match_have_one_colour_and_misses_are_red():
    truth = objects([[10, 200, 60, 260], [200, 200, 250, 260]], [1, 2])
    prediction = objects([[200, 201, 250, 260], [100, 200, 150, 260]], [2, 2], [0.9, 0.8])
    pair = draw_pair(grey(320, 320), truth, prediction, NAMES)
    left, right = pair[-320:, :320], pair[-320:, 320 + GAP :]
    assert (left[230, 200] == PALETTE[1]).all()
    assert (right[230, 200] == PALETTE[1]).all()
    assert (left[230, 10] == UNMATCHED).all()
    assert (right[230, 100] == UNMATCHED).all()
    by_class = draw_pair(grey(320, 320), truth, prediction, NAMES, colour_by="class")
    assert (by_class[-90, 320 + GAP + 200] == class_colour(2)).all()
    assert draw_pair(grey(320, 320), objects([], []), objects([], [], []), NAMES).shape == pair.shape


# Sheets.


def test_two_pictures_stand_side_by_side_under_their_titles():
    both = side_by_side(grey(50, 120, 0), grey(60, 100, 200), ("left", "right"))
    strip = both.shape[0] - 60
    assert strip > 0
    assert (both[strip : strip + 50, :120] == 0).all()
    assert (both[strip:, 120 + GAP : 220 + GAP] == 200).all()
    assert (both[:strip, :120] < 128).any()  # black title
    assert (both[:strip, 120 + GAP :] < 128).any()


def test_a_grid_is_filled_in_reading_order():
    sheet = grid([grey(10, 20, value) for value in (1, 2, 3)], columns=2)
    assert sheet.shape == (20 + GAP, 40 + GAP, 3)
    assert (sheet[:10, :20] == 1).all()
    assert (sheet[:10, 20 + GAP :] == 2).all()
    assert (sheet[10 + GAP :, :20] == 3).all()
    assert (sheet[10 + GAP :, 20 + GAP :] == 255).all()
    assert grid([grey(10, 20)], columns=4).shape == (10, 20, 3)


def test_a_contact_sheet_packs_thumbnails_of_any_size():
    sizes = [(300, 400), (400, 300), (4000, 30), (30, 4000), (20, 20), (300, 400), (300, 400), (300, 400)]
    sheet = contact_sheet([Thumbnail(f"{size}.png", grey(*size, 7)) for size in sizes])
    assert sheet.shape[1] <= SHEET_WIDTH
    assert 2 * ROW_HEIGHT < sheet.shape[0] <= 3 * (ROW_HEIGHT + 30)  # the panorama has a row of its own
    assert (sheet[:ROW_HEIGHT, :373] == 7).all()  # reading order, from the left edge
    alone = contact_sheet([Thumbnail("a.png", grey(20, 50, 7))])
    assert (alone[:20, :50] == 7).all()  # not enlarged
    assert alone.shape[1] == 50 + GAP
    assert (alone[20:] < 128).any()  # the name


def test_a_full_contact_sheet_is_bounded():
    sheet = contact_sheet([Thumbnail("x", grey(360, 480))] * THUMBNAILS)
    assert sheet.shape[1] <= SHEET_WIDTH
    assert sheet.size < 40e6


def test_the_end_of_a_long_name_is_written():
    assert _shortened("short.jpg", 300) == "short.jpg"
    name = _shortened("a" * 300 + "/photo_0001.jpg", 120)
    assert name.startswith("...")
    assert name.endswith("photo_0001.jpg")
    assert _shortened("a" * 1000, 1) == ""


def test_an_image_is_written(tmp_path: Path):
    save_image(tmp_path / "picture.png", grey(4, 5, 7))
    assert (np.array(Image.open(tmp_path / "picture.png")) == grey(4, 5, 7)).all()
