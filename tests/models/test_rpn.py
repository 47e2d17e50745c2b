"""RPN: outputs at sampled anchors, proposals, losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from maskrcnn.models.rpn import RPN, ProposalCounts, RPNConfig
from maskrcnn.ops.mask_tables import tabulate
from maskrcnn.structures import AxisAlignedMap, MaskCrop, Targets

SIZES = ((8, 12), (4, 6))  # height and width of the two levels
STRIDES = (8, 16)


def rpn(**settings: object) -> RPN:
    torch.manual_seed(0)
    config = RPNConfig.model_validate({"anchor_sizes": [[16, 24], [32, 48]], "batch_size_per_image": 20, **settings})
    return config.build(channels=16, strides=STRIDES, normalizer="image")


def features(batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(batch, 16, height, width, generator=generator) for height, width in SIZES]
    return [level.to(memory_format=torch.channels_last).requires_grad_() for level in maps]


def targets(boxes: list[list[list[float]]], labels: list[list[int]]) -> Targets:
    crops = [[MaskCrop(0, 0, np.ones((2, 2), np.uint8)) for _ in image] for image in boxes]
    return Targets(
        torch.tensor(boxes), torch.tensor(labels), tabulate(crops, [AxisAlignedMap()] * len(boxes), len(boxes[0]))
    )


def test_sampled_outputs_equal_forward_at_the_sampled_anchors() -> None:
    head, dense_maps, sparse_maps = rpn(), features(), features()
    num_anchors = sum(height * width * 6 for height, width in SIZES)
    indices = torch.randint(0, num_anchors, (2, 50))
    indices[0, :4] = torch.tensor([0, 8 * 12 * 6 - 1, 8 * 12 * 6, num_anchors - 1])  # corners of both maps

    outputs = [head(level) for level in dense_maps]
    logits = torch.cat([level_logits for level_logits, _ in outputs], dim=1).gather(1, indices)
    deltas = torch.cat([level_deltas for _, level_deltas in outputs], dim=1).gather(
        1, indices[..., None].expand(-1, -1, 4)
    )
    sampled_logits, sampled_deltas = head.sampled_outputs(sparse_maps, indices)
    torch.testing.assert_close(sampled_logits, logits)
    torch.testing.assert_close(sampled_deltas, deltas)

    weight = torch.randn(2, 50)
    dense = torch.autograd.grad((logits * weight).sum() + deltas.square().sum(), [*dense_maps, *head.parameters()])
    sparse = torch.autograd.grad(
        (sampled_logits * weight).sum() + sampled_deltas.square().sum(), [*sparse_maps, *head.parameters()]
    )
    for gradient, expected in zip(sparse, dense, strict=True):
        torch.testing.assert_close(gradient, expected)


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
    head, maps = rpn(), features()
    both = targets([[[0.0, 0, 30, 40], [50, 10, 90, 60]], [[8.0, 8, 40, 30], [0, 0, 0, 0]]], [[1, 2], [3, -1]])
    together = head.losses(maps, both, torch.tensor([5, 6]))
    alone = []
    for image in range(2):
        single = Targets(both.boxes[image : image + 1], both.labels[image : image + 1], both.masks)
        alone.append(head.losses([level[image : image + 1] for level in maps], single, torch.tensor([5 + image])))
    for term, first, second in zip(together, *alone, strict=True):
        torch.testing.assert_close(term, (first + second) / 2)


def test_an_image_without_objects_has_no_box_loss_and_all_parameters_get_gradients() -> None:
    head, maps = rpn(), features(1)
    losses = head.losses(maps, targets([[[0.0, 0, 0, 0]]], [[-1]]), torch.tensor([0]))
    assert losses.loss_rpn_box_reg == 0
    assert losses.loss_objectness > 0
    sum(losses).backward()
    assert all(parameter.grad is not None for parameter in head.parameters())


def test_the_objectness_loss_by_hand() -> None:
    head, maps = rpn(batch_size_per_image=100000), features(1)
    torch.nn.init.zeros_(head.objectness_logits.weight)
    torch.nn.init.constant_(head.objectness_logits.bias, 1.0)
    losses = head.losses(maps, targets([[[0.0, 0, 0, 0]]], [[-1]]), torch.tensor([0]))
    # Every anchor is background and has logit 1: -log(1 - sigmoid(1)) = log(1 + e) each.
    assert losses.loss_objectness.item() == pytest.approx(1.3132617, rel=1e-4)


def test_levels_must_have_equally_many_anchors() -> None:
    with pytest.raises(ValueError, match="equally many sizes"):
        RPNConfig(anchor_sizes=((32,), (64, 128)))
