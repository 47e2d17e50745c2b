"""How the heads start: the scales of the three lineages, and what reaches the mask head's first layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from maskrcnn.config import read_config
from maskrcnn.experiment import ExperimentConfig
from maskrcnn.models.box_head import BoxHead, FCTrunkConfig
from maskrcnn.models.initialization import Initialization
from maskrcnn.models.losses import mask_loss
from maskrcnn.models.mask_head import FCNMaskHead, FCNMaskHeadConfig, MLPMaskHeadConfig

CONFIGS = Path(__file__).parents[2] / "configs"
WIDTH, CLASSES = 256, 80


def fcn(how: Initialization) -> FCNMaskHead:
    config = FCNMaskHeadConfig(initialization=how)
    return config.build(channels=WIDTH, side=14, num_classes=CLASSES)


def box_head(how: Initialization) -> BoxHead:
    trunk = FCTrunkConfig(initialization=how).build(channels=64, side=7)
    return BoxHead(
        trunk=trunk,
        features=trunk.features,
        num_classes=CLASSES,
        initialization=how,
    )


def stds(layers: list[nn.Module]) -> list[float]:
    assert all(layer.bias is not None for layer in layers)
    return [float(layer.weight.detach().std()) for layer in layers]


def test_the_default_start() -> None:
    head = fcn("fan_in")
    assert stds([head.logits]) == pytest.approx([4 / 16], rel=0.05)
    assert 0.5 < float(head.all_masks(torch.randn(4, WIDTH, 14, 14).relu()).detach().std()) < 3
    box = box_head("fan_in")
    expected = [(64 * 49) ** -0.5, 1024**-0.5, (3 * 1024) ** -0.5, (3 * 1024) ** -0.5]
    assert stds([box.trunk[1], box.trunk[3], box.cls_score, box.bbox_pred]) == pytest.approx(expected, rel=0.05)
    assert box.cls_score.bias.softmax(0)[0].item() == pytest.approx(0.9)
    assert not box.bbox_pred.bias.any()


@pytest.mark.parametrize("config", [FCNMaskHeadConfig, MLPMaskHeadConfig])
def test_every_layer_of_the_mask_head_learns_from_the_first_step(config) -> None:
    """The gradient of the first layer is no small fraction of the last one's, as it is in Detectron2's start."""
    ratios = {}
    for how in ("fan_in", "detectron2"):
        torch.manual_seed(0)
        built = config(initialization=how).build(channels=WIDTH, side=14, num_classes=CLASSES)
        outputs = built(torch.randn(8, WIDTH, 14, 14).relu(), torch.arange(1, 9))
        wanted = (torch.rand(8, built.mask_size, built.mask_size) < 0.5).float()
        zeros = torch.zeros(8, dtype=torch.int64)
        mask_loss(outputs, wanted, positive=zeros == 0, images=zeros, batch=1, per="image").backward()
        first, last = (built.convs if hasattr(built, "convs") else built.hidden)[0], built.logits
        ratios[how] = float(first.weight.grad.norm() / last.weight.grad.norm())
    assert ratios["fan_in"] > 20 * ratios["detectron2"]


def test_torchvisions_start() -> None:
    theirs = [*MaskRCNNHeads(WIDTH, (WIDTH,) * 4, 1).modules(), *MaskRCNNPredictor(WIDTH, WIDTH, CLASSES).modules()]
    expected = stds([layer for layer in theirs if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d)])
    head = fcn("torchvision")
    assert stds([*head.convs, head.upsample, head.logits]) == pytest.approx(expected, rel=0.05)

    theirs = [*TwoMLPHead(64 * 49, 1024).modules(), *FastRCNNPredictor(1024, CLASSES + 1).modules()]
    expected = stds([layer for layer in theirs if isinstance(layer, nn.Linear)])
    box = box_head("torchvision")
    assert stds([box.trunk[1], box.trunk[3], box.cls_score, box.bbox_pred]) == pytest.approx(expected, rel=0.05)


def test_detectron2s_start() -> None:
    """Its source: c2_msra_fill and 0.001 in the mask head; c2_xavier_fill, 0.01 and 0.001 in the box head."""
    head = fcn("detectron2")
    he = (2 / (9 * WIDTH)) ** 0.5
    assert stds([*head.convs, head.upsample, head.logits]) == pytest.approx(
        [he] * 4 + [(2 / 1024) ** 0.5, 0.001], rel=0.05
    )
    box = box_head("detectron2")
    expected = [(64 * 49) ** -0.5, 1024**-0.5, 0.01, 0.001]
    assert stds([box.trunk[1], box.trunk[3], box.cls_score, box.bbox_pred]) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("lineage", ["detectron2", "torchvision"])
def test_conventions_choose_their_own_start(lineage: str, tmp_path: Path) -> None:
    file = tmp_path / "experiment.yaml"
    parts = ["model/resnet_fpn", "data/shapes", f"conventions/{lineage}"]
    file.write_text(f"base: [{', '.join(str(CONFIGS / 'base' / f'{part}.yaml') for part in parts)}]")
    model = read_config(file, ExperimentConfig).model
    assert model.box_head.initialization == model.mask_head.initialization == lineage
