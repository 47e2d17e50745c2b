"""Pictures of ground truth beside prediction, in which matches and misses are marked.

Shapes: G objects, D detections.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from maskrcnn.data import mask_crops
from maskrcnn.structures import MaskCrop
from maskrcnn.visualization.captions import overlaps
from maskrcnn.visualization.colours import UNMATCHED, Colour, ColourBy, object_colours
from maskrcnn.visualization.drawing import captions_of, paint
from maskrcnn.visualization.sheets import side_by_side

MATCHED = 0.5  # smallest IoU of a match

NONE, IGNORED = -1, -2  # in place of the index of a match


class Objects(NamedTuple):
    """Objects of an image, or detections by descending score."""

    boxes: np.ndarray  # (G, 4) float64 (x1, y1, x2, y2)
    labels: list[int]  # G of them; below 1 for ignored regions
    masks: Sequence[MaskCrop]  # G of them, or none
    scores: list[float] | None = None


class Matches(NamedTuple):
    """The match of each object and of each detection: an index of the other side, or `NONE` or `IGNORED`."""

    objects: list[int]
    detections: list[int]


def match_objects(truth: Objects, prediction: Objects) -> Matches:
    """Match detections with objects of their class: each with the free object of the largest IoU, of at least 0.5.

    The IoU is that of the masks if both sides have masks, otherwise that of the boxes. Detections choose by descending
    score. A detection that matches no object, and lies at least half in an ignored region, is ignored, as in COCO's
    evaluation.
    """
    objects = [NONE if label > 0 else IGNORED for label in truth.labels]
    detections: list[int] = []
    near = overlaps(prediction.boxes, truth.boxes) > 0
    for index, label in enumerate(prediction.labels):
        shared = {g: _shared(truth, g, prediction, index) for g in np.flatnonzero(near[index]).tolist()}
        free = [g for g in shared if objects[g] == NONE and truth.labels[g] == label]
        best = max(free, key=lambda g: shared[g][0], default=NONE)
        if best != NONE and shared[best][0] >= MATCHED:
            objects[best] = index
            detections.append(best)
        else:
            ignored = any(objects[g] == IGNORED and inside >= MATCHED for g, (_, inside) in shared.items())
            detections.append(IGNORED if ignored else NONE)
    return Matches(objects, detections)


def _shared(truth: Objects, g: int, prediction: Objects, d: int) -> tuple[float, float]:
    """Return the IoU of object `g` and detection `d`, whose boxes overlap, and the detection's part in the object."""
    first, second = truth.boxes[g], prediction.boxes[d]
    if len(truth.masks) and len(prediction.masks) and truth.masks[g].pixels.size:
        common: float = mask_crops.intersection(truth.masks[g], prediction.masks[d])
        areas = mask_crops.area(truth.masks[g]), mask_crops.area(prediction.masks[d])
    else:
        common = float(np.prod(np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2])))
        areas = (np.prod(first[2:] - first[:2]), np.prod(second[2:] - second[:2]))
    return common / max(sum(areas) - common, 1e-9), common / max(areas[1], 1e-9)


def draw_pair(
    image: np.ndarray,
    truth: Objects,
    prediction: Objects,
    names: Sequence[str],
    *,
    scale: float | None = None,
    colour_by: ColourBy = "instance",
) -> np.ndarray:
    """Draw ground truth beside prediction, each below a title that counts the matches (`match_objects`).

    By instance, both sides of a match have one colour. A missed object (FN) and a detection without an object (FP) are
    red, and their captions begin with these letters.

    Args:
        image: (H, W, 3) uint8 RGB.
        truth: the objects.
        prediction: the detections.
        names: K class names.
        scale, colour_by: see `drawing.draw_objects`.
    """
    matches = match_objects(truth, prediction)
    of_objects = object_colours(truth.boxes, truth.labels, colour_by)
    of_detections = object_colours(prediction.boxes, prediction.labels, colour_by)
    if colour_by == "instance":
        of_detections = [
            of_objects[match] if match >= 0 else own
            for match, own in zip(matches.detections, of_detections, strict=True)
        ]
    left = _painted(image, truth, names, matches.objects, of_objects, "FN", scale)
    right = _painted(image, prediction, names, matches.detections, of_detections, "FP", scale)
    found, total = sum(match >= 0 for match in matches.objects), sum(label > 0 for label in truth.labels)
    counted = len(matches.detections) - matches.detections.count(IGNORED)
    return side_by_side(
        left, right, (f"ground truth: {found} of {total} found", f"prediction: {found} of {counted} right")
    )


def _painted(
    image: np.ndarray,
    objects: Objects,
    names: Sequence[str],
    matches: list[int],
    colours: list[Colour],
    mark: str,
    scale: float | None,
) -> np.ndarray:
    captions = captions_of(objects.labels, names, objects.scores)
    captions = [f"{mark} {text}" if match == NONE else text for text, match in zip(captions, matches, strict=True)]
    colours = [UNMATCHED if match == NONE else own for own, match in zip(colours, matches, strict=True)]
    return paint(image, objects.boxes, objects.masks, captions, colours, scale=scale)
