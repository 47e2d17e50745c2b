"""A stand-in for a trained model: it finds painted objects exactly.

Each object of a scene has a colour of its own: red is its label, green and blue its number. Black is background.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from maskrcnn.data.mask_crops import window_of
from maskrcnn.engine.instances import Instances
from maskrcnn.structures import ClassTable, Example, MaskCrop

CLASSES = ClassTable(("disc", "ring", "cross"), (1, 2, 5))


def paint(scene: np.ndarray, number: int, label: int, mask: MaskCrop) -> None:
    """Paint an object on a scene (H, W, 3) uint8, over what is there."""
    x1, y1, x2, y2 = window_of(mask)
    scene[y1:y2, x1:x2][mask.pixels.astype(bool)] = (label, number // 256, number % 256)


def as_example(pixels: Tensor) -> Example:
    """Return an image without objects."""
    return Example(0, pixels, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), ())


@dataclass(frozen=True)
class PaintedDetector:
    """Finds the objects of a scene. The score of number n is 1 - n / 1000."""

    classes: ClassTable = CLASSES

    @property
    def prepare(self) -> Callable[[Tensor], Example]:
        """No transform."""
        return as_example

    def detect_prepared(self, examples: Sequence[Example]) -> list[Instances]:
        """Return the objects of each scene, in its pixels."""
        return [self.detect(example.pixels) for example in examples]

    def detect(self, pixels: Tensor) -> Instances:
        """Return the objects of a scene, (3, H, W) uint8."""
        codes = (pixels.long() * torch.tensor([65536, 256, 1])[:, None, None]).sum(dim=0).numpy()
        found = sorted((code for code in np.unique(codes).tolist() if code), key=lambda code: code % 65536)
        crops = [_crop(codes == code) for code in found]
        return Instances(
            boxes=torch.tensor([window_of(crop) for crop in crops], dtype=torch.float32).reshape(-1, 4),
            scores=torch.tensor([1 - code % 65536 / 1000 for code in found]),
            labels=torch.tensor([code // 65536 for code in found], dtype=torch.int64),
            mask_probabilities=torch.zeros(len(found), 0, 0),
            height=pixels.shape[1],
            width=pixels.shape[2],
            classes=self.classes,
            pixel_masks=tuple(crops),
        )


def _crop(mask: np.ndarray) -> MaskCrop:
    rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
    y1, y2, x1, x2 = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    return MaskCrop(int(x1), int(y1), mask[y1:y2, x1:x2].astype(np.uint8))
