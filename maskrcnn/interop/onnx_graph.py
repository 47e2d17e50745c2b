"""The graph of a model in ONNX. It needs the packages onnx and onnxscript; import it only where they are installed.

Shapes: B images, N boxes, G groups, S kept boxes.
"""

# Without `from __future__ import annotations`: the exporter reads the types of the translations below.

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir
import torch
import torchvision.ops  # noqa: F401 (defines torch.ops.torchvision)
from onnxscript import BOOL, FLOAT, INT64, opset18

import maskrcnn.ops.nms  # noqa: F401 (defines torch.ops.maskrcnn)

OPSET = 18
op: Any = opset18  # its annotations describe values of ONNX, not what a translation passes on
AXES = ("batch", "channels", "height", "width")  # names of the axes of any length
SMALLEST = float(torch.finfo(torch.float32).min)


def nms(boxes: FLOAT, scores: FLOAT, groups: INT64, iou_threshold: float, count: int) -> BOOL:
    """Translate `maskrcnn::nms` to NonMaxSuppression, which takes the scores of each group: `(B, G, N)`."""
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    second = op.Constant(value_ints=[1])  # the axis
    names = op.Unsqueeze(op.Range(zero, op.Add(op.ReduceMax(groups, keepdims=0), one), one), second)  # (G, 1)
    is_member = op.Equal(op.Unsqueeze(groups, second), names)
    of_groups = op.Where(is_member, op.Unsqueeze(scores, second), op.Constant(value_float=-float("inf")))
    selected = op.NonMaxSuppression(
        boxes,
        of_groups,
        op.Constant(value_ints=[count]),
        op.Constant(value_floats=[iou_threshold]),
        op.Constant(value_floats=[SMALLEST]),  # only scores above it, without -inf
    )  # (S, 3): image, group and box
    indices = op.Gather(selected, op.Constant(value_ints=[0, 2]), axis=1)
    ones = op.Expand(one, op.Shape(indices, start=0, end=1))
    return op.Cast(op.ScatterND(op.Expand(zero, op.Shape(scores)), indices, ones), to=onnx_ir.DataType.BOOL)


def roi_pool(
    features: FLOAT, rois: FLOAT, spatial_scale: float, pooled_height: int, pooled_width: int
) -> tuple[FLOAT, FLOAT]:
    """Translate `torchvision::roi_pool`, of whose second output, for the gradient, nothing is used."""
    pooled = op.MaxRoiPool(features, rois, pooled_shape=[pooled_height, pooled_width], spatial_scale=spatial_scale)
    return pooled, pooled


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.maskrcnn.nms.default: nms,
    torch.ops.torchvision.roi_pool.default: roi_pool,
}


def write_onnx(
    program: torch.export.ExportedProgram, path: Path, outputs: Sequence[str], metadata: Mapping[str, str]
) -> None:
    """Write a graph with the input `images` and these outputs, whose first dimension is the batch, as one ONNX file."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of operators of other packages that are not installed
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            written = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=["images"],
                output_names=list(outputs),
                custom_translation_table=TRANSLATIONS,
                verbose=False,
            )
    finally:
        logger.setLevel(level)
    assert written is not None
    graph = written.model.graph
    for value in (*graph.inputs, *graph.outputs):
        assert value.shape is not None
        named = zip(value.shape.dims, AXES, strict=False)
        value.shape = onnx_ir.Shape([dim if isinstance(dim, int) else name for dim, name in named])
    written.model.metadata_props.update(metadata)
    written.save(path, external_data=False)
