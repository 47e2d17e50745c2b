"""A split as the doctor looks at it: annotations in COCO format, before anything was refused or dropped."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from maskrcnn.data.coco import CocoConfig
from maskrcnn.data.coco_classes import choose_classes, rename_classes
from maskrcnn.data.coco_file import Annotation, Image, id_faults, parse_coco_json
from maskrcnn.data.dataset import DatasetConfig, DetectionDataset
from maskrcnn.data.findings import FAULTS, Finding, Severity, Treatment
from maskrcnn.paths import leaves_folder
from maskrcnn.structures import ClassTable


@dataclass(frozen=True)
class Subject:
    """One split. Worker processes get a copy.

    Attributes:
        name: `data.train` or `data.validation`.
        data: images, annotations and categories in COCO format; ids may be repeated or unknown.
        folder: of the images; None where the dataset makes them.
        dataset: the dataset where there is no folder.
        refuses: training refuses degenerate objects instead of dropping them (`degenerate: refuse`).
        annotations_name: of the annotation file.
    """

    name: str
    data: Mapping[str, Any]
    folder: Path | None
    dataset: DetectionDataset | None
    refuses: bool
    annotations_name: str

    @property
    def images(self) -> Sequence[Image]:
        """The entries of the images, in the order of the file."""
        images: Sequence[Image] = self.data["images"]
        return images

    @cached_property
    def classes(self) -> ClassTable:
        """The classes in the order of their ids, as training numbers them."""
        names = {category["id"]: category["name"] for category in self.data["categories"]}
        return ClassTable(tuple(names[key] for key in sorted(names)), tuple(sorted(names)))

    @cached_property
    def id_faults(self) -> list[Finding]:
        """Ids that are used twice, and annotations of unknown images and classes."""
        return id_faults(self.data)

    @cached_property
    def annotations_of(self) -> Mapping[int, list[Annotation]]:
        """The annotations of each image id, without those of unknown classes."""
        categories = set(self.classes.category_ids)
        groups: dict[int, list[Annotation]] = defaultdict(list)
        for annotation in self.data["annotations"]:
            if annotation["category_id"] in categories:
                groups[annotation["image_id"]].append(annotation)
        return groups

    def treatment(self, finding: Finding) -> Treatment:
        """Return what training does about a finding."""
        usual = FAULTS[finding.fault].treatment
        return "refused" if usual == "dropped" and self.refuses else usual

    def severity(self, finding: Finding) -> Severity:
        """Return how severe a finding is."""
        return "error" if self.treatment(finding) == "refused" else FAULTS[finding.fault].severity

    def path(self, image: Image) -> Path | None:
        """Return the path of an image file; None where images are no files, or the name points out of the folder."""
        if self.folder is None or leaves_folder(image["file_name"]):
            return None
        return Path(os.path.abspath(self.folder / image["file_name"]))


def subject_of(config: DatasetConfig, root: Path, name: str) -> Subject:
    """Return a split for inspection.

    Args:
        config: of the dataset. A kind other than `coco` is built, and gives its annotations in COCO format.
        root: `data.root`.
        name: of the split.

    Raises:
        InputError: the annotation file cannot be read or does not match the schema, a class is unknown, or a dataset
            of another kind is invalid.
    """
    config = config.with_root(root)
    if not isinstance(config, CocoConfig):
        dataset = config.build()
        data = dataset.ground_truth()
        images = [{"file_name": str(image["id"]), **image} for image in data["images"]]
        return Subject(name, {**data, "images": images}, None, dataset, False, name)
    file = (config.root or Path()) / config.annotations
    data = parse_coco_json(file)
    if config.classes:
        data = choose_classes(file, data, config.classes)
    if config.rename:
        data = rename_classes(file, data, config.rename)
    if config.image_ids:
        wanted = set(config.image_ids)
        data = {
            **data,
            "images": [image for image in data["images"] if image["id"] in wanted],
            "annotations": [entry for entry in data["annotations"] if entry["image_id"] in wanted],
        }
    folder = (config.root or Path()) / config.images
    return Subject(name, data, folder, None, config.degenerate == "refuse", file.name)
