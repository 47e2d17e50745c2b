"""What a run measured: `metrics.jsonl` for programs, TensorBoard for people (docs/metrics.md explains the curves).

`metrics.jsonl` holds one JSON object a line. Each has `kind` and `iteration`, the number of steps done. A number that
is not finite is stored as null, and its curve in TensorBoard has no point there.

`"kind": "train"`, every `log_every` iterations, about the last step alone (a mean over steps would have to survive
an interruption, and TensorBoard smooths anyway):
    loss                sum of the terms
    losses              object: each term of the loss by name
    lr                  learning rate of the step
    gradient_norm       2-norm of the gradient of all parameters together, before clipping
    images_per_second   since the record before
    data_share          share of the time since then that was spent waiting for data, 0 to 1
    peak_memory         bytes: the most that the process held so far, or on a GPU, that tensors took up there
    proposal_recall     share of the objects that a proposal of the RPN overlaps with IoU 0.5 or more, 0 to 1; the
                        objects' own boxes, which are added to the proposals, do not count
    positive_fraction      share of positives among the regions that train the heads, 0 to 1
                        (either is absent where there was nothing to measure: a step without objects, or regions)

`"kind": "evaluation"`:
    metrics             object: each metric by name, such as "mask/AP"; "ema/mask/AP" is that of the averaged weights
    images_per_second   of inference, results and their masks included, without comparing them with the ground truth
    classes             object: by name of the class an object with its "box/AP", "mask/AP", "ema/mask/AP", ...
    loss                sum of the terms, over the validation images; absent where it was not measured, like
    losses              object: each term by name

`"kind": "end"` is the last record of a training that came to its end, by its schedule or by running out of patience.

TensorBoard has each number under its path, `train/losses/loss_mask` or `evaluation/mask/AP`; but for the classes it has
`class_AP/mask/NAME`. Besides, it has the pictures of some validation images at each evaluation, `pictures/IMAGE_ID`,
and the resolved configuration as text, `config`, of each start.

A resumed run drops the records of the steps that it repeats, so that its file equals an undisturbed one's but for
`TIMING_KEYS`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from maskrcnn.config import Section, to_yaml

FILE_NAME = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
LONGEST_RECORD = 2**20  # bytes; an evaluation of LVIS's 1203 classes, with averaged weights, has a fifth of them
TIMING_KEYS = frozenset({"images_per_second", "data_share", "peak_memory"})

Record = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One training step as it is shown and recorded; the module's docstring explains the values."""

    iteration: int
    losses: Mapping[str, float]
    lr: float
    gradient_norm: float
    images_per_second: float
    data_share: float
    peak_memory: int  # bytes
    diagnostics: Mapping[str, float] = field(default_factory=dict)  # `proposal_recall`, `positive_fraction`

    @property
    def loss(self) -> float:
        """The sum of the terms."""
        return sum(self.losses.values())

    def measured(self) -> dict[str, Any]:
        """Return what `metrics.jsonl` keeps, by key."""
        return {
            "loss": self.loss,
            "losses": dict(self.losses),
            "lr": self.lr,
            "gradient_norm": self.gradient_norm,
            "images_per_second": self.images_per_second,
            "data_share": self.data_share,
            "peak_memory": self.peak_memory,
            **self.diagnostics,
        }

    @property
    def brief(self) -> str:
        """What the progress line says; at most 50 characters or so, to be seen whole in a terminal of 80 columns."""
        return (
            f"loss {self.loss:.3f} lr {self.lr:.2g} {self.images_per_second:.3g} img/s "
            f"data {self.data_share:.0%} {self.peak_memory / 2**30:.1f} GiB"
        )

    def __str__(self) -> str:
        return f"{self.brief}; " + ", ".join(f"{name} {value:.3f}" for name, value in self.losses.items())


class Measurement(NamedTuple):
    """What an evaluation found, and how fast; the module's docstring explains the values."""

    metrics: Mapping[str, float]
    images_per_second: float
    classes: Mapping[str, Mapping[str, float]] = {}
    losses: Mapping[str, float] = {}  # empty: not measured
    pictures: Mapping[str, np.ndarray] = {}  # for TensorBoard alone: (H, W, 3) uint8 RGB by image id

    def with_average(self, average: Measurement) -> Measurement:
        """Return this together with the figures of the averaged weights, whose names begin with `ema/`."""
        classes = {
            name: {**figures, **_prefixed("ema/", average.classes.get(name, {}))}
            for name, figures in self.classes.items()
        }
        return self._replace(metrics={**self.metrics, **_prefixed("ema/", average.metrics)}, classes=classes)

    def measured(self) -> dict[str, Any]:
        """Return what `metrics.jsonl` keeps, by key."""
        found = {
            "metrics": dict(self.metrics),
            "images_per_second": self.images_per_second,
            "classes": {name: dict(figures) for name, figures in self.classes.items()},
        }
        return found | ({"loss": sum(self.losses.values()), "losses": dict(self.losses)} if self.losses else {})

    def curves(self) -> dict[str, float]:
        """Return each number with its name in TensorBoard."""
        classes = {
            f"class_AP/{figure.removesuffix('/AP')}/{name}": value
            for name, figures in self.classes.items()
            for figure, value in figures.items()
        }
        whole = {name: value for name, value in self.measured().items() if name not in ("metrics", "classes")}
        return _prefixed("evaluation/", {**self.metrics, **_flat(whole)}) | classes


class MetricsWriter:
    """Appends to `metrics.jsonl` and to TensorBoard events in `tensorboard/`; use it in a `with` statement."""

    last_evaluation: int | None
    """Iteration of the newest evaluation on record."""

    def __init__(self, run_dir: Path, *, start: int = 0) -> None:
        """Open the run that goes on after `start` iterations; what is on record about later ones is dropped."""
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / FILE_NAME
        past = read_records(path) if path.exists() else []
        kept = [record for record in past if record["iteration"] <= start and record["kind"] != "end"]
        evaluations = [record["iteration"] for record in kept if record["kind"] == "evaluation"]
        self.last_evaluation = max(evaluations, default=None)
        _replace(path, "".join(_line(record) for record in kept))
        # Line-buffered: what is logged survives a kill.
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._start = start
        self._events = SummaryWriter(str(run_dir / TENSORBOARD_FOLDER), purge_step=start + 1)

    def log_config(self, config: Section) -> None:
        """Put the resolved configuration into TensorBoard: its run directory may be elsewhere, or gone."""
        # Not `add_hparams`: it begins another run each time that training resumes.
        self._events.add_text("config", f"```yaml\n{to_yaml(config)}```", self._start)

    def log_step(self, step: Step) -> None:
        """Record one training step."""
        measured = step.measured()
        self._append({"kind": "train", "iteration": step.iteration, **measured})
        self._draw(_prefixed("train/", _flat(measured)), step.iteration)

    def log_evaluation(self, iteration: int, found: Measurement) -> None:
        """Record one evaluation, and make sure that it is on disk."""
        self._append({"kind": "evaluation", "iteration": iteration, **found.measured()})
        self._draw(found.curves(), iteration)
        for name, picture in found.pictures.items():
            self._events.add_image(f"pictures/{name}", picture, iteration, dataformats="HWC")
        self._events.flush()
        self.last_evaluation = iteration

    def log_end(self) -> None:
        """Record that the training came to its end, which is an evaluation."""
        self._append({"kind": "end", "iteration": self.last_evaluation})

    def close(self) -> None:
        """Write what is left and close the files."""
        self._file.close()
        self._events.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, record: Record) -> None:
        self._file.write(_line(record))

    def _draw(self, curves: Mapping[str, float], iteration: int) -> None:
        """Add a point to each curve."""
        for name, value in curves.items():
            if math.isfinite(value):
                self._events.add_scalar(name, value, iteration)


class SilentWriter(MetricsWriter):
    """Writes nothing: for all processes of a training but the main one."""

    def __init__(self) -> None:
        self.last_evaluation = None

    def log_config(self, config: Section) -> None:
        """Do nothing."""

    def log_step(self, step: Step) -> None:
        """Do nothing."""

    def log_evaluation(self, iteration: int, found: Measurement) -> None:
        """Remember that there was one."""
        self.last_evaluation = iteration

    def log_end(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def read_records(path: Path) -> list[Record]:
    """Return the records of a `metrics.jsonl`; a last line that a kill cut short is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_record(path: Path) -> Record | None:
    """Return the newest record of a `metrics.jsonl`, None if there is none; reads the end of the file alone."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LONGEST_RECORD))
        lines = [line for line in file.readlines() if line.endswith(b"\n")]
    return json.loads(lines[-1]) if lines else None


def _line(record: Record) -> str:
    return json.dumps(without_nan(record), allow_nan=False) + "\n"


def without_nan(value: Any) -> Any:
    """Replace numbers that JSON cannot hold by None, at any depth."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(measured: Mapping[str, Any]) -> dict[str, float]:
    """Return each number by its name, those of an inner mapping as `outer/inner`."""
    numbers: dict[str, float] = {}
    for name, value in measured.items():
        numbers |= _prefixed(f"{name}/", value) if isinstance(value, Mapping) else {name: value}
    return numbers


def _prefixed(prefix: str, numbers: Mapping[str, float]) -> dict[str, float]:
    return {prefix + name: value for name, value in numbers.items()}


def _replace(path: Path, text: str) -> None:
    """Write a file through a temporary one, so that a kill in between loses no records."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
