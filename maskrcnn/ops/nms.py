"""Non-maximum suppression over a dense batch.

Shapes: B images, N boxes, P kept boxes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import nms


def batched_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, *, iou_threshold: float, count: int
) -> tuple[Tensor, Tensor]:
    """Keep the best boxes of each image, of two that overlap in a group the better one.

    Boxes suppress only boxes of their own image and group (a pyramid level, a class), and only where the IoU is
    above `iou_threshold`.

    Args:
        boxes: `(B, N, 4)`.
        scores: `(B, N)`; -inf for padding.
        groups: `(B, N)` int64, from 0.
        iou_threshold: largest IoU that two kept boxes of a group may have.
        count: how many boxes to keep in each image, P.

    Returns:
        Indices `(B, P)` into N, best first, and their scores `(B, P)`, -inf where fewer than P boxes remain.
    """
    batch, number = scores.shape
    kept = torch.full_like(scores, -torch.inf).flatten()
    # Keys that no two (image, group) pairs share.
    keys = groups + torch.arange(batch, device=groups.device)[:, None] * (int(groups.max()) + 1 if number else 1)
    candidates = torch.nonzero(scores.flatten() > -torch.inf)[:, 0]
    survivors = _grouped_nms(
        boxes.reshape(-1, 4)[candidates].float(),
        scores.flatten()[candidates],
        keys.flatten()[candidates],
        iou_threshold,
    )
    survivors = candidates[survivors]
    kept[survivors] = scores.flatten()[survivors]
    best, indices = kept.view(batch, number).topk(min(count, number), dim=1)
    missing = (0, count - best.shape[1])
    return torch.nn.functional.pad(indices, missing), torch.nn.functional.pad(best, missing, value=-torch.inf)


def _grouped_nms(boxes: Tensor, scores: Tensor, keys: Tensor, iou_threshold: float) -> Tensor:
    """NMS inside each group of equal keys: indices of the survivors, in no particular order."""
    if boxes.device.type == "cpu":  # the kernel compares all pairs: a loop over the groups is far less work
        order = torch.argsort(keys, stable=True)
        sizes = torch.unique_consecutive(keys[order], return_counts=True)[1].tolist()
        members = order.split(sizes)
        return torch.cat([group[nms(boxes[group], scores[group], iou_threshold)] for group in members] or [order])
    # One launch: groups are moved apart. In float64, so that the shift leaves every coordinate as it was.
    span = boxes.max() + 1 if len(boxes) else boxes.new_ones(())
    return nms(boxes.double() + (keys * span.double())[:, None], scores.double(), iou_threshold)
