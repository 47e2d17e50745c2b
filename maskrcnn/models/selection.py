"""Which regions train the heads, and which become detections.

Shapes: B images, P proposals, S samples, G objects, K classes, D detections.
"""

from __future__ import annotations

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from maskrcnn.config import Section
from maskrcnn.ops.boxes import BoxWeights, clip_boxes, decode_deltas, pairwise_iou
from maskrcnn.ops.matching import PAIRS_AT_ONCE, match_boxes, sample_balanced
from maskrcnn.ops.nms import batched_nms
from maskrcnn.structures import Detections, Diagnostics, Proposals, RoISamples, Targets

HEAD_STREAM = 1  # of the random keys that draw regions; the RPN has 0
RECALLED = 0.5  # IoU from which a proposal finds an object


class SamplingConfig(Section):
    """Which proposals train the heads, in each image (Mask R-CNN, section 3.1; Detectron2's defaults)."""

    count: int = Field(512, ge=1)
    positive_share: float = Field(0.25, ge=0, le=1)
    foreground: float = Field(0.5, ge=0, le=1)  # IoU from which a proposal is positive; below, it is background

    def build(self) -> RegionSampler:
        """The sampler."""
        return RegionSampler(count=self.count, positive_share=self.positive_share, foreground=self.foreground)


class DetectionConfig(Section):
    """Which boxes become detections (Detectron2's defaults)."""

    score_threshold: float = Field(0.05, ge=0, le=1)
    nms_threshold: float = Field(0.5, ge=0, le=1)
    count: int = Field(100, ge=1)
    min_size: NonNegativeFloat = 0.0  # px

    def build(self, *, box_weights: BoxWeights) -> DetectionSelector:
        """The selector for deltas with these weights."""
        return DetectionSelector(
            score_threshold=self.score_threshold,
            nms_threshold=self.nms_threshold,
            count=self.count,
            min_size=self.min_size,
            box_weights=box_weights,
        )


class RegionSampler:
    """Draws positives and background from the proposals, to which the objects' own boxes are added."""

    def __init__(self, *, count: int, positive_share: float, foreground: float) -> None:
        self.count = count
        self.positive_share = positive_share
        self.foreground = foreground

    @property
    def max_positives(self) -> int:
        """Positives are among the first so many samples of an image."""
        return int(self.count * self.positive_share)

    @torch.no_grad()
    def __call__(self, proposals: Proposals, targets: Targets, seeds: Tensor) -> RoISamples:
        """Draw S samples in each image; the draw of an image depends on its seed alone."""
        # An object's own box is a perfect proposal: without it a young RPN gives the heads no positives.
        boxes = torch.cat((proposals.boxes, targets.boxes), dim=1)
        usable = torch.cat((proposals.valid, targets.valid), dim=1)
        matches = match_boxes(boxes, targets, foreground=self.foreground, background=self.foreground, low_quality=False)
        labels = torch.where(usable, matches.labels, -1)
        indices, drawn = sample_balanced(
            labels, count=self.count, positive_share=self.positive_share, seeds=seeds, stream=HEAD_STREAM
        )
        return RoISamples(
            boxes=boxes.gather(1, indices[..., None].expand(-1, -1, 4)),
            labels=torch.where(drawn, labels.gather(1, indices), -1),
            matched=matches.matched.gather(1, indices),
        )


@torch.no_grad()
def diagnose(proposals: Proposals, targets: Targets, samples: RoISamples) -> Diagnostics:
    """How well the RPN found the objects of a batch, and what the heads got to learn from."""
    step = max(1, PAIRS_AT_ONCE // targets.labels.numel())  # many objects: fewer proposals at once
    chunks = zip(proposals.boxes.split(step, dim=1), proposals.valid.split(step, dim=1), strict=True)
    overlaps = [(pairwise_iou(boxes, targets.boxes) * valid[..., None]).amax(dim=1) for boxes, valid in chunks]
    best = torch.stack(overlaps).amax(dim=0)  # (B, G): of all proposals with each object
    found = (best >= RECALLED) & targets.valid
    return Diagnostics(
        proposal_recall=found.sum() / targets.valid.sum(),
        positive_share=(samples.labels > 0).sum() / samples.valid.sum(),
    )


class DetectionSelector:
    """Moves every proposal as each class would have it, and keeps the best boxes of each class."""

    def __init__(
        self,
        *,
        score_threshold: float,
        nms_threshold: float,
        count: int,
        min_size: float,
        box_weights: BoxWeights,
    ) -> None:
        self.score_threshold = score_threshold
        self.nms_threshold = nms_threshold
        self.count = count
        self.min_size = min_size
        self.box_weights = box_weights

    def __call__(self, proposals: Proposals, scores: Tensor, deltas: Tensor, sizes: Tensor) -> Detections:
        """Select D detections in each image, without masks as yet: `masks` is `(B, D, 0, 0)`.

        Args:
            proposals: the regions.
            scores: `(B, P, K + 1)` logits of each; anything for padding.
            deltas: `(B, P, K, 4)`.
            sizes: `(B, 2)` height and width of each image.
        """
        batch, number, classes, _ = deltas.shape
        boxes = decode_deltas(deltas, proposals.boxes[:, :, None], weights=self.box_weights)
        boxes = clip_boxes(boxes, sizes).flatten(1, 2)  # (B, P, K, 4) -> (B, P * K, 4)
        probabilities = scores.float().softmax(dim=-1)[..., 1:]
        wanted = (probabilities > self.score_threshold) & proposals.valid[..., None]
        large = ((boxes[..., 2:] - boxes[..., :2]) > self.min_size).all(dim=-1)
        candidates = torch.where(wanted.flatten(1) & large, probabilities.flatten(1), -torch.inf)
        labels = torch.arange(1, classes + 1, device=boxes.device).repeat(number).expand(batch, -1)
        indices, best = batched_nms(boxes, candidates, labels, iou_threshold=self.nms_threshold, count=self.count)
        found = best > -torch.inf
        return Detections(
            boxes=torch.where(found[..., None], boxes.gather(1, indices[..., None].expand(-1, -1, 4)), 0),
            scores=best,
            labels=torch.where(found, labels.gather(1, indices), -1),
            masks=boxes.new_zeros(batch, self.count, 0, 0),
        )
