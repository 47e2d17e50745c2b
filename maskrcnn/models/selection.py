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

    batch_size_per_image: int = Field(512, ge=1)
    positive_fraction: float = Field(0.25, ge=0, le=1)
    foreground: float = Field(0.5, ge=0, le=1)  # IoU from which a proposal is positive; below, it is background

    def build(self) -> RegionSampler:
        """The sampler."""
        return RegionSampler(
            batch_size_per_image=self.batch_size_per_image,
            positive_fraction=self.positive_fraction,
            foreground=self.foreground,
        )


class DetectionConfig(Section):
    """Which boxes become detections (Detectron2's defaults)."""

    score_threshold: float = Field(0.05, ge=0, le=1)
    nms_threshold: float = Field(0.5, ge=0, le=1)
    detections_per_image: int = Field(100, ge=1)
    min_size: NonNegativeFloat = 0.0  # px

    def build(self, *, bbox_reg_weights: BoxWeights) -> DetectionSelector:
        """The selector for deltas with these weights."""
        return DetectionSelector(
            score_threshold=self.score_threshold,
            nms_threshold=self.nms_threshold,
            detections_per_image=self.detections_per_image,
            min_size=self.min_size,
            bbox_reg_weights=bbox_reg_weights,
        )


class RegionSampler:
    """Draws positives and background from the proposals, to which the objects' own boxes are added."""

    def __init__(self, *, batch_size_per_image: int, positive_fraction: float, foreground: float) -> None:
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction
        self.foreground = foreground

    @property
    def max_positives(self) -> int:
        """Positives are among the first so many samples of an image."""
        return int(self.batch_size_per_image * self.positive_fraction)

    @torch.no_grad()
    def __call__(self, proposals: Proposals, targets: Targets, seeds: Tensor) -> RoISamples:
        """Draw S samples in each image; the draw of an image depends on its seed alone."""
        # An object's own box is a perfect proposal: without it a young RPN gives the heads no positives.
        boxes = torch.cat((proposals.boxes, targets.boxes), dim=1)
        usable = torch.cat((proposals.valid, targets.valid), dim=1)
        matches = match_boxes(
            boxes, targets, foreground=self.foreground, background=self.foreground, allow_low_quality_matches=False
        )
        labels = torch.where(usable, matches.labels, -1)
        indices, drawn = sample_balanced(
            labels,
            count=self.batch_size_per_image,
            positive_fraction=self.positive_fraction,
            seeds=seeds,
            stream=HEAD_STREAM,
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
        positive_fraction=(samples.labels > 0).sum() / samples.valid.sum(),
    )


class DetectionSelector:
    """Moves every proposal as each class would have it, and keeps the best boxes of each class."""

    def __init__(
        self,
        *,
        score_threshold: float,
        nms_threshold: float,
        detections_per_image: int,
        min_size: float,
        bbox_reg_weights: BoxWeights,
    ) -> None:
        self.score_threshold = score_threshold
        self.nms_threshold = nms_threshold
        self.detections_per_image = detections_per_image
        self.min_size = min_size
        self.bbox_reg_weights = bbox_reg_weights

    def __call__(self, proposals: Proposals, class_logits: Tensor, box_deltas: Tensor, sizes: Tensor) -> Detections:
        """Select D detections in each image, without masks as yet: `masks` is `(B, D, 0, 0)`.

        Args:
            proposals: the regions.
            class_logits: `(B, P, K + 1)`; anything for padding.
            box_deltas: `(B, P, K, 4)`.
            sizes: `(B, 2)` height and width of each image.
        """
        batch, number, classes, _ = box_deltas.shape
        boxes = decode_deltas(box_deltas, proposals.boxes[:, :, None], weights=self.bbox_reg_weights)
        boxes = clip_boxes(boxes, sizes).flatten(1, 2)  # (B, P, K, 4) -> (B, P * K, 4)
        probabilities = class_logits.float().softmax(dim=-1)[..., 1:]
        wanted = (probabilities > self.score_threshold) & proposals.valid[..., None]
        large = ((boxes[..., 2:] - boxes[..., :2]) > self.min_size).all(dim=-1)
        candidates = torch.where(wanted.flatten(1) & large, probabilities.flatten(1), -torch.inf)
        labels = torch.arange(1, classes + 1, device=boxes.device).repeat(number).expand(batch, -1)
        indices, best = batched_nms(
            boxes, candidates, labels, iou_threshold=self.nms_threshold, count=self.detections_per_image
        )
        found = best > -torch.inf
        return Detections(
            boxes=torch.where(found[..., None], boxes.gather(1, indices[..., None].expand(-1, -1, 4)), 0),
            scores=best,
            labels=torch.where(found, labels.gather(1, indices), -1),
            masks=boxes.new_zeros(batch, self.detections_per_image, 0, 0),
        )
