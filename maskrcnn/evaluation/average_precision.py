"""COCO's average precision and recall for boxes and masks, computed from ground truth and results.

Shapes of COCO's tables: T IoU thresholds (0.50, 0.55, ..., 0.95), R recall levels (0, 0.01, ..., 1), K categories in
ascending order of id, A area ranges (all, small, medium, large), N limits on detections per image.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import faster_coco_eval
import numpy as np
import pycocotools.coco
import pycocotools.cocoeval

from maskrcnn.data.provenance import digest
from maskrcnn.errors import first_of
from maskrcnn.evaluation.matches import FIGURES
from maskrcnn.evaluation.metric import Metric
from maskrcnn.evaluation.preparation import (
    IouType,
    check_references,
    coco_detections,
    coco_objects,
    measurable,
    read_ground_truth,
)
from maskrcnn.runtime.files import without_nan

logger = logging.getLogger(__name__)

Backend = Literal["faster", "pycocotools"]
LIBRARIES: Mapping[Backend, str] = {"faster": "faster-coco-eval", "pycocotools": "pycocotools"}


@dataclass(frozen=True)
class Figures:
    """COCO metrics of boxes or of masks, each from 0 to 1.

    A metric is nan where the ground truth has no object of the size or class (COCO writes -1). Small objects have an
    annotated area below 32 x 32 pixels, large objects above 96 x 96.
    """

    ap: float  # mean over the IoU thresholds 0.50, 0.55, ..., 0.95 and the classes
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar: Mapping[int, float]  # average recall by the limit on detections per image
    ar_small: float
    ar_medium: float
    ar_large: float
    class_ap: Mapping[str, float]  # `ap` by class name

    def summary(self) -> dict[str, float]:
        """Return the metrics by their usual names, without the AP of each class."""
        precision = [self.ap, self.ap50, self.ap75, self.ap_small, self.ap_medium, self.ap_large]
        recall = [self.ar_small, self.ar_medium, self.ar_large]
        return {
            **dict(zip(FIGURES, precision, strict=True)),
            **{f"AR{limit}": value for limit, value in self.ar.items()},
            **dict(zip(("ARs", "ARm", "ARl"), recall, strict=True)),
        }


@dataclass(frozen=True)
class Evaluation:
    """COCO's metrics of boxes and of masks, None for an IoU type that was not evaluated, and further metrics."""

    box: Figures | None
    mask: Figures | None
    others: Mapping[str, float] = field(default_factory=dict)  # by names such as `KIND/FIGURE`
    computation: Mapping[str, Any] = field(default_factory=dict)  # how the figures were computed, and from what

    def summary(self) -> dict[str, float]:
        """Return all figures by names such as `box/AP` and `mask/AP50`; nan where there are no objects."""
        figures = {
            f"{name}/{metric}": value
            for name, figures in self._evaluated().items()
            for metric, value in figures.summary().items()
        }
        return {**figures, **self.others}

    def class_summary(self) -> dict[str, dict[str, float]]:
        """Return `box/AP` and `mask/AP` by class name; nan where there are no objects."""
        classes: dict[str, dict[str, float]] = {}
        for name, figures in self._evaluated().items():
            for class_name, value in figures.class_ap.items():
                classes.setdefault(class_name, {})[f"{name}/AP"] = value
        return classes

    def to_dict(self) -> dict[str, Any]:
        """Return the summary, the AP of each class (`classes`) and `computation`, for JSON; None in place of nan."""
        return without_nan({**self.summary(), "classes": self.class_summary(), "computation": self.computation})

    def format_table(self) -> str:
        """Return the metrics as a text table, with one line for boxes, one for masks, and one for each other figure."""
        summaries = {name: figures.summary() for name, figures in self._evaluated().items()}
        header = next(iter(summaries.values()), {})
        table = _format_rows("", header, [(name, list(values.values())) for name, values in summaries.items()])
        others = _format_rows("metric", ["value"], [(name, [value]) for name, value in self.others.items()])
        return f"{table}\n\n{others}" if self.others else table

    def format_class_table(self) -> str:
        """Return the AP of each class as a text table, with one line per class."""
        evaluated = self._evaluated()
        class_names = next((list(figures.class_ap) for figures in evaluated.values()), [])
        rows = [(name, [figures.class_ap[name] for figures in evaluated.values()]) for name in class_names]
        return _format_rows("class", [f"{name} AP" for name in evaluated], rows)

    def _evaluated(self) -> dict[str, Figures]:
        by_type = {"box": self.box, "mask": self.mask}
        return {name: figures for name, figures in by_type.items() if figures is not None}


def _format_rows(title: str, header: Iterable[str], rows: Sequence[tuple[str, list[float]]]) -> str:
    width = max(len(title), *(len(name) for name, _ in rows)) if rows else len(title)
    columns = [column.rjust(7) for column in header]
    lines = [" ".join([title.ljust(width), *columns])]
    for name, values in rows:
        cells = ["-" if math.isnan(value) else f"{value:.3f}" for value in values]
        aligned = [cell.rjust(len(column)) for cell, column in zip(cells, columns, strict=True)]
        lines.append(" ".join([name.ljust(width), *aligned]))
    return "\n".join(lines)


def evaluate(
    ground_truth: dict[str, Any] | Path,
    results: Sequence[dict[str, Any]],
    iou_types: Sequence[IouType] = ("bbox", "segm"),
    max_detections: Sequence[int] = (1, 10, 100),
    backend: Backend = "faster",
    metrics: Mapping[str, Metric] | None = None,
) -> Evaluation:
    """Evaluate results on all images and categories of the ground truth.

    Masks are not evaluated if no result has a mask. Boxes are computed from masks for results without a box. Results
    of unknown categories are ignored, as in COCO. The size of a detection is its mask area for mask metrics and its box
    area for box metrics.

    Args:
        ground_truth: an annotation file in COCO format or its content; it is not changed.
        results: as returned by `coco_results` and `read_results`; they are not changed.
        iou_types: `bbox` evaluates boxes, `segm` masks.
        max_detections: limits on detections per image, ascending. Average recall is computed for each limit; all
            other metrics use the last limit.
        backend: `faster` is faster-coco-eval, which gives the same metrics as pycocotools in a fifth of the time.
        metrics: further metrics by name; see `maskrcnn.evaluation.metric`.

    Raises:
        InputError: the annotation file is invalid, or the results do not match the ground truth.
    """
    assert list(max_detections) == sorted(max_detections), max_detections
    data = read_ground_truth(ground_truth)
    check_references(data, results)
    figures = {
        iou_type: _figures(
            *_tables(iou_type, data, results, list(max_detections), backend), data["categories"], max_detections
        )
        for iou_type in measurable(iou_types, results)
    }
    others = {
        f"{name}/{figure}": float(value)
        for name, metric in (metrics or {}).items()
        for figure, value in metric(data, results).items()
    }
    computation = _computation(data, results, max_detections, backend)
    return Evaluation(figures.get("bbox"), figures.get("segm"), others, computation)


def _computation(
    data: dict[str, Any], results: Sequence[dict[str, Any]], max_detections: Sequence[int], backend: Backend
) -> dict[str, Any]:
    """Return the library and its settings, and what was compared."""
    ids = sorted(image["id"] for image in data["images"])
    return {
        "backend": f"{LIBRARIES[backend]} {version(LIBRARIES[backend])}",
        "max_detections": list(max_detections),
        "images": len(ids),
        "image_ids_sha256": digest(map(str, ids)),
        "objects": len(data["annotations"]),
        "results": len(results),
    }


def _tables(
    iou_type: IouType,
    data: dict[str, Any],
    results: Sequence[dict[str, Any]],
    max_detections: list[int],
    backend: Backend,
) -> tuple[np.ndarray, np.ndarray]:
    """Return COCO's tables of precision (T, R, K, A, N) and recall (T, K, A, N); -1 where there are no objects."""
    if backend == "faster":
        coco_class, eval_class = faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster
    else:
        coco_class, eval_class = pycocotools.coco.COCO, pycocotools.cocoeval.COCOeval
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        datasets = []
        for annotations in (coco_objects(iou_type, data["annotations"]), coco_detections(iou_type, results)):
            dataset = coco_class()
            dataset.dataset = {**data, "annotations": annotations}
            dataset.createIndex()
            datasets.append(dataset)
        evaluator = eval_class(*datasets, iou_type)
        evaluator.print_function = logger.debug
        evaluator.params.maxDets = max_detections
        evaluator.evaluate()
        evaluator.accumulate()
    return evaluator.eval["precision"], evaluator.eval["recall"]


def _figures(
    precision: np.ndarray,
    recall: np.ndarray,
    categories: Sequence[dict[str, Any]],
    max_detections: Sequence[int],
) -> Figures:
    """Average COCO's tables to metrics."""
    precision = precision[..., -1]  # (T, R, K, A)
    return Figures(
        ap=_mean(precision[..., 0]),
        ap50=_mean(precision[0, ..., 0]),
        ap75=_mean(precision[5, ..., 0]),
        ap_small=_mean(precision[..., 1]),
        ap_medium=_mean(precision[..., 2]),
        ap_large=_mean(precision[..., 3]),
        ar={limit: _mean(recall[..., 0, n]) for n, limit in enumerate(max_detections)},
        ar_small=_mean(recall[..., 1, -1]),
        ar_medium=_mean(recall[..., 2, -1]),
        ar_large=_mean(recall[..., 3, -1]),
        class_ap={name: _mean(precision[:, :, k, 0]) for k, name in enumerate(_class_names(categories))},
    )


def _class_names(categories: Sequence[dict[str, Any]]) -> list[str]:
    """Return the names in ascending order of category id; a name of several categories is followed by the id."""
    name_counts = Counter(category["name"] for category in categories)
    ordered = sorted(categories, key=lambda category: category["id"])
    return [
        category["name"] if name_counts[category["name"]] == 1 else f"{category['name']} ({category['id']})"
        for category in ordered
    ]


def _mean(values: np.ndarray) -> float:
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else math.nan


def diagnose(ground_truth: dict[str, Any] | Path, results: Sequence[dict[str, Any]]) -> str | None:
    """Return a comparison of images and categories, to explain an AP50 of 0; None if there are no results.

    The usual cause is that the image or category ids of results and ground truth do not match.

    Args:
        ground_truth, results: as for `evaluate`.

    Raises:
        InputError: the annotation file is invalid.
    """
    if not results:
        return None
    data = read_ground_truth(ground_truth)
    object_counts = Counter(annotation["category_id"] for annotation in data["annotations"])
    result_counts = Counter(result["category_id"] for result in results)
    names = {category["id"]: category["name"] for category in data["categories"]}
    image_ids = {image["id"] for image in data["images"]}
    result_image_ids = {result["image_id"] for result in results}
    categories = sorted(
        object_counts.keys() | result_counts.keys(), key=lambda key: -object_counts[key] - result_counts[key]
    )
    lines = [
        f"the results contain {len(result_image_ids)} images, {len(result_image_ids & image_ids)} of the "
        f"{len(image_ids)} in the ground truth",
        *first_of(
            [
                f"category {key} ({names.get(key, 'unknown')}): {object_counts[key]} objects, {result_counts[key]} "
                "results"
                for key in categories
            ]
        ),
    ]
    if not object_counts.keys() & result_counts.keys():
        lines.append("no category has both objects and results: the category ids do not match")
    return "\n".join(lines)
