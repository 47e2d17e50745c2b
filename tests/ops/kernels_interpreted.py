"""The Triton kernels in Triton's interpreter, against the operators of the CPU. `test_kernels.py` runs this file.

The interpreter computes a program of a kernel in about 20 ms, so maps, boxes and grids are small.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
import triton.runtime.interpreter as interpreter
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from maskrcnn.config import read_config
from maskrcnn.data.loader import evaluation_loader
from maskrcnn.experiment import ExperimentConfig
from maskrcnn.ops import cpu, nms
from maskrcnn.ops.kernels.nms import BLOCK, greedy_nms
from maskrcnn.ops.kernels.roi import pool_levels
from maskrcnn.ops.nms import batched_nms, nms_of_levels
from maskrcnn.ops.roi import RoIAlignConfig, RoILayerConfig, RoIPoolConfig, RoIPooler, RoIWarpConfig

assert os.environ["TRITON_INTERPRET"] == "1"

LAYERS: list[RoILayerConfig] = [
    RoIPoolConfig(),
    RoIPoolConfig(rounding="floor"),
    RoIWarpConfig(),
    RoIWarpConfig(aggregate="maximum"),
    RoIAlignConfig(),
    RoIAlignConfig(sampling_ratio=0),
    RoIAlignConfig(aggregate="maximum"),
    RoIAlignConfig(aligned=False),
    RoIAlignConfig(aggregate="maximum", aligned=False, sampling_ratio=3),
]
LONG = (LAYERS[3], LAYERS[-1])
STRIDES, SIZE = (4, 8), 2


@pytest.fixture(autouse=True, scope="module")
def _patched_once() -> Iterator[None]:
    """The interpreter changes the language at each call of a function, which takes most of its time; once is enough."""
    original, done = interpreter._patch_lang, set()

    def patch(function: Any) -> interpreter._LangPatchScope:
        if id(function.__globals__) not in done:
            done.add(id(function.__globals__))
            original(function)
        return interpreter._LangPatchScope()

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", patch)
        yield


@pytest.fixture
def fixed_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute on a CPU what a GPU computes."""
    monkeypatch.setattr(cpu, "takes_short_cuts", lambda tensor: False)


# ---- NMS, with ties: corners and scores are small whole numbers.

Corner = st.integers(0, 6)
Score = st.sampled_from([1.0, 2.0, 3.0, -torch.inf, torch.nan])
Candidate = st.tuples(Corner, Corner, Corner, Corner, Score, st.integers(0, 2))
Images = st.integers(1, 14).flatmap(
    lambda n: st.lists(st.lists(Candidate, min_size=n, max_size=n), min_size=1, max_size=3)
)
Threshold = st.sampled_from([0.0, 0.1, 0.3, 1 / 3, 0.5, 0.7, 1.0])
# Each box overlaps the next one alone, so that every second box is kept; over more than one block.
CHAIN = [[(i, 0, i + 3, 1, 200.0 - i, 0) for i in range(2 * BLOCK + 9)]]


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


def assert_like_torchvision(images: list, threshold: float, count: int) -> None:
    boxes, scores, groups = tensors(images)
    indices, kept_scores = nms._with_triton(boxes, scores, groups, threshold, count)
    assert indices.shape == kept_scores.shape == (len(images), count)
    for b in range(len(images)):
        kept = indices[b][kept_scores[b] > -torch.inf]
        assert kept.tolist() == expected(boxes[b], scores[b], groups[b], threshold)[:count]
        assert torch.equal(scores[b, kept], kept_scores[b, : len(kept)])


@settings(max_examples=25)
@given(Images, Threshold, st.sampled_from([2, 20]))
@example(CHAIN, 0.4, 200)
@example(CHAIN, 0.4, 60)
def test_nms_is_that_of_torchvision(images: list, threshold: float, count: int) -> None:
    assert_like_torchvision(images, threshold, count)


def test_nms_of_many_boxes_and_few_of_one_image() -> None:
    corners = torch.rand(2, 300, 2) * 60
    boxes = torch.cat((corners, corners + 10 + torch.rand(2, 300, 2) * 30), dim=-1)
    scores, groups = torch.rand(2, 300), torch.randint(0, 3, (2, 300))
    scores[1, 5:] = -torch.inf
    for threshold in (0.2, 0.5, 0.7):
        result = nms._with_triton(boxes, scores, groups, threshold, 250)
        by_groups = batched_nms(boxes, scores, groups, iou_threshold=threshold, count=250)
        valid = by_groups[1] > -torch.inf
        assert torch.equal(result[1], by_groups[1])
        assert torch.equal(result[0][valid], by_groups[0][valid])


@pytest.mark.parametrize("count", [20, 100])
def test_nms_of_levels(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    corners = (torch.rand(2, 90, 2) * 20).round()
    boxes = torch.cat((corners, corners + 3 + (torch.rand(2, 90, 2) * 9).round()), dim=-1)
    scores = (torch.rand(2, 90) * 20).round()  # with ties
    scores[0, ::7] = -torch.inf
    sizes = [50, 0, 33, 7]
    work = functools.partial(nms_of_levels, boxes, scores, sizes, iou_threshold=0.5, count=count)
    levels = torch.arange(4).repeat_interleave(torch.tensor(sizes))
    monkeypatch.setattr(cpu, "takes_short_cuts", lambda tensor: False)
    indices, kept_scores = work(triton=True)
    assert torch.equal(kept_scores, work()[1])
    for b in range(2):
        kept = indices[b][kept_scores[b] > -torch.inf]
        assert kept.tolist() == expected(boxes[b], scores[b], levels, 0.5)[:count]


@pytest.mark.usefixtures("fixed_shapes")
def test_nms_without_boxes() -> None:
    for count in (0, 3):
        indices, kept_scores = batched_nms(
            torch.zeros(2, 0, 4), torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.int64), iou_threshold=0.5,
            count=count, triton=True,
        )  # fmt: skip
        assert indices.shape == (2, count)
        assert (kept_scores == -torch.inf).all()
    none = torch.zeros(0, 5, dtype=torch.int64)
    assert greedy_nms(torch.zeros(0, 5, 4), none, none[:, 0], threshold=0.5, limit=3).shape == (0, 3)


# ---- RoI layers

# One for each level, of which the second is partly outside; then no area, no width, outside, and larger than the map.
BOXES = [
    [1.0, 2.3, 27.0, 30.5],
    [-8.0, -7.0, 4.0, 4.0],
    [3.3, 5.1, 15.2, 13.7],
    [9.0, 8.0, 9.0, 8.0],
    [3.0, 4.0, 3.0, 20.0],
    [70.0, 2.0, 79.0, 9.0],
    [-40.0, -50.0, 60.0, 70.0],
]


def pooler(config: RoILayerConfig, **options: Any) -> RoIPooler:
    return RoIPooler(config.build(), STRIDES, SIZE, canonical_box=24.0, canonical_stride=8.0, **options)


def maps(channels: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return maps of two images of 24 x 32 px."""
    return [torch.randn(2, channels, 24 // stride, 32 // stride).to(dtype).requires_grad_() for stride in STRIDES]


def with_gradients(features: list[Tensor], pooled: Tensor) -> list[Tensor]:
    """Return the result, and the gradient of each map for a fixed weighting of it."""
    weighting = (torch.arange(pooled.numel()) % 7 - 3).view(pooled.shape).to(pooled)
    return [pooled.detach(), *torch.autograd.grad((pooled * weighting).sum(), features)]


def assert_equal(
    config: RoILayerConfig, features: list[Tensor], boxes: Tensor, images: Tensor, tolerance: float = 1e-5
) -> None:
    with_kernel, on_cpu = pooler(config, pooling=config.pooling()), pooler(config)
    reference = with_gradients(features, on_cpu(features, boxes, images))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "takes_short_cuts", lambda tensor: False)
        pooled = with_kernel(features, boxes, images)
    assert pooled.is_contiguous(memory_format=torch.channels_last)
    results = with_gradients(features, pooled)
    assert [each.dtype for each in results] == [features[0].dtype] * len(results)
    torch.testing.assert_close(results, reference, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("config", [layer for layer in LAYERS if layer not in LONG], ids=str)
def test_roi_layer(config: RoILayerConfig) -> None:
    assert_equal(config, maps(), torch.tensor(BOXES[:2]), torch.tensor([1, 0]))


@pytest.mark.slow
@pytest.mark.parametrize("config", LAYERS, ids=str)
def test_roi_layer_with_special_boxes(config: RoILayerConfig) -> None:
    assert_equal(config, maps(), torch.tensor(BOXES), torch.arange(len(BOXES)) % 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("config", [RoIPoolConfig(), RoIAlignConfig()], ids=str)
def test_roi_layer_in_low_precision(config: RoILayerConfig, dtype: torch.dtype) -> None:
    boxes = torch.tensor(BOXES[:2])
    assert_equal(config, maps(dtype=dtype), boxes, torch.tensor([1, 0]), 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("config", LAYERS, ids=str)
def test_no_boxes(config: RoILayerConfig) -> None:
    assert_equal(config, maps(), torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize("config", [RoIPoolConfig(), RoIAlignConfig(aggregate="maximum")], ids=str)
def test_values_that_are_not_numbers(config: RoILayerConfig) -> None:
    features = maps()
    with torch.no_grad():
        features[0][1, :, 2, 1:3] = torch.nan
        features[0][1, 0] = torch.nan
    assert_equal(config, features, torch.tensor(BOXES[:1]), torch.tensor([1]))


def test_many_channels_are_computed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskrcnn.ops.kernels.roi.CHANNELS", 4)
    assert_equal(RoIAlignConfig(sampling_ratio=1), maps(channels=6), torch.tensor(BOXES[:1]), torch.tensor([1]))


def test_a_single_map_and_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RoIAlignConfig(sampling_ratio=1)
    layer = RoIPooler(config.build(), (4,), 1, pooling=config.pooling())
    boxes, image = torch.tensor(BOXES[:1]), torch.tensor([1])
    features = maps()[:1]
    reference = layer(features, boxes, image)
    monkeypatch.setattr(cpu, "takes_short_cuts", lambda tensor: False)
    torch.testing.assert_close(layer(features, boxes, image), reference)
    assert layer([features[0].double()], boxes, image).dtype == torch.float64  # not with the kernel


def test_the_backward_pass_is_refused_where_algorithms_must_be_deterministic() -> None:
    features = maps()
    pooling = RoIPoolConfig().pooling()
    rois = torch.tensor(BOXES[:1]), torch.tensor([1]), torch.tensor([0])
    pooled = pool_levels(features, *rois, stride=4, size=1, pooling=pooling)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="not deterministic"):
            pooled.sum().backward()
        torch.use_deterministic_algorithms(True, warn_only=True)
        with pytest.warns(UserWarning, match="not deterministic"):
            pool_levels(features, *rois, stride=4, size=1, pooling=pooling).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.slow
@pytest.mark.parametrize("check", ["test_schema", "test_autograd_registration", "test_faketensor"])
def test_the_operator_follows_the_rules_of_torch(check: str) -> None:
    rois = torch.tensor(BOXES[:2]), torch.tensor([1, 0]), torch.tensor([0, 1])
    for config in (RoIPoolConfig(), RoIAlignConfig(sampling_ratio=1)):
        arguments = (maps(), *rois, 4.0, 1, *config.pooling())
        torch.library.opcheck(torch.ops.maskrcnn.pool_levels.default, arguments, test_utils=check)
    boxes, _, groups = tensors(CHAIN)
    torch.library.opcheck(
        torch.ops.maskrcnn.greedy_nms.default, (boxes, groups, torch.tensor([9]), 0.5, 20), test_utils=check
    )


Coordinate = st.integers(-30, 70)
Box = st.tuples(Coordinate, Coordinate, st.integers(0, 50), st.integers(0, 50))


@pytest.mark.slow
@settings(max_examples=25)
@given(st.sampled_from(LAYERS), st.lists(Box, min_size=1, max_size=3), st.integers(0, 1), st.integers(0, 3))
def test_any_boxes(config: RoILayerConfig, whole: list, image: int, quarter: int) -> None:
    """Corners of whole and half cells, on which rounding and borders depend."""
    torch.manual_seed(quarter)
    boxes = torch.tensor([(x, y, x + width, y + height) for x, y, width, height in whole]).float() + quarter / 4
    assert_equal(config, maps(), boxes, torch.full((len(boxes),), image))


# ---- A model

MODEL = [
    "model.kernels=triton",
    "model.box_head.pool_size=2",
    "model.mask_head.pool_size=2",
    "model.sampling.batch_size_per_image=4",
    "model.rpn.training.post_nms_top_n=12",
    "model.rpn.inference.post_nms_top_n=4",
    "model.detection.detections_per_image=3",
]


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_and_its_gradients(compiled: bool) -> None:
    """Each kernel is one node of the graph."""
    config = read_config(Path(__file__).parents[1] / "tiny_fpn.yaml", ExperimentConfig, MODEL)
    model = config.model.build(2, pretrained=False)
    dataset = config.data.train.build()
    transform = config.data.build_train_transform(dataset)
    batch = next(iter(evaluation_loader(dataset, transform, batch_size=2, workers=0, size_divisor=model.size_divisor)))
    results = []
    for kernels in (False, True):
        model.zero_grad()
        train, detect = model, model.detect
        with pytest.MonkeyPatch.context() as patch:
            if kernels:
                patch.setattr(cpu, "takes_short_cuts", lambda tensor: False)
            if kernels and compiled:
                train, detect = (torch.compile(each, fullgraph=True, backend="aot_eager") for each in (train, detect))
            losses = train(batch.images, batch.targets)
            losses.total.backward()
            detections = detect(batch.images)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((tuple(losses), gradients, detections.boxes, detections.scores, detections.labels))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
