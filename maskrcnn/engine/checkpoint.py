"""Checkpoints: the complete state of a run in one file, written atomically.

Files are read with `torch.load(weights_only=True)`, so loading a checkpoint never runs code from it.
"""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from maskrcnn.engine.ema import ExponentialAverage
from maskrcnn.engine.optimizer import load_optimizer_state
from maskrcnn.errors import InputError, first_of
from maskrcnn.runtime.files import read_tensors, write_atomically
from maskrcnn.structures import ClassRows, ClassTable

FORMAT = "maskrcnn checkpoint 1"


@dataclass(frozen=True)
class TrainingState:
    """The objects that training updates.

    The position in the data and the learning rate are functions of the iteration, which is not part of this state.
    """

    model: nn.Module
    optimizer: Optimizer
    scaler: GradScaler = field(default_factory=partial(GradScaler, enabled=False))  # loss scaler, enabled for fp16
    average: ExponentialAverage | None = None


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `iteration` training steps."""

    iteration: int
    model: dict[str, Tensor]  # state dict of the model
    average: dict[str, Tensor]  # averaged weights, same names as `model`; empty if there is no average
    optimizer: dict[str, Any]  # state dict of the optimizer
    scaler: dict[str, Any]  # state dict of the loss scaler; empty unless the precision is fp16
    random_states: dict[str, Any]
    classes: ClassTable
    config: dict[str, Any]  # resolved configuration in plain types
    metrics: dict[str, float]  # evaluation metrics of these weights; empty if they were not evaluated
    versions: dict[str, str]

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(arbitrary_types_allowed=True)  # Tensor


_CHECKPOINT = TypeAdapter(Checkpoint)


def capture(
    state: TrainingState,
    *,
    iteration: int,
    classes: ClassTable,
    config: Mapping[str, Any],
    metrics: Mapping[str, float],
) -> Checkpoint:
    """Return the state of a run. The tensors are not copied, so save the checkpoint before the next training step."""
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
        # str(): weights_only rejects the class TorchVersion.
        versions={"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__},
    )


def restore(checkpoint: Checkpoint, state: TrainingState, *, source: str) -> None:
    """Load a checkpoint into the model, optimizer, loss scaler, average and random generators.

    Learning rates and weight decay are not restored: they keep the values of the current configuration.

    Args:
        checkpoint: the checkpoint to load.
        state: the objects to load it into.
        source: name of the checkpoint in error messages.

    Raises:
        InputError: the checkpoint does not match the model, the optimizer or the average.
    """
    load_weights(state.model, checkpoint.model, source=source).require_complete()
    load_optimizer_state(state.optimizer, checkpoint.optimizer, source=source)
    if checkpoint.scaler:
        state.scaler.load_state_dict(checkpoint.scaler)
    if state.average is not None and not checkpoint.average:
        raise InputError(f"{source}: it holds no averaged weights; remove training.ema_decay to resume this run")
    if state.average is not None:
        state.average.load(checkpoint.average)
    set_random_states(checkpoint.random_states)


# ---- Files


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` to `path` atomically: after a failure, `path` still holds the previous checkpoint."""
    # Not dataclasses.asdict(checkpoint), which copies every tensor.
    content = {field.name: getattr(checkpoint, field.name) for field in dataclasses.fields(checkpoint)}
    content["classes"] = dataclasses.asdict(checkpoint.classes)
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **content}, file))


def load_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint in `path`, with all tensors on the CPU.

    Raises:
        InputError: the file cannot be read, is damaged or is not a checkpoint. The message names the file.
    """
    content = read_tensors(path)
    if not is_checkpoint(content):
        raise InputError(
            f"{path}: this is not a checkpoint of this project (backbone weights go to model.backbone.weights)"
        )
    return checkpoint_of(content, str(path))


def is_checkpoint(content: Mapping[str, Any]) -> bool:
    """Return whether the content of a file is that of a checkpoint, not the weights of another program."""
    return content.get("format") == FORMAT


def checkpoint_of(content: Mapping[str, Any], source: str) -> Checkpoint:
    """Return the checkpoint that a file contains.

    Raises:
        InputError: a field is missing or has a wrong type. The message names the file `source`.
    """
    defaults: dict[str, Any] = {"average": {}, "scaler": {}}  # fields that the first files of this format lack
    fields: dict[str, Any] = {
        field.name: content.get(field.name, defaults.get(field.name)) for field in dataclasses.fields(Checkpoint)
    }
    absent = [name for name, value in fields.items() if value is None]
    if absent:
        raise InputError(f"{source}: the checkpoint is damaged: it lacks {', '.join(absent)}")
    try:
        checkpoint = _CHECKPOINT.validate_python(fields)
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise InputError(f"{source}: the checkpoint is damaged: {place}: {problem['msg']}") from error
    if len(checkpoint.classes.names) != len(checkpoint.classes.category_ids):
        raise InputError(f"{source}: the checkpoint is damaged: classes has not as many names as ids")
    return checkpoint


class CheckpointFolder:
    """The checkpoint files of a run.

    `last.pt` is the newest checkpoint, from which a run resumes. `best.pt` is the checkpoint with the best evaluation.
    `iteration_N.pt` are the newest `keep` checkpoints, including the last one.
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
        """Set up the folder and read the metric of an existing `best.pt`.

        Args:
            folder: folder of the checkpoint files. It need not exist.
            state: the training state to save.
            classes: class table to save.
            config: resolved configuration to save, in plain types.
            metric: name of the metric that selects `best.pt`; higher is better.
            keep: number of `iteration_N.pt` files to keep.
        """
        self.folder = folder
        self.last = folder / "last.pt"
        self.best = folder / "best.pt"
        self._state, self._keep = state, keep
        self._classes, self._config, self._metric = classes, config, metric
        best = load_checkpoint(self.best) if self.best.exists() else None
        self.best_iteration = best.iteration if best else 0
        self._best_value = best.metrics.get(metric, -math.inf) if best else -math.inf

    def save(self, iteration: int) -> None:
        """Write `last.pt` and, if `keep` is positive, `iteration_N.pt`."""
        save_checkpoint(self.last, self._capture(iteration, metrics={}))
        if self._keep:
            copy = self.folder / f"iteration_{iteration:08d}.pt"
            copy.unlink(missing_ok=True)
            try:
                # A hard link uses no disk space and stays when `last.pt` is replaced.
                os.link(self.last, copy)
            except OSError:  # the file system does not support hard links
                content = self.last.read_bytes()
                write_atomically(copy, lambda file: file.write(content))
            for outdated in sorted(self.folder.glob("iteration_*.pt"))[: -self._keep]:
                outdated.unlink()

    def keep_best(self, iteration: int, metrics: Mapping[str, float]) -> bool:
        """Write `best.pt` and return True if the selected metric is better than in all evaluations before.

        NaN is never better.
        """
        improved = metrics[self._metric] > self._best_value
        if improved:
            save_checkpoint(self.best, self._capture(iteration, metrics=metrics))
            self._best_value, self.best_iteration = metrics[self._metric], iteration
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
    """Return the states of the global random generators of Python, NumPy, torch and, if CUDA is in use, the GPU."""
    numpy_state = np.random.get_state(legacy=False)
    key = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))  # weights_only rejects NumPy arrays
    return {
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": key}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def seed_generators(seed: int) -> None:
    """Seed the global random generators of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # NumPy accepts at most 32 bits
    torch.manual_seed(seed)


def set_random_states(states: Mapping[str, Any]) -> None:
    """Set the global random generators to `states`, as returned by `random_states()`.

    The state of a GPU is ignored if there is no GPU.
    """
    random.setstate(states["python"])
    numpy_state = states["numpy"]["state"]
    key = numpy_state["key"].numpy().astype(np.uint32)
    np.random.set_state({**states["numpy"], "state": {**numpy_state, "key": key}})
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


# ---- Weights only


@runtime_checkable
class HasClassRows(Protocol):
    """A model that knows which of its parameters have class-specific rows."""

    def class_rows(self) -> Mapping[str, ClassRows]:
        """Return the row layout of each weight and bias with class-specific rows, by parameter name.

        Class-agnostic parameters are left out.
        """


@dataclass(frozen=True)
class WeightsReport:
    """The result of `load_weights`. Tensors are named as in state dicts."""

    source: str
    loaded: tuple[str, ...]
    misfits: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]  # name, shape in the file, shape in the model
    missing: tuple[str, ...]  # in the model, not in the file
    unused: tuple[str, ...]  # in the file, not in the model
    known_classes: tuple[str, ...]  # classes whose rows were loaded by class name
    new_classes: tuple[str, ...]  # classes whose rows keep the model's values

    @property
    def complete(self) -> bool:
        """Whether file and model have the same names and shapes, and the file has every class of the model."""
        return not (self.misfits or self.missing or self.unused or self.new_classes)

    def require_complete(self) -> None:
        """Raise InputError with the list of mismatches unless the report is complete."""
        if not self.complete:
            raise InputError(f"{self.source}: these weights do not match this model\n{self.describe()}")

    def describe(self) -> str:
        """Return the report as text: the number of loaded tensors, then one line for each mismatch."""
        lines = [f"{len(self.loaded)} tensors loaded from {self.source}"]
        lines += [
            f"  does not fit  {name}: {list(file_shape)} in the file, {list(model_shape)} in the model"
            for name, file_shape, model_shape in self.misfits
        ]
        lines += [f"  missing       {name}: not in the file" for name in self.missing]
        lines += [f"  unused        {name}: not in the model" for name in self.unused]
        if self.known_classes or self.new_classes:
            origins = dict.fromkeys(self.known_classes, "from the file") | dict.fromkeys(self.new_classes, "new")
            width = max(map(len, origins))
            lines += ["  rows of the classes:", *(f"    {name:{width}}  {origin}" for name, origin in origins.items())]
        return "\n".join(lines)


def load_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    source: str,
    source_classes: ClassTable | None = None,
    classes: ClassTable | None = None,
) -> WeightsReport:
    """Load into `model` every tensor whose name and shape match; other tensors of the model keep their values.

    With both class tables, class-specific rows are loaded by class name. A class that is not in the file keeps the
    rows of the model.

    Args:
        model: the model to load into. With class tables, it must implement `HasClassRows`.
        weights: state dict to load.
        source: name of the file in reports and error messages.
        source_classes: class table of the file.
        classes: class table of the model.

    Returns:
        What was loaded and what does not match.

    Raises:
        InputError: a class-specific tensor does not have the number of rows that `source_classes` implies.
    """
    model_state = model.state_dict()
    known: dict[int, int] = {}
    if source_classes is not None and classes is not None:
        assert isinstance(model, HasClassRows)
        known = _common_labels(source_classes, classes)
        weights = _move_class_rows(
            weights, model_state, model.class_rows(), known, classes_in_file=len(source_classes), source=source
        )
    shared = [name for name in weights if name in model_state]
    matching = {name: weights[name] for name in shared if weights[name].shape == model_state[name].shape}
    model.load_state_dict(matching, strict=False)
    class_names = classes.names if source_classes is not None and classes is not None else ()
    return WeightsReport(
        source=source,
        loaded=tuple(matching),
        misfits=tuple(
            (name, tuple(weights[name].shape), tuple(model_state[name].shape))
            for name in shared
            if name not in matching
        ),
        missing=tuple(name for name in model_state if name not in weights),
        unused=tuple(name for name in weights if name not in model_state),
        known_classes=tuple(name for label, name in enumerate(class_names, start=1) if label in known),
        new_classes=tuple(name for label, name in enumerate(class_names, start=1) if label not in known),
    )


def require_finite(weights: Mapping[str, Tensor], source: str) -> None:
    """Raise InputError, which names the parameters and the file `source`, if a value is NaN or infinite."""
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    if broken:
        lines = "\n  ".join(first_of(broken))
        raise InputError(f"{source}: these parameters have values that are NaN or infinite:\n  {lines}")


def _common_labels(source: ClassTable, target: ClassTable) -> dict[int, int]:
    """Return the label in `source` for each label of `target` whose class name is in both tables."""
    labels = {name: label for label, name in enumerate(source.names, start=1)}
    return {label: labels[name] for label, name in enumerate(target.names, start=1) if name in labels}


def _move_class_rows(
    weights: Mapping[str, Tensor],
    model_state: Mapping[str, Tensor],
    layouts: Mapping[str, ClassRows],
    known: Mapping[int, int],
    *,
    classes_in_file: int,
    source: str,
) -> dict[str, Tensor]:
    """Return `weights` with class-specific rows in the model's class order.

    Rows of classes that are not in the file are copied from the model.

    Args:
        weights: state dict of the file.
        model_state: state dict of the model.
        layouts: row layout of each class-specific tensor, by name.
        known: label in the file for each label of the model whose class is in the file.
        classes_in_file: number of classes of the file.
        source: name of the file in error messages.
    """
    reordered = dict(weights)
    for name, layout in layouts.items():
        if name not in weights or weights[name].shape[1:] != model_state[name].shape[1:]:
            continue  # missing or of another width; load_weights reports it
        rows = layout.count(classes_in_file)
        if len(weights[name]) != rows:
            raise InputError(
                f"{source}: {name} has {len(weights[name])} rows, but {classes_in_file} classes need {rows}"
            )
        reordered[name] = model_state[name].clone()
        # Indexed assignment needs both tensors on the same device.
        rows_in_file = weights[name].to(reordered[name])
        reordered[name][layout.of(list(known))] = rows_in_file[layout.of(list(known.values()))]
    return reordered
