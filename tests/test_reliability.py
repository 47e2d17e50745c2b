"""Faults during training: kills, signals, a full disk, damaged files. The resumed run must be equal bit for bit.

Each run is a separate process of tools/train.py.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launcher import ForkingLauncher, Process
from PIL import Image

from maskrcnn.engine.checkpoint import load_checkpoint
from maskrcnn.engine.metrics import TIMING_KEYS, read_records

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="limits the size of files in a forked process, and reads /proc"
)

REPOSITORY = Path(__file__).parents[1]

# All state of a run: momenta, running statistics, averaged weights. Also gradient accumulation and evaluations.
EXPERIMENT = f"""
base: {Path(__file__).parent / "tiny_fpn.yaml"}
data:
  train: {{length: 20}}
  train_transforms: {{resize: {{short_side: [48, 64]}}}}
training:
  batch_size: 4
  grad_accum_steps: 2
  ema_decay: 0.9
  optimizer: {{kind: sgd, lr: 0.05}}
  schedule: {{iterations: 12, warmup_iterations: 3}}
  evaluate_every: 6
  checkpoint_every: 2
  keep_checkpoints: 2
"""


class Training:
    """A run directory and its training process."""

    def __init__(self, launcher: ForkingLauncher, folder: Path, *overrides: str) -> None:
        folder.mkdir(exist_ok=True)
        self.run = folder / "run"
        self.last = self.run / "checkpoints" / "last.pt"
        self._launcher = launcher
        config = folder / "experiment.yaml"
        config.write_text(EXPERIMENT)
        settings = [argument for override in overrides for argument in ("--set", override)]
        self._arguments = [config, "--out", self.run, "--device", "cpu", *settings]
        self.process: Process

    def start(self, *, largest_file: int = 0) -> None:
        """Start or resume the run; a positive `largest_file` limits the size of each file, in bytes."""
        resume = ["--resume"] if (self.run / "config.yaml").exists() else []
        self.process = self._launcher.start("tools/train.py", *self._arguments, *resume, largest_file=largest_file)

    def end(self) -> int:
        return self.process.end().status

    def finish(self) -> None:
        self.start()
        assert self.end() == 0, self.output

    @property
    def output(self) -> str:
        return self.process.output

    def steps(self) -> int:
        """Return the number of recorded training steps. Records of repeated steps are dropped on resume."""
        metrics = self.run / "metrics.jsonl"
        return sum(record["kind"] == "train" for record in read_records(metrics)) if metrics.exists() else 0

    def stop(self, number: signal.Signals) -> int:
        os.kill(self.process.pid, number)
        return self.end()


def equal(first: Any, second: Any) -> bool:
    """Return whether the contents of two checkpoints are equal bit for bit."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return bool(first == second) or (first != first and second != second)  # NaN is equal to NaN here


def records(run: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in record.items() if key not in TIMING_KEYS}
        for record in read_records(run / "metrics.jsonl")
    ]


def files(run: Path) -> set[str]:
    """Return the files of a run except for TensorBoard events, which each start writes to another file."""
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and "events" not in path.name}


def stored(checkpoint: Path) -> dict[str, Any]:
    """Return the content of a checkpoint without the number of workers and the learning rates, which each step sets."""
    content = torch.load(checkpoint, weights_only=True)
    del content["config"]["training"]["workers"]
    for group in content["optimizer"]["param_groups"]:
        del group["lr"]
    return content


def assert_same_run(one: Path, two: Path) -> None:
    assert files(one) == files(two)
    assert records(one) == records(two)
    for file in sorted(one.glob("checkpoints/*.pt")):
        first, second = (stored(run / "checkpoints" / file.name) for run in (one, two))
        assert first.keys() == second.keys()
        assert [key for key in first if not equal(first[key], second[key])] == [], file.name
    for name in ("evaluation/results.json", "evaluation/metrics.json", "predictions/overview.png"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


@pytest.fixture(scope="module")
def uninterrupted(launcher: ForkingLauncher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 12 steps."""
    training = Training(launcher, tmp_path_factory.mktemp("uninterrupted"))
    training.finish()
    assert load_checkpoint(training.last).iteration == 12
    return training.run


# Signals and kills.


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_stopped_twice_and_killed_once_a_run_ends_as_if_nothing_had_happened(
    launcher: ForkingLauncher, uninterrupted: Path, tmp_path: Path, workers: int
) -> None:
    training = Training(launcher, tmp_path, f"training.workers={workers}")
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)):
        before = training.steps()
        training.start()
        training.process.wait_for(lambda before=before: training.steps() > before)  # type: ignore[misc]
        assert training.stop(number) == status, training.output
        if number != signal.SIGKILL:
            assert f"{number.name}: stopped after iteration" in training.output
            assert load_checkpoint(training.last).iteration == training.steps()
    training.finish()
    assert_same_run(uninterrupted, training.run)


KILLS = 20
STEPS = 48


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_twenty_times_a_run_ends_as_if_nothing_had_happened(
    launcher: ForkingLauncher, tmp_path: Path, workers: int
) -> None:
    """Kill at random times: at the start, in a step, and every fourth time while a checkpoint is written."""
    length = f"training.schedule.iterations={STEPS}"
    uninterrupted = Training(launcher, tmp_path / "uninterrupted", length)
    uninterrupted.finish()
    training = Training(launcher, tmp_path / "killed", length, f"training.workers={workers}")
    rng = random.Random(workers)
    outcomes: list[tuple[int, int, bool]] = []  # recorded steps, saved steps, whether a temporary file is left
    for kill in range(KILLS):
        started_at = time.monotonic()
        saved = load_checkpoint(training.last).iteration if training.last.exists() else 0
        training.start()
        kill_one(training, rng, saved=saved, while_saving=kill % 4 == 3)
        assert training.end() == -signal.SIGKILL, training.output
        after = load_checkpoint(training.last).iteration if training.last.exists() else 0
        assert after >= saved
        temporary = list(training.run.rglob("*.tmp")) + list(training.run.rglob("*.partial"))
        assert len(temporary) <= 3, f"temporary files accumulate: {temporary}"
        outcomes.append((training.steps(), after, bool(temporary)))
        seconds = time.monotonic() - started_at
        print(f"kill {kill + 1} after {seconds:.2f} s: step, saved, half-written file {outcomes[-1]}")
    assert any(half_written for *_, half_written in outcomes), "no kill happened while a file was written"
    assert group_ends(training.process.pid)
    training.finish()
    assert_same_run(uninterrupted.run, training.run)


def kill_one(training: Training, rng: random.Random, *, saved: int, while_saving: bool) -> None:
    """Kill the process some steps after its first checkpoint, at its start, or while it writes a checkpoint."""
    started_at, records = time.time_ns(), training.steps()
    more_steps = rng.choice([0, 0, 1, 1, 2, 3, 4, 5])
    if while_saving:
        training.process.wait_for(lambda: is_written(training.last.with_name("last.pt.tmp"), since=started_at))
    elif more_steps == 0:
        kill_at = started_at + rng.randrange(10**9)  # training starts within about a second
        training.process.wait_for(lambda: time.time_ns() > kill_at or training.steps() > records)
    else:
        training.process.wait_for(lambda: training.steps() >= saved + more_steps)
        time.sleep(rng.uniform(0, 0.1))  # about the duration of a step
    with suppress(ProcessLookupError):  # it has already ended; the caller checks its exit status
        os.kill(training.process.pid, signal.SIGKILL)


def is_written(path: Path, *, since: int) -> bool:
    """Return whether a file is not empty and was modified after `since`, in nanoseconds of Unix time."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return False
    return status.st_size > 0 and status.st_mtime_ns > since


def group_ends(group: int) -> bool:
    """Return whether all processes of a group end within 30 s. Loader workers exit within 5 s after their parent."""
    for _ in range(300):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


# Write errors.


def test_a_full_disk_leaves_the_last_checkpoint(launcher: ForkingLauncher, uninterrupted: Path, tmp_path: Path) -> None:
    """A file size limit makes a write fail half-way, like a full disk."""
    training = Training(launcher, tmp_path)
    training.start()
    training.process.wait_for(training.last.exists)
    assert training.stop(signal.SIGTERM) == 143
    before = load_checkpoint(training.last).iteration
    training.start(largest_file=training.last.stat().st_size // 2)
    assert training.end() == 2
    assert f"error: {training.last}: File too large" in training.output
    assert "Traceback" not in training.output
    assert load_checkpoint(training.last).iteration == before
    assert not list(training.run.rglob("*.tmp"))
    training.finish()
    assert_same_run(uninterrupted, training.run)


# Damaged files.


def test_a_damaged_checkpoint_names_the_older_ones(
    launcher: ForkingLauncher, uninterrupted: Path, tmp_path: Path
) -> None:
    training = Training(launcher, tmp_path)
    shutil.copytree(uninterrupted, training.run)
    newest = training.run / "checkpoints" / "iteration_00000012.pt"
    newest.unlink()
    newest.hardlink_to(training.last)  # save() creates it as a hard link
    training.last.write_bytes(training.last.read_bytes()[:10_000])
    training.start()
    assert training.end() == 2
    assert f"error: {training.last}: " in training.output
    assert "Traceback" not in training.output
    previous = training.run / "checkpoints" / "iteration_00000010.pt"
    assert f"copy one of these over it: {previous.name}" in training.output
    training.last.unlink()
    shutil.copy(previous, training.last)
    training.finish()
    assert "resuming after iteration 10" in training.output
    assert_same_run(uninterrupted, training.run)


# Thousands of objects.

OBJECTS = 2000
CROWDED = """
base: BASE
model: {backbone: {weights: none}}
data:
  root: DATA
  train: {kind: coco, annotations: objects.json, images: .}
  validation: {kind: coco, annotations: objects.json, images: .}
  train_transforms: [{kind: horizontal_flip}, {kind: resize, short_side: [800], long_side: 1333}]
training:
  batch_size: 1
  schedule: {kind: cosine, iterations: 2, warmup_iterations: 0}
  workers: 0
  log_every: 1
evaluation: {pictures: 0}
"""


def write_crowded_image(folder: Path) -> None:
    """Write an image of 1333 x 800 pixels and annotations of 2,000 rhombs of 12 to 120 pixels."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (800, 1333, 3), dtype=np.uint8)).save(folder / "image.png")
    annotations = []
    for number in range(1, OBJECTS + 1):
        width, height = rng.uniform(12, 120, 2)
        x, y = rng.uniform(0, (1333 - width, 800 - height))
        center_x, center_y = x + width / 2, y + height / 2
        rhomb = [center_x, y, x + width, center_y, center_x, y + height, x, center_y]
        entry = {"id": number, "image_id": 1, "category_id": number % 80 + 1, "iscrowd": 0}
        annotations.append(
            {**entry, "bbox": [x, y, width, height], "area": width * height / 2, "segmentation": [rhomb]}
        )
    image = {"id": 1, "file_name": "image.png", "height": 800, "width": 1333}
    categories = [{"id": number, "name": f"class {number}"} for number in range(1, 81)]
    content = {"images": [image], "annotations": annotations, "categories": categories}
    (folder / "objects.json").write_text(json.dumps(content))


@pytest.mark.slow
def test_two_thousand_objects_in_an_image_train_in_four_gibibytes(tmp_path: Path) -> None:
    """Two steps and an evaluation on a CPU with ResNet-50-FPN and the 80 classes and image size of COCO."""
    write_crowded_image(tmp_path)
    config = tmp_path / "crowded.yaml"
    base = REPOSITORY / "configs" / "coco" / "mask_rcnn_r50_fpn_1x.yaml"
    config.write_text(CROWDED.replace("BASE", str(base)).replace("DATA", str(tmp_path)))
    command = [sys.executable, "tools/train.py", str(config), "--out", str(tmp_path / "run"), "--device", "cpu"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    steps = [record for record in read_records(tmp_path / "run" / "metrics.jsonl") if record["kind"] == "train"]
    print(f"peak {usage.ru_maxrss / 2**20:.2f} GiB, {usage.ru_utime:.0f} s of CPU time for two steps and an evaluation")
    assert len(steps) == 2
    assert usage.ru_maxrss * 1024 < 4 * 2**30
