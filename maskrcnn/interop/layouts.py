"""The files of other frameworks, as data: names, order of rows, conventions, and what was compared.

A layout belongs to a file if each template of `signature` is the name of one of its tensors. The first one that does is
taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from maskrcnn.interop.names import Rule
from maskrcnn.interop.rows import RowOrder

Conventions = Mapping[str, Any]  # keys of an experiment, nested

RGB = {"order": "rgb", "mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}
NORM_PARTS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Layout:
    """A kind of file.

    name: what the file is.
    signature: templates of names that tell it from other kinds.
    rules: the names, in both directions; the first rule that fits is taken, so that old names come last.
    rows: the order of rows of the predictors; None for a classifier.
    bases: recipes with the conventions of the framework.
    settings: keys of the experiment on top of them.
    if_grouped, if_counted: further keys if the backbone is a ResNeXt, and if its norms count batches, so that they are
        no frozen norms.
    ignored: templates of names of no use here, with the reason.
    assumptions: what the files do not say.
    if_frozen: one more, if the norms of the backbone are frozen.
    parity: what of the numbers was compared with the framework itself.
    """

    name: str
    signature: tuple[str, ...]
    rules: tuple[Rule, ...]
    parity: str
    rows: RowOrder | None = None
    bases: tuple[str, ...] = ()
    settings: Conventions = field(default_factory=dict)
    if_grouped: Conventions = field(default_factory=dict)
    if_counted: Conventions = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    assumptions: tuple[str, ...] = ()
    if_frozen: tuple[str, ...] = ()


# ---- torchvision

_TORCHVISION_RULES = (
    Rule("backbone.{any}", "backbone.body.{any}"),
    Rule("neck.lateral.{i}.conv.{p}", "backbone.fpn.inner_blocks.{i}.0.{p}"),
    Rule("neck.lateral.{i}.norm.{norm}", "backbone.fpn.inner_blocks.{i}.1.{norm}"),
    Rule("neck.output.{i}.conv.{p}", "backbone.fpn.layer_blocks.{i}.0.{p}"),
    Rule("neck.output.{i}.norm.{norm}", "backbone.fpn.layer_blocks.{i}.1.{norm}"),
    Rule("rpn.head.conv.{p}", "rpn.head.conv.0.0.{p}"),
    Rule("rpn.head.more_convs.{i}.{p}", "rpn.head.conv.{i+1}.0.{p}"),
    Rule("rpn.head.objectness_logits.{p}", "rpn.head.cls_logits.{p}"),
    Rule("rpn.head.anchor_deltas.{p}", "rpn.head.bbox_pred.{p}"),
    Rule("box_head.trunk.1.{p}", "roi_heads.box_head.fc6.{p}"),
    Rule("box_head.trunk.3.{p}", "roi_heads.box_head.fc7.{p}"),
    Rule("box_head.trunk.convs.{i}.{p}", "roi_heads.box_head.{i}.0.{p}"),
    Rule("box_head.trunk.norms.{i}.{norm}", "roi_heads.box_head.{i}.1.{norm}"),
    Rule("box_head.trunk.fc.1.{p}", "roi_heads.box_head.5.{p}"),  # after four convolutions
    Rule("box_head.cls_score.{p}", "roi_heads.box_predictor.cls_score.{p}"),
    Rule("box_head.bbox_pred.{p}", "roi_heads.box_predictor.bbox_pred.{p}"),
    Rule("mask_head.convs.{i}.{p}", "roi_heads.mask_head.{i}.0.{p}"),
    Rule("mask_head.norms.{i}.{norm}", "roi_heads.mask_head.{i}.1.{norm}"),
    Rule("mask_head.upsample.{p}", "roi_heads.mask_predictor.conv5_mask.{p}"),
    Rule("mask_head.logits.{p}", "roi_heads.mask_predictor.mask_fcn_logits.{p}"),
    # The names before version 2 of these modules, which the published file of the first model has.
    Rule("neck.lateral.{i}.conv.{p}", "backbone.fpn.inner_blocks.{i}.{p}"),
    Rule("neck.output.{i}.conv.{p}", "backbone.fpn.layer_blocks.{i}.{p}"),
    Rule("rpn.head.conv.{p}", "rpn.head.conv.{p}"),
    Rule("mask_head.convs.{i}.{p}", "roi_heads.mask_head.mask_fcn{i+1}.{p}"),
)

TORCHVISION = Layout(
    name="torchvision Mask R-CNN",
    signature=("backbone.body.conv1.weight", "rpn.head.cls_logits.weight", "roi_heads.box_predictor.cls_score.weight"),
    rules=_TORCHVISION_RULES,
    rows=RowOrder(background="first", coco_ids=True, anchors_by="ratio"),
    bases=("base/conventions/torchvision",),
    # Frozen norms have no epsilon in the published models, and those that count batches have the usual one.
    if_counted={"model": {"backbone": {"norm_eps": 1e-5}}},
    if_frozen=(
        "frozen norms have no epsilon, as in the published weights; for a model that was trained from ImageNet weights "
        "alone: --set model.backbone.norm_eps=1e-5",
    ),
    parity="losses and detections equal torchvision's to 1e-4 (tests/models/test_torchvision_parity.py)",
)

# Files of old names are older than models with unfrozen norms.
TORCHVISION_OLD = replace(
    TORCHVISION,
    name="torchvision Mask R-CNN (old names)",
    signature=(*TORCHVISION.signature, "rpn.head.conv.weight"),
    ignored={"{any}.num_batches_tracked": "frozen norms do not count batches"},
)

# ---- The list, in the order in which signatures are tried

LAYOUTS = (TORCHVISION_OLD, TORCHVISION)
