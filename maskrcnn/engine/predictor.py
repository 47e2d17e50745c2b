"""Inference with a trained model, on images or on batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol, overload

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from maskrcnn.data.images import to_pixels
from maskrcnn.data.loader import collate
from maskrcnn.data.transforms import Resize, Transform
from maskrcnn.engine.instances import Instances
from maskrcnn.errors import InputError
from maskrcnn.models.mask_rcnn import MaskRCNN
from maskrcnn.ops.masks import PasteConvention
from maskrcnn.runtime.host_copy import HostCopy
from maskrcnn.structures import Batch, ClassTable, Example

LOOSE_NMS = 0.9  # IoU of two boxes from which they are near duplicates

ImageLike = str | Path | Image | np.ndarray | Tensor


class Detector(Protocol):
    """What finds objects in images: a `Predictor`, or one around it that cuts images into tiles, for example."""

    @property
    def classes(self) -> ClassTable:
        """The names of the labels."""

    @property
    def prepare(self) -> Callable[[Tensor], Example]:
        """A function from an image, (3, H, W) uint8 RGB, to what `detect_prepared` takes. It can run in a worker."""

    def detect_prepared(self, examples: Sequence[Example]) -> list[Instances]:
        """Detect objects in images that `prepare` has prepared. The instances need no image."""


@dataclass(frozen=True)
class Predictor:
    """A model with what it takes to go from an image to instances. The model runs on the device of its parameters."""

    model: MaskRCNN
    classes: ClassTable
    transform: Transform = field(default_factory=lambda: Resize((800,), 1333))
    paste: PasteConvention = "exact"

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return next(self.model.parameters()).device

    @property
    def nms_threshold(self) -> float:
        """The largest IoU of two boxes of a class that the model lets stay."""
        return self.model.selector.nms_threshold

    def with_loose_nms(self) -> Predictor:
        """Return a predictor whose model removes only near duplicates, for a suppression by masks that follows.

        Raises:
            InputError: the model has no mask head.
        """
        if self.model.mask_head is None:
            raise InputError("--nms mask: the model has no mask head")
        model = copy.copy(self.model)
        model.selector = copy.copy(model.selector)
        model.selector.nms_threshold = max(LOOSE_NMS, model.selector.nms_threshold)
        return replace(self, model=model)

    @overload
    def __call__(self, images: ImageLike) -> Instances: ...  # type: ignore[overload-overlap] # a str is a sequence

    @overload
    def __call__(self, images: Sequence[ImageLike]) -> list[Instances]: ...

    def __call__(self, images: ImageLike | Sequence[ImageLike]) -> Instances | list[Instances]:
        """Detect objects in an image, or in each image of a list.

        Args:
            images: a path, a PIL image, an array `(H, W, 3)` or a tensor `(3, H, W)`, uint8 RGB; or a list of these.

        Returns:
            The instances of the image, in its own pixels; for a list, a list.

        Raises:
            InputError: a file cannot be read, or an array or tensor has another shape or type.
        """
        if isinstance(images, ImageLike):
            return self.detect_example(without_objects(to_pixels(images)))
        return [self(image) for image in images]

    @property
    def prepare(self) -> Callable[[Tensor], Example]:
        """See `Detector`: the transform."""
        return partial(_prepared, self.transform)

    def detect_prepared(self, examples: Sequence[Example]) -> list[Instances]:
        """Detect objects in images that `prepare` has prepared, as one batch. The instances have no image."""
        return self.detect(collate(examples, [0] * len(examples), self.model.size_divisor))

    def detect_example(self, example: Example) -> Instances:
        """Detect objects in an example of a dataset, before any transform; its own objects are not used."""
        (instances,) = self.detect_prepared([self.transform(example, np.random.default_rng(0))])
        return replace(instances, image=example.pixels)

    def detect(self, batch: Batch) -> list[Instances]:
        """Detect objects in the transformed images of a batch. The instances have no image."""
        return self.start(batch)()

    def start(self, batch: Batch) -> Callable[[], list[Instances]]:
        """Start to detect objects in a batch; the function that is returned waits for them, as `detect` does.

        On a GPU, the host can encode the masks of a batch while the next one is computed.
        """
        self.model.eval()
        detections = self.model.detect(batch.images.to(self.device, non_blocking=self.device.type == "cuda"))
        copy = HostCopy(*detections.tensors())

        def finish() -> list[Instances]:
            on_host = detections.with_tensors(iter(copy.tensors()))
            return Instances.of_batch(on_host, batch, self.classes, self.paste)

        return finish


def _prepared(transform: Transform, pixels: Tensor) -> Example:
    return transform(without_objects(pixels), np.random.default_rng(0))


def without_objects(pixels: Tensor) -> Example:
    """Return an image, (3, H, W) uint8 RGB, as an example without objects."""
    return Example(0, pixels, boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), masks=())
