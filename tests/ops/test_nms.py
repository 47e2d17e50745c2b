"""Batched NMS."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskrcnn.ops import cpu, nms
from maskrcnn.ops.boxes import pairwise_iou
from maskrcnn.ops.nms import batched_nms, nms_as_operator, nms_of_levels

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def fixed_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute on a CPU what a GPU computes."""
    monkeypatch.setattr(cpu, "takes_short_cuts", lambda tensor: False)


either_way = pytest.mark.parametrize("short_cuts", [True, False])


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


def test_the_operator_of_exported_graphs_keeps_the_same_boxes() -> None:
    corners = torch.randint(0, 12, (3, 50, 2, 2)).float()
    boxes = torch.cat((corners.amin(dim=2), corners.amax(dim=2)), dim=-1)
    scores, groups = torch.randint(1, 9, (3, 50)) / 8, torch.randint(0, 3, (3, 50))
    scores[:2, ::5] = -torch.inf
    scores[2] = -torch.inf
    for count in (4, 60):
        expected = batched_nms(boxes, scores, groups, iou_threshold=0.4, count=count)
        of_levels = nms_of_levels(boxes, scores, (20, 30), iou_threshold=0.4, count=count)
        with nms_as_operator():
            result = batched_nms(boxes, scores, groups, iou_threshold=0.4, count=count)
            result_of_levels = nms_of_levels(boxes, scores, (20, 30), iou_threshold=0.4, count=count)
        for (indices, kept_scores), theirs in ((expected, result), (of_levels, result_of_levels)):
            assert torch.equal(theirs[1], kept_scores)
            assert torch.equal(theirs[0][kept_scores > -torch.inf], indices[kept_scores > -torch.inf])


@either_way
def test_no_boxes_and_only_padding(short_cuts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "takes_short_cuts", lambda tensor: short_cuts)
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


# Against torchvision, with ties: corners and scores are small whole numbers.

Corner = st.integers(0, 6)
Candidate = st.tuples(Corner, Corner, Corner, Corner, st.sampled_from([1.0, 2.0, 3.0, -torch.inf]), st.integers(0, 2))
Candidates = st.lists(Candidate, min_size=1, max_size=14)
Threshold = st.sampled_from([0.0, 0.1, 0.3, 1 / 3, 0.5, 0.7, 1.0])  # float32(0.3) is above 0.3, and 0.7 below
Images = st.integers(1, 14).flatmap(
    lambda n: st.lists(st.lists(Candidate, min_size=n, max_size=n), min_size=1, max_size=3)
)
# A chain: each box overlaps the next one alone, so that every second box is kept.
CHAIN = [[(i, 0, i + 3, 1, 100.0 - i, 0) for i in range(0, 60, 1)]]


def tensors(images: list[list[tuple]]) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes `(B, N, 4)`, scores `(B, N)` and groups `(B, N)`."""
    values = torch.tensor(images, dtype=torch.float32)
    corners = values[..., :4].unflatten(-1, (2, 2))
    boxes = torch.cat((corners.amin(dim=-2), corners.amax(dim=-2)), dim=-1)
    return boxes, values[..., 4], values[..., 5].long()


def expected(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> list[int]:
    """Return the boxes of one image that torchvision keeps in each group: the best first, then by index."""
    kept: list[int] = []
    for group in groups.unique():
        members = ((groups == group) & (scores > -torch.inf)).nonzero()[:, 0]
        kept += members[torchvision.ops.nms(boxes[members], scores[members], threshold)].tolist()
    return sorted(kept, key=lambda index: (-scores[index].item(), index))


def assert_like_torchvision(work: Callable[..., tuple[Tensor, Tensor]], images: list, threshold: float) -> None:
    boxes, scores, groups = tensors(images)
    count = boxes.shape[1] + 1
    indices, kept_scores = work(boxes, scores, groups, threshold, count)
    assert indices.shape == kept_scores.shape == (len(images), count)
    for b in range(len(images)):
        kept = indices[b][kept_scores[b] > -torch.inf]
        assert kept.tolist() == expected(boxes[b], scores[b], groups[b], threshold)
        assert torch.equal(scores[b, kept], kept_scores[b, : len(kept)])
    few = work(boxes, scores, groups, threshold, 2)
    assert torch.equal(few[1], kept_scores[:, :2])
    assert torch.equal(few[0][few[1] > -torch.inf], indices[:, :2][few[1] > -torch.inf])


@settings(max_examples=60)
@given(Images, Threshold)
@example(CHAIN, 0.4)
def test_one_by_one_is_the_nms_of_torchvision(images: list, threshold: float) -> None:
    assert_like_torchvision(nms._one_by_one, images, threshold)


def _levels(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float, count: int) -> tuple[Tensor, Tensor]:
    """Split the boxes into levels after a third of them, whatever their groups are."""
    sizes = _sizes(boxes.shape[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "takes_short_cuts", lambda tensor: False)
        return nms_of_levels(boxes, scores, sizes, iou_threshold=threshold, count=count)


def _sizes(count: int) -> list[int]:
    return [count // 3, count - count // 3]


@settings(max_examples=60)
@given(Images, Threshold)
@example(CHAIN, 0.4)
def test_blocks_are_the_nms_of_torchvision(images: list, threshold: float) -> None:
    count = len(images[0])
    levels = [0] * _sizes(count)[0] + [1] * _sizes(count)[1]
    images = [[(*box[:5], level) for box, level in zip(image, levels, strict=True)] for image in images]
    assert_like_torchvision(_levels, images, threshold)


@pytest.mark.parametrize("pairs", [1, 2**25])
def test_long_chains_and_many_boxes(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over many blocks; by groups of images at a time."""
    monkeypatch.setattr(nms, "PAIRS_AT_ONCE", pairs)
    corners = torch.rand(2, 300, 2) * 60
    boxes = torch.cat((corners, corners + 10 + torch.rand(2, 300, 2) * 30), dim=-1)
    boxes[1] = torch.arange(300.0)[:, None] + torch.tensor([0.0, 0, 9, 9])
    scores = torch.cat((torch.rand(1, 300), torch.arange(300.0).flip(0)[None]))
    for threshold in (0.2, 0.5, 0.7):
        result = _levels(boxes, scores, torch.zeros(2, 300, dtype=torch.int64), threshold, 200)
        by_groups = nms_of_levels(boxes, scores, _sizes(300), iou_threshold=threshold, count=200)
        valid = by_groups[1] > -torch.inf
        assert torch.equal(result[1], by_groups[1])
        assert torch.equal(result[0][valid], by_groups[0][valid])


@pytest.mark.usefixtures("fixed_shapes")
def test_scores_that_are_not_numbers_are_padding() -> None:
    boxes = torch.tensor([[[0.0, 0, 9, 9], [0, 0, 9, 8], [50, 50, 60, 60]]])
    scores = torch.tensor([[torch.nan, 1.0, torch.nan]])
    groups = torch.zeros(1, 3, dtype=torch.int64)
    for indices, kept in (
        batched_nms(boxes, scores, groups, iou_threshold=0.5, count=2),
        nms_of_levels(boxes, scores, [2, 1], iou_threshold=0.5, count=2),
    ):
        assert kept.tolist() == [[1.0, -torch.inf]]
        assert indices[0, 0] == 1


@given(st.floats(0, 1))
def test_the_threshold_is_rounded_down_to_float32(threshold: float) -> None:
    rounded = nms._rounded_down(threshold)
    nearest = torch.tensor(threshold, dtype=torch.float32)
    below = nearest if nearest.double() <= threshold else torch.nextafter(nearest, torch.tensor(-1.0))
    assert rounded == pytest.approx(below.item(), abs=1e-45)
