"""Normalisation layers, and convolution and norm as one operation.

Shapes: N images or regions, C channels, H x W cells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as Fused

from maskrcnn.training.distributed import is_shared, sum_over_processes

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


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch normalisation that trains with the statistics of all processes; on a single one it is BatchNorm2d.

    A process may have nothing to normalise, as where stage 5 of a C4 model reads regions and there are none. On a GPU
    torch's own kernels do the work. They do not run on a CPU (nor does DDP take `nn.SyncBatchNorm` there), so plain
    operations compute the same: what happens on eight GPUs can be tried, and is tested, without any.
    """

    def forward(self, features: Tensor) -> Tensor:
        """`(N, C, H, W)` to the same."""
        if not (self.training and is_shared()):
            return super().forward(features)
        return self._on_gpu(features) if features.is_cuda else self._on_cpu(features)

    def _on_gpu(self, features: Tensor) -> Tensor:
        """What `nn.SyncBatchNorm` does."""
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        group = torch.distributed.group.WORLD
        world = torch.distributed.get_world_size()
        statistics = self.running_mean, self.running_var
        return Fused.apply(features, self.weight, self.bias, *statistics, self.eps, self.momentum, group, world)

    def _on_cpu(self, features: Tensor) -> Tensor:
        cells, mean, variance = _joint_statistics(features.float())
        if cells > 1:
            self._remember(cells, mean.detach(), variance.detach())
        scale = torch.rsqrt(variance + self.eps) * self.weight
        normalised = (features - mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]
        return normalised.to(features.dtype)

    @torch.no_grad()
    def _remember(self, cells: Tensor, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics towards those of a batch, as torch does: without bias."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * cells / (cells - 1), self.momentum)


def _joint_statistics(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number of cells, `()`, their mean and variance, `(C,)`, over the maps `(N, C, H, W)` of all processes."""
    cells = sum_over_processes(features.new_tensor(features.numel() // features.shape[1]))
    divisor = cells.clamp(min=1)
    mean = sum_over_processes(features.sum(dim=(0, 2, 3))) / divisor
    squares = (features - mean[:, None, None]).square().sum(dim=(0, 2, 3))
    return cells, mean, sum_over_processes(squares) / divisor


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
            return SyncBatchNorm(channels, eps=eps)
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
