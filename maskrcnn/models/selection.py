"""Sampling of proposals to train the heads, and selection of detections.

Shapes: B images, P proposals, S samples, G objects, K classes, D detections.
"""

from __future__ import annotations

import torch
from pydantic import Field, NonNegativeFloat
from torch import Tensor

from maskrcnn.config import Section, Size
from maskrcnn.ops.boxes import BoxWeights, clip_boxes, decode_deltas, pairwise_iou
from maskrcnn.ops.matching import boxes_at_once, match_boxes, sample_balanced
from maskrcnn.ops.nms import batched_nms
from maskrcnn.structures import Detections, Diagnostics, Proposals, RoISamples, Targets

HEAD_STREAM = 1  # random stream of the RoI sampling (the RPN uses 0); see `sample_balanced`
RECALLED = 0.5  # smallest IoU with a proposal at which an object counts as recalled


class SamplingConfig(Section):
    """Sampling of proposals to train the heads (Mask R-CNN, section 3.1; defaults of Detectron2)."""

    batch_size_per_image: Size = 512
    positive_fraction: float = Field(0.25, ge=0, le=1)
    foreground: float = Field(0.5, gt=0, le=1)  # smallest IoU of a positive; other proposals are background

    def build(self) -> RegionSampler:
        """Return the sampler."""
        return RegionSampler(
            batch_size_per_image=self.batch_size_per_image,
            positive_fraction=self.positive_fraction,
            foreground=self.foreground,
        )


class DetectionConfig(Section):
    """Selection of detections (defaults of Detectron2)."""

    score_threshold: float = Field(0.05, ge=0, le=1)
    nms_threshold: float = Field(0.5, ge=0, le=1)
    detections_per_image: Size = 100
    min_size: NonNegativeFloat = 0.0  # px
    pre_nms_top_n: Size = Field(
        20_000,
        description="pairs of proposal and class that NMS gets, those with the best scores of each image; by default "
        "all, since at most 19 classes of each of 1000 proposals have a probability above 0.05",
    )

    def build(self, *, bbox_reg_weights: BoxWeights, triton: bool = False) -> DetectionSelector:
        """Return the selector for box deltas with these weights. `triton`: NMS with a kernel."""
        return DetectionSelector(
            score_threshold=self.score_threshold,
            nms_threshold=self.nms_threshold,
            detections_per_image=self.detections_per_image,
            min_size=self.min_size,
            pre_nms_top_n=self.pre_nms_top_n,
            bbox_reg_weights=bbox_reg_weights,
            triton=triton,
        )


class RegionSampler:
    """Samples positives and background from the proposals and the ground-truth boxes."""

    def __init__(self, *, batch_size_per_image: int, positive_fraction: float, foreground: float) -> None:
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction
        self.foreground = foreground

    @property
    def max_positives(self) -> int:
        """Largest number of positives per image; positives are among the first `max_positives` samples."""
        return int(self.batch_size_per_image * self.positive_fraction)

    @torch.no_grad()
    def __call__(self, proposals: Proposals, targets: Targets, seeds: Tensor) -> RoISamples:
        """Return S samples per image. The sample of an image depends only on its seed, not on its batch."""
        # Ground-truth boxes are added as proposals: an untrained RPN would give the heads no positives.
        boxes = torch.cat((proposals.boxes, targets.boxes), dim=1)
        usable = torch.cat((proposals.valid, targets.valid), dim=1)
        matches = match_boxes(
            boxes, targets, foreground=self.foreground, background=self.foreground, allow_low_quality_matches=False
        )
        labels = torch.where(usable, matches.labels, -1)
        indices, sampled = sample_balanced(
            labels,
            count=self.batch_size_per_image,
            positive_fraction=self.positive_fraction,
            seeds=seeds,
            stream=HEAD_STREAM,
        )
        return RoISamples(
            boxes=boxes.gather(1, indices[..., None].expand(-1, -1, 4)),
            labels=torch.where(sampled, labels.gather(1, indices), -1),
            matched=matches.matched.gather(1, indices),
        )


@torch.no_grad()
def diagnose(proposals: Proposals, targets: Targets, samples: RoISamples) -> Diagnostics:
    """Return the recall of the proposals and the fraction of positives among the samples of a batch."""
    step = boxes_at_once(proposals.boxes, targets)  # limits the memory for the IoU of all pairs
    chunks = zip(proposals.boxes.split(step, dim=1), proposals.valid.split(step, dim=1), strict=True)
    chunk_ious = [(pairwise_iou(boxes, targets.boxes) * valid[..., None]).amax(dim=1) for boxes, valid in chunks]
    max_iou = torch.stack(chunk_ious).amax(dim=0)  # (B, G): over all proposals
    recalled = (max_iou >= RECALLED) & targets.valid
    return Diagnostics(
        proposal_recall=recalled.sum() / targets.valid.sum(),
        positive_fraction=(samples.labels > 0).sum() / samples.valid.sum(),
    )


class DetectionSelector:
    """Decodes the box of every proposal and class, and applies score threshold and per-class NMS."""

    def __init__(
        self,
        *,
        score_threshold: float,
        nms_threshold: float,
        detections_per_image: int,
        min_size: float,
        pre_nms_top_n: int,
        bbox_reg_weights: BoxWeights,
        triton: bool = False,
    ) -> None:
        self.score_threshold = score_threshold
        self.nms_threshold = nms_threshold
        self.detections_per_image = detections_per_image
        self.min_size = min_size
        self.pre_nms_top_n = pre_nms_top_n
        self.bbox_reg_weights = bbox_reg_weights
        self.triton = triton  # NMS with a kernel, on a GPU

    def __call__(self, proposals: Proposals, class_logits: Tensor, box_deltas: Tensor, sizes: Tensor) -> Detections:
        """Return D detections per image, without masks: `masks` is `(B, D, 0, 0)`.

        Args:
            proposals: proposals of the RPN.
            class_logits: `(B, P, K + 1)`; ignored for padding.
            box_deltas: `(B, P, K, 4)`.
            sizes: `(B, 2)` height and width of each image.
        """
        batch, num_proposals, num_classes, _ = box_deltas.shape
        boxes = decode_deltas(box_deltas, proposals.boxes[:, :, None], weights=self.bbox_reg_weights)
        boxes = clip_boxes(boxes, sizes).flatten(1, 2)  # (B, P, K, 4) -> (B, P * K, 4)
        probabilities = class_logits.float().softmax(dim=-1)[..., 1:]
        confident = (probabilities > self.score_threshold) & proposals.valid[..., None]
        large = ((boxes[..., 2:] - boxes[..., :2]) > self.min_size).all(dim=-1)
        scores = torch.where(confident.flatten(1) & large, probabilities.flatten(1), -torch.inf)
        labels = torch.arange(1, num_classes + 1, device=boxes.device).repeat(num_proposals).expand(batch, -1)
        if scores.shape[1] > self.pre_nms_top_n:
            candidates = scores.topk(self.pre_nms_top_n, dim=1).indices.sort(dim=1).values  # in their order, for ties
            boxes = boxes.gather(1, candidates[..., None].expand(-1, -1, 4))
            scores, labels = scores.gather(1, candidates), labels.gather(1, candidates)
        indices, kept_scores = batched_nms(
            boxes,
            scores,
            labels,
            iou_threshold=self.nms_threshold,
            count=self.detections_per_image,
            triton=self.triton,
        )
        kept = kept_scores > -torch.inf
        return Detections(
            boxes=torch.where(kept[..., None], boxes.gather(1, indices[..., None].expand(-1, -1, 4)), 0),
            scores=kept_scores,
            labels=torch.where(kept, labels.gather(1, indices), -1),
            masks=boxes.new_zeros(batch, self.detections_per_image, 0, 0),
        )
