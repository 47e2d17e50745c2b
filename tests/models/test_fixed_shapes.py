"""What a GPU computes, with all slots of padded tensors, equals what a CPU computes without padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from maskrcnn.data.loader import collate
from maskrcnn.models.mask_rcnn import MaskRCNN, MaskRCNNConfig
from maskrcnn.ops import cpu, mask_tables
from maskrcnn.structures import Batch, Example, Losses, MaskCrop

SIDE, K = 64, 3
Box = tuple[float, float, float, float]

FPN: dict[str, Any] = {
    "backbone": {"kind": "resnet", "depth": 18, "width": 8, "weights": "none"},
    "neck": {"kind": "fpn", "channels": 8},
    "rpn": {
        "anchor_sizes": [[8], [16], [32], [64], [128]],
        "training": {"pre_nms_top_n": 60, "post_nms_top_n": 30},
        "inference": {"pre_nms_top_n": 40, "post_nms_top_n": 20},
        "batch_size_per_image": 32,
    },
    "box_head": {"kind": "fc", "width": 16},
    "mask_head": {"kind": "fcn", "depth": 1, "width": 8},
    "sampling": {"batch_size_per_image": 16},
    "detection": {"detections_per_image": 10, "score_threshold": 0.0},
}
SINGLE: dict[str, Any] = {
    "backbone": {"kind": "resnet", "depth": 18, "width": 8, "weights": "none", "out_features": ["res4"]},
    "neck": {"kind": "none"},
    "rpn": {**FPN["rpn"], "anchor_sizes": [[16, 32]]},
}
C4: dict[str, Any] = {
    **SINGLE,
    "backbone": {**SINGLE["backbone"], "out_features": ["res4"], "res5_on_regions": True},
    "box_head": {"kind": "mean"},
    "mask_head": {"kind": "fcn", "depth": 0, "width": 8},
}
WARP = {"kind": "roi_warp", "aggregate": "maximum"}
MODELS: dict[str, dict[str, Any]] = {
    "pyramid": {},
    "one map": SINGLE,
    "c4": C4,
    "roi_pool and roi_warp": {
        "box_head": FPN["box_head"] | {"roi": {"kind": "roi_pool", "rounding": "floor"}},
        "roi": WARP,
    },
    "adaptive roi_align": {"roi": {"kind": "roi_align", "sampling_ratio": 0, "aligned": False}},
    "equal sizes": {"box_head": FPN["box_head"] | {"pool_size": 14}},  # both heads share the pooled regions
    "softmax": {"mask_head": FPN["mask_head"] | {"output": "softmax", "class_agnostic": True}},
    "fractional masks": {"mask_head": FPN["mask_head"] | {"target": "torchvision"}, "loss_normalizer": "batch"},
    "no mask head": {"mask_head": None},
    "no positives": {"sampling": {"batch_size_per_image": 16, "positive_fraction": 0.0}},
}
SOME: list[Box] = [(4, 6, 30, 40), (20, 10, 60, 50), (2, 40, 20, 62)]
MANY: list[Box] = [(x, y, x + 9 + y % 7, y + 9) for x in range(0, 50, 5) for y in range(0, 50, 5)]


def build(name: str) -> MaskRCNN:
    torch.manual_seed(1)
    return MaskRCNNConfig.model_validate(FPN | MODELS[name]).build(K)


def example(boxes: Sequence[Box], key: int) -> Example:
    crops = [MaskCrop(int(x), int(y), np.ones((int(y2 - y) // 2 + 1, int(x2 - x)), np.uint8)) for x, y, x2, y2 in boxes]
    return Example(
        image_id=key,
        pixels=torch.from_numpy(np.random.default_rng(key).integers(0, 256, (3, SIDE, SIDE), dtype=np.uint8)),
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.arange(len(boxes)) % K + 1,
        masks=tuple(crops),
    )


def batch_of(*images: Sequence[Box]) -> Batch:
    return collate([example(boxes, key) for key, boxes in enumerate(images)], range(len(images)), SIDE)


@contextmanager
def fixed_shapes() -> Iterator[None]:
    """Take no short cuts in this block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "takes_short_cuts", lambda tensor: False)
        yield


def trained(model: MaskRCNN, batch: Batch) -> tuple[Losses, dict[str, Tensor]]:
    """Return losses and gradients."""
    model.zero_grad()
    losses = model(batch.images, batch.targets)
    losses.total.backward()
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(model: MaskRCNN, batch: Batch) -> Losses:
    losses, gradients = trained(model, batch)
    detections = model.detect(batch.images)
    with fixed_shapes():
        fixed_losses, fixed_gradients = trained(model, batch)
        fixed_detections = model.detect(batch.images)
    assert detections.valid.sum() > 3
    torch.testing.assert_close(tuple(fixed_losses), tuple(losses), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fixed_gradients, gradients, rtol=1e-4, atol=1e-5)
    assert torch.equal(fixed_detections.labels, detections.labels)
    torch.testing.assert_close(fixed_detections.boxes, detections.boxes, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fixed_detections.scores, detections.scores, rtol=1e-5, atol=1e-5)
    # The weights are random, and the logits of a mask so large that the rounding of the RoI layers shows.
    torch.testing.assert_close(fixed_detections.masks, detections.masks, rtol=1e-5, atol=1e-4)
    return losses


@pytest.mark.parametrize("name", MODELS)
def test_every_model_with_and_without_objects(name: str) -> None:
    losses = assert_equal(build(name), batch_of(SOME, ()))
    assert bool(losses.loss_mask > 0) == (name not in ("no positives", "no mask head"))


@pytest.mark.parametrize("images", [((), ()), (MANY,), (MANY, SOME, ())], ids=["none", "100", "100, 3 and none"])
def test_any_number_of_objects(images: Sequence[Sequence[Box]]) -> None:
    assert_equal(build("pyramid"), batch_of(*images))


def test_fractional_masks_in_chunks_of_one_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_tables, "PIXELS_AT_ONCE", SIDE * SIDE)
    assert_equal(build("fractional masks"), batch_of(SOME, SOME[1:]))


def test_a_crowd_alone() -> None:
    batch = batch_of([(0, 0, SIDE, SIDE)])
    batch.targets.labels.fill_(-1)
    losses = assert_equal(build("pyramid"), batch)
    assert losses.loss_classifier == losses.loss_mask == 0


@pytest.mark.parametrize("name", ["pyramid", "c4", "equal sizes", "fractional masks"])
def test_objects_with_a_box_alone(name: str) -> None:
    batch = batch_of(SOME, SOME[1:])
    batch.targets.has_mask[0, 1:] = False
    assert assert_equal(build(name), batch).loss_mask > 0
    batch.targets.has_mask.fill_(False)
    assert assert_equal(build(name), batch).loss_mask == 0


def test_padding_is_not_part_of_the_statistics_of_batch_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two objects leave most slots of the mask head empty."""
    monkeypatch.setitem(MODELS, "batch norms", {"mask_head": FPN["mask_head"] | {"norm": "bn"}})
    batch = batch_of(SOME[:1], SOME[1:2])
    losses, gradients = trained(build("batch norms"), batch)
    with fixed_shapes():
        fixed_losses, fixed_gradients = trained(build("batch norms"), batch)
    assert losses.loss_mask > 0
    torch.testing.assert_close(tuple(fixed_losses), tuple(losses), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(fixed_gradients, gradients, rtol=1e-4, atol=1e-5)


def test_slots_by_hand() -> None:
    used = torch.tensor([[True, False, True], [False, True, False]])
    values = torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0], [6.0]])
    images, slots = cpu.used_slots(used)
    assert images.tolist() == [0, 0, 1]
    assert slots.tolist() == [0, 2, 1]
    dense = cpu.spread(values[[0, 2, 4]], used)
    assert dense[..., 0].tolist() == [[1, 0, 3], [0, 5, 0]]
    with fixed_shapes():
        images, slots = cpu.used_slots(used)
        assert torch.equal(cpu.spread(values, used), dense)
    assert images.tolist() == [0, 0, 0, 1, 1, 1]
    assert slots.tolist() == [0, 1, 2] * 2


# One graph. Tracing takes long, so the model has two levels, and few boxes.


SMALL: dict[str, Any] = {
    "backbone": {**FPN["backbone"], "out_features": ["res4", "res5"]},
    "rpn": {
        "anchor_sizes": [[16], [32], [64]],
        "training": {"pre_nms_top_n": 12, "post_nms_top_n": 12},
        "inference": {"pre_nms_top_n": 12, "post_nms_top_n": 12},
        "batch_size_per_image": 16,
    },
    "detection": {"detections_per_image": 3, "score_threshold": 0.0},
}


def build_small() -> MaskRCNN:
    torch.manual_seed(1)
    return MaskRCNNConfig.model_validate(FPN | SMALL).build(K)


@pytest.fixture(params=["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def counter(request: pytest.FixtureRequest) -> CompileCounterWithBackend:
    torch._dynamo.reset()
    return CompileCounterWithBackend(request.param)


def test_losses_and_gradients_are_one_graph(counter: CompileCounterWithBackend) -> None:
    """Compiled once for batches with tensors of the same shapes."""
    model = build_small()
    compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=counter)
    for images in ((SOME, ()), ((), SOME)):
        batch = batch_of(*images)
        expected = trained(model, batch)
        with fixed_shapes():
            model.zero_grad()
            losses = compiled(batch.images, batch.targets)
            losses.total.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        torch.testing.assert_close(tuple(losses), tuple(expected[0]), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradients, expected[1], rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def test_detection_is_one_graph(counter: CompileCounterWithBackend) -> None:
    model = build_small()
    detect = torch.compile(model.detect, fullgraph=True, dynamic=False, backend=counter)
    for boxes in (SOME, MANY):
        images = batch_of(boxes, ()).images
        expected = model.detect(images)
        with fixed_shapes():
            detections = detect(images)
        assert torch.equal(detections.labels, expected.labels)
        torch.testing.assert_close(detections.boxes, expected.boxes, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(detections.scores, expected.scores, rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1
