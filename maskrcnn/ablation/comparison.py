"""Compare one variant with the baseline: differences with confidence intervals, and a sentence that states them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from maskrcnn.ablation.measurement import RunResult
from maskrcnn.evaluation.bootstrap import Interval
from maskrcnn.visualization.svg import typeset


@dataclass(frozen=True)
class Difference:
    """A metric of the variant minus the baseline's, over the seeds that both have finished."""

    interval: Interval  # of the mean over seeds; from the paired bootstrap over images
    by_seed: Mapping[int, float]


def compare(variant: Sequence[RunResult], baseline: Sequence[RunResult], *, confidence: float) -> dict[str, Difference]:
    """Return the difference of every COCO metric of both, by name; empty if they have no finished seed in common.

    The bootstrap uses the same resamples of the images for both sides, and the mean over the seeds.
    """
    baseline_by_seed = {run.run.seed: run for run in baseline}
    pairs = [(run, baseline_by_seed[run.run.seed]) for run in variant if run.run.seed in baseline_by_seed]
    if not pairs:
        return {}
    common = [key for key in pairs[0][0].resampled if key in pairs[0][1].resampled]
    return {key: _difference(pairs, key, confidence) for key in common}


def _difference(pairs: Sequence[tuple[RunResult, RunResult]], key: str, confidence: float) -> Difference:
    by_seed = {run.run.seed: run.figures[key] - baseline.figures[key] for run, baseline in pairs}
    resampled = np.mean([run.resampled[key] - baseline.resampled[key] for run, baseline in pairs], axis=0)
    return Difference(Interval.of(float(np.mean(list(by_seed.values()))), resampled, confidence), by_seed)


def sentence(variant: str, baseline: str, figure: str, difference: Difference, confidence: float) -> str:
    """Return a sentence that says whether the variant is better, worse, or not told apart from the baseline.

    Args:
        variant, baseline: the names of the variants.
        figure: the display name of the metric, such as `mask AP`.
        difference: the difference of that metric.
        confidence: the confidence level of the interval, 0..1.
    """
    interval, seeds = difference.interval, list(difference.by_seed.values())
    interval_name = f"{share(confidence)} interval"
    if math.isnan(interval.value):
        return f"{variant} cannot be compared with {baseline}: the ground truth has nothing to measure {figure} on."
    if interval.verdict == "not told apart":
        low, high = signed_points(interval.low), signed_points(interval.high)
        above = _count(sum(value > 0 for value in seeds), len(seeds), "above")
        return (
            f"{variant} is not told apart from {baseline} by this data: {signed_points(interval.value)} points of "
            f"{figure} ({interval_name} {low} to {high}; {above})."
        )
    sign = 1 if interval.verdict == "better" else -1
    size, *ends = (points(sign * value) for value in (interval.value, interval.low, interval.high))
    low, high = ends[::sign]
    agree = _count(sum(sign * value > 0 for value in seeds), len(seeds), "agree")
    return (
        f"{variant} is {interval.verdict} than {baseline} by {size} points of {figure} "
        f"({interval_name} {low} to {high}; {agree})."
    )


def _count(count: int, seeds: int, verb: str) -> str:
    return "one seed" if seeds == 1 else f"{count} of {seeds} seeds {verb}"


def share(value: float) -> str:
    """Format a fraction as a percentage, such as `95%`, without trailing zeros."""
    return f"{100 * value:g}%"


def points(value: float) -> str:
    """Format a fraction as percentage points with one decimal; positive values have no sign."""
    return typeset(f"{100 * value:.1f}")


def signed_points(value: float) -> str:
    """Format a fraction as percentage points with one decimal and a sign."""
    return typeset(f"{100 * value:+.1f}")
