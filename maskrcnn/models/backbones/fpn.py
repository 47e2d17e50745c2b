"""Feature pyramid network (arXiv 1612.03144) on top of any backbone.

Shapes: B images, C channels, H x W cells.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from maskrcnn.config import Section
from maskrcnn.models.norms import NormKind, build_norm, conv_norm


class FPNConfig(Section):
    """The pyramid's width, and the norm after each of its convolutions."""

    channels: int = 256
    norm: NormKind = "none"


class FPN(nn.Module):
    """Maps of equal width, each with the meaning of the coarser ones: P2 to P5 of C2 to C5, and P6.

    Attributes:
        channels: channels of each output.
        strides: image pixels per cell of each output.
    """

    def __init__(self, body: nn.Module, *, channels: int, norm: NormKind = "none") -> None:
        """Put the pyramid on `body`, whose outputs go from fine to coarse, each at twice the stride."""
        super().__init__()
        bias = norm == "none"
        self.body = body
        self.lateral = nn.ModuleList(nn.Conv2d(inputs, channels, 1, bias=bias) for inputs in body.channels)
        self.lateral_norm = nn.ModuleList(build_norm(norm, channels) for _ in body.channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=bias) for _ in body.channels)
        self.output_norm = nn.ModuleList(build_norm(norm, channels) for _ in body.channels)
        self.strides = (*body.strides, body.strides[-1] * 2)
        self.channels = (channels,) * len(self.strides)
        for conv in (*self.lateral, *self.output):
            nn.init.kaiming_uniform_(conv.weight, a=1)
            if bias:
                nn.init.zeros_(conv.bias)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Normalised pixels `(B, 3, H, W)` to one map `(B, C, H / stride, W / stride)` for each stride."""
        laterals = [
            conv_norm(conv, norm, features)
            for conv, norm, features in zip(self.lateral, self.lateral_norm, self.body(pixels), strict=True)
        ]
        for fine in reversed(range(len(laterals) - 1)):
            coarse = F.interpolate(laterals[fine + 1], size=laterals[fine].shape[-2:], mode="nearest")
            laterals[fine] = laterals[fine] + coarse
        levels = [
            conv_norm(conv, norm, features)
            for conv, norm, features in zip(self.output, self.output_norm, laterals, strict=True)
        ]
        # P6 serves the RPN's largest anchors alone: every second cell of P5 (section 4.1, footnote).
        return (*levels, F.max_pool2d(levels[-1], 1, 2))
