"""Anchors: the reference boxes of the RPN, A per cell of each feature map.

Shapes: A anchors per cell, H x W cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def base_anchors(sizes: Sequence[float], ratios: Sequence[float], *, rounded: bool = False) -> Tensor:
    """Return the anchors of one cell, centred on the origin: `(A, 4)`, ordered by size, then by ratio.

    `sizes` are square roots of the area in pixels, `ratios` are height / width (Faster R-CNN, arXiv 1506.01497,
    section 3.1.1). `rounded` rounds the corners to whole pixels, half to even, as torchvision does.
    """
    boxes = []
    for size in sizes:
        for ratio in ratios:
            width, height = size / ratio**0.5, size * ratio**0.5
            boxes.append((-width / 2, -height / 2, width / 2, height / 2))
    anchors = torch.tensor(boxes, dtype=torch.float32)
    return anchors.round() if rounded else anchors


def grid_anchors(base: Tensor, *, height: int, width: int, stride: int) -> Tensor:
    """Place the anchors `base` `(A, 4)` on each cell of a map: `(H * W * A, 4)`, ordered by row, column and anchor.

    The anchors of cell `(i, j)` are centred on `(j * stride, i * stride)`, as in Detectron2 (offset 0) and
    torchvision.
    """
    x = torch.arange(width, device=base.device, dtype=base.dtype) * stride
    y = torch.arange(height, device=base.device, dtype=base.dtype) * stride
    y, x = torch.meshgrid(y, x, indexing="ij")
    shifts = torch.stack((x, y, x, y), dim=-1)  # (H, W, 4)
    return (shifts[:, :, None] + base).reshape(-1, 4)  # (H, W, A, 4) -> (H * W * A, 4)
