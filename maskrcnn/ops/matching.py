"""Matching of anchors and proposals to ground-truth objects, and balanced random sampling for training.

Shapes: B images, N boxes (anchors or proposals), G objects, S samples.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from maskrcnn.ops import cpu
from maskrcnn.ops.boxes import box_area, iou_from_intersection, pairwise_intersection
from maskrcnn.structures import Targets

# A box with more than this fraction of its area inside an ignored region (a crowd) is not used as background. Similar
# rules: Matterport's Mask R-CNN, and the COCO evaluation, which matches crowds by intersection over detection area.
IGNORED_SHARE = 0.5

# Pairs of box and object per chunk: 2^23 float32 values are 32 MiB, and about six such tensors exist at a time.
PAIRS_AT_ONCE = 2**23
# On a GPU, where small chunks cost kernels: 2^27 are 512 MiB, enough for the anchors of 16 images of 800 x 1344 with 31
# objects each. More objects take more chunks and no more memory.
PAIRS_AT_ONCE_ON_GPU = 2**27


class Matches(NamedTuple):
    """Match of each box."""

    labels: Tensor  # (B, N) int64: class of the object for positives, 0 for background, -1 for unused boxes
    matched: Tensor  # (B, N) int64: index of the object with the largest IoU; 0 in images without objects


def match_boxes(
    boxes: Tensor, targets: Targets, *, foreground: float, background: float, allow_low_quality_matches: bool
) -> Matches:
    """Match each box to the object with the largest IoU.

    A box is positive if this IoU is at least `foreground`, and background if it is below `background` and the box does
    not lie in an ignored region. Other boxes are unused. With `allow_low_quality_matches`, the boxes with the largest
    IoU of each object, all of them in a tie, are positive at any IoU > 0, so that every object has an anchor (Faster
    R-CNN, section 3.1.2). Such a box is still matched to the object with which its own IoU is largest, as in Detectron2
    and torchvision.

    Args:
        boxes: `(N, 4)`, the same for all images, or `(B, N, 4)`.
        targets: ground truth of B images.
        foreground: smallest IoU of a positive.
        background: IoU below which a box is background.
        allow_low_quality_matches: if True, the boxes with the largest IoU of each object become positive.
    """
    boxes = boxes.expand(len(targets.labels), *boxes.shape[-2:])
    step = boxes_at_once(boxes, targets)
    chunks = [(chunk, _candidates(chunk, targets)) for chunk in boxes.split(step, dim=1)]
    best_of_object = torch.full_like(targets.boxes[..., 0], 0 if allow_low_quality_matches else torch.inf)
    if allow_low_quality_matches:  # a first pass computes the largest IoU of each object
        for chunk, objects in chunks:
            best_of_chunk = _overlaps(chunk, objects)[0].amax(dim=1)
            best_of_object[:, objects.columns] = torch.maximum(best_of_object[:, objects.columns], best_of_chunk)
    matches = [_match_chunk(chunk, objects, best_of_object, foreground, background) for chunk, objects in chunks]
    labels, matched = (torch.cat(tensors, dim=1) for tensors in zip(*matches, strict=True))
    return Matches(labels, matched)


def boxes_at_once(boxes: Tensor, targets: Targets) -> int:
    """Return how many boxes `(B, N, 4)` of each image to compare with its objects at a time.

    All of them when compiled: fused operations do not store the values of the pairs.
    """
    if torch.compiler.is_compiling():
        return max(1, boxes.shape[1])
    pairs = PAIRS_AT_ONCE if cpu.takes_short_cuts(boxes) else PAIRS_AT_ONCE_ON_GPU
    return max(1, pairs // targets.labels.numel())


class _Candidates(NamedTuple):
    """The objects to compare with a chunk of boxes: all, or only those that can overlap one of the boxes."""

    columns: Tensor  # (g,) int64, ascending: indices into the G objects
    boxes: Tensor  # (B, g, 4)
    labels: Tensor  # (B, g)


def _candidates(boxes: Tensor, targets: Targets) -> _Candidates:
    """Return the objects to compare with a chunk of boxes `(B, n, 4)`.

    Anchors are ordered by row, so a chunk covers a strip of the image. On a CPU, skipping the objects outside the strip
    makes matching 2,000 objects four times as fast. On a GPU all objects are used: the host would have to wait for the
    number of objects in the strip.
    """
    columns = torch.arange(targets.labels.shape[1], device=boxes.device)
    if cpu.takes_short_cuts(boxes) and boxes.numel() > 0:
        low, high = boxes[..., :2].amin(dim=1, keepdim=True), boxes[..., 2:].amax(dim=1, keepdim=True)
        outside = ((targets.boxes[..., 2:] <= low) | (targets.boxes[..., :2] >= high)).any(dim=-1).all(dim=0)
        columns = columns[:1] if bool(outside.all()) else columns[~outside]
    return _Candidates(columns, targets.boxes[:, columns], targets.labels[:, columns])


def _match_chunk(
    boxes: Tensor, objects: _Candidates, best_of_object: Tensor, foreground: float, background: float
) -> tuple[Tensor, Tensor]:
    iou, in_ignored = _overlaps(boxes, objects)
    best, matched = iou.max(dim=2)  # (B, N, g) -> (B, N)
    ties = ((iou == best_of_object[:, None, objects.columns]) & (iou > 0)).any(dim=2)
    positive = (best >= foreground) | ties
    unused = (best >= background) | in_ignored
    labels = torch.where(positive, objects.labels.gather(1, matched), torch.where(unused, -1, 0))
    return labels, torch.where(best > 0, objects.columns[matched], 0)


def _overlaps(boxes: Tensor, objects: _Candidates) -> tuple[Tensor, Tensor]:
    """Return the IoU with each object `(B, N, g)`, 0 for padding, and if a box lies in an ignored region `(B, N)`."""
    intersection = pairwise_intersection(boxes, objects.boxes)
    area = box_area(boxes)
    iou = iou_from_intersection(intersection, area, box_area(objects.boxes)) * (objects.labels > 0)[:, None]
    in_ignored = (intersection * (objects.labels < 0)[:, None]).amax(dim=2) > IGNORED_SHARE * area
    return iou, in_ignored


def sample_balanced(
    labels: Tensor, *, count: int, positive_fraction: float, seeds: Tensor, stream: int
) -> tuple[Tensor, Tensor]:
    """Sample boxes for training: at most `count * positive_fraction` positives, the rest background.

    Args:
        labels: `(B, N)`: > 0 positive, 0 background, < 0 never sampled.
        count: samples per image, S.
        positive_fraction: largest fraction of positives among them.
        seeds: `(B,)` int64 random seeds. The sample of an image depends only on its seed, not on its batch.
        stream: distinguishes the independent random numbers of an image (RPN, heads).

    Returns:
        Indices `(B, S)` into N, positives first, and `(B, S)` bool, True for samples. If an image has too few boxes,
        the remaining entries are padding: index 0 and False.
    """
    keys = random_keys(seeds, labels.shape[1], stream=stream)
    positive_keys = torch.where(labels > 0, keys, -1)
    top_keys, top_positives = positive_keys.topk(min(int(count * positive_fraction), labels.shape[1]), dim=1)
    is_selected = torch.zeros_like(labels, dtype=torch.bool).scatter(1, top_positives, top_keys >= 0)
    # Order of the ranks: selected positives, then negatives, then boxes that are not sampled.
    ranks = torch.where(is_selected, 2 * _KEY_LIMIT + keys, torch.where(labels == 0, _KEY_LIMIT + keys, 0))
    top_ranks, indices = ranks.topk(min(count, labels.shape[1]), dim=1)
    padding = (0, count - indices.shape[1])
    indices, top_ranks = torch.nn.functional.pad(indices, padding), torch.nn.functional.pad(top_ranks, padding)
    sampled = top_ranks >= _KEY_LIMIT
    return torch.where(sampled, indices, 0), sampled


_KEY_LIMIT = 2**32  # keys are smaller than this


def random_keys(seeds: Tensor, count: int, *, stream: int) -> Tensor:
    """Return random integers in [0, 2^32), `(B, count)` int64, that depend only on seed, stream and position.

    A counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011): a hash of the
    position, here two applications of MurmurHash3's 32-bit finaliser. It has no state, so an image gets the same
    numbers on every device, in every batch and after a resume.
    """
    position = torch.arange(count, device=seeds.device)
    key = _mix(_mix(seeds & 0xFFFFFFFF) ^ _mix((seeds >> 32 & 0xFFFFFFFF) + 0x9E3779B9 * (stream + 1)))
    return _mix(_mix(position[None] + 0x7F4A7C15) ^ key[:, None])


def _mix(value: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser, in int64. Products overflow, but their low 32 bits are correct."""
    value = value & 0xFFFFFFFF
    value = (value ^ (value >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    value = (value ^ (value >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return value ^ (value >> 16)
