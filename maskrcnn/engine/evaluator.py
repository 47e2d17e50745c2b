"""Evaluation of a predictor on a dataset with ground truth."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from maskrcnn.data.dataset import DetectionDataset
from maskrcnn.data.loader import evaluation_loader
from maskrcnn.engine.instances import Instances, Result
from maskrcnn.engine.predictor import Predictor
from maskrcnn.evaluation.average_precision import Backend, Evaluation, diagnose, evaluate
from maskrcnn.evaluation.metric import Metric
from maskrcnn.evaluation.preparation import IouType
from maskrcnn.evaluation.results import write_results
from maskrcnn.runtime.files import json_text, write_text
from maskrcnn.runtime.processes import Processes
from maskrcnn.structures import Batch, Losses

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluator:
    """Computes COCO box and mask AP, and further metrics, of a predictor on a dataset."""

    dataset: DetectionDataset
    batch_size: int = 1
    workers: int = 0  # data loader processes; 0 loads in this process
    backend: Backend = "faster"  # library that computes COCO's metrics
    max_detections: int = 100  # per image and class, for all metrics but AR1 and AR10; COCO's limit is 100
    metrics: Mapping[str, Metric] = field(default_factory=dict)  # further metrics by name; see `MetricConfig.build`

    def __call__(self, predictor: Predictor, out: Path | None = None) -> Evaluation:
        """Evaluate `predictor` and log the tables; write `results.json` and `metrics.json` to folder `out`, if given.

        The predictor must have the class names of the dataset; the category ids may differ.
        """
        evaluation, _ = self.timed(predictor, out, Processes(predictor.device))
        return evaluation

    def timed(self, predictor: Predictor, out: Path | None, processes: Processes) -> tuple[Evaluation, float]:
        """Evaluate on several processes. Every process must call this function.

        The images are divided among the processes; the main process computes the metrics and writes the files. With
        the same number of threads and kind of device, the results equal those of a single process.

        Returns:
            The evaluation, which is the same on every process, and the images per second of inference, without the
            computation of the metrics.
        """
        processes.share_buffers(predictor.model)
        # The class names are the same, but results need the category ids of this dataset.
        predictor = replace(predictor, classes=self.dataset.classes)
        started_at = time.perf_counter()
        results = self._predict(predictor, processes)
        images_per_second = len(self.dataset) / (time.perf_counter() - started_at)

        def compute_metrics() -> Evaluation:
            if out is not None:
                write_results(out / "results.json", results)
            return report(
                self._ground_truth,
                results,
                out,
                backend=self.backend,
                iou_types=["bbox"] if predictor.model.mask_head is None else ["bbox", "segm"],
                max_detections=self.max_detections,
                metrics=self.metrics,
            )

        return processes.from_main(compute_metrics), images_per_second

    @cached_property
    def _ground_truth(self) -> dict[str, Any]:
        """The ground truth, which a dataset may have to read from a large file; kept for the next evaluation."""
        return self.dataset.ground_truth()

    @torch.no_grad()
    def losses(self, predictor: Predictor, processes: Processes | None = None) -> dict[str, float]:
        """Return each loss term by name, mean over the images of the dataset, with the model in eval mode.

        The images are divided among the processes. Every process must call this function and gets the same result.
        """
        processes = processes or Processes(predictor.device)
        processes.share_buffers(predictor.model)
        predictor.model.eval()
        sums = torch.zeros(len(Losses._fields), dtype=torch.float64)
        for batch in self._batches(predictor, processes):
            losses = predictor.model(batch.images.to(predictor.device), batch.targets.to(predictor.device))
            sums += torch.stack(tuple(losses)).double().cpu() * len(batch.images)
        sums_by_rank = processes.gather(sums)
        means = processes.broadcast((torch.stack(sums_by_rank or [sums]).sum(dim=0) / len(self.dataset)).tolist())
        return dict(zip(Losses._fields, means, strict=True))

    def _predict(self, predictor: Predictor, processes: Processes) -> list[Result]:
        """Return the results of all images in dataset order on the main process, and an empty list on the others."""
        disable = None if processes.is_main else True  # None: disabled if stderr is not a terminal
        batches = tqdm(self._batches(predictor, processes), desc="evaluating", leave=False, disable=disable)
        results_by_rank = processes.gather(list(_results_of(predictor, batches))) or []
        # Batch i of the dataset is on process i % world.
        rounds = zip_longest(*results_by_rank, fillvalue=[])
        return [result for batches_of_round in rounds for results in batches_of_round for result in results]

    def _batches(self, predictor: Predictor, processes: Processes) -> Iterable[Batch]:
        return evaluation_loader(
            self.dataset,
            predictor.transform,
            batch_size=self.batch_size,
            workers=self.workers,
            size_divisor=predictor.model.size_divisor,
            pin_memory=predictor.device.type == "cuda",
            rank=processes.rank,
            world=processes.world,
        )


def coco_results(predictor: Predictor, batch: Batch) -> list[Result]:
    """Return the COCO results of a batch, by image and then by descending score."""
    (results,) = _results_of(predictor, [batch])
    return results


def _results_of(predictor: Predictor, batches: Iterable[Batch]) -> Iterator[list[Result]]:
    """Yield the COCO results of each batch. The masks of a batch are encoded while a GPU computes the next one."""
    previous: Callable[[], list[Result]] | None = None
    for batch in batches:
        started = partial(_encoded, batch, predictor.start(batch))
        if previous is not None:
            yield previous()
        previous = started
    if previous is not None:
        yield previous()


def _encoded(batch: Batch, finish: Callable[[], list[Instances]]) -> list[Result]:
    instances = zip(batch.image_ids, finish(), strict=True)
    return [result for image_id, detections in instances for result in detections.to_coco(image_id)]


def report(
    ground_truth: dict[str, Any] | Path,
    results: Sequence[Result],
    out: Path | None,
    *,
    backend: Backend,
    iou_types: Sequence[IouType] = ("bbox", "segm"),
    max_detections: int = 100,
    metrics: Mapping[str, Metric] | None = None,
) -> Evaluation:
    """Compute box and mask AP and the given metrics, log the tables, and write `metrics.json`.

    Args:
        ground_truth: COCO annotations, or the path of an annotation file.
        results: detections in COCO's results format.
        out: folder of `metrics.json`; None writes no file.
        backend: implementation of the COCO evaluation.
        iou_types: what to evaluate. Masks are not evaluated if no result has one.
        max_detections: limit on detections per image and class, at least 100.
        metrics: further metrics by name.
    """
    evaluation = evaluate(ground_truth, results, iou_types, (1, 10, max_detections), backend=backend, metrics=metrics)
    logger.info("%s\n\n%s", evaluation.format_class_table(), evaluation.format_table())
    ap50 = [figures.ap50 for figures in (evaluation.box, evaluation.mask) if figures is not None]
    if all(map(math.isnan, ap50)):
        logger.warning("The ground truth has no objects, so there is no AP.")
    elif not any(value > 0 for value in ap50):
        logger.warning("AP50 is 0. %s", diagnose(ground_truth, results) or "Nothing was detected.")
    if out is not None:
        write_text(out / "metrics.json", json_text(evaluation.to_dict(), indent=2) + "\n")
    return evaluation
