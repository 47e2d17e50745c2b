"""The configuration of an experiment: model, data, training and evaluation; and what is built from it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from pydantic import Field, PositiveInt, ValidationInfo, field_validator, model_validator

import maskrcnn.data.affine
import maskrcnn.data.coco
import maskrcnn.data.crops
import maskrcnn.data.joined
import maskrcnn.data.mixing
import maskrcnn.data.photometric
import maskrcnn.data.shapes
import maskrcnn.evaluation.lvis  # noqa: F401 (these modules define kinds of datasets, transforms and metrics)
from maskrcnn.config import Section, Size, leaves, read_config, to_dict, validate
from maskrcnn.config.explanation import not_one_of
from maskrcnn.data import traps
from maskrcnn.data.dataset import DatasetConfig, DetectionDataset
from maskrcnn.data.transforms import Compose, HorizontalFlipConfig, ResizeConfig, Transform, TransformConfig
from maskrcnn.engine.checkpoint import Checkpoint, load_weights, require_finite
from maskrcnn.engine.evaluator import Evaluator
from maskrcnn.engine.loop import TrainingConfig
from maskrcnn.engine.pictures import draw_predictions
from maskrcnn.engine.predictor import Predictor
from maskrcnn.errors import InputError
from maskrcnn.evaluation.average_precision import Backend, Evaluation
from maskrcnn.evaluation.metric import COCO_METRICS, MetricConfig
from maskrcnn.interop.agreement import as_overrides
from maskrcnn.interop.conversion import conventions, require_fit
from maskrcnn.interop.files import Weights, read_weights
from maskrcnn.models.mask_rcnn import MaskRCNN, MaskRCNNConfig
from maskrcnn.ops import kernels
from maskrcnn.resume_rules import changes
from maskrcnn.runtime.outputs import output_folder
from maskrcnn.structures import ClassTable
from maskrcnn.visualization.colours import ColourBy

logger = logging.getLogger(__name__)

SUPPORTED_DEVICES = ("cpu", "cuda")


class DataConfig(Section):
    """Datasets and transforms for training and validation."""

    root: Path = Path("datasets/coco")  # for datasets without a root of their own
    train: DatasetConfig
    validation: DatasetConfig
    train_transforms: tuple[TransformConfig, ...] = (HorizontalFlipConfig(), ResizeConfig())
    validation_transforms: tuple[TransformConfig, ...] = (ResizeConfig(),)
    num_classes: PositiveInt | None = None  # comes from the annotations; if given, it must match them

    def build_both(self) -> tuple[DetectionDataset, DetectionDataset]:
        """Return the training and the validation dataset.

        Raises:
            InputError: a dataset is invalid, their classes differ, `num_classes` does not match, or a transform does
                not fit.
        """
        train, validation = self.build_train(), self.build_validation()
        self.require_fit(train, validation)
        return train, validation

    def require_fit(self, train: DetectionDataset, validation: DetectionDataset) -> None:
        """Raise InputError if the datasets do not fit each other, `num_classes` or the transforms; see `build_both`."""
        if self.num_classes is not None and self.num_classes != len(train.classes):
            raise InputError(
                f"data.num_classes is {self.num_classes}, but the annotations have {len(train.classes)} classes: "
                f"{', '.join(train.classes.names)}. Remove the key: the number comes from the annotations"
            )
        require_same_classes(train.classes, validation.classes, "data.train", "data.validation")
        self.build_train_transform(train)  # refuses what does not fit before the run directory is written
        self.build_validation_transform()

    def build_train(self) -> DetectionDataset:
        """Return the training dataset. Raises InputError if it is invalid."""
        return self.train.with_root(self.root).build()

    def build_validation(self) -> DetectionDataset:
        """Return the validation dataset. Raises InputError if it is invalid."""
        return self.validation.with_root(self.root).build()

    def build_train_transform(self, dataset: DetectionDataset) -> Transform:
        """Return the training transforms, composed in their order.

        Args:
            dataset: the training set.

        Raises:
            InputError: a transform does not fit the dataset.
        """
        transform = Compose(())
        for config in self.train_transforms:
            transform = Compose((*transform.steps, config.build_for(dataset, transform)))
        return transform

    def build_validation_transform(self) -> Transform:
        """Return the validation transforms, composed in their order. Raises InputError if one is for training only."""
        return Compose(tuple(transform.build() for transform in self.validation_transforms))


class EvaluationConfig(Section):
    """Settings of the evaluation and of the pictures of predictions."""

    batch_size: Size = 1
    backend: Backend = "faster"
    metrics: tuple[MetricConfig, ...] = ()  # further metrics, beside COCO's
    best_metric: str = Field(  # selects the best checkpoint
        "mask/AP",
        description="a COCO metric or KIND/FIGURE of a further metric; ema/NAME is that of the averaged weights",
        examples=[*COCO_METRICS, *(f"ema/{name}" for name in COCO_METRICS)],
    )
    losses: bool = False  # also compute the losses on the validation set
    pictures: int = Field(12, ge=0, le=2**16)  # number of images to draw after training, ground truth beside prediction
    picture_score: float = 0.5  # detections with a lower score are not drawn
    colour_by: ColourBy = "instance"  # a colour for each object, such that objects that touch differ; or for each class

    @field_validator("metrics")
    @classmethod
    def _check_kinds(cls, metrics: tuple[MetricConfig, ...]) -> tuple[MetricConfig, ...]:
        taken = {"box", "mask", "ema"}
        for metric in metrics:
            if metric.kind in taken:
                raise ValueError(f"the kind '{metric.kind}' is there already; its figures would have the same names")
            taken.add(metric.kind)
        return metrics

    @field_validator("best_metric")
    @classmethod
    def _check_best_metric(cls, name: str, info: ValidationInfo) -> str:
        if "metrics" not in info.data:  # they are invalid, which is a problem of its own
            return name
        others = [f"{metric.kind}/{figure}" for metric in info.data["metrics"] for figure in metric.figures]
        known, metric = [*COCO_METRICS, *others], name.removeprefix("ema/")
        if metric not in known:
            raise ValueError(not_one_of(metric, known))
        return name


class ExperimentConfig(Section):
    """The configuration of one experiment."""

    imports: tuple[str, ...] = ()  # modules with further kinds of parts (`maskrcnn.config.parts`)
    model: MaskRCNNConfig = MaskRCNNConfig()
    data: DataConfig
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _check_best_metric(self) -> ExperimentConfig:
        if self.evaluation.best_metric.startswith("ema/") and self.training.ema_decay is None:
            raise ValueError(
                f"evaluation.best_metric is {self.evaluation.best_metric}, but there are no averaged weights: set "
                "training.ema_decay"
            )
        if self.evaluation.best_metric.removeprefix("ema/").startswith("mask/") and self.model.mask_head is None:
            raise ValueError(
                f"evaluation.best_metric is {self.evaluation.best_metric}, but model.mask_head is null: use box/AP"
            )
        return self

    def predictor(self, model: MaskRCNN, classes: ClassTable) -> Predictor:
        """Return a predictor with the validation transforms and the paste convention."""
        transform, head = self.data.build_validation_transform(), self.model.mask_head
        return Predictor(model, classes, transform, "exact" if head is None else head.paste)

    @property
    def max_detections(self) -> int:
        """The limit on detections per image and class in the evaluation: COCO's, or a higher one of the model."""
        return max(100, self.model.detection.detections_per_image)

    def evaluator(self, dataset: DetectionDataset) -> Evaluator:
        """Return an evaluator of the dataset."""
        return Evaluator(
            dataset,
            batch_size=self.evaluation.batch_size,
            workers=self.training.workers,
            backend=self.evaluation.backend,
            max_detections=self.max_detections,
            metrics={metric.kind: metric.build() for metric in self.evaluation.metrics},
        )


def data_warnings(config: ExperimentConfig, train: DetectionDataset, validation: DetectionDataset) -> list[str]:
    """Return what in the data lets a training end with a low AP, without an error; see `maskrcnn.data.traps`."""
    examples = traps.sample(train)
    transform, rng = config.data.build_validation_transform(), np.random.default_rng(0)
    resized = (transform(example, rng) for example in examples)
    flips = [each for each in config.data.train_transforms if isinstance(each, HorizontalFlipConfig)]
    of_train = [
        *traps.classes_without_example(train),
        *traps.boxes_against_masks(examples),
        *traps.dark_images(train, examples),
        *traps.small_objects(resized, min(map(min, config.model.rpn.anchor_sizes))),
        *(line for each in flips if each.probability > 0 for line in traps.mirrored_classes(train.classes, each.swap)),
    ]
    of_validation = [
        *traps.too_many_objects(validation, config.model.detection.detections_per_image),
        *traps.shared_images(train, validation),
    ]
    data = [*(f"data.train: {line}" for line in of_train), *(f"data.validation: {line}" for line in of_validation)]
    buckets = config.training.buckets
    return data if buckets is None else [*data, *buckets.unused_shapes(train.image_sizes())]


def model_warnings(config: ExperimentConfig) -> list[str]:
    """Return what in the model lets a training that starts without other weights end with a low AP."""
    return list(traps.frozen_random_backbone(config.model.backbone))


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Read the configuration of an experiment; see `maskrcnn.config.read_config`.

    Example: `load_config("shapes/mask_rcnn_r18_fpn", ["model.roi.kind=roi_pool"]).model.build(num_classes=4)`.
    """
    return read_config(path, ExperimentConfig, overrides)


def load(
    weights: Path | str, *, device: str = "auto", average: bool | None = None, overrides: Sequence[str] = ()
) -> Predictor:
    """Load a trained model. The file is enough: it holds the configuration and the classes.

    Weights of another framework are converted (docs/weights.md), with the conventions that they need.

    Args:
        weights: path of a checkpoint, such as `runs/NAME/checkpoints/best.pt`, or of another framework's weights.
        device: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`, ...
        average: whether to use the averaged weights; by default if the run's `evaluation.best_metric` is of them.
        overrides: `a.b.c=VALUE` changes to the stored configuration, such as `model.detection.score_threshold=0.3`.

    Raises:
        InputError: the file is not a checkpoint, has no averaged weights or weights that are not finite, an override is
            invalid or changes the meaning of the weights, or the device does not exist.
    """
    checkpoint = _read(Path(weights))
    config = validate(checkpoint.config, ExperimentConfig, source=str(weights), overrides=overrides)
    return _predictor(config, checkpoint, str(weights), choose_device(device), average=average)


def load_predictor(
    config: ExperimentConfig, weights: Path, device: torch.device, *, average: bool | None = None
) -> Predictor:
    """Return the predictor of a checkpoint with another configuration than the one that it holds.

    Args:
        config: the experiment, whose model must match the checkpoint.
        weights: path of the checkpoint.
        device: where to run the model.
        average: see `load`.

    Raises:
        InputError: the file is not a checkpoint, was trained with another model, or has no averaged weights or weights
            that are not finite.
    """
    return _predictor(config, _read(weights), str(weights), device, average=average)


def _read(weights: Path) -> Checkpoint:
    """Return the weights in a file, and log what was converted."""
    checkpoint, certificate = read_weights(weights)
    if certificate is not None:
        logger.info("%s", certificate.describe())
    return checkpoint


def _predictor(
    config: ExperimentConfig, checkpoint: Checkpoint, source: str, device: torch.device, *, average: bool | None
) -> Predictor:
    if not checkpoint.classes.names:
        raise InputError(f"{source}: it holds a backbone without heads; start a training from it with --init {source}")
    trained = validate(checkpoint.config, ExperimentConfig, source=source)
    if average is None:  # best.pt was selected by this metric
        average = trained.evaluation.best_metric.startswith("ema/")
    if average and not checkpoint.average:
        raise InputError(f"{source}: it holds no averaged weights (training.ema_decay creates them); omit --ema")
    _require_same_model(config.model, trained.model, source)
    model = _runnable(config.model, trained.model, source, device).build(len(checkpoint.classes), pretrained=False)
    state = checkpoint.average if average else checkpoint.model
    require_finite(state, source)
    load_weights(model, state, source=source).require_complete()
    return config.predictor(model.to(device), checkpoint.classes)


def _runnable(model: MaskRCNNConfig, trained: MaskRCNNConfig, source: str, device: torch.device) -> MaskRCNNConfig:
    """Return the model with kernels that run on the device: weights from a GPU can be used elsewhere.

    Raises:
        InputError: the kernels were asked for, and do not come with the weights.
    """
    problem = kernels.obstacle(model.kernels, device)
    if problem and model.kernels == trained.kernels:
        logger.info("%s: %s; auto is used", source, problem)
        return model.model_copy(update={"kernels": "auto"})
    kernels.require(model.kernels, device)
    return model


def _require_same_model(model: MaskRCNNConfig, trained: MaskRCNNConfig, source: str) -> None:
    """Raise InputError if `model` changes a key of the `trained` one that may not change when a run resumes."""
    wanted = {"model": to_dict(trained)}
    refused = changes(wanted, {"model": to_dict(model)}).refused
    if refused:
        lines = "\n  ".join(refused)
        values = leaves(wanted)
        restored = {key: values[key] for line in refused if (key := line.partition(": ")[0]) in values}
        raise InputError(
            f"{source}: the configuration has another model than the weights were trained with:\n  {lines}\nuse the "
            f"configuration that the file holds, without CONFIG, or add {as_overrides(restored)}"
        )


def evaluate_checkpoint(
    config: ExperimentConfig, weights: Path, out: Path, device: torch.device, *, average: bool | None = None
) -> Evaluation:
    """Evaluate a checkpoint on the validation set and write metrics, results and pictures to folder `out`.

    `load` explains `weights` and `average`.

    Raises:
        InputError: the checkpoint does not match the model or the classes of the validation set, or `out` is not a
            folder for output (`outputs.output_folder`).
    """
    dataset = config.data.build_validation()
    predictor = load_predictor(config, weights, device, average=average)
    require_same_classes(predictor.classes, dataset.classes, str(weights), "data.validation")
    settings = config.evaluation
    with output_folder(out):
        evaluation = config.evaluator(dataset)(predictor, out)
        draw_predictions(
            predictor,
            dataset,
            settings.pictures,
            out / "predictions",
            min_score=settings.picture_score,
            colour_by=settings.colour_by,
        )
    return evaluation


def stored_config(weights: Path, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """Return the configuration in a file of weights, with `overrides` applied; see `load`."""
    checkpoint = read_weights(weights).checkpoint
    return validate(checkpoint.config, ExperimentConfig, source=str(weights), overrides=overrides)


def converted(weights: Path, *, class_names: Sequence[str] = (), overrides: Sequence[str] = ()) -> Weights:
    """Return the weights in a file with their resolved configuration, ready to be written.

    Args:
        weights: path of another framework's weights, or of a checkpoint.
        class_names: names of the classes, if the file does not say them.
        overrides: `a.b.c=VALUE` changes to the configuration, for conventions that the file does not say.

    Raises:
        InputError: the file cannot be read or converted, an override is invalid, or needs other tensors.
    """
    checkpoint, certificate = read_weights(weights, class_names=class_names)
    config = validate(checkpoint.config, ExperimentConfig, source=str(weights), overrides=overrides)
    require_fit(checkpoint.model, config.model, len(checkpoint.classes), str(weights))
    resolved = to_dict(config)
    if certificate is not None:
        certificate = replace(certificate, conventions=conventions(resolved))
    return Weights(replace(checkpoint, config=resolved), certificate)


def choose_device(name: str) -> torch.device:
    """Return the device `name`; `auto` is a GPU if there is one, else the CPU.

    Raises:
        InputError: the device does not exist, or is neither a CPU nor a CUDA device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type not in SUPPORTED_DEVICES:
        raise InputError(
            f"--device {name}: only {' and '.join(SUPPORTED_DEVICES)} are supported; other devices of torch lack "
            "operators that this model needs, such as float64 on mps"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs here")
    return device


def require_same_classes(first: ClassTable, second: ClassTable, first_name: str, second_name: str) -> None:
    """Raise InputError, which names both sources, unless the class names are the same in the same order."""
    if first.names != second.names:
        raise InputError(
            f"{first_name} and {second_name} have different classes:\n  {', '.join(first.names)}\n  "
            f"{', '.join(second.names)}"
        )
