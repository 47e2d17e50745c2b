"""Cityscapes: a folder with `gtFine` and `leftImg8bit`, and the splits `train` and `val`.

The objects are those of the files `*_gtFine_instanceIds.png`, of the eight classes that Cityscapes evaluates, whose ids
stay. A region that is labelled as a group of objects is a crowd region. Other classes are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from maskrcnn.data.converters.conversion import (
    CocoData,
    Conversion,
    ImageFolder,
    LabelledImage,
    assemble,
    files_below,
    require_size,
)
from maskrcnn.data.converters.objects import LabelledObject, label_masks
from maskrcnn.data.converters.reading import read_labels
from maskrcnn.errors import InputError

CLASSES = {
    24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
UNEVALUATED = {29: "caravan", 30: "trailer"}
PER_CLASS = 1000  # object n of class c has the value 1000 c + n; a lower value is a class without objects, or a group
ENDING = "_gtFine_instanceIds.png"


def read(conversion: Conversion) -> dict[str, CocoData]:
    """Return the annotations of the folder, or of its folder `gtFine`."""
    source = conversion.source
    root = source if (source / "gtFine").is_dir() else source.parent
    if not (root / "gtFine").is_dir():
        raise InputError(f"{source}: there is no folder gtFine")
    photographs = conversion.photographs(root / "leftImg8bit")
    categories = [{"id": number, "name": name} for number, name in CLASSES.items()]
    return assemble(_images(root / "gtFine", photographs, conversion), conversion, categories)


def _images(folder: Path, photographs: ImageFolder, conversion: Conversion) -> Iterator[LabelledImage]:
    for split in ("train", "val"):
        for name in files_below(folder / split, [ENDING.lower()]):
            path = folder / split / name
            image = photographs.name(f"{split}/{name[: -len(ENDING)]}_leftImg8bit.png", path)
            header, labels = photographs.header(image), read_labels(path)
            height, width = labels.shape
            require_size(header, height, width, image, path)
            objects = []
            for value, rle in label_masks(labels):
                number, is_group = (value, True) if value < PER_CLASS else (value // PER_CLASS, False)
                if number in CLASSES:
                    objects.append(LabelledObject.of_rle(CLASSES[number], rle, crowd=is_group))
                elif number in UNEVALUATED:
                    conversion.leave_out(f"regions of class {UNEVALUATED[number]} are left out", image)
                elif not is_group:
                    raise InputError(f"{path}: the value {value} is of no class with objects")
            yield LabelledImage(image, header, objects, split)
