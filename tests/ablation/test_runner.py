"""Trainings of a few steps, each in its own process."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from maskrcnn.ablation import runner
from maskrcnn.ablation.plan import Plan, load_plan
from maskrcnn.ablation.runner import RunsFailed, check_runs, is_finished, train_missing
from maskrcnn.engine.checkpoint import load_checkpoint
from maskrcnn.engine.metrics import last_record
from maskrcnn.errors import InputError
from maskrcnn.runtime.outputs import LOCK, MARKER

REPOSITORY = Path(__file__).parents[2]

EXPERIMENT = f"""
base: {Path(__file__).parents[1] / "tiny.yaml"}
data:
  train: {{length: 4}}
  validation: {{length: 4}}
training:
  schedule: {{iterations: STEPS}}
  evaluate_every: 100000
  checkpoint_every: 5
evaluation: {{batch_size: 4}}
"""

ABLATION = """
title: The RoI layer
experiment: experiment.yaml
baseline: pool
seeds: [3]
variants:
  pool: {set: ["model.roi={kind: roi_pool}"]}
  align: {set: ["model.roi={kind: roi_align}"]}
"""


def plan_of(folder: Path, *, steps: int = 2) -> Plan:
    (folder / "experiment.yaml").write_text(EXPERIMENT.replace("STEPS", str(steps)))
    (folder / "ablation.yaml").write_text(ABLATION)
    return load_plan(folder / "ablation.yaml", folder / "out")


@pytest.mark.parametrize(("chosen", "threads"), [("3", 3), ("4,2", 4), ("", 4), (None, 4)])
def test_the_user_may_choose_the_threads(chosen: str | None, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "usable_cores", lambda: 8)
    if chosen is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    assert runner.threads_per_run(2) == threads


def test_without_a_terminal_the_log_shows_the_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan = plan_of(tmp_path)
    monkeypatch.setattr(runner, "REPORT_SECONDS", 0)
    with caplog.at_level("INFO"), runner.Progress(plan.runs) as progress:
        progress.show(plan.runs[:1])
    assert caplog.messages[-1] == "0 of 2 runs finished; pool/seed_3 0"


def test_a_failed_run_does_not_stop_the_others(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    broken = plan.runs[0]
    # A folder in place of the checkpoint file: the run starts, but cannot save.
    (broken.directory.checkpoints / "last.pt").mkdir(parents=True)
    with pytest.raises(RunsFailed, match=r"pool/seed_3 failed with status [12] \(.*console.txt\):\n"):
        train_missing(plan, jobs=2)
    assert [is_finished(run) for run in plan.runs] == [False, True]


def wait_for_steps(plan: Plan, steps: int) -> None:
    for _ in range(600):
        records = [last_record(run.directory.metrics) for run in plan.runs]
        if all(record is not None and record["iteration"] >= steps for record in records):
            return
        time.sleep(0.1)
    pytest.fail("the runs did not start")


def test_what_is_missing_is_trained_and_reported_and_what_is_done_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    plan = plan_of(tmp_path)
    assert not any(map(is_finished, plan.runs))
    arguments = ["ablate.py", str(tmp_path / "ablation.yaml"), "--out", str(plan.out), "--jobs", "2"]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(REPOSITORY / "tools" / "ablate.py"), run_name="__main__")
    assert end.value.code == 0
    assert all(map(is_finished, plan.runs))
    for run in plan.runs:
        assert (run.directory.evaluation / "results.json").exists()
        assert "threads: 1" in run.directory.environment.read_text() or (os.cpu_count() or 1) > 3
    written = {path.name for path in plan.out.iterdir()} - {LOCK, MARKER}
    assert written == {"report.md", "report.html", "results.json", "tensorboard"}
    report = json.loads((plan.out / "results.json").read_text())
    for name in ("pool", "align"):
        (run,) = plan.runs_of(name)
        metrics = json.loads((run.directory.evaluation / "metrics.json").read_text())
        assert report["variants"][name]["mean"]["mask/AP"] == metrics["mask/AP"]
        assert report["variants"][name]["cost"]["memory"] > 2**20
    assert "mask AP" in capsys.readouterr().out

    modified = [run.directory.last.stat().st_mtime_ns for run in plan.runs]
    train_missing(plan)
    assert [run.directory.last.stat().st_mtime_ns for run in plan.runs] == modified


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_an_interrupted_ablation_goes_on_where_it_stopped(tmp_path: Path, end: signal.Signals) -> None:
    """The workers of a killed ablation notice its end, save and stop."""
    plan = plan_of(tmp_path, steps=200)
    command = [sys.executable, "tools/ablate.py", str(tmp_path / "ablation.yaml"), "--out", str(plan.out), "--jobs=2"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    wait_for_steps(plan, 3)
    process.send_signal(end)
    _, stderr = process.communicate()
    if end is signal.SIGINT:
        assert process.returncode == 130
        assert "every run is saved; repeat the command to continue" in stderr
    for run in plan.runs:
        for _ in range(100):
            if run.directory.last.exists():
                break
            time.sleep(0.1)
        assert 3 <= load_checkpoint(run.directory.last).iteration < 200
    time.sleep(1)  # until the workers of a killed ablation have exited
    train_missing(plan, jobs=2)
    assert all(map(is_finished, plan.runs))
    undisturbed = load_plan(tmp_path / "ablation.yaml", tmp_path / "undisturbed" / "out")
    train_missing(undisturbed, jobs=2)
    for one, other in zip(plan.runs, undisturbed.runs, strict=True):
        left, right = (load_checkpoint(run.directory.last).model for run in (one, other))
        assert all(torch.equal(value, right[key]) for key, value in left.items())


def test_every_variant_is_checked_before_the_first_step(tmp_path: Path) -> None:
    plan_of(tmp_path)
    invalid = ABLATION.replace('["model.roi={kind: roi_align}"]', "[model.backbone.weights=missing.pth]")
    (tmp_path / "ablation.yaml").write_text(invalid)
    plan = load_plan(tmp_path / "ablation.yaml", tmp_path / "out")
    with pytest.raises(InputError, match=r"variant align: .*missing\.pth"):
        check_runs(plan)
    assert not (tmp_path / "out").exists()
