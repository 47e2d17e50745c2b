"""From weights of this model to the state dict of another framework."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from maskrcnn.config import differences, to_dict
from maskrcnn.errors import InputError, first_of
from maskrcnn.interop.layouts import (
    DETECTRON2,
    DETECTRON2_C4,
    DETECTRON2_CONV,
    DETECTRON2_DC5,
    DETECTRON2_LSJ,
    TORCHVISION,
    Layout,
)
from maskrcnn.interop.names import to_theirs
from maskrcnn.interop.rows import scatter_rows
from maskrcnn.models.mask_rcnn import MaskRCNNConfig
from maskrcnn.structures import ClassTable

Target = Literal["torchvision", "detectron2"]

# Keys on which the detections of given weights depend, besides those that the weights themselves show.
NUMERIC = (
    "model.pixels",
    "model.backbone.stride_in_1x1",
    "model.backbone.norm_eps",
    "model.backbone.res5_dilation",
    "model.rpn.anchor_sizes",
    "model.rpn.anchor_ratios",
    "model.rpn.round_anchors",
    "model.rpn.bbox_reg_weights",
    "model.rpn.inference",
    "model.roi",
    "model.box_head.bbox_reg_weights",
    "model.mask_head.pool_size",
    "model.mask_head.paste",
    "model.detection",
)


def target_layout(to: Target, tensors: Mapping[str, Tensor]) -> Layout:
    """Return the layout in which a framework stores a model with these tensors (by our names)."""
    if to == "torchvision":
        return TORCHVISION
    if "region_stage.layer4.0.conv1.weight" in tensors:
        return DETECTRON2_C4
    if "neck.lateral.0.conv.weight" not in tensors:
        return DETECTRON2_DC5
    if "rpn.head.more_convs.0.weight" in tensors:
        return DETECTRON2_LSJ
    return DETECTRON2_CONV if "box_head.trunk.convs.0.weight" in tensors else DETECTRON2


def numeric_differences(ours: MaskRCNNConfig, theirs: MaskRCNNConfig) -> list[str]:
    """Return a line for each key with which the other framework's model would give other detections.

    Args:
        ours: the model of the weights.
        theirs: the one that follows from the exported weights, with the framework's conventions.
    """
    lines = differences({"model": to_dict(theirs)}, {"model": to_dict(ours)})
    return [line for line in lines if any(line.startswith((f"{key}.", f"{key}:")) for key in NUMERIC)]


def export(tensors: Mapping[str, Tensor], classes: ClassTable, layout: Layout, *, source: str) -> dict[str, Tensor]:
    """Return the state dict of another framework; `conversion.convert` gives the same tensors back.

    Rows that only the other framework has, such as boxes of background, are zero and never predicted.

    Args:
        tensors: state dict of this model.
        classes: its classes.
        layout: the other framework's.
        source: name of the file in messages.

    Raises:
        InputError: the other framework's model has no place for a tensor.
    """
    if layout.rows is None or "box_head.cls_score.weight" not in tensors:
        raise InputError(f"{source}: {layout.name} needs a detector; these weights have no heads")
    names = {name: to_theirs(name, layout.rules) for name in tensors}
    homeless = [name for name, new in names.items() if new is None]
    if homeless:
        raise InputError("\n  ".join([f"{source}: {layout.name} has no place for these tensors:", *first_of(homeless)]))
    scores = layout.rows.num_scores(classes)
    anchors = len(tensors["rpn.head.objectness_logits.weight"])
    exported = {}
    for name, tensor in tensors.items():
        count = layout.rows.count(name, scores=scores, anchors=anchors)
        if count is not None:
            rows = layout.rows.rows(name, scores=scores, anchors=anchors)
            if len(rows) != len(tensor):
                raise InputError(f"{source}: {name} has {len(tensor)} rows; {layout.name} has one of each class")
            tensor = scatter_rows(tensor, name, rows, count)
        exported[str(names[name])] = tensor.contiguous()
    return exported
