"""The training loop: training steps, periodic logging, checkpoints and evaluations, and stopping on a signal.

The loop has no state except `TrainingState` and the iteration, which is the number of finished steps. To resume,
restore both from a checkpoint and pass a loader that starts at that iteration.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType, TracebackType
from typing import NamedTuple

import torch
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from tqdm import tqdm

from maskrcnn.config import Section, Size
from maskrcnn.data.buckets import BucketsConfig
from maskrcnn.data.sampling import SamplerConfig, UniformConfig
from maskrcnn.engine.graphs import Compile, Execution
from maskrcnn.engine.loggers import LoggerConfig, TensorBoardConfig
from maskrcnn.engine.metrics import Measurement, MetricsWriter, Step
from maskrcnn.engine.optimizer import OptimizerConfig, SGDConfig, set_learning_rate
from maskrcnn.engine.profiler import Profiler
from maskrcnn.engine.schedule import MultiStepConfig, Schedule, ScheduleConfig
from maskrcnn.engine.step import Precision, StepResult, TrainingStep
from maskrcnn.errors import InputError
from maskrcnn.runtime.memory import peak_memory
from maskrcnn.runtime.processes import Exchange, Processes
from maskrcnn.structures import Batch

logger = logging.getLogger(__name__)

Save = Callable[[int], None]
Evaluate = Callable[[int], Measurement]


class Intervals(NamedTuple):
    """Iterations between evaluations, checkpoints and log records. Each is also done after the last iteration."""

    evaluate: int = 5000
    save: int = 5000
    log: int = 20


class TrainingConfig(Section):
    """Training settings. The defaults are the reference 1x recipe (Detectron2)."""

    batch_size: Size = Field(16, description="images per training step, over all processes")
    grad_accum_steps: Size = Field(
        1, description="gradient accumulation steps: batches into which a process splits its images of a training step"
    )
    optimizer: OptimizerConfig = SGDConfig()
    schedule: ScheduleConfig = MultiStepConfig()
    sampler: SamplerConfig = Field(
        UniformConfig(), description="how often each image is drawn; an epoch has as many draws as there are images"
    )
    buckets: BucketsConfig | None = Field(
        None, description="few shapes that batches are padded to; null: each batch has a shape of its own"
    )
    seed: NonNegativeInt = 0
    workers: int = Field(4, ge=0, le=1024, description="data loader processes; 0 loads in the training process")
    precision: Precision = Field("fp32", description="autocast precision; fp16 uses a loss scaler")
    clip_norm: PositiveFloat | None = Field(None, description="maximum gradient norm; null disables clipping")
    skip_non_finite: NonNegativeInt = Field(
        0, description="consecutive training steps that may be skipped because a loss or gradient is not finite"
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of the exponential moving average of the weights, which is evaluated too; null disables it",
    )
    compile: Compile = Field(
        "off",
        description="parts: use torch.compile for the backbone, the RPN head and the RoI heads; step: for losses and "
        "gradients as a whole, on a GPU with buckets",
    )
    cuda_graph: bool = Field(False, description="replay training steps as CUDA graphs, on a GPU with buckets")
    deterministic: bool = Field(
        False, description="use deterministic algorithms and raise an error where there are none"
    )
    gradient_exchange: Exchange = Field(
        "fp32", description="type in which several processes send each other gradients; bf16 halves the bytes"
    )
    cudnn_benchmark: bool = Field(
        False, description="let cuDNN measure which kernels are fastest for each shape, which pays with few shapes"
    )
    tf32: bool = Field(False, description="compute float32 products in TF32 on a GPU, with 10 bits of mantissa")
    profile: bool = Field(False, description="write a profiler trace of training steps 10 to 20")
    evaluate_every: PositiveInt = Field(
        5000, description="iterations between evaluations; the last iteration is evaluated too"
    )
    patience: PositiveInt | None = Field(
        None,
        description="stop training after this many evaluations without improvement of best_metric; null disables it",
    )
    checkpoint_every: PositiveInt = Field(5000, description="iterations between checkpoints")
    keep_checkpoints: NonNegativeInt = Field(0, description="number of checkpoints to keep besides last.pt and best.pt")
    log_every: PositiveInt = Field(20, description="iterations between records in metrics.jsonl")
    loggers: tuple[LoggerConfig, ...] = Field(
        (TensorBoardConfig(),), description="where the records go besides metrics.jsonl"
    )

    @model_validator(mode="after")
    def _fixed_shapes_need_buckets(self) -> TrainingConfig:
        if missing := self.execution.missing:
            raise ValueError(missing)
        return self

    @model_validator(mode="after")
    def _deterministic_kernels_are_not_measured(self) -> TrainingConfig:
        if self.deterministic and self.cudnn_benchmark:
            raise ValueError("deterministic excludes cudnn_benchmark, which may choose other kernels in each run")
        return self

    @property
    def execution(self) -> Execution:
        """How a training step is run."""
        accumulates = self.grad_accum_steps > 1
        return Execution(self.compile, self.cuda_graph, self.buckets, self.gradient_exchange, accumulates)

    @property
    def intervals(self) -> Intervals:
        """The intervals of the training loop."""
        return Intervals(self.evaluate_every, self.checkpoint_every, self.log_every)


class Interrupted(Exception):  # noqa: N818 (not an error)
    """Training stopped early because of a signal, after saving a checkpoint. The message says how to resume."""

    def __init__(self, number: signal.Signals, message: str) -> None:
        super().__init__(f"{number.name}: {message}")
        self.status = 128 + number  # exit status, as shells report it: 130 for SIGINT, 143 for SIGTERM


def train(
    step: TrainingStep,
    loader: Iterable[Sequence[Batch]],
    schedule: Schedule,
    *,
    start: int,
    iterations: int,
    intervals: Intervals,
    writer: MetricsWriter,
    save: Save | None = None,
    evaluate: Evaluate | None = None,
    is_over: Callable[[], bool] = lambda: False,
    stop: StopRequest | None = None,
    profiler: Profiler | None = None,
) -> None:
    """Train from iteration `start` to `iterations`.

    Args:
        step: the training step.
        loader: endless; yields the batches of each iteration after `start`.
        schedule: learning rate factor as a function of the iteration.
        start, iterations: number of training steps that are already done, and at the end.
        intervals, writer: when to evaluate, save and log, and what records steps and evaluations.
        save: `save(iteration)` writes a checkpoint; also called before each evaluation and on a signal. None: no files.
        evaluate: `evaluate(iteration)` evaluates the model. It must not draw from the global random generators.
        is_over: called after each evaluation; returns True to stop training early.
        stop: the training saves and ends after the step in which it received a signal, once a step is done.
        profiler: `profiler.step()` is called after each training step.

    Raises:
        Interrupted: `stop` received a signal; the state is saved.
        Exception: of `loader`, after saving a checkpoint, or of `step`, without saving: norm statistics may be invalid.
    """
    speed, processes = Speedometer(), step.processes
    with _progress_bar(start, iterations, enabled=processes.is_main) as bar:
        is_logged = partial(_is_due, every=intervals.log, iterations=iterations)
        journal = _Journal(step, writer, speed, bar, is_logged)
        save = partial(_finish_and_save, journal, save)
        _evaluate_once(start, writer, evaluate, due=_is_due(start, intervals.evaluate, iterations))
        batch_iterator = iter(loader)
        for iteration in range(start + 1, iterations + 1):
            if _is_due(iteration - 1, intervals.evaluate, iterations) and is_over():
                logger.info("no improvement in the last evaluations: training ends after iteration %d", iteration - 1)
                break
            evaluation_due = _is_due(iteration, intervals.evaluate, iterations)
            with speed.waiting():
                batches = _fetch(batch_iterator, processes, save, iteration - 1, start, stop)
            with speed.working(images=sum(len(batch.images) for batch in batches) * processes.world):
                journal.rates[iteration] = set_learning_rate(step.state.optimizer, schedule(iteration - 1))
                step.start(batches, iteration, diagnose=journal.is_due(iteration))
                results = step.results()
            if profiler is not None:
                profiler.step()
            bar.update()
            journal.write(results)
            if evaluation_due or _is_due(iteration, intervals.save, iterations):
                _stop_on_signal(processes.max(_signal_of(stop)), processes, save, iteration)
                save(iteration)
            _evaluate_once(iteration, writer, evaluate, due=evaluation_due)
    writer.log_end()


class _Journal:
    """Shows and records the training steps when their results arrive, on a GPU some steps later."""

    def __init__(
        self,
        step: TrainingStep,
        writer: MetricsWriter,
        speed: Speedometer,
        bar: tqdm,
        is_due: Callable[[int], bool],
    ) -> None:
        self.is_due = is_due  # whether an iteration is recorded
        self.rates: dict[int, float] = {}  # learning rate of each iteration whose result has not arrived
        self._step, self._writer, self._speed, self._bar = step, writer, speed, bar
        self._outside = 0  # batches outside of the buckets that were reported

    def finish(self) -> None:
        """Wait for the results of all steps, and show and record them."""
        self.write(self._step.results(wait=True))

    def write(self, results: Sequence[StepResult]) -> None:
        """Show results, and record those that are due."""
        for result in results:
            due = self.is_due(result.iteration)
            record = self._record_of(result, average=due)
            self._bar.set_postfix_str(record.brief, refresh=False)
            if due:
                # Without a progress bar, the console shows the record.
                level = logging.INFO if self._bar.disable else logging.DEBUG
                logger.log(level, "iteration %d of %d: %s", record.iteration, self._bar.total, record)
                self._writer.log_step(record)
                self._report_outside(record.iteration)
                self._speed.reset()

    def _report_outside(self, iteration: int) -> None:
        count, self._outside = self._step.outside - self._outside, self._step.outside
        if count:
            logger.info("%d batches before iteration %d did not fit in training.buckets", count, iteration + 1)

    def _record_of(self, result: StepResult, *, average: bool) -> Step:
        """Return the record of a training step; with `average`, losses are averaged over the processes."""
        losses, processes = result.losses, self._step.processes
        if average and processes.world > 1:
            means = processes.mean(torch.tensor(list(losses.values())))  # on the CPU: the GPU goes on
            losses = dict(zip(losses, means.tolist(), strict=True))
        return Step(
            iteration=result.iteration,
            losses=losses,
            lr=self.rates.pop(result.iteration),
            gradient_norm=result.gradient_norm,
            images_per_second=self._speed.images_per_second,
            data_share=self._speed.data_share,
            peak_memory=peak_memory(processes.device),
            diagnostics=result.diagnostics,
        )


def _finish_and_save(journal: _Journal, save: Save | None, iteration: int) -> None:
    """Wait for the results of all steps, so that none is missing in a resumed run, and save a checkpoint."""
    journal.finish()
    if save is not None:
        save(iteration)


def _signal_of(stop: StopRequest | None) -> int:
    return 0 if stop is None or stop.signal is None else int(stop.signal)


def _stop_on_signal(number: int, processes: Processes, save: Save, iteration: int) -> None:
    """Save a checkpoint and raise Interrupted if any process received a signal; `number` is the same on all of them."""
    if number:
        save(iteration)
        processes.wait()  # torchrun stops all processes when one exits, so wait for the main one to save
        message = f"stopped after iteration {iteration}, which is saved; resume with --resume"
        raise Interrupted(signal.Signals(number), message)


def _fetch(
    batch_iterator: Iterator[Sequence[Batch]],
    processes: Processes,
    save: Save,
    iteration: int,
    start: int,
    stop: StopRequest | None,
) -> Sequence[Batch]:
    """Return the batches of the next training step, unless the training ends on all processes because of one of them.

    One exchange tells all processes of both: if loading fails on any, save a checkpoint after `iteration` and raise its
    error; and if any received a signal in the step before, save and raise Interrupted.
    """
    batches: Sequence[Batch] = ()
    error: Exception | None = None
    try:
        batches = next(batch_iterator)
    except Exception as caught:  # an unreadable image or a dead worker; the weights are valid
        error = caught
    number = processes.max(_FAILED if error is not None else _signal_of(stop))
    if number != _FAILED:
        _stop_on_signal(number if iteration > start else 0, processes, save, iteration)
        return batches
    if iteration > start:
        save(iteration)
        logger.warning("the state after iteration %d is saved; resume with --resume", iteration)
    processes.wait()
    raise error or InputError("another process could not load its images; see its error message")


_FAILED = 2**15  # in place of the number of a signal, which is smaller


def _is_due(iteration: int, every: int, iterations: int) -> bool:
    return iteration > 0 and (iteration % every == 0 or iteration == iterations)


def _evaluate_once(iteration: int, writer: MetricsWriter, evaluate: Evaluate | None, *, due: bool) -> None:
    """Evaluate and record the result if `due`.

    A recorded evaluation is not repeated. A run that was killed during an evaluation resumes just before it.
    """
    if evaluate is not None and due and writer.last_evaluation != iteration:
        writer.log_evaluation(iteration, evaluate(iteration))


# ---- Progress


class Speedometer:
    """Measures images per second and the fraction of time spent waiting for data, since `reset()`.

    Only `waiting` and `working` blocks count; evaluations and checkpoints do not.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.reset()

    def reset(self) -> None:
        """Reset all counters."""
        self._images, self._waited, self._worked = 0, 0.0, 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of this block as time spent waiting for data."""
        started_at = self._clock()
        yield
        self._waited += self._clock() - started_at

    @contextmanager
    def working(self, *, images: int) -> Iterator[None]:
        """Count the time of this block as processing of `images` images."""
        started_at = self._clock()
        yield
        self._worked += self._clock() - started_at
        self._images += images

    @property
    def images_per_second(self) -> float:
        """Images divided by the total counted time."""
        return self._images / max(self._waited + self._worked, 1e-9)

    @property
    def data_share(self) -> float:
        """Fraction of the total counted time spent waiting for data, 0 to 1."""
        return self._waited / max(self._waited + self._worked, 1e-9)


def _progress_bar(start: int, iterations: int, *, enabled: bool) -> tqdm:
    """Return the progress bar on standard error. It is disabled if standard error is not a terminal."""
    return tqdm(
        initial=start,
        total=iterations,
        disable=None if enabled else True,
        dynamic_ncols=True,
        smoothing=0,  # the mean speed, evaluations included, predicts the remaining time best
        bar_format="{n_fmt}/{total_fmt} {remaining} left{postfix}",
    )


# ---- Signals


class StopRequest:
    """Records SIGINT and SIGTERM inside a `with` block instead of terminating. Works in the main thread only.

    The first signal is stored in `signal`. A second signal has its usual effect, unless `second_signal_kills` is
    False: in distributed training, SLURM and torchrun may both send the signal to each process. Ctrl-C and SLURM also
    signal the data loader workers, which must ignore it, or the next batch never arrives. A signal that the process
    ignores stays ignored: scripts start background jobs with SIGINT ignored.
    """

    def __init__(self, *, second_signal_kills: bool = True) -> None:
        self.signal: signal.Signals | None = None
        self._second_signal_kills = second_signal_kills

    def __enter__(self) -> StopRequest:
        self._previous_handlers = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGINT, signal.SIGTERM)
            if signal.getsignal(number) != signal.SIG_IGN
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore_handlers()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        if self._second_signal_kills:
            self._restore_handlers()
        # Not print(), which is not reentrant: the signal may have interrupted another print().
        hint = "; another stops at once" if self._second_signal_kills else ""
        os.write(2, f"\n{self.signal.name}: finishing this step, then saving{hint}\n".encode())

    def _restore_handlers(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
