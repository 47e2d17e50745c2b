"""VGG (arXiv 1409.1556), with torchvision's parameter names.

Shapes: B images, C channels, H x W cells. Stage k is the k-th group of convolutions, at stride 2^(k-1).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from pydantic import Field, NonNegativeFloat, model_validator
from torch import Tensor, nn

from maskrcnn.models.backbones.parts import (
    Backbone,
    BackboneConfig,
    CheckpointActivations,
    RegionStage,
    checkpointed,
    freeze_stages,
    require_features,
)
from maskrcnn.models.initialization import init_convolutions
from maskrcnn.models.norms import NormFactory, NormKind, build_norm
from maskrcnn.models.pretrained import load_pretrained

Depth = Literal[11, 13, 16, 19]
Feature = Literal["conv3", "conv4", "conv5", "pool5"]

STAGES: dict[Feature, int] = {"conv3": 3, "conv4": 4, "conv5": 5, "pool5": 6}

CONVOLUTIONS: dict[int, tuple[int, int, int, int, int]] = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
WIDTHS = (64, 128, 256, 512, 512)


class VGGConfig(BackboneConfig):
    """A VGG, with batch norm if `norm` is not "none".

    `out_features`: the feature maps that the backbone returns. `conv3`, `conv4`, `conv5`: after the last convolution of
    that stage, at stride 4, 8, 16; Fast R-CNN uses conv5. `pool5`: after the last pooling, at stride 32. All four are
    for a feature pyramid.
    """

    kind: Literal["vgg"] = "vgg"
    depth: Depth = 16
    out_features: tuple[Feature, ...] = tuple(STAGES)
    norm: NormKind = "none"
    norm_eps: NonNegativeFloat = 1e-5
    freeze: int = Field(2, ge=0, le=5)  # number of frozen stages, from the first on; 2 as in Fast R-CNN
    checkpoint_activations: CheckpointActivations = False  # per stage
    weights: str = "imagenet"  # "imagenet", "none", or the path of a torchvision-named state dict

    @model_validator(mode="after")
    def _features_are_in_order(self) -> VGGConfig:
        require_features(self.out_features, tuple(STAGES))
        return self

    @property
    def strides(self) -> tuple[int, ...]:
        """4, 8, 16 and 32 for conv3 to pool5."""
        return tuple(_stride(STAGES[name]) for name in self.out_features)

    @property
    def architecture(self) -> str:
        """torchvision's name for the classifier with this body."""
        return f"vgg{self.depth}" + ("" if self.norm == "none" else "_bn")

    def build(self) -> VGG:
        """Return the backbone with random weights."""
        make_norm = None if self.norm == "none" else partial(build_norm, self.norm, eps=self.norm_eps)
        backbone = VGG(
            depth=self.depth,
            make_norm=make_norm,
            out_stages=[STAGES[name] for name in self.out_features],
            checkpoint_activations=self.checkpoint_activations,
        )
        freeze_stages(backbone, backbone.stages()[: self.freeze])
        return backbone

    def load_pretrained(self, backbone: Backbone, region_stage: RegionStage | None, trunk: nn.Module | None) -> None:
        """Load the weights of torchvision's classifier."""
        if self.weights != "none":
            load_pretrained([backbone, trunk], self.weights, architecture=self.architecture)


class VGG(Backbone):
    """The convolutions of a VGG up to the last stage in `out_stages`.

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
        out_stages: Sequence[int],
        checkpoint_activations: bool = False,
    ) -> None:
        """Build stages 1 to `max(out_stages)`, without norms if `make_norm` is None, as in the paper."""
        super().__init__()
        layers: list[nn.Module] = []
        ends = []  # index in `layers` at which each stage ends
        inputs = 3
        for stage, (count, width) in enumerate(zip(CONVOLUTIONS[depth], WIDTHS, strict=True), start=1):
            for _ in range(count if stage <= max(out_stages) else 0):
                norm = [make_norm(width)] if make_norm else []
                layers += [nn.Conv2d(inputs, width, 3, padding=1), *norm, nn.ReLU(inplace=True)]
                inputs = width
            ends.append(len(layers))
            if stage < max(out_stages):
                layers.append(nn.MaxPool2d(2))
        ends.append(len(layers))
        self.features = nn.Sequential(*layers)
        self.ends = tuple(ends)
        self.out_stages = tuple(out_stages)
        self.checkpoint_activations = checkpoint_activations
        self.channels = tuple(WIDTHS[min(stage, 5) - 1] for stage in out_stages)
        self.strides = tuple(_stride(stage) for stage in out_stages)
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
        for stage in range(1, max(self.out_stages) + 1):
            end = self.ends[stage - 1]
            layers = self.features[start:end]
            features = checkpointed(layers, features) if self.checkpoint_activations else layers(features)
            start = end
            if stage in self.out_stages:
                feature_maps.append(features)
        return tuple(feature_maps)


def _stride(stage: int) -> int:
    return 2 ** (stage - 1)
