"""Normalisation layers, and their fusion with convolutions.

Shapes: N images or regions, C channels, H x W cells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as SyncBatchNormFunction

from maskrcnn.ops.caching import may_cache
from maskrcnn.runtime.processes import is_shared, sum_over_processes

NormKind = Literal["none", "frozen_bn", "bn", "sync_bn", "gn"]
NormFactory = Callable[[int], nn.Module]  # number of channels -> norm layer

GROUPS = 32  # groups of GroupNorm, as in its paper (arXiv 1803.08494)


class _Fold(NamedTuple):
    """Scale and shift of a frozen norm, and the buffers that they were computed from."""

    buffers: tuple[Tensor, ...]
    versions: list[int]  # torch counts the writes to a tensor
    scale: Tensor
    shift: Tensor

    def is_of(self, buffers: tuple[Tensor, ...]) -> bool:
        """Return whether these are the same buffers with the same content."""
        return all(
            old is new and version == new._version
            for old, version, new in zip(self.buffers, self.versions, buffers, strict=True)
        )


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation whose statistics and affine parameters are constants.

    Detection batches are too small to estimate statistics from, so the statistics of the pretrained classifier are
    kept. The state dict has BatchNorm2d's names. `eps` must match the pretrained weights: 1e-5 for most, 0 for
    torchvision's published detectors (whose FrozenBatchNorm2d had no eps when they were trained).
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
        self._cached: _Fold | None = None

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Return scale and shift, each `(C,)`, of the layer as `y = scale * x + shift`.

        They are computed again only if one of the buffers was replaced or written: five kernels a layer on a GPU.
        """
        if not may_cache(self.weight):
            return self._fold()
        buffers = (self.weight, self.bias, self.running_mean, self.running_var)
        if self._cached is None or not self._cached.is_of(buffers):
            self._cached = _Fold(buffers, [buffer._version for buffer in buffers], *self._fold())
        return self._cached.scale, self._cached.shift

    def _fold(self) -> tuple[Tensor, Tensor]:
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        return scale, self.bias - self.running_mean * scale

    def forward(self, features: Tensor) -> Tensor:
        """`(N, C, H, W) -> (N, C, H, W)`."""
        scale, shift = self.scale_and_shift()
        return features * scale[:, None, None] + shift[:, None, None]


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch normalisation with the statistics of all processes in training; BatchNorm2d in a single process.

    The input of a process may be empty, for example without regions in stage 5 of a C4 model. On a GPU, torch's
    SyncBatchNorm kernels are used. They do not run on a CPU (and DDP rejects `nn.SyncBatchNorm` there), so a CPU uses
    plain operations with the same result. This allows testing without GPUs.
    """

    def forward(self, features: Tensor) -> Tensor:
        """`(N, C, H, W) -> (N, C, H, W)`."""
        if not (self.training and is_shared()):
            return super().forward(features)
        return self._on_gpu(features) if features.is_cuda else self._on_cpu(features)

    def _on_gpu(self, features: Tensor) -> Tensor:
        """The forward pass of `nn.SyncBatchNorm`."""
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        group = torch.distributed.group.WORLD
        world = torch.distributed.get_world_size()
        statistics = self.running_mean, self.running_var
        return SyncBatchNormFunction.apply(
            features, self.weight, self.bias, *statistics, self.eps, self.momentum, group, world
        )

    def _on_cpu(self, features: Tensor) -> Tensor:
        cells, mean, variance = _joint_statistics(features.float())
        if cells > 1:
            self._update_running_statistics(cells, mean.detach(), variance.detach())
        scale = torch.rsqrt(variance + self.eps) * self.weight
        normalised = (features - mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]
        return normalised.to(features.dtype)

    @torch.no_grad()
    def _update_running_statistics(self, cells: Tensor, mean: Tensor, variance: Tensor) -> None:
        """Update the running statistics, with the unbiased variance, as torch does."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * cells / (cells - 1), self.momentum)


def _joint_statistics(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return cell count `()`, mean `(C,)` and variance `(C,)` over the maps `(N, C, H, W)` of all processes."""
    cells = sum_over_processes(features.new_tensor(features.numel() // features.shape[1]))
    divisor = cells.clamp(min=1)
    mean = sum_over_processes(features.sum(dim=(0, 2, 3))) / divisor
    squares = (features - mean[:, None, None]).square().sum(dim=(0, 2, 3))
    return cells, mean, sum_over_processes(squares) / divisor


def build_norm(kind: NormKind, channels: int, *, eps: float = 1e-5) -> nn.Module:
    """Return a norm layer for `channels` channels; only batch norms use `eps`."""
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


def require_groups(norm: NormKind, channels: int) -> None:
    """Raise ValueError if group norm cannot divide the channels into its groups."""
    if norm == "gn" and channels % GROUPS:
        raise ValueError(f"norm 'gn' needs a multiple of {GROUPS} channels, not {channels}")


def conv_norm(conv: nn.Conv2d, norm: nn.Module, features: Tensor) -> Tensor:
    """Return `norm(conv(features))`. A frozen norm is folded into the kernel of the convolution.

    Scaling the kernel takes fewer multiplications than scaling the feature map, and the unscaled feature map need not
    be stored for the backward pass.
    """
    if not isinstance(norm, FrozenBatchNorm2d):
        return norm(conv(features))
    scale, shift = norm.scale_and_shift()
    if conv.bias is not None:
        shift = shift + conv.bias * scale
    kernel = conv.weight * scale[:, None, None, None]
    return F.conv2d(features, kernel, shift, conv.stride, conv.padding, conv.dilation, conv.groups)


class ConvNorm(nn.Module):
    """A convolution followed by a norm."""

    def __init__(self, conv: nn.Conv2d, norm: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.norm = norm

    def forward(self, features: Tensor) -> Tensor:
        """`(N, C, H, W) -> (N, C', H', W')`."""
        return conv_norm(self.conv, self.norm, features)


def region_convs(channels: Sequence[int], *, norm: NormKind) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Return the 3x3 convolutions of a head between maps with `channels`, and their norms, which replace biases."""
    convs = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=norm == "none") for inputs, outputs in pairwise(channels)]
    return nn.ModuleList(convs), nn.ModuleList(build_norm(norm, outputs) for outputs in channels[1:])
