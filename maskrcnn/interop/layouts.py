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
BGR_STD = [57.375, 57.12, 58.395]
UNMEASURED = "keys and shapes tested, numbers not compared with the framework"
SINGLE_LEVEL_PROPOSALS = {
    "training": {"pre_nms_top_n": 12000, "post_nms_top_n": 2000},
    "inference": {"pre_nms_top_n": 6000, "post_nms_top_n": 1000},
}
COUNTER = "{any}.num_batches_tracked"
NO_COUNTER = "frozen norms do not count batches"


@dataclass(frozen=True)
class Layout:
    """A kind of file.

    name: what the file is.
    signature: templates of names that tell it from other kinds.
    rules: the names, in both directions; the first rule that fits is taken, so that old names come last.
    rows: the order of rows of the predictors; None for a classifier.
    bases: recipes with the conventions of the framework.
    settings: keys of the experiment on top of them.
    cases: further keys if the norm of the backbone is `frozen_bn`, `bn` (its norms count batches) or `gn`, or if the
        backbone is `grouped`, a ResNeXt.
    ignored: templates of names of no use here, with the reason.
    assumptions: what the files do not say.
    if_frozen: one more, if the norms of the backbone are frozen.
    affine_norms: whether frozen norms may be stored as a scale and a shift alone.
    refused: why such files cannot be converted; empty if they can.
    parity: what of the numbers was compared with the framework itself.
    """

    name: str
    signature: tuple[str, ...]
    rules: tuple[Rule, ...]
    parity: str
    rows: RowOrder | None = None
    bases: tuple[str, ...] = ()
    settings: Conventions = field(default_factory=dict)
    cases: Mapping[str, Conventions] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    assumptions: tuple[str, ...] = ()
    if_frozen: tuple[str, ...] = ()
    affine_norms: bool = False
    refused: str = ""


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
    cases={"bn": {"model": {"backbone": {"norm_eps": 1e-5}}}},
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
    ignored={COUNTER: NO_COUNTER},
)

# ---- Detectron2


def _detectron2_stages(prefix: str) -> tuple[Rule, ...]:
    stage = f"{prefix}res{{i+1}}.{{j}}"
    return (
        Rule("backbone.conv1.weight", f"{prefix}stem.conv1.weight"),
        Rule("backbone.bn1.{norm}", f"{prefix}stem.conv1.norm.{{norm}}"),
        Rule("backbone.layer{i}.{j}.conv{k}.weight", f"{stage}.conv{{k}}.weight"),
        Rule("backbone.layer{i}.{j}.bn{k}.{norm}", f"{stage}.conv{{k}}.norm.{{norm}}"),
        Rule("backbone.layer{i}.{j}.downsample.0.weight", f"{stage}.shortcut.weight"),
        Rule("backbone.layer{i}.{j}.downsample.1.{norm}", f"{stage}.shortcut.norm.{{norm}}"),
    )


_DETECTRON2_HEADS = (
    Rule("rpn.head.conv.{p}", "proposal_generator.rpn_head.conv.{p}"),
    Rule("rpn.head.objectness_logits.{p}", "proposal_generator.rpn_head.objectness_logits.{p}"),
    Rule("rpn.head.anchor_deltas.{p}", "proposal_generator.rpn_head.anchor_deltas.{p}"),
    Rule("box_head.cls_score.{p}", "roi_heads.box_predictor.cls_score.{p}"),
    Rule("box_head.bbox_pred.{p}", "roi_heads.box_predictor.bbox_pred.{p}"),
    Rule("mask_head.convs.{i}.{p}", "roi_heads.mask_head.mask_fcn{i+1}.{p}"),
    Rule("mask_head.norms.{i}.{norm}", "roi_heads.mask_head.mask_fcn{i+1}.norm.{norm}"),
    Rule("mask_head.upsample.{p}", "roi_heads.mask_head.deconv.{p}"),
    Rule("mask_head.logits.{p}", "roi_heads.mask_head.predictor.{p}"),
)
_DETECTRON2_PYRAMID = (
    *_detectron2_stages("backbone.bottom_up."),
    Rule("neck.lateral.{i}.conv.{p}", "backbone.fpn_lateral{i+2}.{p}"),
    Rule("neck.lateral.{i}.norm.{norm}", "backbone.fpn_lateral{i+2}.norm.{norm}"),
    Rule("neck.output.{i}.conv.{p}", "backbone.fpn_output{i+2}.{p}"),
    Rule("neck.output.{i}.norm.{norm}", "backbone.fpn_output{i+2}.norm.{norm}"),
    *_DETECTRON2_HEADS,
)
_DETECTRON2_FCS = (
    Rule("box_head.trunk.1.{p}", "roi_heads.box_head.fc1.{p}"),
    Rule("box_head.trunk.3.{p}", "roi_heads.box_head.fc2.{p}"),
)
_RES5 = "roi_heads.res5.{j}"

DETECTRON2 = Layout(
    name="Detectron2 FPN",
    signature=("backbone.bottom_up.stem.conv1.weight", "proposal_generator.rpn_head.objectness_logits.weight"),
    rules=(*_DETECTRON2_PYRAMID, *_DETECTRON2_FCS),
    rows=RowOrder(background="last"),
    bases=("base/conventions/detectron2",),
    cases={"grouped": {"model": {"pixels": {"std": BGR_STD}, "backbone": {"stride_in_1x1": False}}}},
    ignored={
        "pixel_mean": "a key of the configuration",
        "pixel_std": "a key of the configuration",
        "proposal_generator.anchor_generator.cell_anchors.{i}": "anchors follow from the configuration",
    },
    assumptions=(
        "pixels and stride_in_1x1 are those of the model zoo, where the file has no pixel_mean and pixel_std",
    ),
    parity=UNMEASURED,
)
_DETECTRON2_CONV_FCS = (
    Rule("box_head.trunk.convs.{i}.{p}", "roi_heads.box_head.conv{i+1}.{p}"),
    Rule("box_head.trunk.norms.{i}.{norm}", "roi_heads.box_head.conv{i+1}.norm.{norm}"),
    Rule("box_head.trunk.fc.1.{p}", "roi_heads.box_head.fc1.{p}"),
)
# Group norm: a box head with convolutions.
DETECTRON2_CONV = replace(
    DETECTRON2,
    name="Detectron2 FPN with convolutions in the box head",
    signature=(*DETECTRON2.signature, "roi_heads.box_head.conv1.weight"),
    rules=(*_DETECTRON2_PYRAMID, *_DETECTRON2_CONV_FCS),
    cases={**DETECTRON2.cases, "gn": {"model": {"backbone": {"stride_in_1x1": False}}}},
)
# The baselines with large-scale jitter: norms that count batches, and two convolutions of the RPN.
DETECTRON2_LSJ = replace(
    DETECTRON2_CONV,
    name="Detectron2 FPN of the baselines with large-scale jitter",
    signature=(*DETECTRON2_CONV.signature, "proposal_generator.rpn_head.conv.conv0.weight"),
    rules=(
        Rule("rpn.head.conv.{p}", "proposal_generator.rpn_head.conv.conv0.{p}"),
        Rule("rpn.head.more_convs.{i}.{p}", "proposal_generator.rpn_head.conv.conv{i+1}.{p}"),
        *_DETECTRON2_PYRAMID,
        *_DETECTRON2_CONV_FCS,
    ),
    settings={"data": {"validation_transforms": {"resize": {"short_side": [1024], "long_side": 1024}}}},
)
DETECTRON2_C4 = replace(
    DETECTRON2,
    name="Detectron2 C4",
    signature=("backbone.stem.conv1.weight", "roi_heads.res5.0.conv1.weight"),
    rules=(
        *_detectron2_stages("backbone."),
        *_DETECTRON2_HEADS,
        Rule("region_stage.layer4.{j}.conv{k}.weight", f"{_RES5}.conv{{k}}.weight"),
        Rule("region_stage.layer4.{j}.bn{k}.{norm}", f"{_RES5}.conv{{k}}.norm.{{norm}}"),
        Rule("region_stage.layer4.{j}.downsample.0.weight", f"{_RES5}.shortcut.weight"),
        Rule("region_stage.layer4.{j}.downsample.1.{norm}", f"{_RES5}.shortcut.norm.{{norm}}"),
    ),
    settings={"model": {"rpn": SINGLE_LEVEL_PROPOSALS}},
)
DETECTRON2_DC5 = replace(
    DETECTRON2,
    name="Detectron2 DC5",
    signature=("backbone.stem.conv1.weight", "roi_heads.box_head.fc1.weight"),
    rules=(*_detectron2_stages("backbone."), *_DETECTRON2_HEADS, *_DETECTRON2_FCS),
    settings={"model": {"rpn": SINGLE_LEVEL_PROPOSALS}},
)

# ---- MMDetection

_MMDETECTION_RULES = (
    Rule("backbone.{any}", "backbone.{any}"),
    Rule("region_stage.layer4.{any}", "roi_head.shared_head.layer4.{any}"),
    Rule("neck.lateral.{i}.conv.{p}", "neck.lateral_convs.{i}.conv.{p}"),
    Rule("neck.lateral.{i}.norm.{norm}", "neck.lateral_convs.{i}.bn.{norm}"),
    Rule("neck.output.{i}.conv.{p}", "neck.fpn_convs.{i}.conv.{p}"),
    Rule("neck.output.{i}.norm.{norm}", "neck.fpn_convs.{i}.bn.{norm}"),
    Rule("rpn.head.conv.{p}", "rpn_head.rpn_conv.{p}"),
    Rule("rpn.head.objectness_logits.{p}", "rpn_head.rpn_cls.{p}"),
    Rule("rpn.head.anchor_deltas.{p}", "rpn_head.rpn_reg.{p}"),
    Rule("box_head.trunk.1.{p}", "roi_head.bbox_head.shared_fcs.0.{p}"),
    Rule("box_head.trunk.3.{p}", "roi_head.bbox_head.shared_fcs.1.{p}"),
    Rule("box_head.cls_score.{p}", "roi_head.bbox_head.fc_cls.{p}"),
    Rule("box_head.bbox_pred.{p}", "roi_head.bbox_head.fc_reg.{p}"),
    Rule("mask_head.convs.{i}.{p}", "roi_head.mask_head.convs.{i}.conv.{p}"),
    Rule("mask_head.norms.{i}.{norm}", "roi_head.mask_head.convs.{i}.bn.{norm}"),
    Rule("mask_head.upsample.{p}", "roi_head.mask_head.upsample.{p}"),
    Rule("mask_head.logits.{p}", "roi_head.mask_head.conv_logits.{p}"),
)

MMDETECTION = Layout(
    name="MMDetection 2.x or 3.x",
    signature=("rpn_head.rpn_cls.weight", "roi_head.bbox_head.fc_cls.weight"),
    rules=_MMDETECTION_RULES,
    rows=RowOrder(background="last", anchors_by="ratio"),
    bases=("base/conventions/detectron2",),
    settings={
        "model": {"pixels": RGB, "backbone": {"stride_in_1x1": False}},
        "data": {"validation_transforms": {"resize": {"antialias": False}}},
    },
    ignored={"backbone." + COUNTER: NO_COUNTER},
    assumptions=("the backbone has MMDetection's style 'pytorch', unless the configuration in the file says 'caffe'",),
    parity=UNMEASURED,
)
MMDETECTION_1 = Layout(
    name="MMDetection 1.x",
    signature=("rpn_head.rpn_cls.weight", "bbox_head.fc_cls.weight"),
    rules=(),
    parity=UNMEASURED,
    refused="its boxes are a pixel larger and its classes are in another order; train or load it with that version, or "
    "use a model of MMDetection 2.x or 3.x",
)

# ---- maskrcnn-benchmark

_BENCHMARK_RULES = (
    Rule("backbone.conv1.weight", "backbone.body.stem.conv1.weight"),
    Rule("backbone.bn1.{norm}", "backbone.body.stem.bn1.{norm}"),
    Rule("backbone.layer{any}", "backbone.body.layer{any}"),
    Rule("neck.lateral.{i}.conv.{p}", "backbone.fpn.fpn_inner{i+1}.{p}"),
    Rule("neck.output.{i}.conv.{p}", "backbone.fpn.fpn_layer{i+1}.{p}"),
    Rule("rpn.head.conv.{p}", "rpn.head.conv.{p}"),
    Rule("rpn.head.objectness_logits.{p}", "rpn.head.cls_logits.{p}"),
    Rule("rpn.head.anchor_deltas.{p}", "rpn.head.bbox_pred.{p}"),
    Rule("region_stage.layer4.{any}", "roi_heads.box.feature_extractor.head.layer4.{any}"),
    Rule("region_stage.layer4.{any}", "roi_heads.mask.feature_extractor.head.layer4.{any}"),
    Rule("box_head.trunk.1.{p}", "roi_heads.box.feature_extractor.fc6.{p}"),
    Rule("box_head.trunk.3.{p}", "roi_heads.box.feature_extractor.fc7.{p}"),
    Rule("box_head.cls_score.{p}", "roi_heads.box.predictor.cls_score.{p}"),
    Rule("box_head.bbox_pred.{p}", "roi_heads.box.predictor.bbox_pred.{p}"),
    Rule("mask_head.convs.{i}.{p}", "roi_heads.mask.feature_extractor.mask_fcn{i+1}.{p}"),
    Rule("mask_head.upsample.{p}", "roi_heads.mask.predictor.conv5_mask.{p}"),
    Rule("mask_head.logits.{p}", "roi_heads.mask.predictor.mask_fcn_logits.{p}"),
)

BENCHMARK = Layout(
    name="maskrcnn-benchmark FPN",
    signature=("backbone.fpn.fpn_inner1.weight", "roi_heads.box.predictor.cls_score.weight"),
    rules=_BENCHMARK_RULES,
    rows=RowOrder(background="first", anchors_by="ratio"),
    bases=("base/conventions/detectron2",),
    settings={
        "model": {
            "pixels": {"mean": [102.9801, 115.9465, 122.7717]},
            "backbone": {"norm_eps": 0.0},
            "rpn": {"smooth_l1_beta": 1 / 9, "round_anchors": True},
            "roi": {"aligned": False, "sampling_ratio": 2},
            "box_head": {"smooth_l1_beta": 1.0},
            "mask_head": {"paste": "torchvision"},
        }
    },
    cases={"grouped": {"model": {"backbone": {"stride_in_1x1": False}}}},
    ignored={"rpn.anchor_generator.cell_anchors.{i}": "anchors follow from the configuration"},
    assumptions=("pixels and stride_in_1x1 are those of the model zoo",),
    parity=f"{UNMEASURED}; its boxes include their last pixel and its anchors are shifted by half a cell, which is not "
    "imitated, so boxes differ by about a pixel",
)
BENCHMARK_C4 = replace(
    BENCHMARK,
    name="maskrcnn-benchmark C4",
    signature=("backbone.body.stem.conv1.weight", "roi_heads.box.feature_extractor.head.layer4.0.conv1.weight"),
    settings={
        "model": {
            **BENCHMARK.settings["model"],
            "rpn": {**BENCHMARK.settings["model"]["rpn"], **SINGLE_LEVEL_PROPOSALS},
            "roi": {"aligned": False, "sampling_ratio": 0},
        }
    },
)

# ---- Classifiers, whose layers become the backbone

_CLASSES = "the classifier of ImageNet's classes"
_CAFFE2_NORM = {"s": "weight", "b": "bias", "rm": "running_mean", "riv": "running_var"}


def _caffe2_rules() -> tuple[Rule, ...]:
    block = "backbone.layer{i}.{j}."
    layers = [("backbone.conv1", "backbone.bn1", "conv1", "res_conv1")]
    layers += [
        (f"{block}{conv}", f"{block}{norm}", f"res{{i+1}}_{{j}}_{branch}", f"res{{i+1}}_{{j}}_{branch}")
        for conv, norm, branch in (
            ("conv1", "bn1", "branch2a"),
            ("conv2", "bn2", "branch2b"),
            ("conv3", "bn3", "branch2c"),
            ("downsample.0", "downsample.1", "branch1"),
        )
    ]
    rules = [Rule(f"{conv}.weight", f"{their_conv}_w") for conv, _, their_conv, _ in layers]
    for _, norm, _, their_norm in layers:
        rules += [Rule(f"{norm}.{part}", f"{their_norm}_bn_{short}") for short, part in _CAFFE2_NORM.items()]
    return tuple(rules)


CAFFE2 = Layout(
    name="ImageNet ResNet of Detectron (MSRA)",
    signature=("conv1_w", "res2_0_branch2a_w"),
    rules=_caffe2_rules(),
    bases=("base/conventions/detectron2",),
    ignored={
        "conv1_b": "a bias before a norm, zero up to 1e-9 in the published files",
        "fc1000_{any}": _CLASSES,
        "pred_{any}": _CLASSES,
        "{any}_momentum": "a state of the optimizer",
    },
    affine_norms=True,
    parity=UNMEASURED,
)
RESNET = Layout(
    name="ImageNet ResNet of torchvision or timm",
    signature=("conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight"),
    rules=(Rule("backbone.{any}", "{any}"),),
    settings={"model": {"pixels": RGB}},
    ignored={"fc.{p}": _CLASSES, COUNTER: NO_COUNTER},
    assumptions=("pixels are those of torchvision",),
    parity="feature maps equal those of torchvision's classifier (tests/models/test_backbones.py)",
)
VGG = Layout(
    name="ImageNet VGG of torchvision",
    signature=("features.0.weight", "classifier.0.weight"),
    rules=(
        Rule("backbone.features.{any}", "features.{any}"),
        Rule("box_head.trunk.classifier.0.{p}", "classifier.0.{p}"),
        Rule("box_head.trunk.classifier.3.{p}", "classifier.3.{p}"),
    ),
    settings={"model": {"pixels": RGB}},
    ignored={"classifier.6.{p}": _CLASSES, COUNTER: NO_COUNTER},
    parity="feature maps equal those of torchvision's classifier (tests/models/test_backbones.py)",
)

# ---- The list, in the order in which signatures are tried

LAYOUTS = (
    TORCHVISION_OLD,
    TORCHVISION,
    DETECTRON2_LSJ,
    DETECTRON2_CONV,
    DETECTRON2,
    DETECTRON2_C4,
    DETECTRON2_DC5,
    MMDETECTION,
    MMDETECTION_1,
    BENCHMARK,
    BENCHMARK_C4,
    CAFFE2,
    RESNET,
    VGG,
)
