"""One small part for each extension point.

A part is a config class with a `kind` of its own, and the object that its `build` returns. It need not be registered:
a subclass of the extension point's base class is one of the choices.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pycocotools import mask as cocoapi
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from maskrcnn.data.dataset import DatasetConfig, DetectionDataset
from maskrcnn.data.sampling import SamplerConfig
from maskrcnn.data.transforms import TransformConfig, crop
from maskrcnn.engine.loggers import Logger, LoggerConfig
from maskrcnn.engine.optimizer import OptimizerConfig, scaled_lr
from maskrcnn.engine.schedule import Schedule, ScheduleConfig
from maskrcnn.evaluation.metric import Metric, MetricConfig
from maskrcnn.models.backbones.parts import Backbone, BackboneConfig
from maskrcnn.models.box_head import BoxHeadConfig, BoxTrunk
from maskrcnn.models.mask_head import MaskHead, MaskHeadConfig
from maskrcnn.models.necks.parts import Neck, NeckConfig
from maskrcnn.ops.roi import RoILayer, RoILayerConfig
from maskrcnn.structures import ClassTable, Example, MaskCrop

# ---- Backbone: four convolutions, one feature map at stride 16


class PlainConfig(BackboneConfig):
    """Four convolutions with stride 2."""

    kind: Literal["plain"] = "plain"
    width: PositiveInt = 32

    @property
    def strides(self) -> tuple[int, ...]:
        """One feature map at stride 16."""
        return (16,)

    def build(self) -> Plain:
        """Return the backbone."""
        return Plain(self.width)


class Plain(Backbone):
    """Maps `(B, 3, H, W)` to one map `(B, width, H / 16, W / 16)`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width if n else 3, width, 3, stride=2, padding=1) for n in range(4))
        self.channels, self.strides = (width,), (16,)

    def stages(self) -> list[nn.Module]:
        """Each convolution is a stage."""
        return list(self.convs)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Return the feature map."""
        for conv in self.convs:
            pixels = conv(pixels).relu()
        return (pixels,)


# ---- Neck: fewer or more channels


class ProjectionConfig(NeckConfig):
    """A 1 x 1 convolution of each feature map."""

    kind: Literal["projection"] = "projection"
    channels: PositiveInt = 16

    def out_strides(self, strides: Sequence[int]) -> tuple[int, ...]:
        """The maps keep their size."""
        return tuple(strides)

    def build(self, *, channels: Sequence[int], strides: Sequence[int]) -> Projection:
        """Return the neck."""
        return Projection(channels, strides, channels=self.channels)


class Projection(Neck):
    """Maps `(B, C_i, H, W)` to `(B, channels, H, W)`."""

    def __init__(self, in_channels: Sequence[int], strides: Sequence[int], *, channels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(inputs, channels, 1) for inputs in in_channels)
        self.channels, self.strides, self.roi_levels = channels, tuple(strides), len(strides)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the projected maps."""
        return tuple(conv(level) for conv, level in zip(self.convs, features, strict=True))


# ---- RoI layer: the value of one cell per bin


class NearestConfig(RoILayerConfig):
    """Reads the cell in which the centre of a bin lies."""

    kind: Literal["nearest"] = "nearest"

    def build(self) -> RoILayer:
        """Return the layer."""
        return roi_nearest


def roi_nearest(features: Tensor, boxes: Tensor, images: Tensor, *, stride: float, size: int) -> Tensor:
    """Return `(N, C, size, size)` for N boxes; see `maskrcnn.ops.roi.RoILayer`."""
    height, width = features.shape[-2:]
    steps = (torch.arange(size, device=boxes.device) + 0.5) / size
    x1, y1, x2, y2 = (boxes / stride).unsqueeze(-1).unbind(1)  # each (N, 1)
    columns = (x1 + (x2 - x1) * steps).long().clamp(0, width - 1)
    rows = (y1 + (y2 - y1) * steps).long().clamp(0, height - 1)
    return features.permute(0, 2, 3, 1)[images[:, None, None], rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


# ---- Box head: the maximum over the region


class MaximumConfig(BoxHeadConfig):
    """Global max pooling."""

    kind: Literal["maximum"] = "maximum"

    def build(self, *, channels: int, side: int) -> BoxTrunk:
        """Return the trunk."""
        return Maximum(channels)


class Maximum(BoxTrunk):
    """`(N, C, S, S) -> (N, C)`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.features = channels

    def forward(self, regions: Tensor) -> Tensor:
        """Return the largest value of each channel."""
        return regions.amax(dim=(2, 3))


# ---- Mask head: one linear layer per cell


class LinearConfig(MaskHeadConfig):
    """Mask logits from the features of the cell, without hidden layers."""

    kind: Literal["linear"] = "linear"

    def build(self, *, channels: int, side: int, num_classes: int) -> MaskHead:
        """Return the head; its masks have the side of the regions."""
        return LinearMaskHead(
            channels,
            mask_size=side,
            num_classes=num_classes,
            output=self.output,
            class_agnostic=self.class_agnostic,
        )


class LinearMaskHead(MaskHead):
    """A 1 x 1 convolution."""

    def __init__(self, inputs: int, **settings: Any) -> None:
        super().__init__(**settings)
        self.logits = nn.Conv2d(inputs, self.channels, 1)

    def all_masks(self, regions: Tensor) -> Tensor:
        """`(N, C, S, S) -> (N, L, S, S)`."""
        return self.logits(regions)


# ---- Dataset: bright squares on noise


class SquaresConfig(DatasetConfig):
    """Images of 64 x 64 px with one square each."""

    kind: Literal["squares"] = "squares"
    length: PositiveInt = 8

    def build(self) -> Squares:
        """Return the dataset."""
        return Squares(self.length)


class Squares:
    """A `DetectionDataset` of generated images."""

    classes = ClassTable(names=("square",), category_ids=(1,))

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def image_id(self, index: int) -> int:
        """Count images from 1."""
        return index + 1

    def labels(self, index: int) -> np.ndarray:
        """Each image has one square."""
        return np.ones(1, np.int64)

    def image_sizes(self) -> np.ndarray:
        """All images have the same size."""
        return np.full((self.length, 2), 64)

    def __getitem__(self, index: int) -> Example:
        rng = np.random.default_rng(index)
        x, y, side = (int(rng.integers(low, high)) for low, high in ((4, 24), (4, 24), (12, 32)))
        pixels = rng.integers(0, 80, (3, 64, 64), dtype=np.uint8)
        pixels[:, y : y + side, x : x + side] = 220
        return Example(
            image_id=self.image_id(index),
            pixels=torch.from_numpy(pixels),
            boxes=torch.tensor([[x, y, x + side, y + side]], dtype=torch.float32),
            labels=torch.tensor([1]),
            masks=(MaskCrop(x, y, np.ones((side, side), np.uint8)),),
        )

    def ground_truth(self) -> dict[str, Any]:
        """Return the squares in COCO format."""
        annotations = []
        for index in range(self.length):
            x1, y1, x2, y2 = self[index].boxes[0].tolist()
            polygon = [x1, y1, x2, y1, x2, y2, x1, y2]
            box = [x1, y1, x2 - x1, y2 - y1]
            annotations.append(
                {"id": index + 1, "image_id": index + 1, "category_id": 1, "iscrowd": 0}
                | {"bbox": box, "area": box[2] * box[3], "segmentation": [polygon]}
            )
        images = [{"id": n + 1, "file_name": f"{n + 1}.png", "height": 64, "width": 64} for n in range(self.length)]
        return {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "square"}]}


# ---- Transform: a random window of the image


class RandomWindowConfig(TransformConfig):
    """A square window at a random place."""

    kind: Literal["random_window"] = "random_window"
    side: PositiveInt = 64  # px; a smaller image is not cropped along its smaller side

    def build(self) -> RandomWindow:
        """Return the transform."""
        return RandomWindow(self.side)


@dataclass(frozen=True)
class RandomWindow:
    """Crops an image to a random window, with its boxes; `crop` keeps the masks exact."""

    side: int

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Return the cropped example."""
        height, width = example.pixels.shape[1:]
        size = min(self.side, height), min(self.side, width)
        top, left = int(rng.integers(height - size[0] + 1)), int(rng.integers(width - size[1] + 1))
        return crop(example, top, left, *size)


# ---- Sampler: the images with an even index alone


class EverySecondConfig(SamplerConfig):
    """Every second image, from the first."""

    kind: Literal["every_second"] = "every_second"

    def weights(self, dataset: DetectionDataset) -> np.ndarray:
        """Return 1, 0, 1, ..."""
        return (np.arange(len(dataset)) + 1) % 2


# ---- Optimizer, schedule, logger


class NAdamConfig(OptimizerConfig):
    """Adam with Nesterov momentum."""

    kind: Literal["nadam"] = "nadam"
    lr: PositiveFloat = 1e-3
    weight_decay: float = 0.0

    def build(self, model: nn.Module, *, batch_size: int) -> torch.optim.Optimizer:
        """Return the optimizer."""
        lr = scaled_lr(self.lr, base_batch=self.base_batch, batch_size=batch_size)
        return torch.optim.NAdam(self.groups(model, lr=lr), lr=lr)


class LinearDecayConfig(ScheduleConfig):
    """From 1 to 0 in a straight line, without warm-up."""

    kind: Literal["linear"] = "linear"

    def build(self) -> Schedule:
        """Return the factor of the learning rate."""
        return lambda iteration: 1 - iteration / self.num_iterations


class CsvConfig(LoggerConfig):
    """A CSV file `numbers.csv` in the run directory."""

    kind: Literal["csv"] = "csv"

    def build(self, run_dir: Path, *, start: int) -> Logger:
        """Return the logger."""
        return Csv(run_dir / "numbers.csv")


class Csv(Logger):
    """Appends lines `iteration, name, value`."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", newline="", encoding="utf-8")
        self._rows = csv.writer(self._file)

    def log_numbers(self, numbers: Mapping[str, float], iteration: int) -> None:
        """Append a line for each number."""
        self._rows.writerows((iteration, name, value) for name, value in numbers.items())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


# ---- Metric: the fraction of the objects that are found


class FoundConfig(MetricConfig):
    """The fraction of the objects with a box of their class at IoU 0.5 or more, among confident detections."""

    kind: Literal["found"] = "found"
    min_score: float = Field(0.5, ge=0, le=1)

    @property
    def figures(self) -> tuple[str, ...]:
        """`found/objects`."""
        return ("objects",)

    def build(self) -> Metric:
        """Return the metric."""
        return partial(found_objects, min_score=self.min_score)


def found_objects(
    ground_truth: dict[str, Any], results: Sequence[dict[str, Any]], *, min_score: float
) -> dict[str, float]:
    """Return the fraction under `objects`; nan without objects. A detection may find several objects."""
    boxes = defaultdict(list)
    for result in results:
        if result["score"] >= min_score:
            boxes[result["image_id"], result["category_id"]].append(result["bbox"])
    found = []
    for annotation in ground_truth["annotations"]:
        if not annotation["iscrowd"]:
            candidates = boxes[annotation["image_id"], annotation["category_id"]]
            found.append(bool(candidates) and cocoapi.iou(candidates, [annotation["bbox"]], [0]).max() >= 0.5)
    return {"objects": float(np.mean(found)) if found else float("nan")}
