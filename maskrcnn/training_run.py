"""One training from its configuration to a run directory."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch

from maskrcnn.cli import setup_logging
from maskrcnn.config import to_dict
from maskrcnn.data.loader import DetectionDataset, batches_per_epoch, training_loader
from maskrcnn.errors import InputError
from maskrcnn.experiment import ExperimentConfig
from maskrcnn.inference import (
    Predictor,
    draw_predictions,
    evaluate_predictor,
    preview_pictures,
    validation_losses,
)
from maskrcnn.memory import keep_freed_memory
from maskrcnn.models.mask_rcnn import MaskRCNN
from maskrcnn.run_directory import RunDirectory
from maskrcnn.structures import Batch, ClassTable, Losses
from maskrcnn.training.checkpoint import (
    CheckpointFolder,
    TrainingState,
    load_checkpoint,
    load_weights,
    restore,
    seed_generators,
)
from maskrcnn.training.distributed import Processes
from maskrcnn.training.ema import ExponentialAverage
from maskrcnn.training.loop import Intervals, train
from maskrcnn.training.metrics import Measurement, MetricsWriter, SilentWriter, read_records
from maskrcnn.training.optimizer import clip_gradients
from maskrcnn.training.profiler import Profiler
from maskrcnn.training.replay import Replay, save_replay
from maskrcnn.training.step import Precision, TrainingStep

logger = logging.getLogger(__name__)


# ---- Training


def train_experiment(
    config: ExperimentConfig, out: Path, *, resume: bool, init: Path | None, processes: Processes
) -> None:
    """Train, evaluate, and leave a run directory at `out`.

    Args:
        config: the experiment.
        out: the run directory, written by the main process.
        resume: go on from its last checkpoint.
        init: take weights, and nothing else, from this checkpoint.
        processes: which train together; each calls this function.
    """
    keep_freed_memory()
    if config.training.deterministic:
        make_deterministic()
    run = RunDirectory(out)
    dataset, validation = config.data.build_both()
    schedule = config.training.schedule.resolve(batches_per_epoch(len(dataset), config.training.batch_size))
    if processes.is_main:
        _open(run, config, resume=resume, device=processes.device)
    processes.wait()

    model, state, start = _set_up(config, run, dataset.classes, resume=resume, init=init, processes=processes)
    where = (
        f"{processes.world} processes, this one with {processes.device}" if processes.world > 1 else processes.device
    )
    logger.info("training on %d images, %d classes, with %s", len(dataset), len(dataset.classes), where)
    checkpoints = CheckpointFolder(
        run.checkpoints,
        state=state,
        classes=dataset.classes,
        config=to_dict(config),
        metric=config.evaluation.best_metric,
        keep=config.training.keep_checkpoints,
    )
    predictor = Predictor.of(config, model, validation.classes, processes.device)
    evaluator = _Evaluator(config, run, predictor, state.average, validation, processes, checkpoints)
    with run.explaining_full_disks(), ExitStack() as stack:
        writer = stack.enter_context(MetricsWriter(run.root, start=start) if processes.is_main else SilentWriter())
        writer.last_evaluation = processes.broadcast(writer.last_evaluation)
        writer.log_config(config)
        profiled = config.training.profile and processes.is_main
        train(
            _step(config, run, state, dataset.classes, processes),
            _training_batches(config, model, dataset, start, processes),
            schedule.build(),
            start=start,
            iterations=schedule.num_iterations,
            intervals=Intervals(
                config.training.evaluate_every, config.training.checkpoint_every, config.training.log_every
            ),
            writer=writer,
            save=checkpoints.save if processes.is_main else _leave_it_to_the_main_process,
            evaluate=evaluator,
            is_over=evaluator.is_over,
            profiler=stack.enter_context(Profiler(run.root)) if profiled else None,
        )
    if processes.is_main:
        draw_predictions(config, predictor, validation, run.predictions)
        logger.info("%s", run.contents())


def _open(run: RunDirectory, config: ExperimentConfig, *, resume: bool, device: torch.device) -> None:
    """Make the folder this run's, and say in it what begins."""
    changed = run.claim(config, resume=resume)
    setup_logging(run.log)
    if changed:
        logger.warning("%s goes on under another configuration than before:\n%s", run.root, changed)
    run.describe_environment(seed=config.training.seed, device=device)


def _set_up(
    config: ExperimentConfig,
    run: RunDirectory,
    classes: ClassTable,
    *,
    resume: bool,
    init: Path | None,
    processes: Processes,
) -> tuple[MaskRCNN, TrainingState, int]:
    """What training starts from, or goes on from, and the iterations that it has behind it."""
    # A run that was stopped before its first checkpoint resumes at its beginning.
    checkpoint = run.last_checkpoint() if resume else None
    start = checkpoint.iteration if checkpoint else 0
    if processes.any(start != processes.broadcast(start)):
        raise InputError(f"{run.root}: the processes read different checkpoints; all must see this folder")
    device = processes.device
    seed_generators(config.training.seed)
    model = config.model.build(len(classes), pretrained=checkpoint is None and init is None).to(device)
    if init is not None:
        initialize(model, init, classes)
    if config.training.compile:
        model.compile_dense()
    decay = config.training.ema_decay
    state = TrainingState(
        model,
        config.training.optimizer.build(model, batch_size=config.training.batch_size),
        scaler=torch.amp.GradScaler(device.type, enabled=config.training.precision == "fp16"),
        average=None if decay is None else ExponentialAverage(model, decay=decay),
    )
    if checkpoint is not None:
        restore(checkpoint, state, source=str(run.last))
        logger.info("resuming after iteration %d", start)
    return model, state, start


def _leave_it_to_the_main_process(iteration: int) -> None:
    """What other processes do in place of saving: they have nothing that the main one lacks."""


def _step(
    config: ExperimentConfig, run: RunDirectory, state: TrainingState, classes: ClassTable, processes: Processes
) -> TrainingStep:
    def keep(iteration: int, batches: Sequence[Batch]) -> Path:
        path = run.root / "replay" / f"iteration_{iteration:08d}_process_{processes.rank}.pt"
        return save_replay(path, state.model, batches, iteration=iteration, classes=classes, config=to_dict(config))

    return TrainingStep(
        state,
        processes,
        precision=config.training.precision,
        clip_norm=config.training.clip_norm,
        skips=config.training.skip_non_finite,
        keep=keep,
    )


def _training_batches(
    config: ExperimentConfig, model: MaskRCNN, dataset: DetectionDataset, start: int, processes: Processes
) -> Iterable[tuple[Batch, ...]]:
    return training_loader(
        dataset,
        config.data.train_transforms.build(),
        batch_size=config.training.batch_size,
        seed=config.training.seed,
        workers=config.training.workers,
        size_divisor=model.size_divisor,
        start=start,
        rank=processes.rank,
        world=processes.world,
        grad_accum_steps=config.training.grad_accum_steps,
    )


class _Evaluator:
    """Measures the model, and the average of its weights if there is one; the processes share the images."""

    def __init__(
        self,
        config: ExperimentConfig,
        run: RunDirectory,
        predictor: Predictor,
        average: ExponentialAverage | None,
        validation: DetectionDataset,
        processes: Processes,
        checkpoints: CheckpointFolder,
    ) -> None:
        self._predictor = predictor
        self._config, self._run, self._average = config, run, average
        self._validation, self._processes, self._checkpoints = validation, processes, checkpoints

    def __call__(self, iteration: int) -> Measurement:
        """Evaluate after `iteration` steps."""
        logger.info("evaluating after iteration %d on %d images", iteration, len(self._validation))
        found = self._measure(self._run.evaluation)
        if self._config.evaluation.losses:
            losses = validation_losses(self._config, self._predictor, self._validation, self._processes)
            found = found._replace(losses=losses)
        if self._average is not None:
            with self._average.applied():
                found = found.with_average(self._measure(self._run.evaluation / "average"))
        if self._processes.is_main:
            self._checkpoints.keep_best(iteration, found.metrics)
            pictures = preview_pictures(self._config, self._predictor, self._validation)
            found = found._replace(pictures=pictures)
        return found

    def is_over(self) -> bool:
        """Whether as many evaluations as there is patience for were no better than the best before them."""
        patience = self._config.training.patience
        if patience is None:
            return False
        return self._processes.broadcast(self._processes.is_main and self._since_best() >= patience)

    def _since_best(self) -> int:
        best = self._checkpoints.best_iteration
        records = read_records(self._run.metrics)
        return sum(record["kind"] == "evaluation" and record["iteration"] > best for record in records)

    def _measure(self, out: Path) -> Measurement:
        found, images_per_second = evaluate_predictor(
            self._config, self._predictor, self._validation, out, self._processes
        )
        return Measurement(found.summary(), images_per_second, found.class_summary())


class Repeated(NamedTuple):
    """A step that was computed again, without taking it."""

    losses: dict[str, float]
    gradient_norm: float
    broken: dict[str, float]  # parameters with numbers in their gradient that are not finite, and the share of these

    @property
    def finite(self) -> bool:
        """Whether the step could be taken."""
        return not self.broken and all(map(math.isfinite, (*self.losses.values(), self.gradient_norm)))


def repeat_step(replay: Replay, source: str, device: torch.device, *, precision: Precision | None = None) -> Repeated:
    """Compute the losses and gradients of a stored step; `precision` is the run's unless given.

    Raises InputError, which names `source`, where the stored weights are not of the stored configuration's model.
    """
    config = ExperimentConfig.model_validate_json(json.dumps(replay.config))
    model = config.model.build(len(replay.classes), pretrained=False).to(device)
    load_weights(model, replay.model, source=source).require_complete()
    optimizer = config.training.optimizer.build(model, batch_size=config.training.batch_size)
    state = TrainingState(model, optimizer)
    step = TrainingStep(state, Processes(device), precision=precision or config.training.precision)
    losses = [float(term) for term in step.gradients(replay.batches)]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    broken = {name: 1 - gradient.isfinite().float().mean().item() for name, gradient in gradients.items()}
    return Repeated(
        dict(zip(Losses._fields, losses, strict=True)),
        float(clip_gradients(optimizer, None)),
        {name: share for name, share in broken.items() if share > 0},
    )


def make_deterministic() -> None:
    """Let torch refuse operations whose result may differ from run to run (docs/reliability.md has the limits)."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def initialize(model: MaskRCNN, weights: Path, classes: ClassTable) -> None:
    """Take what fits from a checkpoint; class rows go by class name, and the log tells what was kept.

    Raises:
        InputError: it is no checkpoint, or nothing of it fits.
    """
    checkpoint = load_checkpoint(weights)
    report = load_weights(
        model, checkpoint.model, source=str(weights), source_classes=checkpoint.classes, classes=classes
    )
    if not report.loaded:
        raise InputError(f"{weights}: nothing in it fits the model\n{report.describe()}")
    logger.info("%s", report.describe())
