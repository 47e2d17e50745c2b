"""Training from plain arguments: model, dataset, transform, optimizer, schedule and numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch.optim import Optimizer

from maskrcnn.data.buckets import BucketsConfig
from maskrcnn.data.dataset import DetectionDataset
from maskrcnn.data.loader import training_loader
from maskrcnn.data.sampling import SamplerConfig, UniformConfig, image_weights
from maskrcnn.data.transforms import Transform
from maskrcnn.engine.checkpoint import TrainingState
from maskrcnn.engine.ema import ExponentialAverage
from maskrcnn.engine.feeding import copied_to
from maskrcnn.engine.graphs import Compile, CudaRecorder, Execution
from maskrcnn.engine.loop import Evaluate, Intervals, Save, StopRequest, train
from maskrcnn.engine.metrics import MetricsWriter, SilentWriter
from maskrcnn.engine.profiler import Profiler
from maskrcnn.engine.schedule import Schedule
from maskrcnn.engine.step import Keep, Precision, TrainingStep, require_precision
from maskrcnn.models.mask_rcnn import MaskRCNN
from maskrcnn.runtime.processes import Exchange, Processes
from maskrcnn.structures import Batch


@dataclass(frozen=True)
class TrainerOptions:
    """Options of a training. The keys of `training` with these names explain them (docs/configuration.md)."""

    seed: int = 0  # of the order of the images, their augmentation and the sampling of RoIs
    sampler: SamplerConfig = field(default_factory=UniformConfig)
    buckets: BucketsConfig | None = None
    compile: Compile = "off"
    cuda_graph: bool = False
    gradient_exchange: Exchange = "fp32"
    workers: int = 0
    grad_accum_steps: int = 1
    precision: Precision = "fp32"
    clip_norm: float | None = None
    skip_non_finite: int = 0
    ema_decay: float | None = None


def constant(iteration: int) -> float:
    """Return 1: the schedule of a constant learning rate."""
    return 1.0


class Trainer:
    """Trains a model on the device of its parameters. It leaves global random generators, signals and logging alone."""

    def __init__(
        self,
        model: MaskRCNN,
        dataset: DetectionDataset,
        transform: Transform,
        *,
        optimizer: Optimizer,
        iterations: int,
        batch_size: int,
        schedule: Schedule = constant,
        options: TrainerOptions = TrainerOptions(),
    ) -> None:
        """Set up the training.

        Args:
            model: the model to train.
            dataset: images with objects.
            transform: maps each example to a transformed one, with a random generator of its own.
            optimizer: updates the parameters of `model`; groups may have an `initial_lr` of their own.
            iterations: number of training steps.
            batch_size: images per training step, over all processes.
            schedule: factor of the learning rate as a function of the iteration, from 0.
            options: see `TrainerOptions`.
        """
        self.model, self.dataset, self.transform = model, dataset, transform
        self.iterations, self.batch_size, self.schedule, self.options = iterations, batch_size, schedule, options
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
        device = next(model.parameters()).device
        self.state = TrainingState(
            model,
            optimizer,
            scaler=torch.amp.GradScaler(device.type, enabled=options.precision == "fp16"),
            average=None if options.ema_decay is None else ExponentialAverage(model, decay=options.ema_decay),
        )

    def fit(
        self,
        *,
        start: int = 0,
        intervals: Intervals | None = None,
        writer: MetricsWriter | None = None,
        save: Save | None = None,
        evaluate: Evaluate | None = None,
        is_over: Callable[[], bool] = lambda: False,
        keep: Keep | None = None,
        stop: StopRequest | None = None,
        profiler: Profiler | None = None,
        processes: Processes | None = None,
    ) -> None:
        """Train from iteration `start` to the end. Without arguments, it trains and shows progress, and no more.

        Args:
            start: number of training steps that are already done.
            processes: the process group; None for a single process.
            keep: see `TrainingStep`.
            intervals, writer, save, evaluate, is_over, stop, profiler: see `maskrcnn.engine.loop.train`.

        Raises:
            InputError: the dataset cannot read an image, the batch size does not fit the number of processes, or the
                device cannot do what the options ask for.
            FloatingPointError: a loss or gradient is not finite.
            Interrupted: `stop` received a signal.
        """
        processes = processes or Processes(next(self.model.parameters()).device)
        train(
            self._step(processes, keep),
            copied_to(processes.device, self._batches(start, processes)),
            self.schedule,
            start=start,
            iterations=self.iterations,
            intervals=intervals or Intervals(),
            writer=writer or SilentWriter(),
            save=save,
            evaluate=evaluate,
            is_over=is_over,
            stop=stop,
            profiler=profiler,
        )

    def _step(self, processes: Processes, keep: Keep | None) -> TrainingStep:
        """Return the training step. Raises InputError if the device cannot do what the options ask for."""
        options, device = self.options, processes.device
        accumulates = options.grad_accum_steps > 1
        execution = Execution(
            options.compile, options.cuda_graph, options.buckets, options.gradient_exchange, accumulates
        )
        require_precision(options.precision, device)
        execution.require_device(device, processes.world)
        execution.require_model(self.model)
        return TrainingStep(
            self.state,
            processes,
            precision=options.precision,
            clip_norm=options.clip_norm,
            skips=options.skip_non_finite,
            keep=keep,
            execution=execution,
            recorder=CudaRecorder(device) if execution.cuda_graph else None,
        )

    def _batches(self, start: int, processes: Processes) -> Iterable[tuple[Batch, ...]]:
        return training_loader(
            self.dataset,
            self.transform,
            batch_size=self.batch_size,
            seed=self.options.seed,
            workers=self.options.workers,
            size_divisor=self.model.size_divisor,
            weights=image_weights(self.options.sampler, self.dataset),
            pin_memory=processes.device.type == "cuda",
            start=start,
            rank=processes.rank,
            world=processes.world,
            grad_accum_steps=self.options.grad_accum_steps,
            buckets=self.options.buckets,
        )
