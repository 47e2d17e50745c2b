"""Checks of whole splits: ids, classes, images that occur twice."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from maskrcnn.data.coco import name_faults
from maskrcnn.data.findings import Finding
from maskrcnn.inspection.reading import ReadImage
from maskrcnn.inspection.similarity import near_pairs
from maskrcnn.inspection.subject import Subject

FEW_OBJECTS = 10  # of a class


def split_findings(subject: Subject, images: Sequence[ReadImage]) -> list[Finding]:
    """Return what is wrong with a split as a whole, followed by what is wrong with each image."""
    of_images = [finding for read in images for finding in read.findings]
    names = {image["id"]: image["file_name"] for image in subject.images}
    outside = name_faults(subject.images) if subject.folder else []
    return [
        *subject.id_faults,
        *(finding._replace(file=names[finding.image_id or 0]) for finding in outside),
        *_class_findings(subject, images),
        *_repeated(subject, images),
        *of_images,
    ]


def _class_findings(subject: Subject, images: Sequence[ReadImage]) -> Iterator[Finding]:
    names = subject.classes.names
    counts = Counter(label for read in images for label in read.labels.tolist())
    repeated = Counter(name.strip().lower() for name in names)
    for label, (name, key) in enumerate(zip(names, subject.classes.category_ids, strict=True), start=1):
        if not name.strip():
            yield Finding("unnamed_class", f"category {key} has no name")
        elif repeated[name.strip().lower()] > 1:
            yield Finding("unnamed_class", f"category {key} is not the only one named '{name}'")
        if not counts[label]:
            yield Finding("unused_class", f"class '{name}' (category {key}) has no object")
        elif counts[label] < FEW_OBJECTS:
            yield Finding("rare_class", f"class '{name}' (category {key}) has {counts[label]} objects")


def _repeated(subject: Subject, images: Sequence[ReadImage]) -> Iterator[Finding]:
    for indices in _by_digest(images).values():
        first, *others = (subject.images[index] for index in indices)
        for image in others:
            text = f"its file has the same bytes as that of image {first['id']}, {first['file_name']}"
            yield Finding("repeated_image", text, image["id"], file=image["file_name"])


def _by_digest(images: Sequence[ReadImage]) -> Mapping[bytes, list[int]]:
    groups: dict[bytes, list[int]] = defaultdict(list)
    for index, read in enumerate(images):
        if read.digest:
            groups[read.digest].append(index)
    return groups


def shared_images(
    train: Subject, train_images: Sequence[ReadImage], validation: Subject, validation_images: Sequence[ReadImage]
) -> list[Finding]:
    """Return the validation images that are training images: those with the same bytes, then those that look alike."""
    in_train = _by_digest(train_images)
    pairs = {
        index: ("same_image", in_train[read.digest][0], "its file has the same bytes as")
        for index, read in enumerate(validation_images)
        if read.digest in in_train
    }
    for other, index in _alike(train_images, validation_images):
        pairs.setdefault(index, ("similar_image", other, "it looks like"))
    findings = []
    for index, (fault, other, words) in sorted(pairs.items()):
        image, twin = validation.images[index], train.images[other]
        text = f"{words} training image {twin['id']}, {twin['file_name']}"
        findings.append(Finding(fault, text, image["id"], file=image["file_name"], twin_id=twin["id"]))
    return findings


def _alike(first: Sequence[ReadImage], second: Sequence[ReadImage]) -> list[tuple[int, int]]:
    """Return the pairs of indices of images with nearly the same hash."""
    indices = [[index for index, read in enumerate(images) if read.hash is not None] for images in (first, second)]
    hashes = [
        np.array([images[index].hash for index in known])
        for images, known in zip((first, second), indices, strict=True)
    ]
    if not len(hashes[0]) or not len(hashes[1]):
        return []
    return [(indices[0][row], indices[1][column]) for row, column in near_pairs(*hashes)]
