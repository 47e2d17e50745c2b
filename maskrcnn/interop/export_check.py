"""Check of an exported file: it must find in three images what the model finds.

Shapes: B images, H x W pixels, D detections, M mask side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from maskrcnn.data.shapes import ShapesConfig
from maskrcnn.interop.graph import DetectionGraph
from maskrcnn.models.mask_rcnn import MaskRCNN

TOLERANCE = 1e-3  # pixels of a box, probability of a mask or a score
SCENE = (300, 410)  # height and width of the images with objects
BLANK = (150, 90)  # of the image without
GREY_LEVELS = (124, 0, 255, 64)  # of the image without a detection, the first one that suits


class CheckFailed(Exception):  # noqa: N818 (as `ImagesSkipped`)
    """The exported file gives other detections than the model."""


class Checked(NamedTuple):
    """What the check found for one image. The differences are the largest of all detections."""

    height: int
    width: int
    detections: int  # of the model
    boxes: float  # pixels
    scores: float
    masks: float

    def __str__(self) -> str:
        size = f"{self.height} x {self.width} px"
        if not self.detections:
            return f"{size}: no detection in both"
        differences = f"boxes to {self.boxes:.1g} px, scores to {self.scores:.1g}, masks to {self.masks:.1g}"
        return f"{size}: {self.detections} detections, {differences}"

    @property
    def passed(self) -> bool:
        """Whether all differences are within the tolerance."""
        return max(self.boxes, self.scores, self.masks) <= TOLERANCE


@torch.no_grad()
def check(model: MaskRCNN, run: Callable[[Tensor], Sequence[Tensor]]) -> list[Checked]:
    """Compare an exported file with its model: a batch of two generated scenes, and a blank image of another size.

    Args:
        model: the model.
        run: runs the file: from images `(B, 3, H, W)` uint8 to the outputs of `DetectionGraph`.

    Raises:
        CheckFailed: the detections of an image differ.
    """
    graph = DetectionGraph(model.eval())
    device = next(model.parameters()).device

    def expected(images: Tensor) -> list[Tensor]:
        return [output.cpu() for output in graph(images.to(device))]

    scenes = ShapesConfig(length=2, height=SCENE[0], width=SCENE[1], objects=(3, 6), contrast=0.3).build()
    batches = [torch.stack([scenes[index].pixels for index in range(2)]), _without_detection(expected)]
    checked = [
        compare([output[index] for output in ours], [output[index] for output in theirs], images.shape[2:])
        for images in batches
        for ours, theirs in [(expected(images), run(images))]
        for index in range(len(images))
    ]
    if not all(result.passed for result in checked):
        lines = "\n  ".join(map(str, checked))
        raise CheckFailed(f"the exported file gives other detections than the model:\n  {lines}")
    return checked


def _without_detection(detect: Callable[[Tensor], Sequence[Tensor]]) -> Tensor:
    """Return an image of one colour in which a model finds nothing, `(1, 3, H, W)`; if there is none, any of these."""
    images = [torch.full((1, 3, *BLANK), level, dtype=torch.uint8) for level in GREY_LEVELS]
    return next((image for image in images if not detect(image)[1].any()), images[0])


def compare(ours: Sequence[Tensor], theirs: Sequence[Tensor], size: Sequence[int]) -> Checked:
    """Compare the outputs of two programs for one image: boxes `(D, 4)`, labels, scores `(D,)`, masks `(D, M, M)`.

    Detections with almost equal scores may have another order. One with almost the lowest score may be missing.
    """
    boxes, labels, scores, *masks = (output[theirs[1] > 0] for output in theirs)
    lowest = float(ours[2][ours[1] > 0].min()) if bool((ours[1] > 0).any()) else math.inf
    largest = [0.0, 0.0, 0.0]
    free = torch.ones(len(labels), dtype=torch.bool)
    for n in (ours[1] > 0).nonzero()[:, 0].tolist():
        candidates = free & (labels == ours[1][n]) & ((scores - ours[2][n]).abs() <= TOLERANCE)
        if not candidates.any():
            largest[1] = max(largest[1], math.inf if float(ours[2][n]) > lowest + TOLERANCE else 0.0)
            continue
        distances = (boxes - ours[0][n]).abs().amax(dim=1).where(candidates, math.inf)
        match = int(distances.argmin())
        free[match] = False
        differences = [float(distances[match]), float((scores[match] - ours[2][n]).abs())]
        differences += [float((masks[0][match] - ours[3][n]).abs().max()) if masks else 0.0]
        largest = [max(pair) for pair in zip(largest, differences, strict=True)]
    if bool((scores[free] > lowest + TOLERANCE).any()) or (lowest == math.inf and len(labels)):
        largest[1] = math.inf
    return Checked(int(size[0]), int(size[1]), int((ours[1] > 0).sum()), *largest)
