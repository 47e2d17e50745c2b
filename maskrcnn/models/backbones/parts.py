"""Interface of the backbones, freezing of stages, activation checkpointing."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maskrcnn.config import Part
from maskrcnn.models.norms import FrozenBatchNorm2d

CheckpointActivations = Annotated[
    bool,
    Field(description="recompute activations in the backward pass instead of storing them: less memory, more time"),
]


class Backbone(nn.Module, ABC):
    """Base class of backbones.

    `forward` maps normalised pixels `(B, 3, H, W)` to feature maps `(B, channels[i], H / strides[i], W / strides[i])`,
    fine to coarse. H and W are multiples of all strides.

    Attributes:
        channels: channels of each feature map.
        strides: image pixels per cell of each feature map.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]

    @abstractmethod
    def stages(self) -> list[nn.Module]:
        """Return the stages, first to last: the units that `freeze_stages` freezes."""

    @abstractmethod
    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Return the feature maps."""


class BackboneConfig(Part):
    """Base class of the configs of backbones, an extension point."""

    weights: str = "none"  # pretrained weights: "none", "imagenet" where the kind has them, or a path

    @property
    @abstractmethod
    def strides(self) -> tuple[int, ...]:
        """Strides of the feature maps that the backbone returns, fine to coarse, to check a configuration."""

    @property
    def region_stride(self) -> int:
        """The factor by which the region stage reduces the side of a region; 1 without one."""
        return 1

    @abstractmethod
    def build(self) -> Backbone:
        """Return the backbone with random weights."""

    def build_region_stage(self) -> RegionStage | None:
        """Return the region stage with random weights, if the backbone has one."""
        return None

    def load_pretrained(self, backbone: Backbone, region_stage: RegionStage | None, trunk: nn.Module | None) -> None:
        """Load `weights` into the modules that this config built, and into a trunk of the box head that has some too.

        Raises:
            InputError: the weights cannot be read or do not fit.
        """


class RegionStage(nn.Module):
    """A stage of the backbone that runs on pooled regions, before both heads (Detectron2's `Res5ROIHeads`).

    `forward` maps `(N, in_channels, S, S)` to `(N, channels, S / stride, S / stride)`.
    """

    in_channels: int
    channels: int
    stride: int


def require_features(out_features: Sequence[str], names: Sequence[str]) -> None:
    """Raise ValueError unless `out_features` are some of `names`, in their order, each at most once."""
    if not out_features or list(out_features) != [name for name in names if name in out_features]:
        raise ValueError(f"out_features must be one or more of {', '.join(names)}, in this order, each at most once")


def freeze_stages(body: nn.Module, stages: Sequence[nn.Module]) -> None:
    """Freeze `stages` of `body`: disable gradients and replace batch norms by `FrozenBatchNorm2d`."""
    frozen: set[nn.Module] = set()
    for stage in stages:
        stage.requires_grad_(False)
        frozen.update(stage.modules())
    # A stage may be a temporary container (a slice of an nn.Sequential), so norms are replaced in the body itself.
    for module in list(body.modules()):
        for name, child in module.named_children():
            if child in frozen and isinstance(child, nn.BatchNorm2d | nn.SyncBatchNorm):
                setattr(module, name, FrozenBatchNorm2d(child.num_features, eps=child.eps))


# ---- Activation checkpointing


def checkpointed(part: nn.Module, features: Tensor) -> Tensor:
    """Return `part(features)` with activation checkpointing (arXiv 1604.06174).

    Only `features` are stored; the backward pass runs `part` again. A part without trainable parameters stores no
    activations anyway and runs as usual. `part` must be deterministic.
    """
    if not (torch.is_grad_enabled() and any(parameter.requires_grad for parameter in part.parameters())):
        return part(features)
    run_checkpointed = partial(checkpoint, part, features, use_reentrant=False, preserve_rng_state=False)
    if torch.compiler.is_compiling():  # compiled code does not update running statistics in the recomputation
        return run_checkpointed()
    norms = [module for module in part.modules() if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm)]
    return run_checkpointed(context_fn=lambda: (nullcontext(), _unchanged_statistics(norms)))


class CheckpointedSequential(nn.Sequential):
    """An `nn.Sequential` that runs each layer `checkpointed`."""

    def forward(self, features: Tensor) -> Tensor:
        """Return the output of the last layer."""
        for layer in self:
            features = checkpointed(layer, features)
        return features


@contextmanager
def _unchanged_statistics(norms: Sequence[nn.BatchNorm2d | nn.SyncBatchNorm]) -> Iterator[None]:
    """Keep the running statistics of batch norms unchanged: the recomputation would count the batch twice."""
    momenta = [norm.momentum for norm in norms]
    counters = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    counts = [counter.clone() for counter in counters]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for counter, count in zip(counters, counts, strict=True):
            counter.copy_(count)
