"""The metrics of a run: `metrics.jsonl`, and numbers for the loggers (docs/metrics.md explains the curves).

`metrics.jsonl` holds one JSON object per line. Each has `kind` and `iteration`, the number of finished training steps.
A number that is not finite is stored as null, and loggers do not get it.

`"kind": "train"`, every `log_every` iterations. Except for the speed, the values are those of the last step, not means
over several steps, so that a resumed run writes the same records:
    loss                sum of the loss terms
    losses              object: each loss term by name
    lr                  learning rate of the step
    gradient_norm       2-norm of the gradient of all parameters, before clipping
    images_per_second   since the previous record
    data_share          fraction of the time since the previous record spent waiting for data, 0 to 1
    peak_memory         bytes: peak memory of the process so far, or on a GPU, of its allocated tensors;
                        null on a CPU under Windows
    proposal_recall     fraction of the ground-truth objects that an RPN proposal overlaps with IoU 0.5 or more, 0 to 1;
                        ground-truth boxes that are added to the proposals do not count
    positive_fraction   fraction of positives among the sampled RoIs, 0 to 1
                        (both are absent if undefined: a step without objects, or without RoIs)

`"kind": "evaluation"`:
    metrics             object: each metric by name, such as "mask/AP", and "KIND/FIGURE" of `evaluation.metrics`;
                        "ema/mask/AP" is that of the averaged weights
    images_per_second   of inference, including the masks of the results, without the computation of the metrics
    classes             object: for each class name an object with its "box/AP", "mask/AP", "ema/mask/AP", ...
    loss                sum of the loss terms on the validation images; absent if not measured
    losses              object: each loss term by name; absent if not measured

`"kind": "end"` is the last record of a finished training, at the end of the schedule or after early stopping.

A logger, such as TensorBoard, gets each number under its path, such as `train/losses/loss_mask` or
`evaluation/mask/AP`, and the AP of each class as `class_AP/mask/NAME`. It also gets pictures of some validation images
at each evaluation, and the resolved configuration of each start.

A resumed run drops the records of the steps that it repeats, so that its file equals that of an uninterrupted run
except for `TIMING_KEYS`.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from maskrcnn.config import Section, to_yaml
from maskrcnn.engine.loggers import LoggerConfig, TensorBoardConfig
from maskrcnn.runtime.files import json_text, write_text

FILE_NAME = "metrics.jsonl"
LONGEST_RECORD = 2**20  # bytes; an evaluation with the 1203 classes of LVIS and averaged weights takes a fifth of it
TIMING_KEYS = frozenset({"images_per_second", "data_share", "peak_memory"})

Record = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """The record of one training step. The module docstring explains the values."""

    iteration: int
    losses: Mapping[str, float]
    lr: float
    gradient_norm: float
    images_per_second: float
    data_share: float
    peak_memory: float  # bytes; nan if it is not known
    diagnostics: Mapping[str, float] = field(default_factory=dict)  # `proposal_recall`, `positive_fraction`

    @property
    def loss(self) -> float:
        """The sum of the loss terms."""
        return sum(self.losses.values())

    def measured(self) -> dict[str, Any]:
        """Return the fields of the record in `metrics.jsonl`."""
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
        """The text of the progress bar; at most about 50 characters, to fit a terminal of 80 columns."""
        return (
            f"loss {self.loss:.3f} lr {self.lr:.2g} {self.images_per_second:.3g} img/s "
            f"data {self.data_share:.0%} {self.peak_memory / 2**30:.1f} GiB"
        )

    def __str__(self) -> str:
        return f"{self.brief}; " + ", ".join(f"{name} {value:.3f}" for name, value in self.losses.items())


class Measurement(NamedTuple):
    """The result of an evaluation. The module docstring explains the values."""

    metrics: Mapping[str, float]
    images_per_second: float
    classes: Mapping[str, Mapping[str, float]] = {}
    losses: Mapping[str, float] = {}  # empty if not measured
    pictures: Mapping[str, np.ndarray] = {}  # for the loggers only: (H, W, 3) uint8 RGB by image id

    def with_average(self, average: Measurement) -> Measurement:
        """Return this measurement with the metrics of the averaged weights added under names with the prefix `ema/`."""
        classes = {
            name: {**metrics, **_prefixed("ema/", average.classes.get(name, {}))}
            for name, metrics in self.classes.items()
        }
        return self._replace(metrics={**self.metrics, **_prefixed("ema/", average.metrics)}, classes=classes)

    def measured(self) -> dict[str, Any]:
        """Return the fields of the record in `metrics.jsonl`."""
        fields = {
            "metrics": dict(self.metrics),
            "images_per_second": self.images_per_second,
            "classes": {name: dict(metrics) for name, metrics in self.classes.items()},
        }
        return fields | ({"loss": sum(self.losses.values()), "losses": dict(self.losses)} if self.losses else {})

    def curves(self) -> dict[str, float]:
        """Return each number by its name for the loggers."""
        classes = {
            f"class_AP/{metric.removesuffix('/AP')}/{name}": value
            for name, metrics in self.classes.items()
            for metric, value in metrics.items()
        }
        others = {name: value for name, value in self.measured().items() if name not in ("metrics", "classes")}
        return _prefixed("evaluation/", {**self.metrics, **_flat(others)}) | classes


class MetricsWriter:
    """Writes `metrics.jsonl`, and passes numbers and pictures to loggers. Use it in a `with` statement."""

    last_evaluation: int | None
    """Iteration of the newest recorded evaluation, None if there is none."""

    def __init__(
        self, run_dir: Path, *, start: int = 0, loggers: Sequence[LoggerConfig] = (TensorBoardConfig(),)
    ) -> None:
        """Open the files of a run that continues after iteration `start`. Records of later iterations are dropped."""
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / FILE_NAME
        records = read_records(path) if path.exists() else []
        records = [record for record in records if record["kind"] != "end" and record["iteration"] <= start]
        evaluations = [record["iteration"] for record in records if record["kind"] == "evaluation"]
        self.last_evaluation = max(evaluations, default=None)
        write_text(path, "".join(map(_line, records)))
        # Line-buffered, so that records survive a kill of the process.
        self._file = path.open("a", encoding="utf-8", buffering=1)
        self._start = start
        self._loggers = [config.build(run_dir, start=start) for config in loggers]

    def log_config(self, config: Section) -> None:
        """Pass the resolved configuration to the loggers."""
        for logger in self._loggers:
            logger.log_config(to_yaml(config), self._start)

    def log_step(self, step: Step) -> None:
        """Record one training step."""
        fields = step.measured()
        self._append({"kind": "train", "iteration": step.iteration, **fields})
        self._log_numbers(_prefixed("train/", _flat(fields)), step.iteration)

    def log_evaluation(self, iteration: int, measurement: Measurement) -> None:
        """Record one evaluation."""
        self._append({"kind": "evaluation", "iteration": iteration, **measurement.measured()})
        self._log_numbers(measurement.curves(), iteration)
        for logger in self._loggers:
            logger.log_pictures(measurement.pictures, iteration)
        self.last_evaluation = iteration

    def log_end(self) -> None:
        """Record the end of training, at the iteration of the last evaluation."""
        self._append({"kind": "end", "iteration": self.last_evaluation})

    def close(self) -> None:
        """Close the file and the loggers."""
        self._file.close()
        for logger in self._loggers:
            logger.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, record: Record) -> None:
        self._file.write(_line(record))

    def _log_numbers(self, values: Mapping[str, float], iteration: int) -> None:
        """Pass the finite values to the loggers."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        for logger in self._loggers:
            logger.log_numbers(finite, iteration)


class SilentWriter(MetricsWriter):
    """Writes nothing. For the processes other than the main one in distributed training."""

    def __init__(self) -> None:
        self.last_evaluation = None

    def log_config(self, config: Section) -> None:
        """Do nothing."""

    def log_step(self, step: Step) -> None:
        """Do nothing."""

    def log_evaluation(self, iteration: int, measurement: Measurement) -> None:
        """Update `last_evaluation`."""
        self.last_evaluation = iteration

    def log_end(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def read_records(path: Path) -> list[Record]:
    """Return the records of a `metrics.jsonl`.

    Lines that are no records, which a power failure can leave, are left out with a warning, and so is, without one, an
    incomplete last line, left by a killed process.
    """
    lines = path.read_bytes().split(b"\n")[:-1]
    records = [record for line in lines if (record := _record(line)) is not None]
    if len(records) < len(lines):
        damaged = len(lines) - len(records)
        logging.getLogger(__name__).warning("%s: %d lines are damaged and left out", path, damaged)
    return records


def last_record(path: Path) -> Record | None:
    """Return the last record of a `metrics.jsonl`, or None if there is none. Reads only the end of the file."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LONGEST_RECORD))
        lines = file.read().split(b"\n")[:-1]
    return next((record for line in reversed(lines) if (record := _record(line)) is not None), None)


def _record(line: bytes) -> Record | None:
    """Return the record in a line, None if it is not one."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or record.get("kind") not in ("train", "evaluation", "end"):
        return None
    iteration = record.get("iteration")
    return record if isinstance(iteration, int) or (iteration is None and record["kind"] == "end") else None


def _line(record: Record) -> str:
    return json_text(record) + "\n"


def _flat(fields: Mapping[str, Any]) -> dict[str, float]:
    """Return each number by name; the names of a nested mapping become `outer/inner`."""
    numbers: dict[str, float] = {}
    for name, value in fields.items():
        numbers |= _prefixed(f"{name}/", value) if isinstance(value, Mapping) else {name: value}
    return numbers


def _prefixed(prefix: str, numbers: Mapping[str, float]) -> dict[str, float]:
    return {prefix + name: value for name, value in numbers.items()}
