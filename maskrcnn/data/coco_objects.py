"""The objects of COCO annotations that training uses, and what is wrong with the others.

A dataset and `maskrcnn inspect-dataset` share these rules. `findings.FAULTS` says what training does about each fault.

Shapes: N images, A annotations, G objects, K categories.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from maskrcnn.data.coco_arrays import CocoArrays
from maskrcnn.data.findings import Finding
from maskrcnn.data.rle import crop_from_counts, crop_from_polygons, empty_crop
from maskrcnn.structures import MaskCrop


class Objects(NamedTuple):
    """Objects that are in use, in the order of the annotations."""

    rows: np.ndarray  # (G,) int64: index of the annotation
    images: np.ndarray  # (G,) int64: index of the image in the file, ascending
    boxes: np.ndarray  # (G, 4) float32: x1, y1, x2, y2, inside the image
    labels: np.ndarray  # (G,) int64: 1..K, -1 for a crowd
    has_mask: np.ndarray  # (G,) bool


class Choice(NamedTuple):
    """The objects, what is wrong with annotations, and those that are not in use."""

    objects: Objects
    faults: dict[str, np.ndarray]  # indices of annotations by the key of `FAULTS`; one may have several
    dropped: dict[str, np.ndarray]  # ids by reason, ascending; those of other images and classes are not among them


def choose_objects(arrays: CocoArrays, images: np.ndarray, labels: np.ndarray, *, keep_crowds: bool) -> Choice:
    """Return the objects of some images and classes: those with a box that has an area and, if any, a valid mask.

    Args:
        arrays: the annotations.
        images: indices of the images.
        labels: (K,) label of each category, 0 for one that is not in use.
        keep_crowds: whether crowd regions are objects, with label -1.
    """
    is_chosen = np.zeros(len(arrays.image_ids), np.bool_)
    is_chosen[images] = True
    image_of = np.repeat(np.arange(len(is_chosen)), np.diff(arrays.annotation_starts))
    rows = np.flatnonzero(is_chosen[image_of] & (labels[arrays.categories] > 0))
    crowds = arrays.crowds[rows]
    dropped_crowds = rows[crowds & (not keep_crowds)]
    rows, crowds = (each[keep_crowds | ~crowds] for each in (rows, crowds))
    boxes = _clipped_boxes(arrays.boxes[rows], arrays.image_sizes[image_of[rows]])
    has_mask = ((np.diff(arrays.polygon_starts) > 0) | (np.diff(arrays.count_starts) > 0))[rows]
    has_area = np.all(boxes[:, 2:] > boxes[:, :2], axis=1)
    faults = {
        "empty_box": ~has_area,
        **{fault: has_area & is_faulty[rows] for fault, is_faulty in _mask_faults(arrays).items()},
        "short_polygon": has_area & arrays.short_polygons[rows],
        "empty_mask": has_area & arrays.empty_masks[rows],
    }
    is_unusable = np.any([faults[fault] for fault in faults if fault != "short_polygon"], axis=0)
    is_unusable |= faults["short_polygon"] & ~has_mask
    faults["no_mask"] = ~has_mask & ~crowds & ~is_unusable
    objects = Objects(rows, image_of[rows], boxes, np.where(crowds, -1, labels[arrays.categories[rows]]), has_mask)
    return Choice(
        Objects(*(column[~is_unusable] for column in objects)),
        {fault: rows[is_faulty] for fault, is_faulty in faults.items()},
        {
            "crowd regions": np.sort(arrays.ids[dropped_crowds]),
            "degenerate objects": np.sort(arrays.ids[rows[is_unusable]]),
        },
    )


def _clipped_boxes(boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Return boxes (x, y, width, height) as float32 corners inside their images; `sizes` are heights and widths."""
    corners = np.stack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
    return corners.clip(0, sizes[:, None, ::-1]).astype(np.float32).reshape(-1, 4)


def _mask_faults(arrays: CocoArrays) -> dict[str, np.ndarray]:
    """Return which annotations have a malformed mask, (A,) bool, by the key of `FAULTS`."""
    faults: dict[str, np.ndarray] = {}
    for row, finding in arrays.malformed.items():
        faults.setdefault(finding.fault, np.zeros(len(arrays.ids), np.bool_))[row] = True
    return faults


def findings_of(arrays: CocoArrays, faults: Mapping[str, np.ndarray]) -> list[Finding]:
    """Return the findings of `Choice.faults`, in the order of the annotations."""
    places = sorted((row, fault) for fault, rows in faults.items() for row in rows.tolist())
    return [_finding(arrays, row, fault) for row, fault in places]


def _finding(arrays: CocoArrays, row: int, fault: str) -> Finding:
    malformed = arrays.malformed.get(row)
    if malformed is not None and malformed.fault == fault:
        return malformed
    image = int(np.searchsorted(arrays.annotation_starts, row, side="right")) - 1
    return Finding(fault, _text(arrays, row, fault), int(arrays.image_ids[image]), (int(arrays.ids[row]),))


def _text(arrays: CocoArrays, row: int, fault: str) -> str:
    if fault == "empty_box":
        bbox = ", ".join(f"{number:g}" for number in arrays.boxes[row].tolist())
        return f"its box (x, y, width, height) = ({bbox}) has no area inside the image"
    if fault == "empty_mask":
        is_encoded = len(arrays.run_lengths(row)) > 0
        return (
            "its run lengths have no pixel of the object" if is_encoded else "its polygons cover no pixel of the image"
        )
    return {"short_polygon": "has a polygon with fewer than three points", "no_mask": "has no `segmentation`"}[fault]


def mask_of(arrays: CocoArrays, row: int, height: int, width: int) -> MaskCrop:
    """Return the mask of an annotation, empty if it has none; `height` and `width` are those of its image."""
    counts = arrays.run_lengths(row)
    if len(counts):
        return crop_from_counts(counts, height)
    polygons = arrays.polygons(row)
    return crop_from_polygons(polygons, height, width) if polygons else empty_crop()
