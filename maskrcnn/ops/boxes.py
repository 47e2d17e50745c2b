"""Boxes: conversions, overlap, clipping, and the coding of one box relative to another.

Shapes: B images, N boxes, G objects. A box is `(x1, y1, x2, y2)` in continuous pixel coordinates (no +1): see
`structures.py`. All functions take any leading dimensions unless they say otherwise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BoxWeights = tuple[float, float, float, float]

# exp() of a predicted size change is cut here, so that a wild prediction cannot overflow: 1000 px from an anchor
# of 16 px. The value of Detectron, Detectron2 and torchvision.
MAX_LOG_RATIO = math.log(1000.0 / 16)


def xywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Corner and size `(x, y, width, height)`, as COCO files have it, to two corners."""
    x, y, width, height = boxes.unbind(-1)
    return torch.stack((x, y, x + width, y + height), dim=-1)


def xyxy_to_xywh(boxes: Tensor) -> Tensor:
    """Two corners to corner and size `(x, y, width, height)`."""
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack((x1, y1, x2 - x1, y2 - y1), dim=-1)


def box_area(boxes: Tensor) -> Tensor:
    """Area in square pixels: `(..., 4) -> (...)`."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def pairwise_intersection(first: Tensor, second: Tensor) -> Tensor:
    """Shared area of every pair: `(..., N, 4), (..., G, 4) -> (..., N, G)`."""
    # One axis at a time keeps the largest temporary at N x G, not N x G x 2.
    left, top, right, bottom = first[..., :, None, :].unbind(-1)
    other = second[..., None, :, :]
    width = (torch.minimum(right, other[..., 2]) - torch.maximum(left, other[..., 0])).clamp_(min=0)
    height = (torch.minimum(bottom, other[..., 3]) - torch.maximum(top, other[..., 1])).clamp_(min=0)
    return width.mul_(height)


def pairwise_iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of every pair: `(..., N, 4), (..., G, 4) -> (..., N, G)`; 0 for two empty boxes."""
    shared = pairwise_intersection(first, second)
    return iou_from_intersection(shared, box_area(first), box_area(second))


def iou_from_intersection(shared: Tensor, first_area: Tensor, second_area: Tensor) -> Tensor:
    """IoU `(..., N, G)` from shared areas `(..., N, G)` and the areas `(..., N)` and `(..., G)`."""
    union = first_area[..., :, None] + second_area[..., None, :] - shared
    return torch.where(shared > 0, shared / union, torch.zeros((), dtype=shared.dtype, device=shared.device))


def clip_boxes(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Move corners into the image: boxes `(B, ..., 4)`, sizes `(B, 2)` height and width."""
    limits = sizes.flip(-1).repeat(1, 2).to(boxes)  # (B, 2) -> (B, 4): width, height, width, height
    limits = limits.view(limits.shape[0], *[1] * (boxes.dim() - 2), 4)
    return torch.minimum(boxes.clamp(min=0), limits)


def encode_deltas(boxes: Tensor, anchors: Tensor, *, weights: BoxWeights) -> Tensor:
    """How `anchors` must move and grow to become `boxes`: `(dx, dy, dw, dh)`, each times its weight.

    R-CNN's parametrisation (arXiv 1311.2524, appendix C): shifts of the centre relative to the anchor's size, and
    logarithms of the size ratios. Pairs in which a side is not positive give zeros.
    """
    anchor_size = anchors[..., 2:] - anchors[..., :2]
    box_size = boxes[..., 2:] - boxes[..., :2]
    proper = ((anchor_size > 0) & (box_size > 0)).all(dim=-1, keepdim=True)
    one = torch.ones((), dtype=boxes.dtype, device=boxes.device)
    anchor_size, box_size = torch.where(proper, anchor_size, one), torch.where(proper, box_size, one)
    shift = ((boxes[..., :2] + boxes[..., 2:]) - (anchors[..., :2] + anchors[..., 2:])) * 0.5 / anchor_size
    deltas = torch.cat((shift, torch.log(box_size / anchor_size)), dim=-1)
    return torch.where(proper, deltas * deltas.new_tensor(weights), torch.zeros_like(deltas))


def decode_deltas(deltas: Tensor, anchors: Tensor, *, weights: BoxWeights) -> Tensor:
    """Apply `(dx, dy, dw, dh)` to `anchors`: the inverse of `encode_deltas`. Shapes broadcast. Computed in float32."""
    shift, growth = (deltas.float() / torch.tensor(weights, device=deltas.device)).split(2, dim=-1)
    size = anchors[..., 2:] - anchors[..., :2]
    centre = (anchors[..., :2] + anchors[..., 2:]) * 0.5 + shift * size
    half = torch.exp(growth.clamp(max=MAX_LOG_RATIO)) * size * 0.5
    return torch.cat((centre - half, centre + half), dim=-1)
