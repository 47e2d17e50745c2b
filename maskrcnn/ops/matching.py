"""Which box belongs to which object, and which boxes are drawn for training.

Shapes: B images, N boxes (anchors or proposals), G objects, S samples.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from maskrcnn.ops.boxes import box_area, iou_from_intersection, pairwise_intersection
from maskrcnn.structures import Targets

# A box more than half inside an ignored region (a crowd) is no proof of background. Matterport's Mask R-CNN and
# COCO's own evaluation, which matches crowds by the share of the detection inside, have the same idea.
IGNORED_SHARE = 0.5

# Pairs whose overlaps are held at once: 2^23 float32 values are 32 MiB, and about six such tensors live together.
PAIRS_AT_ONCE = 2**23


class Matches(NamedTuple):
    """The object of each box."""

    labels: Tensor  # (B, N) int64: class of the object for positives, 0 for background, -1 for "do not use"
    matched: Tensor  # (B, N) int64: index of the object with the largest IoU; 0 in images without objects


def match_boxes(
    boxes: Tensor, targets: Targets, *, foreground: float, background: float, allow_low_quality_matches: bool
) -> Matches:
    """Assign to each box the object that it overlaps most.

    A box is positive from IoU `foreground` on, background below `background`, and not used between the two or where it
    lies in an ignored region. With `allow_low_quality_matches`, the boxes that overlap an object most are positive
    whatever the overlap, all of them in a tie, so that no object is without an anchor (Faster R-CNN, section 3.1.2).
    Such a box keeps the object that it overlaps most itself, as in Detectron2 and torchvision.

    Args:
        boxes: `(N, 4)` shared by all images, or `(B, N, 4)`.
        targets: ground truth of B images.
        foreground: smallest IoU of a positive.
        background: IoU below which a box is background.
        allow_low_quality_matches: whether each object's best boxes become positive.
    """
    boxes = boxes.expand(len(targets.labels), *boxes.shape[-2:])
    step = max(1, PAIRS_AT_ONCE // targets.labels.numel())  # many objects: fewer boxes at once
    chunks = [(chunk, _rivals(chunk, targets)) for chunk in boxes.split(step, dim=1)]
    best_of_object = torch.full_like(targets.boxes[..., 0], 0 if allow_low_quality_matches else torch.inf)
    if allow_low_quality_matches:  # a first pass over all boxes finds each object's largest IoU
        for chunk, rivals in chunks:
            best = _overlaps(chunk, rivals)[0].amax(dim=1)
            best_of_object[:, rivals.columns] = torch.maximum(best_of_object[:, rivals.columns], best)
    parts = [_match_chunk(chunk, rivals, best_of_object, foreground, background) for chunk, rivals in chunks]
    labels, matched = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return Matches(labels, matched)


class _Rivals(NamedTuple):
    """The objects with which a chunk of boxes is compared: all, or those that any of the boxes can touch."""

    columns: Tensor  # (g,) int64, ascending: which of the G objects
    boxes: Tensor  # (B, g, 4)
    labels: Tensor  # (B, g)


def _rivals(boxes: Tensor, targets: Targets) -> _Rivals:
    """Choose the objects for a chunk `(B, n, 4)`.

    Anchors come row by row, so that a chunk covers a strip of the image: on a CPU, leaving out the objects beyond it
    makes matching 2,000 objects four times as fast. A GPU is fast enough, and would have to wait for their number.
    """
    columns = torch.arange(targets.labels.shape[1], device=boxes.device)
    if boxes.device.type == "cpu" and boxes.numel() > 0:
        low, high = boxes[..., :2].amin(dim=1, keepdim=True), boxes[..., 2:].amax(dim=1, keepdim=True)
        beyond = ((targets.boxes[..., 2:] <= low) | (targets.boxes[..., :2] >= high)).any(dim=-1).all(dim=0)
        columns = columns[:1] if bool(beyond.all()) else columns[~beyond]
    return _Rivals(columns, targets.boxes[:, columns], targets.labels[:, columns])


def _match_chunk(
    boxes: Tensor, rivals: _Rivals, best_of_object: Tensor, foreground: float, background: float
) -> tuple[Tensor, Tensor]:
    iou, in_ignored = _overlaps(boxes, rivals)
    best, matched = iou.max(dim=2)  # (B, N, g) -> (B, N)
    ties = ((iou == best_of_object[:, None, rivals.columns]) & (iou > 0)).any(dim=2)
    positive = (best >= foreground) | ties
    unused = (best >= background) | in_ignored
    labels = torch.where(positive, rivals.labels.gather(1, matched), torch.where(unused, -1, 0))
    return labels, torch.where(best > 0, rivals.columns[matched], 0)


def _overlaps(boxes: Tensor, rivals: _Rivals) -> tuple[Tensor, Tensor]:
    """IoU with each object `(B, N, g)` (0 for padding), and whether a box lies in an ignored region `(B, N)`."""
    shared = pairwise_intersection(boxes, rivals.boxes)
    area = box_area(boxes)
    iou = iou_from_intersection(shared, area, box_area(rivals.boxes)) * (rivals.labels > 0)[:, None]
    in_ignored = (shared * (rivals.labels < 0)[:, None]).amax(dim=2) > IGNORED_SHARE * area
    return iou, in_ignored


def sample_balanced(
    labels: Tensor, *, count: int, positive_fraction: float, seeds: Tensor, stream: int
) -> tuple[Tensor, Tensor]:
    """Draw boxes for training: at most `count * positive_fraction` positives, filled up with background.

    Args:
        labels: `(B, N)`: above 0 positive, 0 background, below 0 never drawn.
        count: samples of an image, S.
        positive_fraction: largest share of positives among them.
        seeds: `(B,)` int64. The draw of an image depends on its seed alone, not on the rest of the batch.
        stream: tells the draws of one image apart (RPN, heads).

    Returns:
        Indices `(B, S)` into N, positives first, and a mask `(B, S)` of those that were drawn; where an image has too
        few boxes, the rest is padding with index 0.
    """
    keys = random_keys(seeds, labels.shape[1], stream=stream)
    positive_keys = torch.where(labels > 0, keys, -1)
    chosen_keys, chosen = positive_keys.topk(min(int(count * positive_fraction), labels.shape[1]), dim=1)
    is_chosen = torch.zeros_like(labels, dtype=torch.bool).scatter(1, chosen, chosen_keys >= 0)
    # Ranks: a chosen positive above every negative, and those above whatever may not be drawn.
    ranks = torch.where(is_chosen, 2 * _KEYS + keys, torch.where(labels == 0, _KEYS + keys, 0))
    best, indices = ranks.topk(min(count, labels.shape[1]), dim=1)
    missing = (0, count - indices.shape[1])
    indices, best = torch.nn.functional.pad(indices, missing), torch.nn.functional.pad(best, missing)
    drawn = best >= _KEYS
    return torch.where(drawn, indices, 0), drawn


_KEYS = 2**32  # keys are below this


def random_keys(seeds: Tensor, count: int, *, stream: int) -> Tensor:
    """Random integers in [0, 2^32), `(B, count)` int64, that depend on (seed, stream, position) alone.

    A counter-based generator (as in Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): a hash of the
    position, here MurmurHash3's 32-bit finaliser applied twice. It has no state, so the same image gives the same
    draw on every device, in every batch, after every restart.
    """
    position = torch.arange(count, device=seeds.device)
    key = _mix(_mix(seeds & 0xFFFFFFFF) ^ _mix((seeds >> 32 & 0xFFFFFFFF) + 0x9E3779B9 * (stream + 1)))
    return _mix(_mix(position[None] + 0x7F4A7C15) ^ key[:, None])


def _mix(value: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser, in int64 (products of two 32-bit numbers wrap, and the low bits stay right)."""
    value = value & 0xFFFFFFFF
    value = (value ^ (value >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    value = (value ^ (value >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return value ^ (value >> 16)
