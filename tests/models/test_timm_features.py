"""Backbones of timm: strides, stages, freezing, weights from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from maskrcnn.errors import InputError
from maskrcnn.models.backbones.timm_features import TimmConfig
from maskrcnn.models.mask_rcnn import MaskRCNNConfig

timm = pytest.importorskip("timm", reason="timm is not installed")

MODELS = ["resnet10t", "convnext_atto", "swin_tiny_patch4_window7_224", "efficientnet_b0", "regnety_002"]


@pytest.mark.parametrize("name", MODELS)
def test_feature_maps_stages_and_freezing(name: str) -> None:
    config = TimmConfig(name=name, weights="none", freeze=2)
    backbone = config.build()
    assert backbone.strides == config.strides
    maps = backbone(torch.zeros(1, 3, 64, 96))
    assert [tuple(level.shape) for level in maps] == [
        (1, channels, 64 // stride, 96 // stride)
        for channels, stride in zip(backbone.channels, (4, 8, 16, 32), strict=True)
    ]
    stages = backbone.stages()
    assert len(stages) == 5
    owned = [parameter for stage in stages for parameter in stage.parameters()]
    everything = list(backbone.parameters())
    # Each parameter is in one stage; what timm has after the last feature map, such as a norm, is in none.
    assert len(set(owned)) == len(owned) <= len(everything)
    assert len(owned) >= 0.95 * len(everything)
    learns = [[parameter.requires_grad for parameter in stage.parameters()] for stage in stages]
    assert not any(learns[0] + learns[1])
    assert all(any(stage) for stage in learns[2:])
    assert not [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm)]


def model_section(**backbone: Any) -> dict[str, Any]:
    return {
        "backbone": {"kind": "timm", "name": "resnet10t", "weights": "none", **backbone},
        "neck": {"kind": "fpn", "channels": 8},
        "rpn": {"anchor_sizes": [[16], [32], [64], [128], [256]]},
        "box_head": {"kind": "fc", "width": 8},
        "mask_head": {"kind": "fcn", "depth": 1, "width": 8},
    }


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto", "efficientnet_b0"])
def test_weights_come_from_timms_own_file(name: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    classifier = timm.create_model(name, pretrained=False)
    torch.save(classifier.state_dict(), tmp_path / "weights.pth")
    section = model_section(name=name, weights=str(tmp_path / "weights.pth"))
    model = MaskRCNNConfig.model_validate(section).build(2)
    pixels = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        maps = model.backbone.eval()(pixels)
        expected = classifier.eval().forward_intermediates(pixels, intermediates_only=True)[-4:]
    for one, two in zip(maps, expected, strict=True):
        torch.testing.assert_close(one, two)
    assert len(model.stages()) == 5


def test_wrong_models_and_weights(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no model 'resnet10x'"):
        TimmConfig(name="resnet10x", weights="none").build()
    with pytest.raises(InputError, match="strides"):
        TimmConfig(name="vit_tiny_patch16_224", weights="none").build()
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    config = TimmConfig(name="resnet10t", weights=str(tmp_path / "other.pth"))
    with pytest.raises(InputError, match=r"other\.pth: these are not the weights of resnet10t: conv1\.0\.weight"):
        config.load_pretrained(config.build(), None, None)
    state = timm.create_model("resnet10t", pretrained=False).state_dict()
    torch.save({**state, "conv1.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"other\.pth: .* of resnet10t: conv1\.0\.weight has the shape \[1\]"):
        config.load_pretrained(config.build(), None, None)
