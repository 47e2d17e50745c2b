"""Region proposal network (arXiv 1506.01497): scores anchors for objectness and regresses their boxes.

Its parts: the head (`rpn_head`), the anchor generator, the selection of proposals, and the loss on sampled anchors.

Shapes: B images, L levels, A anchors per cell, N anchors per image, P proposals, S samples, C channels.
The N anchors of an image are ordered by level, row, column and anchor within the cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor, nn

from maskrcnn.config import Section
from maskrcnn.models.losses import Normalizer, RPNLosses, rpn_losses
from maskrcnn.models.rpn_head import RPNHead, RPNOutputs, gathered_outputs, sampled_outputs
from maskrcnn.ops.anchors import base_anchors, grid_anchors
from maskrcnn.ops.boxes import BoxWeights, clip_boxes, decode_deltas, encode_deltas
from maskrcnn.ops.caching import may_cache
from maskrcnn.ops.matching import match_boxes, sample_balanced
from maskrcnn.ops.nms import nms_of_levels
from maskrcnn.structures import ImageBatch, Proposals, Targets

RPN_STREAM = 0  # random stream of the anchor sampling; see `sample_balanced`

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=2**20)]  # of anchors or proposals; an image may have more than 100,000 anchors
Lengths = Annotated[tuple[PositiveFloat, ...], Field(min_length=1)]


class ProposalCounts(Section):
    """Number of proposals to keep in each image: per level before NMS, in total after NMS."""

    pre_nms_top_n: Count
    post_nms_top_n: Count


class RPNConfig(Section):
    """Settings of the RPN. Defaults are those of Detectron2 for FPN."""

    anchor_sizes: tuple[Lengths, ...] = ((32,), (64,), (128,), (256,), (512,))  # px, one tuple per level
    anchor_ratios: Lengths = (0.5, 1.0, 2.0)  # height / width
    round_anchors: bool = False
    conv_depth: int = Field(
        1, ge=1, le=1000, description="3x3 convolutions of the head; more than 1 need its dense loss"
    )
    foreground: float = Field(0.7, gt=0, le=1)  # smallest IoU of a positive
    background: Share = 0.3  # IoU below which an anchor is background; those between the two are not used
    batch_size_per_image: Count = 256  # anchors sampled for the loss
    positive_fraction: Share = 0.5
    bbox_reg_weights: BoxWeights = (1.0, 1.0, 1.0, 1.0)
    smooth_l1_beta: NonNegativeFloat = 0.0
    training: ProposalCounts = ProposalCounts(pre_nms_top_n=2000, post_nms_top_n=1000)
    inference: ProposalCounts = ProposalCounts(pre_nms_top_n=1000, post_nms_top_n=1000)
    nms_threshold: Share = 0.7
    min_size: NonNegativeFloat = 0.0
    sparse_loss: bool = Field(True, description="run the head with gradient only at the sampled anchors: equal, faster")

    @model_validator(mode="after")
    def _same_anchors_a_cell(self) -> RPNConfig:
        if len({len(sizes) for sizes in self.anchor_sizes}) != 1:
            raise ValueError(
                "anchor_sizes must have equally many sizes for each level, because all levels share one head"
            )
        return self

    @model_validator(mode="after")
    def _thresholds_are_ordered(self) -> RPNConfig:
        if self.background > self.foreground:
            raise ValueError(f"background ({self.background}) must not be above foreground ({self.foreground})")
        return self

    def build(self, *, channels: int, strides: Sequence[int], normalizer: Normalizer, triton: bool = False) -> RPN:
        """Return the RPN for feature maps with these channels and strides. `triton`: NMS with a kernel."""
        base = [base_anchors(sizes, self.anchor_ratios, rounded=self.round_anchors) for sizes in self.anchor_sizes]
        return RPN(
            head=RPNHead(channels=channels, num_anchors=len(base[0]), conv_depth=self.conv_depth),
            anchor_generator=AnchorGenerator(base, strides=strides),
            selector=ProposalSelector(
                bbox_reg_weights=self.bbox_reg_weights,
                nms_threshold=self.nms_threshold,
                min_size=self.min_size,
                triton=triton,
            ),
            loss=RPNLoss(
                AnchorAssignment(self.foreground, self.background, self.batch_size_per_image, self.positive_fraction),
                bbox_reg_weights=self.bbox_reg_weights,
                smooth_l1_beta=self.smooth_l1_beta,
                normalizer=normalizer,
            ),
            training_counts=self.training,
            inference_counts=self.inference,
            sparse_loss=self.sparse_loss and self.conv_depth == 1,
        )


class AnchorGenerator(nn.Module):
    """Places the anchors of one cell on every cell of the feature maps."""

    def __init__(self, base: Sequence[Tensor], *, strides: Sequence[int]) -> None:
        """Store for each level the anchors of one cell `(A, 4)`, centred on the origin, and the stride in pixels."""
        super().__init__()
        assert len(base) == len(strides), (len(base), strides)
        self.strides = tuple(strides)
        self.base: Tensor
        self.register_buffer("base", torch.stack(tuple(base)), persistent=False)  # (L, A, 4)
        self._cached: tuple[Tensor, list[torch.Size], list[Tensor]] | None = None  # base, sizes, anchors

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return the anchors of each level `(B, C, H, W)`, each `(H * W * A, 4)`. Do not write to them."""
        sizes = [level.shape[-2:] for level in features]
        if not may_cache(self.base):
            return self._anchors(sizes)
        if self._cached is None or self._cached[0] is not self.base or self._cached[1] != sizes:
            self._cached = self.base, sizes, self._anchors(sizes)
        return self._cached[2]

    def _anchors(self, sizes: Sequence[torch.Size]) -> list[Tensor]:
        return [
            grid_anchors(base, height=height, width=width, stride=stride)
            for base, (height, width), stride in zip(self.base, sizes, self.strides, strict=True)
        ]


class ProposalSelector:
    """Selects the highest-scoring boxes of each image: decoded, clipped and after NMS."""

    def __init__(
        self, *, bbox_reg_weights: BoxWeights, nms_threshold: float, min_size: float, triton: bool = False
    ) -> None:
        self.bbox_reg_weights = bbox_reg_weights
        self.nms_threshold = nms_threshold
        self.min_size = min_size
        self.triton = triton  # NMS with a kernel, on a GPU

    @torch.no_grad()
    def __call__(
        self, outputs: Sequence[RPNOutputs], anchors: Sequence[Tensor], sizes: Tensor, counts: ProposalCounts
    ) -> Proposals:
        """Return the proposals.

        They carry no gradient: the heads treat them as constants ("approximate joint training", section 3.2).

        Args:
            outputs: outputs of the head for all anchors of each level.
            anchors: `(H * W * A, 4)` of each level.
            sizes: `(B, 2)` height and width of each image.
            counts: number of boxes to keep before and after NMS.
        """
        boxes, scores = [], []
        for (logits, deltas), level_anchors in zip(outputs, anchors, strict=True):
            top_logits, top_indices = _best(logits, counts.pre_nms_top_n)
            top_deltas = deltas.gather(1, top_indices[..., None].expand(-1, -1, 4))
            boxes.append(decode_deltas(top_deltas, level_anchors[top_indices], weights=self.bbox_reg_weights))
            scores.append(top_logits.float())
        clipped = clip_boxes(torch.cat(boxes, dim=1), sizes)
        large = ((clipped[..., 2:] - clipped[..., :2]) > self.min_size).all(dim=-1)
        indices, kept_scores = nms_of_levels(
            clipped,
            torch.cat(scores, dim=1).masked_fill(~large, -torch.inf),
            [level.shape[1] for level in scores],
            iou_threshold=self.nms_threshold,
            count=counts.post_nms_top_n,
            triton=self.triton,
        )
        return Proposals(clipped.gather(1, indices[..., None].expand(-1, -1, 4)), kept_scores)


def _best(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` highest logits `(B, N)` of each image, or all, and their indices."""
    if torch.compiler.is_exporting():  # N is not known; the number of results should be
        padded = F.pad(logits, (0, count), value=-torch.inf)
        top_logits, indices = padded.topk(count, dim=1)
        return top_logits, indices.clamp(max=logits.shape[1] - 1)
    return logits.topk(min(count, logits.shape[1]), dim=1)


class AnchorAssignment(NamedTuple):
    """Rule that labels and samples anchors for the RPN loss (section 3.1.2)."""

    foreground: float  # smallest IoU of a positive anchor
    background: float  # IoU below which an anchor is negative
    batch_size_per_image: int  # anchors sampled per image
    positive_fraction: float  # largest fraction of positives among them


class AnchorSamples(NamedTuple):
    """S sampled anchors of each image, and their targets."""

    indices: Tensor  # (B, S) int64, 0..N-1
    sampled: Tensor  # (B, S) bool, False for padding
    positive: Tensor  # (B, S) bool
    target_deltas: Tensor  # (B, S, 4); meaningless for negatives


class RPNLoss:
    """Labels and samples the anchors, and computes both loss terms on the sample."""

    def __init__(
        self,
        assignment: AnchorAssignment,
        *,
        bbox_reg_weights: BoxWeights,
        smooth_l1_beta: float,
        normalizer: Normalizer,
    ) -> None:
        self.assignment = assignment
        self.bbox_reg_weights = bbox_reg_weights
        self.smooth_l1_beta = smooth_l1_beta
        self.normalizer: Normalizer = normalizer

    def sample(self, anchors: Tensor, targets: Targets, seeds: Tensor) -> AnchorSamples:
        """Return a sample of the anchors `(N, 4)`. That of an image depends only on its seed, not on its batch."""
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
        target_deltas = encode_deltas(objects, anchors[indices], weights=self.bbox_reg_weights)
        return AnchorSamples(indices, sampled, positive, target_deltas)

    def __call__(self, outputs: RPNOutputs, samples: AnchorSamples) -> RPNLosses:
        """Return both terms for the outputs of the sampled anchors, `(B, S)` and `(B, S, 4)`."""
        return rpn_losses(
            outputs.logits,
            outputs.deltas,
            samples.target_deltas,
            positive=samples.positive,
            sampled=samples.sampled,
            beta=self.smooth_l1_beta,
            per=self.normalizer,
        )


class RPN(nn.Module):
    """The RPN: `forward` returns proposals and losses for training, `propose` returns proposals alone."""

    def __init__(
        self,
        *,
        head: RPNHead,
        anchor_generator: AnchorGenerator,
        selector: ProposalSelector,
        loss: RPNLoss,
        training_counts: ProposalCounts,
        inference_counts: ProposalCounts,
        sparse_loss: bool = True,
    ) -> None:
        """Assemble the RPN. With `sparse_loss`, the head runs with gradient only in `sampled_outputs`."""
        super().__init__()
        self.head = head
        self.anchor_generator = anchor_generator
        self.selector = selector
        self.loss = loss
        self.training_counts = training_counts
        self.inference_counts = inference_counts
        self.sparse_loss = sparse_loss

    def forward(self, features: Sequence[Tensor], images: ImageBatch, targets: Targets) -> tuple[Proposals, RPNLosses]:
        """Return proposals to train the heads, and the losses. `features` holds one map `(B, C, H, W)` per level."""
        anchors = self.anchor_generator(features)
        samples = self.loss.sample(torch.cat(anchors), targets, images.seeds)
        if self.sparse_loss:
            outputs = self._constant_outputs(features)
            sampled = sampled_outputs(self.head, features, samples.indices)
        else:
            outputs = [self.head(level) for level in features]
            sampled = gathered_outputs(outputs, samples.indices)
        proposals = self.selector(outputs, anchors, images.sizes, self.training_counts)
        return proposals, self.loss(sampled, samples)

    def propose(self, features: Sequence[Tensor], sizes: Tensor, counts: ProposalCounts) -> Proposals:
        """Return the proposals alone; see `ProposalSelector` for the arguments."""
        return self.selector(self._constant_outputs(features), self.anchor_generator(features), sizes, counts)

    @torch.no_grad()
    def _constant_outputs(self, features: Sequence[Tensor]) -> list[RPNOutputs]:
        # `detach`: same requires_grad in training and inference, so that the head is compiled once.
        return [self.head(level.detach()) for level in features]
