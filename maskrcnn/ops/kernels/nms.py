"""Greedy NMS of many groups at once as a Triton kernel, with fixed shapes and without a read by the host.

One program for each group takes the boxes in descending order of their scores, a block at a time. It drops the boxes
of the block that overlap those kept before. What remains is decided within the block by iteration: a box is kept if no
better one that is kept overlaps it. After r rounds the first r boxes are decided for good, so the rounds end, with the
result of the sequential algorithm; how many there are depends on the longest chain of overlaps in the block.

A program stops when it has kept as many boxes as are wanted. So the work is that of M boxes against P kept ones, and
no table of all pairs exists in memory.

Shapes: G groups, M boxes of a group, P kept boxes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 64  # boxes that a program takes at a time
WARPS = 8

# With fused multiply-add, an IoU near the threshold could be rounded in another way than by torchvision.
LAUNCH = {"num_warps": WARPS, "enable_fp_fusion": False}


def greedy_nms(boxes: Tensor, classes: Tensor, counts: Tensor, *, threshold: float, limit: int) -> Tensor:
    """Return which boxes of each group are kept.

    Args:
        boxes: `(G, M, 4)` float32, finite, the best of each group first.
        classes: `(G, M)` int64; boxes of different classes do not suppress each other.
        counts: `(G,)` int64, number of boxes of each group; what follows them is padding.
        threshold: largest IoU of two kept boxes of a class, a float32.
        limit: P; a group keeps at most so many, the best.

    Returns:
        Positions 0..M-1 `(G, P)` int64, ascending; -1 for padding.
    """
    return _greedy_nms(boxes, classes, counts, threshold, limit)


@torch.library.custom_op(
    "maskrcnn::greedy_nms",
    mutates_args=(),
    schema="(Tensor boxes, Tensor classes, Tensor counts, float threshold, int limit) -> Tensor",
)
def _greedy_nms(boxes: Tensor, classes: Tensor, counts: Tensor, threshold: float, limit: int) -> Tensor:
    groups, length = classes.shape
    kept = classes.new_full((groups, limit), -1)
    if groups and limit:
        with torch.cuda.device_of(boxes):
            greedy_nms_kernel[(groups,)](
                boxes.contiguous(), classes.contiguous(), counts, kept, threshold, length, limit, BLOCK=BLOCK, **LAUNCH
            )
    return kept


@_greedy_nms.register_fake
def _(boxes: Tensor, classes: Tensor, counts: Tensor, threshold: float, limit: int) -> Tensor:
    return classes.new_empty((len(boxes), limit))


@triton.jit
def _read_boxes(
    boxes: tl.tensor, classes: tl.tensor, positions: tl.tensor, used: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    x1 = tl.load(boxes + positions * 4, mask=used, other=0.0)
    y1 = tl.load(boxes + positions * 4 + 1, mask=used, other=0.0)
    x2 = tl.load(boxes + positions * 4 + 2, mask=used, other=0.0)
    y2 = tl.load(boxes + positions * 4 + 3, mask=used, other=0.0)
    return x1, y1, x2, y2, tl.load(classes + positions, mask=used, other=-1)


@triton.jit
def _overlaps(first: tl.tuple, second: tl.tuple, threshold: tl.tensor) -> tl.tensor:
    """Return which boxes of two blocks overlap by more than the threshold and have one class, (BLOCK, BLOCK) bool."""
    x1, y1, x2, y2, label = first
    other_x1, other_y1, other_x2, other_y2, other_label = second
    width = tl.minimum(x2[:, None], other_x2[None, :]) - tl.maximum(x1[:, None], other_x1[None, :])
    height = tl.minimum(y2[:, None], other_y2[None, :]) - tl.maximum(y1[:, None], other_y1[None, :])
    shared = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
    area = (x2 - x1) * (y2 - y1)
    other_area = (other_x2 - other_x1) * (other_y2 - other_y1)
    iou = tl.div_rn(shared, area[:, None] + other_area[None, :] - shared)  # nan, not above, if both are empty
    return (iou > threshold) & (label[:, None] == other_label[None, :])


@triton.jit
def _keep_in_block(suppresses: tl.tensor, remaining: tl.tensor) -> tl.tensor:
    """Return which boxes are kept, (BLOCK,) int32, of the remaining ones; `suppresses[i, j]` only for i before j."""
    kept = remaining
    changed = 1
    while changed > 0:
        hit = tl.max(tl.where(kept[:, None] > 0, suppresses, 0), axis=0)
        update = remaining * (1 - hit)
        changed = tl.max((update != kept).to(tl.int32), axis=0)
        kept = update
    return kept


@triton.jit(do_not_specialize=["length", "limit"])
def greedy_nms_kernel(
    boxes: tl.tensor,
    classes: tl.tensor,
    counts: tl.tensor,
    kept: tl.tensor,
    threshold: tl.tensor,
    length: tl.tensor,
    limit: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Write the positions that group `program_id(0)` keeps to `kept` (G, P); see `greedy_nms`."""
    group = tl.program_id(0).to(tl.int64)
    boxes += group * length * 4
    classes += group * length
    kept += group * limit
    count = tl.load(counts + group).to(tl.int32)
    lane = tl.arange(0, BLOCK)
    num_kept = 0
    start = 0
    while (start < count) & (num_kept < limit):
        positions = start + lane
        remaining = (positions < count).to(tl.int32)
        block = _read_boxes(boxes, classes, positions, positions < count)
        for first in range(0, num_kept, BLOCK):
            used = first + lane < num_kept
            earlier = tl.load(kept + first + lane, mask=used, other=0)
            hit = _overlaps(_read_boxes(boxes, classes, earlier, used), block, threshold) & used[:, None]
            remaining *= 1 - tl.max(hit.to(tl.int32), axis=0)
        suppresses = _overlaps(block, block, threshold) & (lane[:, None] < lane[None, :])
        chosen = _keep_in_block(suppresses.to(tl.int32), remaining)
        slots = num_kept + tl.cumsum(chosen, axis=0) - chosen
        tl.store(kept + slots, positions.to(tl.int64), mask=(chosen > 0) & (slots < limit))
        tl.debug_barrier()  # other threads of this program read the slots next
        num_kept = tl.minimum(num_kept + tl.sum(chosen, axis=0), limit)
        start += BLOCK
