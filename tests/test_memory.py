"""Peak memory of the process."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from maskrcnn.runtime.memory import peak_memory

CPU = torch.device("cpu")


def test_peak_memory_covers_what_was_used() -> None:
    size = 2**26
    block = torch.ones(size, dtype=torch.uint8)
    assert size <= peak_memory(CPU) < 2**40
    assert len(block) == size


def test_windows_has_no_peak_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setitem(sys.modules, "resource", None)
    assert math.isnan(peak_memory(CPU))
