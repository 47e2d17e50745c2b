"""Region proposal network (arXiv 1506.01497): which of the anchors hold an object, and where exactly.

Shapes: B images, L levels, A anchors a cell, N anchors of an image, P proposals, S samples, C channels.
The anchors of an image are numbered level by level, row by row, the A anchors of a cell together.
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
from maskrcnn.models.losses import Normalizer, box_regression_loss, sample_mean
from maskrcnn.ops.anchors import base_anchors, grid_anchors
from maskrcnn.ops.boxes import BoxWeights, clip_boxes, decode_deltas, encode_deltas
from maskrcnn.ops.matching import match_boxes, sample_balanced
from maskrcnn.ops.nms import batched_nms
from maskrcnn.structures import Proposals, Targets

RPN_STREAM = 0  # of the random keys that draw anchors


Share = Annotated[float, Field(ge=0, le=1)]
Lengths = Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]


class ProposalCounts(Section):
    """How many boxes to keep before NMS, on each level, and after it, in all."""

    pre_nms_top_n: PositiveInt
    post_nms_top_n: PositiveInt


class RPNConfig(Section):
    """Defaults: Detectron2's for a pyramid (prior art for each in the reference given at its use)."""

    anchor_sizes: tuple[Lengths, ...] = ((32,), (64,), (128,), (256,), (512,))  # px, one tuple a level
    anchor_ratios: Lengths = (0.5, 1.0, 2.0)  # height / width
    round_anchors: bool = False
    foreground: Share = 0.7
    background: Share = 0.3
    batch_size_per_image: PositiveInt = 256  # anchors drawn for the loss
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
            raise ValueError("anchor_sizes must name equally many sizes for each level: one head serves all levels")
        return self

    def build(self, *, channels: int, strides: Sequence[int], normalizer: Normalizer) -> RPN:
        """The RPN for a backbone's `channels` and `strides`."""
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
    """Which anchors train the RPN (section 3.1.2)."""

    foreground: float  # IoU with an object from which an anchor is positive
    background: float  # IoU below which it is negative
    batch_size_per_image: int  # anchors drawn in each image
    positive_fraction: float  # largest share of positives among them


class RPNLosses(NamedTuple):
    """The RPN's two loss terms, scalars."""

    loss_objectness: Tensor
    loss_rpn_box_reg: Tensor


class RPN(nn.Module):
    """A 3x3 convolution and two 1x1 convolutions that slide over every level."""

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
        """Build the head; `base` holds the anchors `(A, 4)` of a cell of each level."""
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
        """The anchors of each level, `(H * W * A, 4)`."""
        return [
            grid_anchors(base, height=level.shape[-2], width=level.shape[-1], stride=stride)
            for base, level, stride in zip(self.base, features, self.strides, strict=True)
        ]

    @torch.no_grad()
    def propose(self, features: Sequence[Tensor], sizes: Tensor, counts: ProposalCounts) -> Proposals:
        """Score every anchor, move the best, and keep those that do not repeat each other.

        Proposals are constants to the heads (the "approximate joint training" of section 3.2), hence no gradient.

        Args:
            features: a map `(B, C, H, W)` a level.
            sizes: `(B, 2)` height and width of each image.
            counts: boxes to keep before and after NMS.
        """
        boxes, scores, levels = [], [], []
        for index, (level, anchors) in enumerate(zip(features, self.anchors(features), strict=True)):
            logits, deltas = self(level.detach())  # one kind of input in training and inference: compiled once
            highest, chosen = logits.topk(min(counts.pre_nms_top_n, logits.shape[1]), dim=1)
            deltas = deltas.gather(1, chosen[..., None].expand(-1, -1, 4))
            boxes.append(decode_deltas(deltas, anchors[chosen], weights=self.bbox_reg_weights))
            scores.append(highest.float())
            levels.append(torch.full_like(chosen, index))
        clipped = clip_boxes(torch.cat(boxes, dim=1), sizes)
        large = ((clipped[..., 2:] - clipped[..., :2]) > self.min_size).all(dim=-1)
        indices, best = batched_nms(
            clipped,
            torch.cat(scores, dim=1).masked_fill(~large, -torch.inf),
            torch.cat(levels, dim=1),
            iou_threshold=self.nms_threshold,
            count=counts.post_nms_top_n,
        )
        return Proposals(clipped.gather(1, indices[..., None].expand(-1, -1, 4)), best)

    def forward(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `(B, H * W * A)` and deltas `(B, H * W * A, 4)` of every anchor of a level."""
        hidden = F.relu_(self.conv(level))
        # (B, A, H, W) -> (B, H, W, A): the anchors of a cell come together.
        logits = self.objectness_logits(hidden).permute(0, 2, 3, 1).flatten(1)
        deltas = self.anchor_deltas(hidden).permute(0, 2, 3, 1).reshape(len(logits), -1, 4)
        return logits, deltas

    def losses(self, features: Sequence[Tensor], targets: Targets, seeds: Tensor) -> RPNLosses:
        """Both loss terms on a draw of anchors.

        Args:
            features: a map `(B, C, H, W)` a level.
            targets: the objects of each image.
            seeds: `(B,)` what the draw depends on.
        """
        anchors = torch.cat(self.anchors(features))  # (N, 4)
        rule = self.assignment
        matches = match_boxes(
            anchors, targets, foreground=rule.foreground, background=rule.background, allow_low_quality_matches=True
        )
        indices, drawn = sample_balanced(
            matches.labels,
            count=rule.batch_size_per_image,
            positive_fraction=rule.positive_fraction,
            seeds=seeds,
            stream=RPN_STREAM,
        )
        positive = (matches.labels.gather(1, indices) > 0) & drawn
        objects = targets.boxes.gather(1, matches.matched.gather(1, indices)[..., None].expand(-1, -1, 4))
        logits, deltas = self.sampled_outputs(features, indices)
        wanted = encode_deltas(objects, anchors[indices], weights=self.bbox_reg_weights)
        objectness = F.binary_cross_entropy_with_logits(logits.float(), positive.float(), reduction="none")
        box = box_regression_loss(deltas, wanted, beta=self.smooth_l1_beta)
        return RPNLosses(self._mean(objectness * drawn, drawn), self._mean(box * positive, drawn))

    def _mean(self, values: Tensor, drawn: Tensor) -> Tensor:
        images = torch.arange(len(values), device=values.device)[:, None].expand_as(values)
        return sample_mean(values.flatten(), images.flatten(), drawn.sum(dim=1), per=self.normalizer)

    def sampled_outputs(self, features: Sequence[Tensor], indices: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `(B, S)` and deltas `(B, S, 4)` of the anchors `indices` `(B, S)` alone.

        The loss touches at most S anchors of an image, so the 3x3 convolution is evaluated on their neighbourhoods
        only, as one matrix product. Values and gradients equal those of `forward` at these anchors, but there is
        no backward pass over all positions (a sixth of the training step on a CPU) and no map to keep for it.
        """
        number, channels = self.base.shape[1], features[0].shape[1]
        patches = self._neighbourhoods(features, indices // number)  # (B, S, 9 * C)
        kernel = self.conv.weight.permute(0, 2, 3, 1).reshape(channels, -1)  # (C', C, 3, 3) -> (C', 9 * C)
        hidden = F.relu_(F.linear(patches, kernel, self.conv.bias))
        logits = F.linear(hidden, self.objectness_logits.weight.flatten(1), self.objectness_logits.bias)  # (B, S, A)
        deltas = F.linear(hidden, self.anchor_deltas.weight.flatten(1), self.anchor_deltas.bias)  # (B, S, A * 4)
        which = (indices % number)[..., None]  # (B, S, 1)
        deltas = deltas.unflatten(-1, (number, 4)).gather(2, which[..., None].expand(-1, -1, -1, 4))
        return logits.gather(2, which)[..., 0], deltas[:, :, 0]

    def _neighbourhoods(self, features: Sequence[Tensor], cells: Tensor) -> Tensor:
        """The 3x3 cells around `cells` `(B, S)`, numbered level by level: `(B, S, 9 * C)`, zeros outside the map."""
        patches: Tensor | None = None
        first = 0
        for level in features:
            local = cells - first
            inside = (local >= 0) & (local < level.shape[-2] * level.shape[-1])
            patch = _patches(level, torch.where(inside, local, 0)) * inside[..., None]
            patches = patch if patches is None else patches + patch  # each cell is on one level: the sum selects
            first += level.shape[-2] * level.shape[-1]
        assert patches is not None
        return patches


def _patches(level: Tensor, cells: Tensor) -> Tensor:
    """The 3x3 neighbourhood of `cells` `(B, S)` in a map `(B, C, H, W)`: `(B, S, 9 * C)`, zeros outside."""
    batch, channels, height, width = level.shape
    offsets = torch.arange(-1, 2, device=cells.device)
    y = (cells // width)[..., None, None] + offsets[:, None]  # (B, S, 3, 1)
    x = (cells % width)[..., None, None] + offsets  # (B, S, 1, 3)
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)  # (B, S, 3, 3)
    image = torch.arange(batch, device=cells.device)[:, None, None, None]
    rows = (image * height + y.clamp(0, height - 1)) * width + x.clamp(0, width - 1)
    table = level.permute(0, 2, 3, 1).reshape(-1, channels)  # a view where the map is channels_last
    return (F.embedding(rows, table) * inside[..., None]).flatten(2)
