"""Fixtures that several test files share."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


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
