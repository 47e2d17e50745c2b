"""Faults while a run trains: killed, interrupted, out of disk, damaged. What was trained must survive, bit for bit.

The runs are real processes of tools/train.py. They are forked from one that has imported torch, which saves seconds
each; from there on they are as any other.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maskrcnn.training.checkpoint import load_checkpoint
from maskrcnn.training.metrics import TIMING_KEYS, read_records

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="forks a process that has imported torch, as is safe on Linux alone"
)

REPOSITORY = Path(__file__).parents[1]
PATIENCE = 300  # seconds; only a hanging process takes so long

# Everything that has a state: momenta, running statistics, an average of the weights; accumulation, and evaluations.
EXPERIMENT = """
model:
  backbone: {kind: resnet, depth: 18, width: 8, output: fpn, fpn: {channels: 8}, norm: bn, freeze: 0, weights: none}
  rpn:
    anchor_sizes: [[8], [16], [32], [48], [64]]
    training: {pre_nms_top_n: 30, post_nms_top_n: 20}
    inference: {pre_nms_top_n: 30, post_nms_top_n: 10}
    batch_size_per_image: 16
  sampling: {batch_size_per_image: 16}
  box_head: {kind: fc, width: 16}
  mask_head: {kind: fcn, depth: 1, width: 8}
  detection: {score_threshold: 0.0, detections_per_image: 5}
data:
  train: {kind: shapes, length: 20, height: 64, width: 64}
  validation: {kind: shapes, length: 2, seed: 1, height: 64, width: 64}
  train_transforms: {short_side: [48, 64], long_side: 64}
  validation_transforms: {short_side: [64], long_side: 64, flip: 0.0}
training:
  batch_size: 4
  grad_accum_steps: 2
  ema_decay: 0.9
  optimizer: {kind: sgd, lr: 0.05}
  schedule: {kind: cosine, iterations: 12, warmup_iterations: 3}
  workers: 0
  evaluate_every: 6
  checkpoint_every: 2
  keep_checkpoints: 2
  log_every: 1
evaluation: {pictures: 1, picture_score: 0.0}
"""

LAUNCHER = """
import gc, json, os, resource, runpy, sys
import torch
import maskrcnn.training_run

torch.set_num_threads(1)
gc.freeze()  # else each process would copy and take apart at its end what was imported here
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        os.setsid()
        console = os.open(job["console"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream, file in enumerate((os.open(os.devnull, os.O_RDONLY), console, console)):
            os.dup2(file, stream)
        if job["largest_file"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"], resource.RLIM_INFINITY))
        sys.argv = ["tools/train.py", *job["arguments"]]
        runpy.run_path("tools/train.py", run_name="__main__")
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Launcher:
    """A process that forks training processes, one at a time."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def start(self, arguments: Sequence[object], console: Path, largest_file: int) -> int:
        """Start `tools/train.py` and return its process id, which is that of its group too."""
        assert self._process.stdin is not None
        job = {"arguments": list(map(str, arguments)), "console": str(console), "largest_file": largest_file}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def status(self) -> int:
        """Wait for the end of the process; its exit status, or minus the signal that killed it."""
        return self._answer()

    def _answer(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate(timeout=PATIENCE)


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    launcher = Launcher()
    yield launcher
    launcher.close()


class Training:
    """A run directory, and the process that trains in it."""

    def __init__(self, launcher: Launcher, folder: Path, *overrides: str) -> None:
        folder.mkdir(exist_ok=True)
        self.run = folder / "run"
        self.last = self.run / "checkpoints" / "last.pt"
        self.console = folder / "console.txt"
        self._launcher = launcher
        config = folder / "experiment.yaml"
        config.write_text(EXPERIMENT)
        settings = [part for override in overrides for part in ("--set", override)]
        self._arguments = [config, "--out", self.run, "--device", "cpu", *settings]
        self.process = 0

    def start(self, *, largest_file: int = 0) -> None:
        """Begin, or go on; `largest_file` limits what the process can write to a file, in bytes."""
        resume = ["--resume"] if (self.run / "config.yaml").exists() else []
        self.process = self._launcher.start([*self._arguments, *resume], self.console, largest_file)

    def end(self) -> int:
        return self._launcher.status()

    def finish(self) -> None:
        self.start()
        assert self.end() == 0, self.told

    @property
    def told(self) -> str:
        return self.console.read_text()

    def steps(self) -> int:
        """Records of training steps; those of an interrupted process that are done again are gone when it is."""
        metrics = self.run / "metrics.jsonl"
        return sum(record["kind"] == "train" for record in read_records(metrics)) if metrics.exists() else 0

    def wait_for(self, happened: Callable[[], bool]) -> None:
        """Wait until something happened, or the process ended."""
        give_up = time.monotonic() + PATIENCE
        while not happened() and self.alive():
            assert time.monotonic() < give_up, self.told
            time.sleep(0.005)

    def alive(self) -> bool:
        try:
            return Path(f"/proc/{self.process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except FileNotFoundError:
            return False

    def stop(self, number: signal.Signals) -> int:
        os.kill(self.process, number)
        return self.end()


def equal(first: Any, second: Any) -> bool:
    """Whether two checkpoints' contents are the same to the last bit."""
    if isinstance(first, torch.Tensor):
        return isinstance(second, torch.Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return bool(first == second) or (first != first and second != second)  # nan, where there is nothing to measure


def records(run: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in record.items() if key not in TIMING_KEYS}
        for record in read_records(run / "metrics.jsonl")
    ]


def files(run: Path) -> set[str]:
    """The files of a run, but for the events of TensorBoard: each start opens another."""
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and "events" not in path.name}


def stored(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds, but for the number of workers, and the rates: each step sets them from the schedule."""
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
def undisturbed(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps that nothing happened to."""
    training = Training(launcher, tmp_path_factory.mktemp("undisturbed"))
    training.finish()
    assert load_checkpoint(training.last).iteration == 12
    return training.run


# Stopped and killed.


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_stopped_twice_and_killed_once_a_run_ends_as_if_nothing_had_happened(
    launcher: Launcher, undisturbed: Path, tmp_path: Path, workers: int
) -> None:
    training = Training(launcher, tmp_path, f"training.workers={workers}")
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)):
        before = training.steps()
        training.start()
        training.wait_for(lambda before=before: training.steps() > before)  # type: ignore[misc]
        assert training.stop(number) == status, training.told
        if number != signal.SIGKILL:
            assert f"{number.name}: stopped after iteration" in training.told
            assert load_checkpoint(training.last).iteration == training.steps()
    training.finish()
    assert_same_run(undisturbed, training.run)


KILLS = 20
STEPS = 48


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_twenty_times_a_run_ends_as_if_nothing_had_happened(
    launcher: Launcher, tmp_path: Path, workers: int
) -> None:
    """At random moments: while starting, in a step, and every fourth time in the middle of writing a checkpoint."""
    length = f"training.schedule.iterations={STEPS}"
    calm = Training(launcher, tmp_path / "calm", length)
    calm.finish()
    training = Training(launcher, tmp_path / "killed", length, f"training.workers={workers}")
    rng = random.Random(workers)
    seen: list[tuple[int, int, bool]] = []
    for kill in range(KILLS):
        began = time.monotonic()
        saved = load_checkpoint(training.last).iteration if training.last.exists() else 0
        training.start()
        kill_one(training, rng, saved=saved, while_saving=kill % 4 == 3)
        assert training.end() == -signal.SIGKILL, training.told
        after = load_checkpoint(training.last).iteration if training.last.exists() else 0
        assert after >= saved
        temporary = list(training.run.rglob("*.tmp")) + list(training.run.rglob("*.partial"))
        assert len(temporary) <= 3, f"they pile up: {temporary}"
        seen.append((training.steps(), after, bool(temporary)))
        print(f"kill {kill + 1} after {time.monotonic() - began:.2f} s: step, saved, half-written file {seen[-1]}")
    assert any(half for *_, half in seen), "no kill came while a file was written"
    assert workers_end(training.process)
    training.finish()
    assert_same_run(calm.run, training.run)


def kill_one(training: Training, rng: random.Random, *, saved: int, while_saving: bool) -> None:
    """Let the process get some steps further than the checkpoint it started from, or not even there; then kill it."""
    began, records = time.time_ns(), training.steps()
    further = rng.choice([0, 0, 1, 1, 2, 3, 4, 5])
    if while_saving:
        training.wait_for(lambda: is_written(training.last.with_name("last.pt.tmp"), since=began))
    elif further == 0:
        moment = began + rng.randrange(10**9)  # in a second it has begun
        training.wait_for(lambda: time.time_ns() > moment or training.steps() > records)
    else:
        training.wait_for(lambda: training.steps() >= saved + further)
        time.sleep(rng.uniform(0, 0.1))  # about a step
    with suppress(ProcessLookupError):  # its exit status will tell why it ended
        os.kill(training.process, signal.SIGKILL)


def is_written(path: Path, *, since: int) -> bool:
    """Whether something was written to a file since a moment, in nanoseconds."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    return found.st_size > 0 and found.st_mtime_ns > since


def workers_end(group: int) -> bool:
    """Whether nobody of a process group is left; a loader's worker notices within five seconds that it is alone."""
    for _ in range(300):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


# Nothing can be written.


def test_a_full_disk_leaves_the_last_checkpoint(launcher: Launcher, undisturbed: Path, tmp_path: Path) -> None:
    """A limit on the size of files makes a write fail in the middle, as a full disk does."""
    training = Training(launcher, tmp_path)
    training.start()
    training.wait_for(training.last.exists)
    assert training.stop(signal.SIGTERM) == 143
    before = load_checkpoint(training.last).iteration
    training.start(largest_file=training.last.stat().st_size // 2)
    assert training.end() == 1
    assert str(training.last) in training.told
    assert "File too large" in training.told
    assert load_checkpoint(training.last).iteration == before
    assert not list(training.run.rglob("*.tmp"))
    training.finish()
    assert_same_run(undisturbed, training.run)


# Damaged files.


def test_a_damaged_checkpoint_names_the_older_ones(launcher: Launcher, undisturbed: Path, tmp_path: Path) -> None:
    training = Training(launcher, tmp_path)
    shutil.copytree(undisturbed, training.run)
    newest = training.run / "checkpoints" / "iteration_00000012.pt"
    newest.unlink()
    newest.hardlink_to(training.last)  # as it was, until it was copied
    training.last.write_bytes(training.last.read_bytes()[:10_000])
    training.start()
    assert training.end() == 2
    assert f"error: {training.last}: " in training.told
    assert "Traceback" not in training.told
    older = training.run / "checkpoints" / "iteration_00000010.pt"
    assert f"copy one of these over it: {older.name}" in training.told
    training.last.unlink()
    shutil.copy(older, training.last)
    training.finish()
    assert "resuming after iteration 10" in training.told
    assert_same_run(undisturbed, training.run)


# Thousands of objects.

OBJECTS = 2000
CROWDED = """
base: BASE
model: {backbone: {weights: none}}
data:
  root: DATA
  train: {kind: coco, annotations: objects.json, images: .}
  validation: {kind: coco, annotations: objects.json, images: .}
  train_transforms: {short_side: [800], long_side: 1333}
training:
  batch_size: 1
  schedule: {kind: cosine, iterations: 2, warmup_iterations: 0}
  workers: 0
  log_every: 1
evaluation: {pictures: 0}
"""


def write_crowded_image(folder: Path) -> None:
    """One image of 1333 x 800 pixels with 2,000 rhombs of 12 to 120 pixels, and its annotations."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (800, 1333, 3), dtype=np.uint8)).save(folder / "image.png")
    annotations = []
    for number in range(1, OBJECTS + 1):
        width, height = rng.uniform(12, 120, 2)
        x, y = rng.uniform(0, (1333 - width, 800 - height))
        middle, centre = x + width / 2, y + height / 2
        rhomb = [middle, y, x + width, centre, middle, y + height, x, centre]
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
    """ResNet-50 with a pyramid, COCO's 80 classes and image size: two steps and an evaluation on a CPU."""
    write_crowded_image(tmp_path)
    config = tmp_path / "crowded.yaml"
    base = REPOSITORY / "configs" / "coco" / "mask_rcnn_r50_fpn_1x.yaml"
    config.write_text(CROWDED.replace("BASE", str(base)).replace("DATA", str(tmp_path)))
    command = [sys.executable, "tools/train.py", str(config), "--out", str(tmp_path / "run"), "--device", "cpu"]
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    steps = [record for record in read_records(tmp_path / "run" / "metrics.jsonl") if record["kind"] == "train"]
    print(f"peak {used.ru_maxrss / 2**20:.2f} GiB, {used.ru_utime:.0f} s of CPU in all, of two steps and an evaluation")
    assert len(steps) == 2
    assert used.ru_maxrss * 1024 < 4 * 2**30
