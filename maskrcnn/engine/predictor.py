"""Inference with a trained model, on images or on batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import overload

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from maskrcnn.data.images import to_pixels
from maskrcnn.data.loader import collate
from maskrcnn.data.transforms import Resize, Transform
from maskrcnn.engine.instances import Instances
from maskrcnn.models.mask_rcnn import MaskRCNN
from maskrcnn.ops.masks import PasteConvention
from maskrcnn.structures import Batch, ClassTable, Example

ImageLike = str | Path | Image | np.ndarray | Tensor


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
            return self.detect_example(_without_objects(to_pixels(images)))
        return [self(image) for image in images]

    def detect_example(self, example: Example) -> Instances:
        """Detect objects in an example of a dataset, before any transform; its own objects are not used."""
        transformed = self.transform(example, np.random.default_rng(0))
        (instances,) = self.detect(collate([transformed], [0], self.model.size_divisor))
        return replace(instances, image=example.pixels)

    def detect(self, batch: Batch) -> list[Instances]:
        """Detect objects in the transformed images of a batch. The instances have no image."""
        self.model.eval()
        detections = self.model.detect(batch.images.to(self.device))
        return Instances.of_batch(detections, batch, self.classes, self.paste)


def _without_objects(pixels: Tensor) -> Example:
    return Example(0, pixels, boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64), masks=())
