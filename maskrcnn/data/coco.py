"""Datasets in COCO format: one JSON annotation file (see `coco_file`) and an image folder.

The whole annotation file is validated when the dataset is built. The annotations are stored in flat arrays.

Shapes: N images, A annotations, K classes.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field
from typing_extensions import Self

from maskrcnn.data.coco_file import (
    Annotation,
    Image,
    Polygon,
    Rle,
    complete_for_evaluation,
    fit_in_image,
    listed,
    read_coco_json,
    refuse,
    run_lengths,
)
from maskrcnn.data.dataset import DatasetConfig
from maskrcnn.data.findings import Finding, messages
from maskrcnn.data.image_checks import check_files, mismatch
from maskrcnn.data.images import read_image
from maskrcnn.data.polygon_checks import without_pixels
from maskrcnn.data.provenance import count_and_ids, digest, file_digest
from maskrcnn.data.rle import crop_from_counts, crop_from_polygons, empty_crop
from maskrcnn.errors import InputError, first_of
from maskrcnn.paths import leaves_folder
from maskrcnn.structures import ClassTable, Example, MaskCrop

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


# Parsing of annotations.


class CocoObject(NamedTuple):
    """An object as training uses it."""

    box: np.ndarray  # (4,) float32: x1, y1, x2, y2, inside the image
    label: int  # 1..K, -1 for a crowd
    has_mask: bool = False
    polygons: Sequence[Polygon] = ()
    counts: Sequence[int] | np.ndarray = ()


class ObjectReader:
    """Converts annotations to objects, and collects what is wrong with them."""

    def __init__(self, classes: ClassTable, *, keep_crowds: bool) -> None:
        self.labels = {category: i + 1 for i, category in enumerate(classes.category_ids)}
        self.keep_crowds = keep_crowds
        self.findings: list[Finding] = []
        self.dropped: dict[str, list[int]] = {"crowd regions": [], "degenerate objects": []}  # ids by reason

    def read(self, annotations: Sequence[Annotation], images: Mapping[int, Image]) -> list[CocoObject | None]:
        """Return the object of each annotation, None for an invalid annotation or a dropped crowd region.

        Args:
            annotations: of these images.
            images: by id.
        """
        items = [self._read(annotation, images[annotation["image_id"]]) for annotation in annotations]
        drawn = [index for index, item in enumerate(items) if item is not None and item.polygons]
        owners = [images[annotations[index]["image_id"]] for index in drawn]
        sizes = np.array([(image["height"], image["width"]) for image in owners], np.int64).reshape(-1, 2)
        polygons = [item.polygons for item in items if item is not None and item.polygons]
        for position in np.flatnonzero(without_pixels(polygons, sizes)).tolist():
            self._report("empty_mask", annotations[drawn[position]], "its polygons cover no pixel of the image")
            items[drawn[position]] = None
        return items

    def _report(self, fault: str, annotation: Annotation, text: str) -> None:
        self.findings.append(Finding(fault, text, annotation["image_id"], (annotation["id"],)))

    def _read(self, annotation: Annotation, image: Image) -> CocoObject | None:
        crowd = annotation.get("iscrowd", 0) == 1
        if crowd and not self.keep_crowds:
            return None
        box = _clipped_box(annotation["bbox"], image)
        if not (box[2:] > box[:2]).all():
            bbox = ", ".join(f"{number:g}" for number in annotation["bbox"])
            text = f"its box (x, y, width, height) = ({bbox}) has no area inside the image"
            self._report("empty_box", annotation, text)
            return None
        if crowd:
            return CocoObject(box, -1)
        return self._with_mask(CocoObject(box, self.labels[annotation["category_id"]]), annotation, image)

    def _with_mask(self, mask_free: CocoObject, annotation: Annotation, image: Image) -> CocoObject | None:
        """Return the object with its mask, if it has one, or None where the mask is invalid."""
        segmentation = annotation.get("segmentation")
        if segmentation is None or segmentation == []:
            self._report("no_mask", annotation, "has no `segmentation`")
            return mask_free
        if isinstance(segmentation, list):
            polygons = self._valid_polygons(segmentation, annotation)
            return mask_free._replace(polygons=polygons, has_mask=True) if polygons else None
        counts = self._valid_counts(segmentation, image, annotation)
        return mask_free._replace(counts=counts, has_mask=True) if len(counts) else None

    def _valid_polygons(self, polygons: list[Polygon], annotation: Annotation) -> list[Polygon]:
        if any(len(polygon) % 2 for polygon in polygons):
            text = "a polygon has an odd number of coordinates; expected x, y pairs"
            self._report("invalid_polygon", annotation, text)
            return []
        valid = [polygon for polygon in polygons if len(polygon) >= 6]
        if not valid or len(valid) < len(polygons):
            self._report("short_polygon", annotation, "has a polygon with fewer than three points")
        return valid

    def _valid_counts(self, rle: Rle, image: Image, annotation: Annotation) -> np.ndarray:
        """Return the run lengths, int64; empty where they are invalid, or those of a mask without a pixel."""
        size = [image["height"], image["width"]]
        empty = np.zeros(0, np.int64)
        if rle["size"] != size:
            text = f"its RLE mask has size {rle['size']}, but its image has size {size}"
            self._report("invalid_rle", annotation, text)
            return empty
        try:
            counts = run_lengths(rle["counts"])
        except ValueError as error:
            self._report("invalid_rle", annotation, str(error))
            return empty
        if not fit_in_image(counts, *size):
            text = f"its run lengths do not add up to the image size, {size[0]} x {size[1]}"
            self._report("invalid_rle", annotation, text)
            return empty
        if not counts[1::2].any():
            self._report("empty_mask", annotation, "its run lengths have no pixel of the object")
            return empty
        return counts


def _clipped_box(bbox: Sequence[float], image: Image) -> np.ndarray:
    x, y, width, height = bbox
    corners = np.array([[x, y], [x + width, y + height]])
    return corners.clip(0, [image["width"], image["height"]]).astype(np.float32).reshape(4)


# Storage in flat arrays.


class Ragged:
    """Rows of different lengths, stored in one flat array.

    Forked worker processes share the memory of an array. They would copy a list of Python objects page by page,
    because reading an object updates its reference count.
    """

    def __init__(self, rows: Sequence[Sequence[Any] | np.ndarray], dtype: type) -> None:
        ends = list(accumulate(map(len, rows), initial=0))
        self._ends = np.array(ends, np.int64)
        self._values: np.ndarray = np.fromiter(chain.from_iterable(rows), dtype, ends[-1])

    def __getitem__(self, row: int) -> np.ndarray:
        return self._values[self._ends[row] : self._ends[row + 1]]

    def span(self, row: int) -> range:
        """Return the indices of the row's values in the flat array."""
        return range(self._ends[row], self._ends[row + 1])


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
        data = self._read()
        categories = sorted(data["categories"], key=lambda category: category["id"])
        self.classes = ClassTable(
            names=tuple(category["name"] for category in categories),
            category_ids=tuple(category["id"] for category in categories),
        )
        chosen = _choose_images(annotations, data["images"], image_ids)
        reader = ObjectReader(self.classes, keep_crowds=crowd == "ignore")
        objects = _read_objects(reader, chosen, data["annotations"])
        refuse(annotations, messages(reader.findings, "refused"))
        self._handle_degenerate(messages(reader.findings, "dropped"), degenerate)
        self._dropped = reader.dropped
        self._without_mask = [id_ for item in reader.findings if item.fault == "no_mask" for id_ in item.annotation_ids]
        if self._without_mask:
            logger.warning(
                "%s: %s have no mask (`segmentation`); they train the boxes alone",
                annotations,
                f"{len(self._without_mask)} of {sum(map(len, objects.values()))} objects",
            )
        if filter_empty:
            used = {key for key, items in objects.items() if any(item.label > 0 for item in items)}
            self._dropped["images without objects"] = [image["id"] for image in chosen if image["id"] not in used]
            chosen = [image for image in chosen if image["id"] in used]
        if not chosen:
            raise InputError(f"{annotations.absolute()}: no image with objects is left to use")
        self._store(chosen, [objects[image["id"]] for image in chosen])
        self._check_images()

    def __len__(self) -> int:
        return len(self._image_ids)

    def __getitem__(self, index: int) -> Example:
        """Return one image with its objects.

        Raises:
            InputError: the image cannot be read, or its size differs from the annotation file.
        """
        pixels = read_image(self._path(index))
        self._check_size(index, (pixels.shape[1], pixels.shape[2]))
        rows = self._labels.span(index)
        return Example(
            image_id=self.image_id(index),
            pixels=pixels,
            boxes=torch.from_numpy(self._boxes[rows.start : rows.stop].copy()),
            labels=torch.from_numpy(self._labels[index].copy()),
            masks=tuple(self._mask(row, *self._sizes[index].tolist()) for row in rows),
            has_mask=torch.from_numpy(self._has_mask[rows.start : rows.stop].copy()),
        )

    def image_id(self, index: int) -> int:
        """Return the COCO id of an image."""
        return int(self._image_ids[index])

    def labels(self, index: int) -> np.ndarray:
        """Return the labels of the objects of an image, (G,) int64. The image is not opened."""
        return self._labels[index]

    def image_name(self, index: int) -> str:
        """Return the `file_name` of an image, relative to the image folder."""
        return self._names[index].tobytes().decode()

    def image_sizes(self) -> np.ndarray:
        """Return height and width of each image from the annotation file, (N, 2) int64. No image is opened."""
        return self._sizes

    def ground_truth(self) -> dict[str, Any]:
        """Return the annotation data for evaluation, restricted to the images and classes of this dataset."""
        data = complete_for_evaluation(self._read())
        used = set(self._image_ids.tolist())
        data["images"] = [image for image in data["images"] if image["id"] in used]
        data["annotations"] = [entry for entry in data["annotations"] if entry["image_id"] in used]
        return data

    def files(self) -> list[str]:
        """Return the path of each image file; symbolic links of the image folder are resolved."""
        folder = os.path.realpath(self._folder)
        return [os.path.join(folder, self.image_name(index)) for index in range(len(self))]

    def check_files(self) -> list[Finding]:
        """Return what is wrong with the image files; see `image_checks.check_file`."""
        return check_files(self.files(), self._sizes, self._image_ids.tolist(), self._file.name)

    def origin(self) -> dict[str, str]:
        """Return the annotation file and the image files with digests, and ids of objects by what is said of them."""
        names = (self.image_name(index) for index in range(len(self)))
        return {
            "annotations": f"{self._file.name}, sha256 {file_digest(self._file)}",
            "files": f"in {self._folder.name}, sha256 of their names {digest(names)}",
            **({"objects without a mask": count_and_ids(self._without_mask)} if self._without_mask else {}),
            **{f"dropped {reason}": count_and_ids(ids) for reason, ids in self._dropped.items() if ids},
        }

    def _read(self) -> dict[str, Any]:
        """Return the content of the annotation file, restricted to the chosen classes, with their new names."""
        data = read_coco_json(self._file)
        data = choose_classes(self._file, data, self._class_names) if self._class_names else data
        return rename_classes(self._file, data, self._rename) if self._rename else data

    def _store(self, images: Sequence[Image], objects: Sequence[Sequence[CocoObject]]) -> None:
        flat = list(chain.from_iterable(objects))
        self._image_ids = np.array([image["id"] for image in images], np.int64)
        self._sizes = np.array([(image["height"], image["width"]) for image in images], np.int64)
        self._names = Ragged([image["file_name"].encode() for image in images], np.uint8)
        self._labels = Ragged([[item.label for item in row] for row in objects], np.int64)
        self._boxes = np.array([item.box for item in flat], np.float32).reshape(-1, 4)
        self._has_mask = np.array([item.has_mask for item in flat], np.bool_)
        self._polygons = Ragged([list(chain.from_iterable(item.polygons)) for item in flat], np.float64)
        self._polygon_sizes = Ragged([[len(polygon) for polygon in item.polygons] for item in flat], np.int32)
        self._counts = Ragged([item.counts for item in flat], np.uint32)

    def _handle_degenerate(self, problems: list[str], degenerate: Literal["refuse", "drop"]) -> None:
        if degenerate == "refuse":
            advice = "\nCorrect them, or set `degenerate: drop` beside `annotations` to drop them."
            refuse(self._file, problems, advice)
        elif problems:
            logger.warning("%s: dropped degenerate objects and polygons; %s", self._file, listed(problems))

    def _path(self, index: int) -> Path:
        return self._folder / self.image_name(index)

    def _mask(self, row: int, height: int, width: int) -> MaskCrop:
        counts = self._counts[row]
        if len(counts):
            return crop_from_counts(counts, height)
        sizes = self._polygon_sizes[row]
        if len(sizes) == 0:
            return empty_crop()
        polygons = np.split(self._polygons[row], np.cumsum(sizes)[:-1])
        return crop_from_polygons(polygons, height, width)

    def _check_size(self, index: int, size: tuple[int, int]) -> None:
        """Raise InputError if the (height, width) of an image differs from the annotation file."""
        height, width = self._sizes[index].tolist()
        problem = mismatch(size, (height, width), self._file.name, self.image_id(index))
        if problem:
            raise InputError(f"{self._path(index).absolute()}: {problem}")

    def _check_images(self) -> None:
        """Check that every image exists, so that a missing one is found before training."""
        names = [self._names[index].tobytes().decode() for index in range(len(self))]
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


def _choose_images(file: Path, images: Sequence[Image], image_ids: tuple[int, ...]) -> list[Image]:
    """Return the images to use in ascending order of id.

    Raises:
        InputError: an id is unknown, or a file name points outside the image folder.
    """
    wanted = set(image_ids)
    unknown = sorted(wanted - {image["id"] for image in images})
    refuse(file, [f"`image_ids` names image {key}, which is not in the file" for key in unknown])
    refuse(file, [finding.message for finding in name_faults(images)])
    chosen = [image for image in images if not wanted or image["id"] in wanted]
    return sorted(chosen, key=lambda image: image["id"])


def name_faults(images: Sequence[Image]) -> list[Finding]:
    """Return the file names that point outside the image folder."""
    return [
        Finding("outside_folder", f"its file_name {image['file_name']!r} points outside the image folder", image["id"])
        for image in images
        if leaves_folder(image["file_name"])
    ]


def choose_classes(file: Path, data: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Return the annotation data with only the named categories and their annotations.

    Raises:
        InputError: a name is unknown.
    """
    known = {category["name"] for category in data["categories"]}
    refuse(file, [f"`classes` names '{name}', which is not in the file" for name in names if name not in known])
    categories = [category for category in data["categories"] if category["name"] in names]
    ids = {category["id"] for category in categories}
    annotations = [entry for entry in data["annotations"] if entry["category_id"] in ids]
    return {**data, "categories": categories, "annotations": annotations}


def rename_classes(file: Path, data: dict[str, Any], rename: Mapping[str, str]) -> dict[str, Any]:
    """Return the annotation data with new class names; classes of the same name become one, with the lowest id.

    Raises:
        InputError: a name is unknown.
    """
    known = {category["name"] for category in data["categories"]}
    refuse(file, [f"`rename` names '{name}', which is not among the classes" for name in rename if name not in known])
    categories: dict[str, dict[str, Any]] = {}
    new_ids: dict[int, int] = {}
    for category in sorted(data["categories"], key=lambda category: category["id"]):
        name = rename.get(category["name"], category["name"])
        new_ids[category["id"]] = categories.setdefault(name, {**category, "name": name})["id"]
    annotations = [
        {**entry, "category_id": new_ids.get(entry["category_id"], entry["category_id"])}
        for entry in data["annotations"]
    ]
    return {**data, "categories": list(categories.values()), "annotations": annotations}


def _read_objects(
    reader: ObjectReader, images: Sequence[Image], annotations: Sequence[Annotation]
) -> dict[int, list[CocoObject]]:
    chosen = {image["id"]: image for image in images}
    objects: dict[int, list[CocoObject]] = defaultdict(list)
    used = [annotation for annotation in annotations if annotation["image_id"] in chosen]
    for annotation, item in zip(used, reader.read(used, chosen), strict=True):
        if item is not None:
            objects[annotation["image_id"]].append(item)
        else:
            is_crowd = annotation.get("iscrowd", 0) == 1 and not reader.keep_crowds
            reader.dropped["crowd regions" if is_crowd else "degenerate objects"].append(annotation["id"])
    return objects
