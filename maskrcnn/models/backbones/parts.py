"""What every backbone has: its contract, freezing, initialisation.

The contract: `backbone(pixels)` gives a tuple of maps `(B, channels[i], H / strides[i], W / strides[i])`, fine to
coarse, for pixels `(B, 3, H, W)` whose sides are multiples of the largest stride.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from maskrcnn.models.norms import FrozenBatchNorm2d


class BackboneParts(NamedTuple):
    """What a backbone's config builds."""

    backbone: nn.Module  # keeps the contract above
    body: nn.Module  # the part of it that has a classifier's weights, under torchvision's names
    res5: nn.Module | None  # stage 5, to run on regions, for C4


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


def init_convolutions(module: nn.Module) -> None:
    """He initialisation of every convolution (arXiv 1502.01852), by its outputs, as torchvision's backbones have it."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
