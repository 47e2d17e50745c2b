"""Anchors: the boxes of reference that the RPN scores and moves, a few at each cell of each feature map.

Shapes: A anchors a cell, H x W cells.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def base_anchors(sizes: Sequence[float], ratios: Sequence[float], *, rounded: bool = False) -> Tensor:
    """Anchors of one cell, centred on the origin: `(A, 4)`, sizes outer and ratios inner.

    `sizes` are square roots of the area in pixels, `ratios` are height / width (Faster R-CNN, arXiv 1506.01497,
    section 3.1.1). `rounded` puts the corners on whole pixels, as torchvision does (half to even).
    """
    boxes = []
    for size in sizes:
        for ratio in ratios:
            width, height = size / ratio**0.5, size * ratio**0.5
            boxes.append((-width / 2, -height / 2, width / 2, height / 2))
    anchors = torch.tensor(boxes, dtype=torch.float32)
    return anchors.round() if rounded else anchors


def grid_anchors(base: Tensor, *, height: int, width: int, stride: int) -> Tensor:
    """Put `base` `(A, 4)` on each cell of a map: `(H * W * A, 4)`, row by row, the anchors of a cell together.

    The anchors of cell `(i, j)` are centred on `(j * stride, i * stride)`, the offset 0 of Detectron2 and
    torchvision.
    """
    x = torch.arange(width, device=base.device, dtype=base.dtype) * stride
    y = torch.arange(height, device=base.device, dtype=base.dtype) * stride
    y, x = torch.meshgrid(y, x, indexing="ij")
    shifts = torch.stack((x, y, x, y), dim=-1)  # (H, W, 4)
    return (shifts[:, :, None] + base).reshape(-1, 4)  # (H, W, A, 4) -> (H * W * A, 4)
