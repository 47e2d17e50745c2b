"""LVIS's federated evaluation: worked by hand, and against COCO's evaluation of a ground truth that says the same."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as cocoapi

from maskrcnn.errors import InputError
from maskrcnn.evaluation.average_precision import evaluate
from maskrcnn.evaluation.lvis import lvis_figures

HEIGHT, WIDTH = 60, 80
RARE, COMMON, FREQUENT = 2, 5, 9
CATEGORIES = [{"id": i, "name": str(i), "frequency": f} for i, f in ((RARE, "r"), (COMMON, "c"), (FREQUENT, "f"))]


def rle(box: list[int]) -> dict[str, Any]:
    x, y, width, height = box
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[y : y + height, x : x + width] = 1
    code = cocoapi.encode(mask)
    return {"size": code["size"], "counts": code["counts"].decode()}


def image(number: int, *, negative: tuple[int, ...] = (), partial: tuple[int, ...] = ()) -> dict[str, Any]:
    size = {"height": HEIGHT, "width": WIDTH}
    return {"id": number, **size, "neg_category_ids": [*negative], "not_exhaustive_category_ids": [*partial]}


def item(number: int, category: int, box: list[int], score: float | None = None) -> dict[str, Any]:
    """Return an object, or with a score a detection."""
    common = {"image_id": number, "category_id": category, "bbox": box, "segmentation": rle(box)}
    if score is not None:
        return {**common, "score": score}
    return {**common, "iscrowd": 0, "area": float(box[2] * box[3])}


def data(images: list[dict[str, Any]], objects: list[dict[str, Any]]) -> dict[str, Any]:
    annotations = [{**each, "id": number} for number, each in enumerate(objects, start=1)]
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


BOX, OTHER = [10, 10, 20, 20], [50, 30, 20, 20]


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        (image(2), 1.0),  # the class was not looked for: the detection there does not count
        (image(2, negative=(RARE,)), 0.5),  # it was looked for and is absent: a better one that is false
    ],
)
def test_a_detection_counts_where_its_class_was_looked_for(second: dict[str, Any], expected: float) -> None:
    truth = data([image(1), second], [item(1, RARE, BOX)])
    figures = lvis_figures(truth, [item(1, RARE, BOX, 0.5), item(2, RARE, OTHER, 0.9)])
    assert figures["mask_AP"] == figures["box_APr"] == pytest.approx(expected, abs=1e-9)
    assert math.isnan(figures["mask_APc"])


@pytest.mark.parametrize(("partial", "expected"), [((), 0.5), ((RARE,), 1.0)])
def test_an_object_that_was_not_annotated_is_no_error(partial: tuple[int, ...], expected: float) -> None:
    truth = data([image(1, partial=partial)], [item(1, RARE, BOX)])
    figures = lvis_figures(truth, [item(1, RARE, BOX, 0.5), item(1, RARE, OTHER, 0.9)])
    assert figures["mask_AP50"] == pytest.approx(expected, abs=1e-9)


def test_the_frequencies_are_averages_of_their_classes() -> None:
    truth = data([image(1)], [item(1, RARE, BOX), item(1, COMMON, OTHER), item(1, FREQUENT, BOX)])
    figures = lvis_figures(truth, [item(1, RARE, BOX, 0.5), item(1, FREQUENT, OTHER, 0.5)])
    assert [figures[f"mask_{name}"] for name in ("APr", "APc", "APf")] == pytest.approx([1, 0, 0])
    assert figures["mask_AP"] == pytest.approx(1 / 3)


def test_300_detections_of_an_image_count() -> None:
    truth = data([image(1, negative=(COMMON,))], [item(1, RARE, BOX)])
    better = [item(1, COMMON, OTHER, 0.9)] * 300
    assert lvis_figures(truth, [*better[:-1], item(1, RARE, BOX, 0.1)])["box_AP"] == pytest.approx(1)
    assert lvis_figures(truth, [*better, item(1, RARE, BOX, 0.1)])["box_AP"] == 0


def random_case(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    rng = np.random.default_rng(seed)
    ids = [RARE, COMMON, FREQUENT]
    images, objects, results = [], [], []
    for number in range(1, 13):
        present = [category for category in ids if rng.random() < 0.5]
        negative = tuple(category for category in ids if category not in present and rng.random() < 0.4)
        images.append(image(number, negative=negative, partial=tuple(c for c in present if rng.random() < 0.4)))
        for category in present:
            for _ in range(rng.integers(1, 4)):
                box = [int(side) for side in rng.integers((1, 1, 5, 5), (55, 40, 20, 15))]
                objects.append(item(number, category, box))
                moved = [int(side) for side in (np.array(box) + rng.integers(-3, 4, 4)).clip(1)]
                results.append(item(number, category, moved, float(rng.random())))
        for _ in range(5):
            box = [int(side) for side in rng.integers((1, 1, 5, 5), (55, 40, 20, 15))]
            results.append(item(number, int(rng.choice(ids)), box, float(rng.random())))
    return data(images, objects), results


@pytest.mark.parametrize("seed", range(4))
def test_cocos_evaluation_agrees(seed: int) -> None:
    """A crowd region over the whole image ignores the detections that COCO would count as false."""
    truth, results = random_case(seed)
    pairs = {(each["image_id"], each["category_id"]) for each in truth["annotations"]}
    looked_for = pairs | {(each["id"], category) for each in truth["images"] for category in each["neg_category_ids"]}
    whole = {"bbox": [-1000, -1000, 3000, 3000], "segmentation": rle([0, 0, WIDTH, HEIGHT]), "area": 1.0, "iscrowd": 1}
    crowds = [
        {**whole, "image_id": each["id"], "category_id": category}
        for each in truth["images"]
        for category in each["not_exhaustive_category_ids"]
    ]
    annotations = [{**each, "id": n} for n, each in enumerate([*truth["annotations"], *crowds], start=1)]
    counted = [each for each in results if (each["image_id"], each["category_id"]) in looked_for]
    expected = evaluate({**truth, "annotations": annotations}, counted, backend="pycocotools")
    figures = lvis_figures(truth, results)
    for name, coco in (("box", expected.box), ("mask", expected.mask)):
        assert coco is not None
        by_class = [coco.class_ap[str(category)] for category in (RARE, COMMON, FREQUENT)]
        found = [figures[f"{name}_{figure}"] for figure in ("AP", "AP50", "AP75", "APr", "APc", "APf")]
        assert found == pytest.approx([coco.ap, coco.ap50, coco.ap75, *by_class], abs=1e-12, nan_ok=True)


def test_without_results_or_masks() -> None:
    truth = data([image(1)], [item(1, RARE, BOX)])
    assert lvis_figures(truth, [])["mask_AP"] == 0
    boxes = [{key: value for key, value in item(1, RARE, BOX, 0.5).items() if key != "segmentation"}]
    figures = lvis_figures(truth, boxes)
    assert figures["box_AP"] == pytest.approx(1)
    assert math.isnan(figures["mask_AP"])


def test_other_annotations_are_refused() -> None:
    truth = data([image(1)], [item(1, RARE, BOX)])
    del truth["images"][0]["neg_category_ids"]
    with pytest.raises(InputError, match=r"kind lvis needs annotations of LVIS v1: images with neg_category_ids and"):
        lvis_figures(truth, [])
    truth["images"][0]["neg_category_ids"] = [[1]]
    with pytest.raises(InputError, match=r"kind lvis needs annotations of LVIS v1"):
        lvis_figures(truth, [])
    truth = {**data([image(1)], []), "categories": [{"id": 1, "name": "a"}]}
    with pytest.raises(InputError, match=r"categories with the frequency r, c or f"):
        lvis_figures(truth, [])
