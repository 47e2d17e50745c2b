"""Conversion of other frameworks' state dicts: names, rows, settings, certificate, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.detection import maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2

from maskrcnn.config import validate
from maskrcnn.errors import InputError
from maskrcnn.experiment import ExperimentConfig
from maskrcnn.interop.conversion import Converted, convert
from maskrcnn.interop.layouts import TORCHVISION
from maskrcnn.interop.rows import coco_classes

States = Callable[..., dict[str, torch.Tensor]]


def accounted(converted: Converted, state: dict[str, Any]) -> bool:
    """Return whether the certificate names every tensor of the file once, and every one of the model."""
    certificate = converted.certificate
    names = [*certificate.loaded, *certificate.renamed, *certificate.left_out]
    taken = {*certificate.loaded, *certificate.renamed.values()}
    return sorted(names) == sorted(state) and taken == converted.tensors.keys()


@pytest.mark.parametrize(
    ("builder", "count", "conv_depth", "box_head"),
    [(maskrcnn_resnet50_fpn, 360, 1, "fc"), (maskrcnn_resnet50_fpn_v2, 432, 2, "conv_fc")],
)
def test_every_tensor_of_torchvisions_models(
    builder: Callable[..., nn.Module], count: int, conv_depth: int, box_head: str
) -> None:
    with torch.device("meta"):
        state = builder(weights=None, weights_backbone=None).state_dict()
    converted = convert(state, source="coco.pth")
    assert accounted(converted, state)
    assert len(state) == count == len(converted.tensors)
    assert converted.classes == coco_classes()
    model = validate(converted.config, ExperimentConfig, source="coco.pth").model
    assert (model.rpn.conv_depth, model.box_head.kind) == (conv_depth, box_head)
    assert converted.config["model"]["backbone"]["norm_eps"] == 1e-5  # not frozen
    assert f"{count} of {count} tensors loaded" in converted.certificate.describe()


def test_classes_have_the_rows_of_their_coco_ids(foreign_state: States) -> None:
    ids = coco_classes().category_ids
    assert (len(ids), ids[0], ids[11], ids[-1]) == (80, 1, 13, 90)  # 12 is unused
    state = foreign_state(TORCHVISION, classes=coco_classes())
    scores, deltas = (state[f"roi_heads.box_predictor.{name}.weight"] for name in ("cls_score", "bbox_pred"))
    assert (len(scores), len(deltas)) == (91, 4 * 91)
    converted = convert(state, source="coco.pth")
    ours = converted.tensors
    assert torch.equal(ours["box_head.cls_score.weight"][[0, 12]], scores[[0, 13]])
    assert torch.equal(ours["box_head.bbox_pred.weight"][4 * 11 : 4 * 12], deltas[4 * 13 : 4 * 14])
    assert converted.certificate.permuted["box_head.cls_score.weight"] == "81 of 91 rows"


def test_a_row_without_a_class_is_never_predicted(foreign_state: States) -> None:
    state = foreign_state(TORCHVISION, classes=coco_classes())
    weight, bias = (state[f"roi_heads.box_predictor.cls_score.{name}"] for name in ("weight", "bias"))
    probabilities = nn.functional.linear(torch.rand(5, 16), weight, bias).softmax(dim=1)
    assert not probabilities[:, [12, 83]].any()


def test_old_names_of_torchvision(foreign_state: States) -> None:
    state = foreign_state(TORCHVISION, "model.backbone.norm=frozen_bn")
    changes = {
        "rpn.head.conv.0.0.": "rpn.head.conv.",
        "fpn.inner_blocks.0.0.": "fpn.inner_blocks.0.",
        "fpn.layer_blocks.3.0.": "fpn.layer_blocks.3.",
        "roi_heads.mask_head.0.0.": "roi_heads.mask_head.mask_fcn1.",
    }
    old = state
    for new_name, old_name in changes.items():
        old = {name.replace(new_name, old_name): tensor for name, tensor in old.items()}
    assert "roi_heads.mask_head.mask_fcn1.bias" in old
    new, converted = convert(state, source="new.pth"), convert(old, source="old.pth")
    assert accounted(converted, old)
    assert all(torch.equal(tensor, new.tensors[name]) for name, tensor in converted.tensors.items())
    assert converted.config["model"]["backbone"]["norm_eps"] == 0.0
    assert any("norm_eps=1e-5" in text for text in converted.certificate.assumptions)


def test_out_and_in_again_is_the_same(tiny_weights: States, foreign_state: States) -> None:
    torch.manual_seed(0)
    weights = tiny_weights()
    torch.manual_seed(0)
    converted = convert(foreign_state(TORCHVISION), source="tiny.pth")
    assert converted.tensors.keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in converted.tensors.items())
    assert converted.classes.names == ("class 1", "class 2")
    named = convert(foreign_state(TORCHVISION), source="tiny.pth", class_names=("disc", "cross"))
    assert named.classes.names == ("disc", "cross")


def test_what_does_not_fit_is_refused_by_name(foreign_state: States) -> None:
    state = foreign_state(TORCHVISION)
    with pytest.raises(InputError, match=r"x\.pth: torchvision Mask R-CNN: unknown tensors:\n  keypoints\.weight"):
        convert({**state, "keypoints.weight": torch.zeros(1)}, source="x.pth")
    with pytest.raises(InputError, match=r"x\.pth: its 1 tensors \(encoder\.weight, \.\.\.\) have the names of no"):
        convert({"encoder.weight": torch.zeros(1)}, source="x.pth")
    with pytest.raises(InputError, match="the file has 2 classes, but 3 names"):
        convert(state, source="x.pth", class_names=("a", "b", "c"))
    agnostic = {**state, "roi_heads.box_predictor.bbox_pred.weight": torch.zeros(4, 16)}
    with pytest.raises(InputError, match=r"box_head\.bbox_pred\.weight has 4 rows.*needs 12; boxes or masks for all"):
        convert(agnostic, source="x.pth")
    short = {name: tensor for name, tensor in state.items() if name != "roi_heads.box_head.fc7.bias"}
    with pytest.raises(InputError, match=r"do not fit together:\n  box_head\.trunk\.3\.bias: not in the file"):
        convert(short, source="x.pth")
    deep = {**state, "backbone.body.layer1.2.conv1.weight": torch.zeros(8, 8, 3, 3)}
    with pytest.raises(InputError, match="a backbone with 3, 2, 2, 2 blocks in its stages is no ResNet"):
        convert(deep, source="x.pth")
