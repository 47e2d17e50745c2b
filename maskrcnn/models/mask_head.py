"""Mask head: for each cell of a region, whether it belongs to the object. Two branches, two ways to read them.

With `output: sigmoid`, classes do not compete for a cell: there is a binary mask for every class, of which only the
region's own is used. The box head decides the class (Mask R-CNN, arXiv 1703.06870, section 3). With `output: softmax`,
each cell chooses between the classes and background, as in semantic segmentation (table 2b).

Shapes: N regions, C channels, S cells along a region's side, M mask side, K classes, L channels of logits, B images.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from maskrcnn.config import Section
from maskrcnn.models.initialization import Initialization, init_linear, init_mask_convolutions, init_mask_logits
from maskrcnn.models.losses import Normalizer, sample_mean
from maskrcnn.ops.roi import RoIConfig
from maskrcnn.structures import ClassRows

MaskOutput = Literal["sigmoid", "softmax"]
MaskTarget = Literal["coverage", "torchvision"]


class _MaskHeadConfig(Section):
    """What all mask heads have.

    `roi` is a RoI layer of its own, else the model's serves. `output` and `class_agnostic` say what there is to choose
    from: a mask for each class or one for all, and with `softmax` background beside them. `target` is what a cell
    should say: `coverage`, whether the object's mask covers at least half of it, exactly; or `torchvision`, that
    library's soft samples. `paste` is how a mask gets onto the image: `exact`, or `torchvision`, which rounds the box
    to whole pixels. `initialization` is how the layers start (`maskrcnn.models.initialization`).
    """

    pool_size: PositiveInt = 14
    roi: RoIConfig | None = None
    output: MaskOutput = "sigmoid"
    class_agnostic: bool = False
    target: MaskTarget = "coverage"
    paste: Literal["exact", "torchvision"] = "exact"
    initialization: Initialization = "fan_in"


class FCNMaskHeadConfig(_MaskHeadConfig):
    """A fully convolutional head: `depth` 3x3 convolutions, and a deconvolution that doubles the side."""

    kind: Literal["fcn"] = "fcn"
    depth: NonNegativeInt = 4
    width: PositiveInt = 256

    def build(self, *, channels: int, side: int, num_classes: int, normalizer: Normalizer) -> FCNMaskHead:
        """The head for regions `(N, channels, side, side)`."""
        return FCNMaskHead(
            channels=channels,
            side=side,
            depth=self.depth,
            width=self.width,
            num_classes=num_classes,
            output=self.output,
            class_agnostic=self.class_agnostic,
            normalizer=normalizer,
            initialization=self.initialization,
        )


class MLPMaskHeadConfig(_MaskHeadConfig):
    """`depth` hidden fully connected layers, then all cells of the masks at once (Mask R-CNN, table 2e)."""

    kind: Literal["mlp"] = "mlp"
    depth: PositiveInt = 2
    width: PositiveInt = 1024
    mask_size: PositiveInt = 28

    def build(self, *, channels: int, side: int, num_classes: int, normalizer: Normalizer) -> MLPMaskHead:
        """The head for regions `(N, channels, side, side)`."""
        return MLPMaskHead(
            inputs=channels * side * side,
            depth=self.depth,
            width=self.width,
            mask_size=self.mask_size,
            num_classes=num_classes,
            output=self.output,
            class_agnostic=self.class_agnostic,
            normalizer=normalizer,
            initialization=self.initialization,
        )


MaskHeadConfig = Annotated[FCNMaskHeadConfig | MLPMaskHeadConfig, Field(discriminator="kind")]


class MaskOutputs(NamedTuple):
    """What the mask head says of the cells of N regions: log probabilities, float32."""

    inside: Tensor  # (N, M, M): the cell belongs to the object of the region's class
    outside: Tensor  # (N, M, M): it is background


class MaskHead(nn.Module, ABC):
    """What mask heads share: which channel of the logits is whose, the probabilities, and the loss.

    L = K, or 1 if the head is class-agnostic; with softmax one more, background, which comes first.
    """

    logits: nn.Conv2d | nn.Linear  # the last layer; the rows of its parameters are in the order of the channels

    def __init__(
        self, *, mask_size: int, num_classes: int, output: MaskOutput, class_agnostic: bool, normalizer: Normalizer
    ) -> None:
        super().__init__()
        self.mask_size = mask_size  # M
        self.output: MaskOutput = output
        self.class_agnostic = class_agnostic
        self.normalizer: Normalizer = normalizer
        self.channels = (1 if class_agnostic else num_classes) + (output == "softmax")  # L

    @abstractmethod
    def all_masks(self, regions: Tensor) -> Tensor:
        """The logits of all channels: `(N, C, S, S) -> (N, L, M, M)`."""

    def own_masks(self, regions: Tensor, channels: Tensor) -> Tensor:
        """The logits of one channel of each region: `(N, C, S, S)` and `(N,)`, 0..L-1, to `(N, M, M)`."""
        return _choose(self.all_masks(regions), channels)

    def forward(self, regions: Tensor, labels: Tensor) -> MaskOutputs:
        """The masks of the regions' own classes.

        Args:
            regions: `(N, C, S, S)`.
            labels: `(N,)` int64, 1..K.
        """
        classes = torch.ones_like(labels) if self.class_agnostic else labels
        if self.output == "sigmoid":
            own = self.own_masks(regions, classes - 1).float()
            return MaskOutputs(F.logsigmoid(own), F.logsigmoid(-own))
        logs = self.all_masks(regions).float().log_softmax(dim=1)
        return MaskOutputs(_choose(logs, classes), logs[:, 0])

    def probabilities(self, regions: Tensor, labels: Tensor) -> Tensor:
        """The probability that a cell belongs to the object, `(N, M, M)` float32; arguments as for a call."""
        return self(regions, labels).inside.exp()

    def loss(self, outputs: MaskOutputs, wanted: Tensor, *, images: Tensor, batch: int) -> Tensor:
        """Cross entropy, mean over the cells of a mask and over the positives; 0 without any.

        With sigmoid it is binary; with softmax a cell should be of the region's class, or background.

        Args:
            outputs: for N regions.
            wanted: `(N, M, M)` in 0..1.
            images: `(N,)` image of each region.
            batch: number of images, B.
        """
        values = -(wanted * outputs.inside + (1 - wanted) * outputs.outside).mean(dim=(1, 2))
        counts = values.new_zeros(batch).index_add(0, images, torch.ones_like(values))
        return sample_mean(values, images, counts, per=self.normalizer)

    def class_rows(self) -> dict[str, ClassRows]:
        """The parameters whose rows belong to classes: see `training.checkpoint.load_weights`."""
        if self.class_agnostic:
            return {}
        rows = ClassRows(per_class=len(self.logits.weight) // self.channels, background=self.output == "softmax")
        return {"logits.weight": rows, "logits.bias": rows}


class FCNMaskHead(MaskHead):
    """Convolutions that keep the layout of the region: each cell of the mask looks at its own place. M = 2 S."""

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
        normalizer: Normalizer,
        initialization: Initialization = "fan_in",
    ) -> None:
        super().__init__(
            mask_size=2 * side,
            num_classes=num_classes,
            output=output,
            class_agnostic=class_agnostic,
            normalizer=normalizer,
        )
        convs = [nn.Conv2d(channels if index == 0 else width, width, 3, padding=1) for index in range(depth)]
        self.convs = nn.ModuleList(convs)
        self.upsample = nn.ConvTranspose2d(width if depth else channels, width, 2, 2)
        self.logits: nn.Conv2d = nn.Conv2d(width, self.channels, 1)
        init_mask_convolutions(convs, self.upsample, self.logits, how=initialization)

    def features(self, regions: Tensor) -> Tensor:
        """Regions `(N, C, S, S)` to what the masks are read from, `(N, width, M, M)`."""
        for conv in self.convs:
            regions = F.relu_(conv(regions))
        return F.relu_(self.upsample(regions))

    def all_masks(self, regions: Tensor) -> Tensor:
        """The logits of all channels: `(N, C, S, S) -> (N, L, M, M)`."""
        return self.logits(self.features(regions))

    def own_masks(self, regions: Tensor, channels: Tensor) -> Tensor:
        """The logits of one channel of each region, `(N, M, M)`, without computing the L - 1 others."""
        features = self.features(regions).permute(0, 2, 3, 1)  # (N, M, M, width): the layout that it has in memory
        # A 1x1 convolution is a dot product over channels: (N, M * M, width) x (N, width, 1).
        kernels = self.logits.weight.flatten(1)[channels][..., None]
        assert self.logits.bias is not None
        own = torch.bmm(features.flatten(1, 2), kernels) + self.logits.bias[channels][:, None, None]
        return own.view(features.shape[:3])


class MLPMaskHead(MaskHead):
    """Fully connected layers: every cell of the mask looks at the whole region.

    It always computes all L masks. A gather of the own channel's weights would hold M * M * width numbers a region,
    which is more than the L masks for any L below `width`.
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
        normalizer: Normalizer,
        initialization: Initialization = "fan_in",
    ) -> None:
        """Build the layers for regions of `inputs` = C * S * S numbers."""
        super().__init__(
            mask_size=mask_size,
            num_classes=num_classes,
            output=output,
            class_agnostic=class_agnostic,
            normalizer=normalizer,
        )
        hidden = [nn.Linear(inputs if index == 0 else width, width) for index in range(depth)]
        self.hidden = nn.ModuleList(hidden)
        self.logits: nn.Linear = nn.Linear(width, self.channels * mask_size**2)
        for layer in hidden:
            init_linear(layer, how=initialization)
        init_mask_logits(self.logits, how=initialization)

    def all_masks(self, regions: Tensor) -> Tensor:
        """The logits of all channels: `(N, C, S, S) -> (N, L, M, M)`."""
        features = regions.flatten(1)
        for linear in self.hidden:
            features = F.relu_(linear(features))
        return self.logits(features).unflatten(1, (self.channels, self.mask_size, self.mask_size))


def _choose(masks: Tensor, channels: Tensor) -> Tensor:
    """One channel of each region: `(N, L, M, M)` and `(N,)` to `(N, M, M)`."""
    return masks[torch.arange(len(channels), device=channels.device), channels]
