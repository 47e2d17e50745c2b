"""The training loop: one step after another, until all are done, something is not finite, or a signal comes.

All state is in the model, the optimizer and the iteration: the number of steps done. A run resumes by restoring these
three from a checkpoint and passing a loader that starts at that iteration.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn
from torch.optim import Optimizer
from tqdm import tqdm

from maskrcnn.config import Section
from maskrcnn.memory import peak_memory
from maskrcnn.structures import Batch, Losses
from maskrcnn.training.metrics import Measurement, MetricsWriter, Step
from maskrcnn.training.optimizer import OptimizerConfig, SGDConfig, clip_gradients, set_learning_rate
from maskrcnn.training.schedule import MultiStepConfig, Schedule, ScheduleConfig

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16"]
Save = Callable[[int], None]
Evaluate = Callable[[int], Measurement]


class TrainingConfig(Section):
    """How to train: by default the reference 1x recipe."""

    batch_size: PositiveInt = Field(16, description="images of one step")
    optimizer: OptimizerConfig = SGDConfig()
    schedule: ScheduleConfig = MultiStepConfig()
    seed: NonNegativeInt = 0
    workers: NonNegativeInt = Field(4, description="processes that load data; 0 loads in the training process")
    precision: Precision = Field("fp32", description="bf16 runs matrix products in bfloat16 (autocast)")
    clip_norm: PositiveFloat | None = Field(None, description="longest gradient allowed; null leaves it")
    evaluate_every: PositiveInt = Field(5000, description="iterations between evaluations; one more comes at the end")
    checkpoint_every: PositiveInt = Field(5000, description="iterations between checkpoints")
    log_every: PositiveInt = Field(20, description="iterations between records in metrics.jsonl")


class Interrupted(Exception):  # noqa: N818 (it is no error)
    """A signal stopped the training early, with its state saved; the message says how to go on."""

    def __init__(self, number: signal.Signals, message: str) -> None:
        super().__init__(f"{number.name}: {message}")
        self.status = 128 + number  # what shells report: 130 for SIGINT, 143 for SIGTERM


def train(
    model: nn.Module,
    loader: Iterable[Batch],
    optimizer: Optimizer,
    schedule: Schedule,
    *,
    start: int,
    iterations: int,
    device: torch.device,
    writer: MetricsWriter,
    save: Save,
    evaluate: Evaluate,
    evaluate_every: int,
    checkpoint_every: int,
    log_every: int,
    clip_norm: float | None = None,
    precision: Precision = "fp32",
) -> None:
    """Train `model`, which is on `device`, from iteration `start` to `iterations`.

    `loader` yields batches without end, the first for the step after `start`. `save(iteration)` writes a checkpoint:
    every `checkpoint_every` steps, before each evaluation, at the end and on a signal. `evaluate(iteration)` measures
    the model; it may leave the model in any mode, but must not draw from the global random generators.

    Raises whatever `loader` raises, the steps so far saved; FloatingPointError if a loss or gradient is not finite,
    before it reaches a weight; Interrupted after SIGINT or SIGTERM.
    """
    speed = Speedometer()
    with StopRequest() as stop, _progress_bar(start, iterations) as bar:
        _evaluate_once(start, writer, evaluate, due=_is_due(start, evaluate_every, iterations))
        batches = iter(loader)
        level = logging.INFO if bar.disable else logging.DEBUG  # a progress line tells the user already
        for iteration in range(start + 1, iterations + 1):
            with speed.waiting(), _kept_safe(save, iteration - 1, start):
                batch = next(batches)
            with speed.working(images=len(batch.images)):
                lr = set_learning_rate(optimizer, schedule(iteration - 1))
                losses, norm = training_step(model, batch, optimizer, iteration, device, clip_norm, precision)
            step = Step(iteration, losses, lr, norm, speed.images_per_second, speed.data_share, peak_memory(device))
            bar.set_postfix_str(str(step), refresh=False)
            bar.update()
            if _is_due(iteration, log_every, iterations):
                logger.log(level, "iteration %d of %d: %s", iteration, iterations, step)
                writer.log_step(step)
                speed.reset()
            if stop.signal is not None:
                save(iteration)
                message = f"stopped after iteration {iteration}, which is saved; --resume goes on"
                raise Interrupted(stop.signal, message)
            evaluation_due = _is_due(iteration, evaluate_every, iterations)
            if evaluation_due or _is_due(iteration, checkpoint_every, iterations):
                save(iteration)
            _evaluate_once(iteration, writer, evaluate, due=evaluation_due)


def training_step(
    model: nn.Module,
    batch: Batch,
    optimizer: Optimizer,
    iteration: int,
    device: torch.device,
    clip_norm: float | None,
    precision: Precision,
) -> tuple[dict[str, float], float]:
    """Take one step; return the terms of the loss by name, and the norm of the gradient before clipping."""
    model.train()
    images = batch.images.to(device, non_blocking=device.type == "cuda")
    targets = batch.targets.to(device, non_blocking=device.type == "cuda")
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        losses: Losses = model(images, targets)
    optimizer.zero_grad()
    losses.total.backward()
    norm = clip_gradients(optimizer, clip_norm)
    # On a GPU this waits for the backward pass, once a step: the price of never stepping on a bad gradient.
    *terms, length = torch.stack([*losses, norm]).tolist()
    values = dict(zip(Losses._fields, terms, strict=True))
    if not all(map(math.isfinite, (*terms, length))):
        raise FloatingPointError(_what_is_not_finite(iteration, batch.image_ids, values, length))
    optimizer.step()
    return values, length


def _what_is_not_finite(iteration: int, image_ids: Sequence[int], losses: Mapping[str, float], norm: float) -> str:
    terms = ", ".join(f"{name} {value:g}" for name, value in losses.items())
    images = ", ".join(map(str, image_ids))
    return (
        f"iteration {iteration}: a loss or the gradient is not finite: {terms}; gradient norm {norm:g}; image ids "
        f"{images}. The step was not taken. A lower learning rate, a longer warm-up or training.clip_norm often helps"
    )


@contextmanager
def _kept_safe(save: Save, iteration: int, start: int) -> Iterator[None]:
    """Save the state after `iteration` if an image cannot be read, or a worker dies: the weights are not to blame."""
    try:
        yield
    except Exception:
        if iteration > start:
            save(iteration)
            logger.warning("the state after iteration %d is saved; --resume goes on", iteration)
        raise


def _is_due(iteration: int, every: int, iterations: int) -> bool:
    return iteration > 0 and (iteration % every == 0 or iteration == iterations)


def _evaluate_once(iteration: int, writer: MetricsWriter, evaluate: Evaluate, *, due: bool) -> None:
    """Evaluate and record it, unless that is on record: a run killed during an evaluation resumes just before it."""
    if due and writer.last_evaluation != iteration:
        writer.log_evaluation(iteration, evaluate(iteration))


# ---- What the user sees


class Speedometer:
    """Images per second, and the share of time spent waiting for data, since `reset()`.

    Evaluations and checkpoints in between do not count.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.reset()

    def reset(self) -> None:
        """Start counting anew."""
        self._images, self._waited, self._worked = 0, 0.0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of this block as waiting for data."""
        began = self._clock()
        yield
        self._waited += self._clock() - began

    @contextmanager
    def working(self, *, images: int) -> Iterator[None]:
        """Count the time of this block as spent on `images` images."""
        began = self._clock()
        yield
        self._worked += self._clock() - began
        self._images += images

    @property
    def images_per_second(self) -> float:
        """Images over all time counted."""
        return self._images / max(self._waited + self._worked, 1e-9)

    @property
    def data_share(self) -> float:
        """Time waiting for data over all time counted, 0 to 1."""
        return self._waited / max(self._waited + self._worked, 1e-9)


def _progress_bar(start: int, iterations: int) -> tqdm:
    """Return the progress line on standard error; where that is no terminal, there is none."""
    return tqdm(
        initial=start,
        total=iterations,
        disable=None,
        dynamic_ncols=True,
        smoothing=0,  # the mean speed so far, evaluations included, tells the time left best
        bar_format="{n_fmt}/{total_fmt} {elapsed}, {remaining} left{postfix}",
    )


# ---- Signals


class StopRequest:
    """Notes SIGINT and SIGTERM inside a `with` block, instead of dying from them; works in the main thread alone.

    The first signal is noted in `signal`; a second one acts at once, as if there were no block. Ctrl-C and SLURM
    signal the data loader's workers too; these must ignore it, or the next batch never comes.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._put_back()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._put_back()
        # Not print(): the signal may have come in the middle of one.
        os.write(2, f"\n{self.signal.name}: finishing this step, then saving; another stops at once\n".encode())

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
