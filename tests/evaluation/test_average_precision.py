"""Known metrics, agreement of the two backends, and empty, unusual and invalid input."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from maskrcnn.errors import InputError
from maskrcnn.evaluation.average_precision import diagnose, evaluate
from maskrcnn.evaluation.results import read_results

BACKENDS = ["faster", "pycocotools"]

# The metrics from the README of the fixture: AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100
SEGM = [0.319545, 0.562288, 0.298927, 0.387374, 0.310183, 0.326934, 0.268230, 0.415449, 0.416839]
BBOX = [0.504581, 0.696973, 0.572982, 0.585626, 0.519400, 0.501398, 0.386813, 0.593680, 0.595353]
NAMES = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]


def rle(mask: np.ndarray) -> dict[str, Any]:
    encoded = pycocotools.mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(mask.shape), "counts": encoded["counts"].decode("ascii")}


def rectangle(x: int, y: int, width: int, height: int, side: int = 128) -> dict[str, Any]:
    mask = np.zeros((side, side))
    mask[y : y + height, x : x + width] = 1
    return rle(mask)


def annotation(number: int, box: tuple[int, int, int, int], **keys: Any) -> dict[str, Any]:
    return {
        "id": number,
        "image_id": 1,
        "category_id": 1,
        "bbox": list(box),
        "segmentation": rectangle(*box),
        "area": box[2] * box[3],
        "iscrowd": 0,
        **keys,
    }


def result(box: tuple[int, int, int, int], score: float = 0.9, **keys: Any) -> dict[str, Any]:
    shape = {"bbox": list(box), "segmentation": rectangle(*box)}
    return {"image_id": 1, "category_id": 1, "score": score, **shape, **keys}


def truth(annotations: list[dict[str, Any]], images: int = 1) -> dict[str, Any]:
    return {
        "images": [{"id": i + 1, "file_name": f"{i + 1}.jpg", "height": 128, "width": 128} for i in range(images)],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "cat"}, {"id": 7, "name": "dog"}],
    }


def random_case(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return five images with objects of two classes and all sizes, including crowds, and jittered results."""
    rng = np.random.default_rng(seed)
    annotations, results = [], []
    for number in range(40):
        x, y = (int(v) for v in rng.integers(0, 60, 2))
        box = (x, y, *(int(v) for v in rng.integers(2, 120, 2).clip(max=(127 - x, 127 - y))))
        keys = {"image_id": int(rng.integers(1, 6)), "category_id": int(rng.choice([1, 7]))}
        crowd = int(rng.random() < 0.15)
        annotations.append(annotation(number + 1, box, iscrowd=crowd, **keys))
        for _ in range(3):
            shifted = (np.array(box) + rng.integers(-4, 5, 4)).clip(min=(0, 0, 1, 1))
            results.append(result(tuple(shifted.tolist()), round(float(rng.random()), 2), **keys))
    return truth(annotations, images=6), results


# --- Known metrics -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "name", "expected"), [("segm", "mask", SEGM), ("bbox", "box", BBOX)])
def test_figures_of_the_official_demo(
    shared_data: Path, backend: str, kind: str, name: str, expected: list[float]
) -> None:
    folder = shared_data / "cocoapi_fixture"
    results = read_results(folder / f"instances_val2014_fake{kind}100_results.json")
    evaluation = evaluate(folder / "instances_val2014_100.json", results, (kind,), backend=backend)
    figures = evaluation.summary()
    assert list(figures) == [f"{name}/{key}" for key in NAMES]
    np.testing.assert_allclose(list(figures.values())[:9], expected, atol=1e-6)


@pytest.mark.parametrize(("kind", "name"), [("segm", "mask"), ("bbox", "box")])
def test_figures_are_those_of_pycocotools_own_summary(shared_data: Path, kind: str, name: str) -> None:
    truth_file = shared_data / "cocoapi_fixture" / "instances_val2014_100.json"
    results_file = shared_data / "cocoapi_fixture" / f"instances_val2014_fake{kind}100_results.json"
    coco = COCO(str(truth_file))
    reference = COCOeval(coco, coco.loadRes(str(results_file)), kind)
    reference.evaluate()
    reference.accumulate()
    reference.summarize()
    figures = evaluate(truth_file, read_results(results_file)).summary()
    np.testing.assert_allclose([figures[f"{name}/{key}"] for key in NAMES], reference.stats, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_both_backends_agree(seed: int) -> None:
    ground_truth, results = random_case(seed)
    faster, reference = (evaluate(ground_truth, results, backend=backend).to_dict() for backend in BACKENDS)
    assert 0.1 < reference["mask/AP"] < 0.9
    for name, figures in reference.pop("classes").items():
        assert faster["classes"][name] == pytest.approx(figures, abs=1e-12)
    del faster["classes"]
    computations = [figures.pop("computation") for figures in (faster, reference)]
    assert faster == pytest.approx(reference, abs=1e-12)
    for computation, library in zip(computations, ("faster-coco-eval", "pycocotools"), strict=True):
        assert computation.pop("backend") == f"{library} {version(library)}"
        assert computation["max_detections"] == [1, 10, 100]
        assert (computation["images"], computation["results"]) == (len(ground_truth["images"]), len(results))
        assert computation["objects"] == len(ground_truth["annotations"])
    assert computations[0] == computations[1]


def test_ap_by_hand() -> None:
    # One of two objects is detected, so the maximum recall is 0.5: 51 of the 101 recall levels have precision 1.
    ground_truth = truth([annotation(1, (10, 10, 40, 40)), annotation(2, (70, 70, 40, 40))])
    evaluation = evaluate(ground_truth, [result((10, 10, 40, 40))])
    assert evaluation.mask is not None
    assert evaluation.box is not None
    for figures in (evaluation.mask, evaluation.box):
        assert figures.ap == pytest.approx(51 / 101)
        assert figures.ar == {1: 0.5, 10: 0.5, 100: 0.5}
        assert math.isnan(figures.ap_small)
        assert figures.ap_medium == pytest.approx(51 / 101)
        assert figures.class_ap["cat"] == pytest.approx(51 / 101)
        assert math.isnan(figures.class_ap["dog"])


def test_a_shifted_mask_passes_the_lower_thresholds() -> None:
    # The IoU of the shifted mask is 32 / 48. It reaches the thresholds 0.50, 0.55, 0.60 and 0.65, so AP is 4 / 10.
    ground_truth = truth([annotation(1, (10, 10, 40, 40))])
    evaluation = evaluate(ground_truth, [result((18, 10, 40, 40))])
    assert evaluation.summary()["mask/AP"] == pytest.approx(0.4)
    assert evaluation.summary()["mask/AP50"] == pytest.approx(1)
    assert evaluation.summary()["mask/AP75"] == pytest.approx(0)


def test_a_detection_in_a_crowd_is_ignored() -> None:
    crowd = annotation(2, (60, 60, 60, 60), iscrowd=1)
    ground_truth = truth([annotation(1, (10, 10, 40, 40)), crowd])
    detections = [result((65, 65, 20, 20), 0.95), result((10, 10, 40, 40), 0.5)]
    assert evaluate(ground_truth, detections).summary()["mask/AP"] == pytest.approx(1)


def test_mask_sizes_go_by_the_area_of_the_mask() -> None:
    # The wrong detection has a box of 40 x 40 pixels (medium) and a mask of 8 x 8 (small): it does not affect mask/APm.
    ground_truth = truth([annotation(1, (10, 10, 40, 40))])
    wrong = result((70, 70, 40, 40), 0.95, segmentation=rectangle(70, 70, 8, 8))
    figures = evaluate(ground_truth, [wrong, result((10, 10, 40, 40), 0.5)]).summary()
    assert figures["mask/APm"] == pytest.approx(1)
    assert figures["box/APm"] == pytest.approx(0.5)


def test_limits_on_detections() -> None:
    ground_truth = truth([annotation(1, (10, 10, 40, 40)), annotation(2, (70, 70, 40, 40))])
    detections = [result((10, 10, 40, 40), 0.9), result((70, 70, 40, 40), 0.8)]
    evaluation = evaluate(ground_truth, detections, max_detections=(1, 300))
    assert evaluation.mask is not None
    assert evaluation.mask.ar == {1: 0.5, 300: 1.0}
    assert evaluation.mask.ap == pytest.approx(1)
    first = evaluate(ground_truth, detections, max_detections=(1,)).summary()
    assert first["mask/AP"] == pytest.approx(51 / 101)


# --- Empty and unusual input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_results(backend: str) -> None:
    figures = evaluate(truth([annotation(1, (10, 10, 40, 40))]), [], backend=backend).summary()
    assert figures["mask/AP"] == figures["box/AP"] == figures["mask/AR100"] == 0
    assert math.isnan(figures["mask/APs"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("results", [[], [result((10, 10, 40, 40))]])
def test_no_objects(backend: str, results: list[dict[str, Any]]) -> None:
    evaluation = evaluate(truth([]), results, backend=backend)
    assert all(math.isnan(value) for value in evaluation.summary().values())
    assert evaluation.to_dict()["mask/AP"] is None
    json.dumps(evaluation.to_dict(), allow_nan=False)


# Further metrics.


def test_further_metrics_stand_beside_the_others() -> None:
    ground_truth = truth([{**annotation(1, (10, 10, 40, 40)), "iscrowd": 0}])
    del ground_truth["annotations"][0]["iscrowd"]

    def counts(data: dict[str, Any], results: Sequence[dict[str, Any]]) -> dict[str, float]:
        crowds = sum(entry["iscrowd"] for entry in data["annotations"])  # the key is filled in
        return {"detections": len(results), "crowds": crowds, "nothing": math.nan}

    found = [result((10, 10, 40, 40)), result((70, 70, 40, 40), score=0.1)]
    evaluation = evaluate(ground_truth, found, metrics={"counts": counts})
    assert list(evaluation.summary())[-4:] == ["mask/ARl", "counts/detections", "counts/crowds", "counts/nothing"]
    assert evaluation.summary()["counts/detections"] == 2
    assert (evaluation.to_dict()["counts/crowds"], evaluation.to_dict()["counts/nothing"]) == (0, None)
    assert evaluation.format_table().splitlines()[-4:] == [
        "metric              value",
        "counts/detections   2.000",
        "counts/crowds       0.000",
        "counts/nothing          -",
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_annotation_ids_from_zero_count(backend: str) -> None:
    ground_truth = truth([annotation(0, (10, 10, 40, 40)), annotation(1, (70, 70, 40, 40))])
    detections = [result((10, 10, 40, 40)), result((70, 70, 40, 40))]
    assert evaluate(ground_truth, detections, backend=backend).summary()["mask/AP"] == pytest.approx(1)


def test_area_and_iscrowd_may_be_absent() -> None:
    ground_truth = truth([annotation(1, (10, 10, 40, 40))])
    del ground_truth["annotations"][0]["area"], ground_truth["annotations"][0]["iscrowd"]
    figures = evaluate(ground_truth, [result((10, 10, 40, 40))]).summary()
    assert figures["mask/APm"] == pytest.approx(1)


def test_ground_truth_may_mix_kinds_of_masks() -> None:
    square = [10, 10, 50, 10, 50, 50, 10, 50]
    numbers = [10 * 128 + 10, *([40, 88] * 39), 40, 128 * 128 - 10 * 128 - 10 - 40 * 128 + 88]
    plain = {"size": [128, 128], "counts": numbers}
    masks = [[square], [square, [1, 2, 3, 4]], plain, rectangle(10, 10, 40, 40)]
    annotations = [
        annotation(i + 1, (10, 10, 40, 40), image_id=i + 1, segmentation=mask) for i, mask in enumerate(masks)
    ]
    detections = [result((10, 10, 40, 40), image_id=i + 1) for i in range(4)]
    assert evaluate(truth(annotations, images=4), detections).summary()["mask/AP"] == pytest.approx(1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mask", [[], [[1, 2, 3, 4]], None, ...])
def test_objects_without_a_mask_are_left_out_of_masks(
    mask: Any, backend: Any, caplog: pytest.LogCaptureFixture
) -> None:
    box_alone = annotation(5, (10, 10, 40, 40), segmentation=mask)
    if mask is ...:
        del box_alone["segmentation"]
    ground_truth = truth([box_alone, annotation(6, (70, 70, 40, 40))])
    before = copy.deepcopy(ground_truth)
    found = result((70, 70, 40, 40))
    with caplog.at_level(logging.INFO):
        figures = evaluate(ground_truth, [found], backend=backend).summary()
    assert figures["mask/AP"] == pytest.approx(1)
    assert figures["box/AP"] == pytest.approx(51 / 101)
    assert "1 annotations have no mask; mask metrics ignore them and what is detected in their boxes: 5" in caplog.text
    # What is detected in the box is neither right nor wrong, however often; what is detected elsewhere is wrong.
    in_box = [result((12, 12, 30, 30), score) for score in (0.97, 0.98)]
    assert evaluate(ground_truth, [found, *in_box], backend=backend).summary()["mask/AP"] == pytest.approx(1)
    elsewhere = result((60, 20, 10, 10), 0.99)
    assert evaluate(ground_truth, [found, elsewhere], backend=backend).summary()["mask/AP"] == pytest.approx(0.5)
    assert ground_truth == before


def test_masks_of_results_may_be_plain_numbers_without_boxes() -> None:
    plain = {"size": [128, 128], "counts": [0, 128 * 64, 128 * 64]}
    detection = {"image_id": 1, "category_id": 1, "score": 0.5, "segmentation": plain}
    half = np.zeros((128, 128))
    half[:, :64] = 1
    ground_truth = truth([annotation(1, (0, 0, 64, 128), segmentation=rle(half))])
    figures = evaluate(ground_truth, [detection]).summary()
    assert figures["mask/AP"] == figures["box/AP"] == pytest.approx(1)


def test_boxes_alone_are_measured_alone() -> None:
    detection = result((10, 10, 40, 40))
    del detection["segmentation"]
    evaluation = evaluate(truth([annotation(1, (10, 10, 40, 40))]), [detection])
    assert evaluation.mask is None
    assert evaluation.summary()["box/AP"] == pytest.approx(1)
    with pytest.raises(InputError, match="no masks to measure"):
        evaluate(truth([annotation(1, (10, 10, 40, 40))]), [detection], iou_types=("segm",))
    with pytest.raises(InputError, match="1 of 2 results have no 'segmentation'"):
        evaluate(truth([annotation(1, (10, 10, 40, 40))]), [detection, result((10, 10, 40, 40))])


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_of_unknown_categories_do_not_count(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    detections = [result((10, 10, 40, 40)), result((10, 10, 40, 40), 0.95, category_id=99)]
    ground_truth = truth([annotation(1, (10, 10, 40, 40))])
    assert evaluate(ground_truth, detections, backend=backend).summary()["mask/AP"] == pytest.approx(1)
    assert "are ignored: 99" in caplog.text


def test_unknown_images_and_masks_of_another_size_are_refused() -> None:
    ground_truth = truth([annotation(1, (10, 10, 40, 40))])
    with pytest.raises(InputError, match=r"2 images that are not in the ground truth \(image_id 5, 9\)"):
        evaluate(ground_truth, [result((10, 10, 40, 40), image_id=9), result((10, 10, 40, 40), image_id=5)])
    small = result((10, 10, 4, 4), segmentation=rectangle(10, 10, 4, 4, side=64))
    with pytest.raises(InputError, match=r"size \[64, 64\] for image 1, whose height and width are \[128, 128\]"):
        evaluate(ground_truth, [small])
    many = [result((10, 10, 40, 40), image_id=number) for number in range(2, 14)]
    with pytest.raises(InputError, match=r"12 images .*\(image_id 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, and 2 more\)"):
        evaluate(ground_truth, many)


def test_a_file_that_is_not_coco_is_refused(tmp_path: Path) -> None:
    (tmp_path / "truth.json").write_text("[]")
    with pytest.raises(InputError, match=r"truth\.json"):
        evaluate(tmp_path / "truth.json", [])


@pytest.mark.parametrize("backend", BACKENDS)
def test_input_is_not_changed_and_nothing_is_printed(backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    ground_truth, results = random_case(0)
    ground_truth["annotations"][0]["segmentation"] = [[10.0, 10.0, 50.0, 10.0, 50.0, 50.0]]
    before = copy.deepcopy((ground_truth, results))
    evaluate(ground_truth, results, backend=backend)
    assert (ground_truth, results) == before
    assert capsys.readouterr() == ("", "")


def test_the_faster_backend_logs_nothing_but_details(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    evaluate(*random_case(0))
    assert caplog.text == ""


# --- Text output --------------------------------------------------------------------------------------------------


def test_tables() -> None:
    evaluation = evaluate(truth([annotation(1, (10, 10, 40, 40))]), [result((18, 10, 40, 40))])
    assert evaluation.format_table().splitlines() == [
        "          AP    AP50    AP75     APs     APm     APl     AR1    AR10   AR100     ARs     ARm     ARl",
        "box    0.400   1.000   0.000       -   0.400       -   0.400   0.400   0.400       -   0.400       -",
        "mask   0.400   1.000   0.000       -   0.400       -   0.400   0.400   0.400       -   0.400       -",
    ]
    assert evaluation.format_class_table().splitlines() == [
        "class  box AP mask AP",
        "cat     0.400   0.400",
        "dog         -       -",
    ]
    assert evaluation.to_dict()["classes"] == {
        "cat": {"box/AP": pytest.approx(0.4), "mask/AP": pytest.approx(0.4)},
        "dog": {"box/AP": None, "mask/AP": None},
    }


def test_classes_of_one_name_keep_their_lines() -> None:
    ground_truth = truth([annotation(1, (10, 10, 40, 40))])
    ground_truth["categories"][1]["name"] = "cat"
    classes = evaluate(ground_truth, [result((10, 10, 40, 40))]).to_dict()["classes"]
    assert list(classes) == ["cat (1)", "cat (7)"]


def test_diagnosis() -> None:
    ground_truth = truth([annotation(1, (10, 10, 40, 40)), annotation(2, (1, 1, 4, 4), category_id=7)], 3)
    shifted = [result((10, 10, 40, 40), category_id=2)] * 3
    assert diagnose(ground_truth, []) is None
    assert (diagnose(ground_truth, shifted) or "").splitlines() == [
        "the results contain 1 images, 1 of the 3 in the ground truth",
        "category 2 (unknown): 0 objects, 3 results",
        "category 1 (cat): 1 objects, 0 results",
        "category 7 (dog): 1 objects, 0 results",
        "no category has both objects and results: the category ids do not match",
    ]
