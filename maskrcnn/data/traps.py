"""Silent traps in data: what trains without an error and ends with a low AP. Each check yields a message, or nothing.

Shapes: G objects of an image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from maskrcnn.data.dataset import DetectionDataset, HasFiles
from maskrcnn.data.image_checks import DARK, equal_files, why_dark
from maskrcnn.errors import InputError, first_of
from maskrcnn.structures import ClassTable, Example

SAMPLE = 100  # images that are opened
COUNTED = 1000  # images whose objects are counted, without opening them
AGREEMENT = 0.7  # IoU of a box and the bounds of its mask
TOLERANCE = 2.0  # px; small objects agree if no side differs by more
TOLERATED = 0.05  # share of objects whose box may disagree
REACHED = 0.3  # IoU of an object and an anchor; below it, usual RPNs call the anchor background


def evenly_spaced(length: int, count: int) -> list[int]:
    """Return at most `count` indices below `length`, evenly spaced."""
    return np.unique(np.linspace(0, length - 1, min(length, count)).round().astype(int)).tolist()


def sample(dataset: DetectionDataset) -> list[Example]:
    """Return `SAMPLE` images of a dataset, evenly spaced. Those that cannot be read are left out."""
    examples = []
    for index in evenly_spaced(len(dataset), SAMPLE):
        try:
            examples.append(dataset[index])
        except InputError:  # whoever needs the image says so
            continue
    return examples


def classes_without_example(dataset: DetectionDataset) -> Iterator[str]:
    """Report a dataset without any object, or the classes without one. It stops where all classes were seen."""
    missing = set(range(1, len(dataset.classes) + 1))
    has_objects = False
    for index in range(len(dataset)):
        labels = dataset.labels(index)
        missing.difference_update(labels.tolist())
        has_objects = has_objects or bool((labels > 0).any())
        if not missing:
            return
    if not has_objects:
        yield f"there is no object in any of its {len(dataset)} images"
        return
    names = [dataset.classes.names[label - 1] for label in sorted(missing)]
    yield (
        f"{len(names)} of {len(dataset.classes)} classes have no object: {', '.join(first_of(names))}. The model "
        "cannot learn them; `classes` beside `annotations` leaves them out"
    )


def boxes_against_masks(examples: Iterable[Example]) -> Iterator[str]:
    """Report boxes that are far from the bounds of their masks, as those written as x1, y1, x2, y2 are."""
    objects, disagreeing, as_corners, first = 0, 0, 0, ""
    for example in examples:
        boxes, bounds = _with_bounds(example)
        wrong = ~agree(boxes, bounds)
        objects, disagreeing = objects + len(boxes), disagreeing + int(wrong.sum())
        as_corners += int((wrong & are_corners(boxes, bounds, example.original_size)).sum())
        for index in np.flatnonzero(wrong)[: 0 if first else 1]:
            box, mask = (", ".join(f"{side:g}" for side in sides[index]) for sides in (boxes, bounds))
            first = f"in image {example.image_id} a box is ({box}) and its mask reaches over ({mask})"
    if disagreeing <= TOLERATED * objects:
        return
    share = f"{disagreeing} of {objects} boxes disagree with their masks; {first} (x1, y1, x2, y2)"
    if 2 * as_corners > disagreeing:
        yield f"{share}. They look written as x1, y1, x2, y2: COCO's `bbox` is x, y, width, height"
    else:
        yield f"{share}. Boxes and masks train different heads, so one of them learns what is wrong"


def _with_bounds(example: Example) -> tuple[np.ndarray, np.ndarray]:
    """Return the boxes of the objects with a mask, and the bounds of the masks; both (G, 4)."""
    kept = [index for index, mask in enumerate(example.masks) if mask.pixels.size and example.labels[index] > 0]
    masks = [example.masks[index] for index in kept]
    bounds = [(mask.x, mask.y, mask.x + mask.pixels.shape[1], mask.y + mask.pixels.shape[0]) for mask in masks]
    return example.boxes.numpy()[kept].reshape(-1, 4), np.array(bounds, dtype=np.float64).reshape(-1, 4)


def agree(boxes: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Return whether each box is about the bounds of its mask, (G,) bool. Boxes and bounds are (G, 4)."""
    overlap = np.minimum(boxes[:, 2:], bounds[:, 2:]) - np.maximum(boxes[:, :2], bounds[:, :2])
    intersection = overlap.clip(0).prod(axis=1)
    areas = [(sides[:, 2:] - sides[:, :2]).prod(axis=1) for sides in (boxes, bounds)]
    iou = intersection / np.maximum(areas[0] + areas[1] - intersection, 1e-9)
    return (iou >= AGREEMENT) | (np.abs(boxes - bounds).max(axis=1, initial=0) <= TOLERANCE)


def are_corners(boxes: np.ndarray, bounds: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return whether each box is what a reader of x, y, width, height makes of x1, y1, x2, y2.

    Args:
        boxes: (G, 4), clipped to the image.
        bounds: (G, 4) of the masks.
        size: height and width of the image.
    """
    height, width = size
    misread = np.concatenate([bounds[:, :2], np.minimum(bounds[:, :2] + bounds[:, 2:], (width, height))], axis=1)
    return np.abs(boxes - misread).max(axis=1, initial=0) <= TOLERANCE


def too_many_objects(dataset: DetectionDataset, detections_per_image: int) -> Iterator[str]:
    """Report images with more objects than the model can detect."""
    indices = evenly_spaced(len(dataset), COUNTED)
    counts = np.array([(dataset.labels(index) > 0).sum() for index in indices])
    crowded = int((counts > detections_per_image).sum())
    if crowded:
        image, found = dataset.image_id(indices[int(counts.argmax())]), counts.clip(max=detections_per_image).sum()
        yield (
            f"{crowded} of {len(counts)} images have more objects than model.detection.detections_per_image, "
            f"{detections_per_image}; image {image} has {counts.max()}. Not more than {found / counts.sum():.1%} of "
            "the objects can be found"
        )


def small_objects(examples: Iterable[Example], smallest_anchor: float) -> Iterator[str]:
    """Report a median object that no anchor reaches.

    Args:
        examples: at the resolution of the training.
        smallest_anchor: px, square root of the area.
    """
    boxes = [example.boxes[example.labels > 0] for example in examples]
    sides = np.concatenate([np.zeros(0), *((box[:, 2:] - box[:, :2]).prod(dim=1).sqrt().numpy() for box in boxes)])
    if len(sides) and np.median(sides) < REACHED**0.5 * smallest_anchor:
        yield (
            f"half of the objects are smaller than {np.median(sides):.0f} px (square root of the area, after "
            f"resizing), but the smallest anchor has {smallest_anchor:g} px: no anchor has an IoU of {REACHED} with "
            "them. Set model.rpn.anchor_sizes, or larger images"
        )


def mirrored_pairs(classes: ClassTable) -> list[tuple[str, str]]:
    """Return the pairs of classes whose names differ in left and right alone."""
    known = {name.lower(): name for name in classes.names}
    pairs = [(known[name], known[other]) for name in known if (other := name.replace("left", "right")) in known]
    return [(left, right) for left, right in pairs if left != right]


def mirrored_classes(classes: ClassTable, swap: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Report classes named left and right that a horizontal flip does not swap.

    Args:
        classes: of the dataset.
        swap: the pairs of classes that the flip swaps.
    """
    swapped = {name for pair in swap for name in pair}
    for left, right in mirrored_pairs(classes):
        if not {left, right} <= swapped:
            yield (
                f"a horizontal flip makes '{left}' look like '{right}', but the label stays: set `swap: [[{left}, "
                f"{right}]]` of horizontal_flip, or its `probability` to 0"
            )


def dark_images(dataset: DetectionDataset, examples: Sequence[Example]) -> Iterator[str]:
    """Report images that are nearly black as the network gets them, such as 12 bits in a file of 16, or float pixels.

    Args:
        dataset: the dataset.
        examples: some of its images, not transformed.
    """
    dark = [example for example in examples if example.pixels.max() < DARK]
    if not dark:
        return
    message = f"{len(dark)} of {len(examples)} images are nearly black, without a value above {DARK - 1} of 255"
    files = dataset.files() if isinstance(dataset, HasFiles) else []
    if len(files) == len(dataset):  # a joined dataset may have files for some of its images alone
        file = files[next(i for i in range(len(dataset)) if dataset.image_id(i) == dark[0].image_id)]
        yield f"{message}; {file}: {why_dark(Path(file))}"
    else:
        yield f"{message}, such as image {dark[0].image_id}"


def frozen_random_backbone(backbone: BaseModel) -> Iterator[str]:
    """Report a backbone that starts from random weights and cannot learn all of them.

    Args:
        backbone: its config. A kind of another package is checked if it has the usual keys.
    """
    if getattr(backbone, "weights", "") != "none":
        return
    if stages := getattr(backbone, "freeze", 0):
        yield (
            f"model.backbone has random weights (weights: none), and its first {stages} stages are frozen, so they "
            "stay random: set freeze: 0, or name weights"
        )
    if getattr(backbone, "norm", "") == "frozen_bn" or getattr(backbone, "frozen_norms", False):
        yield (
            "model.backbone has random weights (weights: none), and its batch norms are frozen, so they normalise "
            "nothing and the loss can be huge: set norm: gn or bn (timm: frozen_norms: false), or name weights"
        )


def shared_images(train: DetectionDataset, validation: DetectionDataset) -> Iterator[str]:
    """Report image files that are in both splits, under one path or as copies with the same bytes."""
    if isinstance(train, HasFiles) and isinstance(validation, HasFiles):
        shared = equal_files(train.files(), validation.files())
        if shared:
            yield (
                f"{len(shared)} of {len(validation)} validation images are training images, so the metrics say little "
                f"about other images: {', '.join(first_of(shared))}"
            )
