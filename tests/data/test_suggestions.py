"""Settings from figures of a training set, worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from maskrcnn.data.suggestions import (
    USUAL_ANCHORS,
    Figures,
    anchors,
    detections_per_image,
    image_size,
    reached,
    schedule,
)


def figures(side: float, *, size: tuple[int, int] = (600, 800), images: int = 10, each: int = 3) -> Figures:
    """Return figures of images with square objects."""
    objects = np.full((images * each, 2), float(side))
    return Figures(np.array([size] * images), objects, np.arange(images).repeat(each), {"cell": images * each})


def test_figures_of_a_dataset() -> None:
    entry = {"category_id": 4, "bbox": [1, 2, 30, 40]}
    data = {
        "images": [{"id": 7, "height": 5, "width": 6}, {"id": 9, "height": 7, "width": 8}],
        "categories": [{"id": 4, "name": "b"}, {"id": 2, "name": "a"}],
        "annotations": [{**entry, "image_id": 9}, {**entry, "image_id": 9}, {**entry, "image_id": 7, "iscrowd": 1}],
    }
    found = Figures.of(data)
    assert found.sizes.tolist() == [[5, 6], [7, 8]]
    assert found.objects.tolist() == [[30, 40], [30, 40]]
    assert found.images.tolist() == [1, 1]
    assert found.counts == {"a": 0, "b": 2}
    assert found.most_objects == 2


@pytest.mark.parametrize(
    ("side", "size", "expected"),
    [
        (100, (600, 800), (608, 832)),  # their own size, in multiples of 32; the long side has the same aspect
        (100, (3000, 4000), (800, 1088)),  # at most 800
        (12, (600, 800), (800, 1088)),  # 12 px become 16
        (3, (600, 800), (1216, 1632)),  # at most twice their own size
        (3, (3000, 4000), (1344, 1792)),  # at most 1344
        (100, (600, 6000), (608, 1216)),  # a long side of at most twice the short one
    ],
)
def test_image_size(side: float, size: tuple[int, int], expected: tuple[int, int]) -> None:
    suggested = image_size(figures(side, size=size))
    assert (suggested.short_side, suggested.long_side) == expected
    assert ("cut the photographs into tiles" in suggested.reason) == (side == 3)


def test_the_usual_anchors_stay_where_they_reach_the_objects() -> None:
    usual = figures(100)
    assert anchors(usual, image_size(usual)).sizes == USUAL_ANCHORS
    small = figures(14, size=(800, 800))
    suggested = anchors(small, image_size(small))
    assert suggested.sizes == (16, 32, 65, 130, 260)
    assert "reach 100.0 % of them (an IoU of 0.3), those of COCO's recipes 0.0 %" in suggested.reason


def test_a_wide_range_of_objects_spreads_the_anchors() -> None:
    wide = figures(10, size=(800, 800))
    wide.objects[::2] = 600
    suggested = anchors(wide, image_size(wide))
    assert suggested.sizes[0] < 20
    assert suggested.sizes[-1] > 600
    ratios = np.divide(suggested.sizes[1:], suggested.sizes[:-1])
    assert ratios == pytest.approx([ratios[0]] * 4, rel=0.1)


def test_reached() -> None:
    """A square of half the side has an IoU of 1/4 with the smallest anchor; of 0.6 times the side, 0.36."""
    assert reached(np.array([[16.0, 16.0], [19.2, 19.2]]), USUAL_ANCHORS) == 0.5
    assert reached(np.zeros((0, 2)), USUAL_ANCHORS) == 1.0


def test_detections_per_image() -> None:
    assert detections_per_image(figures(9, each=83), figures(9, each=3)).value == 100
    assert detections_per_image(figures(9, each=3), figures(9, each=84)).value == 150


def test_schedule() -> None:
    few, many = schedule(figures(9, images=120)), schedule(figures(9, images=20_000))
    assert (few.recipe, few.batch_size, few.iterations, few.steps) == ("base/schedule/fine_tune", 2, 1700, (1360,))
    assert (many.recipe, many.batch_size, many.iterations) == ("base/schedule/1x", 8, 30_000)
    assert many.steps == (20_000, 26_666)
    assert schedule(figures(9, images=1)).iterations == 400


def test_no_objects() -> None:
    none = figures(9, each=0)
    assert image_size(none).short_side == 608
    assert anchors(none, image_size(none)).sizes == USUAL_ANCHORS
    assert detections_per_image(none).value == 100
