"""Curves over training iterations: build them from records, average them over seeds, thin them for drawing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

DRAWN = 150  # points per drawn curve; more enlarge the file without a visible difference


@dataclass(frozen=True)
class Curve:
    """Values measured at iterations, in ascending order of the iteration."""

    iterations: tuple[float, ...]
    values: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.values)

    def thinned(self, points: int = DRAWN) -> Curve:
        """Return a curve with at most `points` points: the means over sections of equal length."""
        if len(self) <= points:
            return self
        return Curve(*(_means(axis, points) for axis in (self.iterations, self.values)))


def curve_of(pairs: Iterable[tuple[int, float | None]]) -> Curve:
    """Return the curve of (iteration, value) pairs; values of None, which the records use for nan, are left out."""
    measured = [(iteration, value) for iteration, value in pairs if value is not None]
    return Curve(tuple(iteration for iteration, _ in measured), tuple(value for _, value in measured))


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Return the mean of the curves of several seeds, at the iterations that all of them have."""
    by_iteration = [dict(zip(curve.iterations, curve.values, strict=True)) for curve in curves]
    common = sorted(set.intersection(*map(set, by_iteration)))
    means = [sum(values[iteration] for values in by_iteration) / len(curves) for iteration in common]
    return Curve(tuple(common), tuple(means))


def _means(values: Sequence[float], pieces: int) -> tuple[float, ...]:
    return tuple(float(piece.mean()) for piece in np.array_split(np.array(values), pieces))
