"""Read a file of weights, whichever program wrote it."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple
from zipfile import is_zipfile

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from maskrcnn.config import validate
from maskrcnn.engine.checkpoint import FORMAT, Checkpoint, checkpoint_of, is_checkpoint, save_checkpoint
from maskrcnn.errors import InputError
from maskrcnn.interop.certificate import Certificate
from maskrcnn.interop.conversion import Converted, convert
from maskrcnn.interop.export import Target, export, numeric_differences, target_layout
from maskrcnn.interop.unpickler import read_pickle
from maskrcnn.models.mask_rcnn import MaskRCNNConfig
from maskrcnn.runtime.files import json_text, read_mapping, read_tensors, write_atomically, write_text

logger = logging.getLogger(__name__)

Format = Literal["maskrcnn", "safetensors", "torchvision", "detectron2"]

CONTAINERS = ("model", "state_dict", "model_state_dict", "blobs")  # keys under which programs store the state dict
CAFFE_STYLE = {  # of MMDetection
    "model": {
        "pixels": {"order": "bgr", "mean": [103.53, 116.28, 123.675], "std": [1.0, 1.0, 1.0]},
        "backbone": {"stride_in_1x1": True},
    }
}
SAFETENSORS = ".safetensors"
PICKLES = (".pkl", ".pickle")  # suffixes of files without torch's own format
WRAPPER = "module."  # the prefix of all names in a model that was trained in torch's DistributedDataParallel


class Weights(NamedTuple):
    """Weights of this model, with their configuration and classes."""

    checkpoint: Checkpoint
    certificate: Certificate | None  # of the conversion; None if this project wrote the file


def read_weights(path: Path, *, class_names: Sequence[str] = ()) -> Weights:
    """Read a checkpoint of this project, or the weights of another framework, converted (`interop.layouts`).

    Args:
        path: the file.
        class_names: names of the classes of another framework's file; by default those of COCO if the number fits.

    Raises:
        InputError: the file cannot be read, is damaged, holds other things than tensors and plain values, or its layout
            is unknown. The message names the file.
    """
    content = read_content(path)
    if is_checkpoint(content):
        return Weights(checkpoint_of(content, str(path)), None)
    stated = _stated(content)
    converted = convert(
        state_dict_of(content, str(path)),
        source=str(path),
        class_names=class_names or stated.class_names,
        found=stated.settings,
    )
    return Weights(_as_checkpoint(converted), converted.certificate)


def read_content(path: Path) -> dict[str, Any]:
    """Return the content of a file of `torch.save`, or with its suffix, of safetensors or pickled NumPy arrays.

    Raises:
        InputError: the file cannot be read, is damaged, or holds other things than tensors and plain values.
    """
    if path.suffix == SAFETENSORS:
        return read_mapping(path, _read_safetensors)
    if path.suffix in PICKLES and not is_zipfile(path):
        return read_mapping(path, lambda file: read_pickle(file.read_bytes()))
    return read_tensors(path)


def write_weights(out: Path, weights: Weights, to: Format = "maskrcnn") -> list[Path]:
    """Write weights, and the certificate of their conversion beside them if there is one; return the paths.

    Args:
        out: the file.
        weights: the weights, with a resolved configuration.
        to: `maskrcnn`, a checkpoint; `safetensors`, the same without the state of the training; or another framework.

    Raises:
        InputError: a file of such a name exists, which is never replaced, or the other framework has no such model.
    """
    certificate = out.with_name(f"{out.stem}.certificate.json")
    written = [out] if weights.certificate is None else [out, certificate]
    for path in written:
        if os.path.lexists(path):
            raise InputError(f"{path} exists; choose another file with --out")
    _write(out, weights.checkpoint, to)
    if weights.certificate is not None:
        write_text(certificate, json_text(weights.certificate.to_dict(), indent=2) + "\n")
    return written


def _write(out: Path, checkpoint: Checkpoint, to: Format) -> None:
    if (to == "safetensors") != (out.suffix == SAFETENSORS):
        raise InputError(f"{out}: --to safetensors, and no other format, has the suffix {SAFETENSORS}")
    if to == "maskrcnn":
        save_checkpoint(out, checkpoint)
    elif to == "safetensors":
        tensors = {name: tensor.contiguous() for name, tensor in checkpoint.model.items()}
        described = {"config": checkpoint.config, "classes": dataclasses.asdict(checkpoint.classes)}
        metadata = {"format": FORMAT, **{key: json.dumps(value) for key, value in described.items()}}
        write_atomically(out, lambda file: file.write(save(tensors, metadata)))
    else:
        state = exported(checkpoint, to, str(out))
        content = state if to == "torchvision" else {"model": state, "__author__": "maskrcnn"}
        write_atomically(out, lambda file: torch.save(content, file))


def exported(checkpoint: Checkpoint, to: Target, source: str) -> dict[str, Tensor]:
    """Return the state dict of another framework, and log which of its conventions differ from those of the weights.

    Raises:
        InputError: the other framework's model has no place for a tensor.
    """
    layout = target_layout(to, checkpoint.model)
    state = export(checkpoint.model, checkpoint.classes, layout, source=source)
    theirs = convert(state, source=source, class_names=checkpoint.classes.names).config["model"]
    models = (validate(model, MaskRCNNConfig, source=source) for model in (checkpoint.config["model"], theirs))
    lines = numeric_differences(*models)
    if lines:
        title = (
            f"{layout.name} has other settings (its own -> those of these weights); set them there, or numbers differ:"
        )
        logger.warning("%s", "\n  ".join([title, *lines]))
    return state


def _read_safetensors(path: Path) -> dict[str, Any]:
    """Return the tensors, or the content of a checkpoint if this project wrote the file."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if metadata.get("format") != FORMAT:
        return tensors
    empty: dict[str, Any] = {"average": {}, "optimizer": {}, "scaler": {}, "random_states": {}, "metrics": {}}
    config, classes = json.loads(metadata["config"]), json.loads(metadata["classes"])
    checkpoint = {"format": FORMAT, "iteration": 0, "model": tensors, "config": config, "versions": {}, **empty}
    return {**checkpoint, "classes": {key: tuple(values) for key, values in classes.items()}}


def state_dict_of(content: Mapping[str, Any], source: str) -> dict[str, Tensor]:
    """Return the tensors in the content of a file, without the wrapping that the training program added.

    Raises:
        InputError: there are none.
    """
    inner = next((content[key] for key in CONTAINERS if isinstance(content.get(key), Mapping)), content)
    tensors = {name: value for name, value in inner.items() if isinstance(value, Tensor)}
    if not tensors:
        raise InputError(f"{source}: it holds no tensors (its keys are {', '.join(map(str, list(content)[:10]))})")
    if all(name.startswith(WRAPPER) for name in tensors):
        tensors = {name.removeprefix(WRAPPER): tensor for name, tensor in tensors.items()}
    return tensors


class _Stated(NamedTuple):
    """What a file says besides its tensors."""

    class_names: tuple[str, ...] = ()
    settings: Mapping[str, Any] | None = None


def _stated(content: Mapping[str, Any]) -> _Stated:
    """Return the classes and the style of the backbone in a file of MMDetection 2.x or 3.x."""
    meta = content.get("meta")
    if not isinstance(meta, Mapping):
        return _Stated()
    sources = [source for source in (meta.get("dataset_meta"), meta) if isinstance(source, Mapping)]
    candidates = [source.get(key) for source in sources for key in ("classes", "CLASSES")]
    names = next((tuple(map(str, names)) for names in candidates if isinstance(names, list | tuple) and names), ())
    text = str(meta.get("cfg", meta.get("config", "")))
    return _Stated(names, CAFFE_STYLE if re.search(r"style=['\"]caffe['\"]", text) else None)


def _as_checkpoint(converted: Converted) -> Checkpoint:
    return Checkpoint(
        iteration=0,
        model=converted.tensors,
        average={},
        optimizer={},
        scaler={},
        random_states={},
        classes=converted.classes,
        config=converted.config,
        metrics={},
        versions={"layout": converted.certificate.layout},
    )
