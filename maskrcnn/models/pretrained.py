"""Load backbone weights of an image classifier: torchvision's ImageNet weights (cached or downloaded), or a file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from urllib.error import URLError

from torch import Tensor, nn
from torch.hub import download_url_to_file, get_dir
from torchvision.models import get_model_weights

from maskrcnn.errors import InputError, first_of
from maskrcnn.paths import expand
from maskrcnn.runtime.files import read_tensors

logger = logging.getLogger(__name__)

CLASSIFIERS = ("fc.", "classifier.6.")  # the last layer of a ResNet and of a VGG: 1000 ImageNet classes

# Frozen stages of random weights would never learn.
RANDOM_WEIGHTS = "--set model.backbone.weights=none --set model.backbone.freeze=0"


def load_pretrained(modules: Sequence[nn.Module | None], weights: str, *, architecture: str) -> None:
    """Load the tensors that `modules` share, by name, with a torchvision classifier.

    Args:
        modules: modules with torchvision's parameter names; None is skipped.
        weights: `imagenet`, or the path of a state dict.
        architecture: torchvision's name of the classifier; `imagenet` loads its weights.

    Raises:
        InputError: if the file is missing or unreadable, a tensor has the wrong shape, or no tensor has a known name.
            Nothing is loaded then.
    """
    path = imagenet_file(architecture) if weights == "imagenet" else expand(weights)
    state = read_tensors(path)
    targets: dict[str, Tensor] = {}
    for module in modules:
        targets |= module.state_dict() if module is not None else {}
    expected = {name for name in targets if not name.endswith("num_batches_tracked")}
    shared = expected & state.keys()
    mismatched = [name for name in sorted(shared) if state[name].shape != targets[name].shape]
    if mismatched or not shared:
        raise InputError(_error_message(path, architecture, targets, state, mismatched))
    for name in shared:
        targets[name].copy_(state[name])  # state_dict() returns the modules' own tensors, not copies
    _log_summary(path, shared, missing=sorted(expected - shared), unused=sorted(state.keys() - expected))


def imagenet_file(architecture: str) -> Path:
    """Return the path of torchvision's ImageNet-1k weights of `architecture`; download them if they are not cached.

    Raises:
        InputError: if torchvision has no such weights, or if the download fails.
    """
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
            f"--set model.backbone.weights=FILE, or start from random weights with {RANDOM_WEIGHTS}"
        ) from error
    return path


def _url(architecture: str) -> str:
    try:
        return get_model_weights(architecture).IMAGENET1K_V1.url
    except (ValueError, AttributeError) as error:
        raise InputError(
            f"model.backbone.weights: torchvision has no ImageNet weights of {architecture}; name a file with --set "
            f"model.backbone.weights=FILE, or start from random weights with {RANDOM_WEIGHTS}"
        ) from error


def _error_message(
    path: Path, architecture: str, targets: dict[str, Tensor], state: dict[str, Tensor], mismatched: list[str]
) -> str:
    if not mismatched:
        example = min(state, default="nothing")
        return (
            f"{path}: none of its {len(state)} tensors has a parameter name of {architecture} (first name: {example})"
        )
    lines = [
        f"{name}: {tuple(state[name].shape)} in the file, {tuple(targets[name].shape)} in the model"
        for name in mismatched
    ]
    return "\n  ".join([f"{path}: does not fit {architecture}; nothing was loaded:", *first_of(lines)])


def _log_summary(path: Path, shared: set[str], *, missing: list[str], unused: list[str]) -> None:
    unused = [name for name in unused if not name.startswith(CLASSIFIERS) and not name.endswith("num_batches_tracked")]
    logger.info("%s: loaded %d tensors", path, len(shared))
    if missing:
        logger.warning(
            "%s: %d tensors of the model are missing and keep their random initialization: %s",
            path,
            len(missing),
            ", ".join(missing),
        )
    if unused:
        logger.info("%s: ignored %d tensors that the model does not have: %s", path, len(unused), ", ".join(unused))
