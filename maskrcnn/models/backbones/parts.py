"""What every backbone has: its contract, and how its first stages are frozen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from maskrcnn.models.norms import FrozenBatchNorm2d

CheckpointActivations = Annotated[
    bool, Field(description="keep less for the backward pass, and compute it again there: less memory, more time")
]


class Backbone(nn.Module, ABC):
    """Normalised pixels `(B, 3, H, W)` to maps `(B, channels[i], H / strides[i], W / strides[i])`, fine to coarse.

    H and W are multiples of the strides. Only FPN's P6 may go beyond, and its sides are rounded up.

    Attributes:
        channels: channels of each map.
        strides: image pixels per cell of each map.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]

    @abstractmethod
    def stages(self) -> list[nn.Module]:
        """The parts of the body that are frozen together, first to last."""


class RegionStage(nn.Module):
    """A stage that runs on each region: `(N, C, S, S)` to `(N, channels, S / stride, S / stride)`."""

    channels: int
    stride: int


class BackboneParts(NamedTuple):
    """What a backbone's config builds."""

    backbone: Backbone
    body: Backbone  # the part of it that has a classifier's weights, under torchvision's names
    res5: RegionStage | None  # stage 5, for C4


def freeze_stages(body: nn.Module, stages: Sequence[nn.Module]) -> None:
    """Make `stages` of `body` constants: no gradients, and batch norms that keep their statistics."""
    frozen: set[nn.Module] = set()
    for stage in stages:
        stage.requires_grad_(False)
        frozen.update(stage.modules())
    # A stage may be a mere view of its layers: a norm has to be replaced where the body holds it.
    for module in list(body.modules()):
        for name, child in module.named_children():
            if child in frozen and isinstance(child, nn.BatchNorm2d | nn.SyncBatchNorm):
                setattr(module, name, FrozenBatchNorm2d(child.num_features, eps=child.eps))


# ---- Activation checkpointing


def checkpointed(part: nn.Module, features: Tensor) -> Tensor:
    """`part(features)`, of which only `features` are kept; the backward pass runs `part` again (arXiv 1604.06174).

    A part that does not learn keeps nothing for the backward pass anyway, and is simply run. There must be no
    randomness in `part`.
    """
    if not (torch.is_grad_enabled() and any(parameter.requires_grad for parameter in part.parameters())):
        return part(features)
    run = partial(checkpoint, part, features, use_reentrant=False, preserve_rng_state=False)
    if torch.compiler.is_compiling():  # compiled code moves the running statistics apart from what it runs twice
        return run()
    norms = [module for module in part.modules() if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm)]
    return run(context_fn=lambda: (nullcontext(), _statistics_kept(norms)))


class CheckpointedSequential(nn.Sequential):
    """Layers one after another, each `checkpointed`."""

    def forward(self, features: Tensor) -> Tensor:
        """What the last layer makes of it."""
        for layer in self:
            features = checkpointed(layer, features)
        return features


@contextmanager
def _statistics_kept(norms: Sequence[nn.BatchNorm2d | nn.SyncBatchNorm]) -> Iterator[None]:
    """Inside, batch norms move their running statistics by nothing: a second run would count the batch twice."""
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
