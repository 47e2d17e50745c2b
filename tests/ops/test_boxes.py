"""Box conversions, IoU, clipping, box deltas, anchors."""

from __future__ import annotations

import math

import pytest
import torch

from maskrcnn.ops.anchors import base_anchors, grid_anchors
from maskrcnn.ops.boxes import (
    MAX_LOG_RATIO,
    box_area,
    clip_boxes,
    decode_deltas,
    encode_deltas,
    pairwise_intersection,
    pairwise_iou,
    xywh_to_xyxy,
    xyxy_to_xywh,
)

ONES = (1.0, 1.0, 1.0, 1.0)


def random_boxes(*shape: int) -> torch.Tensor:
    corners = torch.rand(*shape, 2, 2) * 100
    return torch.cat((corners.amin(dim=-2), corners.amax(dim=-2) + 1), dim=-1)


def test_conversions_by_hand_and_back() -> None:
    assert xywh_to_xyxy(torch.tensor([1.0, 2, 3, 4])).tolist() == [1, 2, 4, 6]
    boxes = random_boxes(7)
    torch.testing.assert_close(xywh_to_xyxy(xyxy_to_xywh(boxes)), boxes)


def test_overlap_by_hand() -> None:
    first = torch.tensor([[0.0, 0, 4, 4]])
    second = torch.tensor([[2.0, 2, 6, 6], [4, 0, 8, 4], [0, 0, 4, 4], [1, 1, 1, 1]])
    assert pairwise_intersection(first, second).tolist() == [[4, 0, 16, 0]]
    assert pairwise_iou(first, second)[0].tolist() == pytest.approx([4 / 28, 0, 1, 0])


def test_iou_against_a_loop() -> None:
    first, second = random_boxes(2, 5), random_boxes(2, 3)
    iou = pairwise_iou(first, second)
    for b in range(2):
        for i, (x1, y1, x2, y2) in enumerate(first[b].tolist()):
            for j, (u1, v1, u2, v2) in enumerate(second[b].tolist()):
                intersection = max(0, min(x2, u2) - max(x1, u1)) * max(0, min(y2, v2) - max(y1, v1))
                union = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - intersection
                assert iou[b, i, j].item() == pytest.approx(intersection / union, abs=1e-5)


def test_empty_boxes_overlap_nothing() -> None:
    empty = torch.zeros(2, 4)
    assert pairwise_iou(empty, empty).tolist() == [[0, 0], [0, 0]]
    assert pairwise_iou(torch.zeros(0, 4), empty).shape == (0, 2)


def test_boxes_are_clipped_to_the_size_of_their_image() -> None:
    boxes = torch.tensor([[[-5.0, -5, 200, 200]], [[-5, 3, 200, 200]]])
    clipped = clip_boxes(boxes, torch.tensor([[50, 80], [20, 30]]))
    assert clipped.tolist() == [[[0, 0, 80, 50]], [[0, 3, 30, 20]]]
    per_class = clip_boxes(boxes[:, :, None].expand(-1, -1, 3, -1), torch.tensor([[50, 80], [20, 30]]))
    assert per_class[1, 0, 2].tolist() == [0, 3, 30, 20]


def test_deltas_by_hand() -> None:
    anchor, box = torch.tensor([[0.0, 0, 10, 20]]), torch.tensor([[5.0, 0, 25, 20]])
    deltas = encode_deltas(box, anchor, weights=(10.0, 10.0, 5.0, 5.0))
    assert deltas[0].tolist() == pytest.approx([10.0, 0.0, 5 * math.log(2), 0.0])


@pytest.mark.parametrize("weights", [ONES, (10.0, 10.0, 5.0, 5.0)])
def test_decoding_inverts_encoding(weights: tuple[float, float, float, float]) -> None:
    boxes, anchors = random_boxes(50), random_boxes(50)
    decoded = decode_deltas(encode_deltas(boxes, anchors, weights=weights), anchors, weights=weights)
    torch.testing.assert_close(decoded, boxes, atol=1e-3, rtol=1e-4)


def test_growth_is_limited_and_degenerate_pairs_are_zero() -> None:
    grown = decode_deltas(torch.tensor([[0.0, 0, 100, 0]]), torch.tensor([[0.0, 0, 16, 16]]), weights=ONES)
    assert (grown[0, 2] - grown[0, 0]).item() == pytest.approx(16 * math.exp(MAX_LOG_RATIO), rel=1e-5)
    assert encode_deltas(torch.zeros(1, 4), torch.tensor([[0.0, 0, 1, 1]]), weights=ONES).tolist() == [[0, 0, 0, 0]]


def test_anchors_by_hand() -> None:
    # As in Detectron2 and torchvision, a 32 px anchor of ratio 0.5 (height / width) has half sides 22.627 and 11.314;
    # torchvision rounds them to 23 and 11.
    exact = base_anchors([32], [0.5, 1.0, 2.0])
    assert exact[0].tolist() == pytest.approx([-22.627, -11.314, 22.627, 11.314], abs=1e-3)
    assert exact[2].tolist() == pytest.approx([-11.314, -22.627, 11.314, 22.627], abs=1e-3)
    assert base_anchors([32], [0.5], rounded=True).tolist() == [[-23, -11, 23, 11]]
    torch.testing.assert_close(box_area(base_anchors([32, 64], [0.5, 2.0])), torch.tensor([1024.0, 1024, 4096, 4096]))


def test_grid_anchors_are_ordered_by_row_column_and_anchor() -> None:
    base = torch.tensor([[-1.0, -1, 1, 1], [-2, -2, 2, 2]])
    grid = grid_anchors(base, height=2, width=3, stride=4)
    assert grid.shape == (12, 4)
    assert grid[3].tolist() == [2, -2, 6, 2]  # cell (0, 1), second anchor
    assert grid[6].tolist() == [-1, 3, 1, 5]  # cell (1, 0), first anchor
