"""Diagnostics of a training step: proposal recall and fraction of positives."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from maskrcnn.data.loader import collate
from maskrcnn.models import mask_rcnn
from maskrcnn.models.mask_rcnn import MaskRCNN, MaskRCNNConfig
from maskrcnn.models.selection import RegionSampler, diagnose
from maskrcnn.ops import matching
from maskrcnn.ops.boxes import pairwise_iou
from maskrcnn.ops.mask_tables import tabulate
from maskrcnn.structures import AxisAlignedMap, Batch, Diagnostics, Example, MaskCrop, Proposals, RoISamples, Targets

CROP = MaskCrop(0, 0, np.ones((2, 2), np.uint8))


def targets(boxes: Tensor, labels: Tensor) -> Targets:
    images, objects = labels.shape
    masks = tabulate([[CROP] * objects] * images, [AxisAlignedMap()] * images, objects)
    return Targets(boxes, labels, masks, labels > 0)


def samples(labels: list[list[int]]) -> RoISamples:
    tensor = torch.tensor(labels)
    return RoISamples(torch.zeros(*tensor.shape, 4), tensor, torch.zeros_like(tensor))


def values(diagnostics: Diagnostics) -> tuple[float, float]:
    return diagnostics.proposal_recall.item(), diagnostics.positive_fraction.item()


SQUARE = [0.0, 0, 10, 10]
HALF = [0.0, 0, 10, 5]  # IoU 0.5 with the square
LESS = [0.0, 0, 10, 4.9]
AWAY = [50.0, 50, 60, 60]
NOTHING = [0.0, 0, 0, 0]


def test_values_by_hand() -> None:
    """Image 1: a recalled object, a missed one, a crowd. Image 2: an object overlapped only by padding, and padding."""
    objects = targets(
        torch.tensor([[SQUARE, AWAY, [20.0, 20, 30, 30]], [SQUARE, NOTHING, NOTHING]]),
        torch.tensor([[2, 1, -1], [1, -1, -1]]),
    )
    proposals = Proposals(
        torch.tensor([[LESS, HALF, [20.0, 20, 30, 30]], [LESS, AWAY, SQUARE]]),
        torch.tensor([[3.0, 2, 1], [3, 2, -torch.inf]]),
    )
    roi_samples = samples([[2, 0, 0, -1], [1, 2, 0, -1]])
    assert values(diagnose(proposals, objects, roi_samples)) == (pytest.approx(1 / 3), 0.5)


def test_recall_equals_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    corner, size = torch.rand(2, 2, 40, 2).unbind()
    boxes = torch.cat((corner, corner + size), dim=-1) * 20
    scores = torch.where(torch.rand(2, 40) < 0.7, 0.0, -torch.inf)
    objects = targets(boxes[:, :7] + torch.rand(2, 7, 4) * 3, torch.randint(-1, 3, (2, 7)))
    recalled = [
        any(
            pairwise_iou(boxes[image, None, p], objects.boxes[image, None, g]).item() >= 0.5
            for p in range(40)
            if scores[image, p] == 0
        )
        for image in range(2)
        for g in range(7)
        if objects.labels[image, g] > 0
    ]
    assert 0 < sum(recalled) < len(recalled)
    for pairs in (2**23, 14 * 3, 1):  # chunks of all proposals, of three, of one
        monkeypatch.setattr(matching, "PAIRS_AT_ONCE", pairs)
        diagnostics = diagnose(Proposals(boxes, scores), objects, samples([[0], [0]]))
        assert values(diagnostics) == (pytest.approx(sum(recalled) / len(recalled)), 0.0)


def test_recall_without_objects_and_fraction_without_samples_are_nan() -> None:
    no_objects = targets(torch.zeros(1, 1, 4), torch.tensor([[-1]]))
    diagnostics = diagnose(Proposals(torch.tensor([[AWAY]]), torch.zeros(1, 1)), no_objects, samples([[-1, -1]]))
    assert diagnostics.proposal_recall.isnan()
    assert diagnostics.positive_fraction.isnan()


@pytest.fixture(scope="module")
def model() -> MaskRCNN:
    torch.manual_seed(1)
    return MaskRCNNConfig.model_validate(
        {
            "backbone": {
                "kind": "resnet",
                "depth": 18,
                "out_features": ["res5"],
                "width": 8,
                "weights": "none",
                "freeze": 0,
            },
            "neck": {"kind": "none"},
            "rpn": {
                "anchor_sizes": [[16, 32]],
                "training": {"pre_nms_top_n": 20, "post_nms_top_n": 10},
                "batch_size_per_image": 16,
            },
            "sampling": {"batch_size_per_image": 8},
            "box_head": {"kind": "fc", "width": 8},
            "mask_head": {"kind": "fcn", "depth": 1, "width": 8},
        }
    ).build(3)


@pytest.fixture(scope="module")
def batch(model: MaskRCNN) -> Batch:
    pixels = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    example = Example(1, pixels, torch.tensor([[8.0, 8, 40, 40]]), torch.tensor([2]), (CROP,))
    return collate([example, example], [1, 2], model.size_divisor)


def test_an_observer_changes_nothing(model: MaskRCNN, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Diagnostics] = []
    observed = model(batch.images, batch.targets, observe=seen.append)
    assert len(seen) == 1
    assert all(value.dim() == 0 and not value.requires_grad and 0 <= value <= 1 for value in seen[0])
    monkeypatch.setattr(mask_rcnn, "diagnose", None)  # calling it raises: without an observer nothing is computed
    assert torch.equal(torch.stack(model(batch.images, batch.targets)), torch.stack(observed))


def test_recall_counts_only_rpn_proposals(model: MaskRCNN, batch: Batch) -> None:
    """The ground-truth boxes among the samples do not count as proposals."""
    proposals = Proposals(torch.tensor([[AWAY]] * 2), torch.zeros(2, 1))
    roi_samples = RegionSampler(batch_size_per_image=8, positive_fraction=0.25, foreground=0.5)(
        proposals, batch.targets, batch.images.seeds
    )
    assert values(diagnose(proposals, batch.targets, roi_samples)) == (0.0, 0.5)


@pytest.fixture
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
def test_distributed_data_parallel_passes_the_observer_to_the_model(model: MaskRCNN, batch: Batch) -> None:
    seen: list[Diagnostics] = []
    DistributedDataParallel(model)(batch.images, batch.targets, observe=seen.append)
    assert len(seen) == 1
