"""What every backbone has: its contract, and how its first stages are frozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from maskrcnn.models.norms import FrozenBatchNorm2d


class Backbone(nn.Module):
    """Normalised pixels `(B, 3, H, W)` to maps `(B, channels[i], H / strides[i], W / strides[i])`, fine to coarse.

    H and W are multiples of the strides. Only FPN's P6 may go beyond, and its sides are rounded up.

    Attributes:
        channels: channels of each map.
        strides: image pixels per cell of each map.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]


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
