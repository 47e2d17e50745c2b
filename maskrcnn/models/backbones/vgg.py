"""VGG (arXiv 1409.1556), with torchvision's parameter names.

Shapes: B images, C channels, H x W cells. Stage k is the k-th group of convolutions, at stride 2^(k-1).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from pydantic import Field, NonNegativeFloat
from torch import Tensor, nn

from maskrcnn.models.backbones.parts import (
    Backbone,
    BackboneConfig,
    BackboneParts,
    CheckpointActivations,
    checkpointed,
    freeze_stages,
)
from maskrcnn.models.initialization import init_convolutions
from maskrcnn.models.necks.fpn import FPN, FPNConfig
from maskrcnn.models.norms import NormFactory, NormKind, build_norm
from maskrcnn.models.pretrained import load_pretrained

Depth = Literal[11, 13, 16, 19]

CONVOLUTIONS: dict[int, tuple[int, int, int, int, int]] = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
WIDTHS = (64, 128, 256, 512, 512)


class VGGConfig(BackboneConfig):
    """A VGG, with batch norm if `norm` is not "none".

    `output` selects the feature maps of the RPN and the heads. `conv5`: the last convolution, at stride 16, as in Fast
    R-CNN. `pool5`: after the last pooling, at stride 32. `fpn`: P2 to P6, on conv3, conv4, conv5 and pool5.
    """

    kind: Literal["vgg"] = "vgg"
    depth: Depth = 16
    output: Literal["conv5", "pool5", "fpn"] = "conv5"
    fpn: FPNConfig = FPNConfig()
    norm: NormKind = "none"
    norm_eps: NonNegativeFloat = 1e-5
    freeze: int = Field(2, ge=0, le=5)  # number of frozen stages, from the first on; 2 as in Fast R-CNN
    checkpoint_activations: CheckpointActivations = False  # per stage
    weights: str = "imagenet"  # "imagenet", "none", or the path of a torchvision-named state dict

    @property
    def levels(self) -> int:
        """Number of feature maps."""
        return 5 if self.output == "fpn" else 1

    @property
    def architecture(self) -> str:
        """torchvision's name for the classifier with this body."""
        return f"vgg{self.depth}" + ("" if self.norm == "none" else "_bn")

    def build(self) -> BackboneParts:
        """Return the backbone with random weights."""
        make_norm = None if self.norm == "none" else partial(build_norm, self.norm, eps=self.norm_eps)
        stages = {"conv5": (5,), "pool5": (6,), "fpn": (3, 4, 5, 6)}[self.output]
        body = VGG(
            depth=self.depth,
            make_norm=make_norm,
            outputs=stages,
            checkpoint_activations=self.checkpoint_activations,
        )
        freeze_stages(body, body.stages()[: self.freeze])
        backbone = FPN(body, channels=self.fpn.channels, norm=self.fpn.norm) if self.output == "fpn" else body
        return BackboneParts(backbone, body, None)

    def load_pretrained(self, parts: BackboneParts, trunk: nn.Module | None) -> None:
        """Load the weights of torchvision's classifier."""
        if self.weights != "none":
            load_pretrained([parts.body, parts.res5, trunk], self.weights, architecture=self.architecture)


class VGG(Backbone):
    """The convolutions of a VGG up to the last stage in `outputs`.

    Stage 5 is conv5_3 of VGG-16, at stride 16; stage 6 is pool5, at stride 32.

    Attributes:
        channels: channels of each output.
        strides: image pixels per cell of each output.
    """

    def __init__(
        self,
        *,
        depth: Depth,
        make_norm: NormFactory | None,
        outputs: Sequence[int],
        checkpoint_activations: bool = False,
    ) -> None:
        """Build stages 1 to `max(outputs)`, without norms if `make_norm` is None, as in the paper."""
        super().__init__()
        layers: list[nn.Module] = []
        ends = []  # index in `layers` at which each stage ends
        inputs = 3
        for stage, (count, width) in enumerate(zip(CONVOLUTIONS[depth], WIDTHS, strict=True), start=1):
            for _ in range(count if stage <= max(outputs) else 0):
                norm = [make_norm(width)] if make_norm else []
                layers += [nn.Conv2d(inputs, width, 3, padding=1), *norm, nn.ReLU(inplace=True)]
                inputs = width
            ends.append(len(layers))
            if stage < max(outputs):
                layers.append(nn.MaxPool2d(2))
        ends.append(len(layers))
        self.features = nn.Sequential(*layers)
        self.ends = tuple(ends)
        self.outputs = tuple(outputs)
        self.checkpoint_activations = checkpoint_activations
        self.channels = tuple(WIDTHS[min(stage, 5) - 1] for stage in outputs)
        self.strides = tuple(2 ** (stage - 1) for stage in outputs)
        init_convolutions(self)

    def stages(self) -> list[nn.Module]:
        """Return stages 1 to 5, first to last."""
        starts = (0, *self.ends[:-2])
        return [self.features[start:end] for start, end in zip(starts, self.ends[:-1], strict=True)]

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Map normalised pixels `(B, 3, H, W)` to one `(B, C, H / stride, W / stride)` per output."""
        feature_maps = []
        features = pixels
        start = 0
        for stage in range(1, max(self.outputs) + 1):
            end = self.ends[stage - 1]
            layers = self.features[start:end]
            features = checkpointed(layers, features) if self.checkpoint_activations else layers(features)
            start = end
            if stage in self.outputs:
                feature_maps.append(features)
        return tuple(feature_maps)
