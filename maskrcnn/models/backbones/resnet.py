"""ResNet and ResNeXt (arXiv 1512.03385, 1611.05431), with torchvision's parameter names.

Shapes: B images, C channels, H x W cells. Stage k has stride 2^k and its output is called Ck; C1 is the stem.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch.nn.functional as F
from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator
from torch import Tensor, nn

from maskrcnn.models.backbones.parts import (
    Backbone,
    BackboneConfig,
    BackboneParts,
    CheckpointActivations,
    CheckpointedSequential,
    RegionStage,
    freeze_stages,
)
from maskrcnn.models.initialization import init_convolutions
from maskrcnn.models.necks.fpn import FPN, FPNConfig
from maskrcnn.models.norms import GROUPS, NormFactory, NormKind, build_norm, conv_norm
from maskrcnn.models.pretrained import load_pretrained

Depth = Literal[18, 34, 50, 101, 152]

BLOCKS: dict[int, tuple[int, int, int, int]] = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


class ResNetConfig(BackboneConfig):
    """A ResNet or, with `groups` and `width_per_group`, a ResNeXt (50 and 101: 32x4d is 32 and 4).

    `output` selects the feature maps of the RPN and the heads. `c4`: C4; stage 5 runs on each region. `c5`: C5 at
    stride 32. `dc5`: C5 with dilation 2, at stride 16. `fpn`: P2 to P6.
    """

    kind: Literal["resnet"] = "resnet"
    depth: Depth = 50
    width: PositiveInt = 64  # channels of the stem and of C2's 3x3 convolutions; ImageNet weights have 64
    groups: PositiveInt = 1
    width_per_group: PositiveInt = 64
    output: Literal["c4", "c5", "dc5", "fpn"] = "fpn"
    fpn: FPNConfig = FPNConfig()
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

    @property
    def levels(self) -> int:
        """Number of feature maps."""
        return 5 if self.output == "fpn" else 1

    @property
    def region_stride(self) -> int:
        """2 for C4: stage 5 halves the regions."""
        return 2 if self.output == "c4" else 1

    @property
    def architecture(self) -> str:
        """torchvision's name for the classifier with this body."""
        if self.groups == 1 and self.width_per_group == 64:
            return f"resnet{self.depth}"
        return f"resnext{self.depth}_{self.groups}x{self.width_per_group}d"

    def build(self) -> BackboneParts:
        """Return the backbone, and for C4 stage 5 as a separate module, with random weights."""
        shared: dict[str, Any] = {
            "depth": self.depth,
            "width": self.width,
            "make_norm": partial(build_norm, self.norm, eps=self.norm_eps),
            "groups": self.groups,
            "width_per_group": self.width_per_group,
            "stride_in_1x1": self.stride_in_1x1,
            "checkpoint_activations": self.checkpoint_activations,
        }
        stages = {"c4": (4,), "c5": (5,), "dc5": (5,), "fpn": (2, 3, 4, 5)}[self.output]
        body = ResNet(outputs=stages, dilate_c5=self.output == "dc5", **shared)
        freeze_stages(body, body.stages()[: self.freeze])
        backbone = FPN(body, channels=self.fpn.channels, norm=self.fpn.norm) if self.output == "fpn" else body
        return BackboneParts(backbone, body, Res5(**shared) if self.output == "c4" else None)

    def load_pretrained(self, parts: BackboneParts, trunk: nn.Module | None) -> None:
        """Load the weights of torchvision's classifier."""
        if self.weights != "none":
            load_pretrained([parts.body, parts.res5, trunk], self.weights, architecture=self.architecture)


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


class ResNet(Backbone):
    """The stages of a ResNet up to the last one in `outputs`.

    Attributes:
        channels: channels of each output.
        strides: image pixels per cell of each output.
    """

    def __init__(
        self,
        *,
        depth: Depth,
        make_norm: NormFactory,
        width: int = 64,
        outputs: Sequence[int],
        dilate_c5: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        stride_in_1x1: bool = False,
        checkpoint_activations: bool = False,
    ) -> None:
        """Build stages 1 to `max(outputs)`. With `dilate_c5`, C5 keeps C4's stride and has dilation 2."""
        super().__init__()
        block = _block(depth, make_norm, groups, width_per_group, stride_in_1x1)
        build_stage = partial(_stage, block, depth, width, checkpoint_activations)
        self.outputs = tuple(outputs)
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = make_norm(width)
        inputs = width
        for stage in range(2, max(outputs) + 1):
            dilated = dilate_c5 and stage == 5
            stride = 1 if stage == 2 or dilated else 2
            layer, inputs = build_stage(stage, inputs, stride=stride, dilation=2 if dilated else 1)
            setattr(self, f"layer{stage - 1}", layer)
        self.channels = tuple(stage_channels(depth, stage, width) for stage in outputs)
        self.strides = tuple(16 if dilate_c5 and stage == 5 else 2**stage for stage in outputs)
        init_convolutions(self)

    def stages(self) -> list[nn.Module]:
        """Return the stem and stages 2 to `max(outputs)`, first to last."""
        layers = [module for name, module in self.named_children() if name.startswith("layer")]
        return [nn.ModuleList([self.conv1, self.bn1]), *layers]

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Map normalised pixels `(B, 3, H, W)` to one `(B, C, H / stride, W / stride)` per output."""
        features = F.relu_(conv_norm(self.conv1, self.bn1, pixels))
        features = F.max_pool2d(features, 3, 2, 1)
        feature_maps = []
        for stage in range(2, max(self.outputs) + 1):
            features = getattr(self, f"layer{stage - 1}")(features)
            if stage in self.outputs:
                feature_maps.append(features)
        return tuple(feature_maps)


class Res5(RegionStage):
    """Stage 5 on the pooled regions of a C4 model (He et al., 2016; Mask R-CNN, figure 4 left).

    Attributes:
        channels: channels of the output.
        stride: factor by which the side of a region shrinks.
    """

    def __init__(
        self,
        *,
        depth: Depth,
        make_norm: NormFactory,
        width: int = 64,
        groups: int = 1,
        width_per_group: int = 64,
        stride_in_1x1: bool = False,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        block = _block(depth, make_norm, groups, width_per_group, stride_in_1x1)
        build_stage = partial(_stage, block, depth, width, checkpoint_activations)
        inputs = stage_channels(depth, 4, width)
        self.layer4, self.channels = build_stage(5, inputs, stride=2, dilation=1)
        self.stride = 2
        init_convolutions(self)

    def forward(self, regions: Tensor) -> Tensor:
        """`(N, C, S, S) -> (N, C', S / 2, S / 2)`."""
        return self.layer4(regions)


def stage_channels(depth: Depth, stage: int, width: int = 64) -> int:
    """Return the number of channels of `C{stage}`, for stages 2 to 5."""
    expansion = BasicBlock.expansion if depth < 50 else Bottleneck.expansion
    return width * 2 ** (stage - 2) * expansion


def _block(
    depth: Depth, make_norm: NormFactory, groups: int, width_per_group: int, stride_in_1x1: bool
) -> Callable[..., nn.Module]:
    if depth < 50:
        return partial(BasicBlock, make_norm=make_norm)
    return partial(
        Bottleneck,
        make_norm=make_norm,
        groups=groups,
        width_per_group=width_per_group,
        stride_in_1x1=stride_in_1x1,
    )


def _stage(
    block: Callable[..., nn.Module],
    depth: Depth,
    width: int,
    checkpoint_activations: bool,
    stage: int,
    inputs: int,
    *,
    stride: int,
    dilation: int,
) -> tuple[nn.Sequential, int]:
    planes, outputs = width * 2 ** (stage - 2), stage_channels(depth, stage, width)
    blocks = [block(inputs, planes, stride=stride, dilation=dilation)]
    blocks += [block(outputs, planes, stride=1, dilation=dilation) for _ in range(BLOCKS[depth][stage - 2] - 1)]
    return (CheckpointedSequential if checkpoint_activations else nn.Sequential)(*blocks), outputs
