"""Samplers of images: how often each image is drawn for training.

Shapes: N images, K classes.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Annotated, Literal, Protocol, runtime_checkable

import numpy as np
from pydantic import Field

from maskrcnn.config import Part
from maskrcnn.data.dataset import DetectionDataset


class SamplerConfig(Part):
    """Base class of the configs of samplers of images, an extension point."""

    @abstractmethod
    def weights(self, dataset: DetectionDataset) -> np.ndarray | None:
        """Return how often each image is drawn in relation to the others, (N,) numbers of at least 0.

        In an epoch of N draws, an image is drawn N times its share of the sum of the weights; of the two whole numbers
        next to that, chance chooses one. None: each image once in an epoch.
        """


class UniformConfig(SamplerConfig):
    """Each image once in an epoch."""

    kind: Literal["uniform"] = "uniform"

    def weights(self, dataset: DetectionDataset) -> None:
        """Return None."""


class RepeatFactorConfig(SamplerConfig):
    """Images with rare classes more often: repeat-factor sampling of LVIS (Gupta, Dollár, Girshick, CVPR 2019).

    A class in a fraction f of the images has the factor max(1, sqrt(threshold / f)). The weight of an image is the
    largest factor of its classes, 1 without objects.
    """

    kind: Literal["repeat_factor"] = "repeat_factor"
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.001

    def weights(self, dataset: DetectionDataset) -> np.ndarray:
        """Return the repeat factors of the images."""
        weights = np.ones(len(dataset))
        for images in images_of_classes(dataset):
            if len(images):
                factor = np.sqrt(self.threshold * len(dataset) / len(images))
                weights[images] = np.maximum(weights[images], factor)
        return weights


class ClassBalancedConfig(SamplerConfig):
    """A random class, then a random image with an object of it. Images without objects are not drawn."""

    kind: Literal["class_balanced"] = "class_balanced"

    def weights(self, dataset: DetectionDataset) -> np.ndarray:
        """Return the probabilities of the images, times the number of classes with an object."""
        weights = np.zeros(len(dataset))
        for images in images_of_classes(dataset):
            weights[images] += 1 / max(len(images), 1)
        return weights


@runtime_checkable
class Mixture(Protocol):
    """A dataset that consists of several with shares of their own in the draws; optional."""

    def mixed(self, weights: np.ndarray | None) -> np.ndarray | None:
        """Return how often each image is drawn, from how often a sampler draws it, (N,) or None for each once."""


def image_weights(sampler: SamplerConfig, dataset: DetectionDataset) -> np.ndarray | None:
    """Return how often each image of a dataset is drawn: as the sampler says, with the shares of a mixture.

    Raises:
        InputError: the sampler draws no image of one of the mixed datasets.
    """
    weights = sampler.weights(dataset)
    return dataset.mixed(weights) if isinstance(dataset, Mixture) else weights


def images_of_classes(dataset: DetectionDataset) -> tuple[np.ndarray, ...]:
    """Return, for each of K classes, the indices of the images with an object of it, int64 in ascending order."""
    present = [np.unique(dataset.labels(index)) for index in range(len(dataset))]
    images = np.arange(len(dataset)).repeat([len(labels) for labels in present])
    labels = np.concatenate([np.zeros(0, np.int64), *present])
    return tuple(images[labels == label] for label in range(1, len(dataset.classes) + 1))


def drawn_positions(weights: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Draw images by systematic sampling, in random order.

    Args:
        weights: (N,), at least 0, with a sum above 0.
        count: number of draws; image i is drawn `count * weights[i] / weights.sum()` times, rounded up or down.
        rng: random generator.

    Returns:
        (count,) int64: `i + N * k` for draw k, from 0, of image i.
    """
    order = rng.permutation(len(weights))
    ends = weights[order].cumsum(dtype=np.float64)
    ends *= count / ends[-1]
    ends[-1] = count  # exactly
    repeats: np.ndarray = np.diff(np.ceil(ends - rng.random()).astype(np.int64), prepend=0)
    draw_of_image = np.arange(count) - (repeats.cumsum() - repeats).repeat(repeats)
    return rng.permutation(order.repeat(repeats) + len(weights) * draw_of_image)
