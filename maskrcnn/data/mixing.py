"""Transforms that combine an image with others of the dataset: Copy-Paste and mosaic.

The other images are those of the whole training set, not of the batch. They are drawn by the random generator of the
image, so the result depends neither on the batch nor on the number of processes. Each of them passes the transforms
that stand before this one in the list, with random numbers of its own.

Shapes: H x W image.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field

from maskrcnn.config import Size
from maskrcnn.data.dataset import DetectionDataset
from maskrcnn.data.rasters import occlude, rasterize_masks
from maskrcnn.data.sampling import images_of_classes
from maskrcnn.data.transforms import Probability, RandomApply, Transform, TransformConfig, crop, keep_objects, resize
from maskrcnn.errors import InputError
from maskrcnn.structures import Example


class MixingConfig(TransformConfig):
    """Base class of transforms that combine an image with others of the dataset."""

    def build(self) -> Transform:
        """Raise InputError: without a training set there are no other images."""
        raise InputError(f"{self.kind} combines images of the training set; it is for data.train_transforms")

    @abstractmethod
    def build_for(self, dataset: DetectionDataset, before: Transform) -> Transform:
        """Return the transform."""


class CopyPasteConfig(MixingConfig):
    """Pastes objects of another image at their place there. The objects below them lose the pixels that they cover.

    Ghiasi et al., "Simple Copy-Paste is a Strong Data Augmentation Method for Instance Segmentation", CVPR 2021,
    without blending. Behind `large_scale_jitter`, both images are jittered, each for itself, as in the paper.
    """

    kind: Literal["copy_paste"] = "copy_paste"
    max_objects: Size = 100  # a random number of objects is pasted, from 1 to this one
    balanced: bool = False  # draw a class, then an image with it, and paste objects of this class alone
    probability: Probability = 1.0

    def build_for(self, dataset: DetectionDataset, before: Transform) -> RandomApply:
        """Return the transform."""
        others = OtherImages(dataset, before)
        images = images_of_classes(dataset) if self.balanced else ()
        return RandomApply(CopyPaste(others, self.max_objects, images), self.probability)


class MosaicConfig(MixingConfig):
    """Four images, each in a quarter of a square. The quarters meet at a random point of the square's middle.

    Each image is cropped to the shape of its quarter and resized.
    """

    kind: Literal["mosaic"] = "mosaic"
    side: Annotated[int, Field(ge=32, le=2**14)] = 640  # px, of the result
    probability: Probability = 0.5

    def build_for(self, dataset: DetectionDataset, before: Transform) -> RandomApply:
        """Return the transform."""
        return RandomApply(Mosaic(OtherImages(dataset, before), self.side), self.probability)


@dataclass(frozen=True)
class OtherImages:
    """Images of a dataset, transformed."""

    dataset: DetectionDataset
    transform: Transform

    def at(self, index: int, rng: np.random.Generator) -> Example:
        """Return an image. Raises InputError if the dataset cannot read it."""
        return self.transform(self.dataset[index], rng)

    def any(self, rng: np.random.Generator) -> Example:
        """Return a random image. Raises InputError if the dataset cannot read it."""
        return self.at(int(rng.integers(len(self.dataset))), rng)


@dataclass(frozen=True)
class CopyPaste:
    """Pastes random objects of another image. With `images` of each class, the classes are equally frequent."""

    others: OtherImages
    max_objects: int = 100
    images: tuple[np.ndarray, ...] = ()

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Return the example with further objects, or unchanged if the other image has none."""
        source = self._source(rng)
        height, width = (min(sides) for sides in zip(example.pixels.shape[1:], source.pixels.shape[1:], strict=True))
        source = rasterize_masks(crop(source, 0, 0, height, width))
        candidates = [index for index, mask in enumerate(source.masks) if source.labels[index] > 0 and mask.pixels.size]
        if not candidates:
            return example
        count = int(rng.integers(1, min(len(candidates), self.max_objects) + 1))
        chosen = torch.zeros(len(source.masks), dtype=torch.bool)
        chosen[rng.choice(candidates, count, replace=False)] = True
        return paste(example, keep_objects(source, chosen))

    def _source(self, rng: np.random.Generator) -> Example:
        """Return another image; with balanced classes, with the objects of one class alone."""
        labels = [label for label, images in enumerate(self.images, start=1) if len(images)]
        if not labels:
            return self.others.any(rng)
        label = labels[int(rng.integers(len(labels)))]
        source = self.others.at(int(rng.choice(self.images[label - 1])), rng)
        return keep_objects(source, source.labels == label)


def paste(example: Example, source: Example) -> Example:
    """Return an example with all objects of another one pasted at their place there.

    Args:
        example: any example; its masks are rasterised in the pixels of its image.
        source: not larger than `example`, with masks in pixels of its image.
    """
    height, width = source.pixels.shape[1:]
    covered = np.zeros(example.pixels.shape[1:], dtype=bool)
    for mask in source.masks:
        rows, columns = mask.pixels.shape
        covered[mask.y : mask.y + rows, mask.x : mask.x + columns] |= mask.pixels.astype(bool)
    pixels = example.pixels.clone()
    region = pixels[:, :height, :width]
    region.copy_(torch.where(torch.from_numpy(covered[:height, :width]), source.pixels, region))
    below = occlude(rasterize_masks(example), covered)
    return _with_objects_of(dataclasses.replace(below, pixels=pixels), [below, source])


def _with_objects_of(example: Example, sources: Sequence[Example]) -> Example:
    """Return the example with the objects of all sources in place of its own."""
    return dataclasses.replace(
        example,
        boxes=torch.cat([source.boxes for source in sources]),
        labels=torch.cat([source.labels for source in sources]),
        masks=tuple(mask for source in sources for mask in source.masks),
        has_mask=torch.cat([source.has_mask for source in sources]),
    )


@dataclass(frozen=True)
class Mosaic:
    """Arranges an image and three others in the quarters of a square."""

    others: OtherImages
    side: int

    def __call__(self, example: Example, rng: np.random.Generator) -> Example:
        """Return the mosaic, `side x side`."""
        y, x = (round(self.side * rng.uniform(0.25, 0.75)) for _ in range(2))
        windows = [(0, 0, y, x), (0, x, y, self.side), (y, 0, self.side, x), (y, x, self.side, self.side)]
        examples = [example, *(self.others.any(rng) for _ in range(3))]
        pixels = example.pixels.new_zeros((len(example.pixels), self.side, self.side))
        parts = []
        for index, (top, left, bottom, right) in zip(rng.permutation(4).tolist(), windows, strict=True):
            part = _fitted(examples[index], bottom - top, right - left, rng)
            pixels[:, top:bottom, left:right] = part.pixels
            parts.append(_shifted(part, top, left))
        return _with_objects_of(Example(example.image_id, pixels, example.boxes, example.labels, example.masks), parts)


def _fitted(example: Example, height: int, width: int, rng: np.random.Generator) -> Example:
    """Return a random window of the image in the shape of `height x width`, as large as possible, at that size."""
    rows, columns = example.pixels.shape[1:]
    window = min(rows, max(1, columns * height // width)), min(columns, max(1, rows * width // height))
    top, left = int(rng.integers(rows - window[0] + 1)), int(rng.integers(columns - window[1] + 1))
    return rasterize_masks(resize(crop(example, top, left, *window), (height, width)))


def _shifted(example: Example, top: int, left: int) -> Example:
    """Return the example, whose masks are in pixels of its image, with boxes and masks moved."""
    masks = tuple(mask._replace(x=mask.x + left, y=mask.y + top) for mask in example.masks)
    return dataclasses.replace(example, boxes=example.boxes + torch.tensor([left, top, left, top]), masks=masks)
