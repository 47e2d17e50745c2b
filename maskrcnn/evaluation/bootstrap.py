"""Confidence intervals of differences in average precision, by a paired bootstrap over images.

A resample draws I images with replacement. Its AP is computed from stored matches: the detections and objects of an
image are weighted by the number of times that the image was drawn. The result equals the AP of a dataset that contains
each image that many times, with the copies of an image next to each other among equal scores. If two detections of one
category and image have the same score, all copies of the first precede those of the second.

Shapes: I images, K categories, N resamples, C resamples of a chunk, G objects, P true positives, T thresholds.
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

COLUMNS = 128  # resamples per chunk; the tables of most categories then fit in the processor cache

Verdict = Literal["better", "worse", "not told apart"]


def draw_counts(images: int, resamples: int, seed: int) -> np.ndarray:
    """Return the number of times that each image occurs in each resample, (N, I) int32; each row sums to I."""
    rng = np.random.default_rng(seed)
    counts = np.empty((resamples, images), np.int32)
    for row in counts:
        row[:] = np.bincount(rng.choice(images, images), minlength=images)
    return counts


# ---- Average precision of resamples


def resampled_figures(
    matches: Matches, counts: np.ndarray, figures: Iterable[str] = tuple(FIGURES)
) -> dict[str, np.ndarray]:
    """Return the COCO metrics of each resample by name, each (N,) float64; nan for a resample without objects.

    Args:
        matches: the matches of one set of results.
        counts: (N, I), the number of times that each image occurs in each resample.
        figures: names of metrics, from `FIGURES`.
    """
    assert counts.shape[1] == len(matches.image_ids), (counts.shape, len(matches.image_ids))
    names = tuple(figures)
    curves = _curves(matches, names)
    chunks = [
        _chunk_figures(matches, curves, counts[start : start + COLUMNS], names)
        for start in range(0, len(counts), COLUMNS)
    ]
    return {name: np.concatenate([chunk[name] for chunk in chunks]) if chunks else np.empty(0) for name in names}


class _Curve(NamedTuple):
    """The detections of one category, area and threshold that define the precision-recall curve of every resample.

    Recall changes only at true positives, so the precision is computed only there.
    """

    positives: Tensor  # (P,) int32: image index of each true positive, by descending score
    counted: Tensor  # int32: image index of each detection that is not ignored, up to the last true positive
    starts: Tensor  # (P,) int32: index into `counted` of the first detection after the previous true positive


_Curves = dict[tuple[int, int], list[_Curve]]  # by area and threshold; a list over the categories


def _curves(matches: Matches, names: Sequence[str]) -> _Curves:
    cells = {(FIGURES[name].area, t) for name in names for t in FIGURES[name].thresholds}
    slices = [detections for _, detections in matches.by_category()]
    return {(area, t): [_curve(matches, detections, area, t) for detections in slices] for area, t in sorted(cells)}


def _curve(matches: Matches, detections: slice, area: int, threshold: int) -> _Curve:
    counted = ~at_threshold(matches.ignored[detections, area], threshold)
    images = matches.images[detections][counted]
    indices = np.flatnonzero(at_threshold(matches.true_positives[detections, area], threshold)[counted])
    starts = np.append(0, indices[:-1] + 1) if len(indices) else indices
    stop = indices[-1] + 1 if len(indices) else 0
    return _Curve(
        positives=torch.from_numpy(images[indices]),
        counted=torch.from_numpy(images[:stop]),
        starts=torch.from_numpy(starts.astype(np.int32)),
    )


def _chunk_figures(
    matches: Matches, curves: _Curves, counts: np.ndarray, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Return the metrics of one chunk of resamples, each (C,)."""
    weights = torch.from_numpy(np.ascontiguousarray(counts.T, dtype=np.float32))  # (I, C); exact below 2 ** 24
    objects = {area: _count_objects(matches, area, weights) for area in {area for area, _ in curves}}
    precision = {
        (area, t): _average_precision(by_category, weights, objects[area]) for (area, t), by_category in curves.items()
    }
    figures = {}
    for name in names:
        area, thresholds = FIGURES[name]
        by_category = torch.stack([precision[area, t] for t in thresholds]).mean(dim=0)  # (T, K, C) -> (K, C)
        # Categories without objects have no true positives, so they add 0 to the sum.
        num_categories = (objects[area] > 0).sum(dim=0)
        figures[name] = (by_category.sum(dim=0) / num_categories).numpy()  # 0 / 0 is nan
    return figures


def _count_objects(matches: Matches, area: int, weights: Tensor) -> Tensor:
    """Return the number of objects of each category in each resample, (K, C) float64."""
    counted = matches.object_areas[:, area]
    images, categories = (
        torch.from_numpy(index[counted]) for index in (matches.object_images, matches.object_categories)
    )
    totals = weights.new_zeros(len(matches.category_ids), weights.shape[1])
    return totals.index_add_(0, categories, weights[images]).double()


def _average_precision(curves: Sequence[_Curve], weights: Tensor, objects: Tensor) -> Tensor:
    """Return the mean precision over the recall levels, (K, C) float64.

    Args:
        curves: K curves, one per category.
        weights: (I, C), the number of times that each image occurs.
        objects: (K, C), the number of objects.
    """
    means = torch.zeros_like(objects)
    for k, curve in enumerate(curves):
        if len(curve.positives) > 0:
            means[k] = _mean_precision(curve, weights, objects[k])
    return means


def _mean_precision(curve: _Curve, weights: Tensor, objects: Tensor) -> Tensor:
    """Return the mean precision over the recall levels of one category, (C,); `objects` (C,) is its object count."""
    positives = weights.index_select(0, curve.positives).cumsum(dim=0, dtype=torch.float64)  # (P, C)
    segments = F.embedding_bag(curve.counted, weights, curve.starts, mode="sum")
    counted = segments.cumsum(dim=0, dtype=torch.float64)
    precision = (positives / (counted + np.spacing(1))).flip(0).cummax(dim=0).values.flip(0)
    # The number of recall levels reached up to each true positive, and first reached at it.
    levels = torch.bucketize(positives / objects.clamp(min=1), torch.from_numpy(RECALLS), right=True)
    new_levels = torch.diff(levels, dim=0, prepend=torch.zeros_like(levels[:1]))
    return (precision * new_levels).sum(dim=0) / len(RECALLS)


# ---- Differences


@dataclass(frozen=True)
class Interval:
    """A difference with its bootstrap confidence interval; nan where the metric is undefined."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, resampled: np.ndarray, confidence: float = 0.95) -> Interval:
        """Return the percentile interval.

        Args:
            value: the difference on the full dataset.
            resampled: (N,), the differences of the resamples; nan values are ignored.
            confidence: confidence level, 0..1.
        """
        tail = (1 - confidence) / 2
        valid = resampled[~np.isnan(resampled)]
        low, high = np.quantile(valid, [tail, 1 - tail]) if len(valid) else (np.nan, np.nan)
        return cls(value, float(low), float(high))

    @property
    def verdict(self) -> Verdict:
        """Is "better" if the interval lies above 0, "worse" if it lies below 0, and otherwise "not told apart"."""
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
    """Return the difference variant minus baseline of each metric, averaged over seeds, with confidence intervals.

    Variant and baseline use the same resamples. To compare many variants with one baseline, call `resampled_figures`
    once for each and `Interval.of` for each difference.

    Args:
        variant, baseline: the matches of each seed.
        counts: (N, I), the number of times that each image occurs in each resample.
        confidence: confidence level of the intervals, 0..1.
        figures: names of metrics, from `FIGURES`.

    Raises:
        InputError: the matches are not of the same images, categories and objects.
    """
    for matches in (*variant, *baseline):
        check_comparable(matches, baseline[0])
    names = tuple(figures)
    (value, resampled), (base_value, base_resampled) = (
        _mean_figures(runs, counts, names) for runs in (variant, baseline)
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
        {name: float(np.mean([run[name] for run in values])) for name in names},
        {name: np.mean([run[name] for run in resampled], axis=0) for name in names},
    )


def check_comparable(one: Matches, other: Matches) -> None:
    """Check that two sets of matches have the same ground truth.

    Raises:
        InputError: images, categories or objects differ.
    """
    compared_fields = {
        "images": ("image_ids",),
        "categories": ("category_ids",),
        "objects": ("object_images", "object_categories", "object_areas"),
    }
    for name, fields in compared_fields.items():
        if not all(np.array_equal(getattr(one, field), getattr(other, field)) for field in fields):
            raise InputError(
                f"the two runs were measured on different {name}; evaluate both with the same annotation file"
            )
