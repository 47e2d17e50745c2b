"""What one finished run measured: its figures, its cost, its curves, and what to resample.

Figures are named as in `Evaluation.summary()` (`mask/AP`, `box/APs`, ...) and lie in 0..1; nan where the ground truth
holds nothing to measure.

Shapes: I images of the validation set, N resamples of them.
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
from maskrcnn.evaluation.bootstrap import draw_counts, resampled_figures
from maskrcnn.evaluation.matches import Matches, match_results
from maskrcnn.evaluation.preparation import IouType
from maskrcnn.evaluation.results import read_results
from maskrcnn.training.metrics import Record, read_records

PARTS: Mapping[str, IouType] = {"mask": "segm", "box": "bbox"}
RESAMPLING_SEED = 0  # one for all: every run is measured on the same resamples


@dataclass(frozen=True)
class Cost:
    """What a run took; nan where its records do not say."""

    training: float  # images per second, the median over the steps on record
    inference: float  # images per second of the last evaluation
    memory: float  # peak, bytes


@dataclass(frozen=True)
class RunResult:
    """One finished run, measured."""

    run: Run
    matches: Mapping[str, Matches]  # of each of `PARTS`
    figures: Mapping[str, float]
    resampled: Mapping[str, np.ndarray]  # the same figures on each resample of the images, (N,)
    cost: Cost
    loss: Curve
    metric: Curve  # the figure that decides


def results_file(run: Run) -> Path:
    """Where the run keeps what its final weights found, in COCO's format."""
    return run.directory.evaluation / "results.json"


def measure(run: Run, ground_truth: dict[str, Any], *, metric: str, resamples: int) -> RunResult:
    """Measure a finished run against the ground truth of its validation set."""
    figures: dict[str, float] = {}
    resampled: dict[str, np.ndarray] = {}
    matches = {part: load_matches(run, part, ground_truth) for part in PARTS}
    for part, found in matches.items():
        counts = draw_counts(len(found.image_ids), resamples, RESAMPLING_SEED)
        figures |= {f"{part}/{name}": value for name, value in found.figures().items()}
        resampled |= {f"{part}/{name}": values for name, values in resampled_figures(found, counts).items()}
    records = read_records(run.directory.metrics)
    steps = [record for record in records if record["kind"] == "train"]
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    loss = curve_of((record["iteration"], record["loss"]) for record in steps)
    course = curve_of((record["iteration"], record["metrics"].get(metric)) for record in evaluations)
    return RunResult(run, matches, figures, resampled, _cost(steps, evaluations), loss, course)


def load_matches(run: Run, part: str, ground_truth: dict[str, Any]) -> Matches:
    """Match the run's detections to the ground truth, or read what was matched since they were written."""
    stored, results = run.directory.evaluation / f"matches_{part}.npz", results_file(run)
    if stored.exists() and stored.stat().st_mtime_ns >= results.stat().st_mtime_ns:
        return Matches.load(stored)
    matches = match_results(ground_truth, read_results(results), PARTS[part])
    matches.save(stored)
    return matches


def _cost(steps: Sequence[Record], evaluations: Sequence[Record]) -> Cost:
    speeds, memory = _recorded(steps, "images_per_second"), _recorded(steps, "peak_memory")
    return Cost(
        training=statistics.median(speeds) if speeds else math.nan,
        inference=next(reversed(_recorded(evaluations, "images_per_second")), math.nan),
        memory=max(memory, default=math.nan),
    )


def _recorded(records: Sequence[Record], key: str) -> list[float]:
    """The values of a key that not every record has."""
    return [record[key] for record in records if record.get(key) is not None]
