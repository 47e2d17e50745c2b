"""Export of a trained model to a file that runs without this package: ONNX, or torch.export."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maskrcnn.data.transforms import Compose, Transform
from maskrcnn.engine.predictor import Predictor
from maskrcnn.errors import InputError
from maskrcnn.interop.export_check import Checked, check
from maskrcnn.interop.graph import OUTPUTS, trace
from maskrcnn.models.mask_rcnn import PixelNormalizer
from maskrcnn.runtime.outputs import explaining

logger = logging.getLogger(__name__)

ONNX, TORCH = ".onnx", ".pt2"
INSTALL = "pip install 'maskrcnn[export]'"

Runner = Callable[[Tensor], Sequence[Tensor]]  # from images (B, 3, H, W) uint8 to the outputs of the graph


def export_model(predictor: Predictor, out: Path) -> list[Checked]:
    """Write the model of a predictor as a graph (`interop.graph.DetectionGraph`) with its metadata, and check the file.

    Args:
        predictor: the model, its classes, and the transforms before it, which are not part of the graph.
        out: the file, `NAME.onnx` or `NAME.pt2`.

    Returns:
        What the check found for each image; nothing if onnxruntime is not installed.

    Raises:
        InputError: the suffix is another one, the file exists or cannot be written, or a package is missing.
        CheckFailed: the file gives other detections than the model. Then there is no file.
    """
    if out.suffix not in (ONNX, TORCH):
        raise InputError(f"{out}: the suffix says the format: {ONNX}, or {TORCH} for torch.export")
    if out.suffix == ONNX:
        _require("onnx", "onnxscript")
    _require_absent(out)
    with explaining(out.parent):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=out.parent) as folder:
            path = Path(folder) / out.name
            _write(predictor, path)
            run = runner(path)
            checked = [] if run is None else check(predictor.model, run)
            _require_absent(out)
            os.replace(path, out)
    return checked


def runner(path: Path) -> Runner | None:
    """Return a function that runs an exported file on the CPU, or None if the package for it is not installed."""
    if path.suffix == TORCH:
        return torch.export.load(path).module()
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(output) for output in session.run(None, {"images": images.numpy()})]


def metadata_of(predictor: Predictor) -> dict[str, Any]:
    """Return what the use of an exported file needs to know, in plain types."""
    model = predictor.model
    assert isinstance(model.pixels, PixelNormalizer)
    return {
        "maskrcnn_version": version("maskrcnn"),
        "classes": list(predictor.classes.names),  # of labels 1, 2, ...
        "category_ids": list(predictor.classes.category_ids),
        "transforms": _described(predictor.transform),  # before the graph
        "pixels": {  # inside the graph
            "order": model.pixels.order,
            "mean": model.pixels.mean.flatten().tolist(),
            "std": model.pixels.std.flatten().tolist(),
        },
        "stride": model.size_divisor,  # to which the graph pads
        "score_threshold": model.selector.score_threshold,
        "nms_threshold": model.selector.nms_threshold,
        "detections_per_image": model.selector.detections_per_image,
        "mask_size": 0 if model.mask_head is None else model.mask_head.mask_size,
        "paste": predictor.paste,
    }


def _write(predictor: Predictor, path: Path) -> None:
    model, metadata = predictor.model, metadata_of(predictor)
    program = trace(model, nms_operator=path.suffix == ONNX)
    if path.suffix == TORCH:
        torch.export.save(program, path, extra_files={"metadata.json": json.dumps(metadata)})
        return
    from maskrcnn.interop.onnx_graph import OPSET, write_onnx

    outputs = OUTPUTS if model.mask_head is not None else OUTPUTS[:3]
    write_onnx(program, path, outputs, {key: json.dumps(value) for key, value in metadata.items()})
    logger.info("ONNX opset %d, %.0f MB", OPSET, path.stat().st_size / 1e6)


def _described(transform: Transform) -> list[dict[str, Any]]:
    """Return name and settings of each step."""
    steps = transform.steps if isinstance(transform, Compose) else (transform,)
    return [
        {"name": getattr(step, "__name__", type(step).__name__)}
        | (dataclasses.asdict(step) if dataclasses.is_dataclass(step) and not isinstance(step, type) else {})
        for step in steps
    ]


def _require(*packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise InputError(f"ONNX needs the packages {' and '.join(missing)}: {INSTALL}")


def _require_absent(out: Path) -> None:
    if os.path.lexists(out):
        raise InputError(f"{out} exists; choose another file with --out")
