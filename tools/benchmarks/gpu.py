"""What a GPU does with a training: speed and memory beside torchvision's model, and a training to its AP.

Each way to train runs in a process of its own (gpu_worker.py), so that an error or a lack of memory in one costs the
others nothing. The report is a new file, written again after each finished row, so that a run that is cut off keeps
what it measured. Ways that take long or may fail come last.
"""

from __future__ import annotations

import datetime
import json
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

WORKER = Path(__file__).with_name("gpu_worker.py")
REPOSITORY = Path(__file__).parents[2]
TRAINED = "configs/shapes/mask_rcnn_r18_fpn.yaml"
LEAST = 20  # seconds that must be left to start something

INTRODUCTION = (
    "Images per second of training steps, with the copies of the batches to the GPU. torchvision's side is "
    "`maskrcnn_resnet50_fpn` with 91 classes and the loop of its reference scripts. Ours is "
    "`configs/coco/mask_rcnn_r50_fpn_1x.yaml` with as many proposals, and the training loop's step. The weights are "
    "random and, but for the last layers, the same on both sides; 8 objects an image. Both have cuDNN's benchmark and "
    "TF32. `preparation` is the time before the first step that is timed: model, batches, first steps, compilation."
)


class Way(NamedTuple):
    """A way to train."""

    name: str
    job: dict[str, Any]
    limit: float  # seconds


def _way(side: str, precision: str, *, compiled: str = "off", graph: bool = False, limit: float = 120.0) -> Way:
    parts = [side, precision, *(["compiled"] if compiled == "step" else []), *(["CUDA graph"] if graph else [])]
    job = {"side": side, "precision": precision, "compile": compiled, "cuda_graph": graph}
    return Way(", ".join(parts), job, limit)


EARLY = (
    _way("ours", "bf16"),
    _way("torchvision", "bf16"),
    _way("ours", "bf16", graph=True),
    _way("ours", "fp32"),
    _way("torchvision", "fp32"),
)
LATE = (
    _way("ours", "bf16", compiled="step", limit=240.0),
    _way("ours", "bf16", compiled="step", graph=True, limit=240.0),
)


class Plan(NamedTuple):
    """What to measure, and within which limits."""

    batches: Sequence[int]
    height: int
    width: int
    steps: int  # that are timed
    device: str
    seconds: float  # for everything
    iterations: int  # of the training; 0: none
    runs: Path  # folder of the trainings


class Report:
    """The report, which is written again with each change."""

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path, self.plan = path, plan
        self.environment: list[str] = []
        self.rows: list[list[str]] = []
        self.stages: dict[str, float] = {}
        self.trainings: list[list[str]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(exist_ok=False)
        self.write()

    def write(self) -> None:
        """Write the file."""
        self.path.write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """Return the report as Markdown."""
        plan, today = self.plan, datetime.datetime.now(datetime.timezone.utc).date()
        head = ["", "batch", "images/s", "ms a step", "peak GiB", "preparation, s"]
        lines = [
            f"# Training on a GPU, {today}",
            "",
            INTRODUCTION,
            "",
            f"- command: {shlex.join(['python', *sys.argv])}",
        ]
        lines += [f"- images: {plan.height} x {plan.width}", *(f"- {line}" for line in self.environment)]
        lines += ["", f"## Speed: the mean of {plan.steps} steps", "", *_table(head, self.rows)]
        if self.stages:
            lines += ["", f"## Stages of our step, bf16, batch {plan.batches[-1]}, without CUDA graphs", ""]
            lines += ["Milliseconds between events on the GPU, in which it may also wait for the host.", ""]
            lines += _table(["stage", "ms"], [[name, f"{value:.2f}"] for name, value in self.stages.items()])
        if self.trainings:
            lines += ["", f"## Training to an AP: {TRAINED}", ""]
            lines += _table(["", "box AP", "mask AP", "images/s at the end", "s"], self.trainings)
        return "\n".join([*lines, ""])

    def add(self, name: str, message: dict[str, Any]) -> None:
        """Add what a worker has found."""
        self.environment = message.get("environment", self.environment)
        self.stages = message.get("stages", self.stages)
        if row := message.get("row"):
            numbers = [
                f"{row['images/s']:.4g}",
                f"{row['ms']:.4g}",
                f"{row['GiB']:.3g}",
                f"{row['preparation, s']:.3g}",
            ]
            self.rows.append([name, str(row["batch"]), *numbers])
        self.write()

    def add_failure(self, name: str, reason: str) -> None:
        """Add that something was not measured."""
        self.rows.append([name, reason.replace("|", "/"), "", "", "", ""])
        self.write()


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return [f"| {' | '.join(row)} |" for row in (head, rule, *rows)]


def run(plan: Plan, path: Path) -> str:
    """Measure, and return the report, which is the new file `path`, too.

    Raises:
        FileExistsError: the file exists.
    """
    report, end = Report(path, plan), time.monotonic() + plan.seconds
    for index, way in enumerate(EARLY):
        measure(way, plan, report, end, stages=index == 0)
    if plan.iterations:
        train(plan, report, end)
    for way in LATE:
        measure(way, plan, report, end)
    return report.text()


def measure(way: Way, plan: Plan, report: Report, end: float, *, stages: bool = False) -> None:
    """Measure a way to train, and add its rows to the report as they come."""
    settings = {"batches": plan.batches, "height": plan.height, "width": plan.width, "steps": plan.steps}
    job = json.dumps({**way.job, **settings, "device": plan.device, "stages": stages})
    limit = min(way.limit, end - time.monotonic())
    if limit < LEAST:
        report.add_failure(way.name, "no time left")
        return
    print(f"{way.name}: at most {limit:.0f} s", file=sys.stderr)
    with subprocess.Popen(
        [sys.executable, str(WORKER), job], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        errors: list[str] = []
        reader = threading.Thread(target=lambda: errors.extend(process.stderr or ()), daemon=True)
        reader.start()
        for line in _lines(process, limit):
            report.add(way.name, json.loads(line))
        if process.poll() is None and not _ends(process):
            process.kill()
            report.add_failure(way.name, f"cut off after {limit:.0f} s")
        elif process.returncode:
            reader.join()
            sys.stderr.writelines(errors)
            report.add_failure(way.name, errors[-1].strip() if errors else f"exit status {process.returncode}")


def _ends(process: subprocess.Popen[str]) -> bool:
    """Return whether a process that has closed its output ends."""
    try:
        process.wait(timeout=1)
    except subprocess.TimeoutExpired:
        return False
    return True


def _lines(process: subprocess.Popen[str], limit: float) -> Iterator[str]:
    """Yield the lines of a process's output, until it ends or so many seconds have passed."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout or ():
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    end = time.monotonic() + limit
    while (left := end - time.monotonic()) > 0:
        try:
            line = lines.get(timeout=left)
        except queue.Empty:
            return
        if line is None:
            return
        yield line


# ---- Training


def train(plan: Plan, report: Report, end: float) -> None:
    """Train on generated scenes, as usual and, on a GPU, in bf16 with CUDA graphs, and add the APs to the report."""
    buckets = "{shapes: [[128, 128]], objects: [8], mask_entries: 65536}"
    ways = {"fp32": ["training.precision=fp32"]}
    if plan.device != "cpu":
        ways["bf16, CUDA graph"] = [
            "training.precision=bf16",
            "training.cuda_graph=true",
            f"training.buckets={buckets}",
        ]
    for name, overrides in ways.items():
        started, limit = time.monotonic(), end - time.monotonic()
        if limit < LEAST:
            report.trainings.append([name, "no time left", "", "", ""])
        else:
            out = plan.runs / f"{name.replace(', ', '_').replace(' ', '_')}_{int(time.time())}"
            status = _train(plan, out, overrides, limit)
            figures = _figures(out) if status == "" else [status, "", ""]
            report.trainings.append([name, *figures, f"{time.monotonic() - started:.0f}"])
        report.write()


def _train(plan: Plan, out: Path, overrides: Sequence[str], limit: float) -> str:
    """Run a training; return what went wrong, or an empty text."""
    n = plan.iterations
    settings = [f"training.schedule.iterations={n}", f"training.evaluate_every={n}", "training.workers=4", *overrides]
    command = [sys.executable, str(REPOSITORY / "tools" / "train.py"), str(REPOSITORY / TRAINED), "--out", str(out)]
    command += ["--device", plan.device, *(word for setting in settings for word in ("--set", setting))]
    print(shlex.join(command), file=sys.stderr)
    try:
        ended = subprocess.run(command, timeout=limit, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        return f"cut off after {limit:.0f} s"
    if ended.returncode:
        sys.stderr.write(ended.stderr)
        return (ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"])[-1].replace("|", "/")
    return ""


def _figures(out: Path) -> list[str]:
    """Return box AP, mask AP, and the images per second of the last record."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    metrics = [record["metrics"] for record in records if record["kind"] == "evaluation"][-1]
    speed = [record["images_per_second"] for record in records if record["kind"] == "train"][-1]
    return [f"{metrics['box/AP']:.3f}", f"{metrics['mask/AP']:.3f}", f"{speed:.4g}"]
