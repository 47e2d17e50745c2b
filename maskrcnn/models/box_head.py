"""Box head: classifies each region and predicts a refined box for each class.

A region is the pooled feature map `(C, S, S)` of one region of interest (RoI).

Shapes: N regions, C channels, S cells along a region's side, D features, K classes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, model_validator
from torch import Tensor, nn

from maskrcnn.config import Part, Size
from maskrcnn.models.initialization import Initialization, init_box_predictors, init_convolutions, init_linear
from maskrcnn.models.norms import NormKind, conv_norm, region_convs, require_groups
from maskrcnn.ops.boxes import BoxWeights
from maskrcnn.ops.roi import RoILayerConfig


class BoxHeadConfig(Part):
    """Base class of the configs of box heads, an extension point: the trunk before the two predictors."""

    roi: RoILayerConfig | None = None  # RoI layer of the box head; null uses `model.roi`
    initialization: Initialization = "fan_in"  # see `maskrcnn.models.initialization`
    bbox_reg_weights: BoxWeights = (10.0, 10.0, 5.0, 5.0)  # factors of the box deltas (dx, dy, dw, dh)
    smooth_l1_beta: NonNegativeFloat = 0.0  # absolute error from which smooth L1 is linear; 0 is L1
    pool_size: int = Field(7, ge=1, le=1024)  # cells along a region's side

    @abstractmethod
    def build(self, *, channels: int, side: int) -> BoxTrunk:
        """Return the trunk for regions `(N, channels, side, side)`."""


class FCTrunkConfig(BoxHeadConfig):
    """`depth` fully connected layers: the head of FPN (arXiv 1612.03144, section 4.2)."""

    kind: Literal["fc"] = "fc"
    width: Size = 1024
    depth: int = Field(2, ge=1, le=1000)

    def build(self, *, channels: int, side: int) -> FullyConnected:
        """Return the trunk for regions `(N, channels, side, side)`."""
        inputs = channels * side * side
        return FullyConnected(inputs, width=self.width, depth=self.depth, initialization=self.initialization)


class ConvFCTrunkConfig(BoxHeadConfig):
    """`convs` 3x3 convolutions and `depth` fully connected layers (4 and 1: the head of Group Normalization)."""

    kind: Literal["conv_fc"] = "conv_fc"
    convs: int = Field(4, ge=1, le=1000)
    conv_width: Size = 256
    norm: NormKind = "none"  # after each convolution
    width: Size = 1024
    depth: int = Field(1, ge=1, le=1000)

    @model_validator(mode="after")
    def _channels_form_groups(self) -> ConvFCTrunkConfig:
        require_groups(self.norm, self.conv_width)
        return self

    def build(self, *, channels: int, side: int) -> ConvFC:
        """Return the trunk for regions `(N, channels, side, side)`."""
        inputs = self.conv_width * side * side
        fc = FullyConnected(inputs, width=self.width, depth=self.depth, initialization=self.initialization)
        return ConvFC([channels, *[self.conv_width] * self.convs], fc, norm=self.norm)


class VGGTrunkConfig(BoxHeadConfig):
    """fc6 and fc7 of VGG, with ImageNet weights if the backbone loads them (Fast R-CNN, section 2)."""

    kind: Literal["vgg_fc"] = "vgg_fc"
    pool_size: Literal[7] = 7

    def build(self, *, channels: int, side: int) -> VGGFullyConnected:
        """Return the trunk for regions `(N, channels, side, side)`."""
        return VGGFullyConnected(channels * side * side)


class MeanTrunkConfig(BoxHeadConfig):
    """Global average pooling, as after stage 5 in a ResNet; for C4 backbones."""

    kind: Literal["mean"] = "mean"
    pool_size: int = Field(14, ge=1, le=1024)

    def build(self, *, channels: int, side: int) -> Mean:
        """Return the trunk for regions `(N, channels, side, side)`."""
        return Mean(channels)


class BoxTrunk(nn.Module):
    """Base class of trunks: layers `(N, C, S, S) -> (N, D)` before the two predictors of the box head.

    Attributes:
        features: D, the number of outputs.
        pretrained: whether the file of the backbone's pretrained weights has these layers, too.
    """

    features: int
    pretrained: bool = False


class FullyConnected(BoxTrunk, nn.Sequential):
    """`depth` linear layers with ReLUs: `(N, C, S, S) -> (N, width)`."""

    def __init__(self, inputs: int, *, width: int, depth: int, initialization: Initialization = "fan_in") -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for index in range(depth):
            linear = nn.Linear(inputs if index == 0 else width, width)
            init_linear(linear, how=initialization)
            layers += [linear, nn.ReLU(inplace=True)]
        super().__init__(*layers)
        self.features = width


class ConvFC(BoxTrunk):
    """3x3 convolutions with ReLUs, then fully connected layers: `(N, C, S, S) -> (N, width)`."""

    def __init__(self, channels: Sequence[int], fc: FullyConnected, *, norm: NormKind) -> None:
        """Build the convolutions between maps with `channels`, before `fc`."""
        super().__init__()
        self.convs, self.norms = region_convs(channels, norm=norm)
        self.fc = fc
        self.features = fc.features
        init_convolutions(self.convs)

    def forward(self, regions: Tensor) -> Tensor:
        """`(N, C, S, S) -> (N, width)`."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            assert isinstance(conv, nn.Conv2d)
            regions = F.relu_(conv_norm(conv, norm, regions))
        return self.fc(regions)


class VGGFullyConnected(BoxTrunk):
    """fc6 and fc7, named as in torchvision's VGG: `(N, C, S, S) -> (N, 4096)`.

    VGG's dropout is omitted: it would make the loss of an image depend on the rest of its batch.
    """

    pretrained = True

    def __init__(self, inputs: int, *, width: int = 4096) -> None:
        super().__init__()
        relu = nn.ReLU(inplace=True)
        # nn.Identity takes the index of the dropout layer, so that fc7 keeps index 3.
        self.classifier = nn.Sequential(nn.Linear(inputs, width), relu, nn.Identity(), nn.Linear(width, width), relu)
        self.features = width

    def forward(self, regions: Tensor) -> Tensor:
        """`(N, C, S, S) -> (N, 4096)`."""
        return self.classifier(regions.flatten(1))


class Mean(BoxTrunk):
    """Global average pooling: `(N, C, S, S) -> (N, C)`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.features = channels

    def forward(self, regions: Tensor) -> Tensor:
        """`(N, C, S, S) -> (N, C)`."""
        return regions.mean(dim=(2, 3))


class BoxOutputs(NamedTuple):
    """Predictions of the box head for N regions."""

    class_logits: Tensor  # (N, K + 1); column 0 is background
    box_deltas: Tensor  # (N, K, 4): box of each class, encoded relative to the proposal


class BoxHead(nn.Module):
    """A trunk of shared layers, followed by one linear layer for class logits and one for box deltas."""

    def __init__(
        self,
        *,
        trunk: nn.Module,
        features: int,
        num_classes: int,
        initialization: Initialization = "fan_in",
    ) -> None:
        """Build the two predictors on `trunk`.

        Args:
            trunk: maps regions `(N, C, S, S)` to `(N, features)`.
            features: D, number of features that `trunk` returns.
            num_classes: K.
            initialization: scheme of the predictors, see `maskrcnn.models.initialization`.
        """
        super().__init__()
        self.trunk = trunk
        self.cls_score = nn.Linear(features, num_classes + 1)
        self.bbox_pred = nn.Linear(features, num_classes * 4)
        init_box_predictors(self.cls_score, self.bbox_pred, how=initialization)

    def forward(self, regions: Tensor) -> BoxOutputs:
        """Return class logits and box deltas of regions `(N, C, S, S)`."""
        features = self.trunk(regions)
        return BoxOutputs(self.cls_score(features), self.bbox_pred(features).unflatten(1, (-1, 4)))
