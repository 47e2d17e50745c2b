"""Non-maximum suppression (NMS) for padded batches.

Shapes: B images, N boxes, P kept boxes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import nms


def batched_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, *, iou_threshold: float, count: int
) -> tuple[Tensor, Tensor]:
    """Apply NMS within each image and group (a pyramid level, a class), and keep the best boxes of each image.

    A box is suppressed if its IoU with a kept box of the same image and group and with a higher score is above
    `iou_threshold`.

    Args:
        boxes: `(B, N, 4)`.
        scores: `(B, N)`; -inf for padding.
        groups: `(B, N)` int64, not negative.
        iou_threshold: largest IoU of two kept boxes of a group.
        count: P, number of boxes to keep in each image.

    Returns:
        Indices `(B, P)` into N, in descending order of the scores, and the scores `(B, P)`; -inf for padding.
    """
    batch, num_boxes = scores.shape
    kept_scores = torch.full_like(scores, -torch.inf).flatten()
    # A unique key for each pair of image and group.
    keys = groups + torch.arange(batch, device=groups.device)[:, None] * (int(groups.max()) + 1 if num_boxes else 1)
    candidates = torch.nonzero(scores.flatten() > -torch.inf)[:, 0]
    kept = _grouped_nms(
        boxes.reshape(-1, 4)[candidates].float(),
        scores.flatten()[candidates],
        keys.flatten()[candidates],
        iou_threshold,
    )
    kept = candidates[kept]
    kept_scores[kept] = scores.flatten()[kept]
    top_scores, indices = kept_scores.view(batch, num_boxes).topk(min(count, num_boxes), dim=1)
    padding = (0, count - top_scores.shape[1])
    return torch.nn.functional.pad(indices, padding), torch.nn.functional.pad(top_scores, padding, value=-torch.inf)


def _grouped_nms(boxes: Tensor, scores: Tensor, keys: Tensor, iou_threshold: float) -> Tensor:
    """Apply NMS within each group of equal keys. Returns the indices of the kept boxes, in no particular order."""
    if boxes.device.type == "cpu":  # the CPU kernel compares all pairs, so a loop over the groups is faster
        order = torch.argsort(keys, stable=True)
        sizes = torch.unique_consecutive(keys[order], return_counts=True)[1].tolist()
        members = order.split(sizes)
        return torch.cat([group[nms(boxes[group], scores[group], iou_threshold)] for group in members] or [order])
    # One kernel launch: offsets separate the groups. float64 keeps the coordinates exact in spite of the offsets.
    span = boxes.max() + 1 if len(boxes) else boxes.new_ones(())
    return nms(boxes.double() + (keys * span.double())[:, None], scores.double(), iou_threshold)
