"""Random ground truth and results, and their metrics from pycocotools."""

from __future__ import annotations

import contextlib
import copy
import io
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pycocotools.mask
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

SIDE = 128  # height and width of all images
CATEGORIES = (1, 5, 9, 12)  # the last has no objects


class Case(NamedTuple):
    ground_truth: dict[str, Any]
    results: list[dict[str, Any]]


def rectangle(box: tuple[int, int, int, int]) -> dict[str, Any]:
    x, y, width, height = box
    mask = np.zeros((SIDE, SIDE), np.uint8, order="F")
    mask[y : y + height, x : x + width] = 1
    encoded = pycocotools.mask.encode(mask)
    return {"size": [SIDE, SIDE], "counts": encoded["counts"].decode("ascii")}


def shape_of(box: tuple[int, int, int, int]) -> dict[str, Any]:
    return {"bbox": list(box), "segmentation": rectangle(box)}


def random_box(rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Return a box of any COCO size; a tenth are 32 x 32, on the border of small and medium."""
    width, height = (32, 32) if rng.random() < 0.1 else rng.integers(4, 125, 2).tolist()
    return (int(rng.integers(SIDE - width)), int(rng.integers(SIDE - height)), width, height)


def random_case(seed: int, images: int = 12, *, ties_within_images: bool) -> Case:
    """Return images with up to 6 objects, including crowds and duplicates, and jittered and wrong results.

    One image has no objects. Scores have two digits, so detections of different images often have equal scores.
    """
    rng = np.random.default_rng(seed)
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    image_ids = (np.arange(images) * 3 + 2).tolist()
    for image_id in image_ids:
        scores = {category_id: rng.permutation(100).tolist() for category_id in CATEGORIES}
        for _ in range(rng.integers(7) if image_id != 5 else 0):
            category = int(rng.choice(CATEGORIES[:3], p=[0.7, 0.2, 0.1]))
            box = random_box(rng)
            ids = {"image_id": image_id, "category_id": category}
            entry = {**ids, **shape_of(box), "area": box[2] * box[3], "iscrowd": int(rng.random() < 0.15)}
            annotations += [{**entry, "id": len(annotations) + n + 1} for n in range(2 if rng.random() < 0.1 else 1)]
            for _ in range(4):
                near = (np.array(box) + rng.integers(-5, 6, 4)).clip(min=(0, 0, 1, 1)) if rng.random() < 0.7 else None
                detected_box = random_box(rng) if near is None else tuple(near.tolist())
                score = rng.integers(5) / 4 if ties_within_images else scores[category].pop() / 100
                results.append({**ids, **shape_of(detected_box), "score": float(score)})
        wrong_box = random_box(rng)
        results.append({"image_id": image_id, "category_id": 12, **shape_of(wrong_box), "score": 0.5})
    truth = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": SIDE, "width": SIDE} for i in reversed(image_ids)],
        "annotations": annotations,
        "categories": [{"id": category_id, "name": f"class {category_id}"} for category_id in CATEGORIES],
    }
    order = rng.permutation(len(results)).tolist()
    return Case(truth, [results[i] for i in order])


@pytest.fixture(name="random_case")
def _random_case() -> Callable[..., Case]:
    return random_case


@pytest.fixture(name="shape_of")
def _shape_of() -> Callable[..., dict[str, Any]]:
    return shape_of


def pycocotools_figures(ground_truth: dict[str, Any], results: list[dict[str, Any]], iou_type: str) -> dict[str, float]:
    """Return the metrics of pycocotools' summary, with nan in place of -1."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(ground_truth)
        truth.createIndex()
        results = copy.deepcopy(results)
        for result in results:  # `loadRes` evaluates boxes if results have a box
            result.pop("segmentation" if iou_type == "bbox" else "bbox", None)
        evaluator = COCOeval(truth, truth.loadRes(results), iou_type)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    return {
        name: math.nan if value == -1 else value for name, value in zip(names, evaluator.stats.tolist(), strict=False)
    }


@pytest.fixture(name="pycocotools_figures")
def _pycocotools_figures() -> Callable[..., dict[str, float]]:
    return pycocotools_figures
