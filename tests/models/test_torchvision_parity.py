"""Numerical parity with torchvision's Mask R-CNN: features, proposals, losses, detections.

The weights are random and converted by `maskrcnn.interop`, which also gives the configuration.
"""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN as TorchvisionMaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from maskrcnn.config import validate
from maskrcnn.experiment import ExperimentConfig
from maskrcnn.interop.conversion import convert
from maskrcnn.models.mask_rcnn import MaskRCNN
from maskrcnn.ops.mask_tables import tabulate
from maskrcnn.ops.masks import paste_probabilities
from maskrcnn.structures import AxisAlignedMap, ImageBatch, MaskCrop, Targets

BatchNorm = nn.BatchNorm2d
CLASSES, HEIGHT, WIDTH = 5, 96, 128
EVERYTHING = 2**12  # more samples than anchors: sampling is not random
BEFORE_NMS, AFTER_NMS, DETECTIONS = 300, 60, 20  # proposals of each level and of an image, detections of an image


def torchvision_model(version: str) -> TorchvisionMaskRCNN:
    settings = {
        "min_size": HEIGHT,
        "max_size": WIDTH,
        "rpn_batch_size_per_image": EVERYTHING,
        "box_batch_size_per_image": EVERYTHING,
        "box_positive_fraction": 0.5,
        "box_detections_per_img": DETECTIONS,
        "rpn_pre_nms_top_n_train": BEFORE_NMS,
        "rpn_pre_nms_top_n_test": BEFORE_NMS,
        "rpn_post_nms_top_n_train": AFTER_NMS,
        "rpn_post_nms_top_n_test": AFTER_NMS,
    }
    if version == "v1":  # as the builder makes it if it loads weights, but without a download
        norm = partial(FrozenBatchNorm2d, eps=0.0)
        backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=norm, trainable_layers=3)
        model = TorchvisionMaskRCNN(backbone, CLASSES + 1, **settings)
    else:  # as the builder of version 2 makes it, with a smaller backbone
        backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=BatchNorm, trainable_layers=5)
        backbone.fpn = FeaturePyramidNetwork([64, 128, 256, 512], 256, LastLevelMaxPool(), norm_layer=BatchNorm)
        model = TorchvisionMaskRCNN(
            backbone,
            CLASSES + 1,
            rpn_head=RPNHead(256, 3, conv_depth=2),
            box_head=FastRCNNConvFCHead((256, 7, 7), [256] * 4, [1024], norm_layer=BatchNorm),
            mask_head=MaskRCNNHeads(256, [256] * 4, 1, norm_layer=BatchNorm),
            **settings,
        )
    randomize(model)
    return model


@torch.no_grad()
def randomize(model: TorchvisionMaskRCNN) -> None:
    """Give norms statistics like those of a trained model, and predictors outputs that differ between proposals."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d | nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            module.weight.uniform_(0.3, 0.6, generator=generator)  # small enough to keep activations finite
            module.bias.normal_(0, 0.1, generator=generator)
    model.rpn.head.cls_logits.weight.mul_(10)
    model.roi_heads.box_predictor.cls_score.weight.mul_(20)


@pytest.fixture(scope="module", params=["v1", "v2"])
def models(request: pytest.FixtureRequest) -> tuple[TorchvisionMaskRCNN, MaskRCNN]:
    torch.manual_seed(0)
    theirs = torchvision_model(request.param)
    converted = convert(theirs.state_dict(), source="torchvision")
    config = validate(
        converted.config,
        ExperimentConfig,
        source="torchvision",
        overrides=[
            f"model.rpn.batch_size_per_image={EVERYTHING}",
            f"model.sampling.batch_size_per_image={EVERYTHING}",
            "model.sampling.positive_fraction=0.5",
            f"model.detection.detections_per_image={DETECTIONS}",
            *(
                f"model.rpn.{phase}={{pre_nms_top_n: {BEFORE_NMS}, post_nms_top_n: {AFTER_NMS}}}"
                for phase in ("training", "inference")
            ),
        ],
    )
    ours = config.model.build(CLASSES, pretrained=False)
    ours.load_state_dict(converted.tensors)
    return theirs.eval(), ours.eval()


def training(models: tuple[TorchvisionMaskRCNN, MaskRCNN]) -> tuple[TorchvisionMaskRCNN, MaskRCNN]:
    """Return copies in train mode, where norms change their statistics."""
    theirs, ours = deepcopy(models)
    return theirs.train(), ours.train()


@pytest.fixture(scope="module")
def scene() -> tuple[Tensor, list[dict[str, Tensor]], ImageBatch, Targets]:
    """Two images with three objects and one object, in the formats of torchvision and of this project."""
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(0, 256, (2, 3, HEIGHT, WIDTH), dtype=np.uint8))
    boxes = [
        torch.tensor([[6.0, 7, 42, 54], [36, 18, 90, 63], [60, 3, 77, 24]]),
        torch.tensor([[18.0, 12, 57, 38]]),
    ]
    labels = [torch.tensor([1, 3, 5]), torch.tensor([2])]
    masks = [torch.stack([disc(box) for box in image]) for image in boxes]
    theirs = [{"boxes": b, "labels": label, "masks": mask} for b, label, mask in zip(boxes, labels, masks, strict=True)]
    crops = [[MaskCrop(0, 0, mask.numpy()) for mask in image] for image in masks]
    images = ImageBatch(pixels, torch.tensor([[HEIGHT, WIDTH]] * 2), torch.arange(2))
    dense_boxes, dense_labels = torch.zeros(2, 3, 4), torch.full((2, 3), -1)
    for index in range(2):
        dense_boxes[index, : len(boxes[index])] = boxes[index]
        dense_labels[index, : len(boxes[index])] = labels[index]
    tables = tabulate(crops, [AxisAlignedMap()] * 2, 3)
    return pixels, theirs, images, Targets(dense_boxes, dense_labels, tables, dense_labels > 0)


def disc(box: Tensor) -> Tensor:
    """Return the full-size mask of the ellipse inscribed in a box."""
    x1, y1, x2, y2 = box.tolist()
    y, x = torch.meshgrid(torch.arange(HEIGHT) + 0.5, torch.arange(WIDTH) + 0.5, indexing="ij")
    inside = ((x - (x1 + x2) / 2) / (x2 - x1) * 2) ** 2 + ((y - (y1 + y2) / 2) / (y2 - y1) * 2) ** 2 <= 1
    return inside.to(torch.uint8)


def test_features_agree(models, scene) -> None:
    (theirs, ours), (pixels, _, images, _) = models, scene
    batch, _ = theirs.transform(list(pixels / 255))
    torch.testing.assert_close(ours.pixels(images), batch.tensors, atol=1e-5, rtol=1e-5)
    features = ours.features(images)
    for level, expected in zip(features, theirs.backbone(batch.tensors).values(), strict=True):
        torch.testing.assert_close(level, expected, atol=1e-4, rtol=1e-4)


def test_proposals_agree(models, scene) -> None:
    (theirs, ours), (pixels, _, images, _) = models, scene
    batch, _ = theirs.transform(list(pixels / 255))
    with torch.no_grad():
        expected, _ = theirs.rpn(batch, theirs.backbone(batch.tensors))
        proposals = ours.rpn.propose(ours.features(images), images.sizes, ours.rpn.inference_counts)
    for index in range(2):
        boxes = proposals.boxes[index][proposals.valid[index]]
        assert len(boxes) == len(expected[index]) == AFTER_NMS
        # Scores may be tied, so the order is not compared: each box has a counterpart.
        distance = torch.cdist(boxes, expected[index], p=torch.inf)
        assert distance.amin(dim=0).max() < 1e-3
        assert distance.amin(dim=1).max() < 1e-3


def test_all_five_losses_agree(models, scene) -> None:
    (theirs, ours), (pixels, targets, images, dense) = training(models), scene
    expected = theirs(list(pixels / 255), [dict(target) for target in targets])
    losses = ours(images, dense)
    names = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask")
    for loss, name in zip(losses, names, strict=True):
        torch.testing.assert_close(
            loss, expected[name], atol=1e-4, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("models", ["v1"], indirect=True)
def test_gradients_agree(models, scene) -> None:
    (theirs, ours), (pixels, targets, images, dense) = training(models), scene
    sum(theirs(list(pixels / 255), [dict(target) for target in targets]).values()).backward()
    ours(images, dense).total.backward()
    for their_layer, our_layer in [
        (theirs.rpn.head.conv[0][0], ours.rpn.head.conv),  # evaluated only at the sampled anchors in our model
        (theirs.backbone.fpn.inner_blocks[0][0], ours.neck.lateral[0].conv),
        (theirs.backbone.body.layer2[0].conv1, ours.backbone.layer2[0].conv1),
        (theirs.roi_heads.mask_predictor.conv5_mask, ours.mask_head.upsample),
    ]:
        expected = their_layer.weight.grad
        scale = expected.abs().max()
        torch.testing.assert_close(our_layer.weight.grad / scale, expected / scale, atol=1e-3, rtol=0)


def test_detections_agree(models, scene) -> None:
    (theirs, ours), (pixels, _, images, _) = models, scene
    with torch.no_grad():
        expected = theirs(list(pixels / 255))
    detections = ours.detect(images)
    for index in range(2):
        count = len(expected[index]["boxes"])
        assert int(detections.valid[index].sum()) == count > 10
        torch.testing.assert_close(detections.scores[index, :count], expected[index]["scores"], atol=1e-4, rtol=1e-4)
        assert torch.equal(detections.labels[index, :count], expected[index]["labels"])
        torch.testing.assert_close(detections.boxes[index, :count], expected[index]["boxes"], atol=1e-3, rtol=1e-4)
        pasted = paste_probabilities(
            detections.masks[index, :count], detections.boxes[index, :count], HEIGHT, WIDTH, convention="torchvision"
        )
        torch.testing.assert_close(pasted, expected[index]["masks"][:, 0], atol=1e-4, rtol=1e-4)
