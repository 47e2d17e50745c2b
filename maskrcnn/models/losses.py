"""Losses as functions of the outputs of RPN and heads and of their targets.

Shapes: B images, S anchors sampled per image, N regions of all images, K classes, M mask side.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from maskrcnn.models.box_head import BoxOutputs
from maskrcnn.models.mask_head import MaskOutputs

Normalizer = Literal["image", "batch"]


class RPNLosses(NamedTuple):
    """The RPN's two loss terms, scalars."""

    loss_objectness: Tensor
    loss_rpn_box_reg: Tensor


class BoxLosses(NamedTuple):
    """The box head's two loss terms, scalars."""

    loss_classifier: Tensor
    loss_box_reg: Tensor


def rpn_losses(
    logits: Tensor,
    deltas: Tensor,
    target_deltas: Tensor,
    *,
    positive: Tensor,
    sampled: Tensor,
    beta: float,
    per: Normalizer,
) -> RPNLosses:
    """Return the cross entropy of the objectness and the smooth L1 loss of the boxes (arXiv 1506.01497, section 3.1.2).

    The box loss uses the positives. Both terms are divided by the number of samples.

    Args:
        logits: `(B, S)` objectness of the sampled anchors.
        deltas: `(B, S, 4)` predicted deltas.
        target_deltas: `(B, S, 4)` deltas of the matched objects; ignored for negatives.
        positive: `(B, S)` bool, anchors that match an object.
        sampled: `(B, S)` bool, False for padding.
        beta: see `box_regression_loss`.
        per: see `sample_mean`.
    """
    counts = sampled.sum(dim=1)
    images = torch.arange(len(logits), device=logits.device)[:, None].expand_as(logits).flatten()
    objectness = F.binary_cross_entropy_with_logits(logits.float(), positive.float(), reduction="none") * sampled
    boxes = box_regression_loss(deltas, target_deltas, beta=beta) * positive
    return RPNLosses(
        sample_mean(objectness.flatten(), images, counts, per=per),
        sample_mean(boxes.flatten(), images, counts, per=per),
    )


def box_head_losses(
    outputs: BoxOutputs,
    labels: Tensor,
    target_deltas: Tensor,
    *,
    images: Tensor,
    batch: int,
    beta: float,
    per: Normalizer,
) -> BoxLosses:
    """Return the cross entropy of the classes and the smooth L1 loss of the boxes (Fast R-CNN, section 2.3).

    The box loss uses the positives and, for each, the deltas of its ground-truth class. Both terms are divided by the
    number of samples, negatives included, so that the box term does not dominate in images with few positives.

    Args:
        outputs: predictions for N regions.
        labels: `(N,)` ground-truth class of each region, 0 for background, -1 for padding.
        target_deltas: `(N, 4)` deltas of the matched objects; ignored for background.
        images: `(N,)` image index of each region.
        batch: number of images, B.
        beta: see `box_regression_loss`.
        per: see `sample_mean`.
    """
    counts = target_deltas.new_zeros(batch).index_add(0, images, (labels >= 0).to(target_deltas.dtype))
    class_losses = F.cross_entropy(outputs.class_logits.float(), labels, reduction="none", ignore_index=-1)
    classes = (labels - 1).clamp(min=0)
    deltas = outputs.box_deltas[torch.arange(len(labels), device=labels.device), classes]  # (N, 4)
    box_losses = box_regression_loss(deltas, target_deltas, beta=beta) * (labels > 0)
    return BoxLosses(
        sample_mean(class_losses, images, counts, per=per), sample_mean(box_losses, images, counts, per=per)
    )


def mask_loss(
    outputs: MaskOutputs, targets: Tensor, *, positive: Tensor, images: Tensor, batch: int, per: Normalizer
) -> Tensor:
    """Return the cross entropy, averaged over the cells of a mask and then over the positives; 0 without positives.

    It is the same for every mask head: a head returns log probabilities, so this is minus the log likelihood of the
    targets (Mask R-CNN, section 3).

    Args:
        outputs: predictions for N regions.
        targets: `(N, M, M)` mask targets in 0..1.
        positive: `(N,)` bool, False for regions without a mask to learn: background, padding, and objects that are
            annotated with a box alone.
        images: `(N,)` image index of each region.
        batch: number of images, B.
        per: see `sample_mean`.
    """
    losses = -(targets * outputs.inside + (1 - targets) * outputs.outside).mean(dim=(1, 2)) * positive
    counts = losses.new_zeros(batch).index_add(0, images, positive.to(losses.dtype))
    return sample_mean(losses, images, counts, per=per)


def sample_mean(values: Tensor, images: Tensor, counts: Tensor, *, per: Normalizer) -> Tensor:
    """Return the mean of per-sample losses, a scalar.

    With `image`, the mean is taken within each image and then over the images, so that the weight of an image does not
    depend on the other images in its batch or on its GPU. With `batch`, all samples of the batch have the same weight,
    as in torchvision, and the result depends on how images are distributed over GPUs.

    Args:
        values: `(N,)` losses.
        images: `(N,)` int64, image index of each sample.
        counts: `(B,)` number of samples of each image, by which its sum is divided; an image with 0 samples adds 0.
        per: `image` or `batch`.
    """
    sums = values.new_zeros(len(counts)).index_add(0, images, values)
    if per == "batch":
        return sums.sum() / counts.sum().clamp(min=1)
    return (sums / counts.clamp(min=1)).mean()


def box_regression_loss(predicted: Tensor, target: Tensor, *, beta: float) -> Tensor:
    """Return the smooth L1 loss, summed over the four deltas: `(N, 4), (N, 4) -> (N,)`. `beta` 0 is L1."""
    return F.smooth_l1_loss(predicted.float(), target, reduction="none", beta=beta).sum(dim=-1)
