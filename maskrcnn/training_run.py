"""Run a training from its configuration and write the run directory."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from maskrcnn.config import to_dict, validate
from maskrcnn.data.dataset import DetectionDataset
from maskrcnn.data.image_checks import require_files
from maskrcnn.data.loader import Draw, batches_per_epoch, transformed
from maskrcnn.data.traps import evenly_spaced
from maskrcnn.engine.checkpoint import (
    CheckpointFolder,
    TrainingState,
    load_weights,
    restore,
    seed_generators,
)
from maskrcnn.engine.ema import ExponentialAverage
from maskrcnn.engine.evaluator import Evaluator
from maskrcnn.engine.loop import StopRequest
from maskrcnn.engine.metrics import Measurement, MetricsWriter, SilentWriter, read_records
from maskrcnn.engine.optimizer import clip_gradients
from maskrcnn.engine.pictures import draw_predictions, preview_pictures
from maskrcnn.engine.predictor import Predictor
from maskrcnn.engine.profiler import Profiler
from maskrcnn.engine.replay import Replay, save_replay
from maskrcnn.engine.schedule import ScheduleConfig
from maskrcnn.engine.step import Keep, Precision, TrainingStep, require_precision
from maskrcnn.engine.trainer import Trainer, TrainerOptions
from maskrcnn.errors import InputError
from maskrcnn.experiment import ExperimentConfig, data_warnings, model_warnings
from maskrcnn.interop.agreement import require_same_meaning
from maskrcnn.interop.files import read_weights
from maskrcnn.models.mask_rcnn import MaskRCNN, MaskRCNNConfig
from maskrcnn.ops import kernels
from maskrcnn.run_directory import RunDirectory
from maskrcnn.runtime.console import setup_logging
from maskrcnn.runtime.processes import Processes
from maskrcnn.structures import Batch, ClassTable, Losses

logger = logging.getLogger(__name__)

EXAMINED = 16  # training images that are compared with the buckets


# ---- Training


def train_experiment(
    config: ExperimentConfig, out: Path, *, resume: bool, init: Path | None, processes: Processes
) -> None:
    """Train and evaluate a model and write the run directory `out`.

    Args:
        config: the experiment.
        out: the run directory, written by the main process.
        resume: resume from the last checkpoint of the run directory.
        init: file to load the initial weights from, of this project or another framework; no other state is loaded.
        processes: the process group. Every process calls this function.

    Raises:
        InputError: the configuration, the data, the run directory or a checkpoint is invalid, the device cannot do what
            the configuration asks for, or another process writes to the run directory.
        Interrupted: after SIGINT or SIGTERM, with the state saved.
    """
    kernels.require(config.model.kernels, processes.device, deterministic=config.training.deterministic)
    if config.training.deterministic:
        make_deterministic()
    use_fast_kernels(cudnn_benchmark=config.training.cudnn_benchmark, tf32=config.training.tf32)
    require_precision(config.training.precision, processes.device)
    config.training.execution.require_device(processes.device, processes.world)
    run = RunDirectory(out)
    dataset, validation = config.data.build_both()
    if processes.is_main:
        require_files(dataset, "data.train")
        require_files(validation, "data.validation")
    _check_buckets(config, dataset)
    with run.lock(config, resume=resume) if processes.is_main else nullcontext():
        _train(config, run, dataset, validation, resume=resume, init=init, processes=processes)


def _train(
    config: ExperimentConfig,
    run: RunDirectory,
    dataset: DetectionDataset,
    validation: DetectionDataset,
    *,
    resume: bool,
    init: Path | None,
    processes: Processes,
) -> None:
    """Train, evaluate and write the run directory, which the main process has locked."""
    schedule = config.training.schedule.resolve(batches_per_epoch(len(dataset), config.training.batch_size))
    if processes.is_main:
        _claim(run, config, resume=resume, device=processes.device, data={"train": dataset, "validation": validation})
        from_scratch = init is None and not (resume and run.last.exists())
        for warning in (
            *(model_warnings(config) if from_scratch else ()),
            *data_warnings(config, dataset, validation),
        ):
            logger.warning("%s", warning)
    processes.wait()

    trainer, start = _set_up(config, run, dataset, schedule, resume=resume, init=init, processes=processes)
    logger.info("training on %d images, %d classes, with %s", len(dataset), len(dataset.classes), processes)
    checkpoints = CheckpointFolder(
        run.checkpoints,
        state=trainer.state,
        classes=dataset.classes,
        config=to_dict(config),
        metric=config.evaluation.best_metric,
        keep=config.training.keep_checkpoints,
    )
    predictor = config.predictor(trainer.model, validation.classes)
    evaluator = _Evaluations(config, run, predictor, trainer.state.average, validation, processes, checkpoints)
    with run.explaining_full_disks(), ExitStack() as stack:
        metrics = partial(MetricsWriter, run.root, start=start, loggers=config.training.loggers)
        writer = stack.enter_context(metrics() if processes.is_main else SilentWriter())
        writer.last_evaluation = processes.broadcast(writer.last_evaluation)
        writer.log_config(config)
        use_profiler = config.training.profile and processes.is_main
        trainer.fit(
            start=start,
            intervals=config.training.intervals,
            writer=writer,
            save=checkpoints.save if processes.is_main else None,
            evaluate=evaluator,
            is_over=evaluator.is_over,
            keep=_keeper(config, run, trainer.model, dataset.classes, processes),
            stop=stack.enter_context(StopRequest(second_signal_kills=processes.world == 1)),
            profiler=stack.enter_context(Profiler(run.root)) if use_profiler else None,
            processes=processes,
        )
    if processes.is_main:
        evaluator.draw(run.predictions)
        logger.info("%s", run.contents())


def _check_buckets(config: ExperimentConfig, dataset: DetectionDataset) -> None:
    """Raise InputError if no image fits in `training.buckets`."""
    if config.training.buckets is not None:
        transform = config.data.build_train_transform(dataset)
        draws = (Draw(index, seed=index) for index in evenly_spaced(len(dataset), EXAMINED))
        config.training.buckets.require_fit(transformed(dataset, transform, draws))


def _claim(
    run: RunDirectory,
    config: ExperimentConfig,
    *,
    resume: bool,
    device: torch.device,
    data: Mapping[str, DetectionDataset],
) -> None:
    """Claim the run directory, start its log, and describe the environment."""
    changes = run.claim(config, resume=resume)
    setup_logging(run.log)
    if changes:
        logger.warning("%s resumes with a changed configuration:\n%s", run.root, changes)
    run.describe_environment(seed=config.training.seed, device=device, data=data)


def _set_up(
    config: ExperimentConfig,
    run: RunDirectory,
    dataset: DetectionDataset,
    schedule: ScheduleConfig,
    *,
    resume: bool,
    init: Path | None,
    processes: Processes,
) -> tuple[Trainer, int]:
    """Return the trainer, and the number of finished training steps."""
    # A run that was stopped before its first checkpoint resumes from iteration 0.
    checkpoint = run.last_checkpoint() if resume else None
    start = checkpoint.iteration if checkpoint else 0
    if processes.any(start != processes.broadcast(start)):
        raise InputError(
            f"{run.root}: the processes read different checkpoints; the folder must be on a shared file system"
        )
    settings = config.training
    seed_generators(settings.seed)
    model = config.model.build(len(dataset.classes), pretrained=checkpoint is None and init is None)
    model = model.to(processes.device)
    if init is not None:
        initialize(model, config.model, init, dataset.classes)
    trainer = Trainer(
        model,
        dataset,
        config.data.build_train_transform(dataset),
        optimizer=settings.optimizer.build(model, batch_size=settings.batch_size),
        schedule=schedule.build(),
        iterations=schedule.num_iterations,
        batch_size=settings.batch_size,
        options=TrainerOptions(**{field.name: getattr(settings, field.name) for field in fields(TrainerOptions)}),
    )
    if checkpoint is not None:
        restore(checkpoint, trainer.state, source=str(run.last))
        logger.info("resuming after iteration %d", start)
    return trainer, start


def _keeper(
    config: ExperimentConfig, run: RunDirectory, model: MaskRCNN, classes: ClassTable, processes: Processes
) -> Keep:
    """Return the function that stores a training step that is not finite."""

    def keep(iteration: int, batches: Sequence[Batch]) -> Path:
        path = run.root / "replay" / f"iteration_{iteration:08d}_process_{processes.rank}.pt"
        return save_replay(path, model, batches, iteration=iteration, classes=classes, config=to_dict(config))

    return keep


class _Evaluations:
    """Evaluates the model and its averaged weights, if any. The images are divided among the processes."""

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
        self._evaluator: Evaluator = config.evaluator(validation)
        self._config, self._run, self._average = config, run, average
        self._processes, self._checkpoints = processes, checkpoints

    def __call__(self, iteration: int) -> Measurement:
        """Evaluate the model after `iteration` training steps and update `best.pt`."""
        dataset, settings = self._evaluator.dataset, self._config.evaluation
        logger.info("evaluating after iteration %d on %d images", iteration, len(dataset))
        measurement = self._measure(self._run.evaluation)
        if settings.losses:
            measurement = measurement._replace(losses=self._evaluator.losses(self._predictor, self._processes))
        if self._average is not None:
            with self._average.applied():
                measurement = measurement.with_average(self._measure(self._run.evaluation / "average"))
        if self._processes.is_main:
            self._checkpoints.keep_best(iteration, measurement.metrics)
            pictures = preview_pictures(
                self._predictor,
                dataset,
                settings.pictures,
                min_score=settings.picture_score,
                colour_by=settings.colour_by,
            )
            measurement = measurement._replace(pictures=pictures)
        return measurement

    def draw(self, out: Path) -> None:
        """Draw ground truth beside prediction to folder `out`."""
        settings = self._config.evaluation
        draw_predictions(
            self._predictor,
            self._evaluator.dataset,
            settings.pictures,
            out,
            min_score=settings.picture_score,
            colour_by=settings.colour_by,
        )

    def is_over(self) -> bool:
        """Return True after `patience` evaluations without improvement."""
        patience = self._config.training.patience
        if patience is None:
            return False
        return self._processes.broadcast(self._processes.is_main and self._evaluations_since_best() >= patience)

    def _evaluations_since_best(self) -> int:
        best_iteration = self._checkpoints.best_iteration
        records = read_records(self._run.metrics)
        return sum(record["kind"] == "evaluation" and record["iteration"] > best_iteration for record in records)

    def _measure(self, out: Path) -> Measurement:
        evaluation, images_per_second = self._evaluator.timed(self._predictor, out, self._processes)
        return Measurement(evaluation.summary(), images_per_second, evaluation.class_summary())


class Repeated(NamedTuple):
    """The losses and gradients of a replayed training step. The weights are not updated."""

    losses: dict[str, float]
    gradient_norm: float
    broken: dict[str, float]  # fraction of gradient elements that are not finite, for each parameter that has any

    @property
    def finite(self) -> bool:
        """Whether all losses and gradients are finite."""
        return not self.broken and all(map(math.isfinite, (*self.losses.values(), self.gradient_norm)))


def repeat_step(replay: Replay, source: str, device: torch.device, *, precision: Precision | None = None) -> Repeated:
    """Compute the losses and gradients of a stored training step again.

    Args:
        replay: the stored step.
        source: name of the file in error messages.
        device: where to compute.
        precision: autocast precision; None uses that of the run.

    Raises:
        InputError: the stored weights do not match the model of the stored configuration.
    """
    config = validate(replay.config, ExperimentConfig, source=source)
    model = config.model.build(len(replay.classes), pretrained=False).to(device)
    load_weights(model, replay.model, source=source).require_complete()
    optimizer = config.training.optimizer.build(model, batch_size=config.training.batch_size)
    state = TrainingState(model, optimizer)
    step = TrainingStep(state, Processes(device), precision=precision or config.training.precision)
    losses = step.gradients(replay.batches)[0].tolist()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    non_finite = {name: 1 - gradient.isfinite().float().mean().item() for name, gradient in gradients.items()}
    return Repeated(
        dict(zip(Losses._fields, losses, strict=True)),
        float(clip_gradients(optimizer, None)),
        {name: fraction for name, fraction in non_finite.items() if fraction > 0},
    )


def make_deterministic() -> None:
    """Make torch use deterministic algorithms and raise an error where there are none.

    docs/reliability.md describes the limits.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def use_fast_kernels(*, cudnn_benchmark: bool, tf32: bool) -> None:
    """Let cuDNN measure its kernels for each shape of a convolution, and compute float32 products in TF32 on a GPU.

    False leaves torch as it is, which uses TF32 in convolutions, but not in other products.
    """
    if cudnn_benchmark:
        torch.backends.cudnn.benchmark = True
    if tf32:
        torch.set_float32_matmul_precision("high")


def initialize(model: MaskRCNN, config: MaskRCNNConfig, weights: Path, classes: ClassTable) -> None:
    """Load the matching weights of a checkpoint, class-specific rows by class name, and log what was loaded.

    Heads may differ, as for another task, but at least half of the backbone's values must fit: with fewer, the training
    would start nearly at random.

    Args:
        model: the model to load into.
        config: its configuration, which must give the weights the meaning that they have in the file.
        weights: path of a checkpoint, or of another framework's weights.
        classes: class table of the model.

    Raises:
        InputError: the file holds no known weights, contradicts `config`, or fewer than half of the backbone's values
            fit, or nothing.
    """
    checkpoint, certificate = read_weights(weights)
    if certificate is not None:
        logger.info("%s", certificate.describe())
    trained = validate(checkpoint.config, ExperimentConfig, source=str(weights)).model
    require_same_meaning(config, trained, str(weights))
    report = load_weights(
        model, checkpoint.model, source=str(weights), source_classes=checkpoint.classes, classes=classes
    )
    sizes = {name: tensor.numel() for name, tensor in model.backbone.state_dict(prefix="backbone.").items()}
    loaded, total = sum(sizes.get(name, 0) for name in report.loaded), sum(sizes.values())
    if 2 * loaded < total or not report.loaded:
        raise InputError(
            f"{weights}: only {loaded} of the {total} values of the backbone fit the model; --init needs at least half"
            f"\n{report.describe()}"
        )
    logger.info("%s", report.describe())
