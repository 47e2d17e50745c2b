"""Metrics beside COCO's average precision: an extension point. And the names of COCO's metrics in configurations."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, WithJsonSchema

from maskrcnn.config import Part
from maskrcnn.config.explanation import not_one_of
from maskrcnn.evaluation.matches import FIGURES

Metric = Callable[[dict[str, Any], Sequence[dict[str, Any]]], Mapping[str, float]]
"""Maps ground truth and results to figures by name; `MetricConfig.build` explains them."""

COCO_METRICS = tuple(f"{part}/{figure}" for part in ("box", "mask") for figure in FIGURES)


def _known(name: str) -> str:
    if name not in COCO_METRICS:
        raise ValueError(not_one_of(name, COCO_METRICS))
    return name


CocoMetric = Annotated[str, AfterValidator(_known), WithJsonSchema({"type": "string", "enum": list(COCO_METRICS)})]
"""The name of a COCO metric, such as `mask/AP`."""


class MetricConfig(Part):
    """Base class of the configs of metrics, an extension point.

    A metric has one or more figures. `metrics.json`, `metrics.jsonl`, the log and the loggers name them `KIND/FIGURE`,
    beside `mask/AP`, and `evaluation.best_metric` may be one of them; then a higher value is better. The report of an
    ablation shows their means over the seeds, without intervals.
    """

    @property
    @abstractmethod
    def figures(self) -> tuple[str, ...]:
        """The names of the figures, without `KIND/`. With them, `best_metric` is checked before the training."""

    @abstractmethod
    def build(self) -> Metric:
        """Return a function `(ground_truth, results) -> {figure: value}` with a value for each of `figures`.

        `ground_truth` is the content of a COCO annotation file, with `iscrowd` and `area` in every annotation.
        `results` are all detections, in COCO's results format: `image_id`, `category_id`, `score`, and `bbox` as
        `(x, y, width, height)`, `segmentation` as RLE, or both. Image ids and mask sizes match the ground truth; a
        category may be unknown. The function must not change its arguments. Its values may have any range; nan stands
        for a figure without objects to compute it from. Only the main process of a training calls it.
        """
