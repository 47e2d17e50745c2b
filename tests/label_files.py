"""Generated scenes with photographs on disk, which tests write in the formats of annotation tools.

The masks of a scene are those of the generator: with holes, several parts, and cut off at the border.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as cocoapi

from maskrcnn.cli.arguments import class_names
from maskrcnn.data.converters import reader
from maskrcnn.data.converters.conversion import Conversion
from maskrcnn.data.polygons import polygons_of
from maskrcnn.data.shapes import ShapesConfig
from maskrcnn.structures import MaskCrop

CLASSES = ("disc", "ring", "cross")
HEIGHT, WIDTH = 60, 88


class Scene(NamedTuple):
    """One photograph and its objects."""

    name: str  # of the file
    objects: list[tuple[str, np.ndarray]]  # class name and mask (H, W) bool


def write_scenes(folder: Path, count: int = 3, sizes: tuple[float, float] = (0.1, 0.6)) -> list[Scene]:
    """Write photographs to a folder and return them with their objects; the last one has none."""
    config = ShapesConfig(
        length=count, seed=4, height=HEIGHT, width=WIDTH, classes=CLASSES, objects=(3, 5), sizes=sizes
    )
    dataset = config.build()
    folder.mkdir(parents=True, exist_ok=True)
    scenes = []
    for index in range(count):
        example = dataset[index]
        name = f"photo_{index}.png"
        Image.fromarray(example.pixels.permute(1, 2, 0).numpy()).save(folder / name)
        objects = []
        for label, crop in zip(example.labels.tolist(), example.masks, strict=True):
            mask = np.zeros((HEIGHT, WIDTH), bool)
            height, width = crop.pixels.shape
            mask[crop.y : crop.y + height, crop.x : crop.x + width] = crop.pixels.astype(bool)
            objects.append((CLASSES[label - 1], mask))
        scenes.append(Scene(name, objects if index < count - 1 else []))
    return scenes


def label_image(scene: Scene, dtype: type = np.uint8, first: int = 1) -> np.ndarray:
    """Return the number of the object of each pixel, counted from `first`; 0 is background."""
    labels = np.zeros((HEIGHT, WIDTH), dtype)
    for number, (_, mask) in enumerate(scene.objects, start=first):
        labels[mask] = number
    return labels


def convert(name: str, source: Path, images: Path | None = None, classes: str = "") -> dict[str, dict[str, Any]]:
    """Return what a reader makes of a source, by split."""
    return reader(name)(Conversion(source, images, class_names(classes) if classes else ()))


def masks_of(data: dict[str, Any]) -> dict[str, list[tuple[str, np.ndarray]]]:
    """Return class name and mask (H, W) bool of the objects of each image, in the order of the file."""
    names = {category["id"]: category["name"] for category in data["categories"]}
    images = {image["id"]: image for image in data["images"]}
    objects: dict[str, list[tuple[str, np.ndarray]]] = {image["file_name"]: [] for image in data["images"]}
    for entry in data["annotations"]:
        image, mask = images[entry["image_id"]], entry["segmentation"]
        if isinstance(mask, list):
            mask = cocoapi.merge(cocoapi.frPyObjects(mask, image["height"], image["width"]))
        objects[image["file_name"]].append((names[entry["category_id"]], cocoapi.decode(mask).astype(bool)))
    return objects


def assert_same(found: dict[str, list[tuple[str, np.ndarray]]], scenes: Sequence[Scene], *, iou: float = 1.0) -> None:
    """Assert that all images, classes and masks are those of the scenes, in any order of objects."""
    assert sorted(Path(name).name for name in found) == sorted(scene.name for scene in scenes)
    by_name = {Path(name).name: objects for name, objects in found.items()}
    for scene in scenes:
        remaining = list(by_name[scene.name])
        assert len(remaining) == len(scene.objects)
        for class_name, mask in scene.objects:
            overlaps = [_iou(mask, other) if class_name == name else -1 for name, other in remaining]
            assert max(overlaps) >= iou, (scene.name, class_name, overlaps)
            remaining.pop(int(np.argmax(overlaps)))


def _iou(first: np.ndarray, second: np.ndarray) -> float:
    return float((first & second).sum() / (first | second).sum())


def outlines(mask: np.ndarray) -> list[list[list[float]]]:
    """Return the points (x, y) of a polygon along the edges of pixels for each part of a mask (H, W) bool."""
    return [ring.tolist() for ring in polygons_of(MaskCrop(0, 0, mask.astype(np.uint8)), tolerance=0)]
