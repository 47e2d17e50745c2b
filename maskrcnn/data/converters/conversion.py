"""One conversion: what the user said, the folder of the photographs, and the data in COCO format that it makes."""

from __future__ import annotations

import os
import posixpath
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from maskrcnn.config.explanation import not_one_of
from maskrcnn.data.converters.objects import LabelledObject
from maskrcnn.data.converters.reading import Header, read_header
from maskrcnn.data.image_files import IMAGE_SUFFIXES
from maskrcnn.errors import InputError, first_of
from maskrcnn.paths import leaves_folder

CocoData = dict[str, Any]  # data in COCO format


class ImageFolder:
    """The folder of the photographs. Images go by their path relative to it, with slashes.

    Raises:
        InputError: there is no such folder.
    """

    def __init__(self, path: Path) -> None:
        if not os.path.isdir(path):
            raise InputError(f"{path}: no such folder; --images names the folder of the photographs")
        self.path = path
        self.rotated: list[str] = []  # images whose EXIF orientation is not upright

    def name(self, name: str, source: Path) -> str:
        """Return the relative path of an image that an annotation file names.

        Raises:
            InputError: the name leads out of the folder, or there is no such image.
        """
        name = posixpath.normpath(name.replace("\\", "/"))
        if leaves_folder(name):
            raise InputError(f"{source}: the image {name!r} lies outside of the image folder {self.path}")
        try:
            exists = (self.path / name).is_file()
        except (OSError, ValueError):  # a name that the system refuses
            exists = False
        if not exists:
            raise InputError(f"{source}: there is no image {name!r} in {self.path}; --images names another folder")
        return name

    def header(self, name: str) -> Header:
        """Return the size of an image. Raises InputError if it cannot be read."""
        header = read_header(self.path / name)
        if header.orientation != 1:
            self.rotated.append(name)
        return header

    @cached_property
    def by_stem(self) -> Mapping[str, list[str]]:
        """The images below the folder, by their relative path without suffix, in order."""
        images = defaultdict(list)
        for name in files_below(self.path, IMAGE_SUFFIXES):
            images[posixpath.splitext(name)[0]].append(name)
        return images

    def of_stem(self, stem: str) -> str | None:
        """Return the image with this relative path without suffix. Raises InputError if there are several."""
        names = self.by_stem.get(stem, [])
        if len(names) > 1:
            raise InputError(f"{self.path}: the images {', '.join(names)} differ in their suffix alone; which is it?")
        return names[0] if names else None


@dataclass
class Conversion:
    """What the user said, and what readers left out.

    Raises:
        InputError: the source does not exist.
    """

    source: Path  # file or folder of the annotations
    images: Path | None = None  # folder of the photographs; by default the reader looks for it
    classes: tuple[str, ...] = ()  # names of all classes in their order, if the user gave them
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list), init=False)  # what, by reason
    folder: ImageFolder = field(init=False)  # of the photographs, when the reader has found it

    def __post_init__(self) -> None:
        if not self.source.exists():
            raise InputError(f"{self.source}: no such file or folder")

    def photographs(self, *usual: Path) -> ImageFolder:
        """Return the folder of the photographs: the user's, or else the first of the usual ones that exists."""
        found = self.images or next((path for path in usual if path.is_dir()), usual[-1])
        self.folder = ImageFolder(found)
        return self.folder

    def leave_out(self, reason: str, where: str) -> None:
        """Note that something is not in the result, to be said at the end."""
        self.left_out[reason].append(where)

    def notices(self) -> Iterator[str]:
        """Yield what was left out, and the images with an EXIF orientation."""
        for reason, where in self.left_out.items():
            yield f"{len(where)} {reason}: {', '.join(first_of(where))}"
        if self.folder.rotated:
            names = ", ".join(first_of(self.folder.rotated))
            yield (
                f"{len(self.folder.rotated)} images have an EXIF orientation; their annotations are taken as those of "
                f"the upright image, which viewers show: {names}"
            )


def require_size(header: Header, height: int, width: int, image: str, source: Path) -> None:
    """Raise InputError unless the upright image has the size that its annotation says."""
    if (header.height, header.width) == (height, width):
        return
    hint = (
        f". It is stored turned (EXIF orientation {header.orientation}), and the annotation ignores that: remove the "
        "tag from the image, or turn the annotation"
        if header.orientation >= 5 and (header.width, header.height) == (height, width)
        else ""
    )
    raise InputError(
        f"{source}: the image {image} has {header.width} x {header.height} pixels (width x height), but the annotation "
        f"is for {width} x {height}{hint}"
    )


def files_below(folder: Path, suffixes: Iterable[str]) -> list[str]:
    """Return the paths, relative to a folder and with slashes, of the files below it, sorted; none that are hidden."""
    endings, names = tuple(suffixes), []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = Path(parent).relative_to(folder)
        names += [
            (relative / name).as_posix()
            for name in files
            if name.lower().endswith(endings) and not name.startswith(".")
        ]
    return sorted(names)


class LabelledImage(NamedTuple):
    """An image and its objects."""

    name: str  # relative to the image folder
    header: Header
    objects: Sequence[LabelledObject]
    split: str = ""


def assemble(
    images: Iterable[LabelledImage], conversion: Conversion, declared: Sequence[dict[str, Any]] = ()
) -> dict[str, CocoData]:
    """Return the images and objects of each split in COCO format.

    The classes are those that the user gave, or else those that the annotations declare, or else the names that occur,
    sorted. All splits have the same. Image ids count over all splits.

    Args:
        images: the images, which are read one by one.
        conversion: see there.
        declared: COCO categories of the format. A reader may append to the list until the last image is read.

    Raises:
        InputError: an object has a class that is none of those given or declared, a split has an image twice, or there
            is no image or no class.
    """
    splits: dict[str, CocoData] = {}
    seen: set[tuple[str, str]] = set()
    entries: list[tuple[dict[str, Any], str, str]] = []  # annotation, its class, its image
    for image_id, image in enumerate(tqdm(images, desc="reading", unit="image", disable=None), start=1):
        if (image.split, image.name) in seen:
            raise InputError(f"{conversion.source}: the image {image.name} is annotated twice")
        seen.add((image.split, image.name))
        data = splits.setdefault(image.split, {"images": [], "annotations": [], "categories": []})
        size = {"height": image.header.height, "width": image.header.width}
        data["images"].append({"id": image_id, "file_name": image.name, **size})
        for item in image.objects:
            annotation = _annotation(len(data["annotations"]) + 1, image_id, item)
            data["annotations"].append(annotation)
            entries.append((annotation, item.class_name, image.name))
    if not splits:
        raise InputError(f"{conversion.source}: there is no annotated image")
    categories = _categories(conversion.classes, declared, {name for _, name, _ in entries})
    if not categories:
        raise InputError(f"{conversion.source}: there is no object, so there is no class; --classes names the classes")
    ids = {category["name"]: category["id"] for category in categories}
    for annotation, name, image_name in entries:
        if name not in ids:
            raise InputError(
                f"{conversion.source}: an object of {image_name} has the class {not_one_of(name, list(ids))}"
            )
        annotation["category_id"] = ids[name]
    for data in splits.values():
        data["categories"] = categories
    return splits


def _categories(classes: Sequence[str], declared: Sequence[dict[str, Any]], used: set[str]) -> list[dict[str, Any]]:
    if declared and not classes:
        return list(declared)
    return numbered(classes or sorted(used))


def _annotation(number: int, image_id: int, item: LabelledObject) -> dict[str, Any]:
    annotation: dict[str, Any] = {
        "id": number,
        "image_id": image_id,
        "category_id": 0,  # follows when all classes are known
        "bbox": list(item.box),
        "area": item.area,
        "iscrowd": int(item.crowd),
    }
    return annotation if item.segmentation is None else {**annotation, "segmentation": item.segmentation}


def numbered(names: Iterable[str]) -> list[dict[str, Any]]:
    """Return COCO categories with ids from 1 in the order of the names."""
    return [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
