"""Which detections found which objects: all that COCO's average precision needs, stored image by image.

Shapes: I images and K categories, both in ascending order of id; G objects that count, D detections; A areas (all,
small, medium, large); T IoU thresholds (0.50, 0.55, ..., 0.95), R recall levels (0, 0.01, ..., 1).
"""

from __future__ import annotations

import dataclasses
import math
import os
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

# COCO's own numbers: 0.1 * 3 is not 0.3, and what lies exactly on a threshold or a level must fall on COCO's side.
THRESHOLDS = np.minimum(Params("bbox").iouThrs, 1 - 1e-10)  # (T,)
RECALLS = Params("bbox").recThrs  # (R,)
AREAS = np.array(Params("bbox").areaRng)  # (A, 2): smallest and largest area, both of them inside

EVERY = 2 ** len(THRESHOLDS) - 1  # the bits of all thresholds

UNREADABLE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)  # of `np.load`


class Figure(NamedTuple):
    """Which part of COCO's table a figure is the mean of."""

    area: int
    thresholds: tuple[int, ...]


_ALL = tuple(range(len(THRESHOLDS)))
FIGURES = {
    "AP": Figure(0, _ALL),
    "AP50": Figure(0, (0,)),
    "AP75": Figure(0, (5,)),
    "APs": Figure(1, _ALL),
    "APm": Figure(2, _ALL),
    "APl": Figure(3, _ALL),
}


@dataclass(frozen=True, eq=False)
class Matches:
    """The detections of one set of results, right or wrong at each threshold, and the objects that there were.

    Detections are in COCO's order: by category, best first, and those of one score by image. Objects are in the order
    of their categories; those that count for no area (crowds) are left out. Bit `t` of a detection's bits is that of
    threshold `t`; a detection that is neither a true positive nor ignored is a false positive.
    """

    image_ids: np.ndarray  # (I,) int64
    category_ids: np.ndarray  # (K,) int64
    object_images: np.ndarray  # (G,) int32: index into `image_ids`
    object_categories: np.ndarray  # (G,) int32: index into `category_ids`
    object_areas: np.ndarray  # (G, A) bool: whether the object counts for the area
    images: np.ndarray  # (D,) int32: index into `image_ids`
    categories: np.ndarray  # (D,) int32: index into `category_ids`
    scores: np.ndarray  # (D,) float64
    true_positives: np.ndarray  # (D, A) uint16: bits
    ignored: np.ndarray  # (D, A) uint16: bits

    def save(self, path: Path) -> None:
        """Write a NumPy archive, which appears under its name when it is complete."""
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            np.savez_compressed(file, **{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})
        os.replace(partial, path)

    @classmethod
    def load(cls, path: Path) -> Matches:
        """Read what `save` wrote.

        Raises:
            InputError: the file cannot be read, or is something else.
        """
        try:
            with np.load(path, allow_pickle=False) as archive:
                return cls(**{field.name: archive[field.name] for field in dataclasses.fields(cls)})
        except UNREADABLE as error:
            raise InputError(
                f"{path.absolute()}: cannot read the stored matches ({error}); delete it and match again"
            ) from error

    def figures(self) -> dict[str, float]:
        """Return COCO's figures, equal to pycocotools' to the last bit; nan where there is nothing to measure."""
        precision = self._precision()
        means = {}
        for name, (area, thresholds) in FIGURES.items():
            cells = precision[area, list(thresholds)]  # (T, R, K) as in pycocotools: sums depend on the order
            means[name] = float(np.mean(cells[cells > -1])) if (cells > -1).any() else math.nan
        return means

    def _precision(self) -> np.ndarray:
        """COCO's table (A, T, R, K), -1 for categories without objects."""
        table = np.full((len(AREAS), len(THRESHOLDS), len(RECALLS), len(self.category_ids)), -1.0)
        for k, (objects, detections) in enumerate(self.by_category()):
            for area, count in enumerate(self.object_areas[objects].sum(axis=0)):
                if count == 0:
                    continue
                right, ignored = self.true_positives[detections, area], self.ignored[detections, area]
                for t in range(len(THRESHOLDS)):
                    table[area, t, :, k] = _precision_at_recalls(
                        at_threshold(right, t), at_threshold(ignored, t), count
                    )
        return table

    def by_category(self) -> Iterator[tuple[slice, slice]]:
        """Yield for each category where its objects and where its detections lie."""
        bounds = np.arange(len(self.category_ids) + 1)
        objects = np.searchsorted(self.object_categories, bounds).tolist()
        detections = np.searchsorted(self.categories, bounds).tolist()
        for k in range(len(self.category_ids)):
            yield slice(objects[k], objects[k + 1]), slice(detections[k], detections[k + 1])

    def image_scores(self, min_score: float) -> np.ndarray:
        """Return how well each image went, (I,) from 0 to 1, to sort pictures by.

        It is F1, 2 TP / (detections + objects), of the detections with at least `min_score`, over all categories, as a
        mean over the IoU thresholds; 1 where there are neither detections nor objects.
        """
        shown = self.scores >= min_score
        images, right, ignored = self.images[shown], self.true_positives[shown, 0], self.ignored[shown, 0]
        objects = self._count(self.object_images[self.object_areas[:, 0]])
        scores = []
        for t in range(len(THRESHOLDS)):
            found = self._count(images[at_threshold(right, t)])
            both = self._count(images[~at_threshold(ignored, t)]) + objects
            scores.append(np.where(both > 0, 2 * found / np.maximum(both, 1), 1.0))
        return np.mean(scores, axis=0)

    def _count(self, images: np.ndarray) -> np.ndarray:
        return np.bincount(images, minlength=len(self.image_ids))


def at_threshold(bits: np.ndarray, threshold: int) -> np.ndarray:
    """Return the bit of one threshold, as bool."""
    return (bits >> threshold & 1).astype(np.bool_)


def _precision_at_recalls(right: np.ndarray, ignored: np.ndarray, objects: int) -> np.ndarray:
    """Precision at each recall level, (R,): the best that is reached there or at a higher recall.

    Args:
        right: (D,) bool, the detections of a category that are true positives, best first.
        ignored: (D,) bool, those that do not count.
        objects: how many there are to find.
    """
    # The best precision is reached at a true positive, and recall grows there alone.
    found = np.arange(1, right.sum() + 1)
    counted = np.cumsum(~ignored)[right]
    best = np.maximum.accumulate((found / (counted + np.spacing(1)))[::-1])[::-1]
    return np.append(best, 0.0)[np.searchsorted(found / objects, RECALLS, side="left")]


# ---- From results to matches


def match_results(
    ground_truth: dict[str, Any] | Path,
    results: Sequence[dict[str, Any]],
    iou_type: IouType,
    max_detections: int = 100,
) -> Matches:
    """Match results to the objects of their images as pycocotools does, with its overlaps.

    Args:
        ground_truth: the annotation file in COCO's format, or what it holds; it is not changed.
        results: as `coco_results` and `read_results` return them; they are not changed.
        iou_type: `bbox` measures boxes, `segm` masks.
        max_detections: detections per image and category that count, the best ones.

    Raises:
        InputError: the file is not COCO, or the results do not fit it.
    """
    data = read_ground_truth(ground_truth)
    check_references(data, results)
    measurable([iou_type], results)
    frame = _Frame.of(data)
    objects = _Columns.of(coco_objects(iou_type, data["annotations"]), iou_type, frame)
    detections = _Columns.of(coco_detections(iou_type, results), iou_type, frame)
    detections = detections.take(np.flatnonzero(_ranks(detections.groups) < max_detections))

    counts = _inside(objects) & ~objects.crowds[:, None]
    true_positives, ignored = _assign(_overlaps(detections, objects), detections, objects, counts)
    unmatched = EVERY & ~(true_positives | ignored)
    ignored |= np.where(_inside(detections), np.uint16(0), unmatched)

    order = np.lexsort((-detections.scores, detections.categories))  # stable: images stay in order
    kept = counts.any(axis=1)
    return Matches(
        image_ids=frame.image_ids,
        category_ids=frame.category_ids,
        object_images=objects.images[kept],
        object_categories=objects.categories[kept],
        object_areas=counts[kept],
        images=detections.images[order],
        categories=detections.categories[order],
        scores=detections.scores[order],
        true_positives=true_positives[order],
        ignored=ignored[order],
    )


class _Frame(NamedTuple):
    """The images and categories that count."""

    image_ids: np.ndarray  # (I,) int64, ascending
    category_ids: np.ndarray  # (K,) int64, ascending
    sizes: dict[int, tuple[int, int]]  # height and width of each image

    @classmethod
    def of(cls, data: dict[str, Any]) -> _Frame:
        images, categories = ([row["id"] for row in data[key]] for key in ("images", "categories"))
        sizes = {image["id"]: (image["height"], image["width"]) for image in data["images"]}
        return cls(np.unique(np.array(images, np.int64)), np.unique(np.array(categories, np.int64)), sizes)


@dataclass(frozen=True)
class _Columns:
    """Objects or detections, by group, best first. A group is those of one category in one image."""

    images: np.ndarray  # (n,) int32
    categories: np.ndarray  # (n,) int32
    groups: np.ndarray  # (n,) int64, ascending with the category and within it with the image
    scores: np.ndarray  # (n,) float64; 0 for objects
    areas: np.ndarray  # (n,) float64
    crowds: np.ndarray  # (n,) bool
    shapes: np.ndarray  # (n, 4) float64 boxes, or (n,) run-length codes

    @classmethod
    def of(cls, rows: list[dict[str, Any]], iou_type: IouType, frame: _Frame) -> _Columns:
        """Read and sort the rows of known images and categories; equals stay in order."""
        known = set(frame.category_ids.tolist())
        rows = [row for row in rows if row["image_id"] in frame.sizes and row["category_id"] in known]
        images = np.searchsorted(frame.image_ids, np.array([row["image_id"] for row in rows], np.int64))
        categories = np.searchsorted(frame.category_ids, np.array([row["category_id"] for row in rows], np.int64))
        columns = cls(
            images=images.astype(np.int32),
            categories=categories.astype(np.int32),
            groups=categories * len(frame.image_ids) + images,
            scores=np.array([row.get("score", 0) for row in rows], np.float64),
            areas=np.array([row["area"] for row in rows], np.float64),
            crowds=np.array([row["iscrowd"] for row in rows], np.bool_),
            shapes=_shapes(rows, iou_type, frame),
        )
        return columns.take(np.lexsort((-columns.scores, columns.groups)))

    def take(self, order: np.ndarray) -> _Columns:
        return _Columns(**{field.name: getattr(self, field.name)[order] for field in dataclasses.fields(self)})


def _shapes(rows: list[dict[str, Any]], iou_type: IouType, frame: _Frame) -> np.ndarray:
    if iou_type == "bbox":
        return np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)
    return np.fromiter((_run_lengths(row["segmentation"], *frame.sizes[row["image_id"]]) for row in rows), object)


def _run_lengths(mask: Any, height: int, width: int) -> dict[str, Any]:
    """A mask of any of COCO's kinds as its compressed run-length code."""
    if isinstance(mask, list):
        return cocoapi.merge(cocoapi.frPyObjects(mask, height, width))
    return cocoapi.frPyObjects(mask, height, width) if isinstance(mask["counts"], list) else mask


def _ranks(groups: np.ndarray) -> np.ndarray:
    """Position of each entry within its group, for groups that lie together."""
    return np.arange(len(groups)) - np.searchsorted(groups, groups, side="left")


def _inside(columns: _Columns) -> np.ndarray:
    """(n, A) bool: whether the area is within the bounds."""
    return (columns.areas[:, None] >= AREAS[:, 0]) & (columns.areas[:, None] <= AREAS[:, 1])


class _Pairs(NamedTuple):
    """Detections and objects that overlap by at least the lowest threshold."""

    detections: np.ndarray
    objects: np.ndarray
    ious: np.ndarray


def _overlaps(detections: _Columns, objects: _Columns) -> _Pairs:
    """Pairs in order of detections; for each the best overlap first, and among equal ones the last object."""
    shared = np.intersect1d(detections.groups, objects.groups)
    bounds = [
        np.searchsorted(columns.groups, shared, side).tolist()
        for columns in (detections, objects)
        for side in ("left", "right")
    ]
    crowds = objects.crowds.astype(np.uint8)
    parts = [_Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
    for d, d_end, g, g_end in zip(*bounds, strict=True):
        ious = cocoapi.iou(_listed(detections.shapes[d:d_end]), _listed(objects.shapes[g:g_end]), crowds[g:g_end])
        rows, columns = np.nonzero(ious >= THRESHOLDS[0])
        parts.append(_Pairs(rows + d, columns + g, ious[rows, columns]))
    pairs = _Pairs(*map(np.concatenate, zip(*parts, strict=True)))
    order = np.lexsort((-pairs.objects, -pairs.ious, pairs.detections))
    return _Pairs(*(column[order] for column in pairs))


def _listed(shapes: np.ndarray) -> np.ndarray | list[dict[str, Any]]:
    return shapes if shapes.ndim == 2 else shapes.tolist()  # pycocotools takes an array of boxes, a list of codes


def _assign(
    pairs: _Pairs, detections: _Columns, objects: _Columns, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Give each detection, best first, the free object with the best overlap, at each threshold and for each area.

    An object that counts comes before all that do not, and a crowd may be found many times. The thresholds of all
    areas are the bits of one integer, so that one step serves them all.

    Args:
        counts: (G, A) bool, whether the object counts for the area.

    Returns:
        True positives, and detections that found what does not count, both (D, A) uint16 of bits.
    """
    passed = np.searchsorted(THRESHOLDS, pairs.ious, side="right")  # that many of the thresholds
    repeated = sum(1 << 16 * area for area in range(len(AREAS)))
    bits = [((1 << count) - 1) * repeated for count in range(len(THRESHOLDS) + 1)]
    counted = [sum(EVERY << 16 * area for area in np.flatnonzero(row).tolist()) for row in counts]
    reusable = objects.crowds.tolist()
    taken = [0] * len(objects.groups)
    right, ignored = [0] * len(detections.groups), [0] * len(detections.groups)
    rows = zip(pairs.detections.tolist(), pairs.objects.tolist(), passed.tolist(), strict=True)
    for d, group in groupby(rows, key=itemgetter(0)):
        candidates = [(g, bits[count]) for _, g, count in group]
        free = EVERY * repeated
        for g, reached in candidates:
            won = reached & counted[g] & free & ~taken[g]
            taken[g] |= won
            right[d] |= won
            free ^= won
        for g, reached in candidates:
            won = reached & ~counted[g] & free & (free if reusable[g] else ~taken[g])
            taken[g] |= won
            ignored[d] |= won
            free ^= won
    return _unpacked(right), _unpacked(ignored)


def _unpacked(bits: list[int]) -> np.ndarray:
    """One integer with the bits of all areas to (n, A) uint16."""
    shifts = np.arange(len(AREAS), dtype=np.uint64) * np.uint64(16)
    return (np.array(bits, np.uint64)[:, None] >> shifts & np.uint64(EVERY)).astype(np.uint16)
