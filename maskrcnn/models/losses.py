"""How the loss of single boxes or regions becomes one number.

Shapes: B images, N samples of all images.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Normalizer = Literal["image", "batch"]


def sample_mean(values: Tensor, images: Tensor, counts: Tensor, *, per: Normalizer) -> Tensor:
    """The mean loss of a sample.

    With `image`, the mean is taken in each image and then over the images, so that an image weighs the same whatever
    it shares a batch or a GPU with. With `batch`, all samples of the batch weigh the same, as in torchvision, and the
    result depends on how images are spread over GPUs.

    Args:
        values: `(N,)` losses.
        images: `(N,)` int64, the image of each.
        counts: `(B,)` by how many samples to divide in each image; 0 gives 0.
        per: `image` or `batch`.
    """
    sums = values.new_zeros(len(counts)).index_add(0, images, values)
    if per == "batch":
        return sums.sum() / counts.sum().clamp(min=1)
    return (sums / counts.clamp(min=1)).mean()


def box_regression_loss(predicted: Tensor, target: Tensor, *, beta: float) -> Tensor:
    """Smooth L1 of deltas, summed over the four coordinates: `(N, 4), (N, 4) -> (N,)`; `beta` 0 is L1."""
    return torch.nn.functional.smooth_l1_loss(predicted.float(), target, reduction="none", beta=beta).sum(dim=-1)
