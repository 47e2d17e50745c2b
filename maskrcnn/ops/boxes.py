"""Boxes: format conversions, IoU, clipping, and encoding of boxes relative to anchors.

Shapes: B images, N boxes, G objects. A box is `(x1, y1, x2, y2)` in continuous pixel coordinates (no +1): see
`structures.py`. Functions accept any leading dimensions unless stated otherwise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BoxWeights = tuple[float, float, float, float]

# Upper limit of predicted dw and dh, so that exp() does not overflow: an anchor of 16 px can grow to 1000 px. The same
# value as in Detectron, Detectron2 and torchvision.
MAX_LOG_RATIO = math.log(1000.0 / 16)


def xywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Convert COCO's `(x, y, width, height)` to `(x1, y1, x2, y2)`."""
    x, y, width, height = boxes.unbind(-1)
    return torch.stack((x, y, x + width, y + height), dim=-1)


def xyxy_to_xywh(boxes: Tensor) -> Tensor:
    """Convert `(x1, y1, x2, y2)` to COCO's `(x, y, width, height)`."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack((x1, y1, x2 - x1, y2 - y1), dim=-1)


def box_area(boxes: Tensor) -> Tensor:
    """Return the area in square pixels: `(..., 4) -> (...)`."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def pairwise_intersection(first: Tensor, second: Tensor) -> Tensor:
    """Return the intersection area of all pairs: `(..., N, 4), (..., G, 4) -> (..., N, G)`."""
    # One axis at a time keeps the largest temporary at N x G, not N x G x 2.
    left, top, right, bottom = first[..., :, None, :].unbind(-1)
    second = second[..., None, :, :]
    width = (torch.minimum(right, second[..., 2]) - torch.maximum(left, second[..., 0])).clamp_(min=0)
    height = (torch.minimum(bottom, second[..., 3]) - torch.maximum(top, second[..., 1])).clamp_(min=0)
    return width.mul_(height)


def pairwise_iou(first: Tensor, second: Tensor) -> Tensor:
    """Return the IoU of all pairs: `(..., N, 4), (..., G, 4) -> (..., N, G)`; 0 for two empty boxes."""
    intersection = pairwise_intersection(first, second)
    return iou_from_intersection(intersection, box_area(first), box_area(second))


def iou_from_intersection(shared: Tensor, first_area: Tensor, second_area: Tensor) -> Tensor:
    """Return the IoU `(..., N, G)` from intersection areas `(..., N, G)` and box areas `(..., N)` and `(..., G)`."""
    union = first_area[..., :, None] + second_area[..., None, :] - shared
    return torch.where(shared > 0, shared / union, torch.zeros((), dtype=shared.dtype, device=shared.device))


def clip_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Clip boxes `(B, ..., 4)` to images of `sizes` `(B, 2)`, height and width."""
    limits = sizes.flip(-1).repeat(1, 2).to(boxes)  # (B, 2) -> (B, 4): width, height, width, height
    limits = limits.view(limits.shape[0], *[1] * (boxes.dim() - 2), 4)
    return torch.minimum(boxes.clamp(min=0), limits)


def encode_deltas(boxes: Tensor, anchors: Tensor, *, weights: BoxWeights) -> Tensor:
    """Encode `boxes` relative to `anchors` as deltas `(dx, dy, dw, dh)`, each multiplied by its weight.

    R-CNN's parametrisation (arXiv 1311.2524, appendix C): offsets of the centre relative to the anchor's size, and
    logarithms of the size ratios. Deltas are 0 if a side of the box or the anchor is not positive.
    """
    anchor_size = anchors[..., 2:] - anchors[..., :2]
    box_size = boxes[..., 2:] - boxes[..., :2]
    has_area = ((anchor_size > 0) & (box_size > 0)).all(dim=-1, keepdim=True)
    one = torch.ones((), dtype=boxes.dtype, device=boxes.device)
    anchor_size, box_size = torch.where(has_area, anchor_size, one), torch.where(has_area, box_size, one)
    shift = ((boxes[..., :2] + boxes[..., 2:]) - (anchors[..., :2] + anchors[..., 2:])) * 0.5 / anchor_size
    deltas = torch.cat((shift, torch.log(box_size / anchor_size)), dim=-1)
    weighted = torch.stack([delta * weight for delta, weight in zip(deltas.unbind(-1), weights, strict=True)], dim=-1)
    return torch.where(has_area, weighted, torch.zeros_like(deltas))


def decode_deltas(deltas: Tensor, anchors: Tensor, *, weights: BoxWeights) -> Tensor:
    """Return the boxes of deltas `(dx, dy, dw, dh)`: the inverse of `encode_deltas`. Shapes broadcast; float32."""
    # One weight at a time: a tensor of the weights would have to be copied to a GPU, for which the host waits.
    unweighted = [delta / weight for delta, weight in zip(deltas.float().unbind(-1), weights, strict=True)]
    shift, log_ratio = torch.stack(unweighted, dim=-1).split(2, dim=-1)
    size = anchors[..., 2:] - anchors[..., :2]
    centre = (anchors[..., :2] + anchors[..., 2:]) * 0.5 + shift * size
    half = torch.exp(log_ratio.clamp(max=MAX_LOG_RATIO)) * size * 0.5
    return torch.cat((centre - half, centre + half), dim=-1)
