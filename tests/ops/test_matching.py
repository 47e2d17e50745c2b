"""Matching of boxes to objects, balanced sampling, random keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from maskrcnn.ops import cpu, matching
from maskrcnn.ops.boxes import pairwise_iou
from maskrcnn.ops.mask_tables import tabulate
from maskrcnn.ops.matching import match_boxes, random_keys, sample_balanced
from maskrcnn.structures import AxisAlignedMap, MaskCrop, Targets

RULE = {"foreground": 0.7, "background": 0.3}


def targets(boxes: torch.Tensor, labels: torch.Tensor) -> Targets:
    crop = MaskCrop(0, 0, np.ones((1, 1), np.uint8))
    batch, count = labels.shape
    masks = tabulate([[crop] * count] * batch, [AxisAlignedMap()] * batch, count)
    return Targets(boxes, labels, masks, labels > 0)


def random_boxes(*shape: int) -> torch.Tensor:
    corners = torch.rand(*shape, 2, 2) * 60
    return torch.cat((corners.amin(dim=-2), corners.amax(dim=-2) + 1), dim=-1)


def test_by_hand() -> None:
    objects = targets(torch.tensor([[[0.0, 0, 10, 10], [50, 50, 60, 60]]]), torch.tensor([[7, 3]]))
    boxes = torch.tensor(
        [[0.0, 0, 10, 10], [0, 0, 10, 20], [0, 0, 10, 50], [52, 50, 62, 60], [80, 80, 90, 90]]
    )  # IoU 1, 0.5, 0.2 with the first object; 0.67 with the second; 0 with both
    with_low_quality = match_boxes(boxes, objects, **RULE, allow_low_quality_matches=True)
    assert with_low_quality.labels.tolist() == [[7, -1, 0, 3, 0]]
    assert with_low_quality.matched[0, :4].tolist() == [0, 0, 0, 1]
    without = match_boxes(boxes, objects, **RULE, allow_low_quality_matches=False)
    assert without.labels.tolist() == [[7, -1, 0, -1, 0]]


def test_all_boxes_that_tie_for_an_object_are_positive() -> None:
    objects = targets(torch.tensor([[[0.0, 0, 10, 10]]]), torch.tensor([[1]]))
    boxes = torch.tensor([[5.0, 0, 15, 10], [0, 5, 10, 15], [6, 0, 16, 10]])
    assert match_boxes(boxes, objects, **RULE, allow_low_quality_matches=True).labels.tolist() == [[1, 1, 0]]


def test_boxes_in_an_ignored_region_are_not_background() -> None:
    objects = targets(torch.tensor([[[0.0, 0, 10, 10], [40, 40, 90, 90]]]), torch.tensor([[1, -1]]))
    boxes = torch.tensor([[50.0, 50, 60, 60], [35, 40, 42, 50], [0, 0, 10, 10]])
    assert match_boxes(boxes, objects, **RULE, allow_low_quality_matches=True).labels.tolist() == [[-1, 0, 1]]


def test_images_without_objects_are_background_throughout() -> None:
    objects = targets(torch.zeros(1, 2, 4), torch.full((1, 2), -1))
    matches = match_boxes(random_boxes(9), objects, **RULE, allow_low_quality_matches=True)
    assert (matches.labels == 0).all()


def test_against_a_loop_and_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes, objects = random_boxes(2, 40), targets(random_boxes(2, 5), torch.randint(1, 9, (2, 5)))
    matches = match_boxes(boxes, objects, **RULE, allow_low_quality_matches=True)
    for b in range(2):
        iou = pairwise_iou(boxes[b], objects.boxes[b])
        for i in range(40):
            best = int(iou[i].argmax())
            positive = iou[i, best] >= 0.7 or any(iou[i, g] == iou[:, g].max() > 0 for g in range(5))
            expected = objects.labels[b, best] if positive else (0 if iou[i, best] < 0.3 else -1)
            assert matches.labels[b, i] == expected
            assert matches.matched[b, i] == best
    monkeypatch.setattr(matching, "PAIRS_AT_ONCE", 70)  # seven boxes per chunk
    in_chunks = match_boxes(boxes, objects, **RULE, allow_low_quality_matches=True)
    assert torch.equal(in_chunks.labels, matches.labels)
    assert torch.equal(in_chunks.matched, matches.matched)


@pytest.mark.parametrize("allow_low_quality_matches", [False, True])
def test_a_crowded_image_in_strips(monkeypatch: pytest.MonkeyPatch, allow_low_quality_matches: bool) -> None:
    """Chunks that skip objects outside their strip give the same matches, also with ignored regions and padding."""
    corners = torch.cartesian_prod(torch.arange(0.0, 100, 5), torch.arange(0.0, 100, 5)).flip(1)  # row by row
    anchors = torch.cat((corners, corners + 9), dim=1)  # (400, 4)
    labels = torch.randint(1, 9, (2, 60))
    labels[0, ::7], labels[1, 20:] = -1, -1
    boxes = random_boxes(2, 60)
    boxes[1, 40:] = 0
    objects = targets(boxes, labels)
    anchors[7] = torch.nan  # a proposal of a diverged model
    compared_counts = []
    overlaps = matching._overlaps

    def counting_overlaps(chunk: torch.Tensor, objects: matching._Candidates) -> tuple[torch.Tensor, torch.Tensor]:
        compared_counts.append(len(objects.columns))
        return overlaps(chunk, objects)

    matches = match_boxes(anchors, objects, **RULE, allow_low_quality_matches=allow_low_quality_matches)
    monkeypatch.setattr(matching, "_overlaps", counting_overlaps)
    monkeypatch.setattr(matching, "PAIRS_AT_ONCE", 20 * 120)  # one row of anchors per chunk
    in_strips = match_boxes(anchors, objects, **RULE, allow_low_quality_matches=allow_low_quality_matches)
    assert torch.equal(in_strips.labels, matches.labels)
    assert torch.equal(in_strips.matched, matches.matched)
    assert min(compared_counts) == 1  # no random box lies below y = 61
    assert sorted(compared_counts)[len(compared_counts) // 2] < 50


def test_sampling_takes_positives_first_and_fills_with_background() -> None:
    labels = torch.tensor([[1, 0, 2, 0, 0, -1, 3, 0], [0, 0, 0, 0, 0, 0, 0, 5], [-1, -1, 4, -1, 0, -1, -1, -1]])
    indices, sampled = sample_balanced(labels, count=4, positive_fraction=0.5, seeds=torch.tensor([1, 2, 3]), stream=0)
    sampled_labels = labels.gather(1, indices)
    assert (sampled_labels[0] > 0).tolist() == [True, True, False, False]
    assert sampled_labels[1].tolist() == [5, 0, 0, 0]
    assert sampled.tolist() == [[True] * 4, [True] * 4, [True, True, False, False]]
    assert (sampled_labels[sampled] >= 0).all()
    for image in range(3):
        image_indices = indices[image][sampled[image]].tolist()
        assert len(set(image_indices)) == len(image_indices)


def test_sampling_more_boxes_than_there_are_pads() -> None:
    indices, sampled = sample_balanced(
        torch.tensor([[0, 1]]), count=5, positive_fraction=0.5, seeds=torch.tensor([0]), stream=0
    )
    assert indices.shape == (1, 5)
    assert sampled.tolist() == [[True, True, False, False, False]]


def test_the_sample_of_an_image_depends_only_on_its_seed() -> None:
    labels = torch.randint(0, 2, (3, 200))
    together, _ = sample_balanced(labels, count=20, positive_fraction=0.5, seeds=torch.tensor([5, 6, 7]), stream=1)
    alone, _ = sample_balanced(labels[1:2], count=20, positive_fraction=0.5, seeds=torch.tensor([6]), stream=1)
    other, _ = sample_balanced(labels[1:2], count=20, positive_fraction=0.5, seeds=torch.tensor([9]), stream=1)
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(alone, other)


def test_random_keys_are_uniform_and_independent() -> None:
    keys = random_keys(torch.tensor([0, 1, 2**40]), 20000, stream=0).double() / 2**32
    assert keys.min() >= 0
    assert keys.max() < 1
    # For 20,000 uniform numbers, the standard deviation of the mean is 0.002 and that of a correlation 0.007.
    assert (keys.mean(dim=1) - 0.5).abs().max() < 0.01
    correlations = torch.corrcoef(torch.cat((keys, keys[:1].roll(1, dims=1))))
    assert (correlations - torch.eye(4, dtype=torch.double)).abs().max() < 0.03
    assert not torch.equal(random_keys(torch.tensor([0]), 9, stream=0), random_keys(torch.tensor([0]), 9, stream=1))
    assert random_keys(torch.tensor([3]), 4, stream=0).tolist() == random_keys(torch.tensor([3]), 4, stream=0).tolist()


def test_a_gpu_compares_more_pairs_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes, labels = torch.zeros(2, 1000, 4), torch.ones(2, 100, dtype=torch.int64)
    objects = targets(torch.zeros(2, 100, 4), labels)
    monkeypatch.setattr(matching, "PAIRS_AT_ONCE", 2000)
    monkeypatch.setattr(matching, "PAIRS_AT_ONCE_ON_GPU", 20_000)
    assert matching.boxes_at_once(boxes, objects) == 10
    monkeypatch.setattr(cpu, "takes_short_cuts", lambda tensor: False)
    assert matching.boxes_at_once(boxes, objects) == 100
    monkeypatch.setattr(matching.torch.compiler, "is_compiling", lambda: True)
    assert matching.boxes_at_once(boxes, objects) == 1000
