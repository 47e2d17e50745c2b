"""Box head: the class of a region, and for each class where its box should be.

Shapes: N regions, C channels, S cells along a region's side, D features, K classes, B images.
"""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn

from maskrcnn.config import Section
from maskrcnn.models.initialization import Initialization, init_box_predictors, init_linear
from maskrcnn.models.losses import Normalizer, box_regression_loss, sample_mean
from maskrcnn.ops.boxes import BoxWeights, encode_deltas
from maskrcnn.ops.roi import RoIConfig


class _TrunkConfig(Section):
    """What all trunks share."""

    roi: RoIConfig | None = None  # the box head's own RoI layer; null takes `model.roi`
    initialization: Initialization = "fan_in"  # how the layers start: `maskrcnn.models.initialization`
    bbox_reg_weights: BoxWeights = (10.0, 10.0, 5.0, 5.0)  # by which the deltas' coordinates are multiplied
    smooth_l1_beta: NonNegativeFloat = 0.0  # where smooth L1 turns linear; 0 is L1


class FCTrunkConfig(_TrunkConfig):
    """Hidden fully connected layers: the head of FPN (arXiv 1612.03144, section 4.2)."""

    kind: Literal["fc"] = "fc"
    pool_size: PositiveInt = 7
    width: PositiveInt = 1024
    depth: int = Field(2, ge=1)

    def build(self, *, channels: int, side: int) -> FullyConnected:
        """The trunk for regions `(N, channels, side, side)`."""
        inputs = channels * side * side
        return FullyConnected(inputs, width=self.width, depth=self.depth, initialization=self.initialization)


class VGGTrunkConfig(_TrunkConfig):
    """VGG's own fc6 and fc7, with its ImageNet weights where the backbone has them (Fast R-CNN, section 2)."""

    kind: Literal["vgg_fc"] = "vgg_fc"
    pool_size: Literal[7] = 7

    def build(self, *, channels: int, side: int) -> VGGFullyConnected:
        """The trunk for regions `(N, channels, side, side)`."""
        return VGGFullyConnected(channels * side * side)


class MeanTrunkConfig(_TrunkConfig):
    """The mean over a region's cells: what follows stage 5 in a ResNet, for C4 backbones."""

    kind: Literal["mean"] = "mean"
    pool_size: PositiveInt = 14

    def build(self, *, channels: int, side: int) -> Mean:
        """The trunk for regions `(N, channels, side, side)`."""
        return Mean(channels)


BoxTrunkConfig = Annotated[FCTrunkConfig | VGGTrunkConfig | MeanTrunkConfig, Field(discriminator="kind")]


class FullyConnected(nn.Sequential):
    """`depth` linear layers with ReLUs: `(N, C, S, S) -> (N, width)`."""

    def __init__(self, inputs: int, *, width: int, depth: int, initialization: Initialization = "fan_in") -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for index in range(depth):
            linear = nn.Linear(inputs if index == 0 else width, width)
            init_linear(linear, how=initialization)
            layers += [linear, nn.ReLU(inplace=True)]
        super().__init__(*layers)
        self.features = width


class VGGFullyConnected(nn.Module):
    """fc6 and fc7, named as in torchvision's VGG: `(N, C, S, S) -> (N, 4096)`.

    Without VGG's dropout: a draw inside the head would make an image's loss depend on the rest of its batch.
    """

    def __init__(self, inputs: int, *, width: int = 4096) -> None:
        super().__init__()
        relu = nn.ReLU(inplace=True)
        # Index 2 was the dropout; fc7 keeps its number 3.
        self.classifier = nn.Sequential(nn.Linear(inputs, width), relu, nn.Identity(), nn.Linear(width, width), relu)
        self.features = width

    def forward(self, regions: Tensor) -> Tensor:
        """`(N, C, S, S) -> (N, 4096)`."""
        return self.classifier(regions.flatten(1))


class Mean(nn.Module):
    """`(N, C, S, S) -> (N, C)`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.features = channels

    def forward(self, regions: Tensor) -> Tensor:
        """`(N, C, S, S) -> (N, C)`."""
        return regions.mean(dim=(2, 3))


class BoxOutputs(NamedTuple):
    """What the box head says of N regions."""

    class_logits: Tensor  # (N, K + 1); column 0 is background
    box_deltas: Tensor  # (N, K, 4): the box of each class, relative to the region


class BoxLosses(NamedTuple):
    """The box head's two loss terms, scalars."""

    loss_classifier: Tensor
    loss_box_reg: Tensor


class BoxHead(nn.Module):
    """A trunk, and one linear layer each for class logits and box deltas."""

    def __init__(
        self,
        *,
        trunk: nn.Module,
        features: int,
        num_classes: int,
        bbox_reg_weights: BoxWeights,
        smooth_l1_beta: float,
        normalizer: Normalizer,
        initialization: Initialization = "fan_in",
    ) -> None:
        """Build the predictors on `trunk`, which gives `features` numbers a region.

        `bbox_reg_weights` multiply the deltas' coordinates, and smooth L1 turns linear at `smooth_l1_beta` (0: L1).
        `normalizer` is explained at `sample_mean`, and `initialization`, of the predictors, in
        `maskrcnn.models.initialization`.
        """
        super().__init__()
        self.trunk = trunk
        self.bbox_reg_weights = bbox_reg_weights
        self.smooth_l1_beta = smooth_l1_beta
        self.normalizer: Normalizer = normalizer
        self.cls_score = nn.Linear(features, num_classes + 1)
        self.bbox_pred = nn.Linear(features, num_classes * 4)
        init_box_predictors(self.cls_score, self.bbox_pred, how=initialization)

    def forward(self, regions: Tensor) -> BoxOutputs:
        """Regions `(N, C, S, S)` to class logits and box deltas."""
        features = self.trunk(regions)
        return BoxOutputs(self.cls_score(features), self.bbox_pred(features).unflatten(1, (-1, 4)))

    def losses(
        self, outputs: BoxOutputs, *, labels: Tensor, boxes: Tensor, objects: Tensor, images: Tensor, batch: int
    ) -> BoxLosses:
        """Cross entropy of the classes, and smooth L1 of a positive's own deltas (Fast R-CNN, section 2.3).

        Both are divided by the number of samples, negatives included, so that the box term does not outgrow the
        other in images with few positives.

        Args:
            outputs: for N regions.
            labels: `(N,)` class of each region, 0 for background.
            boxes: `(N, 4)` of the regions.
            objects: `(N, 4)` boxes of the matched objects; anything for background.
            images: `(N,)` image of each region.
            batch: number of images, B.
        """
        counts = boxes.new_zeros(batch).index_add(0, images, torch.ones_like(labels, dtype=boxes.dtype))
        label = F.cross_entropy(outputs.class_logits.float(), labels, reduction="none")
        own = outputs.box_deltas[torch.arange(len(labels), device=labels.device), (labels - 1).clamp(min=0)]  # (N, 4)
        wanted = encode_deltas(objects, boxes, weights=self.bbox_reg_weights)
        box = box_regression_loss(own, wanted, beta=self.smooth_l1_beta) * (labels > 0)
        return BoxLosses(
            sample_mean(label, images, counts, per=self.normalizer),
            sample_mean(box, images, counts, per=self.normalizer),
        )
