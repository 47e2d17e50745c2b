"""The settings of the model that given tensors belong to, from their names (ours) and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

from maskrcnn.errors import InputError
from maskrcnn.models.backbones.resnet import BLOCKS, FEATURES
from maskrcnn.models.backbones.vgg import CONVOLUTIONS

Shapes = Mapping[str, tuple[int, ...]]  # of tensors, by our names

FINEST_ANCHOR = 32  # px; each size is twice the one before
SIZES = 5  # of the anchors


def model_settings(shapes: Shapes) -> dict[str, Any]:
    """Return the keys of `model` that follow from the tensors. Without heads, they are those of a feature pyramid.

    Raises:
        InputError: the backbone is neither a ResNet nor a VGG of a known depth.
    """
    if "backbone.features.0.weight" in shapes:
        return {
            "backbone": _vgg(shapes),
            "neck": {"kind": "none"},
            "rpn": {"anchor_sizes": [_sizes()]},
            "box_head": {"kind": "vgg_fc"},
        }
    has_heads = "box_head.cls_score.weight" in shapes
    pyramid = not has_heads or "neck.lateral.0.conv.weight" in shapes
    settings: dict[str, Any] = {
        "backbone": _resnet(shapes, pyramid=pyramid),
        "neck": _fpn(shapes) if pyramid else {"kind": "none"},
        "rpn": {"anchor_sizes": [[size] for size in _sizes()] if pyramid else [_sizes()]},
    }
    if not has_heads:
        return {**settings, "box_head": {"kind": "fc"}, "mask_head": {"kind": "fcn"}}
    settings["rpn"]["conv_depth"] = 1 + _count(shapes, "rpn.head.more_convs.{}.weight")
    return {**settings, "box_head": _box_head(shapes), "mask_head": _mask_head(shapes)}


def anchors_per_cell(shapes: Shapes) -> int:
    """Return A of the RPN; 0 without one."""
    return shapes.get("rpn.head.objectness_logits.weight", (0,))[0]


def _sizes() -> list[int]:
    return [FINEST_ANCHOR * 2**power for power in range(SIZES)]


def _resnet(shapes: Shapes, *, pyramid: bool) -> dict[str, Any]:
    on_regions = "region_stage.layer4.0.conv1.weight" in shapes
    stages = [f"{'region_stage' if on_regions and stage == 4 else 'backbone'}.layer{stage}" for stage in (1, 2, 3, 4)]
    blocks = tuple(_count(shapes, f"{stage}.{{}}.conv1.weight") for stage in stages)
    bottleneck = "backbone.layer1.0.conv3.weight" in shapes
    depths = [depth for depth, counts in BLOCKS.items() if counts == blocks and (depth >= 50) == bottleneck]
    if not depths:
        raise InputError(
            f"a backbone with {', '.join(map(str, blocks))} blocks in its stages is no ResNet of this project"
        )
    width, norm = shapes["backbone.conv1.weight"][0], _norm(shapes, "backbone.bn1")
    settings = {"kind": "resnet", "depth": depths[0], "width": width, "norm": norm, "weights": "none"}
    if bottleneck:
        outputs, group_width = shapes["backbone.layer1.0.conv2.weight"][:2]
        settings |= {"groups": outputs // group_width, "width_per_group": 64 * group_width // width}
    else:
        settings["stride_in_1x1"] = False  # basic blocks have no such convolution
    if norm == "bn":
        settings["freeze"] = 0  # a frozen stage has frozen norms, without the counter of the file
    if not pyramid:
        settings |= {"out_features": ["res4" if on_regions else "res5"]}
        settings |= {"res5_on_regions": True} if on_regions else {"res5_dilation": 2}
    return settings | ({"out_features": list(FEATURES)} if pyramid else {})


def _vgg(shapes: Shapes) -> dict[str, Any]:
    convolutions = sum(len(shape) == 4 for name, shape in shapes.items() if name.startswith("backbone.features."))
    depths = [depth for depth, counts in CONVOLUTIONS.items() if sum(counts) == convolutions]
    if not depths:
        raise InputError(f"a backbone with {convolutions} convolutions is no VGG of this project")
    settings = {"kind": "vgg", "depth": depths[0], "norm": _norm(shapes, "backbone.features.1"), "weights": "none"}
    return settings | {"out_features": ["conv5"]} | ({"freeze": 0} if settings["norm"] == "bn" else {})


def _fpn(shapes: Shapes) -> dict[str, Any]:
    if "neck.lateral.0.conv.weight" not in shapes:
        return {"kind": "fpn"}
    channels = shapes["neck.lateral.0.conv.weight"][0]
    return {"kind": "fpn", "channels": channels, "norm": _norm(shapes, "neck.lateral.0.norm")}


def _box_head(shapes: Shapes) -> dict[str, Any]:
    convs = _count(shapes, "box_head.trunk.convs.{}.weight")
    layers = "box_head.trunk.fc.{}.weight" if convs else "box_head.trunk.{}.weight"
    if layers.format(1) not in shapes:
        return {"kind": "mean"}
    width, inputs = shapes[layers.format(1)]
    channels = shapes["box_head.trunk.convs.0.weight" if convs else "rpn.head.conv.weight"][0]
    fc = {"pool_size": isqrt(inputs // channels), "width": width, "depth": _count(shapes, layers, start=1, step=2)}
    if not convs:
        return {"kind": "fc", **fc}
    norm = _norm(shapes, "box_head.trunk.norms.0")
    return {"kind": "conv_fc", "convs": convs, "conv_width": channels, "norm": norm, **fc}


def _mask_head(shapes: Shapes) -> dict[str, Any] | None:
    if "mask_head.logits.weight" not in shapes:
        return None
    depth, width = _count(shapes, "mask_head.convs.{}.weight"), shapes["mask_head.logits.weight"][1]
    return {"kind": "fcn", "depth": depth, "width": width, "norm": _norm(shapes, "mask_head.norms.0")}


def _norm(shapes: Shapes, prefix: str) -> str:
    """Return the kind of the norm layer with this prefix."""
    if f"{prefix}.weight" not in shapes:
        return "none"
    if f"{prefix}.running_mean" not in shapes:
        return "gn"
    return "bn" if f"{prefix}.num_batches_tracked" in shapes else "frozen_bn"


def _count(shapes: Shapes, template: str, *, start: int = 0, step: int = 1) -> int:
    """Return how many of the names `template.format(start)`, `template.format(start + step)`, ... exist in a row."""
    number = 0
    while template.format(start + step * number) in shapes:
        number += 1
    return number
