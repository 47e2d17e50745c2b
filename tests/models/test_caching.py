"""What a model computes once: folded norms and anchors follow their buffers, and are not kept where that is unsafe."""

from __future__ import annotations

import pytest
import torch

from maskrcnn.models.norms import FrozenBatchNorm2d
from maskrcnn.models.rpn import AnchorGenerator
from maskrcnn.ops.anchors import base_anchors, grid_anchors


def norm() -> FrozenBatchNorm2d:
    torch.manual_seed(0)
    layer = FrozenBatchNorm2d(5)
    for buffer in layer.buffers():
        buffer.copy_(torch.rand(5) + 0.5)
    return layer


def assert_fresh(layer: FrozenBatchNorm2d) -> None:
    assert all(map(torch.equal, layer.scale_and_shift(), layer._fold()))


def test_a_fold_is_computed_once_for_the_same_buffers() -> None:
    layer = norm()
    scale, shift = layer.scale_and_shift()
    again = layer.scale_and_shift()
    assert again[0] is scale
    assert again[1] is shift
    assert_fresh(layer)


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_a_fold_follows_each_buffer(name: str) -> None:
    layer = norm()
    layer.scale_and_shift()
    getattr(layer, name).mul_(2)
    assert_fresh(layer)
    layer.load_state_dict(FrozenBatchNorm2d(5).state_dict())
    assert_fresh(layer)
    layer.double()
    assert layer.scale_and_shift()[0].dtype == torch.float64
    setattr(layer, name, torch.ones(5, dtype=torch.float64))
    assert_fresh(layer)


def test_nothing_of_inference_mode_is_kept() -> None:
    layer = norm()
    with torch.inference_mode():
        assert layer.scale_and_shift()[0].is_inference()
    assert not layer.scale_and_shift()[0].is_inference()


def test_nothing_is_kept_while_a_graph_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = norm()
    monkeypatch.setattr("maskrcnn.models.norms.may_cache", lambda source: False)
    assert layer.scale_and_shift()[0] is not layer.scale_and_shift()[0]


def test_anchors_are_those_of_the_sizes() -> None:
    base = [base_anchors((size,), (0.5, 1.0, 2.0)) for size in (8, 16)]
    generator = AnchorGenerator(base, strides=(4, 8))
    small, large = ([torch.zeros(2, 1, n, n + 1), torch.zeros(2, 1, n // 2, n)] for n in (4, 6))
    first = generator(small)
    assert generator([level.clone() for level in small])[0] is first[0]
    for maps in (large, small):
        for anchors, one, level, stride in zip(generator(maps), base, maps, (4, 8), strict=True):
            expected = grid_anchors(one, height=level.shape[2], width=level.shape[3], stride=stride)
            assert torch.equal(anchors, expected)
    assert generator.double()(small)[0].dtype == torch.float64
