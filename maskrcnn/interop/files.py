"""Read a file of weights, whichever program wrote it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import is_zipfile

from safetensors.torch import load_file
from torch import Tensor

from maskrcnn.engine.checkpoint import Checkpoint, checkpoint_of, is_checkpoint, save_checkpoint
from maskrcnn.errors import InputError
from maskrcnn.interop.certificate import Certificate
from maskrcnn.interop.conversion import Converted, convert
from maskrcnn.interop.unpickler import read_pickle
from maskrcnn.runtime.files import json_text, read_mapping, read_tensors, write_text

CONTAINERS = ("model", "state_dict", "model_state_dict", "blobs")  # keys under which programs store the state dict
CAFFE_STYLE = {  # of MMDetection
    "model": {
        "pixels": {"order": "bgr", "mean": [103.53, 116.28, 123.675], "std": [1.0, 1.0, 1.0]},
        "backbone": {"stride_in_1x1": True},
    }
}
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
    if path.suffix == ".safetensors":
        return read_mapping(path, load_file)
    if path.suffix in PICKLES and not is_zipfile(path):
        return read_mapping(path, lambda file: read_pickle(file.read_bytes()))
    return read_tensors(path)


def write_weights(out: Path, weights: Weights) -> list[Path]:
    """Write a checkpoint, and the certificate of its conversion beside it if there is one; return their paths.

    Raises:
        InputError: a file of such a name exists, which is never replaced.
    """
    certificate = out.with_name(f"{out.stem}.certificate.json")
    written = [out] if weights.certificate is None else [out, certificate]
    for path in written:
        if os.path.lexists(path):
            raise InputError(f"{path} exists; choose another file with --out")
    save_checkpoint(out, weights.checkpoint)
    if weights.certificate is not None:
        write_text(certificate, json_text(weights.certificate.to_dict(), indent=2) + "\n")
    return written


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
