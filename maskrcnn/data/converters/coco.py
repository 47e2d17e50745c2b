"""COCO JSON, to check it against the images or to split it. Everything in the file is kept."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from maskrcnn.data.coco_file import read_coco_json
from maskrcnn.data.converters.conversion import CocoData, Conversion, require_size
from maskrcnn.errors import InputError


def read(conversion: Conversion) -> dict[str, CocoData]:
    """Return the content of a file."""
    return {"": with_checked_images(read_coco_json(conversion.source), conversion)}


def with_checked_images(data: CocoData, conversion: Conversion) -> CocoData:
    """Return the data if every image is in the folder and has the size that the data say.

    Raises:
        InputError: an image is missing or has another size, or the user gave classes, which the data have.
    """
    if conversion.classes:
        raise InputError(f"{conversion.source}: the file has its classes and their ids; omit --classes")
    folder: Path = conversion.source.parent
    photographs = conversion.photographs(folder / "images", folder)
    for image in tqdm(data["images"], desc="reading", unit="image", disable=None):
        name = photographs.name(image["file_name"], conversion.source)
        require_size(photographs.header(name), image["height"], image["width"], name, conversion.source)
    return data
