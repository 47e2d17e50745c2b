"""The annotations of a COCO file as flat arrays, which take a tenth of the memory of its Python objects.

Worker processes share the memory of arrays. They would copy Python objects page by page, because reading an object
changes its reference count.

Shapes: N images, A annotations, P polygons, V coordinates, C run lengths, K categories. Rows of different lengths are
stored one after another; `starts` of one entry more than there are rows say where each begins, and the last one ends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, compress
from typing import Any

import numpy as np

from maskrcnn.data.array_cache import Mapped
from maskrcnn.data.coco_file import Annotation, fit_in_image, run_lengths
from maskrcnn.data.findings import Finding
from maskrcnn.data.polygon_checks import without_pixels

FEWEST_POINTS = 3  # of a polygon


@dataclass(frozen=True)
class CocoArrays:
    """What training reads of a COCO annotation file: all but the masks of crowd regions.

    Images and categories are in ascending order of their ids. The annotations of an image are in the order of the file.
    Polygons of fewer than three points are left out, and so is a whole mask that is malformed.
    """

    image_ids: np.ndarray  # (N,) int64
    image_sizes: np.ndarray  # (N, 2) int64: height and width
    image_names: np.ndarray  # uint8: `file_name` of all images, UTF-8
    image_name_starts: np.ndarray  # (N + 1,) int64
    category_ids: np.ndarray  # (K,) int64
    category_names: np.ndarray  # uint8: names of all categories, UTF-8
    category_name_starts: np.ndarray  # (K + 1,) int64
    annotation_starts: np.ndarray  # (N + 1,) int64: the first annotation of each image
    ids: np.ndarray  # (A,) int64
    boxes: np.ndarray  # (A, 4) float64: x, y, width, height, as annotated
    categories: np.ndarray  # (A,) int32, 0..K-1: index of the category
    crowds: np.ndarray  # (A,) bool
    polygon_starts: np.ndarray  # (A + 1,) int64: the first polygon of each annotation
    coordinate_starts: np.ndarray  # (P + 1,) int64: the first coordinate of each polygon
    coordinates: np.ndarray  # (V,) float64: x, y, x, y, ...
    short_polygons: np.ndarray  # (A,) bool: a polygon was left out
    count_starts: np.ndarray  # (A + 1,) int64: the first run length of each annotation
    counts: np.ndarray  # (C,) uint32
    empty_masks: np.ndarray  # (A,) bool: there are polygons or run lengths, but they cover no pixel of the image
    malformed: Mapping[int, Finding] = field(default_factory=dict)  # what is wrong with masks, by annotation
    mapped: Mapped | None = None  # the cache file that the arrays are views of

    @classmethod
    def of(cls, mapped: Mapped) -> CocoArrays:
        """Return the arrays of a cache file."""
        arrays: dict[str, Any] = dict(mapped.arrays)
        return cls(**arrays, mapped=mapped)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.mapped is not None:  # another process maps the file, too
            return CocoArrays.of, (self.mapped,)
        return CocoArrays, tuple(getattr(self, each.name) for each in dataclasses.fields(self))

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays by name."""
        return {name: getattr(self, name) for name in self.layout()}

    @classmethod
    def layout(cls) -> list[str]:
        """Return the names of the arrays."""
        return [each.name for each in dataclasses.fields(cls) if each.name not in ("malformed", "mapped")]

    def image_name(self, image: int) -> str:
        """Return the `file_name` of an image by its index."""
        return _row(self.image_names, self.image_name_starts, image).tobytes().decode()

    def category_name(self, category: int) -> str:
        """Return the name of a category by its index."""
        return _row(self.category_names, self.category_name_starts, category).tobytes().decode()

    def polygons(self, annotation: int) -> list[np.ndarray]:
        """Return the polygons of an annotation, each `(x0, y0, x1, y1, ...)` float64."""
        first, last = self.polygon_starts[annotation : annotation + 2].tolist()
        return [_row(self.coordinates, self.coordinate_starts, polygon) for polygon in range(first, last)]

    def run_lengths(self, annotation: int) -> np.ndarray:
        """Return the run lengths of an annotation, uint32; empty if its mask is not run-length encoded."""
        return _row(self.counts, self.count_starts, annotation)


def _row(values: np.ndarray, starts: np.ndarray, row: int) -> np.ndarray:
    return values[starts[row] : starts[row + 1]]


def flatten(data: Mapping[str, Any]) -> CocoArrays:
    """Return the content of an annotation file as arrays.

    Args:
        data: in the schema of `CocoFile`. Its ids of images and categories are unique, and annotations name no others.
    """
    images = sorted(data["images"], key=lambda image: image["id"])
    categories = sorted(data["categories"], key=lambda category: category["id"])
    index_of_image = {image["id"]: index for index, image in enumerate(images)}
    index_of_category = {category["id"]: index for index, category in enumerate(categories)}
    image_of = np.array([index_of_image[entry["image_id"]] for entry in data["annotations"]], np.int64)
    order = np.argsort(image_of, kind="stable")
    entries = [data["annotations"][index] for index in order.tolist()]
    sizes = np.array([(image["height"], image["width"]) for image in images], np.int64).reshape(-1, 2)
    names, name_starts = _texts(image["file_name"] for image in images)
    category_names, category_name_starts = _texts(category["name"] for category in categories)
    return CocoArrays(
        image_ids=np.array([image["id"] for image in images], np.int64),
        image_sizes=sizes,
        image_names=names,
        image_name_starts=name_starts,
        category_ids=np.array([category["id"] for category in categories], np.int64),
        category_names=category_names,
        category_name_starts=category_name_starts,
        annotation_starts=np.searchsorted(image_of[order], np.arange(len(images) + 1)),
        ids=np.array([entry["id"] for entry in entries], np.int64),
        boxes=np.array([entry["bbox"] for entry in entries], np.float64).reshape(-1, 4),
        categories=np.array([index_of_category[entry["category_id"]] for entry in entries], np.int32),
        crowds=np.array([entry.get("iscrowd", 0) == 1 for entry in entries], np.bool_),
        **_masks(entries, sizes[image_of[order]]),
    )


def _texts(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    codes = [text.encode() for text in texts]
    return np.frombuffer(b"".join(codes), np.uint8), _starts(map(len, codes))


def _starts(lengths: Iterable[int]) -> np.ndarray:
    return np.array(list(accumulate(lengths, initial=0)), np.int64)


# Masks. Each of these functions returns fields of `CocoArrays`, and gets the annotations and their image sizes, (A, 2).


def _masks(entries: Sequence[Annotation], sizes: np.ndarray) -> dict[str, Any]:
    masks = [None if entry.get("iscrowd", 0) == 1 else entry.get("segmentation") for entry in entries]
    polygons, encoded = _polygons(entries, masks, sizes), _encoded(entries, masks, sizes)
    return {
        **polygons,
        **encoded,
        "empty_masks": polygons["empty_masks"] | encoded["empty_masks"],
        "malformed": polygons["malformed"] | encoded["malformed"],
    }


def _finding(fault: str, text: str, entry: Annotation) -> Finding:
    return Finding(fault, text, entry["image_id"], (entry["id"],))


def _polygons(entries: Sequence[Annotation], masks: Sequence[Any], sizes: np.ndarray) -> dict[str, Any]:
    of_entry = [mask if isinstance(mask, list) else () for mask in masks]
    owners = np.repeat(np.arange(len(masks)), np.fromiter(map(len, of_entry), np.int64, len(masks)))
    polygons = list(chain.from_iterable(of_entry))
    lengths = np.fromiter(map(len, polygons), np.int64, len(polygons))
    is_malformed, is_short = np.zeros(len(masks), np.bool_), np.zeros(len(masks), np.bool_)
    is_malformed[owners[lengths % 2 == 1]] = True
    is_short[owners[lengths < 2 * FEWEST_POINTS]] = True
    kept = (lengths >= 2 * FEWEST_POINTS) & ~is_malformed[owners]
    polygon_starts = np.append(0, np.cumsum(np.bincount(owners[kept], minlength=len(masks))))
    coordinate_starts = np.append(0, np.cumsum(lengths[kept]))
    values = chain.from_iterable(compress(polygons, kept.tolist()))
    coordinates = np.fromiter(values, np.float64, int(coordinate_starts[-1]))
    text = "a polygon has an odd number of coordinates; expected x, y pairs"
    return {
        "polygon_starts": polygon_starts,
        "coordinate_starts": coordinate_starts,
        "coordinates": coordinates,
        "short_polygons": is_short & ~is_malformed,
        "empty_masks": without_pixels(coordinates, coordinate_starts, polygon_starts, sizes),
        "malformed": {
            row: _finding("invalid_polygon", text, entries[row]) for row in np.flatnonzero(is_malformed).tolist()
        },
    }


def _encoded(entries: Sequence[Annotation], masks: Sequence[Any], sizes: np.ndarray) -> dict[str, Any]:
    counts: dict[int, np.ndarray] = {}
    malformed: dict[int, Finding] = {}
    for row, mask in enumerate(masks):
        if isinstance(mask, dict):
            try:
                counts[row] = _valid_counts(mask, sizes[row].tolist())
            except ValueError as error:
                malformed[row] = _finding("invalid_rle", str(error), entries[row])
    lengths, is_empty = np.zeros(len(masks), np.int64), np.zeros(len(masks), np.bool_)
    lengths[list(counts)] = [len(each) for each in counts.values()]
    is_empty[list(counts)] = [not each[1::2].any() for each in counts.values()]
    return {
        "count_starts": np.append(0, np.cumsum(lengths)),
        "counts": np.concatenate([np.zeros(0, np.uint32), *counts.values()]),
        "empty_masks": is_empty,
        "malformed": malformed,
    }


def _valid_counts(rle: Mapping[str, Any], size: list[int]) -> np.ndarray:
    """Return the run lengths of a mask, uint32. Raises ValueError if they are not those of an image of this size."""
    if rle["size"] != size:
        raise ValueError(f"its RLE mask has size {rle['size']}, but its image has size {size}")
    counts = run_lengths(rle["counts"])
    if not fit_in_image(counts, *size):
        raise ValueError(f"its run lengths do not add up to the image size, {size[0]} x {size[1]}")
    return counts.astype(np.uint32)
