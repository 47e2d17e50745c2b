"""Normalisation layers, and convolution and norm as one operation.

Shapes: N images or regions, C channels, H x W cells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NormKind = Literal["none", "frozen_bn", "bn", "sync_bn", "gn"]
NormFactory = Callable[[int], nn.Module]  # from a number of channels

GROUPS = 32  # of group normalisation, as in its paper (arXiv 1803.08494)


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation whose statistics and affine parameters are constants.

    Detection batches are too small to estimate statistics from, so those of the classification task stay. The state
    has BatchNorm2d's names. `eps` belongs to the lineage of the weights: 1e-5 for most, 0 for torchvision's published
    detectors (prior versions of which had none).
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """The layer as `y = scale * x + shift`, each `(C,)`."""
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        return scale, self.bias - self.running_mean * scale

    def forward(self, features: Tensor) -> Tensor:
        """`(N, C, H, W)` to the same."""
        scale, shift = self.scale_and_shift()
        return features * scale[:, None, None] + shift[:, None, None]


def build_norm(kind: NormKind, channels: int, *, eps: float = 1e-5) -> nn.Module:
    """A norm layer for `channels` channels; `eps` is used by the batch norms."""
    match kind:
        case "none":
            return nn.Identity()
        case "frozen_bn":
            return FrozenBatchNorm2d(channels, eps=eps)
        case "bn":
            return nn.BatchNorm2d(channels, eps=eps)
        case "sync_bn":
            return nn.SyncBatchNorm(channels, eps=eps)
        case "gn":
            return nn.GroupNorm(GROUPS, channels)


def conv_norm(conv: nn.Conv2d, norm: nn.Module, features: Tensor) -> Tensor:
    """`norm(conv(features))`; a frozen norm is folded into the kernel.

    Scaling the kernel costs as many multiplications as it has weights, scaling the map as many as it has pixels, and
    the unscaled map need not be kept for the backward pass.
    """
    if not isinstance(norm, FrozenBatchNorm2d):
        return norm(conv(features))
    scale, shift = norm.scale_and_shift()
    if conv.bias is not None:
        shift = shift + conv.bias * scale
    kernel = conv.weight * scale[:, None, None, None]
    return F.conv2d(features, kernel, shift, conv.stride, conv.padding, conv.dilation, conv.groups)


class ConvNorm(nn.Module):
    """A convolution and its norm, as one operation."""

    def __init__(self, conv: nn.Conv2d, norm: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.norm = norm

    def forward(self, features: Tensor) -> Tensor:
        """`(N, C, H, W)` to `(N, C', H', W')`."""
        return conv_norm(self.conv, self.norm, features)
