"""Checkpoints: everything a run needs to go on, in one file that is either whole or absent.

A checkpoint is read with `torch.load(weights_only=True)`, so that reading one never runs code from it.
"""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import random
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from maskrcnn.errors import InputError
from maskrcnn.structures import ClassRows, ClassTable
from maskrcnn.training.ema import ExponentialAverage
from maskrcnn.training.optimizer import load_optimizer_state

FORMAT = "maskrcnn checkpoint 1"


@dataclass(frozen=True)
class TrainingState:
    """What training changes, besides the iteration, from which the place in the data and the learning rate follow."""

    model: nn.Module
    optimizer: Optimizer
    scaler: GradScaler = field(default_factory=partial(GradScaler, enabled=False))  # of the loss, enabled under fp16
    average: ExponentialAverage | None = None


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `iteration` steps."""

    iteration: int
    model: dict[str, Tensor]  # the model's state dict
    average: dict[str, Tensor]  # the averaged weights under the same names; empty without an average
    optimizer: dict[str, Any]  # the optimizer's state dict
    scaler: dict[str, Any]  # the loss scaler's state dict; empty unless the precision is fp16
    random_states: dict[str, Any]
    classes: ClassTable
    config: dict[str, Any]  # resolved, in plain types
    metrics: dict[str, float]  # of the evaluation of these weights; empty if there was none
    versions: dict[str, str]


def capture(
    state: TrainingState,
    *,
    iteration: int,
    classes: ClassTable,
    config: Mapping[str, Any],
    metrics: Mapping[str, float],
) -> Checkpoint:
    """Collect the state of a run; the tensors are the live ones, so save it before the next step."""
    return Checkpoint(
        iteration=iteration,
        model=dict(state.model.state_dict()),
        average=dict(state.average.state_dict()) if state.average else {},
        optimizer=state.optimizer.state_dict(),
        scaler=state.scaler.state_dict(),
        random_states=random_states(),
        classes=classes,
        config=dict(config),
        metrics=dict(metrics),
        # TorchVersion is a class of its own, which weights_only refuses.
        versions={"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__},
    )


def restore(checkpoint: Checkpoint, state: TrainingState, *, source: str) -> None:
    """Put a run back to where `checkpoint` was taken. Raises InputError, which names `source`, where it does not fit.

    Learning rates and decay come from the optimizer, that is from the configuration, not from the checkpoint.
    """
    load_weights(state.model, checkpoint.model, source=source).require_complete()
    load_optimizer_state(state.optimizer, checkpoint.optimizer, source=source)
    if checkpoint.scaler:
        state.scaler.load_state_dict(checkpoint.scaler)
    if state.average is not None and not checkpoint.average:
        raise InputError(
            f"{source}: it holds no averaged weights; leave training.ema_decay away to go on with this run"
        )
    if state.average is not None:
        state.average.load(checkpoint.average)
    set_random_states(checkpoint.random_states)


# ---- Files


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` to `path`; whatever happens meanwhile, `path` holds the old one or the new one, whole."""
    # asdict() would copy every tensor.
    content = {field.name: getattr(checkpoint, field.name) for field in dataclasses.fields(checkpoint)}
    content["classes"] = dataclasses.asdict(checkpoint.classes)
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **content}, file))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU. Raises InputError, which names the file, where it is not one."""
    content = read_tensors(path)
    if content.get("format") != FORMAT:
        raise InputError(
            f"{path}: this is not a checkpoint of this project (backbone weights go to model.backbone.weights)"
        )
    newer: dict[str, Any] = {"average": {}, "scaler": {}}  # than the first files of this format
    fields: dict[str, Any] = {
        field.name: content.get(field.name, newer.get(field.name)) for field in dataclasses.fields(Checkpoint)
    }
    absent = [name for name, value in fields.items() if value is None]
    if absent:
        raise InputError(f"{path}: the checkpoint is damaged: it lacks {', '.join(absent)}")
    fields["classes"] = ClassTable(**content["classes"])
    return Checkpoint(**fields)


def read_tensors(path: Path) -> dict[str, Any]:
    """Read any file that `torch.save` wrote and that holds a mapping by name, a plain state dict for one.

    Raises InputError, which names the file, where it is missing, unreadable, damaged or something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path}: cannot read it: {error.strerror or error}") from error
    except Exception as error:  # unpickling foreign bytes can raise nearly anything
        raise InputError(
            f"{path}: this is not a file of tensors that can be read safely, or it is damaged: {_first_line(error)}"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: it holds a {type(content).__name__}, not tensors by name")
    return content


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file through a temporary one in the same folder; `path` holds the old content or the new, whole.

    Raises OSError, which names the file, where the disk is full or cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_of(path)
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # of a folder that has become read-only; the first error is the one to tell of
            temporary.unlink(missing_ok=True)
        reason = error.__context__ if isinstance(error, RuntimeError) else error  # torch.save hides what went wrong
        if isinstance(reason, OSError):
            kept = f"{reason.strerror}; what was there before is kept"
            raise OSError(reason.errno, kept, str(path)) from error
        raise
    _sync_folder(path.parent)


def temporary_of(path: Path) -> Path:
    """The file that `write_atomically` writes first; a kill may leave it behind, and the next write replaces it."""
    return path.with_name(path.name + ".tmp")  # in the same folder: a rename across file systems is a copy


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power failure; only POSIX opens folders."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class CheckpointFolder:
    """A run's checkpoints.

    `last.pt` to resume from, `best.pt` of the best evaluation so far, and `iteration_N.pt` for the newest of those
    before the last, as many as the run keeps.
    """

    def __init__(
        self,
        folder: Path,
        *,
        state: TrainingState,
        classes: ClassTable,
        config: Mapping[str, Any],
        metric: str,
        keep: int = 0,
    ) -> None:
        """Take over a folder.

        Args:
            folder: where the files are, or will be.
            state: what is saved.
            classes, config: what is saved with it.
            metric: names the value, higher is better, that `best.pt` is chosen by; one already there stays in play.
            keep: how many `iteration_N.pt` to keep.
        """
        self.folder = folder
        self.last = folder / "last.pt"
        self.best = folder / "best.pt"
        self._state, self._keep = state, keep
        self._classes, self._config, self._metric = classes, config, metric
        before = load_checkpoint(self.best) if self.best.exists() else None
        self.best_iteration = before.iteration if before else 0
        self._record = before.metrics.get(metric, -math.inf) if before else -math.inf

    def save(self, iteration: int) -> None:
        """Write `last.pt`."""
        save_checkpoint(self.last, self._capture(iteration, metrics={}))
        if self._keep:
            copy = self.folder / f"iteration_{iteration:08d}.pt"
            copy.unlink(missing_ok=True)
            try:
                # A second name for the same file: it costs nothing, and outlives the next `last.pt`.
                os.link(self.last, copy)
            except OSError:  # this file system has no such names
                content = self.last.read_bytes()
                write_atomically(copy, lambda file: file.write(content))
            for old in sorted(self.folder.glob("iteration_*.pt"))[: -self._keep]:
                old.unlink()

    def keep_best(self, iteration: int, metrics: Mapping[str, float]) -> bool:
        """Write `best.pt` if these metrics beat all before; return whether they do. NaN beats nothing."""
        improved = metrics[self._metric] > self._record
        if improved:
            save_checkpoint(self.best, self._capture(iteration, metrics=metrics))
            self._record, self.best_iteration = metrics[self._metric], iteration
        return improved

    def _capture(self, iteration: int, *, metrics: Mapping[str, float]) -> Checkpoint:
        return capture(
            self._state,
            iteration=iteration,
            classes=self._classes,
            config=self._config,
            metrics=metrics,
        )


# ---- Random states


def random_states() -> dict[str, Any]:
    """Return the states of all global generators: Python's, NumPy's, torch's, and the current GPU's if it is used."""
    numpy_state = np.random.get_state(legacy=False)
    key = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))  # weights_only refuses NumPy's arrays
    return {
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": key}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def seed_generators(seed: int) -> None:
    """Start all global generators from `seed`: Python's, NumPy's, torch's. Ours have seeds of their own anyway."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # it takes no more
    torch.manual_seed(seed)


def set_random_states(states: Mapping[str, Any]) -> None:
    """Undo every draw since `random_states()` returned `states`; a GPU's state needs a GPU and is else left out."""
    random.setstate(states["python"])
    numpy_state = states["numpy"]["state"]
    key = numpy_state["key"].numpy().astype(np.uint32)
    np.random.set_state({**states["numpy"], "state": {**numpy_state, "key": key}})
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


# ---- Weights alone


@runtime_checkable
class HasClassRows(Protocol):
    """A model that says which of its parameters have rows that belong to classes."""

    def class_rows(self) -> Mapping[str, ClassRows]:
        """Map the names of these parameters, weights and biases alike, to how their rows are shared out.

        A parameter that all classes share is not named.
        """


@dataclass(frozen=True)
class WeightsReport:
    """What `load_weights` found; names are those of state dicts."""

    source: str
    loaded: tuple[str, ...]
    misfits: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]  # name, shape in the file, shape in the model
    missing: tuple[str, ...]  # in the model, not in the file
    unused: tuple[str, ...]  # in the file, not in the model
    known_classes: tuple[str, ...]  # whose rows came from the file by name
    new_classes: tuple[str, ...]  # whose rows keep the model's values

    @property
    def complete(self) -> bool:
        """Whether file and model hold the same names and shapes, and every class was known."""
        return not (self.misfits or self.missing or self.unused or self.new_classes)

    def require_complete(self) -> None:
        """Raise InputError, which lists what does not fit, unless all does."""
        if not self.complete:
            raise InputError(f"{self.source}: these weights are not of this model\n{self.describe()}")

    def describe(self) -> str:
        """Return a table for people: a line for the count, then a line for each exception."""
        lines = [f"{len(self.loaded)} tensors loaded from {self.source}"]
        lines += [
            f"  does not fit  {name}: {list(theirs)} in the file, {list(ours)} in the model"
            for name, theirs, ours in self.misfits
        ]
        lines += [f"  missing       {name}: not in the file" for name in self.missing]
        lines += [f"  unused        {name}: not in the model" for name in self.unused]
        if self.known_classes or self.new_classes:
            lines.append(f"  classes found by name: {', '.join(self.known_classes) or 'none'}")
            lines.append(f"  classes new, keep the model's values: {', '.join(self.new_classes) or 'none'}")
        return "\n".join(lines)


def load_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    source: str,
    source_classes: ClassTable | None = None,
    classes: ClassTable | None = None,
) -> WeightsReport:
    """Load into `model` every tensor whose name and shape fit; the others keep the model's values.

    With the class tables of the file and of the model (`HasClassRows`), rows that belong to a class go to the class
    of the same name; a class that the file does not know keeps the model's rows. `source` names the file in reports.
    """
    own = model.state_dict()
    known: dict[int, int] = {}
    if source_classes is not None and classes is not None:
        assert isinstance(model, HasClassRows)
        known = _common_labels(source_classes, classes)
        weights = _move_class_rows(
            weights, own, model.class_rows(), known, classes_in_file=len(source_classes), source=source
        )
    shared = [name for name in weights if name in own]
    fitting = {name: weights[name] for name in shared if weights[name].shape == own[name].shape}
    model.load_state_dict(fitting, strict=False)
    names = classes.names if source_classes is not None and classes is not None else ()
    return WeightsReport(
        source=source,
        loaded=tuple(fitting),
        misfits=tuple(
            (name, tuple(weights[name].shape), tuple(own[name].shape)) for name in shared if name not in fitting
        ),
        missing=tuple(name for name in own if name not in weights),
        unused=tuple(name for name in weights if name not in own),
        known_classes=tuple(name for label, name in enumerate(names, start=1) if label in known),
        new_classes=tuple(name for label, name in enumerate(names, start=1) if label not in known),
    )


def _common_labels(source: ClassTable, target: ClassTable) -> dict[int, int]:
    """Map the labels of `target` whose name `source` has too to their labels there."""
    labels = {name: label for label, name in enumerate(source.names, start=1)}
    return {label: labels[name] for label, name in enumerate(target.names, start=1) if name in labels}


def _move_class_rows(
    weights: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    layouts: Mapping[str, ClassRows],
    known: Mapping[int, int],
    *,
    classes_in_file: int,
    source: str,
) -> dict[str, Tensor]:
    """Return `weights` with the rows of known classes at the model's places, in copies of the model's tensors."""
    moved = dict(weights)
    for name, layout in layouts.items():
        if name not in weights or weights[name].shape[1:] != own[name].shape[1:]:
            continue  # missing or of another width: load_weights reports it
        rows = layout.count(classes_in_file)
        if len(weights[name]) != rows:
            raise InputError(
                f"{source}: {name} has {len(weights[name])} rows, but {classes_in_file} classes need {rows}"
            )
        moved[name] = own[name].clone()
        # A GPU's tensor takes rows of a GPU's tensor only.
        theirs = weights[name].to(moved[name])
        moved[name][layout.of(list(known))] = theirs[layout.of(list(known.values()))]
    return moved
