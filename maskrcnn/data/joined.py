"""Several datasets as one: their classes are united by name, and weights make a mixture of them.

Shapes: D datasets, N images of all of them, G objects of an image.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, PositiveFloat, model_validator
from typing_extensions import Self

from maskrcnn.data.dataset import DatasetConfig, DetectionDataset, HasFiles
from maskrcnn.data.findings import Finding
from maskrcnn.data.image_checks import ChecksFiles
from maskrcnn.data.provenance import describe, digest
from maskrcnn.errors import InputError
from maskrcnn.structures import ClassTable, Example

logger = logging.getLogger(__name__)


class JoinedConfig(DatasetConfig):
    """Several datasets as one, such as `datasets: [{kind: coco, ...}, {kind: coco, ...}]`."""

    kind: Literal["joined"] = "joined"
    datasets: tuple[DatasetConfig, ...] = Field(min_length=1)
    weights: tuple[PositiveFloat, ...] = Field(
        (), description="share of each dataset in the draws of an epoch; by default, that of its images"
    )

    @model_validator(mode="after")
    def _one_weight_each(self) -> Self:
        if self.weights and len(self.weights) != len(self.datasets):
            raise ValueError(f"weights: {len(self.weights)} numbers for {len(self.datasets)} datasets")
        return self

    def build(self) -> JoinedDataset:
        """Return the dataset. Raises InputError if one of the datasets is invalid."""
        return JoinedDataset([config.build() for config in self.datasets], self.weights)

    def with_root(self, root: Path) -> Self:
        """Return the config with the folder `root` for the datasets that have none of their own."""
        return self.model_copy(update={"datasets": tuple(config.with_root(root) for config in self.datasets)})

    def digest(self) -> str:
        """Return the digest of those of the datasets."""
        return digest(config.digest() for config in self.datasets)


class JoinedDataset:
    """The images of several datasets, one dataset after another.

    Classes with the same name are one class. If the datasets agree on the COCO ids of their classes, the classes keep
    them, in ascending order; otherwise they are in the order of their first appearance, with ids from 1. Likewise, the
    ids of the images stay if no two images share one; otherwise the images have ids from 1, in their order.

    Args:
        datasets: at least one.
        weights: share of each dataset in the draws of an epoch (`mixed`); empty: that of its images.
    """

    def __init__(self, datasets: Sequence[DetectionDataset], weights: Sequence[float] = ()) -> None:
        self._datasets, self._weights = tuple(datasets), tuple(weights)
        self.classes = _united([dataset.classes for dataset in datasets])
        labels = {name: label for label, name in enumerate(self.classes.names, 1)}
        # For each dataset, the new label of each of its labels, and -1 as the last entry, that of label -1.
        self._labels = [np.array([0, *(labels[name] for name in each.classes.names), -1]) for each in datasets]
        self._ends = np.cumsum([0, *map(len, datasets)])
        ids = np.array([each.image_id(index) for each in datasets for index in range(len(each))], np.int64)
        self._numbers_images = len(np.unique(ids)) < len(ids)
        self._image_ids = np.arange(1, len(ids) + 1) if self._numbers_images else ids
        for line in _not_everywhere(self.classes, [dataset.classes for dataset in datasets]):
            logger.warning("%s", line)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Example:
        """Return one image with its objects. Raises InputError if its dataset cannot read it."""
        number, own = self._place(index)
        example = self._datasets[number][own]
        labels = torch.from_numpy(self._labels[number])[example.labels]
        return dataclasses.replace(example, image_id=self.image_id(index), labels=labels)

    def _place(self, index: int) -> tuple[int, int]:
        """Return the number of the dataset of an image, and its index there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._ends, index, side="right")) - 1
        return number, index - int(self._ends[number])

    def image_id(self, index: int) -> int:
        """Return the id of an image; see the class."""
        return int(self._image_ids[index])

    def labels(self, index: int) -> np.ndarray:
        """Return the labels of the objects of an image, (G,) int64. The image is not opened."""
        number, own = self._place(index)
        return self._labels[number][self._datasets[number].labels(own)]

    def image_sizes(self) -> np.ndarray:
        """Return height and width of each image, (N, 2) int64. No image is opened."""
        return np.concatenate([dataset.image_sizes() for dataset in self._datasets])

    def mixed(self, weights: np.ndarray | None) -> np.ndarray | None:
        """Return how often each image is drawn, such that each dataset has its share of the draws.

        Args:
            weights: (N,) how often a sampler draws each image; None: each once. Within a dataset they are kept.

        Raises:
            InputError: the sampler draws no image of a dataset.
        """
        if not self._weights:
            return weights
        weights = np.ones(len(self)) if weights is None else np.asarray(weights, np.float64)
        mixture = np.zeros(len(self))
        for number, share in enumerate(self._weights):
            own = slice(self._ends[number], self._ends[number + 1])
            total = weights[own].sum()
            if not total > 0:
                raise InputError(
                    f"data.train.datasets: training.sampler draws no image of dataset {number + 1}, whose weight is "
                    f"{share:g}; has it any object?"
                )
            mixture[own] = weights[own] / total * share
        return mixture

    def ground_truth(self) -> dict[str, Any]:
        """Return images, annotations and categories in COCO format; the annotations have ids from 1."""
        classes = zip(self.classes.category_ids, self.classes.names, strict=True)
        data: dict[str, Any] = {
            "images": [],
            "annotations": [],
            "categories": [{"id": key, "name": name} for key, name in classes],
        }
        category_of_name = {category["name"]: category["id"] for category in data["categories"]}
        for number, dataset in enumerate(self._datasets):
            part = dataset.ground_truth()
            indices = range(self._ends[number], self._ends[number + 1])
            image_ids = {dataset.image_id(own): self.image_id(index) for own, index in enumerate(indices)}
            category_ids = {entry["id"]: category_of_name[entry["name"]] for entry in part["categories"]}
            data["images"] += [{**entry, "id": image_ids[entry["id"]]} for entry in part["images"]]
            data["annotations"] += [
                {**entry, "image_id": image_ids[entry["image_id"]], "category_id": category_ids[entry["category_id"]]}
                for entry in part["annotations"]
            ]
        data["annotations"] = [{**entry, "id": key} for key, entry in enumerate(data["annotations"], 1)]
        return data

    def image_name(self, index: int) -> str:
        """Return the name of an image in its dataset, or its id there."""
        number, own = self._place(index)
        dataset: Any = self._datasets[number]
        return str(dataset.image_name(own) if hasattr(dataset, "image_name") else dataset.image_id(own))

    def files(self) -> list[str]:
        """Return the path of each image file of the datasets that have files."""
        return list(chain.from_iterable(each.files() for each in self._datasets if isinstance(each, HasFiles)))

    def check_files(self) -> list[Finding]:
        """Return what is wrong with the image files of the datasets that can check theirs."""
        return [finding for each in self._datasets if isinstance(each, ChecksFiles) for finding in each.check_files()]

    def origin(self) -> Mapping[str, str]:
        """Return the origins of the datasets, whose numbers count from 1, and how their ids were changed."""
        parts = {
            f"dataset {number}, {name}": text
            for number, dataset in enumerate(self._datasets, 1)
            for name, text in describe(dataset).items()
        }
        weights = {"weights": ", ".join(f"{weight:g}" for weight in self._weights)} if self._weights else {}
        ids = {"image ids": "numbered from 1, because the datasets share ids"} if self._numbers_images else {}
        return {**weights, **ids, **parts}


def _united(tables: Sequence[ClassTable]) -> ClassTable:
    """Return the classes of all datasets; see `JoinedDataset`."""
    pairs = dict.fromkeys(pair for table in tables for pair in zip(table.names, table.category_ids, strict=True))
    names = dict.fromkeys(name for name, _ in pairs)
    if len(pairs) == len(names) == len({key for _, key in pairs}):
        ordered = sorted(pairs, key=lambda pair: pair[1])
        return ClassTable(tuple(name for name, _ in ordered), tuple(key for _, key in ordered))
    return ClassTable(tuple(names), tuple(range(1, len(names) + 1)))


def _not_everywhere(classes: ClassTable, tables: Sequence[ClassTable]) -> Iterator[str]:
    """Report the classes that a dataset does not have: objects of them in its images are background."""
    for number, table in enumerate(tables, 1):
        missing = [name for name in classes.names if name not in table.names]
        if missing:
            yield (
                f"dataset {number} of {len(tables)} joined ones does not annotate {', '.join(missing)}: what its "
                "images show of that is background"
            )
