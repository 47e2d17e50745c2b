"""Batched NMS."""

from __future__ import annotations

import pytest
import torch

from maskrcnn.ops.boxes import pairwise_iou
from maskrcnn.ops.nms import batched_nms

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
def test_the_better_of_two_overlapping_boxes_is_kept(device: str) -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [1, 0, 11, 10], [20, 0, 30, 10]]], device=device)
    scores = torch.tensor([[0.5, 0.9, 0.1]], device=device)
    indices, kept_scores = batched_nms(
        boxes, scores, torch.zeros(1, 3, dtype=torch.int64, device=device), iou_threshold=0.5, count=3
    )
    assert indices[0, :2].tolist() == [1, 2]
    assert kept_scores[0].tolist() == pytest.approx([0.9, 0.1, -torch.inf])


def test_boxes_of_other_groups_and_images_are_not_suppressed() -> None:
    boxes = torch.tensor([0.0, 0, 10, 10]).expand(2, 3, 4)
    scores = torch.tensor([[0.9, 0.8, 0.7], [0.6, 0.5, 0.4]])
    groups = torch.tensor([[0, 1, 1], [1, 0, 2]])
    _, kept_scores = batched_nms(boxes, scores, groups, iou_threshold=0.5, count=4)
    assert kept_scores[0].tolist() == pytest.approx([0.9, 0.8, -torch.inf, -torch.inf])
    assert kept_scores[1].tolist() == pytest.approx([0.6, 0.5, 0.4, -torch.inf])


@pytest.mark.parametrize("device", DEVICES)
def test_against_a_loop(device: str) -> None:
    corners = torch.rand(2, 60, 2, 2) * 50
    boxes = torch.cat((corners.amin(dim=2), corners.amax(dim=2)), dim=-1)
    scores, groups = torch.rand(2, 60), torch.randint(0, 3, (2, 60))
    scores[0, ::7] = -torch.inf  # padding
    indices, kept_scores = batched_nms(
        boxes.to(device), scores.to(device), groups.to(device), iou_threshold=0.3, count=20
    )
    for b in range(2):
        expected: list[int] = []
        iou = pairwise_iou(boxes[b], boxes[b])
        for i in scores[b].argsort(descending=True).tolist():
            kept_in_group = [j for j in expected if groups[b, j] == groups[b, i]]
            if scores[b, i] > -torch.inf and all(iou[i, j] <= 0.3 for j in kept_in_group):
                expected.append(i)
        kept_indices = indices[b][kept_scores[b] > -torch.inf].tolist()
        assert kept_indices == expected[:20]


def test_no_boxes_and_only_padding() -> None:
    indices, kept_scores = batched_nms(
        torch.zeros(2, 0, 4), torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.int64), iou_threshold=0.5, count=3
    )
    assert indices.shape == (2, 3)
    assert (kept_scores == -torch.inf).all()
    _, kept_scores = batched_nms(
        torch.zeros(1, 2, 4),
        torch.full((1, 2), -torch.inf),
        torch.zeros(1, 2, dtype=torch.int64),
        iou_threshold=0.5,
        count=1,
    )
    assert kept_scores.tolist() == [[-torch.inf]]
