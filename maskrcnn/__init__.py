"""Mask R-CNN, composed from YAML and trained from the command line. Start reading at `structures.py`.

    predictor = maskrcnn.load("runs/shapes/checkpoints/best.pt")
    instances = predictor("photo.jpg")

The names below are imported at their first use, so that `import maskrcnn` is fast.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskrcnn.engine.evaluator import Evaluator
    from maskrcnn.engine.instances import Instances
    from maskrcnn.engine.predictor import Predictor
    from maskrcnn.engine.trainer import Trainer, TrainerOptions
    from maskrcnn.experiment import load, load_config

__all__ = ["Evaluator", "Instances", "Predictor", "Trainer", "TrainerOptions", "__version__", "load", "load_config"]

_MODULES = {
    "Evaluator": "maskrcnn.engine.evaluator",
    "Instances": "maskrcnn.engine.instances",
    "Predictor": "maskrcnn.engine.predictor",
    "Trainer": "maskrcnn.engine.trainer",
    "TrainerOptions": "maskrcnn.engine.trainer",
    "load": "maskrcnn.experiment",
    "load_config": "maskrcnn.experiment",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("maskrcnn")
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'maskrcnn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
