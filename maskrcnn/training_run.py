"""One training from its configuration to a run directory."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.optim import Optimizer

from maskrcnn.cli import setup_logging
from maskrcnn.config import to_dict
from maskrcnn.data.loader import DetectionDataset, training_loader
from maskrcnn.errors import InputError
from maskrcnn.experiment import ExperimentConfig
from maskrcnn.inference import Predictor, draw_predictions, evaluate_predictor
from maskrcnn.memory import keep_freed_memory
from maskrcnn.models.mask_rcnn import MaskRCNN
from maskrcnn.run_directory import RunDirectory
from maskrcnn.structures import Batch, ClassTable
from maskrcnn.training.checkpoint import CheckpointFolder, load_checkpoint, load_weights, restore
from maskrcnn.training.loop import train
from maskrcnn.training.metrics import Measurement, MetricsWriter

logger = logging.getLogger(__name__)


# ---- Training


def train_experiment(
    config: ExperimentConfig, out: Path, *, resume: bool, init: Path | None, device: torch.device
) -> None:
    """Train, evaluate, and leave a run directory at `out`.

    Args:
        config: the experiment.
        out: the run directory.
        resume: go on from its last checkpoint.
        init: take weights, and nothing else, from this checkpoint.
        device: where to compute.
    """
    keep_freed_memory()
    run = RunDirectory(out)
    dataset, validation = config.data.build_both()
    run.claim(config, resume=resume)
    setup_logging(run.log)
    run.describe_environment(seed=config.training.seed, device=device)

    model, optimizer, start = _set_up(config, run, dataset.classes, resume=resume, init=init, device=device)
    logger.info("training on %d images, %d classes, with %s", len(dataset), len(dataset.classes), device)

    checkpoints = CheckpointFolder(
        run.checkpoints,
        model=model,
        optimizer=optimizer,
        classes=dataset.classes,
        config=to_dict(config),
        metric=config.evaluation.best_metric,
    )
    predictor = Predictor.of(config, model, dataset.classes, device)

    def evaluate_now(iteration: int) -> Measurement:
        logger.info("evaluating after iteration %d on %d images", iteration, len(validation))
        found, images_per_second = evaluate_predictor(config, predictor, validation, run.evaluation)
        checkpoints.keep_best(iteration, found.summary())
        return Measurement(found.summary(), images_per_second)

    with MetricsWriter(run.root, start=start) as writer:
        train(
            model,
            _training_batches(config, model, dataset, start),
            optimizer,
            config.training.schedule.build(),
            start=start,
            iterations=config.training.schedule.iterations,
            device=device,
            writer=writer,
            save=checkpoints.save,
            evaluate=evaluate_now,
            evaluate_every=config.training.evaluate_every,
            checkpoint_every=config.training.checkpoint_every,
            log_every=config.training.log_every,
            clip_norm=config.training.clip_norm,
            precision=config.training.precision,
        )
    draw_predictions(config, predictor, validation, run.predictions)
    logger.info("%s", run.contents())


def _set_up(
    config: ExperimentConfig,
    run: RunDirectory,
    classes: ClassTable,
    *,
    resume: bool,
    init: Path | None,
    device: torch.device,
) -> tuple[MaskRCNN, Optimizer, int]:
    """The model and its optimizer as training goes on with them, and the iterations that they have behind them."""
    # A run that was stopped before its first checkpoint resumes at its beginning.
    checkpoint = load_checkpoint(run.last) if resume and run.last.exists() else None
    torch.manual_seed(config.training.seed)
    model = config.model.build(len(classes), pretrained=checkpoint is None and init is None).to(device)
    optimizer = config.training.optimizer.build(model, batch_size=config.training.batch_size)
    if init is not None:
        initialize(model, init, classes)
    if checkpoint is None:
        return model, optimizer, 0
    restore(checkpoint, model, optimizer, source=str(run.last))
    logger.info("resuming after iteration %d", checkpoint.iteration)
    return model, optimizer, checkpoint.iteration


def _training_batches(
    config: ExperimentConfig, model: MaskRCNN, dataset: DetectionDataset, start: int
) -> Iterable[Batch]:
    return training_loader(
        dataset,
        config.data.train_transforms.build(),
        batch_size=config.training.batch_size,
        seed=config.training.seed,
        workers=config.training.workers,
        size_divisor=model.size_divisor,
        start=start,
    )


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
