"""Matches against pycocotools and by hand, on random, empty and invalid input; saving and loading."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskrcnn.errors import InputError
from maskrcnn.evaluation.matches import Matches, match_results

KINDS = ["bbox", "segm"]


def truth(*objects: dict[str, Any], images: int = 1) -> dict[str, Any]:
    defaults = {"image_id": 1, "category_id": 1, "iscrowd": 0}
    annotations = [{"id": n, **defaults, "area": o["bbox"][2] * o["bbox"][3], **o} for n, o in enumerate(objects, 1)]
    return {
        "images": [{"id": i + 1, "file_name": f"{i + 1}.jpg", "height": 128, "width": 128} for i in range(images)],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cat"}, {"id": 7, "name": "dog"}],
    }


def result(shape: dict[str, Any], score: float = 0.9, **keys: Any) -> dict[str, Any]:
    return {"image_id": 1, "category_id": 1, "score": score, **shape, **keys}


def same(one: dict[str, float], other: dict[str, float]) -> bool:
    """Return True if all values are bit-identical; nan equals nan."""
    assert list(one) == list(other)
    return all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(one.values(), other.values(), strict=True))


# ---- Against pycocotools


@pytest.mark.parametrize("kind", KINDS)
def test_the_official_demo(shared_data: Path, pycocotools_figures: Callable[..., dict[str, float]], kind: str) -> None:
    folder = shared_data / "cocoapi_fixture"
    ground_truth = json.loads((folder / "instances_val2014_100.json").read_text())
    results = json.loads((folder / f"instances_val2014_fake{kind}100_results.json").read_text())
    figures = match_results(folder / "instances_val2014_100.json", results, kind).figures()
    assert same(figures, pycocotools_figures(ground_truth, results, kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(8))
def test_random_cases(
    random_case: Callable[..., Any], pycocotools_figures: Callable[..., dict[str, float]], seed: int, kind: str
) -> None:
    case = random_case(seed, images=3 + 2 * seed, ties_within_images=seed % 2 == 0)
    figures = match_results(case.ground_truth, case.results, kind).figures()
    assert 0.05 < figures["AP"] < 0.95
    assert same(figures, pycocotools_figures(*case, kind))


# ---- By hand


def test_the_bits_of_a_shifted_mask(shape_of: Callable[..., dict[str, Any]]) -> None:
    # The IoU of the first detection is 32 / 48, which reaches 0.50, 0.55, 0.60 and 0.65. The object is medium. The
    # second detection is small and wrong.
    detections = [result(shape_of((18, 10, 40, 40))), result(shape_of((100, 100, 10, 10)), 0.5)]
    matches = match_results(truth(shape_of((10, 10, 40, 40))), detections, "segm")
    all_bits = 0b1111111111
    assert matches.true_positives.tolist() == [[0b1111, 0, 0b1111, 0], [0, 0, 0, 0]]
    # In the small range, the first detection is ignored: up to 0.65 because it matches a medium object, and above 0.65
    # because it is medium itself.
    assert matches.ignored.tolist() == [[0, all_bits, 0, all_bits], [0, 0, all_bits, all_bits]]
    assert matches.object_areas.tolist() == [[True, False, True, False]]
    expected = {"AP": 0.4, "AP50": 1, "AP75": 0, "APs": math.nan, "APm": 0.4, "APl": math.nan}
    assert matches.figures() == pytest.approx(expected, nan_ok=True)


def test_an_object_is_found_once_and_a_crowd_often(shape_of: Callable[..., dict[str, Any]]) -> None:
    one, crowd = shape_of((10, 10, 40, 40)), shape_of((60, 60, 60, 60))
    detections = [
        result(one, 0.9),
        result(one, 0.8),
        *(result(shape_of((65, 65, 20, 20)), score) for score in (0.7, 0.6)),
    ]
    matches = match_results(truth(one, {**crowd, "iscrowd": 1}), detections, "segm")
    assert (matches.true_positives[:, 0] > 0).tolist() == [True, False, False, False]
    assert (matches.ignored[:, 0] > 0).tolist() == [False, False, True, True]
    assert len(matches.object_images) == 1


def test_an_object_without_a_mask_is_a_crowd_region_of_its_box(
    shape_of: Callable[..., dict[str, Any]], pycocotools_figures: Callable[..., dict[str, float]]
) -> None:
    one = shape_of((10, 10, 40, 40))
    ground_truth = truth(one, {"bbox": [60, 60, 60, 60], "segmentation": None})
    detections = [result(one, 0.8), *(result(shape_of((65, 65, 20, side)), 0.9) for side in (20, 100))]
    matches = match_results(ground_truth, detections, "segm")
    assert (matches.true_positives[:, 0] > 0).tolist() == [False, False, True]
    # Of the second detection, 55 of 63 rows lie in the box.
    assert matches.ignored[:, 0].tolist() == [0b1111111111, 0b0011111111, 0]
    assert len(matches.object_images) == 1
    corners = [[60, 60, 120, 60, 120, 120, 60, 120]]
    as_crowd = truth(one, {"bbox": [60, 60, 60, 60], "segmentation": corners, "iscrowd": 1})
    assert same(matches.figures(), pycocotools_figures(as_crowd, detections, "segm"))
    assert len(match_results(ground_truth, detections, "bbox").object_images) == 2


def test_of_equal_overlaps_the_last_object_is_taken(shape_of: Callable[..., dict[str, Any]]) -> None:
    # As in pycocotools. The first detection has an IoU of 32 / 48 with both objects. It is matched to the second object
    # at 0.50 to 0.65; at higher thresholds the second detection is matched to it.
    left, between, right = (shape_of((x, 10, 40, 40)) for x in (10, 18, 26))
    matches = match_results(truth(left, right), [result(between, 0.9), result(right, 0.8)], "bbox")
    assert matches.true_positives[:, 0].tolist() == [0b0000001111, 0b1111110000]


def test_detections_above_the_limit_do_not_count(shape_of: Callable[..., dict[str, Any]]) -> None:
    boxes = [shape_of((10, 10, 40, 40)), shape_of((70, 70, 40, 40))]
    detections = [result(boxes[0], 0.8), result(boxes[1], 0.9), result(boxes[0], 0.1, category_id=7)]
    matches = match_results(truth(*boxes), detections, "bbox", max_detections=1)
    assert matches.scores.tolist() == [0.9, 0.1]
    assert matches.figures()["AP"] == pytest.approx(51 / 101)


def test_detections_are_in_cocos_order(shape_of: Callable[..., dict[str, Any]]) -> None:
    shape = shape_of((10, 10, 40, 40))
    rows = [(3, 1, 0.5), (1, 7, 0.9), (2, 1, 0.5), (1, 1, 0.5), (2, 1, 0.6)]
    detections = [result(shape, score, image_id=image, category_id=category) for image, category, score in rows]
    matches = match_results(truth(shape, images=3), detections, "bbox")
    columns = (matches.images, matches.categories, matches.scores)
    assert list(zip(*(c.tolist() for c in columns), strict=True)) == [
        (1, 0, 0.6),
        (0, 0, 0.5),
        (1, 0, 0.5),
        (2, 0, 0.5),
        (0, 1, 0.9),
    ]


def test_image_scores(shape_of: Callable[..., dict[str, Any]]) -> None:
    box = shape_of((10, 10, 40, 40))
    ground_truth = truth(box, {**box, "image_id": 2}, {**box, "image_id": 2, "category_id": 7}, images=5)
    detections = [
        result(shape_of((18, 10, 40, 40))),  # a true positive at 4 of the 10 thresholds
        result(box, 0.9, image_id=2),
        result(box, 0.5, image_id=2),  # a duplicate, so a false positive
        result(box, 0.4, image_id=3),
        result(box, 0.9, image_id=4),
    ]
    matches = match_results(ground_truth, detections, "segm")
    assert matches.image_scores(0.5).tolist() == pytest.approx([0.4, 2 / 4, 1, 0, 1])
    assert matches.image_scores(0.0).tolist() == pytest.approx([0.4, 2 / 4, 0, 0, 1])
    assert matches.image_scores(0.6).tolist() == pytest.approx([0.4, 2 / 3, 1, 0, 1])
    crowd = match_results(truth({**box, "iscrowd": 1}), [result(box)], "segm")
    assert crowd.image_scores(0.5).tolist() == [1]


# ---- Empty and wrong input


@pytest.mark.parametrize("kind", KINDS)
def test_no_results(shape_of: Callable[..., dict[str, Any]], kind: str) -> None:
    matches = match_results(truth(shape_of((10, 10, 40, 40)), images=2), [], kind)
    expected = {"AP": 0.0, "AP50": 0.0, "AP75": 0.0, "APs": math.nan, "APm": 0.0, "APl": math.nan}
    assert same(matches.figures(), expected)
    assert matches.image_scores(0.5).tolist() == [0, 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [0, 2])
def test_no_objects(shape_of: Callable[..., dict[str, Any]], kind: str, count: int) -> None:
    matches = match_results(truth(), [result(shape_of((10, 10, 40, 40)))] * count, kind)
    assert all(math.isnan(value) for value in matches.figures().values())
    assert matches.image_scores(0.5).tolist() == [float(count == 0)]


def test_no_images_and_no_categories() -> None:
    matches = match_results({"images": [], "annotations": [], "categories": []}, [], "bbox")
    assert all(math.isnan(value) for value in matches.figures().values())
    assert matches.image_scores(0.5).shape == (0,)


def test_what_does_not_fit_is_refused(shape_of: Callable[..., dict[str, Any]]) -> None:
    box = shape_of((10, 10, 40, 40))
    with pytest.raises(InputError, match="image_id 9"):
        match_results(truth(box), [result(box, image_id=9)], "bbox")
    detection = result(box)
    del detection["segmentation"]
    with pytest.raises(InputError, match="no masks to measure"):
        match_results(truth(box), [detection], "segm")


# ---- Files


def test_matches_come_back_from_disk(random_case: Callable[..., Any], tmp_path: Path) -> None:
    case = random_case(0, ties_within_images=True)
    matches = match_results(case.ground_truth, case.results, "segm")
    matches.save(tmp_path / "matches.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["matches.npz"]
    loaded = Matches.load(tmp_path / "matches.npz")
    for field in dataclasses.fields(Matches):
        one, other = getattr(matches, field.name), getattr(loaded, field.name)
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)


def test_a_file_that_is_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "matches.npz"
    with pytest.raises(InputError, match=r"matches\.npz"):
        Matches.load(path)
    path.write_bytes(b"")
    with pytest.raises(InputError, match=r"matches\.npz"):
        Matches.load(path)
    path.write_text("text")
    with pytest.raises(InputError, match=r"matches\.npz"):
        Matches.load(path)
    with path.open("wb") as file:
        np.savez(file, scores=np.zeros(3))
    with pytest.raises(InputError, match="delete the file"):
        Matches.load(path)
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(InputError, match=r"matches\.npz"):
        Matches.load(path)
