"""Checks of the objects of one image against each other and against their masks.

Boxes are `(x1, y1, x2, y2)` in pixels of the image. Shapes: G objects, n points of a polygon.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from maskrcnn.data import mask_crops
from maskrcnn.data.coco_file import Annotation, Image
from maskrcnn.data.findings import Finding
from maskrcnn.data.traps import agree, are_corners
from maskrcnn.structures import MaskCrop

BEYOND = 2.0  # px; a polygon may leave the image by so much, as many of COCO do by less than one
MOST_POINTS = 1000  # of a polygon that is checked for crossings: the time grows with their square
AREA_AGREEMENT = 0.2  # share by which an area may differ from its mask, beside half a pixel along the outline
SAME_BOX, SAME_MASK = 0.8, 0.9  # IoU of two annotations of one object


class Checked(NamedTuple):
    """An object that training uses, with its decoded mask."""

    annotation: Annotation
    label: int  # 1..K
    box: np.ndarray  # (4,) float32, inside the image
    polygons: list[np.ndarray]  # each (x0, y0, x1, y1, ...)
    mask: MaskCrop


def object_findings(objects: Sequence[Checked], names: Sequence[str], image: Image) -> Iterator[Finding]:
    """Yield what is wrong with the objects of an image that training uses.

    Args:
        objects: without crowd regions.
        names: K class names.
        image: the entry of the image.
    """
    for checked in objects:
        for polygon in checked.polygons:
            yield from _polygon_findings(polygon.reshape(-1, 2), checked.annotation, image)
        yield from _area_findings(checked)
    yield from _box_findings(objects, image)
    yield from _duplicates(objects, names, image)


def _finding(fault: str, text: str, *annotations: Annotation) -> Finding:
    return Finding(fault, text, annotations[0]["image_id"], tuple(annotation["id"] for annotation in annotations))


def _polygon_findings(points: np.ndarray, annotation: Annotation, image: Image) -> Iterator[Finding]:
    size = np.array([image["width"], image["height"]])
    beyond = float(max((points - size).max(), (-points).max()))
    if beyond > BEYOND:
        yield _finding("outside_polygon", f"a polygon reaches {beyond:.0f} px out of the image", annotation)
    if crosses_itself(points):
        yield _finding("crossing_polygon", f"a polygon of {len(points)} points crosses itself", annotation)


def crosses_itself(points: np.ndarray) -> bool:
    """Return whether two sides of a closed polygon, (n, 2), cross at a point inside both.

    Sides that only touch, as those of a hole that is cut free along a line, do not cross. Polygons of more than
    `MOST_POINTS` points are not checked.
    """
    if not 4 <= len(points) <= MOST_POINTS:
        return False
    following = np.roll(points, -1, axis=0)
    # The side of each point (columns) of the line through each side (rows).
    here = _turns(points, following, points)
    there = np.roll(here, -1, axis=1)
    separated = here * there < 0
    return bool((separated & separated.T).any())


def _turns(starts: np.ndarray, ends: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return 1, 0 or -1 for each line (rows) and point (columns): right of it, on it, or left of it."""
    steps = ends - starts
    offsets = points[None] - starts[:, None]
    products = steps[:, None, 0] * offsets[..., 1] - steps[:, None, 1] * offsets[..., 0]
    return np.sign(np.where(np.abs(products) < 1e-6, 0.0, products))


def _area_findings(checked: Checked) -> Iterator[Finding]:
    area = checked.annotation.get("area")
    if area is None:
        return
    pixels = int(checked.mask.pixels.sum())
    tolerance = AREA_AGREEMENT * max(area, pixels) + sum(checked.mask.pixels.shape)
    if abs(area - pixels) > tolerance:
        width, height = checked.annotation["bbox"][2:]
        hint = "; it is that of the box" if abs(area - width * height) < 0.01 * area else ""
        yield _finding("area_mask", f"its area is {area:g}, but its mask has {pixels} pixels{hint}", checked.annotation)


def _box_findings(objects: Sequence[Checked], image: Image) -> Iterator[Finding]:
    boxes, bounds = _boxes(objects), np.array([bounds_of(checked.mask) for checked in objects]).reshape(-1, 4)
    wrong = ~agree(boxes, bounds)
    corners = are_corners(boxes, bounds, (image["height"], image["width"]))
    for index in np.flatnonzero(wrong).tolist():
        box, mask = (", ".join(f"{side:g}" for side in sides[index]) for sides in (boxes, bounds))
        hint = "; it looks written as x1, y1, x2, y2" if corners[index] else ""
        text = f"its box is ({box}), but its mask reaches over ({mask}) (x1, y1, x2, y2){hint}"
        yield _finding("box_mask", text, objects[index].annotation)


def _boxes(objects: Sequence[Checked]) -> np.ndarray:
    return np.array([checked.box for checked in objects], np.float64).reshape(-1, 4)


def bounds_of(mask: MaskCrop) -> tuple[int, int, int, int]:
    """Return the box of whole pixels around a mask."""
    height, width = mask.pixels.shape
    return mask.x, mask.y, mask.x + width, mask.y + height


def _duplicates(objects: Sequence[Checked], names: Sequence[str], image: Image) -> Iterator[Finding]:
    boxes = _boxes(objects)
    for index, checked in enumerate(objects):
        others = index + 1 + np.flatnonzero(_ious(boxes[index], boxes[index + 1 :]) > SAME_BOX)
        for other in (objects[position] for position in others.tolist()):
            iou = mask_crops.iou(checked.mask, other.mask)
            if iou > SAME_MASK:
                classes = {names[item.label - 1] for item in (checked, other)}
                kind = f"both {classes.pop()}" if len(classes) == 1 else " and ".join(sorted(classes))
                text = f"their masks are the same (IoU {iou:.2f}; {kind})"
                yield _finding("near_duplicate", text, checked.annotation, other.annotation)


def _ious(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    overlap = (np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])).clip(0).prod(axis=1)
    areas = [(sides[..., 2:] - sides[..., :2]).prod(axis=-1) for sides in (box, boxes)]
    return overlap / np.maximum(areas[0] + areas[1] - overlap, 1e-9)
