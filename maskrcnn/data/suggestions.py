"""Settings that the figures of a training set suggest, each with the figure that it comes from.

Shapes: N images, G objects of all images, A anchors of one cell on all levels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from maskrcnn.data.traps import REACHED
from maskrcnn.ops.anchors import base_anchors

USUAL_SHORT, LARGEST_SHORT = 800, 1344  # px: what COCO's recipes use, and what memory usually allows
SMALLEST_OBJECT = 16.0  # px, four cells of the finest map of a pyramid
MULTIPLE = 32  # of image sides: the coarsest stride of a ResNet
USUAL_ANCHORS = (32, 64, 128, 256, 512)  # px, of COCO's recipes
RATIOS = (0.5, 1.0, 2.0)  # of anchors, the default
ENOUGH = 0.95  # share of the objects that the usual anchors must reach to stay
USUAL_DETECTIONS = 100
FEW_IMAGES = 1000  # up to here the recipe for fine-tuning was measured
FEWEST_STEPS = 400
EPOCHS_OF_FEW, EPOCHS = 27, 12  # measured in docs/fine_tuning.md, and those of the 1x schedule


@dataclass(frozen=True)
class Figures:
    """What settings depend on."""

    sizes: np.ndarray  # (N, 2) height and width of the images, px
    objects: np.ndarray  # (G, 2) width and height of the boxes, px
    images: np.ndarray  # (G,) index of the image of each object
    counts: dict[str, int]  # objects of each class, in the order of the labels

    @classmethod
    def of(cls, ground_truth: dict[str, Any]) -> Figures:
        """Return the figures of a dataset in COCO format. Crowd regions are no objects."""
        indices = {image["id"]: index for index, image in enumerate(ground_truth["images"])}
        objects = [entry for entry in ground_truth["annotations"] if not entry.get("iscrowd")]
        numbers = Counter(entry["category_id"] for entry in objects)
        categories = sorted(ground_truth["categories"], key=lambda category: category["id"])
        return cls(
            np.array([(image["height"], image["width"]) for image in ground_truth["images"]]).reshape(-1, 2),
            np.array([entry["bbox"][2:] for entry in objects], np.float64).reshape(-1, 2),
            np.array([indices[entry["image_id"]] for entry in objects], np.int64),
            {category["name"]: numbers[category["id"]] for category in categories},
        )

    @property
    def most_objects(self) -> int:
        """The largest number of objects in an image."""
        return int(np.bincount(self.images, minlength=1).max())


class ImageSize(NamedTuple):
    """Sides that images are resized to, px; see `maskrcnn.data.transforms.ResizeConfig`."""

    short_side: int
    long_side: int
    reason: str

    def scales(self, sizes: np.ndarray) -> np.ndarray:
        """Return the factor (N,) by which images of these sizes (N, 2) are resized."""
        return np.minimum(self.short_side / sizes.min(axis=1), self.long_side / sizes.max(axis=1))


class Anchors(NamedTuple):
    """One anchor size for each level of a pyramid, px."""

    sizes: tuple[int, ...]
    reason: str


class Number(NamedTuple):
    """A number and where it comes from."""

    value: int
    reason: str


class Schedule(NamedTuple):
    """Batch size and schedule of a training."""

    recipe: str  # the recipe that it starts from
    batch_size: int
    iterations: int
    steps: tuple[int, ...]
    warmup_iterations: int
    evaluate_every: int
    reason: str


def image_size(figures: Figures) -> ImageSize:
    """Suggest the size of the images: their own up to 800 px, and larger ones for small objects."""
    median = float(np.median(figures.sizes.min(axis=1)))
    short = min(median, USUAL_SHORT)
    sides = np.sqrt(figures.objects.prod(axis=1)) * (short / figures.sizes.min(axis=1)[figures.images])
    small = float(np.percentile(sides, 10)) if len(sides) else SMALLEST_OBJECT
    wanted = max(short, min(short * SMALLEST_OBJECT / max(small, 1e-9), 2 * median, LARGEST_SHORT))
    aspects = figures.sizes.max(axis=1) / figures.sizes.min(axis=1)
    short_side = _round_up(wanted)
    long_side = _round_up(short_side * min(float(np.percentile(aspects, 95)), 2.0))
    reason = f"the median short side of the images is {median:.0f} px"
    if wanted > short:
        reason += f"; at {short:.0f} px, a tenth of the objects are below {small:.0f} px (root of the area of the box)"
    after = small * short_side / short
    reason += f"; at {short_side} px, a tenth of the objects are below {after:.0f} px"
    if after < 0.9 * SMALLEST_OBJECT:
        reason += ", which is little: cut the photographs into tiles before you annotate"
    return ImageSize(short_side, long_side, reason)


def anchors(figures: Figures, size: ImageSize) -> Anchors:
    """Suggest the anchor sizes of a pyramid of five levels: COCO's, if they reach the objects, or others."""
    objects = figures.objects * size.scales(figures.sizes)[figures.images][:, None]
    usual = reached(objects, USUAL_ANCHORS)
    if usual >= ENOUGH:
        reason = (
            f"the sizes of COCO's recipes reach {100 * usual:.1f} % of the objects (an IoU of {REACHED} with an anchor)"
        )
        return Anchors(USUAL_ANCHORS, reason)
    low, high = np.percentile(np.sqrt(objects.prod(axis=1)), (5, 95))
    first = max(low, 4.0)
    factor = min(max((high / first) ** 0.25, 2.0), 3.0)
    sizes = tuple(round(first * factor**level) for level in range(len(USUAL_ANCHORS)))
    return Anchors(
        sizes,
        f"90 % of the objects are from {low:.0f} to {high:.0f} px at this size; these anchors reach "
        f"{100 * reached(objects, sizes):.1f} % of them (an IoU of {REACHED}), those of COCO's recipes "
        f"{100 * usual:.1f} %",
    )


def reached(objects: np.ndarray, sizes: Sequence[int]) -> float:
    """Return the share of the boxes (G, 2) that have an IoU of at least `REACHED` with an anchor at their centre."""
    if len(objects) == 0:
        return 1.0
    corners = base_anchors([float(size) for size in sizes], RATIOS).numpy()  # (A, 4)
    shapes = corners[:, 2:] - corners[:, :2]
    intersections = np.minimum(objects[:, None], shapes).prod(axis=-1)  # (G, A)
    unions = objects.prod(axis=1)[:, None] + shapes.prod(axis=1) - intersections
    return float(((intersections / unions).max(axis=1) >= REACHED).mean())


def detections_per_image(*splits: Figures) -> Number:
    """Suggest the number of detections of an image: 100, or a fifth more than any image has objects."""
    most = max(figures.most_objects for figures in splits)
    value = max(USUAL_DETECTIONS, math.ceil(1.2 * most / 50) * 50)
    return Number(value, f"no image has more than {most} objects")


def schedule(figures: Figures) -> Schedule:
    """Suggest batch size and length: the recipe for fine-tuning up to 1,000 images, then COCO's 1x schedule."""
    count = len(figures.sizes)
    few = count < FEW_IMAGES
    batch_size, epochs = (2, EPOCHS_OF_FEW) if few else (8, EPOCHS)
    iterations = max(FEWEST_STEPS, math.ceil(epochs * count / batch_size / 100) * 100)
    steps = (iterations * 4 // 5,) if few else (iterations * 2 // 3, iterations * 8 // 9)
    return Schedule(
        recipe="base/schedule/fine_tune" if few else "base/schedule/1x",
        batch_size=batch_size,
        iterations=iterations,
        steps=steps,
        warmup_iterations=40 if few else min(1000, iterations // 10),
        evaluate_every=math.ceil(iterations / 8),
        reason=f"{count} images: {iterations} steps of {batch_size} are {iterations * batch_size / count:.0f} epochs",
    )


def _round_up(side: float) -> int:
    return math.ceil(round(side, 3) / MULTIPLE) * MULTIPLE
