"""LVIS's federated evaluation (arXiv 1908.03195), as a further metric.

Not every class was annotated in every image of LVIS. Detections of a class count only in images that have an object of
it, or list it in `neg_category_ids`: there each is true or false. Where `not_exhaustive_category_ids` lists the class,
a detection without an object is ignored. An image has at most 300 detections. The AP of a frequency is the mean over
its classes: rare (in 1 to 10 training images), common (11 to 100) and frequent.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

import faster_coco_eval
import numpy as np

from maskrcnn.errors import InputError
from maskrcnn.evaluation.metric import Metric, MetricConfig
from maskrcnn.evaluation.preparation import IouType, coco_detections, coco_objects, measurable

logger = logging.getLogger(__name__)

MOST_DETECTIONS = 300  # in an image, of all classes
NAMES: dict[IouType, str] = {"bbox": "box", "segm": "mask"}
FIGURES = ("AP", "AP50", "AP75", "APr", "APc", "APf")
FREQUENCIES = {"APr": "r", "APc": "c", "APf": "f"}


class LvisConfig(MetricConfig):
    """LVIS's AP of boxes and masks; the annotations are those of `maskrcnn convert-dataset --from lvis`."""

    kind: Literal["lvis"] = "lvis"

    @property
    def figures(self) -> tuple[str, ...]:
        """`lvis/mask_AP`, `lvis/box_APr` and so on."""
        return tuple(f"{name}_{figure}" for name in NAMES.values() for figure in FIGURES)

    def build(self) -> Metric:
        """Return the metric."""
        return lvis_figures


def lvis_figures(ground_truth: dict[str, Any], results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return LVIS's figures of boxes and masks, such as `mask_APr`; nan where there is no object, or no mask.

    Args:
        ground_truth, results: see `MetricConfig.build`.

    Raises:
        InputError: the ground truth is not of LVIS.
    """
    _require_lvis(ground_truth)
    figures = {f"{name}_{figure}": math.nan for name in NAMES.values() for figure in FIGURES}
    chosen = _that_count(_best_of_each_image(results), ground_truth)
    for kind in measurable(("bbox", "segm"), results):
        precision = _precision(kind, ground_truth, chosen)
        figures.update({f"{NAMES[kind]}_{key}": value for key, value in _averages(precision, ground_truth).items()})
    return figures


def _require_lvis(ground_truth: dict[str, Any]) -> None:
    needed = ("neg_category_ids", "not_exhaustive_category_ids")
    if not all(_are_ids(image.get(key)) for image in ground_truth["images"] for key in needed) or not all(
        category.get("frequency") in FREQUENCIES.values() for category in ground_truth["categories"]
    ):
        raise InputError(
            f"evaluation.metrics: kind lvis needs annotations of LVIS v1: images with {' and '.join(needed)}, and "
            "categories with the frequency r, c or f; `maskrcnn convert-dataset --from lvis` keeps them"
        )


def _are_ids(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(number, int) for number in value)


def _best_of_each_image(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    by_image = defaultdict(list)
    for result in results:
        by_image[result["image_id"]].append(result)
    best = (sorted(each, key=lambda result: -result["score"])[:MOST_DETECTIONS] for each in by_image.values())
    return [result for each in best for result in each]


def _that_count(results: Sequence[dict[str, Any]], ground_truth: dict[str, Any]) -> list[dict[str, Any]]:
    """Leave out detections of classes that were not looked for in their image; the library fails at some of them."""
    looked_for = {(entry["image_id"], entry["category_id"]) for entry in ground_truth["annotations"]}
    looked_for |= {
        (image["id"], category) for image in ground_truth["images"] for category in image["neg_category_ids"]
    }
    return [result for result in results if (result["image_id"], result["category_id"]) in looked_for]


def _precision(kind: IouType, ground_truth: dict[str, Any], results: Sequence[dict[str, Any]]) -> np.ndarray:
    """Return the precision at 10 IoU thresholds and 101 levels of recall, (10, 101, K); -1 without objects."""
    datasets = []
    with contextlib.redirect_stdout(io.StringIO()):  # the library prints its progress
        for annotations in (coco_objects(kind, ground_truth["annotations"]), coco_detections(kind, results)):
            dataset = faster_coco_eval.COCO()
            dataset.dataset = {**ground_truth, "annotations": annotations}
            dataset.createIndex()
            datasets.append(dataset)
        evaluator = faster_coco_eval.COCOeval_faster(*datasets, kind, lvis_style=True, print_function=logger.debug)
        evaluator.params.maxDets = [MOST_DETECTIONS]
        evaluator.evaluate()
        evaluator.accumulate()
    precision: np.ndarray = evaluator.eval["precision"][..., 0, 0]  # all sizes
    return precision


def _averages(precision: np.ndarray, ground_truth: dict[str, Any]) -> dict[str, float]:
    categories = sorted(ground_truth["categories"], key=lambda category: category["id"])
    frequencies = np.array([category["frequency"] for category in categories])
    overall = {"AP": precision, "AP50": precision[0], "AP75": precision[5]}
    groups = {name: precision[..., frequencies == frequency] for name, frequency in FREQUENCIES.items()}
    valid = {name: values[values > -1] for name, values in (overall | groups).items()}
    return {name: float(values.mean()) if values.size else math.nan for name, values in valid.items()}
