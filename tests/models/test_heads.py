"""Box head and mask head, their losses, sampling of RoIs, and selection of detections."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from maskrcnn.engine.checkpoint import load_weights
from maskrcnn.models.box_head import (
    BoxHead,
    BoxOutputs,
    ConvFCTrunkConfig,
    FCTrunkConfig,
    MeanTrunkConfig,
    VGGFullyConnected,
)
from maskrcnn.models.losses import BoxLosses, box_head_losses, box_regression_loss, mask_loss, sample_mean
from maskrcnn.models.mask_head import FCNMaskHeadConfig, MaskHead, MaskOutputs, MLPMaskHeadConfig
from maskrcnn.models.necks.fpn import FPNConfig
from maskrcnn.models.selection import DetectionConfig, DetectionSelector, RegionSampler
from maskrcnn.ops.boxes import decode_deltas, encode_deltas
from maskrcnn.ops.mask_tables import tabulate
from maskrcnn.structures import AxisAlignedMap, ClassTable, Detections, MaskCrop, Proposals, Targets

K = 5
M = 14  # side of a mask
WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def box_head(trunk: nn.Module, features: int) -> BoxHead:
    return BoxHead(trunk=trunk, features=features, num_classes=K)


def box_losses(
    outputs: BoxOutputs, *, labels: Tensor, boxes: Tensor, objects: Tensor, images: Tensor, batch: int
) -> BoxLosses:
    target_deltas = encode_deltas(objects, boxes, weights=WEIGHTS)
    return box_head_losses(outputs, labels, target_deltas, images=images, batch=batch, beta=0.0, per="image")


# The mean of losses.


def test_the_mean_by_hand() -> None:
    values, images = torch.tensor([1.0, 2, 3, 10]), torch.tensor([0, 0, 0, 1])
    counts = torch.tensor([3, 1])
    assert sample_mean(values, images, counts, per="image") == (2 + 10) / 2
    assert sample_mean(values, images, counts, per="batch") == 16 / 4
    # Counts may exceed the number of values: negatives have no box loss, but they count as samples.
    counts = torch.tensor([6, 4])
    assert sample_mean(values, images, counts, per="image") == (1 + 2.5) / 2
    assert sample_mean(values, images, counts, per="batch") == pytest.approx(1.6)


@pytest.mark.parametrize("per", ["image", "batch"])
def test_the_mean_of_nothing_is_zero(per: Any) -> None:
    nothing = torch.zeros(0, requires_grad=True)
    mean = sample_mean(nothing, torch.zeros(0, dtype=torch.int64), torch.tensor([0, 0]), per=per)
    assert mean == 0
    mean.backward()  # the result is part of the autograd graph


def test_an_image_without_samples_counts_in_the_mean_over_images() -> None:
    mean = sample_mean(torch.tensor([4.0]), torch.tensor([1]), torch.tensor([0, 1]), per="image")
    assert mean == 2.0  # the mean with the 0 that it would have in its own batch


@pytest.mark.parametrize(("beta", "expected"), [(0.0, 1.0 + 0.25 + 3.0), (1.0, 0.5 + 0.5 * 0.25**2 + 2.5)])
def test_smooth_l1_by_hand(beta: float, expected: float) -> None:
    loss = box_regression_loss(torch.tensor([[1.0, 0.25, 0, -3]]), torch.zeros(1, 4), beta=beta)
    assert loss.tolist() == [pytest.approx(expected)]


# The box head.


def test_box_losses_by_hand() -> None:
    head = box_head(nn.Flatten(), 1)
    nn.init.zeros_(head.cls_score.weight)
    nn.init.zeros_(head.bbox_pred.weight)
    with torch.no_grad():
        head.cls_score.bias.copy_(torch.tensor([1.0, 0, 2, 0, 0, 0]))
        head.bbox_pred.bias.copy_(torch.arange(20.0))
    regions = torch.zeros(4, 1, 1, 1)
    boxes = torch.tensor([[0.0, 0, 10, 20]]).expand(4, 4)
    objects = torch.tensor([[1.0, 0, 11, 20], [0, 0, 20, 20], [0, 0, 0, 0], [0, 0, 0, 0]])
    images = torch.tensor([0, 0, 0, 1])
    losses = box_losses(
        head(regions), labels=torch.tensor([2, 1, 0, 0]), boxes=boxes, objects=objects, images=images, batch=2
    )
    total = math.e + math.e**2 + 4
    cross_entropies = [math.log(total) - logit for logit in (2.0, 0, 1, 1)]
    assert losses.loss_classifier.item() == pytest.approx((sum(cross_entropies[:3]) / 3 + cross_entropies[3]) / 2)
    # Class 2 predicts (4, 5, 6, 7), its targets are 10 * (1 / 10, 0) and zeros; class 1 predicts (0, 1, 2, 3), its
    # targets are 10 * (5 / 10, 0) and 5 * (log 2, 0). Image 0 has three samples, image 1 has one, without a box.
    first = 3 + 5 + 6 + 7
    second = 5 + 1 + abs(5 * math.log(2) - 2) + 3
    assert losses.loss_box_reg.item() == pytest.approx((first + second) / 3 / 2)


def test_the_deltas_of_other_classes_get_no_gradient() -> None:
    head = box_head(nn.Flatten(), 3)
    outputs = head(torch.randn(2, 3, 1, 1))
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 5, 30, 20]])
    losses = box_losses(
        outputs,
        labels=torch.tensor([2, 0]),
        boxes=boxes,
        objects=boxes + 3,
        images=torch.zeros(2, dtype=torch.int64),
        batch=1,
    )
    (gradient,) = torch.autograd.grad(losses.loss_box_reg, outputs.box_deltas)
    assert gradient[0, 1].all()
    gradient[0, 1] = 0
    assert not gradient.any()


def test_each_class_has_four_rows_of_deltas() -> None:
    head = box_head(nn.Flatten(), 2)
    outputs = head(torch.randn(3, 2, 1, 1))
    assert outputs.class_logits.shape == (3, K + 1)
    assert outputs.box_deltas.shape == (3, K, 4)
    # Rows 4 k to 4 k + 3 of the layer belong to class k + 1: loading a checkpoint with other classes relies on it.
    (gradient,) = torch.autograd.grad(outputs.box_deltas[:, 2].sum(), head.bbox_pred.bias)
    assert gradient.nonzero()[:, 0].tolist() == [8, 9, 10, 11]


@pytest.mark.parametrize(
    ("trunk", "features"),
    [
        (lambda: FCTrunkConfig(width=16, depth=1).build(channels=4, side=7), 16),
        (lambda: FCTrunkConfig(width=16, depth=3).build(channels=4, side=7), 16),
        (lambda: ConvFCTrunkConfig(convs=2, conv_width=8, width=16).build(channels=4, side=7), 16),
        (lambda: ConvFCTrunkConfig(convs=1, conv_width=8, norm="bn", width=16).build(channels=4, side=7), 16),
        (lambda: ConvFCTrunkConfig(convs=1, conv_width=32, norm="gn", width=16).build(channels=4, side=7), 16),
        (lambda: MeanTrunkConfig().build(channels=4, side=7), 4),
        (lambda: VGGFullyConnected(4 * 49, width=32), 32),
    ],
)
def test_trunks_return_the_stated_number_of_features(trunk: Any, features: int) -> None:
    head = box_head(trunk(), features)
    assert head.trunk(torch.randn(3, 4, 7, 7)).shape == (3, features)
    outputs = head(torch.zeros(0, 4, 7, 7))
    assert outputs.class_logits.shape == (0, K + 1)
    losses = box_losses(
        outputs,
        labels=torch.zeros(0, dtype=torch.int64),
        boxes=torch.zeros(0, 4),
        objects=torch.zeros(0, 4),
        images=torch.zeros(0, dtype=torch.int64),
        batch=2,
    )
    assert losses == (0, 0)
    sum(losses).backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


@pytest.mark.parametrize("config", [ConvFCTrunkConfig, FCNMaskHeadConfig, FPNConfig])
def test_group_norm_needs_a_multiple_of_its_groups(config: Any) -> None:
    width = {ConvFCTrunkConfig: "conv_width", FCNMaskHeadConfig: "width", FPNConfig: "channels"}[config]
    with pytest.raises(ValidationError, match="needs a multiple of 32 channels, not 48"):
        config.model_validate({"norm": "gn", width: 48})


def test_a_norm_follows_each_convolution_of_a_mask_head() -> None:
    head = FCNMaskHeadConfig(depth=2, width=32, norm="gn").build(channels=4, side=7, num_classes=2)
    names = {f"{name}s.{index}.weight" for index in (0, 1) for name in ("conv", "norm")}
    assert names < head.state_dict().keys()
    assert "convs.0.bias" not in head.state_dict()
    assert head.all_masks(torch.zeros(3, 4, 7, 7)).shape == (3, 2, 14, 14)


def test_vggs_layers_have_torchvisions_numbers() -> None:
    names = VGGFullyConnected(8, width=4).state_dict().keys()
    assert names == {"classifier.0.weight", "classifier.0.bias", "classifier.3.weight", "classifier.3.bias"}


# The mask head.

BRANCHES = {
    "fcn": FCNMaskHeadConfig(depth=2, width=8),
    "fcn without convolutions": FCNMaskHeadConfig(depth=0, width=8),
    "mlp of one": MLPMaskHeadConfig(depth=1, width=8, mask_size=M),
    "mlp of two": MLPMaskHeadConfig(depth=2, width=8, mask_size=M),
}
each_branch = pytest.mark.parametrize("branch", BRANCHES)
each_output = pytest.mark.parametrize("output", ["sigmoid", "softmax"])
for_each_or_for_all = pytest.mark.parametrize("class_agnostic", [False, True], ids=["each class", "all classes"])


def mask_head(branch: str = "fcn", *, output: str = "sigmoid", class_agnostic: bool = False) -> MaskHead:
    config = BRANCHES[branch].model_copy(update={"output": output, "class_agnostic": class_agnostic})
    head = config.build(channels=6, side=7, num_classes=K)
    nn.init.normal_(head.logits.weight)  # the initial logits are nearly 0
    nn.init.normal_(head.logits.bias)
    return head


def regions_of(labels: Tensor) -> Tensor:
    return torch.randn(len(labels), 6, 7, 7, requires_grad=True)


def every(count: int) -> Tensor:
    return torch.ones(count, dtype=torch.bool)


def loss_of_one_image(head: MaskHead, regions: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Return the mask loss of regions that belong to one image."""
    return mask_loss(
        head(regions, labels),
        targets,
        positive=labels > 0,
        images=torch.zeros_like(labels),
        batch=1,
        per="image",
    )


def slow_mask(logits: list[float], label: int, head: MaskHead) -> tuple[float, float]:
    """Return the log probabilities of inside and outside for one cell, from its logits in all channels."""
    if head.output == "sigmoid":
        logit = logits[0 if head.class_agnostic else label - 1]
        return -math.log1p(math.exp(-logit)), -math.log1p(math.exp(logit))
    total = math.log(sum(math.exp(logit) for logit in logits))
    return logits[1 if head.class_agnostic else label] - total, logits[0] - total


@each_branch
@each_output
@for_each_or_for_all
def test_masks_equal_a_loop_over_cells(branch: str, output: str, class_agnostic: bool) -> None:
    head = mask_head(branch, output=output, class_agnostic=class_agnostic)
    labels = torch.tensor([1, K, 3])
    regions, mask_targets = regions_of(labels), torch.rand(3, M, M)
    logits = head.all_masks(regions)
    outputs = head(regions, labels)
    assert logits.shape == (3, (1 if class_agnostic else K) + (output == "softmax"), M, M)
    assert outputs.inside.shape == outputs.outside.shape == head.probabilities(regions, labels).shape == (3, M, M)
    assert head.mask_size == M

    expected = torch.tensor(
        [
            [[slow_mask(cell, label, head) for cell in row] for row in mask]
            for mask, label in zip(logits.permute(0, 2, 3, 1).tolist(), labels.tolist(), strict=True)
        ]
    )
    torch.testing.assert_close(torch.stack(outputs, dim=-1), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.probabilities(regions, labels), expected[..., 0].exp(), rtol=1e-4, atol=1e-5)
    losses = -(mask_targets * expected[..., 0] + (1 - mask_targets) * expected[..., 1])
    torch.testing.assert_close(
        loss_of_one_image(head, regions, labels, mask_targets), losses.mean(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("depth", [1, 2])
def test_an_mlp_by_hand(depth: int) -> None:
    """One cell of one channel is 3. Each hidden layer outputs 2 x and -2 x, and its ReLU sets the latter to 0."""
    config = MLPMaskHeadConfig(depth=depth, width=2, mask_size=2)
    head = config.build(channels=2, side=2, num_classes=2)
    regions = torch.zeros(1, 2, 2, 2)
    regions[0, 1, 0, 1] = 3.0
    with torch.no_grad():
        for index, layer in enumerate(head.hidden):
            layer.weight.zero_()
            layer.weight[:, 5 if index == 0 else 0] = torch.tensor([2.0, -2.0])  # cell (0, 1) of channel 1
        head.logits.weight.copy_(torch.tensor([[1.0, 100.0]]) * torch.arange(8.0)[:, None])
    value = 3 * 2.0**depth
    assert head.all_masks(regions).tolist() == [
        [[[0, value], [2 * value, 3 * value]], [[4 * value, 5 * value], [6 * value, 7 * value]]]
    ]


@each_branch
def test_own_masks_equal_the_selected_channels_of_all_masks(branch: str) -> None:
    head, labels = mask_head(branch), torch.tensor([1, K, 3, 3])
    regions = regions_of(labels)
    own_masks = head.own_masks(regions, labels - 1)
    expected = head.all_masks(regions)[torch.arange(4), labels - 1]
    torch.testing.assert_close(own_masks, expected)

    weight = torch.randn(4, M, M)
    inputs = [regions, *head.parameters()]
    gradients, expected_gradients = (
        torch.autograd.grad((masks * weight).sum(), inputs) for masks in (own_masks, expected)
    )
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient)


def channels_with_gradient(head: MaskHead, labels: Tensor) -> list[int]:
    """Return the logit channels with a gradient from the loss of regions with these labels."""
    loss_of_one_image(head, regions_of(labels), labels, torch.rand(len(labels), M, M).round()).backward()
    weight, bias = head.logits.weight.grad, head.logits.bias.grad
    assert weight is not None
    assert bias is not None
    by_weight, by_bias = (gradient.reshape(head.channels, -1).any(dim=1) for gradient in (weight, bias))
    assert torch.equal(by_weight, by_bias)
    return by_bias.nonzero()[:, 0].tolist()


@each_branch
def test_with_sigmoid_masks_of_different_classes_do_not_compete(branch: str) -> None:
    """The loss of a region of class 3 has a gradient only in the rows of class 3."""
    assert channels_with_gradient(mask_head(branch), torch.tensor([3, 3])) == [2]


@each_branch
def test_with_softmax_all_classes_compete(branch: str) -> None:
    assert channels_with_gradient(mask_head(branch, output="softmax"), torch.tensor([3, 3])) == list(range(K + 1))


@each_branch
@each_output
def test_masks_depend_on_the_logits_of_other_classes_only_with_softmax(branch: str, output: str) -> None:
    head, labels = mask_head(branch, output=output), torch.tensor([1, 4])
    regions = regions_of(labels)
    before = head.probabilities(regions, labels)
    # With softmax, channel 0 is background.
    other_channels = [channel + (output == "softmax") for channel in (1, 2, 4)]
    with torch.no_grad():
        head.logits.bias.view(head.channels, -1)[other_channels] += 5
    after = head.probabilities(regions, labels)
    if output == "sigmoid":
        assert torch.equal(after, before)
    else:
        assert (after < before).all()


@each_branch
@each_output
def test_class_agnostic_masks_do_not_depend_on_the_label(branch: str, output: str) -> None:
    head, labels = mask_head(branch, output=output, class_agnostic=True), torch.tensor([1, 4])
    regions = regions_of(labels)
    one, other = head(regions, labels), head(regions, labels.flip(0))
    assert torch.equal(one.inside, other.inside)
    assert torch.equal(one.outside, other.outside)


@each_branch
def test_softmax_probabilities_of_classes_and_background_sum_to_one(branch: str) -> None:
    head = mask_head(branch, output="softmax")
    region = torch.randn(1, 6, 7, 7)
    labels = torch.arange(1, K + 1)
    outputs = head(region.expand(K, -1, -1, -1), labels)
    torch.testing.assert_close(outputs.inside.exp().sum(dim=0) + outputs.outside[0].exp(), torch.ones(M, M))


@each_branch
def test_softmax_between_two_is_a_sigmoid_of_their_difference(branch: str) -> None:
    """With one class both formulations are equivalent: p = e^a / (e^a + e^b) = sigmoid(a - b)."""
    softmax = mask_head(branch, output="softmax", class_agnostic=True)
    sigmoid = mask_head(branch, output="sigmoid", class_agnostic=True)
    state = softmax.state_dict()
    for name in ("logits.weight", "logits.bias"):
        background, foreground = state[name].unflatten(0, (2, -1))
        state[name] = foreground - background
    sigmoid.load_state_dict(state)
    labels, mask_targets = torch.tensor([2, 5]), torch.rand(2, M, M)
    regions = regions_of(labels)
    torch.testing.assert_close(softmax.probabilities(regions, labels), sigmoid.probabilities(regions, labels))
    losses = [loss_of_one_image(head, regions, labels, mask_targets) for head in (softmax, sigmoid)]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, regions)[0] for loss in losses))


@each_output
def test_the_mask_loss_by_hand(output: str) -> None:
    """The logit of class 1, 2, 3 is 0, 1, 2; the logits of the other classes and background are 0."""
    head = mask_head(output=output)
    nn.init.zeros_(head.logits.weight)
    class_logits = torch.tensor([0.0, 1, 2, 0, 0])
    with torch.no_grad():
        head.logits.bias.copy_(class_logits if output == "sigmoid" else torch.cat((torch.zeros(1), class_logits)))
    mask_targets = torch.ones(3, M, M)
    mask_targets[1, : M // 2] = 0
    labels = torch.tensor([1, 2, 3])
    outputs = head(regions_of(labels), labels)
    loss = mask_loss(outputs, mask_targets, positive=every(3), images=torch.tensor([0, 0, 1]), batch=2, per="image")
    if output == "sigmoid":
        inside = [math.log1p(math.exp(-logit)) for logit in (0, 1, 2)]
        outside = math.log1p(math.e)
    else:
        total = math.log(4 + math.e + math.e**2)
        inside = [total - logit for logit in (0, 1, 2)]
        outside = total
    second = (inside[1] + outside) / 2  # half the cells are background
    assert loss.item() == pytest.approx(((inside[0] + second) / 2 + inside[2]) / 2)


def test_a_fractional_target_weights_both_losses() -> None:
    outputs = MaskOutputs(torch.tensor([[[-1.0, -2.0]]]), torch.tensor([[[-3.0, -5.0]]]))
    loss = mask_loss(
        outputs,
        torch.tensor([[[0.25, 1.0]]]),
        positive=every(1),
        images=torch.tensor([0]),
        batch=1,
        per="image",
    )
    assert loss == (0.25 * 1 + 0.75 * 3 + 2) / 2


def test_regions_without_an_object_do_not_count_in_the_mask_loss() -> None:
    inside = torch.tensor([[[-1.0]], [[-7.0]], [[-2.0]]], requires_grad=True)
    outputs = MaskOutputs(inside, inside.detach())
    positive, images = torch.tensor([True, False, True]), torch.tensor([0, 0, 1])
    loss = mask_loss(outputs, torch.ones(3, 1, 1), positive=positive, images=images, batch=2, per="image")
    assert loss == 1.5
    loss.backward()
    assert inside.grad is not None
    assert inside.grad.flatten().tolist() == [-0.5, 0.0, -0.5]


def test_padding_does_not_count_in_the_losses_of_the_box_head() -> None:
    outputs = BoxOutputs(torch.randn(4, 6), torch.randn(4, 5, 4))
    labels, images, deltas = torch.tensor([2, 0, -1, 5]), torch.tensor([0, 0, 0, 1]), torch.randn(4, 4)
    used = labels >= 0
    padded = box_head_losses(outputs, labels, deltas, images=images, batch=2, beta=0.0, per="image")
    without = BoxOutputs(*(values[used] for values in outputs))
    expected = box_head_losses(without, labels[used], deltas[used], images=images[used], batch=2, beta=0.0, per="image")
    assert padded == expected


@each_output
def test_a_certain_mask_has_a_finite_loss(output: str) -> None:
    head, labels = mask_head(output=output), torch.tensor([1, 2])
    with torch.no_grad():
        head.logits.weight.zero_()
        head.logits.bias.copy_(torch.linspace(-1e4, 1e4, head.channels))
    loss = loss_of_one_image(head, regions_of(labels), labels, torch.tensor([0.0, 1]).view(2, 1, 1).expand(2, M, M))
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in head.parameters())


@each_branch
@each_output
@for_each_or_for_all
def test_without_regions_the_loss_is_zero_and_gradients_exist(branch: str, output: str, class_agnostic: bool) -> None:
    head, labels = mask_head(branch, output=output, class_agnostic=class_agnostic), torch.zeros(0, dtype=torch.int64)
    regions, mask_targets = torch.zeros(0, 6, 7, 7), torch.zeros(0, M, M)
    assert head.probabilities(regions, labels).shape == (0, M, M)
    loss = mask_loss(
        head(regions, labels), mask_targets, positive=every(len(labels)), images=labels, batch=2, per="image"
    )
    assert loss == 0
    loss.backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in head.parameters())


@each_branch
@each_output
def test_mask_logits_in_bfloat16_have_a_loss_in_float32(branch: str, output: str) -> None:
    head, labels = mask_head(branch, output=output), torch.tensor([1, 2])
    regions, mask_targets = regions_of(labels), torch.rand(2, M, M)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head.all_masks(regions).dtype == torch.bfloat16
        loss = loss_of_one_image(head, regions, labels, mask_targets)
        assert loss.dtype == head.probabilities(regions, labels).dtype == torch.float32
    torch.testing.assert_close(loss, loss_of_one_image(head, regions, labels, mask_targets), rtol=0.05, atol=0.0)


@each_branch
@each_output
def test_loading_weights_matches_mask_channels_by_class_name(branch: str, output: str) -> None:
    head, source = mask_head(branch, output=output), mask_head(branch, output=output)
    regions = torch.randn(2, 6, 7, 7)
    # Both heads differ only in their last layer.
    head.load_state_dict({**source.state_dict(), "logits.weight": head.logits.weight, "logits.bias": head.logits.bias})
    before, from_source = head.all_masks(regions).unbind(1), source.all_masks(regions).unbind(1)
    old = ClassTable(names=("cat", "dog", "owl", "fox", "hen"), category_ids=(1, 2, 3, 4, 5))
    new = ClassTable(names=("owl", "elk", "dog", "emu", "cat"), category_ids=(1, 2, 3, 4, 5))
    load_weights(head, source.state_dict(), source="old.pt", source_classes=old, classes=new)

    after = head.all_masks(regions).unbind(1)
    if output == "softmax":  # the background channel is loaded, too
        assert torch.equal(after[0], from_source[0])
        before, from_source, after = before[1:], from_source[1:], after[1:]
    owl, elk, dog, emu, cat = after
    assert all(torch.equal(mask, from_source[index]) for mask, index in ((owl, 2), (dog, 1), (cat, 0)))
    assert all(torch.equal(mask, before[index]) for mask, index in ((elk, 1), (emu, 3)))


@each_branch
@each_output
def test_class_agnostic_heads_have_no_class_rows(branch: str, output: str) -> None:
    assert not mask_head(branch, output=output, class_agnostic=True).class_rows()


# Sampling of RoIs.


def targets(boxes: list[list[list[float]]], labels: list[list[int]]) -> Targets:
    crops = [[MaskCrop(0, 0, np.ones((2, 2), np.uint8)) for _ in image] for image in boxes]
    tables = tabulate(crops, [AxisAlignedMap()] * len(boxes), len(boxes[0]))
    return Targets(torch.tensor(boxes), torch.tensor(labels), tables, torch.tensor(labels) > 0)


def proposals(*images: list[list[float]]) -> Proposals:
    boxes = torch.tensor(images)
    return Proposals(boxes, torch.zeros(boxes.shape[:2]))


def sampler(count: int, positive_fraction: float = 0.5) -> RegionSampler:
    return RegionSampler(batch_size_per_image=count, positive_fraction=positive_fraction, foreground=0.5)


OBJECTS = targets([[[0.0, 0, 10, 10], [20, 20, 60, 60]]], [[3, 1]])


def test_ground_truth_boxes_are_added_to_the_proposals() -> None:
    far = [100.0, 100, 110, 110]
    samples = sampler(8, positive_fraction=0.75)(proposals([far, far]), OBJECTS, torch.tensor([0]))
    assert samples.labels.tolist()[0][4:] == [-1] * 4  # two positives, two negatives, no more boxes
    positives = {
        (tuple(box), label, index)
        for box, label, index in zip(
            samples.boxes[0, :2].tolist(), samples.labels[0, :2].tolist(), samples.matched[0, :2].tolist(), strict=True
        )
    }
    assert positives == {((0, 0, 10, 10), 3, 0), ((20, 20, 60, 60), 1, 1)}
    assert samples.labels[0, 2:4].tolist() == [0, 0]
    assert samples.boxes[0, 2:4].tolist() == [far, far]


def test_positives_come_first_and_are_limited_to_the_positive_fraction() -> None:
    near = [[20.0 + shift, 20, 60 + shift, 60] for shift in range(6)]
    far = [[100.0 + shift, 100, 110 + shift, 110] for shift in range(6)]
    sample = sampler(8, positive_fraction=0.25)
    assert sample.max_positives == 2
    for seed in range(5):
        samples = sample(proposals([*far, *near]), OBJECTS, torch.tensor([seed]))
        assert (samples.labels[0, :2] > 0).all()
        assert samples.labels[0, 2:].tolist() == [0] * 6
        assert samples.boxes.shape == (1, 8, 4)


def test_a_proposal_gets_the_class_of_the_object_that_it_overlaps_most() -> None:
    both = targets([[[0.0, 0, 40, 40], [10, 0, 50, 40]]], [[3, 1]])
    samples = sampler(4, positive_fraction=1.0)(proposals([[9.0, 0, 49, 40], [2, 0, 42, 40]]), both, torch.tensor([0]))
    matches = {
        tuple(box): (label, index)
        for box, label, index in zip(
            samples.boxes[0].tolist(), samples.labels[0].tolist(), samples.matched[0].tolist(), strict=True
        )
    }
    assert matches[(9, 0, 49, 40)] == (1, 1)
    assert matches[(2, 0, 42, 40)] == (3, 0)


def test_the_threshold_divides_positives_from_background() -> None:
    one = targets([[[0.0, 0, 10, 10]]], [[2]])
    boxes = [[0.0, 0, 10, 5], [0, 0, 10, 4.9]]  # IoU 0.5 and 0.49
    samples = sampler(4, positive_fraction=1.0)(proposals(boxes), one, torch.tensor([0]))
    assert samples.labels[0].tolist() == [2, 2, 0, -1]
    assert {box[3] for box in samples.boxes[0, :2].tolist()} == {10, 5}
    assert samples.boxes[0, 2, 3].item() == pytest.approx(4.9)


def test_padding_is_never_sampled() -> None:
    no_objects = targets([[[0.0, 0, 0, 0]]], [[-1]])
    padding = Proposals(torch.zeros(1, 3, 4), torch.full((1, 3), -torch.inf))
    samples = sampler(4)(padding, no_objects, torch.tensor([0]))
    assert samples.labels.tolist() == [[-1] * 4]
    assert not samples.valid.any()


def test_regions_inside_a_crowd_are_not_background() -> None:
    crowd = targets([[[0.0, 0, 100, 100]]], [[-1]])
    samples = sampler(4)(proposals([[10.0, 10, 30, 30], [200, 200, 220, 220]]), crowd, torch.tensor([0]))
    assert samples.boxes[samples.valid].tolist() == [[200, 200, 220, 220]]


# Selection of detections.


def selector(**settings: Any) -> DetectionSelector:
    defaults = {"score_threshold": 0.05, "nms_threshold": 0.5, "detections_per_image": 4}
    return DetectionConfig.model_validate(defaults | settings).build(bbox_reg_weights=WEIGHTS)


def logits(*probabilities: list[float]) -> Tensor:
    """Return logits `(1, P, K + 1)` for given probabilities of the first classes; the rest is background."""
    table = torch.full((1, len(probabilities), K + 1), 1e-6)
    for row, values in enumerate(probabilities):
        table[0, row, 1 : len(values) + 1] = torch.tensor(values)
        table[0, row, 0] = 1 - sum(values)
    return table.log()


def zero_deltas(number: int) -> Tensor:
    return torch.zeros(1, number, K, 4)


SIZE = torch.tensor([[100, 200]])


def labels_and_scores(detections: Detections) -> list[tuple[int, float]]:
    """Return label and score of each detection of the first image."""
    valid = detections.valid[0]
    scores = [round(score, 4) for score in detections.scores[0][valid].tolist()]
    return list(zip(detections.labels[0][valid].tolist(), scores, strict=True))


def test_boxes_of_one_class_suppress_each_other_and_no_other_class() -> None:
    candidates = proposals([[10.0, 10, 50, 50], [12, 10, 52, 50], [100, 10, 150, 50]])
    scores = logits([0.6, 0.3], [0.7, 0.2], [0.1, 0.5])
    detections = selector()(candidates, scores, zero_deltas(3), SIZE)
    # Class 1: the second box suppresses the first. Class 2: the first suppresses the second.
    assert labels_and_scores(detections) == [(1, 0.7), (2, 0.5), (2, 0.3), (1, 0.1)]
    assert detections.boxes[0].tolist() == [[12, 10, 52, 50], [100, 10, 150, 50], [10, 10, 50, 50], [100, 10, 150, 50]]
    detections = selector(nms_threshold=1.0, detections_per_image=9)(candidates, scores, zero_deltas(3), SIZE)
    assert labels_and_scores(detections) == [
        (1, 0.7), (1, 0.6), (2, 0.5), (2, 0.3), (2, 0.2), (1, 0.1)
    ]  # fmt: skip


def test_the_best_are_kept_up_to_the_count_and_above_the_threshold() -> None:
    candidates = proposals([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]])
    scores = logits([0.5], [0.3], [0.049])
    assert labels_and_scores(selector()(candidates, scores, zero_deltas(3), SIZE)) == [(1, 0.5), (1, 0.3)]
    assert labels_and_scores(selector(detections_per_image=1)(candidates, scores, zero_deltas(3), SIZE)) == [(1, 0.5)]
    assert labels_and_scores(selector(score_threshold=0.4)(candidates, scores, zero_deltas(3), SIZE)) == [(1, 0.5)]


def test_nms_gets_the_best_candidates_alone() -> None:
    candidates = proposals([[0.0, 0, 10, 10], [0, 0, 10, 9], [40, 0, 50, 10]])
    scores = logits([0.5, 0.2], [0.4], [0.1])
    everything = [(1, 0.5), (2, 0.2), (1, 0.1)]
    for limit, detected in ((15, everything), (4, everything), (3, everything[:2]), (2, everything[:1])):
        result = selector(pre_nms_top_n=limit)(candidates, scores, zero_deltas(3), SIZE)
        assert labels_and_scores(result) == detected


def test_each_class_uses_its_own_deltas() -> None:
    box = torch.tensor([[10.0, 10, 50, 50]])
    expected = torch.tensor([[20.0, 20, 40, 60], [5, 5, 25, 45]])
    deltas = zero_deltas(1)
    deltas[0, 0, :2] = encode_deltas(expected, box, weights=WEIGHTS)
    detections = selector()(proposals(box.tolist()), logits([0.3, 0.6]), deltas, SIZE)
    assert labels_and_scores(detections) == [(2, 0.6), (1, 0.3)]
    torch.testing.assert_close(detections.boxes[0, :2], expected.flip(0))


def test_boxes_are_clipped_to_the_image_without_its_padding() -> None:
    candidates = Proposals(torch.tensor([[[-20.0, 90, 250, 130]]] * 2), torch.zeros(2, 1))
    sizes = torch.tensor([[100, 200], [95, 60]])
    detections = selector()(candidates, logits([0.9]).expand(2, -1, -1), zero_deltas(1).expand(2, -1, -1, -1), sizes)
    assert detections.boxes[:, 0].tolist() == [[0, 90, 200, 100], [0, 90, 60, 95]]


def test_boxes_without_area_after_clipping_are_dropped() -> None:
    candidates = proposals([[210.0, 10, 250, 30], [10, 10, 30, 14]])
    assert labels_and_scores(selector()(candidates, logits([0.9], [0.8]), zero_deltas(2), SIZE)) == [(1, 0.8)]
    assert labels_and_scores(selector(min_size=4.0)(candidates, logits([0.9], [0.8]), zero_deltas(2), SIZE)) == []


def test_missing_detections_are_padding() -> None:
    candidates = Proposals(torch.tensor([[[0.0, 0, 10, 10], [0, 0, 0, 0]]]), torch.tensor([[0.0, -torch.inf]]))
    detections = selector()(candidates, logits([0.9], [0.9]), zero_deltas(2), SIZE)
    assert detections.labels.tolist() == [[1, -1, -1, -1]]
    assert detections.scores[0, 1:].tolist() == [-torch.inf] * 3
    assert not detections.boxes[0, 1:].any()


def test_without_proposals_there_are_no_detections() -> None:
    padding = Proposals(torch.zeros(2, 3, 4), torch.full((2, 3), -torch.inf))
    detections = selector()(padding, torch.zeros(2, 3, K + 1), torch.zeros(2, 3, K, 4), SIZE.expand(2, 2))
    assert detections.boxes.shape == (2, 4, 4)
    assert not detections.valid.any()


def test_scores_are_a_softmax_over_classes_and_background() -> None:
    scores = torch.randn(1, 1, K + 1)
    detections = selector(score_threshold=0.0, detections_per_image=K)(
        proposals([[0.0, 0, 10, 10]]), scores, zero_deltas(1), SIZE
    )
    expected = F.softmax(scores[0, 0], dim=0)[1:].sort(descending=True)
    torch.testing.assert_close(detections.scores[0], expected.values)
    assert detections.labels[0].tolist() == (expected.indices + 1).tolist()


def test_huge_deltas_give_finite_boxes() -> None:
    deltas = torch.full((1, 1, K, 4), 1e4)
    detections = selector()(proposals([[10.0, 10, 50, 50]]), logits([0.9]), deltas, SIZE)
    assert detections.boxes.isfinite().all()
    assert decode_deltas(deltas, torch.tensor([10.0, 10, 50, 50]), weights=WEIGHTS).isfinite().all()
