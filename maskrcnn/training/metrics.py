"""What a run measured: `metrics.jsonl` for programs, TensorBoard for people.

`metrics.jsonl` holds one JSON object a line. Each has `kind` and `iteration`, the number of steps done. A number that
is not finite is stored as null.

`"kind": "train"`, every `log_every` iterations, about the last step alone (a mean over steps would have to survive
an interruption, and TensorBoard smooths anyway):
    loss                sum of the terms
    losses              object: each term of the loss by name
    lr                  learning rate of the step
    gradient_norm       2-norm of the gradient of all parameters together, before clipping
    images_per_second   since the record before
    data_share          share of the time since then that was spent waiting for data, 0 to 1
    peak_memory         bytes: the most that the process held so far, or on a GPU, that tensors took up there

`"kind": "evaluation"`:
    metrics             object: each metric by name
    images_per_second   of inference, results and their masks included, without comparing them with the ground truth

A resumed run drops the records of the steps that it repeats, so that its file equals an undisturbed one's but for
`TIMING_KEYS`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from torch.utils.tensorboard import SummaryWriter

FILE_NAME = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
LONGEST_RECORD = 2**16  # bytes; a record of COCO's 80 classes has a tenth of them
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
        }

    def __str__(self) -> str:
        terms = ", ".join(f"{name} {value:.3f}" for name, value in self.losses.items())
        # The terms come last: a narrow terminal cuts the end.
        return (
            f"loss {self.loss:.3f}, lr {self.lr:.2e}, {self.images_per_second:.2f} images/s, "
            f"data {self.data_share:.0%}, {self.peak_memory / 2**30:.1f} GiB; {terms}"
        )


class Measurement(NamedTuple):
    """What an evaluation found, and how fast; the module's docstring explains the values."""

    metrics: Mapping[str, float]
    images_per_second: float


class MetricsWriter:
    """Appends to `metrics.jsonl` and to TensorBoard events in `tensorboard/`; use it in a `with` statement."""

    last_evaluation: int | None
    """Iteration of the newest evaluation on record."""

    def __init__(self, run_dir: Path, *, start: int = 0) -> None:
        """Open the run that goes on after `start` iterations; what is on record about later ones is dropped."""
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / FILE_NAME
        kept = [record for record in read_records(path) if record["iteration"] <= start] if path.exists() else []
        evaluations = [record["iteration"] for record in kept if record["kind"] == "evaluation"]
        self.last_evaluation = max(evaluations, default=None)
        _replace(path, "".join(_line(record) for record in kept))
        # Line-buffered: what is logged survives a kill.
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._events = SummaryWriter(str(run_dir / TENSORBOARD_FOLDER), purge_step=start + 1)

    def log_step(self, step: Step) -> None:
        """Record one training step."""
        measured = step.measured()
        self._append({"kind": "train", "iteration": step.iteration, **measured})
        for name, value in _flat(measured):
            self._events.add_scalar(f"train/{name}", value, step.iteration)

    def log_evaluation(self, iteration: int, found: Measurement) -> None:
        """Record one evaluation, and make sure that it is on disk."""
        measured = {"metrics": dict(found.metrics), "images_per_second": found.images_per_second}
        self._append({"kind": "evaluation", "iteration": iteration, **measured})
        for name, value in {**found.metrics, "images_per_second": found.images_per_second}.items():
            self._events.add_scalar(f"evaluation/{name}", value, iteration)
        self._events.flush()
        self.last_evaluation = iteration

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


def _flat(measured: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return each number with its name, those of an inner mapping as `outer/inner`."""
    pairs: list[tuple[str, float]] = []
    for name, value in measured.items():
        if isinstance(value, Mapping):
            pairs += [(f"{name}/{inner}", number) for inner, number in value.items()]
        else:
            pairs.append((name, value))
    return pairs


def _replace(path: Path, text: str) -> None:
    """Write a file through a temporary one, so that a kill in between loses no records."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
