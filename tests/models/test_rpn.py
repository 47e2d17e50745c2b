"""RPN: outputs at sampled anchors, proposals, losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from maskrcnn.models.losses import RPNLosses
from maskrcnn.models.rpn import RPN, ProposalCounts, RPNConfig
from maskrcnn.models.rpn_head import gathered_outputs, sampled_outputs
from maskrcnn.ops.mask_tables import tabulate
from maskrcnn.structures import AxisAlignedMap, ImageBatch, MaskCrop, Targets

SIZES = ((8, 12), (4, 6))  # height and width of the two levels
STRIDES = (8, 16)


def rpn(**settings: object) -> RPN:
    torch.manual_seed(0)
    config = RPNConfig.model_validate({"anchor_sizes": [[16, 24], [32, 48]], "batch_size_per_image": 20, **settings})
    return config.build(channels=16, strides=STRIDES, normalizer="image")


def losses_of(network: RPN, maps: list[Tensor], objects: Targets, seeds: list[int]) -> RPNLosses:
    images = ImageBatch(torch.zeros(len(seeds), 3, 64, 96), torch.tensor([[64, 96]] * len(seeds)), torch.tensor(seeds))
    _, losses = network(maps, images, objects)
    return losses


def features(batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(batch, 16, height, width, generator=generator) for height, width in SIZES]
    return [level.to(memory_format=torch.channels_last).requires_grad_() for level in maps]


def targets(boxes: list[list[list[float]]], labels: list[list[int]]) -> Targets:
    crops = [[MaskCrop(0, 0, np.ones((2, 2), np.uint8)) for _ in image] for image in boxes]
    tables = tabulate(crops, [AxisAlignedMap()] * len(boxes), len(boxes[0]))
    return Targets(torch.tensor(boxes), torch.tensor(labels), tables, torch.tensor(labels) > 0)


def test_sampled_outputs_equal_forward_at_the_sampled_anchors() -> None:
    head, dense_maps, sparse_maps = rpn().head, features(), features()
    num_anchors = sum(height * width * 6 for height, width in SIZES)
    indices = torch.randint(0, num_anchors, (2, 50))
    indices[0, :4] = torch.tensor([0, 8 * 12 * 6 - 1, 8 * 12 * 6, num_anchors - 1])  # corners of both maps

    logits, deltas = gathered_outputs([head(level) for level in dense_maps], indices)
    sampled_logits, sampled_deltas = sampled_outputs(head, sparse_maps, indices)
    torch.testing.assert_close(sampled_logits, logits)
    torch.testing.assert_close(sampled_deltas, deltas)

    weight = torch.randn(2, 50)
    dense = torch.autograd.grad((logits * weight).sum() + deltas.square().sum(), [*dense_maps, *head.parameters()])
    sparse = torch.autograd.grad(
        (sampled_logits * weight).sum() + sampled_deltas.square().sum(), [*sparse_maps, *head.parameters()]
    )
    for gradient, expected in zip(sparse, dense, strict=True):
        torch.testing.assert_close(gradient, expected)


def test_sparse_and_dense_loss_are_equal_and_have_equal_gradients() -> None:
    objects = targets([[[0.0, 0, 30, 40], [50, 10, 90, 60]], [[8.0, 8, 40, 30], [0, 0, 0, 0]]], [[1, 2], [3, -1]])
    images = ImageBatch(torch.zeros(2, 3, 64, 96), torch.tensor([[64, 96], [60, 80]]), torch.tensor([5, 6]))
    results = []
    for sparse_loss in (True, False):
        network, maps = rpn(sparse_loss=sparse_loss), features()
        proposals, losses = network(maps, images, objects)
        assert all(loss > 0 for loss in losses)
        assert not proposals.boxes.requires_grad
        gradients = torch.autograd.grad(
            losses.loss_objectness + 2 * losses.loss_rpn_box_reg, [*maps, *network.parameters()]
        )
        results.append([proposals.boxes, proposals.scores, *losses, *gradients])
    for sparse, dense in zip(*results, strict=True):
        torch.testing.assert_close(sparse, dense)


def test_more_than_one_convolution_trains_the_dense_head() -> None:
    network, maps = rpn(conv_depth=3), features()
    assert len(network.head.more_convs) == 2
    objects = targets([[[0.0, 0, 30, 40]], [[8.0, 8, 40, 30]]], [[1], [3]])
    losses = losses_of(network, maps, objects, [5, 6])
    sum(losses).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())
    assert maps[0].grad is not None


def test_proposals_are_inside_the_image_sorted_and_of_fixed_size() -> None:
    sizes = torch.tensor([[64, 96], [40, 50]])
    proposals = rpn().propose(features(), sizes, ProposalCounts(pre_nms_top_n=100, post_nms_top_n=80))
    assert proposals.boxes.shape == (2, 80, 4)
    assert (proposals.scores.diff(dim=1)[proposals.valid[:, 1:]] <= 0).all()
    for image in range(2):
        boxes = proposals.boxes[image][proposals.valid[image]]
        height, width = sizes[image].tolist()
        assert len(boxes) > 0
        assert boxes.min() >= 0
        assert boxes[:, 2].max() <= width
        assert boxes[:, 3].max() <= height


def test_losses_of_two_images_are_the_mean_of_each_alone() -> None:
    network, maps = rpn(), features()
    both = targets([[[0.0, 0, 30, 40], [50, 10, 90, 60]], [[8.0, 8, 40, 30], [0, 0, 0, 0]]], [[1, 2], [3, -1]])
    together = losses_of(network, maps, both, [5, 6])
    alone = []
    for image in range(2):
        own = slice(image, image + 1)
        single = Targets(both.boxes[own], both.labels[own], both.masks, both.has_mask[own])
        alone.append(losses_of(network, [level[image : image + 1] for level in maps], single, [5 + image]))
    for term, first, second in zip(together, *alone, strict=True):
        torch.testing.assert_close(term, (first + second) / 2)


def test_an_image_without_objects_has_no_box_loss_and_all_parameters_get_gradients() -> None:
    network, maps = rpn(), features(1)
    losses = losses_of(network, maps, targets([[[0.0, 0, 0, 0]]], [[-1]]), [0])
    assert losses.loss_rpn_box_reg == 0
    assert losses.loss_objectness > 0
    sum(losses).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_the_objectness_loss_by_hand() -> None:
    network, maps = rpn(batch_size_per_image=100000), features(1)
    torch.nn.init.zeros_(network.head.objectness_logits.weight)
    torch.nn.init.constant_(network.head.objectness_logits.bias, 1.0)
    losses = losses_of(network, maps, targets([[[0.0, 0, 0, 0]]], [[-1]]), [0])
    # Every anchor is background and has logit 1: -log(1 - sigmoid(1)) = log(1 + e) each.
    assert losses.loss_objectness.item() == pytest.approx(1.3132617, rel=1e-4)


def test_levels_must_have_equally_many_anchors() -> None:
    with pytest.raises(ValueError, match="equally many sizes"):
        RPNConfig(anchor_sizes=((32,), (64, 128)))
