"""Non-maximum suppression of the detections of an image, by box or by mask, within classes or across them."""

from __future__ import annotations

from typing import Literal

import torch
from torchvision.ops import batched_nms, nms

from maskrcnn.data import mask_crops
from maskrcnn.engine.instances import Instances
from maskrcnn.ops.boxes import pairwise_intersection

Nms = Literal["class", "agnostic", "mask"]


def suppress(instances: Instances, kind: Nms, threshold: float) -> Instances:
    """Return the instances without those that overlap a better one by more than `threshold`.

    Args:
        instances: the detections of an image.
        kind: "class" compares the boxes of each class, "agnostic" the boxes of all classes, "mask" the masks of each
            class, so that objects stay whose boxes overlap but whose masks do not.
        threshold: largest IoU of two that stay.

    Raises:
        ValueError: `kind` is "mask", but the model has no mask head.
    """
    if kind == "agnostic":
        return instances[nms(instances.boxes, instances.scores, threshold)]
    if kind == "class":
        return instances[batched_nms(instances.boxes, instances.scores, instances.labels, threshold)]
    return instances[_mask_nms(instances, threshold)]


def _mask_nms(instances: Instances, threshold: float) -> list[int]:
    if len(instances) and not instances.has_masks:
        raise ValueError("these instances have no masks: the model has no mask head")
    masks = instances.mask_crops
    near = (pairwise_intersection(instances.boxes, instances.boxes) > 0) & (
        instances.labels[:, None] == instances.labels
    )
    kept: list[int] = []
    for index in torch.argsort(instances.scores, descending=True, stable=True).tolist():
        if all(not near[index, other] or mask_crops.iou(masks[index], masks[other]) <= threshold for other in kept):
            kept.append(index)
    return kept
