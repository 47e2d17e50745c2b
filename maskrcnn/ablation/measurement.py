"""Measure one finished run: its metrics, their bootstrap resamples, its cost and its curves.

Metrics (`figures`) are named as in `Evaluation.summary()` (`mask/AP`, `box/APs`, ...). COCO's lie in 0..1, or are nan
if the ground truth has no object to evaluate them on. Those of `evaluation.metrics` are read from the records of the
run; they have no resamples, because they cannot be computed from matches.

Shapes: N bootstrap resamples of the validation images.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from maskrcnn.ablation.curves import Curve, curve_of
from maskrcnn.ablation.plan import Run
from maskrcnn.engine.metrics import Record, read_records
from maskrcnn.evaluation.bootstrap import draw_counts, resampled_figures
from maskrcnn.evaluation.matches import Matches, match_results
from maskrcnn.evaluation.preparation import IouType
from maskrcnn.evaluation.results import read_results

PARTS: Mapping[str, IouType] = {"mask": "segm", "box": "bbox"}
RESAMPLING_SEED = 0  # shared, so that every run is evaluated on the same resamples


@dataclass(frozen=True)
class Cost:
    """The speed and memory of a run; nan if its records lack them."""

    training: float  # images per second, the median over the recorded steps
    inference: float  # images per second, in the last evaluation
    memory: float  # peak, in bytes


@dataclass(frozen=True)
class RunResult:
    """The measurements of one finished run."""

    run: Run
    matches: Mapping[str, Matches]  # by `Run.parts`
    figures: Mapping[str, float]
    resampled: Mapping[str, np.ndarray]  # (N,): each COCO metric on every resample of the images
    cost: Cost
    loss: Curve
    metric: Curve  # of the primary metric, over the evaluations


def results_file(run: Run) -> Path:
    """Return the path of the detections of the run's final weights, in COCO's results format."""
    return run.directory.evaluation / "results.json"


def measure(run: Run, ground_truth: dict[str, Any], *, metric: str, resamples: int) -> RunResult:
    """Measure a finished run against the ground truth of its validation set.

    Args:
        run: a finished run.
        ground_truth: of the validation set, in COCO's format.
        metric: name of the primary metric, such as `mask/AP`.
        resamples: number of bootstrap resamples of the images.
    """
    figures: dict[str, float] = {}
    resampled: dict[str, np.ndarray] = {}
    matches_by_part = {part: load_matches(run, part, ground_truth) for part in run.parts}
    for part, matches in matches_by_part.items():
        counts = draw_counts(len(matches.image_ids), resamples, RESAMPLING_SEED)
        figures |= {f"{part}/{name}": value for name, value in matches.figures().items()}
        resampled |= {f"{part}/{name}": values for name, values in resampled_figures(matches, counts).items()}
    records = read_records(run.directory.metrics)
    steps = [record for record in records if record["kind"] == "train"]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    loss_curve = curve_of((record["iteration"], record["loss"]) for record in steps)
    metric_curve = curve_of((record["iteration"], record["metrics"].get(metric)) for record in evaluations)
    figures |= _other_figures(evaluations)
    cost = _cost(steps, evaluations)
    return RunResult(run, matches_by_part, figures, resampled, cost, loss_curve, metric_curve)


def load_matches(run: Run, part: str, ground_truth: dict[str, Any]) -> Matches:
    """Match the run's detections to the ground truth.

    The matches are stored beside the detections, and read from there unless the detections are newer.
    """
    stored, results = run.directory.evaluation / f"matches_{part}.npz", results_file(run)
    if stored.exists() and stored.stat().st_mtime_ns >= results.stat().st_mtime_ns:
        return Matches.load(stored)
    matches = match_results(ground_truth, read_results(results), PARTS[part], max_detections=run.config.max_detections)
    matches.save(stored)
    return matches


def _other_figures(evaluations: Sequence[Record]) -> dict[str, float]:
    """Return the metrics of the last evaluation that are not COCO's, of the weights themselves; nan for null."""
    metrics = evaluations[-1]["metrics"] if evaluations else {}
    others = {name: value for name, value in metrics.items() if name.split("/")[0] not in (*PARTS, "ema")}
    return {name: math.nan if value is None else value for name, value in others.items()}


def _cost(steps: Sequence[Record], evaluations: Sequence[Record]) -> Cost:
    speeds, memory = _recorded(steps, "images_per_second"), _recorded(steps, "peak_memory")
    return Cost(
        training=statistics.median(speeds) if speeds else math.nan,
        inference=next(reversed(_recorded(evaluations, "images_per_second")), math.nan),
        memory=max(memory, default=math.nan),
    )


def _recorded(records: Sequence[Record], key: str) -> list[float]:
    """Return the values of a key; records without it are left out."""
    return [record[key] for record in records if record.get(key) is not None]
