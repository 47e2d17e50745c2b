"""Feature pyramid network (arXiv 1612.03144).

Shapes: B images, C channels, H x W cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from maskrcnn.config import Size
from maskrcnn.models.initialization import init_uniform
from maskrcnn.models.necks.parts import Neck, NeckConfig, describe_maps
from maskrcnn.models.norms import ConvNorm, NormKind, build_norm, require_groups


class FPNConfig(NeckConfig):
    """A feature pyramid on two or more maps, and one more level for the RPN."""

    kind: Literal["fpn"] = "fpn"
    channels: Size = 256
    norm: NormKind = "none"  # after each convolution of the pyramid

    @model_validator(mode="after")
    def _channels_form_groups(self) -> FPNConfig:
        require_groups(self.norm, self.channels)
        return self

    def out_strides(self, strides: Sequence[int]) -> tuple[int, ...]:
        """Return the strides of the backbone and twice the last one.

        Raises:
            ValueError: there is one map, or the strides do not double.
        """
        if len(strides) < 2 or any(coarse != 2 * fine for fine, coarse in pairwise(strides)):
            raise ValueError(
                f"neck.kind fpn needs two or more feature maps whose strides double, but the backbone returns "
                f"{describe_maps(strides)}: set backbone.out_features, or neck.kind to none"
            )
        return (*strides, strides[-1] * 2)

    def build(self, *, channels: Sequence[int], strides: Sequence[int]) -> FPN:
        """Return the pyramid with random weights."""
        return FPN(channels, self.out_strides(strides), channels=self.channels, norm=self.norm)


class FPN(Neck):
    """Feature pyramid with equal channels on all levels: P2 to P5 from C2 to C5, and P6."""

    def __init__(
        self, in_channels: Sequence[int], strides: Sequence[int], *, channels: int, norm: NormKind = "none"
    ) -> None:
        """Build the pyramid on maps with `in_channels`. `strides` are those of the outputs, one more than inputs."""
        super().__init__()
        self.lateral = nn.ModuleList(_conv(inputs, channels, kernel=1, norm=norm) for inputs in in_channels)
        self.output = nn.ModuleList(_conv(channels, channels, kernel=3, norm=norm) for _ in in_channels)
        self.channels, self.strides = channels, tuple(strides)
        self.roi_levels = len(in_channels)  # all but P6

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Map one `(B, C_i, H, W)` per level, fine to coarse, to one `(B, C, H, W)` per level and the extra one."""
        laterals = [lateral(level) for lateral, level in zip(self.lateral, features, strict=True)]
        for fine in reversed(range(len(laterals) - 1)):
            coarse = F.interpolate(laterals[fine + 1], size=laterals[fine].shape[-2:], mode="nearest")
            laterals[fine] = laterals[fine] + coarse
        levels = [output(level) for output, level in zip(self.output, laterals, strict=True)]
        # P6, every second cell of P5, is used only by the RPN, for the largest anchors (section 4.1, footnote).
        return (*levels, F.max_pool2d(levels[-1], 1, 2))


def _conv(inputs: int, outputs: int, *, kernel: int, norm: NormKind) -> ConvNorm:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=norm == "none")
    init_uniform(conv)
    return ConvNorm(conv, build_norm(norm, outputs))
