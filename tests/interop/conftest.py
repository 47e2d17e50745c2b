"""A small model of ours, and its weights as other frameworks would store them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from maskrcnn.config import read_config
from maskrcnn.experiment import ExperimentConfig
from maskrcnn.interop.export import export
from maskrcnn.interop.layouts import Layout
from maskrcnn.structures import ClassTable

TINY = Path(__file__).parents[1] / "tiny_fpn.yaml"
CLASSES = ClassTable(("disc", "cross"), (1, 2))

State = dict[str, Tensor]


def _tiny_weights(*overrides: str, classes: ClassTable = CLASSES) -> State:
    config = read_config(TINY, ExperimentConfig, ["model.mask_head.depth=4", "model.box_head.depth=2", *overrides])
    state = config.model.build(len(classes), pretrained=False).state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point():  # every row differs, also those of biases and of norms
            tensor.copy_(torch.rand_like(tensor) * 0.1 + ("running_var" in name))
    return state


@pytest.fixture
def tiny_weights() -> Callable[..., State]:
    """Returns the random weights of a small model, with overrides of its configuration, and `classes`."""
    return _tiny_weights


@pytest.fixture
def foreign_state() -> Callable[..., State]:
    """Returns the same in the names and orders of a layout of another framework, the first argument."""

    def foreign_state(layout: Layout, *overrides: str, classes: ClassTable = CLASSES) -> State:
        return export(_tiny_weights(*overrides, classes=classes), classes, layout, source="tiny")

    return foreign_state
