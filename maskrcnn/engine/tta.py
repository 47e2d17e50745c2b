"""Test-time augmentation (TTA): detection in several views of an image, flipped and of other sizes, merged.

The detections of all views are pooled, and per-class NMS selects among them. The mask of a detection is the mean of the
masks that the mask head predicts for its box in each view. This is what Detectron2's `GeneralizedRCNNWithTTA` does.

Shapes: V views, B images, N detections, D detections of an image that a model returns, M mask side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from maskrcnn.data.loader import collate
from maskrcnn.data.transforms import Compose, Resize, Transform, flip_horizontally
from maskrcnn.engine.instances import Instances
from maskrcnn.engine.predictor import Predictor, without_objects
from maskrcnn.errors import InputError
from maskrcnn.ops.nms import batched_nms
from maskrcnn.structures import Batch, ClassTable, Example

SCALES = (0.75, 1.0, 1.25)  # of the short side, for `short_sides`


@dataclass(frozen=True)
class AugmentedDetector:
    """Finds objects with the model of a predictor in several views of each image: all sizes, flipped and not flipped.

    Classes that a flip turns into each other, such as a left and a right hand, are confused by `flip`.
    """

    predictor: Predictor
    flip: bool = False  # also detect in the horizontally flipped image
    short_sides: tuple[int, ...] = ()  # pixels; by default that of the predictor's transform alone

    def __post_init__(self) -> None:
        if self.short_sides:
            _resize_of(self.predictor)  # refuses a predictor without it

    @property
    def classes(self) -> ClassTable:
        """The names of the labels."""
        return self.predictor.classes

    @property
    def prepare(self) -> Callable[[Tensor], Example]:
        """See `Detector`: the image itself, of which `detect_prepared` makes the views."""
        return without_objects

    def detect_prepared(self, examples: Sequence[Example]) -> list[Instances]:
        """Detect objects in each image; see `Detector`."""
        transforms = [_resized_to(self.predictor, side) for side in self.short_sides] or [self.predictor.transform]
        flips = (False, True) if self.flip else (False,)
        views = [self._view(examples, transform, flip) for transform, flip in product(transforms, flips)]
        return [self._merged(views, index, example) for index, example in enumerate(examples)]

    def detect(self, pixels: Tensor) -> Instances:
        """Detect objects in an image, (3, H, W) uint8 RGB. The instances have no image."""
        return self.detect_prepared([without_objects(pixels)])[0]

    @torch.no_grad()
    def _view(self, examples: Sequence[Example], transform: Transform, flip: bool) -> _View:
        model = self.predictor.model.eval()
        transformed = [transform(example, np.random.default_rng(0)) for example in examples]
        shown = [flip_horizontally(example) if flip else example for example in transformed]
        batch = collate(shown, [0] * len(shown), model.size_divisor)
        images = batch.images.to(self.predictor.device)
        features = model.features(images)
        found = Instances.of_batch(model.detect_boxes(features, images.sizes), batch, self.classes)
        return _View(flip, batch, features, [_flipped(each) if flip else each for each in found])

    def _merged(self, views: Sequence[_View], index: int, example: Example) -> Instances:
        """Return the detections of all views of one image as one set."""
        selector = self.predictor.model.selector
        pooled = [view.found[index] for view in views]
        boxes, scores, labels = (
            torch.cat([getattr(found, name) for found in pooled])[None] for name in ("boxes", "scores", "labels")
        )
        indices, kept_scores = batched_nms(
            boxes, scores, labels, iou_threshold=selector.nms_threshold, count=selector.detections_per_image
        )
        kept = indices[kept_scores > -torch.inf]
        boxes, labels = boxes[0, kept], labels[0, kept]
        masks = [self._masks(view, index, boxes, labels, example.pixels.shape[2]) for view in views]
        return replace(
            pooled[0],
            boxes=boxes,
            scores=scores[0, kept],
            labels=labels,
            mask_probabilities=torch.stack(masks).mean(dim=0),
            paste=self.predictor.paste,
        )

    def _masks(self, view: _View, index: int, boxes: Tensor, labels: Tensor, width: int) -> Tensor:
        """Return the masks (N, M, M) of boxes (N, 4), in pixels of the image, as one view shows them."""
        seen = _mirrored(boxes, width) if view.flip else boxes
        placed = view.batch.maps[index].apply(seen)
        features = [level[index : index + 1] for level in view.features]
        device = self.predictor.device
        masks = self.predictor.model.masks_of(features, placed[None].to(device), labels[None].to(device))[0].cpu()
        return masks.flip(-1) if view.flip else masks


class _View(NamedTuple):
    """All images of a batch, in one size, flipped or not, and what was found in them."""

    flip: bool
    batch: Batch
    features: tuple[Tensor, ...]
    found: list[Instances]  # of each image, in its own pixels, not flipped, without masks


def default_short_sides(predictor: Predictor) -> tuple[int, ...]:
    """Return the short side to which a predictor resizes images, times `SCALES`.

    Raises:
        InputError: it does not resize them.
    """
    return tuple(round(scale * _resize_of(predictor).short_side[0]) for scale in SCALES)


def _resize_of(predictor: Predictor) -> Resize:
    steps = predictor.transform.steps if isinstance(predictor.transform, Compose) else (predictor.transform,)
    sizes = [step for step in steps if isinstance(step, Resize)]
    if len(sizes) != 1:
        raise InputError(
            "--tta with sizes needs one transform of kind resize in data.validation_transforms, and there are "
            f"{len(sizes)}"
        )
    return sizes[0]


def _resized_to(predictor: Predictor, short_side: int) -> Transform:
    """Return the predictor's transform with another short side, and the limit of the long side in proportion."""
    resize = _resize_of(predictor)
    long_side = round(resize.long_side * short_side / resize.short_side[0])
    other = replace(resize, short_side=(short_side,), long_side=max(short_side, long_side))
    if not isinstance(predictor.transform, Compose):
        return other
    return Compose(tuple(other if step is resize else step for step in predictor.transform.steps))


def _mirrored(boxes: Tensor, width: int) -> Tensor:
    """Return boxes (N, 4) as they are in the flipped image."""
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    return torch.stack([width - x2, y1, width - x1, y2], dim=1)


def _flipped(instances: Instances) -> Instances:
    return replace(instances, boxes=_mirrored(instances.boxes, instances.width))
