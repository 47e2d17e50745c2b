"""The files that a conversion writes: one for each split, none of which exists yet."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterable, Mapping
from pathlib import Path

from maskrcnn.data.converters.conversion import CocoData
from maskrcnn.errors import InputError, first_of


def files_of_splits(splits: Mapping[str, CocoData], out: Path, validation: float | None) -> dict[Path, CocoData]:
    """Return the data of each file to write.

    Args:
        splits: data in COCO format by split; the only split of a source without splits is "".
        out: a folder, which gets `SPLIT.json` for each split, or `annotations.json` without splits; or a file, whose
            name ends in `.json`, for a source without splits.
        validation: share of the images for `val.json`, if there are no splits; the others are in `train.json`.

    Raises:
        InputError: the source has splits and `out` or `validation` is for one without, or a file exists.
    """
    if list(splits) != [""] and (out.suffix == ".json" or validation is not None):
        names = ", ".join(splits)
        raise InputError(f"the source has the splits {names}: name a folder with --out, and omit --validation")
    if validation is not None:
        splits = divide(splits[""], validation)
    if out.suffix == ".json":
        files = {out: splits[""]}
    else:
        files = {out / f"{name or 'annotations'}.json": data for name, data in splits.items()}
    require_new(files)
    return files


def require_new(files: Iterable[Path]) -> None:
    """Raise InputError, which names them, if some of the files exist."""
    existing = [str(path) for path in files if path.exists()]
    if existing:
        raise InputError(f"{', '.join(first_of(existing))}: exists already; name another folder or file with --out")


def divide(data: CocoData, validation: float) -> dict[str, CocoData]:
    """Return the splits `train` and `val`, with the given share of the images in the second.

    It takes those whose names have the lowest hashes, so an image hardly ever changes its split when others are added.

    Raises:
        InputError: a split would have no image.
    """
    ranked = sorted(data["images"], key=lambda image: hashlib.sha256(image["file_name"].encode()).digest())
    count = round(validation * len(ranked))
    if not 0 < count < len(ranked):
        raise InputError(f"--validation {validation:g} of {len(ranked)} images leaves one of the two files empty")
    return split_by(data, {image["id"] for image in ranked[:count]})


def split_by(data: CocoData, validation_ids: Container[int]) -> dict[str, CocoData]:
    """Return the splits `train` and `val`, with the images of these ids in the second."""
    return {
        name: {
            **data,
            "images": [image for image in data["images"] if (image["id"] in validation_ids) == is_second],
            "annotations": [
                entry for entry in data["annotations"] if (entry["image_id"] in validation_ids) == is_second
            ],
        }
        for name, is_second in (("train", False), ("val", True))
    }
