"""The interface of datasets, and the base class of their configs.

Shapes: N images, G objects of an image.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from typing_extensions import Self

from maskrcnn.config import Part
from maskrcnn.structures import ClassTable, Example


class DetectionDataset(Protocol):
    """The interface of a dataset."""

    @property
    def classes(self) -> ClassTable:
        """The class names and category ids, in the order of the labels."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def image_id(self, index: int) -> int:
        """Return the `image_id` of an image in COCO results."""

    def labels(self, index: int) -> np.ndarray:
        """Return the labels of the objects of an image, (G,) int64, without opening it; -1 for ignored regions."""

    def image_sizes(self) -> np.ndarray:
        """Return height and width of each image, (N, 2), without opening the images."""

    def ground_truth(self) -> dict[str, Any]:
        """Return images, annotations and categories in COCO format, for evaluation."""


@runtime_checkable
class HasFiles(Protocol):
    """A dataset of image files; optional."""

    def files(self) -> list[str]:
        """Return the path of each image file, the same text for the same file."""


class DatasetConfig(Part):
    """Base class of the configs of datasets, an extension point."""

    @abstractmethod
    def build(self) -> DetectionDataset:
        """Return the dataset. Raises InputError if it is invalid."""

    def with_root(self, root: Path) -> Self:
        """Return the config for data in the folder `root`, unless it names a folder itself; by default unchanged."""
        return self

    def digest(self) -> str:
        """Return a text that is the same on every machine with the same data; by default the folder `root`, if any.

        With the other keys, it identifies the data of a finished run. A kind that reads a file returns its digest.
        """
        return str(getattr(self, "root", ""))
