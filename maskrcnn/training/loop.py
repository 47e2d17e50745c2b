"""The training loop: one step after another, until all are done, something is not finite, or a signal comes.

All state is in the model, the optimizer and the iteration: the number of steps done. A run resumes by restoring these
three from a checkpoint and passing a loader that starts at that iteration.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import NamedTuple

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from tqdm import tqdm

from maskrcnn.config import Section
from maskrcnn.errors import InputError
from maskrcnn.memory import peak_memory
from maskrcnn.structures import Batch
from maskrcnn.training.distributed import Processes
from maskrcnn.training.metrics import Measurement, MetricsWriter, Step
from maskrcnn.training.optimizer import OptimizerConfig, SGDConfig, set_learning_rate
from maskrcnn.training.profiler import Profiler
from maskrcnn.training.schedule import MultiStepConfig, Schedule, ScheduleConfig
from maskrcnn.training.step import Precision, StepResult, TrainingStep

logger = logging.getLogger(__name__)

Save = Callable[[int], None]
Evaluate = Callable[[int], Measurement]


class TrainingConfig(Section):
    """How to train: by default the reference 1x recipe."""

    batch_size: PositiveInt = Field(16, description="images of one step, of all processes together")
    grad_accum_steps: PositiveInt = Field(
        1, description="parts in which a process computes its share of a batch, one after another"
    )
    optimizer: OptimizerConfig = SGDConfig()
    schedule: ScheduleConfig = MultiStepConfig()
    seed: NonNegativeInt = 0
    workers: NonNegativeInt = Field(4, description="processes that load data; 0 loads in the training process")
    precision: Precision = Field(
        "fp32", description="of matrix products: bf16 or fp16 (with a loss scaler) by autocast"
    )
    clip_norm: PositiveFloat | None = Field(None, description="longest gradient allowed; null leaves it")
    skip_non_finite: NonNegativeInt = Field(
        0, description="steps in a row that may be left out because a loss or gradient is not finite"
    )
    ema_decay: float | None = Field(None, gt=0, lt=1, description="keep and evaluate a running average of the weights")
    compile: bool = Field(False, description="torch.compile the dense parts")
    deterministic: bool = Field(False, description="refuse operations whose result may differ from run to run")
    profile: bool = Field(False, description="write a profiler trace of steps 10 to 20")
    evaluate_every: PositiveInt = Field(5000, description="iterations between evaluations; one more comes at the end")
    patience: PositiveInt | None = Field(
        None, description="evaluations without a better best_metric after which training ends; null goes on"
    )
    checkpoint_every: PositiveInt = Field(5000, description="iterations between checkpoints")
    keep_checkpoints: NonNegativeInt = Field(0, description="how many of them to keep, besides the last and the best")
    log_every: PositiveInt = Field(20, description="iterations between records in metrics.jsonl")


class Intervals(NamedTuple):
    """How many iterations lie between two of a kind; each also comes at the end."""

    evaluate: int
    save: int
    log: int


class Interrupted(Exception):  # noqa: N818 (it is no error)
    """A signal stopped the training early, with its state saved; the message says how to go on."""

    def __init__(self, number: signal.Signals, message: str) -> None:
        super().__init__(f"{number.name}: {message}")
        self.status = 128 + number  # what shells report: 130 for SIGINT, 143 for SIGTERM


def train(
    step: TrainingStep,
    loader: Iterable[Sequence[Batch]],
    schedule: Schedule,
    *,
    start: int,
    iterations: int,
    intervals: Intervals,
    writer: MetricsWriter,
    save: Save,
    evaluate: Evaluate,
    is_over: Callable[[], bool] = lambda: False,
    profiler: Profiler | None = None,
) -> None:
    """Train from iteration `start` to `iterations`.

    `loader` yields the batches of each iteration, without end, the first for the step after `start`. `save(iteration)`
    writes a checkpoint; it is called before each evaluation and on a signal, too. `evaluate(iteration)` measures the
    model; it may leave the model in any mode, but must not draw from the global random generators. `is_over()` is asked
    after each evaluation whether training has come to its end early. `profiler` is told of each step.

    Raises whatever `loader` raises, the steps so far saved, and whatever `step` raises: that may leave norms with
    broken statistics, so nothing is saved then. Interrupted after SIGINT or SIGTERM.
    """
    speed, processes = Speedometer(), step.processes
    with (
        StopRequest(second_signal_kills=processes.world == 1) as stop,
        _progress_bar(start, iterations, shown=processes.is_main) as bar,
    ):
        _evaluate_once(start, writer, evaluate, due=_is_due(start, intervals.evaluate, iterations))
        batches = iter(loader)
        level = logging.INFO if bar.disable else logging.DEBUG  # a progress line tells the user already
        for iteration in range(start + 1, iterations + 1):
            if _is_due(iteration - 1, intervals.evaluate, iterations) and is_over():
                logger.info("no better evaluation for a while: training ends after iteration %d", iteration - 1)
                break
            log_due = _is_due(iteration, intervals.log, iterations)
            with speed.waiting():
                parts = _fetch(batches, processes, save, iteration - 1, start)
            with speed.working(images=sum(len(batch.images) for batch in parts) * processes.world):
                lr = set_learning_rate(step.state.optimizer, schedule(iteration - 1))
                found = step(parts, iteration, diagnose=log_due)
            if profiler is not None:
                profiler.step()
            shown = _shown(found, iteration, lr, speed, processes, whole=log_due)
            bar.set_postfix_str(shown.brief, refresh=False)
            bar.update()
            if log_due:
                logger.log(level, "iteration %d of %d: %s", iteration, iterations, shown)
                writer.log_step(shown)
                speed.reset()
            _stop_if_asked(stop, processes, save, iteration)
            evaluation_due = _is_due(iteration, intervals.evaluate, iterations)
            if evaluation_due or _is_due(iteration, intervals.save, iterations):
                save(iteration)
            _evaluate_once(iteration, writer, evaluate, due=evaluation_due)
    writer.log_end()


def _stop_if_asked(stop: StopRequest, processes: Processes, save: Save, iteration: int) -> None:
    """Save and raise Interrupted if any process got a signal."""
    if number := processes.max(stop.signal or 0):
        save(iteration)
        processes.wait()  # the end of one process is the end of all: not before the main one has saved
        message = f"stopped after iteration {iteration}, which is saved; --resume goes on"
        raise Interrupted(signal.Signals(number), message)


def _shown(
    found: StepResult, iteration: int, lr: float, speed: Speedometer, processes: Processes, *, whole: bool
) -> Step:
    """The step as it is recorded; `whole` takes the means over all processes."""
    losses = found.losses
    if whole and processes.world > 1:
        means = processes.mean(torch.tensor(list(losses.values()), device=processes.device))
        losses = dict(zip(losses, means.tolist(), strict=True))
    return Step(
        iteration=iteration,
        losses=losses,
        lr=lr,
        gradient_norm=found.gradient_norm,
        images_per_second=speed.images_per_second,
        data_share=speed.data_share,
        peak_memory=peak_memory(processes.device),
        diagnostics=found.diagnostics,
    )


def _fetch(
    batches: Iterator[Sequence[Batch]], processes: Processes, save: Save, iteration: int, start: int
) -> Sequence[Batch]:
    """Return the next batches; where a process cannot have its own, save the state after `iteration`, and raise."""
    parts: Sequence[Batch] = ()
    error: Exception | None = None
    try:
        parts = next(batches)
    except Exception as caught:  # an image cannot be read, or a worker died: the weights are not to blame
        error = caught
    if not processes.any(error is not None):
        return parts
    if iteration > start:
        save(iteration)
        logger.warning("the state after iteration %d is saved; --resume goes on", iteration)
    processes.wait()
    raise error or InputError("another process could not read its images, and said why")


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


def _progress_bar(start: int, iterations: int, *, shown: bool) -> tqdm:
    """Return the progress line on standard error; where that is no terminal, there is none."""
    return tqdm(
        initial=start,
        total=iterations,
        disable=None if shown else True,
        dynamic_ncols=True,
        smoothing=0,  # the mean speed so far, evaluations included, tells the time left best
        bar_format="{n_fmt}/{total_fmt} {remaining} left{postfix}",
    )


# ---- Signals


class StopRequest:
    """Notes SIGINT and SIGTERM inside a `with` block, instead of dying from them; works in the main thread alone.

    The first signal is noted in `signal`. A second one acts at once, as if there were no block, unless
    `second_signal_kills` is false: of several processes each may be signalled by SLURM and by torchrun alike. Ctrl-C
    and SLURM signal the data loader's workers too; these must ignore it, or the next batch never comes.
    """

    def __init__(self, *, second_signal_kills: bool = True) -> None:
        self.signal: signal.Signals | None = None
        self._second_signal_kills = second_signal_kills

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._put_back()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        if self._second_signal_kills:
            self._put_back()
        # Not print(): the signal may have come in the middle of one.
        hint = "; another stops at once" if self._second_signal_kills else ""
        os.write(2, f"\n{self.signal.name}: finishing this step, then saving{hint}\n".encode())

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
