"""Which images contain which classes.

Shapes: N images, K classes.
"""

from __future__ import annotations

import numpy as np

from maskrcnn.data.dataset import DetectionDataset


def images_of_classes(dataset: DetectionDataset) -> tuple[np.ndarray, ...]:
    """Return, for each of K classes, the indices of the images with an object of it, int64 in ascending order."""
    present = [np.unique(dataset.labels(index)) for index in range(len(dataset))]
    images = np.arange(len(dataset)).repeat([len(labels) for labels in present])
    labels = np.concatenate([np.zeros(0, np.int64), *present])
    return tuple(images[labels == label] for label in range(1, len(dataset.classes) + 1))
