"""ResNet and ResNeXt (arXiv 1512.03385, 1611.05431), with torchvision's parameter names.

Shapes: B images, C channels, H x W cells. Stage k has stride 2^k. Its output is Ck in the papers, and `resk` in the
configuration, as in Detectron2; C1 is the stem.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, model_validator
from torch import Tensor, nn

from maskrcnn.config import Size
from maskrcnn.models.backbones.parts import (
    Backbone,
    BackboneConfig,
    CheckpointActivations,
    CheckpointedSequential,
    RegionStage,
    freeze_stages,
    require_features,
)
from maskrcnn.models.initialization import init_convolutions
from maskrcnn.models.norms import GROUPS, NormFactory, NormKind, build_norm, conv_norm
from maskrcnn.models.pretrained import load_pretrained

Depth = Literal[18, 34, 50, 101, 152]
Feature = Literal["res2", "res3", "res4", "res5"]

FEATURES: tuple[Feature, ...] = ("res2", "res3", "res4", "res5")

BLOCKS: dict[int, tuple[int, int, int, int]] = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


class ResNetConfig(BackboneConfig):
    """A ResNet or, with `groups` and `width_per_group`, a ResNeXt (50 and 101: 32x4d is 32 and 4).

    `out_features`: the stages whose feature maps the backbone returns. All four are for a feature pyramid.
    `res5_dilation`: 2 dilates stage 5, which then keeps the stride 16 (DC5).
    `res5_on_regions`: stage 5 runs on each pooled region instead of the image (C4), with `out_features: [res4]`.
    """

    kind: Literal["resnet"] = "resnet"
    depth: Depth = 50
    width: Size = 64  # channels of the stem and of C2's 3x3 convolutions; ImageNet weights have 64
    groups: Size = 1
    width_per_group: Size = 64
    out_features: tuple[Feature, ...] = FEATURES
    res5_dilation: Literal[1, 2] = 1
    res5_on_regions: bool = False
    norm: NormKind = "frozen_bn"
    norm_eps: NonNegativeFloat = 1e-5
    stride_in_1x1: bool = False
    freeze: int = Field(2, ge=0, le=5)  # number of frozen stages, from the first on; 2: the stem and C2
    checkpoint_activations: CheckpointActivations = False  # per block, also in stage 5 on regions
    weights: str = "imagenet"  # "imagenet", "none", or the path of a torchvision-named state dict

    @model_validator(mode="after")
    def _imagenet_has_one_width(self) -> ResNetConfig:
        if self.weights == "imagenet" and self.width != 64:
            raise ValueError(f"there are no ImageNet weights of width {self.width}: set weights to none or to a path")
        return self

    @model_validator(mode="after")
    def _groups_divide_the_channels(self) -> ResNetConfig:
        if self.norm == "gn" and self.width % GROUPS:
            raise ValueError(f"norm gn has {GROUPS} groups: width {self.width} must be a multiple of that")
        return self

    @model_validator(mode="after")
    def _basic_blocks_are_plain(self) -> ResNetConfig:
        if self.depth < 50 and (self.groups != 1 or self.width_per_group != 64 or self.stride_in_1x1):
            raise ValueError(f"depth {self.depth} has basic blocks: no groups, width_per_group or stride_in_1x1")
        return self

    @model_validator(mode="after")
    def _features_and_stage_5_fit(self) -> ResNetConfig:
        require_features(self.out_features, FEATURES)
        if self.res5_dilation != 1 and "res5" not in self.out_features:
            raise ValueError("res5_dilation needs res5 in out_features")
        if self.res5_on_regions and self.out_features != ("res4",):
            raise ValueError("res5_on_regions needs out_features: [res4], the map from which regions are pooled")
        return self

    @property
    def strides(self) -> tuple[int, ...]:
        """4, 8, 16 and 32 for C2 to C5, or 16 for a dilated C5."""
        return tuple(_stride(int(name[-1]), self.res5_dilation) for name in self.out_features)

    @property
    def region_stride(self) -> int:
        """2 if stage 5 runs on regions."""
        return Res5.stride if self.res5_on_regions else 1

    @property
    def architecture(self) -> str:
        """torchvision's name for the classifier with this body."""
        if self.groups == 1 and self.width_per_group == 64:
            return f"resnet{self.depth}"
        return f"resnext{self.depth}_{self.groups}x{self.width_per_group}d"

    def build(self) -> ResNet:
        """Return the backbone with random weights."""
        stages = [int(name[-1]) for name in self.out_features]
        backbone = ResNet(self._blocks(), out_stages=stages, res5_dilation=self.res5_dilation)
        freeze_stages(backbone, backbone.stages()[: self.freeze])
        return backbone

    def build_region_stage(self) -> Res5 | None:
        """Return stage 5 with random weights if it runs on regions."""
        return Res5(self._blocks()) if self.res5_on_regions else None

    def load_pretrained(self, backbone: Backbone, region_stage: RegionStage | None, trunk: nn.Module | None) -> None:
        """Load the weights of torchvision's classifier."""
        if self.weights != "none":
            load_pretrained([backbone, region_stage, trunk], self.weights, architecture=self.architecture)

    def _blocks(self) -> Blocks:
        return Blocks(
            depth=self.depth,
            make_norm=partial(build_norm, self.norm, eps=self.norm_eps),
            width=self.width,
            groups=self.groups,
            width_per_group=self.width_per_group,
            stride_in_1x1=self.stride_in_1x1,
            checkpoint_activations=self.checkpoint_activations,
        )


class Shortcut(nn.Sequential):
    """Projection shortcut: a 1x1 convolution and a norm that match the shape of a block's output."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, make_norm: NormFactory) -> None:
        super().__init__(nn.Conv2d(inputs, outputs, 1, stride, bias=False), make_norm(outputs))

    def forward(self, features: Tensor) -> Tensor:
        """`(B, C, H, W) -> (B, C', H / stride, W / stride)`."""
        conv, norm = self
        assert isinstance(conv, nn.Conv2d)
        return conv_norm(conv, norm, features)


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions (depths 18 and 34)."""

    expansion = 1

    def __init__(self, inputs: int, planes: int, *, stride: int, dilation: int, make_norm: NormFactory) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, dilation, dilation, bias=False)
        self.bn1 = make_norm(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, 1, dilation, dilation, bias=False)
        self.bn2 = make_norm(planes)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != planes:
            self.downsample = Shortcut(inputs, planes, stride=stride, make_norm=make_norm)

    def forward(self, features: Tensor) -> Tensor:
        """`(B, C, H, W) -> (B, C', H / stride, W / stride)`."""
        identity = features if self.downsample is None else self.downsample(features)
        out = F.relu_(conv_norm(self.conv1, self.bn1, features))
        return F.relu_(conv_norm(self.conv2, self.bn2, out).add_(identity))


class Bottleneck(nn.Module):
    """Residual block of 1x1, 3x3 and 1x1 convolutions (depths 50 and more).

    The stride is in the 3x3 convolution, as in torchvision, or with `stride_in_1x1` in the first 1x1 convolution, as in
    the original Caffe weights. It must match the pretrained weights: a mismatch raises no error but lowers AP.
    """

    expansion = 4

    def __init__(
        self,
        inputs: int,
        planes: int,
        *,
        stride: int,
        dilation: int,
        make_norm: NormFactory,
        groups: int = 1,
        width_per_group: int = 64,
        stride_in_1x1: bool = False,
    ) -> None:
        super().__init__()
        width, outputs = planes * width_per_group // 64 * groups, planes * self.expansion
        stride1, stride3 = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = nn.Conv2d(inputs, width, 1, stride1, bias=False)
        self.bn1 = make_norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride3, dilation, dilation, groups, bias=False)
        self.bn2 = make_norm(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = make_norm(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = Shortcut(inputs, outputs, stride=stride, make_norm=make_norm)

    def forward(self, features: Tensor) -> Tensor:
        """`(B, C, H, W) -> (B, C', H / stride, W / stride)`."""
        identity = features if self.downsample is None else self.downsample(features)
        out = F.relu_(conv_norm(self.conv1, self.bn1, features))
        out = F.relu_(conv_norm(self.conv2, self.bn2, out))
        return F.relu_(conv_norm(self.conv3, self.bn3, out).add_(identity))


class Blocks(NamedTuple):
    """What all stages of a ResNet share: the settings of their blocks."""

    depth: Depth
    make_norm: NormFactory
    width: int
    groups: int
    width_per_group: int
    stride_in_1x1: bool
    checkpoint_activations: bool

    def channels(self, stage: int) -> int:
        """Return the number of channels of `C{stage}`, for stages 2 to 5."""
        expansion = BasicBlock.expansion if self.depth < 50 else Bottleneck.expansion
        return self.width * 2 ** (stage - 2) * expansion

    def build_stage(self, stage: int, *, stride: int, dilation: int) -> nn.Sequential:
        """Return stage 2, 3, 4 or 5."""
        inputs = self.width if stage == 2 else self.channels(stage - 1)
        blocks = [self._block(stage, inputs, stride=stride, dilation=dilation)]
        for _ in range(BLOCKS[self.depth][stage - 2] - 1):
            blocks.append(self._block(stage, self.channels(stage), stride=1, dilation=dilation))
        return (CheckpointedSequential if self.checkpoint_activations else nn.Sequential)(*blocks)

    def _block(self, stage: int, inputs: int, *, stride: int, dilation: int) -> nn.Module:
        planes = self.width * 2 ** (stage - 2)
        if self.depth < 50:
            return BasicBlock(inputs, planes, stride=stride, dilation=dilation, make_norm=self.make_norm)
        return Bottleneck(
            inputs,
            planes,
            stride=stride,
            dilation=dilation,
            make_norm=self.make_norm,
            groups=self.groups,
            width_per_group=self.width_per_group,
            stride_in_1x1=self.stride_in_1x1,
        )


class ResNet(Backbone):
    """The stages of a ResNet up to the last one in `out_stages`.

    Attributes:
        channels: channels of each output.
        strides: image pixels per cell of each output.
    """

    def __init__(self, blocks: Blocks, *, out_stages: Sequence[int], res5_dilation: int = 1) -> None:
        """Build stages 1 to `max(out_stages)`. With a dilation of 2, C5 keeps C4's stride."""
        super().__init__()
        self.out_stages = tuple(out_stages)
        self.conv1 = nn.Conv2d(3, blocks.width, 7, 2, 3, bias=False)
        self.bn1 = blocks.make_norm(blocks.width)
        for stage in range(2, max(out_stages) + 1):
            dilation = res5_dilation if stage == 5 else 1
            stride = 1 if stage == 2 or dilation > 1 else 2
            setattr(self, f"layer{stage - 1}", blocks.build_stage(stage, stride=stride, dilation=dilation))
        self.channels = tuple(blocks.channels(stage) for stage in out_stages)
        self.strides = tuple(_stride(stage, res5_dilation) for stage in out_stages)
        init_convolutions(self)

    def stages(self) -> list[nn.Module]:
        """Return the stem and stages 2 to `max(out_stages)`, first to last."""
        layers = [module for name, module in self.named_children() if name.startswith("layer")]
        return [nn.ModuleList([self.conv1, self.bn1]), *layers]

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Map normalised pixels `(B, 3, H, W)` to one `(B, C, H / stride, W / stride)` per output."""
        features = F.relu_(conv_norm(self.conv1, self.bn1, pixels))
        features = F.max_pool2d(features, 3, 2, 1)
        feature_maps = []
        for stage in range(2, max(self.out_stages) + 1):
            features = getattr(self, f"layer{stage - 1}")(features)
            if stage in self.out_stages:
                feature_maps.append(features)
        return tuple(feature_maps)


class Res5(RegionStage):
    """Stage 5 on the pooled regions of a C4 model (He et al., 2016; Mask R-CNN, figure 4 left)."""

    stride = 2

    def __init__(self, blocks: Blocks) -> None:
        super().__init__()
        self.in_channels, self.channels = blocks.channels(4), blocks.channels(5)
        self.layer4 = blocks.build_stage(5, stride=self.stride, dilation=1)
        init_convolutions(self)

    def forward(self, regions: Tensor) -> Tensor:
        """`(N, C, S, S) -> (N, C', S / 2, S / 2)`."""
        return self.layer4(regions)


def _stride(stage: int, res5_dilation: int) -> int:
    return 2**stage // (res5_dilation if stage == 5 else 1)
