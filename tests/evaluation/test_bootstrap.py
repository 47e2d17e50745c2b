"""Resampled metrics against pycocotools on duplicated images, confidence intervals by hand, and paired differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from maskrcnn.errors import InputError
from maskrcnn.evaluation import bootstrap
from maskrcnn.evaluation.bootstrap import Interval, draw_counts, paired_differences, resampled_figures
from maskrcnn.evaluation.matches import FIGURES, Matches, match_results

KINDS = ["bbox", "segm"]


def matches_by_hand(objects: list[int], detections: list[tuple[int, bool]], images: int = 2) -> Matches:
    """Return matches of one category of medium objects.

    Args:
        objects: the image index of each object.
        detections: image index and whether the detection is a true positive at all thresholds, by descending score.
        images: number of images.
    """
    bits = np.array([[1023 * positive, 0, 1023 * positive, 0] for _, positive in detections], np.uint16).reshape(-1, 4)
    ignored = np.array([[0, 1023, 0, 1023] for _ in detections], np.uint16).reshape(-1, 4)
    return Matches(
        image_ids=np.arange(images),
        category_ids=np.array([1]),
        object_images=np.array(objects, np.int32),
        object_categories=np.zeros(len(objects), np.int32),
        object_areas=np.array([[True, False, True, False]] * len(objects), np.bool_).reshape(-1, 4),
        images=np.array([image for image, _ in detections], np.int32),
        categories=np.zeros(len(detections), np.int32),
        scores=np.linspace(0.9, 0.1, len(detections)),
        true_positives=bits,
        ignored=ignored,
    )


# ---- Resamples


def test_counts_are_those_of_draws_with_replacement() -> None:
    counts = draw_counts(50, 400, seed=3)
    assert counts.shape == (400, 50)
    assert (counts.sum(axis=1) == 50).all()
    assert (counts == draw_counts(50, 400, seed=3)).all()
    assert (counts != draw_counts(50, 400, seed=4)).any()
    assert counts.mean(axis=0) == pytest.approx(np.ones(50), abs=0.25)  # five standard errors
    assert (counts == 0).mean() == pytest.approx((1 - 1 / 50) ** 50, abs=0.02)


def duplicated(case: Any, counts: np.ndarray) -> Any:
    """Return the case with each image repeated `counts` times, and the copies of an image next to each other."""
    image_ids = sorted(image["id"] for image in case.ground_truth["images"])
    copy_ids = {i: [i * 100 + n for n in range(count)] for i, count in zip(image_ids, counts, strict=True)}

    def copied(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**entry, "image_id": copy_id} for entry in entries for copy_id in copy_ids[entry["image_id"]]]

    annotations = [{**entry, "id": number} for number, entry in enumerate(copied(case.ground_truth["annotations"]), 1)]
    images = [{**image, "id": copy_id} for image in case.ground_truth["images"] for copy_id in copy_ids[image["id"]]]
    truth = {**case.ground_truth, "images": images, "annotations": annotations}
    return type(case)(truth, copied(case.results))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_resampled_figures_are_pycocotools_on_duplicated_images(
    random_case: Callable[..., Any], pycocotools_figures: Callable[..., dict[str, float]], seed: int, kind: str
) -> None:
    case = random_case(seed, ties_within_images=False)
    counts = draw_counts(12, 5, seed)
    counts[0] = 1
    counts[1, :9] = 0  # few images: some categories and sizes have no objects
    figures = resampled_figures(match_results(case.ground_truth, case.results, kind), counts)
    assert list(figures) == list(FIGURES)
    for n, row in enumerate(counts):
        expected = pycocotools_figures(*duplicated(case, row), kind)
        assert {name: values[n] for name, values in figures.items()} == pytest.approx(expected, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("kind", KINDS)
def test_with_each_image_once_they_are_the_figures(random_case: Callable[..., Any], kind: str) -> None:
    case = random_case(3, images=40, ties_within_images=True)
    matches = match_results(case.ground_truth, case.results, kind)
    figures = resampled_figures(matches, np.ones((2, 40), np.int32))
    for name, value in matches.figures().items():
        assert figures[name].tolist() == pytest.approx([value] * 2, abs=1e-12, nan_ok=True)


def test_resamples_are_computed_in_chunks(random_case: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(4, ties_within_images=True)
    matches = match_results(case.ground_truth, case.results, "bbox")
    counts = draw_counts(12, 7, 0)
    one_chunk = resampled_figures(matches, counts)
    monkeypatch.setattr(bootstrap, "COLUMNS", 3)
    chunked = resampled_figures(matches, counts, ["AP75", "APm"])
    assert list(chunked) == ["AP75", "APm"]
    for name, values in chunked.items():
        np.testing.assert_array_equal(values, one_chunk[name])


def test_resampled_figures_by_hand() -> None:
    # The object of image 0 is detected. Image 1 has a false positive with a higher score, and its object is missed.
    matches = matches_by_hand([0, 1], [(1, False), (0, True)])
    counts = np.array([[2, 0], [0, 2], [1, 1], [2, 1]])
    figures = resampled_figures(matches, counts)
    # Resample 2 has one true positive after one false positive, of two objects: precision 1 / 2 at 51 recall levels.
    # Resample 3 has two after one, of three objects: precision 2 / 3 at the 67 recall levels up to 2 / 3.
    assert figures["AP"].tolist() == pytest.approx([1, 0, 51 / 101 / 2, 67 / 101 * 2 / 3])
    assert figures["APm"].tolist() == pytest.approx(figures["AP50"].tolist())
    assert np.isnan(figures["APs"]).all()


def test_no_results_and_no_objects() -> None:
    counts = np.array([[1, 1], [0, 2]])
    no_results = resampled_figures(matches_by_hand([0], []), counts)
    np.testing.assert_array_equal(no_results["AP"], [0, math.nan])
    no_objects = resampled_figures(matches_by_hand([], [(0, False)]), counts)
    assert np.isnan(no_objects["AP"]).all()
    no_images = match_results({"images": [], "annotations": [], "categories": []}, [], "bbox")
    assert np.isnan(resampled_figures(no_images, draw_counts(0, 3, 0))["AP"]).tolist() == [True] * 3


# ---- Intervals


def test_intervals_by_hand() -> None:
    values = np.arange(101) / 100
    assert Interval.of(0.5, values) == Interval(0.5, pytest.approx(0.025), pytest.approx(0.975))
    assert Interval.of(0.5, values, confidence=0.5) == Interval(0.5, pytest.approx(0.25), pytest.approx(0.75))
    with_gaps = np.concatenate([values, [math.nan] * 20])
    assert Interval.of(0.5, with_gaps) == Interval.of(0.5, values)
    assert Interval.of(math.nan, with_gaps[101:]).verdict == "not told apart"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.01, 0.02, "better"),
        (-0.02, -0.01, "worse"),
        (-0.01, 0.01, "not told apart"),
        (0.0, 0.01, "not told apart"),
        (-0.01, 0.0, "not told apart"),
    ],
)
def test_verdicts(low: float, high: float, verdict: str) -> None:
    assert Interval((low + high) / 2, low, high).verdict == verdict


def test_equal_results_are_not_told_apart(random_case: Callable[..., Any]) -> None:
    case = random_case(0, ties_within_images=True)
    matches = match_results(case.ground_truth, case.results, "bbox")
    differences = paired_differences([matches, matches], [matches], draw_counts(12, 30, 0), figures=["AP", "AP50"])
    assert list(differences) == ["AP", "AP50"]
    for interval in differences.values():
        assert interval == Interval(0, 0, 0)
        assert interval.verdict == "not told apart"


def test_a_difference_by_hand() -> None:
    baseline = matches_by_hand([0, 1], [(0, True)])
    variant = matches_by_hand([0, 1], [(0, True), (1, True)])
    counts = np.array([[2, 0], [0, 2], [1, 1]])
    # Both detect the object of image 0, only the variant that of image 1. AP differs by 0, 1 and 50 / 101.
    interval = paired_differences([variant], [baseline], counts, confidence=1.0)["AP"]
    assert (interval.value, interval.low, interval.high) == pytest.approx((50 / 101, 0, 1))
    halved = paired_differences([variant, baseline], [baseline], counts, confidence=1.0)["AP"]
    assert (halved.value, halved.low, halved.high) == pytest.approx((25 / 101, 0, 0.5))


def test_paired_intervals_are_narrower_than_the_spread_of_each_side() -> None:
    # Both detect the objects of all even images. The variant detects those of 20 odd images, the baseline of one.
    images = 200
    objects = list(range(images))
    baseline = matches_by_hand(objects, [(i, i % 10 != 1) for i in range(0, images, 2)] + [(1, True)], images)
    even_hits = [(i, True) for i in range(0, images, 2)]
    variant = matches_by_hand(objects, [*even_hits, *((i, True) for i in range(1, 40, 2))], images)
    counts = draw_counts(images, 300, 0)
    gain = paired_differences([variant], [baseline], counts, figures=["AP"])["AP"]
    assert gain.verdict == "better"
    loss = paired_differences([baseline], [variant], counts, figures=["AP"])["AP"]
    assert loss.verdict == "worse"
    assert (loss.value, loss.low, loss.high) == pytest.approx((-gain.value, -gain.high, -gain.low))
    spread = resampled_figures(variant, counts, ["AP"])["AP"].std() * 2**0.5
    assert gain.high - gain.low < 2 * 1.96 * spread


def test_matches_of_different_ground_truth_are_refused(random_case: Callable[..., Any]) -> None:
    case, other = (random_case(seed, ties_within_images=True) for seed in (0, 1))
    truth = case.ground_truth
    fewer_images = {**truth, "images": truth["images"][1:]}
    fewer_categories = {**truth, "categories": truth["categories"][1:]}
    base = match_results(truth, [], "bbox")
    counts = draw_counts(12, 2, 0)
    for ground_truth, message in [
        (fewer_images, "different images"),
        (fewer_categories, "different categories"),
        (other.ground_truth, "different objects"),
    ]:
        with pytest.raises(InputError, match=message):
            paired_differences([base, match_results(ground_truth, [], "bbox")], [base], counts)
