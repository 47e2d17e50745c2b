"""Matches of detections to ground-truth objects, from which COCO's average precision is computed.

Shapes: I images and K categories, both in ascending order of id; G evaluated objects, D detections; A area ranges (all,
small, medium, large); T IoU thresholds (0.50, 0.55, ..., 0.95), R recall levels (0, 0.01, ..., 1).
"""

from __future__ import annotations

import dataclasses
import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools import mask as cocoapi
from pycocotools.cocoeval import Params

from maskrcnn.errors import InputError
from maskrcnn.evaluation.preparation import (
    IouType,
    check_references,
    coco_detections,
    coco_objects,
    measurable,
    read_ground_truth,
)
from maskrcnn.runtime.files import write_atomically

# Taken from pycocotools, so that values exactly on a threshold or recall level are rounded in the same way.
THRESHOLDS = np.minimum(Params("bbox").iouThrs, 1 - 1e-10)  # (T,)
RECALLS = Params("bbox").recThrs  # (R,)
AREAS = np.array(Params("bbox").areaRng)  # (A, 2): minimum and maximum area in square pixels, both inclusive

EVERY = 2 ** len(THRESHOLDS) - 1  # bit mask of all thresholds

# Exceptions of `np.load` for a damaged or unrelated file.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)


class Figure(NamedTuple):
    """A metric as the mean over a part of COCO's precision table: an area range and IoU thresholds, by index."""

    area: int
    thresholds: tuple[int, ...]


_ALL_THRESHOLDS = tuple(range(len(THRESHOLDS)))
FIGURES = {
    "AP": Figure(0, _ALL_THRESHOLDS),
    "AP50": Figure(0, (0,)),
    "AP75": Figure(0, (5,)),
    "APs": Figure(1, _ALL_THRESHOLDS),
    "APm": Figure(2, _ALL_THRESHOLDS),
    "APl": Figure(3, _ALL_THRESHOLDS),
}


@dataclass(frozen=True, eq=False)
class Matches:
    """The detections of one set of results, matched to objects at each IoU threshold, and the ground-truth objects.

    Detections are sorted as in pycocotools: by category, then by descending score, then by image. Objects are sorted by
    category; objects outside all area ranges (crowds) are excluded. Bit `t` belongs to threshold `t`. A detection that
    is neither a true positive nor ignored is a false positive.
    """

    image_ids: np.ndarray  # (I,) int64
    category_ids: np.ndarray  # (K,) int64
    object_images: np.ndarray  # (G,) int32: index into `image_ids`
    object_categories: np.ndarray  # (G,) int32: index into `category_ids`
    object_areas: np.ndarray  # (G, A) bool: whether the object is evaluated in the area range
    images: np.ndarray  # (D,) int32: index into `image_ids`
    categories: np.ndarray  # (D,) int32: index into `category_ids`
    scores: np.ndarray  # (D,) float64
    true_positives: np.ndarray  # (D, A) uint16: bits
    ignored: np.ndarray  # (D, A) uint16: bits

    def save(self, path: Path) -> None:
        """Write a NumPy archive atomically."""
        arrays = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        write_atomically(path, lambda file: np.savez_compressed(file, **arrays))

    @classmethod
    def load(cls, path: Path) -> Matches:
        """Read a file that `save` wrote.

        Raises:
            InputError: the file cannot be read, or is not an archive of matches.
        """
        try:
            archive = np.load(path, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("no archive")
            with archive:
                return cls(**{field.name: archive[field.name] for field in dataclasses.fields(cls)})
        except UNREADABLE as error:
            raise InputError(
                f"{path.absolute()}: cannot read the stored matches ({error}); delete the file to compute them again"
            ) from error

    def figures(self) -> dict[str, float]:
        """Return COCO metrics, bit-identical to those of pycocotools; nan where there are no objects."""
        precision = self._precision()
        means = {}
        for name, (area, thresholds) in FIGURES.items():
            # (T, R, K), the order of pycocotools, because the rounding of the mean depends on the order.
            cells = precision[area, list(thresholds)]
            means[name] = float(np.mean(cells[cells > -1])) if (cells > -1).any() else math.nan
        return means

    def _precision(self) -> np.ndarray:
        """Return COCO's precision table (A, T, R, K); -1 for categories without objects."""
        table = np.full((len(AREAS), len(THRESHOLDS), len(RECALLS), len(self.category_ids)), -1.0)
        for k, (objects, detections) in enumerate(self.by_category()):
            for area, count in enumerate(self.object_areas[objects].sum(axis=0)):
                if count == 0:
                    continue
                positives, ignored = self.true_positives[detections, area], self.ignored[detections, area]
                for t in range(len(THRESHOLDS)):
                    table[area, t, :, k] = _precision_at_recalls(
                        at_threshold(positives, t), at_threshold(ignored, t), count
                    )
        return table

    def by_category(self) -> Iterator[tuple[slice, slice]]:
        """Yield the slice of the objects and the slice of the detections of each category."""
        bounds = np.arange(len(self.category_ids) + 1)
        objects = np.searchsorted(self.object_categories, bounds).tolist()
        detections = np.searchsorted(self.categories, bounds).tolist()
        for k in range(len(self.category_ids)):
            yield slice(objects[k], objects[k + 1]), slice(detections[k], detections[k + 1])

    def image_scores(self, min_score: float) -> np.ndarray:
        """Return the F1 score of each image, (I,) from 0 to 1, for sorting images by quality.

        F1 = 2 TP / (detections + objects) is computed over all categories from the detections with at least
        `min_score`, and averaged over the IoU thresholds. It is 1 for an image without detections and objects.
        """
        selected = self.scores >= min_score
        images, positives, ignored = self.images[selected], self.true_positives[selected, 0], self.ignored[selected, 0]
        num_objects = self._count_by_image(self.object_images[self.object_areas[:, 0]])
        scores = []
        for t in range(len(THRESHOLDS)):
            num_positives = self._count_by_image(images[at_threshold(positives, t)])
            total = self._count_by_image(images[~at_threshold(ignored, t)]) + num_objects
            scores.append(np.where(total > 0, 2 * num_positives / np.maximum(total, 1), 1.0))
        return np.mean(scores, axis=0)

    def _count_by_image(self, images: np.ndarray) -> np.ndarray:
        return np.bincount(images, minlength=len(self.image_ids))


def at_threshold(bits: np.ndarray, threshold: int) -> np.ndarray:
    """Return the bits of one threshold as bool, in the shape of `bits`."""
    return (bits >> threshold & 1).astype(np.bool_)


def _precision_at_recalls(true_positives: np.ndarray, ignored: np.ndarray, objects: int) -> np.ndarray:
    """Return the interpolated precision at each recall level, (R,): the maximum at this or a higher recall.

    Args:
        true_positives: (D,) bool, for the detections of one category by descending score.
        ignored: (D,) bool, detections that are not evaluated.
        objects: number of objects.
    """
    # Recall changes only at true positives, so the precision is computed only there.
    positives = np.arange(1, true_positives.sum() + 1)
    counted = np.cumsum(~ignored)[true_positives]
    precision = np.maximum.accumulate((positives / (counted + np.spacing(1)))[::-1])[::-1]
    return np.append(precision, 0.0)[np.searchsorted(positives / objects, RECALLS, side="left")]


# ---- From results to matches


def match_results(
    ground_truth: dict[str, Any] | Path,
    results: Sequence[dict[str, Any]],
    iou_type: IouType,
    max_detections: int = 100,
) -> Matches:
    """Match results to ground-truth objects as pycocotools does. IoUs are computed by pycocotools.

    Args:
        ground_truth: an annotation file in COCO format or its content; it is not changed.
        results: as returned by `coco_results` and `read_results`; they are not changed.
        iou_type: `bbox` matches boxes, `segm` masks.
        max_detections: limit on detections per image and category; those with the highest scores are used.

    Raises:
        InputError: the annotation file is invalid, or the results do not match the ground truth.
    """
    data = read_ground_truth(ground_truth)
    check_references(data, results)
    measurable([iou_type], results)
    index = _GroundTruthIndex.of(data)
    objects = _Columns.of(coco_objects(iou_type, data["annotations"]), iou_type, index)
    detections = _Columns.of(coco_detections(iou_type, results), iou_type, index)
    detections = detections.take(np.flatnonzero(_ranks(detections.groups) < max_detections))

    evaluated = _in_area_ranges(objects) & ~objects.crowds[:, None]
    true_positives, ignored = _assign(_overlapping_pairs(detections, objects), detections, objects, evaluated)
    unmatched = EVERY & ~(true_positives | ignored)
    ignored |= np.where(_in_area_ranges(detections), np.uint16(0), unmatched)

    order = np.lexsort((-detections.scores, detections.categories))  # stable: images stay in order
    in_any_range = evaluated.any(axis=1)
    return Matches(
        image_ids=index.image_ids,
        category_ids=index.category_ids,
        object_images=objects.images[in_any_range],
        object_categories=objects.categories[in_any_range],
        object_areas=evaluated[in_any_range],
        images=detections.images[order],
        categories=detections.categories[order],
        scores=detections.scores[order],
        true_positives=true_positives[order],
        ignored=ignored[order],
    )


class _GroundTruthIndex(NamedTuple):
    """The images and categories of the ground truth."""

    image_ids: np.ndarray  # (I,) int64, ascending
    category_ids: np.ndarray  # (K,) int64, ascending
    sizes: dict[int, tuple[int, int]]  # height and width of each image

    @classmethod
    def of(cls, data: dict[str, Any]) -> _GroundTruthIndex:
        images, categories = ([entry["id"] for entry in data[key]] for key in ("images", "categories"))
        sizes = {image["id"]: (image["height"], image["width"]) for image in data["images"]}
        return cls(np.unique(np.array(images, np.int64)), np.unique(np.array(categories, np.int64)), sizes)


@dataclass(frozen=True)
class _Columns:
    """Objects or detections as n-element columns, sorted by group and then by descending score.

    A group contains the objects or detections of one category in one image.
    """

    images: np.ndarray  # (n,) int32
    categories: np.ndarray  # (n,) int32
    groups: np.ndarray  # (n,) int64, ordered by category and then by image
    scores: np.ndarray  # (n,) float64; 0 for objects
    areas: np.ndarray  # (n,) float64
    crowds: np.ndarray  # (n,) bool
    shapes: np.ndarray  # (n, 4) float64 boxes, or (n,) run-length codes

    @classmethod
    def of(cls, rows: list[dict[str, Any]], iou_type: IouType, index: _GroundTruthIndex) -> _Columns:
        """Convert and sort the rows of known images and categories; the sort is stable."""
        known = set(index.category_ids.tolist())
        rows = [row for row in rows if row["image_id"] in index.sizes and row["category_id"] in known]
        images = np.searchsorted(index.image_ids, np.array([row["image_id"] for row in rows], np.int64))
        categories = np.searchsorted(index.category_ids, np.array([row["category_id"] for row in rows], np.int64))
        columns = cls(
            images=images.astype(np.int32),
            categories=categories.astype(np.int32),
            groups=categories * len(index.image_ids) + images,
            scores=np.array([row.get("score", 0) for row in rows], np.float64),
            areas=np.array([row["area"] for row in rows], np.float64),
            crowds=np.array([row["iscrowd"] for row in rows], np.bool_),
            shapes=_shapes(rows, iou_type, index),
        )
        return columns.take(np.lexsort((-columns.scores, columns.groups)))

    def take(self, order: np.ndarray) -> _Columns:
        return _Columns(**{field.name: getattr(self, field.name)[order] for field in dataclasses.fields(self)})


def _shapes(rows: list[dict[str, Any]], iou_type: IouType, index: _GroundTruthIndex) -> np.ndarray:
    if iou_type == "bbox":
        return np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)
    return np.fromiter((_compressed_rle(row["segmentation"], *index.sizes[row["image_id"]]) for row in rows), object)


def _compressed_rle(mask: Any, height: int, width: int) -> dict[str, Any]:
    """Return polygons or RLE as compressed RLE."""
    if isinstance(mask, list):
        return cocoapi.merge(cocoapi.frPyObjects(mask, height, width))
    return cocoapi.frPyObjects(mask, height, width) if isinstance(mask["counts"], list) else mask


def _ranks(groups: np.ndarray) -> np.ndarray:
    """Return the position of each entry within its group, from 0; `groups` is sorted."""
    return np.arange(len(groups)) - np.searchsorted(groups, groups, side="left")


def _in_area_ranges(columns: _Columns) -> np.ndarray:
    """Return whether each entry lies in each area range, (n, A) bool."""
    return (columns.areas[:, None] >= AREAS[:, 0]) & (columns.areas[:, None] <= AREAS[:, 1])


class _Pairs(NamedTuple):
    """Pairs of a detection and an object of the same group, with an IoU of at least the lowest threshold."""

    detections: np.ndarray  # (n,) int64: index of the detection
    objects: np.ndarray  # (n,) int64: index of the object
    ious: np.ndarray  # (n,) float64


def _overlapping_pairs(detections: _Columns, objects: _Columns) -> _Pairs:
    """Return the pairs, sorted by detection, then by descending IoU, then by descending object index."""
    shared = np.intersect1d(detections.groups, objects.groups)
    bounds = [
        np.searchsorted(columns.groups, shared, side).tolist()
        for columns in (detections, objects)
        for side in ("left", "right")
    ]
    crowds = objects.crowds.astype(np.uint8)
    group_pairs = [_Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
    for d, d_end, g, g_end in zip(*bounds, strict=True):
        ious = cocoapi.iou(_iou_input(detections.shapes[d:d_end]), _iou_input(objects.shapes[g:g_end]), crowds[g:g_end])
        rows, columns = np.nonzero(ious >= THRESHOLDS[0])
        group_pairs.append(_Pairs(rows + d, columns + g, ious[rows, columns]))
    pairs = _Pairs(*map(np.concatenate, zip(*group_pairs, strict=True)))
    order = np.lexsort((-pairs.objects, -pairs.ious, pairs.detections))
    return _Pairs(*(column[order] for column in pairs))


def _iou_input(shapes: np.ndarray) -> np.ndarray | list[dict[str, Any]]:
    return shapes if shapes.ndim == 2 else shapes.tolist()  # pycocotools takes an array of boxes or a list of RLE


def _assign(
    pairs: _Pairs, detections: _Columns, objects: _Columns, evaluated: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Match each detection, by descending score, to the unmatched object with the highest IoU.

    This is done for each threshold and each area range. Evaluated objects take precedence over the others. A crowd can
    be matched repeatedly. All thresholds and area ranges are processed at once, as the bits of one integer.

    Args:
        pairs: as `_overlapping_pairs` returns them.
        detections, objects: the entries that `pairs` refers to.
        evaluated: (G, A) bool, whether the object is evaluated in the area range.

    Returns:
        True positives, and detections that match an object that is not evaluated, both (D, A) uint16 of bits.
    """
    num_passed = np.searchsorted(THRESHOLDS, pairs.ious, side="right")  # thresholds that the IoU reaches
    one_per_area = sum(1 << 16 * area for area in range(len(AREAS)))
    passed_bits = [((1 << count) - 1) * one_per_area for count in range(len(THRESHOLDS) + 1)]
    evaluated_bits = [sum(EVERY << 16 * area for area in np.flatnonzero(row).tolist()) for row in evaluated]
    is_crowd = objects.crowds.tolist()
    taken = [0] * len(objects.groups)
    true_positives, ignored = [0] * len(detections.groups), [0] * len(detections.groups)
    rows = zip(pairs.detections.tolist(), pairs.objects.tolist(), num_passed.tolist(), strict=True)
    for d, group in groupby(rows, key=itemgetter(0)):
        candidates = [(g, passed_bits[count]) for _, g, count in group]
        unmatched = EVERY * one_per_area
        for g, passed in candidates:
            matched = passed & evaluated_bits[g] & unmatched & ~taken[g]
            taken[g] |= matched
            true_positives[d] |= matched
            unmatched ^= matched
        for g, passed in candidates:
            matched = passed & ~evaluated_bits[g] & unmatched & (unmatched if is_crowd[g] else ~taken[g])
            taken[g] |= matched
            ignored[d] |= matched
            unmatched ^= matched
    return _unpack_areas(true_positives), _unpack_areas(ignored)


def _unpack_areas(bits: list[int]) -> np.ndarray:
    """Split each integer into the bits of each area range, (n, A) uint16."""
    shifts = np.arange(len(AREAS), dtype=np.uint64) * np.uint64(16)
    return (np.array(bits, np.uint64)[:, None] >> shifts & np.uint64(EVERY)).astype(np.uint16)
