"""Datasets in COCO format: one JSON annotation file (see `coco_file`) and an image folder.

The whole annotation file is validated when the dataset is built, and kept as flat arrays (`coco_arrays`).

Shapes: N images, G objects of an image, K classes.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from maskrcnn.data.array_cache import cached
from maskrcnn.data.coco_arrays import CocoArrays, flatten
from maskrcnn.data.coco_classes import choose_classes, choose_labels, rename_classes
from maskrcnn.data.coco_file import Image, complete_for_evaluation, listed, read_coco_json, refuse
from maskrcnn.data.coco_objects import Choice, Objects, choose_objects, findings_of, mask_of
from maskrcnn.data.dataset import DatasetConfig
from maskrcnn.data.findings import FAULTS, Finding, messages
from maskrcnn.data.image_checks import check_files, mismatch
from maskrcnn.data.images import read_image
from maskrcnn.data.provenance import count_and_ids, digest, file_digest
from maskrcnn.errors import InputError, first_of
from maskrcnn.paths import leaves_folder
from maskrcnn.structures import Example, MaskCrop

logger = logging.getLogger(__name__)


class CocoConfig(DatasetConfig):
    """A dataset in COCO format. Paths are relative to `root`, which defaults to `data.root` in an experiment."""

    kind: Literal["coco"] = "coco"
    root: Path | None = None
    annotations: Path
    images: Path
    crowd: Literal["ignore", "drop"] = "drop"  # "ignore" keeps crowd regions with label -1
    degenerate: Literal["refuse", "drop"] = "drop"  # boxes without area, masks without a pixel, too short polygons
    filter_empty: bool = False  # drop images without objects
    image_ids: tuple[int, ...] = ()  # use only these images; empty: all images
    classes: tuple[str, ...] = ()  # use only the classes with these names; empty: all classes
    rename: dict[str, str] = Field({}, description="new names of classes; those with the same name become one class")

    def build(self) -> CocoDataset:
        """Return the dataset.

        Raises:
            InputError: the annotation file is invalid, or the images are missing.
        """
        root = self.root or Path()
        return CocoDataset(
            root / self.annotations,
            root / self.images,
            crowd=self.crowd,
            degenerate=self.degenerate,
            filter_empty=self.filter_empty,
            image_ids=self.image_ids,
            classes=self.classes,
            rename=self.rename,
        )

    def with_root(self, root: Path) -> Self:
        """Return the config with the folder `root`, unless it has one."""
        return self.model_copy(update={"root": root}) if self.root is None else self

    def digest(self) -> str:
        """Return the digest of the annotation file; empty if there is none, which building the dataset refuses."""
        path = (self.root or Path()) / self.annotations
        return file_digest(path) if path.is_file() else ""


class AnnotatedObjects(NamedTuple):
    """The objects of an image, as `Example` has them."""

    boxes: Tensor  # (G, 4) float32
    labels: Tensor  # (G,) int64, 1..K; -1 for crowd regions
    masks: tuple[MaskCrop, ...]  # G of them
    has_mask: Tensor  # (G,) bool


class CocoDataset:
    """Images and objects of one COCO annotation file, in ascending order of image ids.

    Labels run from 1 to K in ascending order of category ids. The ids may start at any number and have gaps.

    An object whose `segmentation` is missing, null or an empty list has a box alone (`Example.has_mask`).

    Args:
        annotations: the JSON annotation file.
        images: the image folder; each `file_name` is relative to it.
        crowd: "drop" removes crowd regions; "ignore" keeps them with label -1 and an empty mask.
        degenerate: how to handle objects whose box has no area or whose mask no pixel, and polygons with fewer than
            three points: "refuse" raises InputError, "drop" removes them and logs a warning.
        filter_empty: drop images without objects; crowd regions are not objects.
        image_ids: use only these images; empty means all.
        classes: use only objects of these classes; empty means all. Images without such objects stay in the dataset.
        rename: new names of some of these classes. Classes that then have the same name are one, with the lowest id.

    Raises:
        InputError: the annotation file is invalid, or the images are missing.
    """

    def __init__(
        self,
        annotations: Path,
        images: Path,
        *,
        crowd: Literal["ignore", "drop"] = "drop",
        degenerate: Literal["refuse", "drop"] = "drop",
        filter_empty: bool = False,
        image_ids: tuple[int, ...] = (),
        classes: tuple[str, ...] = (),
        rename: Mapping[str, str] | None = None,
    ) -> None:
        self._file, self._folder, self._class_names, self._rename = annotations, images, classes, dict(rename or {})
        self._arrays = read_arrays(annotations)
        labels, self.classes = choose_labels(annotations, self._arrays, classes, self._rename)
        chosen = _choose_images(annotations, self._arrays.image_ids, image_ids)
        choice = choose_objects(self._arrays, chosen, labels, keep_crowds=crowd == "ignore")
        self._handle_faults(choice, degenerate)
        self._objects, self._dropped = choice.objects, choice.dropped
        self._without_mask = np.sort(self._arrays.ids[choice.faults["no_mask"]])
        if len(self._without_mask):
            logger.warning(
                "%s: %d of %d objects have no mask (`segmentation`); they train the boxes alone",
                annotations,
                len(self._without_mask),
                len(self._objects.rows),
            )
        if filter_empty:
            is_used = np.isin(chosen, self._objects.images[self._objects.labels > 0])
            self._dropped["images without objects"] = self._arrays.image_ids[chosen[~is_used]]
            chosen = chosen[is_used]
        if not len(chosen):
            raise InputError(f"{annotations.absolute()}: no image with objects is left to use")
        self._images = chosen
        sides: tuple[Literal["left", "right"], ...] = ("left", "right")
        self._spans = np.stack([np.searchsorted(self._objects.images, chosen, side) for side in sides], axis=1)
        self._check_images()

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Example:
        """Return one image with its objects.

        Raises:
            InputError: the image cannot be read, or its size differs from the annotation file.
        """
        pixels = read_image(self._path(index))
        self._check_size(index, (pixels.shape[1], pixels.shape[2]))
        return Example(image_id=self.image_id(index), pixels=pixels, **self.objects(index)._asdict())

    def objects(self, index: int) -> AnnotatedObjects:
        """Return the objects of an image, which is not opened."""
        first, last = self._spans[index].tolist()
        objects, (height, width) = Objects(*(column[first:last] for column in self._objects)), self._size(index)
        return AnnotatedObjects(
            boxes=torch.from_numpy(objects.boxes.copy()),
            labels=torch.from_numpy(objects.labels.copy()),
            masks=tuple(mask_of(self._arrays, row, height, width) for row in objects.rows.tolist()),
            has_mask=torch.from_numpy(objects.has_mask.copy()),
        )

    def _size(self, index: int) -> tuple[int, int]:
        height, width = self._arrays.image_sizes[self._images[index]].tolist()
        return height, width

    def image_id(self, index: int) -> int:
        """Return the COCO id of an image."""
        return int(self._arrays.image_ids[self._images[index]])

    def labels(self, index: int) -> np.ndarray:
        """Return the labels of the objects of an image, (G,) int64. The image is not opened."""
        first, last = self._spans[index].tolist()
        return self._objects.labels[first:last]

    def image_name(self, index: int) -> str:
        """Return the `file_name` of an image, relative to the image folder."""
        return self._arrays.image_name(int(self._images[index]))

    def image_sizes(self) -> np.ndarray:
        """Return height and width of each image from the annotation file, (N, 2) int64. No image is opened."""
        return self._arrays.image_sizes[self._images]

    def ground_truth(self) -> dict[str, Any]:
        """Return the annotation data for evaluation, restricted to the images and classes of this dataset."""
        data = complete_for_evaluation(self._read())
        used = set(self._arrays.image_ids[self._images].tolist())
        data["images"] = [image for image in data["images"] if image["id"] in used]
        data["annotations"] = [entry for entry in data["annotations"] if entry["image_id"] in used]
        return data

    def files(self) -> list[str]:
        """Return the path of each image file; symbolic links of the image folder are resolved."""
        folder = os.path.realpath(self._folder)
        return [os.path.join(folder, self.image_name(index)) for index in range(len(self))]

    def check_files(self) -> list[Finding]:
        """Return what is wrong with the image files; see `image_checks.check_file`."""
        ids = self._arrays.image_ids[self._images].tolist()
        return check_files(self.files(), self.image_sizes(), ids, self._file.name)

    def origin(self) -> dict[str, str]:
        """Return the annotation file and the image files with digests, and ids of objects by what is said of them."""
        names = (self.image_name(index) for index in range(len(self)))
        return {
            "annotations": f"{self._file.name}, sha256 {file_digest(self._file)}",
            "files": f"in {self._folder.name}, sha256 of their names {digest(names)}",
            **(
                {"objects without a mask": count_and_ids(self._without_mask.tolist())}
                if len(self._without_mask)
                else {}
            ),
            **{f"dropped {reason}": count_and_ids(ids.tolist()) for reason, ids in self._dropped.items() if len(ids)},
        }

    def _read(self) -> dict[str, Any]:
        """Return the content of the annotation file, restricted to the chosen classes, with their new names."""
        data = read_coco_json(self._file)
        data = choose_classes(self._file, data, self._class_names) if self._class_names else data
        return rename_classes(self._file, data, self._rename) if self._rename else data

    def _handle_faults(self, choice: Choice, degenerate: Literal["refuse", "drop"]) -> None:
        """Raise InputError for what training refuses, and report what it drops."""
        faults = {fault: rows for fault, rows in choice.faults.items() if FAULTS[fault].treatment != "kept"}
        findings = findings_of(self._arrays, faults)
        refuse(self._file, messages(findings, "refused"))
        problems = messages(findings, "dropped")
        if degenerate == "refuse":
            advice = "\nCorrect them, or set `degenerate: drop` beside `annotations` to drop them."
            refuse(self._file, problems, advice)
        elif problems:
            logger.warning("%s: dropped degenerate objects and polygons; %s", self._file, listed(problems))

    def _path(self, index: int) -> Path:
        return self._folder / self.image_name(index)

    def _check_size(self, index: int, size: tuple[int, int]) -> None:
        """Raise InputError if the (height, width) of an image differs from the annotation file."""
        problem = mismatch(size, self._size(index), self._file.name, self.image_id(index))
        if problem:
            raise InputError(f"{self._path(index).absolute()}: {problem}")

    def _check_images(self) -> None:
        """Check that every image exists, so that a missing one is found before training."""
        names = [self.image_name(index) for index in range(len(self))]
        missing = _missing_files(self._folder, names)
        if not missing:
            return
        problem = (
            f"{len(missing)} of {len(names)} images are missing: {', '.join(first_of(missing))}"
            if os.path.isdir(self._folder)
            else "no such folder"
        )
        raise InputError(
            f"{self._folder.absolute()}: {problem}. Put the images of {self._file.name} there, or set `root` or "
            "`images` in the config; datasets/README.md says how to get COCO and how to use your own data."
        )


def _missing_files(folder: Path, names: Sequence[str]) -> list[str]:
    """Return the names, relative to `folder`, that are no files. Folders are listed: a call per file is slow on NFS."""
    present: set[str] = set()
    for subfolder in {os.path.dirname(name) for name in names}:
        with suppress(OSError, ValueError), os.scandir(folder / subfolder) as entries:
            found = [entry for entry in entries if entry.is_file(follow_symlinks=False) or os.path.isfile(entry.path)]
            present.update(os.path.join(subfolder, entry.name) for entry in found)
    # A listing may spell a name in another way: letters of another case, or accents.
    return [name for name in names if name not in present and not os.path.isfile(folder / name)]


def read_arrays(path: Path) -> CocoArrays:
    """Return the content of an annotation file; that of a large file is cached (`array_cache`).

    Raises:
        InputError: the file cannot be read or is invalid, or a file name points outside the image folder.
    """
    read = cache(partial(_read_json, path))
    mapped = cached(path, CocoArrays.layout(), lambda: None if read().malformed else read().arrays())
    return read() if mapped is None else CocoArrays.of(mapped)


def _read_json(path: Path) -> CocoArrays:
    with _without_collector():
        return _from_json(path)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Do not look for cycles in the block: the objects of a large file have none, and a look takes seconds."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _from_json(path: Path) -> CocoArrays:
    data = read_coco_json(path)
    refuse(path, [finding.message for finding in name_faults(data["images"])])
    return flatten(data)


def _choose_images(file: Path, image_ids: np.ndarray, wanted: tuple[int, ...]) -> np.ndarray:
    """Return the indices of the images to use, ascending; all if `wanted` is empty.

    Raises:
        InputError: an id is unknown.
    """
    unknown = sorted(set(wanted) - set(image_ids.tolist()))
    refuse(file, [f"`image_ids` names image {key}, which is not in the file" for key in unknown])
    return np.flatnonzero(np.isin(image_ids, np.array(wanted))) if wanted else np.arange(len(image_ids))


def name_faults(images: Sequence[Image]) -> list[Finding]:
    """Return the file names that point outside the image folder."""
    return [
        Finding("outside_folder", f"its file_name {image['file_name']!r} points outside the image folder", image["id"])
        for image in images
        if leaves_folder(image["file_name"])
    ]
