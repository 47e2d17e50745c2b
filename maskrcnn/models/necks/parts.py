"""Interface of the necks, and no neck."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from maskrcnn.config import Part
from maskrcnn.errors import InputError


def describe_maps(strides: Sequence[int]) -> str:
    """Return a text for messages, such as `2 maps (strides 16, 32)`."""
    single = len(strides) == 1
    return f"{len(strides)} map{'' if single else 's'} (stride{'' if single else 's'} {', '.join(map(str, strides))})"


class Neck(nn.Module, ABC):
    """Base class of necks: layers from the feature maps of the backbone to those of RPN and heads.

    `forward` maps a map `(B, C, H / stride, W / stride)` for each stride of the backbone, fine to coarse, to a map
    `(B, channels, H / strides[i], W / strides[i])` for each i, fine to coarse. H and W are multiples of the strides of
    the backbone and of the first `roi_levels` strides. The sides of other maps are rounded up.

    Attributes:
        channels: channels of every returned map, because RPN and heads are shared by all of them.
        strides: image pixels per cell of each returned map.
        roi_levels: number of returned maps, from the first on, that the RoI layers use. The RPN uses all.
    """

    channels: int
    strides: tuple[int, ...]
    roi_levels: int

    @abstractmethod
    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the feature maps of RPN and heads."""


class NeckConfig(Part):
    """Base class of the configs of necks, an extension point."""

    @abstractmethod
    def out_strides(self, strides: Sequence[int]) -> tuple[int, ...]:
        """Return the strides of the maps that `build` returns for a backbone with these strides.

        A configuration is checked with them before anything is built.

        Raises:
            ValueError: the neck needs other maps.
        """

    @abstractmethod
    def build(self, *, channels: Sequence[int], strides: Sequence[int]) -> Neck:
        """Return the neck for a backbone with these channels and strides, with random weights.

        Raises:
            InputError: the neck needs other channels.
        """


class NoNeckConfig(NeckConfig):
    """No layers: RPN and heads use the feature maps of the backbone."""

    kind: Literal["none"] = "none"

    def out_strides(self, strides: Sequence[int]) -> tuple[int, ...]:
        """Return the strides of the backbone."""
        return tuple(strides)

    def build(self, *, channels: Sequence[int], strides: Sequence[int]) -> NoNeck:
        """Return the neck.

        Raises:
            InputError: the channels differ.
        """
        if len(set(channels)) > 1:
            raise InputError(
                f"model.neck: without a neck, all feature maps need equally many channels, but model.backbone returns "
                f"maps of {', '.join(map(str, channels))}: select one in model.backbone.out_features, or "
                "set model.neck.kind to fpn"
            )
        return NoNeck(channels[0], strides)


class NoNeck(Neck):
    """Returns the maps of the backbone."""

    def __init__(self, channels: int, strides: Sequence[int]) -> None:
        super().__init__()
        self.channels, self.strides, self.roi_levels = channels, tuple(strides), len(strides)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the maps."""
        return tuple(features)
