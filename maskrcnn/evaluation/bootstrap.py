"""How far a difference in average precision can be trusted: a paired bootstrap over images.

A resample draws as many images as there are, with replacement. AP is then computed again from stored matches, with
each image's detections and objects counted as often as the image was drawn. That is the AP of the images laid down in
so many copies, if the copies of an image stand together where scores are equal; only the order of two detections of
one category and one image with the same score is then open, and here all copies of the first come first.

Shapes: I images, K categories, N resamples, C resamples computed at a time, G objects, P true positives, T thresholds.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from maskrcnn.errors import InputError
from maskrcnn.evaluation.matches import FIGURES, RECALLS, Matches, at_threshold

COLUMNS = 128  # resamples computed at a time: the tables of most categories then stay in the processor's cache

Verdict = Literal["better", "worse", "not told apart"]


def draw_counts(images: int, resamples: int, seed: int) -> np.ndarray:
    """Return how often each image occurs in each resample, (N, I) int32; each row sums to I."""
    rng = np.random.default_rng(seed)
    counts = np.empty((resamples, images), np.int32)
    for row in counts:
        row[:] = np.bincount(rng.choice(images, images), minlength=images)
    return counts


# ---- Average precision of resamples


def resampled_figures(
    matches: Matches, counts: np.ndarray, figures: Iterable[str] = tuple(FIGURES)
) -> dict[str, np.ndarray]:
    """Return COCO's figures in each resample, each (N,) float64; nan where a resample has nothing to measure.

    Args:
        matches: of one set of results.
        counts: how often each image occurs in each resample, (N, I).
        figures: names, of `FIGURES`.
    """
    assert counts.shape[1] == len(matches.image_ids), (counts.shape, len(matches.image_ids))
    names = tuple(figures)
    curves = _curves(matches, names)
    parts = [
        _chunk(matches, curves, counts[start : start + COLUMNS], names) for start in range(0, len(counts), COLUMNS)
    ]
    return {name: np.concatenate([part[name] for part in parts]) if parts else np.empty(0) for name in names}


class _Curve(NamedTuple):
    """Precision over recall of one category, area and threshold, as far as it does not depend on the resample.

    The best precision is reached at true positives, and recall grows there alone: nothing else is computed.
    """

    found: Tensor  # (P,) the image of each true positive, best first
    counted: Tensor  # the images of the detections that count, up to the last true positive
    starts: Tensor  # (P,) where in `counted` the detections after the previous true positive begin


_Curves = dict[tuple[int, int], list[_Curve]]  # of an area and a threshold, by category


def _curves(matches: Matches, names: Sequence[str]) -> _Curves:
    cells = {(FIGURES[name].area, t) for name in names for t in FIGURES[name].thresholds}
    slices = [detections for _, detections in matches.by_category()]
    return {(area, t): [_curve(matches, detections, area, t) for detections in slices] for area, t in sorted(cells)}


def _curve(matches: Matches, detections: slice, area: int, threshold: int) -> _Curve:
    counts = ~at_threshold(matches.ignored[detections, area], threshold)
    images = matches.images[detections][counts]
    places = np.flatnonzero(at_threshold(matches.true_positives[detections, area], threshold)[counts])
    starts = np.append(0, places[:-1] + 1) if len(places) else places
    stop = places[-1] + 1 if len(places) else 0
    return _Curve(
        found=torch.from_numpy(images[places]),
        counted=torch.from_numpy(images[:stop]),
        starts=torch.from_numpy(starts.astype(np.int32)),
    )


def _chunk(matches: Matches, curves: _Curves, counts: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
    """The figures of a few resamples, each (C,)."""
    weights = torch.from_numpy(np.ascontiguousarray(counts.T, dtype=np.float32))  # (I, C); exact below 2 ** 24
    objects = {area: _count_objects(matches, area, weights) for area in {area for area, _ in curves}}
    precision = {(area, t): _average_precision(row, weights, objects[area]) for (area, t), row in curves.items()}
    figures = {}
    for name in names:
        area, thresholds = FIGURES[name]
        by_category = torch.stack([precision[area, t] for t in thresholds]).mean(dim=0)  # (T, K, C) -> (K, C)
        measured = (objects[area] > 0).sum(dim=0)  # the precision of the other categories is 0: they have nothing right
        figures[name] = (by_category.sum(dim=0) / measured).numpy()  # 0 / 0 is nan
    return figures


def _count_objects(matches: Matches, area: int, weights: Tensor) -> Tensor:
    """(K, C) float64: objects of each category in each resample."""
    counts = matches.object_areas[:, area]
    images, categories = (
        torch.from_numpy(index[counts]) for index in (matches.object_images, matches.object_categories)
    )
    totals = weights.new_zeros(len(matches.category_ids), weights.shape[1])
    return totals.index_add_(0, categories, weights[images]).double()


def _average_precision(curves: Sequence[_Curve], weights: Tensor, objects: Tensor) -> Tensor:
    """(K, C) float64: the mean precision over the recall levels.

    Args:
        curves: of each category.
        weights: (I, C), how often each image occurs.
        objects: (K, C), how many there are to find.
    """
    means = torch.zeros_like(objects)
    for k, curve in enumerate(curves):
        if len(curve.found) > 0:
            means[k] = _area_under(curve, weights, objects[k])
    return means


def _area_under(curve: _Curve, weights: Tensor, objects: Tensor) -> Tensor:
    """(C,): the mean precision over the recall levels for one category, whose (C,) `objects` are to find."""
    found = weights.index_select(0, curve.found).cumsum(dim=0, dtype=torch.float64)  # (P, C)
    segments = F.embedding_bag(curve.counted, weights, curve.starts, mode="sum")
    counted = segments.cumsum(dim=0, dtype=torch.float64)
    best = (found / (counted + np.spacing(1))).flip(0).cummax(dim=0).values.flip(0)
    levels = torch.bucketize(found / objects.clamp(min=1), torch.from_numpy(RECALLS), right=True)  # reached up to here
    first = torch.diff(levels, dim=0, prepend=torch.zeros_like(levels[:1]))  # reached here for the first time
    return (best * first).sum(dim=0) / len(RECALLS)


# ---- Differences


@dataclass(frozen=True)
class Interval:
    """A difference, and the interval in which it lies with the confidence asked for; nan where it is not measured."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, resampled: np.ndarray, confidence: float = 0.95) -> Interval:
        """Cut equal shares off both ends of the resampled values, (N,); those that are nan do not count."""
        tail = (1 - confidence) / 2
        measured = resampled[~np.isnan(resampled)]
        low, high = np.quantile(measured, [tail, 1 - tail]) if len(measured) else (np.nan, np.nan)
        return cls(value, float(low), float(high))

    @property
    def verdict(self) -> Verdict:
        """Whether the interval lies above 0, below 0, or on both sides."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "not told apart"


def paired_differences(
    variant: Sequence[Matches],
    baseline: Sequence[Matches],
    counts: np.ndarray,
    *,
    confidence: float = 0.95,
    figures: Iterable[str] = tuple(FIGURES),
) -> dict[str, Interval]:
    """Return variant minus baseline in each figure, with both resampled alike and the seeds of each side averaged.

    To compare many variants with one baseline, compute `resampled_figures` of each once, and `Interval.of` their
    differences.

    Args:
        variant, baseline: the matches of each seed.
        counts: how often each image occurs in each resample, (N, I).
        confidence: of the intervals, 0..1.
        figures: names, of `FIGURES`.

    Raises:
        InputError: they were not measured on the same images, categories and objects.
    """
    for matches in (*variant, *baseline):
        check_comparable(matches, baseline[0])
    names = tuple(figures)
    (value, resampled), (base_value, base_resampled) = (
        _mean_figures(side, counts, names) for side in (variant, baseline)
    )
    return {
        name: Interval.of(value[name] - base_value[name], resampled[name] - base_resampled[name], confidence)
        for name in names
    }


def _mean_figures(
    runs: Sequence[Matches], counts: np.ndarray, names: Sequence[str]
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    values = [run.figures() for run in runs]
    resampled = [resampled_figures(run, counts, names) for run in runs]
    return (
        {name: float(np.mean([each[name] for each in values])) for name in names},
        {name: np.mean([each[name] for each in resampled], axis=0) for name in names},
    )


def check_comparable(one: Matches, other: Matches) -> None:
    """Refuse to compare what was not measured on the same ground truth.

    Raises:
        InputError: it says in what the two differ.
    """
    parts = {
        "images": ("image_ids",),
        "categories": ("category_ids",),
        "objects": ("object_images", "object_categories", "object_areas"),
    }
    for name, fields in parts.items():
        if not all(np.array_equal(getattr(one, field), getattr(other, field)) for field in fields):
            raise InputError(
                f"the two sides were measured on different {name}; evaluate both with the same annotation file"
            )
