"""Region proposal network (arXiv 1506.01497): scores anchors for objectness and regresses their boxes.

Shapes: B images, L levels, A anchors per cell, N anchors per image, P proposals, S samples, C channels.
The N anchors of an image are ordered by level, row, column and anchor within the cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from maskrcnn.config import Section
from maskrcnn.models.initialization import init_normal
from maskrcnn.models.losses import Normalizer, RPNLosses, rpn_losses
from maskrcnn.ops.anchors import base_anchors, grid_anchors
from maskrcnn.ops.boxes import BoxWeights, clip_boxes, decode_deltas, encode_deltas
from maskrcnn.ops.matching import match_boxes, sample_balanced
from maskrcnn.ops.nms import batched_nms
from maskrcnn.structures import Proposals, Targets

RPN_STREAM = 0  # random stream of the anchor sampling; see `sample_balanced`

Share = Annotated[float, Field(ge=0, le=1)]
Lengths = Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]


class ProposalCounts(Section):
    """Number of proposals to keep in each image: per level before NMS, in total after NMS."""

    pre_nms_top_n: PositiveInt
    post_nms_top_n: PositiveInt


class RPNConfig(Section):
    """Settings of the RPN. Defaults are those of Detectron2 for FPN."""

    anchor_sizes: tuple[Lengths, ...] = ((32,), (64,), (128,), (256,), (512,))  # px, one tuple per level
    anchor_ratios: Lengths = (0.5, 1.0, 2.0)  # height / width
    round_anchors: bool = False
    foreground: Share = 0.7
    background: Share = 0.3
    batch_size_per_image: PositiveInt = 256  # anchors sampled for the loss
    positive_fraction: Share = 0.5
    bbox_reg_weights: BoxWeights = (1.0, 1.0, 1.0, 1.0)
    smooth_l1_beta: NonNegativeFloat = 0.0
    training: ProposalCounts = ProposalCounts(pre_nms_top_n=2000, post_nms_top_n=1000)
    inference: ProposalCounts = ProposalCounts(pre_nms_top_n=1000, post_nms_top_n=1000)
    nms_threshold: Share = 0.7
    min_size: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _same_anchors_a_cell(self) -> RPNConfig:
        if len({len(sizes) for sizes in self.anchor_sizes}) != 1:
            raise ValueError(
                "anchor_sizes must have equally many sizes for each level, because all levels share one head"
            )
        return self

    def build(self, *, channels: int, strides: Sequence[int], normalizer: Normalizer) -> RPN:
        """Return the RPN for feature maps with these channels and strides."""
        return RPN(
            channels=channels,
            strides=strides,
            base=tuple(
                base_anchors(sizes, self.anchor_ratios, rounded=self.round_anchors) for sizes in self.anchor_sizes
            ),
            assignment=AnchorAssignment(
                self.foreground, self.background, self.batch_size_per_image, self.positive_fraction
            ),
            bbox_reg_weights=self.bbox_reg_weights,
            smooth_l1_beta=self.smooth_l1_beta,
            nms_threshold=self.nms_threshold,
            min_size=self.min_size,
            training_counts=self.training,
            inference_counts=self.inference,
            normalizer=normalizer,
        )


class AnchorAssignment(NamedTuple):
    """Rule that labels and samples anchors for the RPN loss (section 3.1.2)."""

    foreground: float  # smallest IoU of a positive anchor
    background: float  # IoU below which an anchor is negative
    batch_size_per_image: int  # anchors sampled per image
    positive_fraction: float  # largest fraction of positives among them


class RPN(nn.Module):
    """RPN head (a 3x3 convolution and two sibling 1x1 convolutions, shared by all levels), proposals and losses."""

    def __init__(
        self,
        *,
        channels: int,
        strides: Sequence[int],
        base: Sequence[Tensor],
        assignment: AnchorAssignment,
        bbox_reg_weights: BoxWeights,
        smooth_l1_beta: float,
        nms_threshold: float,
        min_size: float,
        training_counts: ProposalCounts,
        inference_counts: ProposalCounts,
        normalizer: Normalizer,
    ) -> None:
        """Build the head. `base` holds for each level the anchors `(A, 4)` of one cell, centred on the origin."""
        super().__init__()
        assert len(base) == len(strides), (len(base), strides)
        self.strides = tuple(strides)
        self.assignment = assignment
        self.bbox_reg_weights = bbox_reg_weights
        self.smooth_l1_beta = smooth_l1_beta
        self.nms_threshold = nms_threshold
        self.min_size = min_size
        self.training_counts = training_counts
        self.inference_counts = inference_counts
        self.normalizer: Normalizer = normalizer
        self.base: Tensor
        self.register_buffer("base", torch.stack(tuple(base)), persistent=False)  # (L, A, 4)
        anchors = self.base.shape[1]
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.objectness_logits = nn.Conv2d(channels, anchors, 1)
        self.anchor_deltas = nn.Conv2d(channels, anchors * 4, 1)
        for layer in (self.conv, self.objectness_logits, self.anchor_deltas):
            init_normal(layer, std=0.01)

    def anchors(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the anchors of each level, `(H * W * A, 4)`."""
        return [
            grid_anchors(base, height=level.shape[-2], width=level.shape[-1], stride=stride)
            for base, level, stride in zip(self.base, features, self.strides, strict=True)
        ]

    @torch.no_grad()
    def propose(self, features: Sequence[Tensor], sizes: Tensor, counts: ProposalCounts) -> Proposals:
        """Return the highest-scoring boxes of each image, decoded, clipped and after NMS.

        Proposals carry no gradient: the heads treat them as constants ("approximate joint training", section 3.2).

        Args:
            features: one map `(B, C, H, W)` per level.
            sizes: `(B, 2)` height and width of each image.
            counts: number of boxes to keep before and after NMS.
        """
        boxes, scores, levels = [], [], []
        for index, (level, anchors) in enumerate(zip(features, self.anchors(features), strict=True)):
            logits, deltas = self(level.detach())  # same requires_grad in training and inference: one compilation
            top_logits, top_indices = logits.topk(min(counts.pre_nms_top_n, logits.shape[1]), dim=1)
            deltas = deltas.gather(1, top_indices[..., None].expand(-1, -1, 4))
            boxes.append(decode_deltas(deltas, anchors[top_indices], weights=self.bbox_reg_weights))
            scores.append(top_logits.float())
            levels.append(torch.full_like(top_indices, index))
        clipped = clip_boxes(torch.cat(boxes, dim=1), sizes)
        large = ((clipped[..., 2:] - clipped[..., :2]) > self.min_size).all(dim=-1)
        indices, kept_scores = batched_nms(
            clipped,
            torch.cat(scores, dim=1).masked_fill(~large, -torch.inf),
            torch.cat(levels, dim=1),
            iou_threshold=self.nms_threshold,
            count=counts.post_nms_top_n,
        )
        return Proposals(clipped.gather(1, indices[..., None].expand(-1, -1, 4)), kept_scores)

    def forward(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits `(B, H * W * A)` and deltas `(B, H * W * A, 4)` of all anchors of one level."""
        hidden = F.relu_(self.conv(level))
        # (B, A, H, W) -> (B, H, W, A): the order of the anchors.
        logits = self.objectness_logits(hidden).permute(0, 2, 3, 1).flatten(1)
        deltas = self.anchor_deltas(hidden).permute(0, 2, 3, 1).reshape(len(logits), -1, 4)
        return logits, deltas

    def losses(self, features: Sequence[Tensor], targets: Targets, seeds: Tensor) -> RPNLosses:
        """Return both loss terms, on a sample of the anchors.

        Args:
            features: one map `(B, C, H, W)` per level.
            targets: ground truth.
            seeds: `(B,)` random seed of each image.
        """
        anchors = torch.cat(self.anchors(features))  # (N, 4)
        matches = match_boxes(
            anchors,
            targets,
            foreground=self.assignment.foreground,
            background=self.assignment.background,
            allow_low_quality_matches=True,
        )
        indices, sampled = sample_balanced(
            matches.labels,
            count=self.assignment.batch_size_per_image,
            positive_fraction=self.assignment.positive_fraction,
            seeds=seeds,
            stream=RPN_STREAM,
        )
        positive = (matches.labels.gather(1, indices) > 0) & sampled
        objects = targets.boxes.gather(1, matches.matched.gather(1, indices)[..., None].expand(-1, -1, 4))
        logits, deltas = self.sampled_outputs(features, indices)
        return rpn_losses(
            logits,
            deltas,
            encode_deltas(objects, anchors[indices], weights=self.bbox_reg_weights),
            positive=positive,
            sampled=sampled,
            beta=self.smooth_l1_beta,
            per=self.normalizer,
        )

    def sampled_outputs(self, features: Sequence[Tensor], indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits `(B, S)` and deltas `(B, S, 4)` of the anchors `indices` `(B, S)` only.

        The loss uses at most S anchors per image, so the 3x3 convolution is evaluated only on their neighbourhoods,
        as one matrix product. Values and gradients equal those of `forward` at these anchors, without a backward pass
        over all positions (a sixth of the training step on a CPU) and without a feature map stored for it.
        """
        num_anchors, channels = self.base.shape[1], features[0].shape[1]
        patches = self._neighbourhoods(features, indices // num_anchors)  # (B, S, 9 * C)
        kernel = self.conv.weight.permute(0, 2, 3, 1).reshape(channels, -1)  # (C', C, 3, 3) -> (C', 9 * C)
        hidden = F.relu_(F.linear(patches, kernel, self.conv.bias))
        logits = F.linear(hidden, self.objectness_logits.weight.flatten(1), self.objectness_logits.bias)  # (B, S, A)
        deltas = F.linear(hidden, self.anchor_deltas.weight.flatten(1), self.anchor_deltas.bias)  # (B, S, A * 4)
        anchor = (indices % num_anchors)[..., None]  # (B, S, 1), 0..A-1: anchor within the cell
        deltas = deltas.unflatten(-1, (num_anchors, 4)).gather(2, anchor[..., None].expand(-1, -1, -1, 4))
        return logits.gather(2, anchor)[..., 0], deltas[:, :, 0]

    def _neighbourhoods(self, features: Sequence[Tensor], cells: Tensor) -> Tensor:
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
