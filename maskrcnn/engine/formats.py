"""Files that other tools read, written for each image of a prediction."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from maskrcnn.engine.instances import Instances
from maskrcnn.errors import InputError
from maskrcnn.runtime.files import json_text, write_text
from maskrcnn.structures import ClassTable
from maskrcnn.visualization.drawing import save_image

Format = Literal["coco", "labelme", "png", "yolo"]

Writer = Callable[[Path, str, Path, Instances], None]  # (output folder, name of the image, its file, its instances)


def write_labelme(out: Path, name: str, file: Path, instances: Instances) -> None:
    """Write `labelme/NAME.json`, which refers to the image by its path relative to that folder."""
    folder = out / "labelme"
    image_path = os.path.relpath(os.path.abspath(file), os.path.abspath(folder))
    write_text(folder / f"{name}.json", json_text(instances.to_labelme(Path(image_path).as_posix()), indent=2) + "\n")


def write_png(out: Path, name: str, file: Path, instances: Instances) -> None:
    """Write a binary mask for each instance: `masks/NAME/001_CLASS.png` and so on, by descending score.

    Raises:
        InputError: the model has no mask head.
    """
    if not instances.has_masks:
        raise InputError("--format png: there are no masks, because the model has no mask head")
    folder = out / "masks" / name
    folder.mkdir(parents=True, exist_ok=True)
    for number, (class_name, mask) in enumerate(zip(instances.class_names, instances.to_png(), strict=True), start=1):
        save_image(folder / f"{number:03d}_{re.sub(r'[^0-9A-Za-z-]+', '_', class_name)[:100]}.png", mask)


def write_yolo(out: Path, name: str, file: Path, instances: Instances) -> None:
    """Write `labels/NAME.txt`, without lines if there are no instances."""
    write_text(out / "labels" / f"{name}.txt", "".join(f"{line}\n" for line in instances.to_yolo()))


def write_yolo_classes(out: Path, classes: ClassTable) -> None:
    """Write `classes.txt`, a class name per line; the first one is class 0 of the labels."""
    write_text(out / "classes.txt", "".join(f"{' '.join(name.split())}\n" for name in classes.names))


WRITERS: dict[Format, Writer] = {"labelme": write_labelme, "png": write_png, "yolo": write_yolo}
