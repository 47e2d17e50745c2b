"""Backbone weights from image classification: torchvision's files, from its cache, by download, or from a path."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from urllib.error import URLError

from torch import Tensor, nn
from torch.hub import download_url_to_file, get_dir
from torchvision.models import get_model_weights

from maskrcnn.errors import InputError
from maskrcnn.training.checkpoint import read_tensors

logger = logging.getLogger(__name__)

CLASSIFIERS = ("fc.", "classifier.6.")  # the last layer of a ResNet and of a VGG: 1000 ImageNet classes


def load_pretrained(modules: Sequence[nn.Module | None], weights: str, *, architecture: str) -> None:
    """Load what `modules` share with a torchvision classifier, whose parameter names they have.

    Args:
        modules: parts of the model; each takes the tensors that it has names for.
        weights: `imagenet`, or the path of a state dict.
        architecture: torchvision's name of the classifier, for `imagenet`.

    Raises:
        InputError: if the file is missing or cannot be read, if a tensor's shape does not fit, or if nothing fits.
    """
    path = imagenet_file(architecture) if weights == "imagenet" else Path(weights)
    state = read_tensors(path)
    wanted: dict[str, Tensor] = {}
    for module in modules:
        wanted |= module.state_dict() if module is not None else {}
    ours = {name for name in wanted if not name.endswith("num_batches_tracked")}
    shared = ours & state.keys()
    misfits = [name for name in sorted(shared) if state[name].shape != wanted[name].shape]
    if misfits or not shared:
        raise InputError(_complaint(path, architecture, wanted, state, misfits))
    for name in shared:
        wanted[name].copy_(state[name])  # state_dict() holds the live tensors
    _report(path, shared, missing=sorted(ours - shared), unused=sorted(state.keys() - ours))


def imagenet_file(architecture: str) -> Path:
    """torchvision's file of `architecture` trained on ImageNet-1k, from its cache or by download."""
    url = _url(architecture)
    path = Path(get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if path.is_file():
        return path
    logger.info("downloading %s", url)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        download_url_to_file(url, str(path))
    except (URLError, OSError) as error:
        raise InputError(
            f"model.backbone.weights: the ImageNet weights of {architecture} are not at {path}, and the download "
            f"failed ({error}). Fetch {url} on a machine with internet access and put it there, or name a file with "
            "--set model.backbone.weights=FILE, or start from random weights with --set model.backbone.weights=none"
        ) from error
    return path


def _url(architecture: str) -> str:
    try:
        return get_model_weights(architecture).IMAGENET1K_V1.url
    except (ValueError, AttributeError) as error:
        raise InputError(
            f"model.backbone.weights: torchvision has no ImageNet weights of {architecture}; name a file with --set "
            "model.backbone.weights=FILE, or start from random weights with --set model.backbone.weights=none"
        ) from error


def _complaint(
    path: Path, architecture: str, wanted: dict[str, Tensor], state: dict[str, Tensor], misfits: list[str]
) -> str:
    if not misfits:
        example = min(state, default="nothing")
        return f"{path}: none of its {len(state)} tensors has a name of {architecture} (it has {example})"
    lines = [f"  {name}: {tuple(state[name].shape)} in the file, {tuple(wanted[name].shape)} here" for name in misfits]
    more = f"\n  and {len(lines) - 10} more" if len(lines) > 10 else ""
    return f"{path}: does not fit {architecture}; nothing was loaded:\n" + "\n".join(lines[:10]) + more


def _report(path: Path, shared: set[str], *, missing: list[str], unused: list[str]) -> None:
    unused = [name for name in unused if not name.startswith(CLASSIFIERS) and not name.endswith("num_batches_tracked")]
    logger.info("%s: loaded %d tensors", path, len(shared))
    if missing:
        logger.warning(
            "%s: lacks %d tensors, which keep their random values: %s", path, len(missing), ", ".join(missing)
        )
    if unused:
        logger.info("%s: %d tensors have no place here: %s", path, len(unused), ", ".join(unused))
