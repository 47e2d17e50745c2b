"""Mask head: predicts a mask of M x M cells for each region, with a fully convolutional or a fully connected branch.

With `output: sigmoid` the head predicts an independent binary mask for every class, and only the mask of the region's
class is used: classes do not compete (Mask R-CNN, arXiv 1703.06870, section 3). With `output: softmax` each cell is
classified into the classes and background, as in semantic segmentation (table 2b).

A region is the pooled feature map `(C, S, S)` of one region of interest (RoI).

Shapes: N regions, C channels, S cells along a region's side, M mask side, K classes, L channels of logits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from maskrcnn.config import Part, Size
from maskrcnn.models.initialization import (
    Initialization,
    init_convolutions,
    init_he,
    init_linear,
    init_mask_logits,
)
from maskrcnn.models.norms import NormKind, conv_norm, region_convs, require_groups
from maskrcnn.ops.roi import RoILayerConfig
from maskrcnn.structures import ClassRows

MaskOutput = Literal["sigmoid", "softmax"]
MaskTarget = Literal["coverage", "torchvision"]


class MaskHeadConfig(Part):
    """Base class of the configs of mask heads, an extension point.

    `roi`: the RoI layer of this head; null uses `model.roi`.
    `output`: `sigmoid` (independent binary masks) or `softmax` (classes and background compete for each cell).
    `class_agnostic`: one mask for all classes instead of one per class.
    `target`: the mask target of a cell. `coverage`: 1 if the object's mask covers at least half of the cell, else 0.
    `torchvision`: the fractional values of torchvision's RoIAlign of the mask.
    `paste`: how a mask is pasted into the image. `exact`: with the box as predicted. `torchvision`: with the box
    rounded to whole pixels.
    `initialization`: scheme of the initial weights (`maskrcnn.models.initialization`).
    """

    pool_size: int = Field(14, ge=1, le=1024)
    roi: RoILayerConfig | None = None
    output: MaskOutput = "sigmoid"
    class_agnostic: bool = False
    target: MaskTarget = "coverage"
    paste: Literal["exact", "torchvision"] = "exact"
    initialization: Initialization = "fan_in"

    @abstractmethod
    def build(self, *, channels: int, side: int, num_classes: int) -> MaskHead:
        """Return the head for regions `(N, channels, side, side)`."""


class FCNMaskHeadConfig(MaskHeadConfig):
    """Fully convolutional head: `depth` 3x3 convolutions and a transposed convolution that doubles the side."""

    kind: Literal["fcn"] = "fcn"
    depth: int = Field(4, ge=0, le=1000)
    width: Size = 256
    norm: NormKind = "none"  # after each 3x3 convolution

    @model_validator(mode="after")
    def _channels_form_groups(self) -> FCNMaskHeadConfig:
        require_groups(self.norm, self.width)
        return self

    def build(self, *, channels: int, side: int, num_classes: int) -> FCNMaskHead:
        """Return the head for regions `(N, channels, side, side)`."""
        return FCNMaskHead(
            channels=channels,
            side=side,
            depth=self.depth,
            width=self.width,
            norm=self.norm,
            num_classes=num_classes,
            output=self.output,
            class_agnostic=self.class_agnostic,
            initialization=self.initialization,
        )


class MLPMaskHeadConfig(MaskHeadConfig):
    """Fully connected head: `depth` hidden layers and one layer for all mask cells (Mask R-CNN, table 2e)."""

    kind: Literal["mlp"] = "mlp"
    depth: int = Field(2, ge=1, le=1000)
    width: Size = 1024
    mask_size: int = Field(28, ge=1, le=1024)

    def build(self, *, channels: int, side: int, num_classes: int) -> MLPMaskHead:
        """Return the head for regions `(N, channels, side, side)`."""
        return MLPMaskHead(
            inputs=channels * side * side,
            depth=self.depth,
            width=self.width,
            mask_size=self.mask_size,
            num_classes=num_classes,
            output=self.output,
            class_agnostic=self.class_agnostic,
            initialization=self.initialization,
        )


class MaskOutputs(NamedTuple):
    """Log probabilities of the mask cells of N regions, float32."""

    inside: Tensor  # (N, M, M): the cell belongs to the object
    outside: Tensor  # (N, M, M): the cell is background


class MaskHead(nn.Module, ABC):
    """Base class of mask heads: order of the logit channels, and probabilities.

    A head returns the log probabilities of the cells, from which `maskrcnn.models.losses.mask_loss` follows.

    The logits have L = K channels in the order of the labels, or L = 1 if the head is class-agnostic. With softmax, a
    background channel precedes them.
    """

    logits: nn.Conv2d | nn.Linear  # the last layer; its parameter rows are in the order of the L channels

    def __init__(self, *, mask_size: int, num_classes: int, output: MaskOutput, class_agnostic: bool) -> None:
        super().__init__()
        self.mask_size = mask_size  # M
        self.output: MaskOutput = output
        self.class_agnostic = class_agnostic
        self.channels = (1 if class_agnostic else num_classes) + (output == "softmax")  # L

    @abstractmethod
    def all_masks(self, regions: Tensor) -> Tensor:
        """Return the logits of all channels: `(N, C, S, S) -> (N, L, M, M)`."""

    def own_masks(self, regions: Tensor, channels: Tensor) -> Tensor:
        """Return the logits of channel `channels[n]`, 0..L-1, of each region n: `(N, C, S, S), (N,) -> (N, M, M)`."""
        return _select_channel(self.all_masks(regions), channels)

    def forward(self, regions: Tensor, labels: Tensor) -> MaskOutputs:
        """Return the mask of class `labels[n]` for each region n, as log probabilities.

        Args:
            regions: `(N, C, S, S)`.
            labels: `(N,)` int64, 1..K.
        """
        classes = torch.ones_like(labels) if self.class_agnostic else labels
        if self.output == "sigmoid":
            logits = self.own_masks(regions, classes - 1).float()
            return MaskOutputs(F.logsigmoid(logits), F.logsigmoid(-logits))
        log_probabilities = self.all_masks(regions).float().log_softmax(dim=1)
        return MaskOutputs(_select_channel(log_probabilities, classes), log_probabilities[:, 0])

    def probabilities(self, regions: Tensor, labels: Tensor) -> Tensor:
        """Return the mask probabilities `(N, M, M)`, float32. See `forward` for the arguments."""
        return self(regions, labels).inside.exp()

    def class_rows(self) -> dict[str, ClassRows]:
        """Return the parameters whose rows belong to classes, for `engine.checkpoint.load_weights`."""
        if self.class_agnostic:
            return {}
        rows = ClassRows(per_class=len(self.logits.weight) // self.channels, background=self.output == "softmax")
        return {"logits.weight": rows, "logits.bias": rows}


class FCNMaskHead(MaskHead):
    """Fully convolutional mask head, which keeps the spatial layout of the region. M = 2 S."""

    def __init__(
        self,
        *,
        channels: int,
        side: int,
        depth: int,
        width: int,
        num_classes: int,
        output: MaskOutput,
        class_agnostic: bool,
        initialization: Initialization = "fan_in",
        norm: NormKind = "none",
    ) -> None:
        super().__init__(
            mask_size=2 * side,
            num_classes=num_classes,
            output=output,
            class_agnostic=class_agnostic,
        )
        self.convs, self.norms = region_convs([channels, *[width] * depth], norm=norm)
        self.upsample = nn.ConvTranspose2d(width if depth else channels, width, 2, 2)
        self.logits: nn.Conv2d = nn.Conv2d(width, self.channels, 1)
        init_convolutions(self.convs)
        init_he(self.upsample)
        init_mask_logits(self.logits, how=initialization)

    def features(self, regions: Tensor) -> Tensor:
        """Return the input of the last layer: `(N, C, S, S) -> (N, width, M, M)`."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            assert isinstance(conv, nn.Conv2d)
            regions = F.relu_(conv_norm(conv, norm, regions))
        return F.relu_(self.upsample(regions))

    def all_masks(self, regions: Tensor) -> Tensor:
        """Return the logits of all channels: `(N, C, S, S) -> (N, L, M, M)`."""
        return self.logits(self.features(regions))

    def own_masks(self, regions: Tensor, channels: Tensor) -> Tensor:
        """Return the logits of one channel of each region, `(N, M, M)`, without computing the other L - 1."""
        features = self.features(regions).permute(0, 2, 3, 1)  # (N, M, M, width): the memory layout
        # A 1x1 convolution is a dot product over channels: (N, M * M, width) x (N, width, 1).
        kernels = self.logits.weight.flatten(1)[channels][..., None]
        assert self.logits.bias is not None
        logits = torch.bmm(features.flatten(1, 2), kernels) + self.logits.bias[channels][:, None, None]
        return logits.view(features.shape[:3])


class MLPMaskHead(MaskHead):
    """Fully connected mask head: every mask cell depends on the whole region.

    It always computes all L masks. Gathering the weights of one channel per region would take M * M * width numbers
    per region, more than the L masks for any L < `width`.
    """

    def __init__(
        self,
        *,
        inputs: int,
        depth: int,
        width: int,
        mask_size: int,
        num_classes: int,
        output: MaskOutput,
        class_agnostic: bool,
        initialization: Initialization = "fan_in",
    ) -> None:
        """Build the layers for regions with `inputs` = C * S * S features."""
        super().__init__(
            mask_size=mask_size,
            num_classes=num_classes,
            output=output,
            class_agnostic=class_agnostic,
        )
        hidden = [nn.Linear(inputs if index == 0 else width, width) for index in range(depth)]
        self.hidden = nn.ModuleList(hidden)
        self.logits: nn.Linear = nn.Linear(width, self.channels * mask_size**2)
        for layer in hidden:
            init_linear(layer, how=initialization)
        init_mask_logits(self.logits, how=initialization)

    def all_masks(self, regions: Tensor) -> Tensor:
        """Return the logits of all channels: `(N, C, S, S) -> (N, L, M, M)`."""
        features = regions.flatten(1)
        for linear in self.hidden:
            features = F.relu_(linear(features))
        return self.logits(features).unflatten(1, (self.channels, self.mask_size, self.mask_size))


def _select_channel(masks: Tensor, channels: Tensor) -> Tensor:
    """Return one channel of each region: `(N, L, M, M), (N,) -> (N, M, M)`."""
    return masks[torch.arange(channels.shape[0], device=channels.device), channels]
