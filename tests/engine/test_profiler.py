"""The profiler trace of steps 10 to 20."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from maskrcnn.engine.profiler import Profiler


def traced_spans(run_dir: Path, steps: int) -> list[str]:
    """Run `steps` steps of one addition and one multiplication; return the names of the spans in the trace."""
    with Profiler(run_dir) as profiler:
        for _ in range(steps):
            torch.add(torch.ones(3), 1).mul(2)
            profiler.step()
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    if not files:
        return []
    assert [str(path.relative_to(run_dir)) for path in files] == ["profile/steps_10_to_20.json"]
    return [event["name"] for event in json.loads(files[0].read_text())["traceEvents"] if event.get("ph") == "X"]


def steps_of(names: list[str]) -> list[int]:
    return sorted({int(name.split("#")[1]) for name in names if name.startswith("ProfilerStep#")})


def test_steps_10_to_20_are_traced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    names = traced_spans(tmp_path, 23)
    assert steps_of(names) == list(range(10, 21))
    assert names.count("aten::add") == names.count("aten::mul") == 11
    assert str(tmp_path / "profile" / "steps_10_to_20.json") in caplog.text


def test_a_training_that_ends_early_writes_a_shorter_trace(tmp_path: Path) -> None:
    names = traced_spans(tmp_path, 12)
    assert steps_of(names)[:3] == [10, 11, 12]
    assert names.count("aten::mul") == 3


def test_a_training_that_ends_too_early_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert traced_spans(tmp_path, 5) == []
    assert "before step 10" in caplog.text
