"""Fixtures that several test files share."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from launcher import Launcher
from pydantic import create_model
from torch import nn

from maskrcnn.config import Part, Section

REPOSITORY = Path(__file__).parents[1]

# The same cases in each run, and no time limit: a busy machine is no failure.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True, scope="session")
def _usual_signals() -> None:
    """Handle signals as in a terminal, also in child processes; in the background of a script, SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    """Starts commands in processes of their own."""
    if not sys.platform.startswith("linux"):
        pytest.skip("forks a process that has imported torch, which is safe only on Linux")
    launcher = Launcher()
    yield launcher
    launcher.close()


@pytest.fixture
def logging_restored() -> Iterator[None]:
    """A run adds a log file to the root logger."""
    root, package = logging.getLogger(), logging.getLogger("maskrcnn")
    before = root.handlers[:], root.level, package.level
    yield
    for handler in set(root.handlers) - set(before[0]):
        handler.close()
    root.handlers = before[0]
    root.setLevel(before[1])
    package.setLevel(before[2])


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the COCO subset, the cocoapi fixture and the ImageNet weights, which the project lacks.

    `MASKRCNN_SHARED_DATA` names it; without it, `../shared/data` beside the checkout is used.
    """
    folder = Path(os.environ.get("MASKRCNN_SHARED_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"the shared test data is absent: no folder {folder}")
    return folder


@pytest.fixture
def choose() -> Callable[[type[Part], dict[str, Any]], Part]:
    """Validates the value of a field whose type is an extension point."""

    def choose(point: type[Part], values: dict[str, Any]) -> Part:
        return create_model("Holder", __base__=Section, part=(point, ...)).model_validate({"part": values}).part

    return choose


RENAMED = {
    "backbone.fpn.inner_blocks.{}.0": "neck.lateral.{}.conv",
    "backbone.fpn.layer_blocks.{}.0": "neck.output.{}.conv",
    "roi_heads.mask_head.{}.0": "mask_head.convs.{}",
    "rpn.head.conv.0.0": "rpn.head.conv",
    "rpn.head.cls_logits": "rpn.head.objectness_logits",
    "rpn.head.bbox_pred": "rpn.head.anchor_deltas",
    "roi_heads.box_head.fc6": "box_head.trunk.1",
    "roi_heads.box_head.fc7": "box_head.trunk.3",
    "roi_heads.box_predictor.cls_score": "box_head.cls_score",
    "roi_heads.box_predictor.bbox_pred": "box_head.bbox_pred",
    "roi_heads.mask_predictor.conv5_mask": "mask_head.upsample",
    "roi_heads.mask_predictor.mask_fcn_logits": "mask_head.logits",
}
NAMES = {old.format(i): new.format(i) for old, new in RENAMED.items() for i in range(4)}
BACKGROUND_ROWS = {"box_head.bbox_pred": 4, "mask_head.logits": 1}  # torchvision predicts these for background too


@pytest.fixture(scope="session")
def copy_torchvision_weights() -> Callable[[nn.Module, nn.Module], None]:
    """Copies the weights of torchvision's Mask R-CNN with a pyramid into ours."""
    return _copy_weights


def _copy_weights(theirs: nn.Module, ours: nn.Module) -> None:
    state = {}
    for name, tensor in theirs.state_dict().items():
        module, kind = name.rsplit(".", 1)
        new = NAMES.get(module, module.replace("backbone.body.", "backbone."))
        state[f"{new}.{kind}"] = tensor[BACKGROUND_ROWS.get(new, 0) :]
    ours.load_state_dict(state)
