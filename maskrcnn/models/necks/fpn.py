"""Feature pyramid network (arXiv 1612.03144) on top of any backbone.

Shapes: B images, C channels, H x W cells.
"""

from __future__ import annotations

import torch.nn.functional as F
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from maskrcnn.config import Section
from maskrcnn.models.backbones.parts import Backbone
from maskrcnn.models.initialization import init_uniform
from maskrcnn.models.norms import GROUPS, ConvNorm, NormKind, build_norm


class FPNConfig(Section):
    """Channels of the pyramid and the norm after each of its convolutions."""

    channels: PositiveInt = 256
    norm: NormKind = "none"

    @model_validator(mode="after")
    def _channels_form_groups(self) -> FPNConfig:
        if self.norm == "gn" and self.channels % GROUPS:
            raise ValueError(f"norm 'gn' needs a multiple of {GROUPS} channels, not {self.channels}")
        return self


class FPN(Backbone):
    """Feature pyramid with equal channels on all levels: P2 to P5 from C2 to C5, and P6.

    Attributes:
        channels: channels of each output.
        strides: image pixels per cell of each output.
    """

    def __init__(self, body: Backbone, *, channels: int, norm: NormKind = "none") -> None:
        """Build the pyramid on `body`. The outputs of `body` go from fine to coarse; the stride doubles each time."""
        super().__init__()
        self.body = body
        self.lateral = nn.ModuleList(_conv(inputs, channels, kernel=1, norm=norm) for inputs in body.channels)
        self.output = nn.ModuleList(_conv(channels, channels, kernel=3, norm=norm) for _ in body.channels)
        self.strides = (*body.strides, body.strides[-1] * 2)
        self.channels = (channels,) * len(self.strides)
        self.roi_levels = len(body.strides)  # all but P6

    def stages(self) -> list[nn.Module]:
        """Return the stages of the body."""
        return self.body.stages()

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Map normalised pixels `(B, 3, H, W)` to one `(B, C, H / stride, W / stride)` per level."""
        laterals = [lateral(features) for lateral, features in zip(self.lateral, self.body(pixels), strict=True)]
        for fine in reversed(range(len(laterals) - 1)):
            coarse = F.interpolate(laterals[fine + 1], size=laterals[fine].shape[-2:], mode="nearest")
            laterals[fine] = laterals[fine] + coarse
        levels = [output(features) for output, features in zip(self.output, laterals, strict=True)]
        # P6, every second cell of P5, is used only by the RPN, for the largest anchors (section 4.1, footnote).
        return (*levels, F.max_pool2d(levels[-1], 1, 2))


def _conv(inputs: int, outputs: int, *, kernel: int, norm: NormKind) -> ConvNorm:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=norm == "none")
    init_uniform(conv)
    return ConvNorm(conv, build_norm(norm, outputs))
