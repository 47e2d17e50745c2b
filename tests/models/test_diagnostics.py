"""What a step says about its proposals and samples, besides its losses."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from maskrcnn.data.loader import collate
from maskrcnn.models import mask_rcnn, selection
from maskrcnn.models.mask_rcnn import MaskRCNN, MaskRCNNConfig
from maskrcnn.models.selection import RegionSampler, diagnose
from maskrcnn.ops.boxes import pairwise_iou
from maskrcnn.ops.mask_tables import tabulate
from maskrcnn.structures import Batch, Diagnostics, Example, MaskCrop, Proposals, RoISamples, Targets

CROP = MaskCrop(0, 0, np.ones((2, 2), np.uint8))


def targets(boxes: Tensor, labels: Tensor) -> Targets:
    images, objects = labels.shape
    return Targets(boxes, labels, tabulate([[CROP] * objects] * images, [(1.0, 1.0)] * images, objects))


def samples(labels: list[list[int]]) -> RoISamples:
    values = torch.tensor(labels)
    return RoISamples(torch.zeros(*values.shape, 4), values, torch.zeros_like(values))


def figures(found: Diagnostics) -> tuple[float, float]:
    return found.proposal_recall.item(), found.positive_fraction.item()


SQUARE = [0.0, 0, 10, 10]
HALF = [0.0, 0, 10, 5]  # IoU 0.5 with the square
LESS = [0.0, 0, 10, 4.9]
AWAY = [50.0, 50, 60, 60]
NOTHING = [0.0, 0, 0, 0]


def test_figures_by_hand() -> None:
    """Image one: an object found, one missed, a crowd. Image two: an object found by padding alone, and padding."""
    objects = targets(
        torch.tensor([[SQUARE, AWAY, [20.0, 20, 30, 30]], [SQUARE, NOTHING, NOTHING]]),
        torch.tensor([[2, 1, -1], [1, -1, -1]]),
    )
    proposals = Proposals(
        torch.tensor([[LESS, HALF, [20.0, 20, 30, 30]], [LESS, AWAY, SQUARE]]),
        torch.tensor([[3.0, 2, 1], [3, 2, -torch.inf]]),
    )
    drawn = samples([[2, 0, 0, -1], [1, 2, 0, -1]])
    assert figures(diagnose(proposals, objects, drawn)) == (pytest.approx(1 / 3), 0.5)


def test_recall_equals_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    corner, size = torch.rand(2, 2, 40, 2).unbind()
    boxes = torch.cat((corner, corner + size), dim=-1) * 20
    scores = torch.where(torch.rand(2, 40) < 0.7, 0.0, -torch.inf)
    objects = targets(boxes[:, :7] + torch.rand(2, 7, 4) * 3, torch.randint(-1, 3, (2, 7)))
    hits = [
        any(
            pairwise_iou(boxes[image, None, p], objects.boxes[image, None, g]).item() >= 0.5
            for p in range(40)
            if scores[image, p] == 0
        )
        for image in range(2)
        for g in range(7)
        if objects.labels[image, g] > 0
    ]
    assert 0 < sum(hits) < len(hits)
    for pairs in (2**23, 14 * 3, 1):  # all proposals at once, three, one
        monkeypatch.setattr(selection, "PAIRS_AT_ONCE", pairs)
        found = diagnose(Proposals(boxes, scores), objects, samples([[0], [0]]))
        assert figures(found) == (pytest.approx(sum(hits) / len(hits)), 0.0)


def test_there_is_no_recall_without_objects_and_no_share_without_samples() -> None:
    none = targets(torch.zeros(1, 1, 4), torch.tensor([[-1]]))
    found = diagnose(Proposals(torch.tensor([[AWAY]]), torch.zeros(1, 1)), none, samples([[-1, -1]]))
    assert found.proposal_recall.isnan()
    assert found.positive_fraction.isnan()


@pytest.fixture(scope="module")
def model() -> MaskRCNN:
    torch.manual_seed(1)
    return MaskRCNNConfig.model_validate(
        {
            "backbone": {"kind": "resnet", "depth": 18, "output": "c5", "width": 8, "weights": "none", "freeze": 0},
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
    assert all(figure.dim() == 0 and not figure.requires_grad and 0 <= figure <= 1 for figure in seen[0])
    monkeypatch.setattr(mask_rcnn, "diagnose", None)  # calling it fails: without an observer nothing is computed
    assert torch.equal(torch.stack(model(batch.images, batch.targets)), torch.stack(observed))


def test_the_rpn_alone_is_asked(model: MaskRCNN, batch: Batch) -> None:
    """The objects' own boxes are among the samples, but are no proposals."""
    proposals = Proposals(torch.tensor([[AWAY]] * 2), torch.zeros(2, 1))
    drawn = RegionSampler(batch_size_per_image=8, positive_fraction=0.25, foreground=0.5)(
        proposals, batch.targets, batch.images.seeds
    )
    assert figures(diagnose(proposals, batch.targets, drawn)) == (0.0, 0.5)


@pytest.fixture
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
def test_distributed_data_parallel_hands_the_observer_on(model: MaskRCNN, batch: Batch) -> None:
    seen: list[Diagnostics] = []
    DistributedDataParallel(model)(batch.images, batch.targets, observe=seen.append)
    assert len(seen) == 1
