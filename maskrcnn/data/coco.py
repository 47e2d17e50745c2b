"""Datasets in COCO's format: one JSON file (see `coco_file`) beside a folder of images.

The file is checked as a whole before training starts. What is kept of it lies in flat arrays.

Shapes: N images, A annotations, K classes.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate, chain
from pathlib import Path, PureWindowsPath
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from maskrcnn.config import Section
from maskrcnn.data.coco_file import (
    Annotation,
    Image,
    Polygon,
    Rle,
    complete_for_evaluation,
    listed,
    read_coco_json,
    refuse,
    run_lengths,
)
from maskrcnn.data.images import read_image
from maskrcnn.data.rle import crop_from_counts, crop_from_polygons, empty_crop
from maskrcnn.errors import InputError
from maskrcnn.structures import ClassTable, Example, MaskCrop

logger = logging.getLogger(__name__)


class CocoConfig(Section):
    """A dataset in COCO's format. Its paths are relative to `root`; in an experiment that is `data.root` by default."""

    kind: Literal["coco"] = "coco"
    root: Path | None = None
    annotations: Path
    images: Path
    crowd: Literal["ignore", "drop"] = "drop"  # "ignore" keeps crowd regions, labelled -1
    degenerate: Literal["refuse", "drop"] = "refuse"  # boxes without area, polygons with fewer than three points
    filter_empty: bool = False  # leave out images without objects
    image_ids: tuple[int, ...] = ()  # use these images only; all if none is named
    classes: tuple[str, ...] = ()  # use objects of these classes only, by name; all if none is named

    def build(self) -> CocoDataset:
        """Read and check the annotation file; InputError says what is wrong with it."""
        root = self.root or Path()
        return CocoDataset(
            root / self.annotations,
            root / self.images,
            crowd=self.crowd,
            degenerate=self.degenerate,
            filter_empty=self.filter_empty,
            image_ids=self.image_ids,
            classes=self.classes,
        )


# From the JSON to objects.


class _Object(NamedTuple):
    box: np.ndarray  # (4,) float32: x1, y1, x2, y2, inside the image
    label: int  # 1..K, -1 for a crowd
    polygons: Sequence[Polygon] = ()
    counts: Sequence[int] | np.ndarray = ()


class _ObjectReader:
    """Turns annotations into objects, and collects what is wrong with them."""

    def __init__(self, classes: ClassTable, *, keep_crowds: bool) -> None:
        self.labels = {category: i + 1 for i, category in enumerate(classes.category_ids)}
        self.keep_crowds = keep_crowds
        self.malformed: list[str] = []
        self.degenerate: list[str] = []

    def read(self, annotation: Annotation, image: Image) -> _Object | None:
        """Return the object; None for what cannot be used, and for crowds where they are dropped."""
        name = f"annotation {annotation['id']} (image {image['id']})"
        crowd = annotation.get("iscrowd", 0) == 1
        if crowd and not self.keep_crowds:
            return None
        box = _clipped_box(annotation["bbox"], image)
        if not (box[2:] > box[:2]).all():
            shown = ", ".join(f"{number:g}" for number in annotation["bbox"])
            self.degenerate.append(f"{name}: its box (x, y, width, height) = ({shown}) has no area in the image")
            return None
        if crowd:
            return _Object(box, -1)
        return self._with_mask(_Object(box, self.labels[annotation["category_id"]]), annotation, image, name)

    def _with_mask(self, bare: _Object, annotation: Annotation, image: Image, name: str) -> _Object | None:
        mask = annotation.get("segmentation")
        if mask is None:
            self.malformed.append(f"{name}: has no 'segmentation', which Mask R-CNN learns masks from")
            return None
        if isinstance(mask, list):
            polygons = self._polygons(mask, name)
            return bare._replace(polygons=polygons) if polygons else None
        counts = self._checked_counts(mask, image, name)
        return bare._replace(counts=counts) if len(counts) else None

    def _polygons(self, polygons: list[Polygon], name: str) -> list[Polygon]:
        if any(len(polygon) % 2 for polygon in polygons):
            self.malformed.append(f"{name}: a polygon has an odd count of numbers; they must be x, y pairs")
            return []
        usable = [polygon for polygon in polygons if len(polygon) >= 6]
        if not usable or len(usable) < len(polygons):
            self.degenerate.append(f"{name}: has a polygon with fewer than three points, or none at all")
        return usable

    def _checked_counts(self, mask: Rle, image: Image, name: str) -> np.ndarray:
        size = [image["height"], image["width"]]
        nothing = np.zeros(0, np.int64)
        if mask["size"] != size:
            self.malformed.append(f"{name}: its run-length code is for {mask['size']}, its image is {size}")
            return nothing
        try:
            counts = run_lengths(mask["counts"])
        except ValueError as error:
            self.malformed.append(f"{name}: {error}")
            return nothing
        if (counts < 0).any() or counts.sum() != size[0] * size[1]:
            self.malformed.append(f"{name}: its run lengths do not add up to the image's {size[0]} x {size[1]}")
            return nothing
        return counts


def _clipped_box(bbox: Sequence[float], image: Image) -> np.ndarray:
    x, y, width, height = bbox
    corners = np.array([[x, y], [x + width, y + height]])
    return corners.clip(0, [image["width"], image["height"]]).astype(np.float32).reshape(4)


# From objects to arrays.


class Ragged:
    """Rows of different lengths in one flat array.

    Worker processes then share one copy of the memory. Lists of Python objects they would copy bit by bit, because
    reading an object writes its reference count.
    """

    def __init__(self, rows: Sequence[Sequence[Any] | np.ndarray], dtype: type) -> None:
        ends = list(accumulate(map(len, rows), initial=0))
        self._ends = np.array(ends, np.int64)
        self._values: np.ndarray = np.fromiter(chain.from_iterable(rows), dtype, ends[-1])

    def __getitem__(self, row: int) -> np.ndarray:
        return self._values[self._ends[row] : self._ends[row + 1]]

    def span(self, row: int) -> range:
        """Return the positions of the row's values in the flat array."""
        return range(self._ends[row], self._ends[row + 1])


class CocoDataset:
    """Images and objects of one COCO annotation file, in ascending order of image ids.

    Labels run from 1 to K in ascending order of category ids, which may start anywhere and have gaps. An object
    whose polygon is too small to cover a pixel is kept, with a mask without pixels, as the reference frameworks do.

    Args:
        annotations: the JSON file.
        images: the folder that `file_name` is relative to.
        crowd: "drop" leaves crowd regions out; "ignore" keeps them with label -1 and without a mask.
        degenerate: what to do about boxes without area and polygons with fewer than three points: refuse the file,
            or drop them with a warning.
        filter_empty: leave out images without objects (crowds do not count).
        image_ids: if any, use these images only.
        classes: if any, use objects of these classes only. Images keep their place, with or without objects.

    Raises:
        InputError: the file is not as it should be, or the images are not there.
    """

    def __init__(
        self,
        annotations: Path,
        images: Path,
        *,
        crowd: Literal["ignore", "drop"] = "drop",
        degenerate: Literal["refuse", "drop"] = "refuse",
        filter_empty: bool = False,
        image_ids: tuple[int, ...] = (),
        classes: tuple[str, ...] = (),
    ) -> None:
        self._file, self._folder, self._class_names = annotations, images, classes
        data = self._read()
        categories = sorted(data["categories"], key=lambda category: category["id"])
        self.classes = ClassTable(
            names=tuple(category["name"] for category in categories),
            category_ids=tuple(category["id"] for category in categories),
        )
        chosen = _choose_images(annotations, data["images"], image_ids)
        reader = _ObjectReader(self.classes, keep_crowds=crowd == "ignore")
        objects = _read_objects(reader, chosen, data["annotations"])
        refuse(annotations, reader.malformed)
        self._handle_degenerate(reader.degenerate, degenerate)
        if filter_empty:
            chosen = [image for image in chosen if any(found.label > 0 for found in objects[image["id"]])]
        if not chosen:
            raise InputError(f"{annotations.absolute()}: no image with objects is left to use")
        self._store(chosen, [objects[image["id"]] for image in chosen])
        self._check_images()

    def __len__(self) -> int:
        return len(self._image_ids)

    def __getitem__(self, index: int) -> Example:
        """Read one image and its objects; InputError where the file and the JSON disagree."""
        pixels = read_image(self._path(index))
        self._check_size(index, (pixels.shape[1], pixels.shape[2]))
        rows = self._labels.span(index)
        return Example(
            image_id=self.image_id(index),
            pixels=pixels,
            boxes=torch.from_numpy(self._boxes[rows.start : rows.stop].copy()),
            labels=torch.from_numpy(self._labels[index].copy()),
            masks=tuple(self._mask(row, *self._sizes[index].tolist()) for row in rows),
        )

    def image_id(self, index: int) -> int:
        """Return the COCO id of an image."""
        return int(self._image_ids[index])

    def image_sizes(self) -> np.ndarray:
        """Return height and width of each image as the JSON states them, (N, 2) int64; opens no image."""
        return self._sizes

    def ground_truth(self) -> dict[str, Any]:
        """Return the annotation file again, with the images in use alone: what an evaluator compares with."""
        data = complete_for_evaluation(self._read())
        used = set(self._image_ids.tolist())
        data["images"] = [image for image in data["images"] if image["id"] in used]
        data["annotations"] = [entry for entry in data["annotations"] if entry["image_id"] in used]
        return data

    def _read(self) -> dict[str, Any]:
        """Return the annotation file, with the chosen classes alone."""
        data = read_coco_json(self._file)
        return _choose_classes(self._file, data, self._class_names) if self._class_names else data

    def _store(self, images: Sequence[Image], objects: Sequence[Sequence[_Object]]) -> None:
        flat = list(chain.from_iterable(objects))
        self._image_ids = np.array([image["id"] for image in images], np.int64)
        self._sizes = np.array([(image["height"], image["width"]) for image in images], np.int64)
        self._names = Ragged([image["file_name"].encode() for image in images], np.uint8)
        self._labels = Ragged([[found.label for found in row] for row in objects], np.int64)
        self._boxes = np.array([found.box for found in flat], np.float32).reshape(-1, 4)
        self._polygons = Ragged([list(chain.from_iterable(found.polygons)) for found in flat], np.float64)
        self._polygon_sizes = Ragged([[len(part) for part in found.polygons] for found in flat], np.int32)
        self._counts = Ragged([found.counts for found in flat], np.uint32)

    def _handle_degenerate(self, found: list[str], degenerate: Literal["refuse", "drop"]) -> None:
        if degenerate == "refuse":
            advice = "\nCorrect them, or set `degenerate: drop` beside `annotations` to go on without them."
            refuse(self._file, found, advice)
        elif found:
            logger.warning("%s: left out what has no area; %s", self._file, listed(found))

    def _path(self, index: int) -> Path:
        return self._folder / self._names[index].tobytes().decode()

    def _mask(self, row: int, height: int, width: int) -> MaskCrop:
        counts = self._counts[row]
        if len(counts):
            return crop_from_counts(counts, height)
        sizes = self._polygon_sizes[row]
        if len(sizes) == 0:
            return empty_crop()
        polygons = np.split(self._polygons[row], np.cumsum(sizes)[:-1])
        return crop_from_polygons(polygons, height, width)

    def _check_size(self, index: int, found: tuple[int, int]) -> None:
        stated = tuple(self._sizes[index].tolist())
        if found == stated:
            return
        turned = (
            " They match if turned: the annotations were probably made without regard to the image's EXIF orientation."
            if found == stated[::-1]
            else ""
        )
        raise InputError(
            f"{self._path(index).absolute()}: the image is {found[1]} x {found[0]} pixels (width x height), but "
            f"{self._file.name} says {stated[1]} x {stated[0]} (image {self.image_id(index)}).{turned}"
        )

    def _check_images(self) -> None:
        """Look for the folder and the first image, so that a wrong path shows before training."""
        first = self._path(0)
        if first.is_file():
            return
        what = f"no image {first.name}" if self._folder.is_dir() else "no such folder"
        raise InputError(
            f"{self._folder.absolute()}: {what}. Put there the images that {self._file.name} names, or set `root` or "
            "`images` in the config; datasets/README.md says how to get COCO and how to use your own data."
        )


def _choose_images(file: Path, images: Sequence[Image], image_ids: tuple[int, ...]) -> list[Image]:
    """Return the images to use, by ascending id; refuse unknown ids and file names that leave the folder."""
    absent = sorted(set(image_ids) - {image["id"] for image in images})
    refuse(file, [f"`image_ids` names image {key}, which is not in the file" for key in absent])
    refuse(
        file,
        [
            f"image {image['id']}: its file_name {image['file_name']!r} leads out of the image folder"
            for image in images
            if _leads_out(image["file_name"])
        ],
    )
    chosen = [image for image in images if not image_ids or image["id"] in set(image_ids)]
    return sorted(chosen, key=lambda image: image["id"])


def _choose_classes(file: Path, data: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Return the file with the categories of these names and their annotations alone; refuse unknown names."""
    known = {category["name"] for category in data["categories"]}
    refuse(file, [f"`classes` names '{name}', which is not in the file" for name in names if name not in known])
    categories = [category for category in data["categories"] if category["name"] in names]
    ids = {category["id"] for category in categories}
    annotations = [entry for entry in data["annotations"] if entry["category_id"] in ids]
    return {**data, "categories": categories, "annotations": annotations}


def _leads_out(name: str) -> bool:
    """Tell whether a file name is absolute or climbs up, on any system. A symbolic link is its owner's own will."""
    path = PureWindowsPath(name)  # which knows both kinds of slash
    return bool(path.anchor) or ".." in path.parts


def _read_objects(
    reader: _ObjectReader, images: Sequence[Image], annotations: Sequence[Annotation]
) -> dict[int, list[_Object]]:
    chosen = {image["id"]: image for image in images}
    objects: dict[int, list[_Object]] = defaultdict(list)
    for annotation in annotations:
        image = chosen.get(annotation["image_id"])
        found = reader.read(annotation, image) if image else None
        if found is not None:
            objects[annotation["image_id"]].append(found)
    return objects
