"""Reduction of per-sample losses to a scalar, and the box regression loss.

Shapes: B images, N samples of all images.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Normalizer = Literal["image", "batch"]


def sample_mean(values: Tensor, images: Tensor, counts: Tensor, *, per: Normalizer) -> Tensor:
    """Return the mean of per-sample losses, a scalar.

    With `image`, the mean is taken within each image and then over the images, so that the weight of an image does not
    depend on the other images in its batch or on its GPU. With `batch`, all samples of the batch have the same weight,
    as in torchvision, and the result depends on how images are distributed over GPUs.

    Args:
        values: `(N,)` losses.
        images: `(N,)` int64, image index of each sample.
        counts: `(B,)` number of samples of each image, by which its sum is divided; an image with 0 samples adds 0.
        per: `image` or `batch`.
    """
    sums = values.new_zeros(len(counts)).index_add(0, images, values)
    if per == "batch":
        return sums.sum() / counts.sum().clamp(min=1)
    return (sums / counts.clamp(min=1)).mean()


def box_regression_loss(predicted: Tensor, target: Tensor, *, beta: float) -> Tensor:
    """Return the smooth L1 loss, summed over the four deltas: `(N, 4), (N, 4) -> (N,)`. `beta` 0 is L1."""
    return torch.nn.functional.smooth_l1_loss(predicted.float(), target, reduction="none", beta=beta).sum(dim=-1)
