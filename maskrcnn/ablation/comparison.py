"""One variant against the baseline: differences with their intervals, and a sentence that says what they mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from maskrcnn.ablation.measurement import RunResult
from maskrcnn.evaluation.bootstrap import Interval


@dataclass(frozen=True)
class Difference:
    """A figure of the variant minus the baseline's, over the seeds that both have finished."""

    interval: Interval  # seeds averaged; from the paired bootstrap over images
    by_seed: Mapping[int, float]


def compare(variant: Sequence[RunResult], baseline: Sequence[RunResult], *, confidence: float) -> dict[str, Difference]:
    """Return the difference of every figure; empty if the two share no finished seed.

    Both are resampled with the same images, and the seeds of each are averaged.
    """
    others = {run.run.seed: run for run in baseline}
    pairs = [(run, others[run.run.seed]) for run in variant if run.run.seed in others]
    return {key: _difference(pairs, key, confidence) for key in pairs[0][0].figures} if pairs else {}


def _difference(pairs: Sequence[tuple[RunResult, RunResult]], key: str, confidence: float) -> Difference:
    by_seed = {one.run.seed: one.figures[key] - other.figures[key] for one, other in pairs}
    resampled = np.mean([one.resampled[key] - other.resampled[key] for one, other in pairs], axis=0)
    return Difference(Interval.of(float(np.mean(list(by_seed.values()))), resampled, confidence), by_seed)


def sentence(variant: str, baseline: str, figure: str, difference: Difference, confidence: float) -> str:
    """Say in plain words whether the variant is better, worse, or not told apart.

    Args:
        variant, baseline: their names.
        figure: the name of the figure, for people.
        difference: of that figure.
        confidence: of the interval, 0..1.
    """
    interval, seeds = difference.interval, list(difference.by_seed.values())
    name = f"{share(confidence)} interval"
    if math.isnan(interval.value):
        return f"{variant} cannot be compared with {baseline}: the ground truth has nothing to measure {figure} on."
    if interval.verdict == "not told apart":
        low, high = signed_points(interval.low), signed_points(interval.high)
        above = _count(sum(value > 0 for value in seeds), len(seeds), "above")
        return (
            f"{variant} is not told apart from {baseline} by this data: {signed_points(interval.value)} points of "
            f"{figure} ({name} {low} to {high}; {above})."
        )
    sign = 1 if interval.verdict == "better" else -1
    size, *ends = (points(sign * value) for value in (interval.value, interval.low, interval.high))
    low, high = ends[::sign]
    agree = _count(sum(sign * value > 0 for value in seeds), len(seeds), "agree")
    return (
        f"{variant} is {interval.verdict} than {baseline} by {size} points of {figure} "
        f"({name} {low} to {high}; {agree})."
    )


def _count(some: int, seeds: int, what: str) -> str:
    return "one seed" if seeds == 1 else f"{some} of {seeds} seeds {what}"


def share(value: float) -> str:
    """Write a share as a percentage with the digits that it has."""
    return f"{100 * value:g}%"


def points(value: float) -> str:
    """Write a share as percent points, without a sign where it is positive."""
    return typeset(f"{100 * value:.1f}")


def signed_points(value: float) -> str:
    """Write a share as percent points with its sign."""
    return typeset(f"{100 * value:+.1f}")


def typeset(number: str) -> str:
    """Give a number the minus sign of prose, which is as wide as a plus."""
    return number.replace("-", "\N{MINUS SIGN}")
