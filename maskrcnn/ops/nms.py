"""Non-maximum suppression (NMS) for padded batches.

A box is suppressed if its IoU with a kept box of the same image and group (a pyramid level, a class) is above a
threshold and the kept box has a higher score, or an equal score and a smaller index.

On a CPU, torchvision's `nms` runs on one group after another. Elsewhere shapes must not depend on values, and the host
must not wait, so torch's operators compute the same boxes with fixed shapes. NMS is sequential by nature: where many
boxes are kept, in blocks (`nms_of_levels`); where few are kept, one after another (`batched_nms`). With `triton`, a
kernel of this project computes them (`maskrcnn.ops.kernels.nms`). A graph for a runtime that has an operator for NMS
gets a node of it instead (`nms_as_operator`).

Shapes: B images, N boxes, P kept boxes, L levels, G = B * L groups, M boxes of a group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import nms

from maskrcnn.ops import cpu
from maskrcnn.ops.boxes import box_area, pairwise_iou

# Boxes of a block. A table has an entry for each of the 2^6 sets of suppressed boxes of each block: 1.8 * M^2 bytes for
# a group, and M / 6 steps one after another.
BLOCK = 6
PAIRS_AT_ONCE = 2**25  # of boxes, whose IoU is computed at a time; each takes about 20 bytes


def batched_nms(
    boxes: Tensor, scores: Tensor, groups: Tensor, *, iou_threshold: float, count: int, triton: bool = False
) -> tuple[Tensor, Tensor]:
    """Apply NMS within each image and group, and keep the best boxes of each image.

    Args:
        boxes: `(B, N, 4)`.
        scores: `(B, N)`; -inf for padding.
        groups: `(B, N)` int64, not negative, less than 2^24.
        iou_threshold: largest IoU of two kept boxes of a group.
        count: P, number of boxes to keep in each image.
        triton: elsewhere than on a CPU, use the Triton kernel.

    Returns:
        Indices `(B, P)` into N, in descending order of the scores, and the scores `(B, P)`; -inf for padding.
    """
    if _as_operator.get():
        return _by_operator(boxes, scores, groups, iou_threshold, count)
    if cpu.takes_short_cuts(boxes):
        return _by_groups(boxes, scores, groups, iou_threshold, count)
    select = _with_triton if triton else _one_by_one
    return select(boxes, scores, groups, iou_threshold, count)


def nms_of_levels(
    boxes: Tensor, scores: Tensor, sizes: Sequence[int], *, iou_threshold: float, count: int, triton: bool = False
) -> tuple[Tensor, Tensor]:
    """Apply NMS within each image and level, and keep the best boxes of each image.

    Args:
        boxes: `(B, N, 4)`, level after level.
        scores: `(B, N)`; -inf for padding.
        sizes: the number of boxes of each level; the sum is N.
        iou_threshold: largest IoU of two kept boxes of a level.
        count: P, number of boxes to keep in each image.
        triton: elsewhere than on a CPU, use the Triton kernel.

    Returns:
        As `batched_nms`.
    """
    if cpu.takes_short_cuts(boxes) or _as_operator.get():
        levels = torch.cat([torch.full((size,), level) for level, size in enumerate(sizes)])
        return batched_nms(boxes, scores, levels.expand_as(scores), iou_threshold=iou_threshold, count=count)
    batch, length = boxes.shape[0], max(sizes)
    level_scores = _levels_first(scores, sizes, -torch.inf).flatten(0, 1)  # (G, M)
    level_boxes = _levels_first(boxes, sizes, 0.0).flatten(0, 1)
    if triton:
        groups = torch.zeros_like(level_scores, dtype=torch.int64)
        order, kept_scores = _with_triton(level_boxes, level_scores, groups, iou_threshold, min(count, length))
    else:
        order, kept_scores = _in_blocks(level_boxes, level_scores, iou_threshold)
    top_scores, positions = kept_scores.view(batch, -1).sort(dim=1, descending=True, stable=True)
    # Index in N of a box of each level.
    starts = [torch.full((order.shape[1],), sum(sizes[:level]), device=boxes.device) for level in range(len(sizes))]
    indices = (order.view(batch, -1) + torch.cat(starts)).clamp(max=scores.shape[1] - 1).gather(1, positions)
    return _exactly(indices, top_scores, count)


def _exactly(indices: Tensor, scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Cut or pad the sorted boxes of each image to `count`."""
    padding = (0, max(0, count - scores.shape[1]))
    return F.pad(indices[:, :count], padding), F.pad(scores[:, :count], padding, value=-torch.inf)


def _by_groups(
    boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, count: int
) -> tuple[Tensor, Tensor]:
    """Return `batched_nms` with torchvision's kernel, group by group: it compares all pairs of boxes that it gets."""
    batch, num_boxes = scores.shape
    # A unique key for each pair of image and group.
    keys = groups + torch.arange(batch)[:, None] * (int(groups.max()) + 1 if num_boxes else 1)
    candidates = torch.nonzero(scores.flatten() > -torch.inf)[:, 0]
    order = candidates[torch.argsort(keys.flatten()[candidates], stable=True)]
    sizes = torch.unique_consecutive(keys.flatten()[order], return_counts=True)[1].tolist()
    flat_boxes, flat_scores = boxes.reshape(-1, 4).float(), scores.flatten()
    kept_scores = torch.full_like(flat_scores, -torch.inf)
    for members in order.split(sizes):
        kept = members[nms(flat_boxes[members], flat_scores[members], iou_threshold)]
        kept_scores[kept] = flat_scores[kept]
    top_scores, indices = kept_scores.view(batch, num_boxes).topk(min(count, num_boxes), dim=1)
    return _exactly(indices, top_scores, count)


# ---- Fixed shapes


def _with_triton(
    boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, count: int
) -> tuple[Tensor, Tensor]:
    """Return `batched_nms` with the Triton kernel."""
    from maskrcnn.ops.kernels.nms import greedy_nms

    if not scores.shape[1]:
        return _exactly(groups[:, :0], scores[:, :0], count)
    usable = torch.where(scores > -torch.inf, scores, -torch.inf)  # nan is the largest number for `sort`
    sorted_scores, order = usable.sort(dim=1, descending=True, stable=True)
    positions = greedy_nms(
        boxes.float().gather(1, order[..., None].expand(-1, -1, 4)),
        groups.gather(1, order),
        (sorted_scores > -torch.inf).sum(dim=1),
        threshold=_rounded_down(iou_threshold),
        limit=count,
    )
    used = positions.clamp(min=0)
    return order.gather(1, used), torch.where(positions >= 0, sorted_scores.gather(1, used), -torch.inf)


def _in_blocks(boxes: Tensor, scores: Tensor, iou_threshold: float) -> tuple[Tensor, Tensor]:
    """Return the order of the boxes `(G, M, 4)` of each group, and their scores in it, `(G, M)`; -inf: suppressed."""
    sorted_scores, order = scores.sort(dim=1, descending=True, stable=True)
    keep = kept_in_blocks if torch.compiler.is_compiling() else _kept
    kept = keep(boxes.gather(1, order[..., None].expand(-1, -1, 4)), sorted_scores > -torch.inf, iou_threshold)
    return order, torch.where(kept, sorted_scores, -torch.inf)


def _one_by_one(
    boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, count: int
) -> tuple[Tensor, Tensor]:
    """Return `batched_nms`: `count` times, take the best box and suppress those that overlap it."""
    corners = boxes.float().transpose(1, 2)  # (B, 4, N)
    boxes_areas_groups = torch.cat((corners, box_area(boxes.float())[:, None], groups[:, None].float()), dim=1)
    threshold = _rounded_down(iou_threshold)
    remaining = torch.where(scores > -torch.inf, scores, -torch.inf)
    selected = []
    for _ in range(count if scores.shape[1] else 0):
        score, best = remaining.max(dim=1, keepdim=True)  # the first of equal scores
        chosen = boxes_areas_groups.gather(2, best[:, None].expand(-1, 6, -1))  # (B, 6, 1)
        low = torch.maximum(corners[:, :2], chosen[:, :2])
        high = torch.minimum(corners[:, 2:], chosen[:, 2:4])
        width, height = (high - low).clamp(min=0).unbind(1)
        shared = width * height
        iou = shared / (chosen[:, 4] + boxes_areas_groups[:, 4] - shared)  # nan, not above, if both are empty
        suppressed = (iou > threshold) & (boxes_areas_groups[:, 5] == chosen[:, 5])
        remaining = remaining.masked_fill(suppressed, -torch.inf).scatter(1, best, -torch.inf)
        selected.append((best, score))
    if not selected:
        return _exactly(groups[:, :0], scores[:, :0], count)
    indices, top_scores = (torch.cat(columns, dim=1) for columns in zip(*selected, strict=True))
    return indices, top_scores


def _levels_first(values: Tensor, sizes: Sequence[int], padding: float) -> Tensor:
    """Return values `(B, N, ...)` of all levels as `(B, L, M, ...)`; M is the largest of `sizes`."""
    blank = [0, 0] * (values.dim() - 2)
    padded = [F.pad(level, (*blank, 0, max(sizes) - level.shape[1]), value=padding) for level in values.split(sizes, 1)]
    return torch.stack(padded, dim=1)


def _kept(boxes: Tensor, valid: Tensor, iou_threshold: float) -> Tensor:
    """Return which boxes NMS keeps, `(G, M)` bool.

    Whether a box is kept depends on the better boxes, one after another. A table for each block of boxes holds what the
    block suppresses, itself included, for each set of its boxes that better boxes suppress. Then a look-up processes a
    block, in all groups at once.

    Args:
        boxes: `(G, M, 4)`, the best first.
        valid: `(G, M)` bool, False for padding.
        iou_threshold: largest IoU of two kept boxes.
    """
    num_groups, num_boxes = valid.shape
    padding = -num_boxes % BLOCK
    boxes, valid = F.pad(boxes, (0, 0, 0, padding)), F.pad(valid, (0, padding))
    if torch.compiler.is_exporting():  # the number of groups is not known
        effects = _effects(boxes, iou_threshold)
    else:
        step = max(1, PAIRS_AT_ONCE // max(1, boxes.shape[1] ** 2))
        effects = torch.cat([_effects(chunk, iou_threshold) for chunk in boxes.split(step)])
    suppressed = _packed(~valid)  # (G, blocks)
    group = torch.arange(num_groups, device=boxes.device)
    for block in range(suppressed.shape[1]):
        suppressed |= effects[group, block, suppressed[:, block].long()]
    bits = torch.arange(BLOCK, device=boxes.device, dtype=torch.uint8)
    return ((suppressed[..., None] >> bits) & 1 == 0).flatten(1)[:, :num_boxes]


@torch.library.custom_op("maskrcnn::kept_in_blocks", mutates_args=())
def kept_in_blocks(boxes: Tensor, valid: Tensor, iou_threshold: float) -> Tensor:
    """See `_kept`. For `torch.compile` it is one operation, since a compiler takes long for its thousand steps."""
    return _kept(boxes, valid, iou_threshold)


@kept_in_blocks.register_fake
def _(boxes: Tensor, valid: Tensor, iou_threshold: float) -> Tensor:
    return torch.empty_like(valid)


def _effects(boxes: Tensor, iou_threshold: float) -> Tensor:
    """Return the tables of the blocks of boxes `(G, M, 4)`: `(G, blocks, 2^BLOCK, blocks)` uint8.

    Entry `[g, b, s]` are the boxes that block b suppresses, a bit for each, if those in `s` are suppressed already.
    """
    num_boxes = boxes.shape[1]
    index = torch.arange(num_boxes, device=boxes.device)
    overlaps = (pairwise_iou(boxes, boxes) > _rounded_down(iou_threshold)) & (index[:, None] < index)
    rows = _packed(overlaps).unflatten(1, (-1, BLOCK))  # (G, blocks, BLOCK, blocks): what each box suppresses
    own = rows.diagonal(dim1=1, dim2=3).transpose(1, 2)  # (G, blocks, BLOCK): in its own block
    suppressed = torch.arange(2**BLOCK, device=boxes.device, dtype=torch.uint8).expand(*own.shape[:2], -1)
    effects = torch.zeros_like(rows[:, :, :1]).expand(-1, -1, 2**BLOCK, -1)
    for position in range(BLOCK):
        kept = (suppressed >> position & 1) ^ 1  # (G, blocks, 2^BLOCK)
        effects = effects | kept[..., None] * rows[:, :, None, position]
        suppressed = suppressed | kept * own[:, :, None, position]
    return effects


def _packed(flags: Tensor) -> Tensor:
    """Return flags `(..., M)` as bits, the first in the lowest: `(..., M / BLOCK)` uint8."""
    position = torch.arange(BLOCK, device=flags.device, dtype=torch.uint8)
    return (flags.unflatten(-1, (-1, BLOCK)) * (torch.ones_like(position) << position)).sum(dim=-1, dtype=torch.uint8)


def _rounded_down(threshold: float) -> float:
    """Return the largest float32 that is not above the threshold: a float32 is above both or neither.

    torchvision compares float32 with the float64 threshold, torch with its nearest float32, which may be above it.
    """
    mantissa, exponent = math.frexp(threshold)
    return math.ldexp(math.floor(math.ldexp(mantissa, 24)), exponent - 24)


# ---- One operator


_as_operator = ContextVar("as_operator", default=False)


@contextmanager
def nms_as_operator() -> Iterator[None]:
    """In this block, let a traced graph have a node `maskrcnn::nms` for each NMS, which an exporter translates."""
    token = _as_operator.set(True)
    try:
        yield
    finally:
        _as_operator.reset(token)


@torch.library.custom_op("maskrcnn::nms", mutates_args=())
def kept_by_nms(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, count: int) -> Tensor:
    """Return which boxes NMS keeps within each image and group, `(B, N)` bool; see `batched_nms` for the arguments.

    More than the `count` best boxes of a group need not be kept.
    """
    indices, kept_scores = _by_groups(boxes, scores, groups, iou_threshold, scores.shape[1])
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, indices, kept_scores > -torch.inf)


@kept_by_nms.register_fake
def _(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, count: int) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


def _by_operator(
    boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float, count: int
) -> tuple[Tensor, Tensor]:
    """Return `batched_nms` with the operator. It compares float32."""
    kept = kept_by_nms(boxes.float(), scores, groups, _rounded_down(iou_threshold), count)
    top_scores, indices = torch.where(kept, scores, -torch.inf).topk(min(count, scores.shape[1]), dim=1)
    return _exactly(indices, top_scores, count)
