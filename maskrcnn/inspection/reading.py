"""Reading every image of a split once, in worker processes: what is wrong with it, and what it holds.

Shapes: G objects of an image that training uses, without crowd regions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from maskrcnn.data.coco_arrays import CocoArrays, flatten
from maskrcnn.data.coco_file import Annotation, Image
from maskrcnn.data.coco_objects import choose_objects, findings_of, mask_of
from maskrcnn.data.findings import Finding
from maskrcnn.data.image_checks import DARK, Header, mismatch, read_header, unreadable, why_dark
from maskrcnn.data.images import read_image
from maskrcnn.data.loader import ignore_signals
from maskrcnn.data.transforms import Compose, Resize, Transform, resized_size
from maskrcnn.errors import InputError
from maskrcnn.inspection.objects import Checked, object_findings
from maskrcnn.inspection.similarity import perceptual_hash
from maskrcnn.inspection.subject import Subject
from maskrcnn.paths import read_file
from maskrcnn.structures import IDENTITY, AxisAlignedMap, Example

LARGEST = 2**26  # pixels; masks of larger images are decoded only if the image file has that size
FEW = 32  # images that are read faster than worker processes start


class ReadImage(NamedTuple):
    """What was seen in one image. Arrays are without pixels, because worker processes send it."""

    findings: tuple[Finding, ...]
    labels: np.ndarray  # (G,) int64
    boxes: np.ndarray  # (G, 4) float32: x1, y1, x2, y2 at the resolution of the validation transforms
    areas: np.ndarray  # (G,) int64: pixels of the masks, in the image
    digest: bytes  # of the file; empty if there is none
    hash: np.ndarray | None  # `perceptual_hash`


class _Images(Dataset):
    """Reads the images of a split."""

    def __init__(self, subject: Subject, transform: Transform) -> None:
        self.subject, self.transform = subject, transform
        self.labels = {category: label for label, category in enumerate(subject.classes.category_ids, 1)}
        self.indices = _indices(subject)
        self.placements: dict[tuple[int, int], AxisAlignedMap] = {}

    def __getitem__(self, index: int) -> ReadImage:
        image = self.subject.images[index]
        annotations = self.subject.annotations_of.get(image["id"], [])
        digest, pixels, of_file = self._read_pixels(image)
        size = image["height"], image["width"]
        is_real = pixels is not None and tuple(pixels.shape[1:]) == size
        is_bounded = is_real or size[0] * size[1] <= LARGEST
        objects, of_objects = self._read_objects(annotations if is_bounded else [], image)
        if size not in self.placements:
            self.placements[size] = _placement(self.transform, *size)
        scale, offset = _as_arrays(self.placements[size])
        return ReadImage(
            (*of_file, *of_objects),
            np.array([checked.label for checked in objects], np.int64),
            np.array([checked.box for checked in objects], np.float32).reshape(-1, 4) * scale + offset,
            np.array([int(checked.mask.pixels.sum()) for checked in objects], np.int64),
            digest,
            None if pixels is None else perceptual_hash(pixels),
        )

    def _read_pixels(self, image: Image) -> tuple[bytes, Tensor | None, list[Finding]]:
        """Return the digest of the file, the decoded image if it can be read, and what is wrong."""
        path = self.subject.path(image)
        if path is None:
            return b"", *self._pixels_of_dataset(image)
        try:
            header = read_header(path)
        except InputError as error:
            return b"", None, [_of_file(unreadable(path, image["id"], error), image)]
        try:
            pixels = read_image(path)
        except InputError as error:
            return b"", None, [_of_file(unreadable(path, image["id"], error, has_header=True), image)]
        findings = [*self._size_findings(header, pixels, image), *_darkness(pixels, path, image)]
        return hashlib.sha256(read_file(path)).digest(), pixels, findings

    def _pixels_of_dataset(self, image: Image) -> tuple[Tensor | None, list[Finding]]:
        dataset = self.subject.dataset
        if dataset is None or image["id"] not in self.indices:
            return None, []
        try:
            return dataset[self.indices[image["id"]]].pixels, []
        except InputError as error:
            return None, [Finding("unreadable_image", str(error), image["id"], file=image["file_name"])]

    def _size_findings(self, header: Header, pixels: Tensor, image: Image) -> Iterator[Finding]:
        size, expected = (pixels.shape[1], pixels.shape[2]), (image["height"], image["width"])
        text = mismatch(size, expected, self.subject.annotations_name, image["id"])
        turns = header.orientation in range(2, 9)
        if text:
            fault = "exif_mismatch" if turns and size == expected[::-1] else "size_mismatch"
            yield Finding(fault, text, image["id"], file=image["file_name"])
        elif turns and (header.orientation < 5 or size[0] == size[1]):
            text = f"its EXIF orientation is {header.orientation}, which keeps the size"
            yield Finding("exif_orientation", text, image["id"], file=image["file_name"])

    def _read_objects(self, annotations: Sequence[Annotation], image: Image) -> tuple[list[Checked], list[Finding]]:
        """Return the objects that training uses, without crowd regions, and what is wrong."""
        arrays = _arrays_of(annotations, image)
        labels = np.array([self.labels[category] for category in arrays.category_ids.tolist()], np.int64)
        choice = choose_objects(arrays, np.zeros(1, np.int64), labels, keep_crowds=True)
        rows, _, boxes, labels, _ = choice.objects
        objects = [
            Checked(
                annotations[row],
                label,
                box,
                arrays.polygons(row),
                mask_of(arrays, row, image["height"], image["width"]),
            )
            for row, box, label in zip(rows.tolist(), boxes, labels.tolist(), strict=True)
            if label > 0
        ]
        findings = [
            *findings_of(arrays, choice.faults),
            *object_findings(objects, self.subject.classes.names, image),
        ]
        file = image["file_name"]
        return objects, [finding._replace(file=file) for finding in findings]


def _arrays_of(annotations: Sequence[Annotation], image: Image) -> CocoArrays:
    """Return the annotations of one image, in their order, with the categories that they name."""
    ids = {annotation["category_id"] for annotation in annotations}
    categories = [{"id": key, "name": ""} for key in ids]
    return flatten({"images": [image], "annotations": annotations, "categories": categories})


def _indices(subject: Subject) -> dict[int, int]:
    dataset = subject.dataset
    return {} if dataset is None else {dataset.image_id(index): index for index in range(len(dataset))}


def _of_file(finding: Finding, image: Image) -> Finding:
    return finding._replace(file=image["file_name"])


def _darkness(pixels: Tensor, path: Path, image: Image) -> Iterator[Finding]:
    if pixels.max() < DARK:
        text = f"it has no value above {DARK - 1} of 255; {why_dark(path)}"
        yield Finding("dark_image", text, image["id"], file=image["file_name"])


def _placement(transform: Transform, height: int, width: int) -> AxisAlignedMap:
    """Return where the validation transforms put the pixels of an image of this size.

    Without a change if they do more than resize and the annotated size is not that of a photograph.
    """
    steps = transform.steps if isinstance(transform, Compose) else (transform,)
    if all(isinstance(step, Resize) for step in steps):
        return _resized(steps, height, width)
    if height * width > LARGEST:
        return IDENTITY
    blank = Example(
        image_id=0,
        pixels=torch.zeros((3, 1, 1), dtype=torch.uint8).expand(3, height, width),
        boxes=torch.zeros((0, 4)),
        labels=torch.zeros(0, dtype=torch.int64),
        masks=(),
        map=IDENTITY,
    )
    return transform(blank, np.random.default_rng(0)).map


def _resized(steps: Sequence[Any], height: int, width: int) -> AxisAlignedMap:
    """Return the map of resizing with the first of the short sides."""
    size = height, width
    for step in steps:
        size = resized_size(*size, step.short_side[0], step.long_side, step.rounding)
    return AxisAlignedMap(size[1] / width, size[0] / height)


def _as_arrays(placement: AxisAlignedMap) -> tuple[np.ndarray, np.ndarray]:
    scale = np.array([placement.scale_x, placement.scale_y] * 2, np.float32)
    return scale, np.array([placement.offset_x, placement.offset_y] * 2, np.float32)


def read_images(subject: Subject, transform: Transform, *, workers: int) -> list[ReadImage]:
    """Read every image of a split once, in the order of the file, with a progress bar. Ctrl-C stops it.

    Args:
        subject: the split.
        transform: of the validation, for the sizes of the objects.
        workers: processes; few images are read in this one.
    """
    count = len(subject.images)
    loader = DataLoader(
        _Images(subject, transform),
        batch_size=None,
        sampler=range(count),
        collate_fn=_unchanged,
        num_workers=0 if count <= FEW else workers,
        worker_init_fn=ignore_signals,
    )
    return list(tqdm(loader, f"reading {subject.name}", count, leave=False, disable=None))


def _unchanged(item: Any) -> Any:
    return item
