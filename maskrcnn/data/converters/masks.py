"""Folders of label images, in which each value but 0 is an object.

The file `a.png`, `a_mask.png` or `a/1.png` belongs to the photograph `a`: the longest beginning of its path, up to one
of `/ _ - .` and space, that names a photograph. A photograph may have several files, such as one for each object. An
empty folder `a` says that `a` has no objects.

Objects are of the class `object`, or of the one class that the user names. With several, the name of each file ends in
its class, as `001_disc.png` of `maskrcnn predict --format png` does.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from maskrcnn.data.converters.conversion import (
    CocoData,
    Conversion,
    ImageFolder,
    LabelledImage,
    assemble,
    files_below,
    numbered,
    require_size,
)
from maskrcnn.data.converters.objects import LabelledObject, label_masks
from maskrcnn.data.converters.reading import read_labels
from maskrcnn.errors import InputError

SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif")
CLASS = "object"


def read(conversion: Conversion) -> dict[str, CocoData]:
    """Return the annotations of a folder of label images."""
    if not conversion.source.is_dir():
        raise InputError(f"{conversion.source}: expected a folder of label images")
    if conversion.images is None:
        raise InputError("--from masks needs --images, the folder of the photographs")
    if conversion.images.resolve() == conversion.source.resolve():
        raise InputError(f"{conversion.source}: label images and photographs must lie in different folders")
    classes = conversion.classes or (CLASS,)
    return assemble(_images(conversion, classes), conversion, numbered(classes))


def _images(conversion: Conversion, classes: Sequence[str]) -> Iterator[LabelledImage]:
    photographs = conversion.photographs()
    files = _files_by_photograph(conversion.source, photographs)
    for stem in photographs.by_stem:
        name = photographs.of_stem(stem)
        if name is not None and stem not in files:
            conversion.leave_out("photographs without a label image are left out", name)
    for stem, labels in sorted(files.items()):
        name = photographs.of_stem(stem)
        assert name is not None
        header = photographs.header(name)
        objects: list[LabelledObject] = []
        for path in labels:
            pixels = read_labels(path)
            height, width = pixels.shape
            require_size(header, height, width, name, path)
            class_name = _class_of(path, classes)
            objects += [LabelledObject.of_rle(class_name, rle) for _, rle in label_masks(pixels)]
        yield LabelledImage(name, header, objects)


def _files_by_photograph(source: Path, photographs: ImageFolder) -> dict[str, list[Path]]:
    """Return the label images of each photograph, which goes by its path without suffix."""
    files: dict[str, list[Path]] = defaultdict(list)
    for name in files_below(source, SUFFIXES):
        files[_stem_of(name, source, photographs)].append(source / name)
    for parent, folders, names in os.walk(source):
        relative = Path(parent).relative_to(source).as_posix()
        if not folders and not names and relative in photographs.by_stem:
            files.setdefault(relative, [])
    return files


def _stem_of(name: str, source: Path, photographs: ImageFolder) -> str:
    whole = posixpath.splitext(name)[0]
    beginnings = [whole, *(whole[: found.start()] for found in reversed(list(re.finditer(r"[/_\-. ]", whole))))]
    stem = next((beginning for beginning in beginnings if beginning in photographs.by_stem), None)
    if stem is None:
        raise InputError(f"{source / name}: no photograph in {photographs.path} has a name that this one begins with")
    return stem


def _class_of(path: Path, classes: Sequence[str]) -> str:
    if len(classes) == 1:
        return classes[0]
    endings = {re.sub(r"[^0-9A-Za-z-]+", "_", name)[:100]: name for name in classes}  # as the command writes them
    fitting = [ending for ending in endings if path.stem == ending or path.stem.endswith(f"_{ending}")]
    if not fitting:
        raise InputError(f"{path}: with several classes, the name of a file ends in its class: {', '.join(endings)}")
    return endings[max(fitting, key=len)]
