"""Curves over the iterations of a training: read from its records, averaged over seeds, thinned for drawing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

DRAWN = 150  # points of a curve in a picture: more would only make the file larger


@dataclass(frozen=True)
class Curve:
    """A value that was measured at some iterations, in ascending order."""

    iterations: tuple[float, ...]
    values: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.values)

    def thinned(self, points: int = DRAWN) -> Curve:
        """Return at most `points` points: means over equal stretches of the curve."""
        if len(self) <= points:
            return self
        return Curve(*(_means(axis, points) for axis in (self.iterations, self.values)))


def curve_of(pairs: Iterable[tuple[int, float | None]]) -> Curve:
    """Return the curve through (iteration, value); None, which stands for nan in the records, is left out."""
    measured = [(iteration, value) for iteration, value in pairs if value is not None]
    return Curve(tuple(iteration for iteration, _ in measured), tuple(value for _, value in measured))


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """Return the mean over seeds, at the iterations that all of them have."""
    tables = [dict(zip(curve.iterations, curve.values, strict=True)) for curve in curves]
    common = sorted(set.intersection(*(set(table) for table in tables)))
    return Curve(tuple(common), tuple(sum(table[at] for table in tables) / len(tables) for at in common))


def _means(values: Sequence[float], pieces: int) -> tuple[float, ...]:
    return tuple(float(piece.mean()) for piece in np.array_split(np.array(values), pieces))
