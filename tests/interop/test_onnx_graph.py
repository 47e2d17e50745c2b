"""Single operators in ONNX, run with onnxruntime: NMS and all RoI layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from maskrcnn.ops.nms import batched_nms, nms_as_operator, nms_of_levels
from maskrcnn.ops.roi import RoIAlignConfig, RoILayerConfig, RoIPoolConfig, RoIPooler, RoIWarpConfig

onnxruntime = pytest.importorskip("onnxruntime")
onnx_graph = pytest.importorskip("maskrcnn.interop.onnx_graph", exc_type=ImportError)

LAYERS: list[RoILayerConfig] = [
    RoIPoolConfig(),
    RoIPoolConfig(rounding="floor"),
    RoIWarpConfig(),
    RoIWarpConfig(aggregate="maximum"),
    RoIAlignConfig(),
    RoIAlignConfig(sampling_ratio=0),
    RoIAlignConfig(aggregate="maximum"),
    RoIAlignConfig(aligned=False),
]
SIZES = (30, 20, 6)  # of three levels
BOXES = [
    [13.3, 9.1, 22.9, 15.7],
    [6.6, 2.3, 50.1, 30.9],
    [0.0, 0.0, 52.0, 36.0],
    [5.0, 6.0, 6.0, 7.0],
    [9.0, 8.0, 9.0, 8.0],
    [3.0, 4.0, 3.0, 20.0],
    [-8.0, -8.0, 4.0, 4.0],
    [-4.0, -4.0, -4.0, -4.0],
    [52.0, 36.0, 52.0, 36.0],
    [140.0, 0.0, 149.0, 9.0],
    [-99.0, -99.0, -90.0, -90.0],
    [-500.0, -700.0, 900.0, 1100.0],
]


class Function(nn.Module):
    def __init__(self, function: Callable[..., tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.function = function

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.function(images)


def run(function: Callable[[Tensor], tuple[Tensor, ...]], values: Tensor, path: Path) -> list[Tensor]:
    """Return the outputs of a function for `values` from an ONNX file, whose input has any first dimension."""
    any_size = {0: torch.export.Dim.DYNAMIC}
    with nms_as_operator(), torch.no_grad():
        program = torch.export.export(Function(function), (values,), dynamic_shapes={"images": any_size}, strict=False)
        count = len(function(values))
    onnx_graph.write_onnx(program, path, [f"output{n}" for n in range(count)], {"key": "value"})
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map == {"key": "value"}
    return [torch.from_numpy(output) for output in session.run(None, {"images": values.numpy()})]


def both_kinds_of_nms(values: Tensor) -> tuple[Tensor, ...]:
    boxes, scores, groups = values[..., :4], values[..., 4], values[..., 5].long()
    by_group = batched_nms(boxes, scores, groups, iou_threshold=0.7, count=60)
    return *by_group, *nms_of_levels(boxes, scores, SIZES, iou_threshold=0.3, count=60)


def test_nms_keeps_the_same_boxes(tmp_path: Path) -> None:
    """Boxes on a coarse grid, with equal scores, equal boxes, boxes without area, IoUs of 0.7 and padding."""
    corners = torch.randint(0, 12, (3, sum(SIZES), 2, 2)).float()
    boxes = torch.cat((corners.amin(dim=2), corners.amax(dim=2)), dim=-1)
    boxes[:, :2] = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 7]])
    scores = torch.randint(1, 9, (3, sum(SIZES))) / 8
    scores[:, ::5] = -torch.inf
    scores[2] = -torch.inf
    values = torch.cat((boxes, scores[..., None], torch.randint(1, 4, (3, sum(SIZES), 1)).float()), dim=-1)
    outputs, expected = run(both_kinds_of_nms, values, tmp_path / "nms.onnx"), both_kinds_of_nms(values)
    for n in (0, 2):
        kept = expected[n + 1] > -torch.inf
        assert kept.any(dim=1).tolist() == [True, True, False]
        assert torch.equal(outputs[n + 1], expected[n + 1])
        for image in range(2):  # the order of equal scores is not defined
            assert set(outputs[n][image][kept[image]].tolist()) == set(expected[n][image][kept[image]].tolist())


@pytest.mark.slow
def test_every_roi_layer(tmp_path: Path) -> None:
    """Boxes on both levels, without area, on and over the border, outside, and huge."""
    features, images = torch.randn(2, 5, 9, 13), torch.randint(0, 2, (len(BOXES),))
    boxes = torch.tensor(BOXES)
    coarse = features[..., ::2, ::2] * 2
    layers = [RoIPooler(config.build(), strides=(4, 8), size=3) for config in LAYERS]

    def pool(values: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer([features, coarse], values[:, :4], values[:, 4].long()) for layer in layers)

    values = torch.cat((boxes, images[:, None].float()), dim=1)
    outputs: Sequence[Tensor] = run(pool, values, tmp_path / "roi.onnx")
    for config, output, expected in zip(LAYERS, outputs, pool(values), strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5, msg=lambda text, c=config: f"{c}: {text}")
