"""RPN head: objectness logits and box deltas of the anchors, at all cells or at sampled anchors alone.

Shapes: B images, A anchors per cell, N anchors per image, S samples, C channels, H x W cells of a level.
The N anchors of an image are ordered by level, row, column and anchor within the cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskrcnn.models.initialization import init_normal


class RPNOutputs(NamedTuple):
    """Predictions of the RPN head for some anchors of each image."""

    logits: Tensor  # (B, ...) objectness
    deltas: Tensor  # (B, ..., 4) box relative to the anchor


class RPNHead(nn.Module):
    """A 3x3 convolution and two sibling 1x1 convolutions, shared by all levels (arXiv 1506.01497, section 3.1).

    More 3x3 convolutions may follow the first one.
    """

    def __init__(self, *, channels: int, num_anchors: int, conv_depth: int = 1) -> None:
        """Build `conv_depth` convolutions and the predictors of `num_anchors` (A) for maps with `channels`."""
        super().__init__()
        self.num_anchors = num_anchors
        self.conv, *more = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(conv_depth))
        self.more_convs = nn.ModuleList(more)
        self.objectness_logits = nn.Conv2d(channels, num_anchors, 1)
        self.anchor_deltas = nn.Conv2d(channels, num_anchors * 4, 1)
        for layer in (self.conv, *more, self.objectness_logits, self.anchor_deltas):
            init_normal(layer, std=0.01)

    def forward(self, level: Tensor) -> RPNOutputs:
        """Return logits `(B, H * W * A)` and deltas `(B, H * W * A, 4)` of all anchors of a level `(B, C, H, W)`."""
        hidden = F.relu_(self.conv(level))
        for conv in self.more_convs:
            hidden = F.relu_(conv(hidden))
        # (B, A, H, W) -> (B, H, W, A): the order of the anchors.
        logits = self.objectness_logits(hidden).permute(0, 2, 3, 1).flatten(1)
        deltas = self.anchor_deltas(hidden).permute(0, 2, 3, 1).reshape(logits.shape[0], -1, 4)
        return RPNOutputs(logits, deltas)


def gathered_outputs(levels: Sequence[RPNOutputs], indices: Tensor) -> RPNOutputs:
    """Return the outputs of the anchors `indices` `(B, S)` from those of all anchors of each level."""
    logits, deltas = (torch.cat(outputs, dim=1) for outputs in zip(*levels, strict=True))
    return RPNOutputs(logits.gather(1, indices), deltas.gather(1, indices[..., None].expand(-1, -1, 4)))


def sampled_outputs(head: RPNHead, features: Sequence[Tensor], indices: Tensor) -> RPNOutputs:
    """Return the outputs of the anchors `indices` `(B, S)`, and evaluate the head there alone.

    The loss uses at most S anchors per image, so the 3x3 convolution is evaluated only on their neighbourhoods, as one
    matrix product. Values and gradients equal those of `gathered_outputs`, without a backward pass over all positions
    (a sixth of the training step on a CPU) and without a feature map stored for it. The head has one 3x3 convolution.
    """
    channels = features[0].shape[1]
    patches = _neighbourhoods(features, indices // head.num_anchors)  # (B, S, 9 * C)
    kernel = head.conv.weight.permute(0, 2, 3, 1).reshape(channels, -1)  # (C', C, 3, 3) -> (C', 9 * C)
    hidden = F.relu_(F.linear(patches, kernel, head.conv.bias))
    logits = F.linear(hidden, head.objectness_logits.weight.flatten(1), head.objectness_logits.bias)  # (B, S, A)
    deltas = F.linear(hidden, head.anchor_deltas.weight.flatten(1), head.anchor_deltas.bias)  # (B, S, A * 4)
    anchor = (indices % head.num_anchors)[..., None]  # (B, S, 1), 0..A-1: anchor within the cell
    deltas = deltas.unflatten(-1, (head.num_anchors, 4)).gather(2, anchor[..., None].expand(-1, -1, -1, 4))
    return RPNOutputs(logits.gather(2, anchor)[..., 0], deltas[:, :, 0])


def _neighbourhoods(features: Sequence[Tensor], cells: Tensor) -> Tensor:
    """Return the 3x3 neighbourhoods of `cells` `(B, S)`, indices over all levels: `(B, S, 9 * C)`, zero-padded."""
    patches: Tensor | None = None
    offset = 0  # index of the level's first cell
    for level in features:
        local = cells - offset
        inside = (local >= 0) & (local < level.shape[-2] * level.shape[-1])
        patch = _patches(level, torch.where(inside, local, 0)) * inside[..., None]
        patches = patch if patches is None else patches + patch  # each cell is on one level, so the sum selects
        offset += level.shape[-2] * level.shape[-1]
    assert patches is not None
    return patches


def _patches(level: Tensor, cells: Tensor) -> Tensor:
    """Return the 3x3 neighbourhoods of `cells` `(B, S)` in one map `(B, C, H, W)`: `(B, S, 9 * C)`, zero-padded."""
    batch, channels, height, width = level.shape
    offsets = torch.arange(-1, 2, device=cells.device)
    y = (cells // width)[..., None, None] + offsets[:, None]  # (B, S, 3, 1)
    x = (cells % width)[..., None, None] + offsets  # (B, S, 1, 3)
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)  # (B, S, 3, 3)
    image_index = torch.arange(batch, device=cells.device)[:, None, None, None]
    rows = (image_index * height + y.clamp(0, height - 1)) * width + x.clamp(0, width - 1)
    table = level.permute(0, 2, 3, 1).reshape(-1, channels)  # a view if the map is channels_last
    return (F.embedding(rows, table) * inside[..., None]).flatten(2)
