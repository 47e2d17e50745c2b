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
from launcher import ForkingLauncher, Launcher
from pydantic import create_model

from maskrcnn.config import Part, Section

REPOSITORY = Path(__file__).parents[1]

# The same cases in each run, and no time limit: a busy machine is no failure.
hypothesis.settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
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
    launcher = ForkingLauncher() if sys.platform.startswith("linux") else Launcher()
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
    logging.getLogger("maskrcnn.data").setLevel(logging.NOTSET)


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
