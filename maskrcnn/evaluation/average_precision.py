"""Average precision and recall as COCO defines them, for boxes and masks, from ground truth and results alone.

Shapes of COCO's tables: T IoU thresholds (0.50, 0.55, ..., 0.95), R recall levels (0, 0.01, ..., 1), K categories in
ascending order of id, A areas (all, small, medium, large), N limits on detections per image.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import faster_coco_eval
import numpy as np
import pycocotools.coco
import pycocotools.cocoeval

from maskrcnn.evaluation.preparation import (
    IouType,
    check_references,
    coco_detections,
    coco_objects,
    measurable,
    read_ground_truth,
)

logger = logging.getLogger(__name__)

Backend = Literal["faster", "pycocotools"]

SHOWN = 10  # categories that a message lists before it only counts them


@dataclass(frozen=True)
class Figures:
    """COCO's figures for boxes or for masks, each from 0 to 1.

    A figure is nan where the ground truth holds nothing to measure (COCO writes -1): no object of this size, or of
    this class. Small is below 32 x 32 pixels, large above 96 x 96, by the area of the mask.
    """

    ap: float  # mean over IoU 0.50, 0.55, ..., 0.95 and over the classes
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar: Mapping[int, float]  # largest recall with at most so many detections per image
    ar_small: float
    ar_medium: float
    ar_large: float
    class_ap: Mapping[str, float]  # `ap` of each class, by its name

    def summary(self) -> dict[str, float]:
        """Return the figures under their usual names, without those of the classes."""
        precision = [self.ap, self.ap50, self.ap75, self.ap_small, self.ap_medium, self.ap_large]
        recall = [self.ar_small, self.ar_medium, self.ar_large]
        return {
            **dict(zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), precision, strict=True)),
            **{f"AR{limit}": value for limit, value in self.ar.items()},
            **dict(zip(("ARs", "ARm", "ARl"), recall, strict=True)),
        }


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured; None for what it was not asked or had nothing to measure with."""

    box: Figures | None
    mask: Figures | None

    def summary(self) -> dict[str, float]:
        """Return the figures as `box/AP`, `mask/AP50` and so on; nan where there is nothing to measure."""
        return {
            f"{name}/{figure}": value
            for name, figures in self._parts().items()
            for figure, value in figures.summary().items()
        }

    def class_summary(self) -> dict[str, dict[str, float]]:
        """Return `box/AP` and `mask/AP` of each class, by its name; nan where there is nothing to measure."""
        classes: dict[str, dict[str, float]] = {}
        for name, figures in self._parts().items():
            for label, value in figures.class_ap.items():
                classes.setdefault(label, {})[f"{name}/AP"] = value
        return classes

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold: the summary, and `classes` with the AP of each class; None in place of nan."""
        classes = {label: _none_for_nan(figures) for label, figures in self.class_summary().items()}
        return {**_none_for_nan(self.summary()), "classes": classes}

    def format_table(self) -> str:
        """Return the figures as a table for people to read, a line for boxes and one for masks."""
        parts = {name: figures.summary() for name, figures in self._parts().items()}
        header = next(iter(parts.values()), {})
        return _format_rows("", header, [(name, list(values.values())) for name, values in parts.items()])

    def format_class_table(self) -> str:
        """Return the AP of each class as a table for people to read, a line for each class."""
        parts = self._parts()
        classes = next((list(figures.class_ap) for figures in parts.values()), [])
        rows = [(label, [figures.class_ap[label] for figures in parts.values()]) for label in classes]
        return _format_rows("class", [f"{name} AP" for name in parts], rows)

    def _parts(self) -> dict[str, Figures]:
        parts = {"box": self.box, "mask": self.mask}
        return {name: figures for name, figures in parts.items() if figures is not None}


def _none_for_nan(figures: Mapping[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(value) else value for name, value in figures.items()}


def _format_rows(title: str, header: Iterable[str], rows: Sequence[tuple[str, list[float]]]) -> str:
    left = max(len(title), *(len(name) for name, _ in rows)) if rows else len(title)
    columns = [column.rjust(7) for column in header]
    lines = [" ".join([title.ljust(left), *columns])]
    for name, values in rows:
        cells = ["-" if math.isnan(value) else f"{value:.3f}" for value in values]
        aligned = [cell.rjust(len(column)) for cell, column in zip(cells, columns, strict=True)]
        lines.append(" ".join([name.ljust(left), *aligned]))
    return "\n".join(lines)


def evaluate(
    ground_truth: dict[str, Any] | Path,
    results: Sequence[dict[str, Any]],
    iou_types: Sequence[IouType] = ("bbox", "segm"),
    max_detections: Sequence[int] = (1, 10, 100),
    backend: Backend = "faster",
) -> Evaluation:
    """Measure results against ground truth, over all images and categories of the ground truth.

    Masks are left out if no result has one; boxes are taken from the masks if results have none. Results of unknown
    categories do not count, as in COCO. Mask figures go by the area of masks, also where results have boxes.

    Args:
        ground_truth: the annotation file in COCO's format, or what it holds; it is not changed.
        results: as `coco_results` and `read_results` return them; they are not changed.
        iou_types: `bbox` measures boxes, `segm` masks.
        max_detections: detections per image that count, ascending; the last limit is that of every figure but the
            recalls of the others.
        backend: `faster` is faster-coco-eval, which gives pycocotools' figures in a fifth of its time.

    Raises:
        InputError: the file is not COCO, or the results do not fit it.
    """
    assert list(max_detections) == sorted(max_detections), max_detections
    data = read_ground_truth(ground_truth)
    check_references(data, results)
    figures = {
        kind: _figures(*_tables(kind, data, results, list(max_detections), backend), data["categories"], max_detections)
        for kind in measurable(iou_types, results)
    }
    return Evaluation(box=figures.get("bbox"), mask=figures.get("segm"))


def _tables(
    kind: IouType,
    data: dict[str, Any],
    results: Sequence[dict[str, Any]],
    max_detections: list[int],
    backend: Backend,
) -> tuple[np.ndarray, np.ndarray]:
    """COCO's tables: precision (T, R, K, A, N) and recall (T, K, A, N), -1 where there is nothing to measure."""
    if backend == "faster":
        coco, coco_eval = faster_coco_eval.COCO, faster_coco_eval.COCOeval_faster
    else:
        coco, coco_eval = pycocotools.coco.COCO, pycocotools.cocoeval.COCOeval
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints what it does
        sides = []
        for annotations in (coco_objects(kind, data["annotations"]), coco_detections(kind, results)):
            side = coco()
            side.dataset = {**data, "annotations": annotations}
            side.createIndex()
            sides.append(side)
        evaluator = coco_eval(*sides, kind)
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
    """Average COCO's tables."""
    best = precision[..., -1]  # (T, R, K, A)
    return Figures(
        ap=_mean(best[..., 0]),
        ap50=_mean(best[0, ..., 0]),
        ap75=_mean(best[5, ..., 0]),
        ap_small=_mean(best[..., 1]),
        ap_medium=_mean(best[..., 2]),
        ap_large=_mean(best[..., 3]),
        ar={limit: _mean(recall[..., 0, n]) for n, limit in enumerate(max_detections)},
        ar_small=_mean(recall[..., 1, -1]),
        ar_medium=_mean(recall[..., 2, -1]),
        ar_large=_mean(recall[..., 3, -1]),
        class_ap={name: _mean(best[:, :, k, 0]) for k, name in enumerate(_class_names(categories))},
    )


def _class_names(categories: Sequence[dict[str, Any]]) -> list[str]:
    """Names in ascending order of category ids; a name that several categories have gets their ids."""
    times = Counter(category["name"] for category in categories)
    ordered = sorted(categories, key=lambda category: category["id"])
    return [
        category["name"] if times[category["name"]] == 1 else f"{category['name']} ({category['id']})"
        for category in ordered
    ]


def _mean(values: np.ndarray) -> float:
    measured = values[values > -1]
    return float(measured.mean()) if measured.size else math.nan


def diagnose(ground_truth: dict[str, Any] | Path, results: Sequence[dict[str, Any]]) -> str | None:
    """Explain what to look at where AP50 is 0 although there are results; None where there are none.

    The usual cause is that categories or images of the two sides are not the same.
    """
    if not results:
        return None
    data = read_ground_truth(ground_truth)
    objects = Counter(annotation["category_id"] for annotation in data["annotations"])
    found = Counter(result["category_id"] for result in results)
    names = {category["id"]: category["name"] for category in data["categories"]}
    images = {image["id"] for image in data["images"]}
    images_found = {result["image_id"] for result in results}
    counted = sorted(objects.keys() | found.keys(), key=lambda key: -objects[key] - found[key])
    lines = [
        f"results name {len(images_found)} images, {len(images_found & images)} of the {len(images)} in the "
        "ground truth",
        *(
            f"category {key} ({names.get(key, 'unknown')}): {objects[key]} objects, {found[key]} results"
            for key in counted[:SHOWN]
        ),
    ]
    if len(counted) > SHOWN:
        lines.append(f"and {len(counted) - SHOWN} more categories")
    if not objects.keys() & found.keys():
        lines.append("no category has both objects and results: the category ids of the two do not match")
    return "\n".join(lines)
