"""Every tensor of published files: names and shapes as the frameworks have them, at full size, without values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torchvision.models
from torch import Tensor, nn
from torchvision.models.detection import maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2

from maskrcnn.config import validate
from maskrcnn.errors import InputError
from maskrcnn.experiment import ExperimentConfig
from maskrcnn.interop import layouts
from maskrcnn.interop.conversion import convert
from maskrcnn.interop.export import export, target_layout
from maskrcnn.interop.files import _stated
from maskrcnn.models.mask_rcnn import MaskRCNNConfig

Shapes = dict[str, tuple[int, ...]]

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
STATISTICS = ("weight", "bias", "running_mean", "running_var")
K = 80


class Names(NamedTuple):
    """How a framework names the layers of a ResNet, and the tensors of its norms."""

    stem: str
    stem_norm: str
    block: str  # of stage s, index i
    norm: str  # of convolution c in a block
    shortcut: str
    shortcut_norm: str
    first_stage: int


DETECTRON2 = Names("stem.conv1", "stem.conv1.norm", "res{s}.{i}.", "conv{c}.norm", "shortcut", "shortcut.norm", 2)
TORCHVISION = Names("conv1", "bn1", "layer{s}.{i}.", "bn{c}", "downsample.0", "downsample.1", 1)
BENCHMARK = TORCHVISION._replace(stem="stem.conv1", stem_norm="stem.bn1")


def normed(shapes: Shapes, names: tuple[str, str], shape: tuple[int, ...], parts: tuple[str, ...]) -> None:
    """Add a convolution and its norm."""
    shapes[f"{names[0]}.weight"] = shape
    for part in parts:
        shapes[f"{names[1]}.{part}"] = () if part == "num_batches_tracked" else shape[:1]


def stage(
    shapes: Shapes, names: Names, prefix: str, number: int, *, parts: tuple[str, ...], depth: int = 50, group: int = 0
) -> None:
    """Add stage 1 to 4; `group` is the width of 32 groups, or 0 for a plain ResNet."""
    planes, inputs = 64 * 2 ** (number - 1), 64 if number == 1 else 128 * 2 ** (number - 1)
    for index in range(BLOCKS[depth][number - 1]):
        block = prefix + names.block.format(s=number + names.first_stage - 1, i=index)
        width = planes * group // 64 * 32 if group else planes
        inside = width // 32 if group else width
        sizes = [(width, inputs, 1, 1), (width, inside, 3, 3), (4 * planes, width, 1, 1)]
        for conv, shape in enumerate(sizes, start=1):
            normed(shapes, (f"{block}conv{conv}", block + names.norm.format(c=conv)), shape, parts)
        if index == 0:
            normed(shapes, (block + names.shortcut, block + names.shortcut_norm), (4 * planes, inputs, 1, 1), parts)
        inputs = 4 * planes


def resnet(
    names: Names, prefix: str, *, stages: int = 4, parts: tuple[str, ...] = STATISTICS, **options: int
) -> Shapes:
    shapes: Shapes = {}
    normed(shapes, (prefix + names.stem, prefix + names.stem_norm), (64, 3, 7, 7), parts)
    for number in range(1, stages + 1):
        stage(shapes, names, prefix, number, parts=parts, **options)
    return shapes


def layer(name: str, *shape: int) -> Shapes:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def heads(names: list[str], *, channels: int, anchors: int, features: int, masks: int, background: str) -> Shapes:
    """Return the layers of the RPN, both predictors of the box head, and the end of the mask head."""
    conv, logits, rpn_deltas, scores, deltas, deconv, mask_logits = names
    boxes = K + (background == "first")
    return {
        **layer(conv, channels, channels, 3, 3),
        **layer(logits, anchors, channels, 1, 1),
        **layer(rpn_deltas, 4 * anchors, channels, 1, 1),
        **layer(scores, K + 1, features),
        **layer(deltas, 4 * boxes, features),
        f"{deconv}.weight": (masks, 256, 2, 2),
        f"{deconv}.bias": (256,),
        **layer(mask_logits, boxes, 256, 1, 1),
    }


D2_HEADS = [
    "proposal_generator.rpn_head.conv",
    "proposal_generator.rpn_head.objectness_logits",
    "proposal_generator.rpn_head.anchor_deltas",
    "roi_heads.box_predictor.cls_score",
    "roi_heads.box_predictor.bbox_pred",
    "roi_heads.mask_head.deconv",
    "roi_heads.mask_head.predictor",
]
MMDET_HEADS = ["rpn_head.rpn_conv", "rpn_head.rpn_cls", "rpn_head.rpn_reg", "roi_head.bbox_head.fc_cls"]
MMDET_HEADS += ["roi_head.bbox_head.fc_reg", "roi_head.mask_head.upsample", "roi_head.mask_head.conv_logits"]
MRB_HEADS = ["rpn.head.conv", "rpn.head.cls_logits", "rpn.head.bbox_pred", "roi_heads.box.predictor.cls_score"]
MRB_HEADS += ["roi_heads.box.predictor.bbox_pred", "roi_heads.mask.predictor.conv5_mask"]
MRB_HEADS += ["roi_heads.mask.predictor.mask_fcn_logits"]
PYRAMID: dict[str, Any] = {"channels": 256, "anchors": 3, "features": 1024, "masks": 256}
SINGLE: dict[str, Any] = {"channels": 1024, "anchors": 15, "features": 2048, "masks": 2048}


def pyramid(lateral: str, output: str, first: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for index in range(4):
        yield lateral.format(index + first), (256, 256 * 2**index, 1, 1)
        yield output.format(index + first), (256, 256, 3, 3)


def plain_pyramid(lateral: str, output: str, first: int) -> Shapes:
    return {key: size for name, shape in pyramid(lateral, output, first) for key, size in layer(name, *shape).items()}


def plain_heads(fcs: tuple[str, str], mask_conv: str, first: int, *, channels: int = 256) -> Shapes:
    shapes = {**layer(fcs[0], 1024, channels * 49), **layer(fcs[1], 1024, 1024)}
    for index in range(4):
        shapes |= layer(mask_conv.format(index + first), 256, channels if index == 0 else 256, 3, 3)
    return shapes


def detectron2_fpn(**options: int) -> Shapes:
    return {
        **resnet(DETECTRON2, "backbone.bottom_up.", **options),
        **plain_pyramid("backbone.fpn_lateral{}", "backbone.fpn_output{}", 2),
        **heads(D2_HEADS, **PYRAMID, background="last"),
        **plain_heads(("roi_heads.box_head.fc1", "roi_heads.box_head.fc2"), "roi_heads.mask_head.mask_fcn{}", 1),
    }


def detectron2_conv(parts: tuple[str, ...], rpn_convs: int) -> Shapes:
    """Group norm, or with two convolutions of the RPN and counting norms the baselines with large-scale jitter."""
    shapes = {**resnet(DETECTRON2, "backbone.bottom_up.", parts=parts), **heads(D2_HEADS, **PYRAMID, background="last")}
    convs = list(pyramid("backbone.fpn_lateral{}", "backbone.fpn_output{}", 2))
    for index in range(1, 5):
        convs += [(f"roi_heads.box_head.conv{index}", (256, 256, 3, 3))]
        convs += [(f"roi_heads.mask_head.mask_fcn{index}", (256, 256, 3, 3))]
    for name, shape in convs:
        normed(shapes, (name, f"{name}.norm"), shape, parts)
    if rpn_convs == 2:
        one = "proposal_generator.rpn_head.conv"
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith(f"{one}.")}
        shapes |= layer(f"{one}.conv0", 256, 256, 3, 3) | layer(f"{one}.conv1", 256, 256, 3, 3)
    return shapes | layer("roi_heads.box_head.fc1", 1024, 256 * 49)


def detectron2_c4() -> Shapes:
    shapes = {**resnet(DETECTRON2, "backbone.", stages=3), **heads(D2_HEADS, **SINGLE, background="last")}
    stage(shapes, DETECTRON2._replace(first_stage=2), "roi_heads.", 4, parts=STATISTICS)
    return shapes


def detectron2_dc5() -> Shapes:
    return {
        **resnet(DETECTRON2, "backbone."),
        **heads(D2_HEADS, **{**PYRAMID, "channels": 2048, "anchors": 15}, background="last"),
        **plain_heads(
            ("roi_heads.box_head.fc1", "roi_heads.box_head.fc2"), "roi_heads.mask_head.mask_fcn{}", 1, channels=2048
        ),
    }


def mmdetection() -> Shapes:
    fcs = ("roi_head.bbox_head.shared_fcs.0", "roi_head.bbox_head.shared_fcs.1")
    return {
        **resnet(TORCHVISION, "backbone.", parts=(*STATISTICS, "num_batches_tracked")),
        **plain_pyramid("neck.lateral_convs.{}.conv", "neck.fpn_convs.{}.conv", 0),
        **heads(MMDET_HEADS, **PYRAMID, background="last"),
        **plain_heads(fcs, "roi_head.mask_head.convs.{}.conv", 0),
    }


def benchmark_fpn() -> Shapes:
    fcs = ("roi_heads.box.feature_extractor.fc6", "roi_heads.box.feature_extractor.fc7")
    return {
        **resnet(BENCHMARK, "backbone.body."),
        **plain_pyramid("backbone.fpn.fpn_inner{}", "backbone.fpn.fpn_layer{}", 1),
        **heads(MRB_HEADS, **PYRAMID, background="first"),
        **plain_heads(fcs, "roi_heads.mask.feature_extractor.mask_fcn{}", 1),
    }


def benchmark_c4() -> Shapes:
    shapes = {**resnet(BENCHMARK, "backbone.body.", stages=3), **heads(MRB_HEADS, **SINGLE, background="first")}
    stage(shapes, BENCHMARK, "roi_heads.box.feature_extractor.head.", 4, parts=STATISTICS)
    return shapes


def caffe2(depth: int) -> Shapes:
    shapes: Shapes = {"conv1_w": (64, 3, 7, 7), "conv1_b": (64,), "fc1000_w": (1000, 2048), "fc1000_b": (1000,)}
    shapes |= {"res_conv1_bn_s": (64,), "res_conv1_bn_b": (64,)}
    names = {"conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c", "downsample.0": "branch1"}
    for name, shape in resnet(TORCHVISION, "", parts=(), depth=depth).items():
        if name.startswith("layer"):
            number, index, conv = name.removeprefix("layer").removesuffix(".weight").split(".", 2)
            prefix = f"res{int(number) + 1}_{index}_{names[conv]}"
            shapes |= {f"{prefix}_w": shape, f"{prefix}_bn_s": shape[:1], f"{prefix}_bn_b": shape[:1]}
    return shapes


def on_meta(shapes: Shapes) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


FILES = {
    "detectron2 r50 fpn": (detectron2_fpn(), 307, "Detectron2 FPN"),
    "detectron2 r101 fpn": (detectron2_fpn(depth=101), 562, "Detectron2 FPN"),
    "detectron2 x101 fpn": (detectron2_fpn(depth=101, group=8), 562, "Detectron2 FPN"),
    "detectron2 gn": (detectron2_conv(("weight", "bias"), 1), 223, "Detectron2 FPN with convolutions in the box head"),
    "detectron2 lsj": (
        detectron2_conv((*STATISTICS, "num_batches_tracked"), 2),
        432,
        "Detectron2 FPN of the baselines with large-scale jitter",
    ),
    "detectron2 c4": (detectron2_c4(), 279, "Detectron2 C4"),
    "detectron2 dc5": (detectron2_dc5(), 291, "Detectron2 DC5"),
    "mmdetection": (mmdetection(), 360, "MMDetection 2.x or 3.x"),
    "benchmark fpn": (benchmark_fpn(), 307, "maskrcnn-benchmark FPN"),
    "benchmark c4": (benchmark_c4(), 279, "maskrcnn-benchmark C4"),
    "msra r50": (caffe2(50), 162, "ImageNet ResNet of Detectron (MSRA)"),
    "msra r101": (caffe2(101), 315, "ImageNet ResNet of Detectron (MSRA)"),
}
# Keys of `model` that a checkpoint does not show by itself, and that differ between these files.
EXPECTED: dict[str, dict[str, Any]] = {
    "detectron2 r50 fpn": {"pixels.order": "bgr", "backbone.stride_in_1x1": True, "backbone.norm_eps": 1e-5},
    "detectron2 r101 fpn": {"backbone.depth": 101, "backbone.groups": 1},
    "detectron2 x101 fpn": {"backbone.groups": 32, "backbone.width_per_group": 8, "backbone.stride_in_1x1": False}
    | {"pixels.std": (57.375, 57.12, 58.395)},
    "detectron2 gn": {"backbone.norm": "gn", "neck.norm": "gn", "box_head.norm": "gn", "mask_head.norm": "gn"}
    | {"backbone.stride_in_1x1": False, "rpn.conv_depth": 1},
    "detectron2 lsj": {"backbone.norm": "bn", "backbone.stride_in_1x1": True, "rpn.conv_depth": 2},
    "detectron2 c4": {"backbone.res5_on_regions": True, "box_head.kind": "mean", "neck.kind": "none"}
    | {"rpn.anchor_sizes": ((32, 64, 128, 256, 512),), "rpn.inference.pre_nms_top_n": 6000},
    "detectron2 dc5": {"backbone.res5_dilation": 2, "box_head.kind": "fc", "backbone.strides": (16,)},
    "mmdetection": {"pixels.order": "rgb", "backbone.stride_in_1x1": False, "backbone.norm": "frozen_bn"},
    "benchmark fpn": {"pixels.mean": (102.9801, 115.9465, 122.7717), "roi.aligned": False, "backbone.norm_eps": 0.0},
    "benchmark c4": {"roi.sampling_ratio": 0, "backbone.res5_on_regions": True},
    "msra r50": {"pixels.order": "bgr", "pixels.std": (1.0, 1.0, 1.0), "backbone.stride_in_1x1": True},
    "msra r101": {"backbone.depth": 101, "backbone.norm": "frozen_bn"},
}


@pytest.mark.parametrize("name", FILES)
def test_every_tensor_is_accounted_for(name: str) -> None:
    shapes, count, layout = FILES[name]
    assert len(shapes) == count
    converted = convert(on_meta(shapes), source=f"{name}.pkl")
    certificate = converted.certificate
    assert certificate.layout == layout
    assert {*certificate.loaded, *certificate.renamed, *certificate.left_out} == shapes.keys()
    assert certificate.count == count
    assert "numbers not compared" in certificate.parity
    model = validate(converted.config, ExperimentConfig, source=name).model
    for key, value in EXPECTED[name].items():
        found: Any = model
        for part in key.split("."):
            found = getattr(found, part)
        assert found == value, key


@pytest.mark.parametrize("builder", ["resnet18", "resnet50", "resnext50_32x4d", "resnet152"])
def test_every_tensor_of_torchvisions_resnets(builder: str) -> None:
    with torch.device("meta"):
        state = getattr(torchvision.models, builder)(weights=None).state_dict()
    converted = convert(state, source="resnet.pth")
    backbone = validate(converted.config, ExperimentConfig, source="").model.backbone
    assert backbone.architecture == builder  # type: ignore[attr-defined]
    assert converted.classes.names == ()
    assert all(name.startswith("backbone.") for name in converted.tensors)
    reasons = set(converted.certificate.left_out.values())
    assert reasons == {"the classifier of ImageNet's classes", "frozen norms do not count batches"}


# From this model, at full size: Detectron2's names in our checkpoints, and ours in theirs.
EXPORTED = [name for name in FILES if name.startswith("detectron2")]


@pytest.mark.parametrize("name", EXPORTED)
def test_an_export_has_the_names_and_shapes_of_detectron2(name: str) -> None:
    shapes, _, layout = FILES[name]
    converted = convert(on_meta(shapes), source=name)
    target = target_layout("detectron2", converted.tensors)
    assert target.name == layout
    exported = export(converted.tensors, converted.classes, target, source=name)
    assert {key: tuple(tensor.shape) for key, tensor in exported.items()} == shapes


@pytest.mark.parametrize("builder", [maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2])
def test_torchvisions_models_load_an_export_strictly(builder: Callable[..., nn.Module]) -> None:
    with torch.device("meta"):
        model = builder(weights=None, weights_backbone=None)
    converted = convert(model.state_dict(), source="coco.pth")
    exported = export(converted.tensors, converted.classes, target_layout("torchvision", converted.tensors), source="")
    model.load_state_dict(exported, strict=True, assign=True)


def test_every_tensor_of_a_resnet_of_timm() -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        state = timm.create_model("resnet50.a1_in1k", pretrained=False).state_dict()
    converted = convert(state, source="model.safetensors")
    assert len(converted.tensors) == 265
    assert len(converted.certificate.left_out) == 53 + 2


@pytest.mark.parametrize("builder", ["vgg16", "vgg16_bn", "vgg11"])
def test_the_layers_of_a_vgg_become_the_box_head(builder: str) -> None:
    with torch.device("meta"):
        state = getattr(torchvision.models, builder)(weights=None).state_dict()
    converted = convert(state, source="vgg.pth")
    assert converted.tensors["box_head.trunk.classifier.0.weight"].shape == (4096, 25088)
    assert validate(converted.config, ExperimentConfig, source="").model.backbone.architecture == builder  # type: ignore[attr-defined]


def test_a_scale_and_a_shift_are_an_exact_norm() -> None:
    torch.manual_seed(0)
    shapes = caffe2(50)
    state = {name: torch.rand(shape) for name, shape in shapes.items() if not name.startswith(("res3", "res4", "res5"))}
    state |= {name: torch.zeros(shape) for name, shape in shapes.items() if name.startswith(("res3", "res4", "res5"))}
    converted = convert(state, source="R-50.pkl")
    assert converted.certificate.missing["backbone.bn1.running_var"] == "0.99999: the norm is a scale and a shift"
    backbone = MaskRCNNConfig.model_validate(converted.config["model"]).backbone.build()
    backbone.load_state_dict({name.removeprefix("backbone."): tensor for name, tensor in converted.tensors.items()})
    scale, shift = backbone.bn1.scale_and_shift()  # type: ignore[operator, union-attr]
    torch.testing.assert_close(scale, state["res_conv1_bn_s"])
    torch.testing.assert_close(shift, state["res_conv1_bn_b"])
    assert torch.equal(converted.tensors["backbone.layer1.2.bn3.bias"], state["res2_2_branch2c_bn_b"])
    assert torch.equal(converted.tensors["backbone.layer1.0.downsample.0.weight"], state["res2_0_branch1_w"])


# Orders of rows.


def rows_of(layout: layouts.Layout, name: str, *, scores: int, anchors: int) -> list[int]:
    assert layout.rows is not None
    return layout.rows.rows(name, scores=scores, anchors=anchors)


def test_rows_of_classes() -> None:
    """Three rows of scores: background and two classes."""
    score, box, mask = "box_head.cls_score.bias", "box_head.bbox_pred.bias", "mask_head.logits.bias"
    last, first = layouts.DETECTRON2, layouts.BENCHMARK
    assert rows_of(last, score, scores=3, anchors=3) == [2, 0, 1]
    assert rows_of(last, box, scores=3, anchors=3) == list(range(8))
    assert rows_of(first, score, scores=3, anchors=3) == [0, 1, 2]
    assert rows_of(first, box, scores=3, anchors=3) == list(range(4, 12))
    assert rows_of(first, mask, scores=3, anchors=3) == [1, 2]


def test_anchors_by_size_and_by_ratio() -> None:
    """Ours: (size 0: ratios 0, 1, 2), (size 1: ratios 0, 1, 2). By ratio: (ratio 0: sizes 0, 1), ..."""
    name = "rpn.head.objectness_logits.bias"
    assert rows_of(layouts.DETECTRON2_C4, name, scores=3, anchors=6) == [0, 1, 2, 3, 4, 5]
    assert rows_of(layouts.BENCHMARK_C4, name, scores=3, anchors=6) == [0, 2, 4, 1, 3, 5]
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    from maskrcnn.ops.anchors import base_anchors

    theirs = AnchorGenerator(((32, 64),), ((0.5, 1.0, 2.0),)).cell_anchors[0]
    ours = base_anchors((32, 64), (0.5, 1.0, 2.0), rounded=True)
    assert np.array_equal(theirs[rows_of(layouts.TORCHVISION, name, scores=3, anchors=6)], ours)


# What a file says besides its tensors.


def test_the_pixels_in_a_file_of_detectron2() -> None:
    state = on_meta(detectron2_fpn())
    state |= {"pixel_mean": torch.tensor([103.53, 116.28, 123.675]).view(3, 1, 1)}
    state |= {"pixel_std": torch.tensor([57.375, 57.12, 58.395]).view(3, 1, 1)}
    state |= {"proposal_generator.anchor_generator.cell_anchors.0": torch.zeros(3, 4)}
    converted = convert(state, source="zoo.pkl")
    assert converted.config["model"]["pixels"]["std"] == [57.375, 57.12, 58.395]
    assert len(converted.certificate.left_out) == 3


def test_classes_and_style_of_mmdetection() -> None:
    stated = _stated({"meta": {"CLASSES": ("cell", "nucleus"), "config": "backbone=dict(style='caffe')"}})
    assert stated.class_names == ("cell", "nucleus")
    assert stated.settings is not None
    assert stated.settings["model"]["pixels"]["order"] == "bgr"
    three = _stated({"meta": {"dataset_meta": {"classes": ["cell"]}, "cfg": "style='pytorch'"}})
    assert three == (("cell",), None)
    assert _stated({"meta": None}) == ((), None)


def test_mmdetection_1_is_refused_with_the_reason() -> None:
    state = {"rpn_head.rpn_cls.weight": torch.zeros(3), "bbox_head.fc_cls.weight": torch.zeros(81)}
    with pytest.raises(InputError, match=r"old\.pth: MMDetection 1\.x: its boxes are a pixel larger"):
        convert(state, source="old.pth")


def test_shared_layers_that_are_stored_twice_must_be_equal() -> None:
    shapes = benchmark_c4()
    state = {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}
    box, mask = (f"roi_heads.{head}.feature_extractor.head.layer4.0.conv1.weight" for head in ("box", "mask"))
    converted = convert({**state, mask: state[box]}, source="c4.pth")
    assert converted.certificate.left_out == {mask: f"the same as {box}"}
    with pytest.raises(InputError, match="are the same tensor, but have different values"):
        convert({**state, mask: state[box] + 1}, source="c4.pth")
