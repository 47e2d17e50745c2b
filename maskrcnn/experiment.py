"""The whole YAML as one typed object."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, PositiveInt, model_validator

from maskrcnn.config import Section
from maskrcnn.data import DatasetConfig
from maskrcnn.data.coco import CocoConfig
from maskrcnn.data.loader import DetectionDataset
from maskrcnn.data.shapes import ShapesConfig
from maskrcnn.data.transforms import TransformsConfig
from maskrcnn.errors import InputError
from maskrcnn.evaluation.average_precision import Backend
from maskrcnn.models.mask_rcnn import MaskRCNNConfig
from maskrcnn.structures import ClassTable
from maskrcnn.training.loop import TrainingConfig

Metric = Literal["box/AP", "box/AP50", "box/AP75", "mask/AP", "mask/AP50", "mask/AP75"]
# fmt: off
AnyMetric = Literal[  # ema/: of the averaged weights
    "box/AP", "box/AP50", "box/AP75", "mask/AP", "mask/AP50", "mask/AP75",
    "ema/box/AP", "ema/box/AP50", "ema/box/AP75", "ema/mask/AP", "ema/mask/AP50", "ema/mask/AP75",
]
# fmt: on


class DataConfig(Section):
    """What to learn from, and what to measure on."""

    root: Path = Path("datasets/coco")  # of the datasets that do not name their own
    train: DatasetConfig
    validation: DatasetConfig
    train_transforms: TransformsConfig = TransformsConfig()
    validation_transforms: TransformsConfig = TransformsConfig(flip=0)
    num_classes: PositiveInt | None = None  # comes from the annotations; where it is stated, they must agree

    def build_both(self) -> tuple[DetectionDataset, DetectionDataset]:
        """The datasets to train on and to validate on; InputError if they are unusable or their classes differ."""
        train, validation = self.build_train(), self.build_validation()
        if self.num_classes is not None and self.num_classes != len(train.classes):
            raise InputError(
                f"data.num_classes is {self.num_classes}, but the annotations have {len(train.classes)} classes: "
                f"{', '.join(train.classes.names)}. Leave the key away: the number comes from the annotations"
            )
        require_same_classes(train.classes, validation.classes, "data.train", "data.validation")
        return train, validation

    def build_train(self) -> DetectionDataset:
        """The dataset to train on; InputError if it is unusable."""
        return self._rooted(self.train).build()

    def build_validation(self) -> DetectionDataset:
        """The dataset to validate on; InputError if it is unusable."""
        return self._rooted(self.validation).build()

    def _rooted(self, part: CocoConfig | ShapesConfig) -> CocoConfig | ShapesConfig:
        if isinstance(part, CocoConfig) and part.root is None:
            return part.model_copy(update={"root": self.root})
        return part


class EvaluationConfig(Section):
    """How to measure COCO's box and mask AP, and what to draw."""

    batch_size: PositiveInt = 1
    backend: Backend = "faster"
    best_metric: AnyMetric = "mask/AP"  # by which the best checkpoint is chosen
    losses: bool = False  # compute the losses on the validation set, too
    pictures: int = Field(12, ge=0)  # images to draw after training, ground truth beside prediction
    picture_score: float = 0.5  # detections below it are not drawn


class ExperimentConfig(Section):
    """One experiment."""

    model: MaskRCNNConfig = MaskRCNNConfig()
    data: DataConfig
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _the_average_exists(self) -> ExperimentConfig:
        if self.evaluation.best_metric.startswith("ema/") and self.training.ema_decay is None:
            raise ValueError(
                f"evaluation.best_metric is {self.evaluation.best_metric}, but there are no averaged weights: set "
                "training.ema_decay"
            )
        return self


def choose_device(name: str) -> torch.device:
    """`auto` takes a GPU if there is one. Raises InputError for a device that torch does not have here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type != "cuda":  # of several processes, each would take memory of the first GPU
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs here")
    return device


def require_same_classes(first: ClassTable, second: ClassTable, first_name: str, second_name: str) -> None:
    """Raise InputError, which names both sides, unless the classes are the same in the same order."""
    if first.names != second.names:
        raise InputError(
            f"{first_name} and {second_name} have different classes:\n  {', '.join(first.names)}\n  "
            f"{', '.join(second.names)}"
        )
