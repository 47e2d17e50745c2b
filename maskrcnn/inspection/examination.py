"""The examination of the data of an experiment: every image read once, all findings, statistics and limits."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from maskrcnn.data.coco_file import complete_for_evaluation
from maskrcnn.data.dataset import DetectionDataset
from maskrcnn.data.findings import FAULTS, SEVERITIES, Finding, Severity, Treatment
from maskrcnn.data.statistics import summarize
from maskrcnn.data.transforms import ResizeConfig
from maskrcnn.errors import InputError
from maskrcnn.experiment import ExperimentConfig, data_warnings, model_warnings
from maskrcnn.inspection.coverage import Limit, Settings, limits
from maskrcnn.inspection.reading import ReadImage, read_images
from maskrcnn.inspection.splits import shared_images, split_findings
from maskrcnn.inspection.subject import Subject, subject_of

logger = logging.getLogger(__name__)

Split = Literal["train", "validation"]


class Group(NamedTuple):
    """The findings of one kind in one split."""

    fault: str
    severity: Severity
    treatment: Treatment
    findings: Sequence[Finding]

    @property
    def title(self) -> str:
        """The name of the kind of fault."""
        return FAULTS[self.fault].title

    @property
    def remedy(self) -> str:
        """What to do about it."""
        return FAULTS[self.fault].remedy


@dataclass(frozen=True)
class Examined:
    """One split and what was seen in it."""

    subject: Subject
    images: Sequence[ReadImage]
    findings: Sequence[Finding]
    limits: Sequence[Limit]

    @cached_property
    def groups(self) -> list[Group]:
        """The findings by kind, the most severe first."""
        groups = [
            Group(fault, self.subject.severity(members[0]), self.subject.treatment(members[0]), members)
            for fault in FAULTS
            if (members := [finding for finding in self.findings if finding.fault == fault])
        ]
        return sorted(groups, key=lambda group: SEVERITIES.index(group.severity))

    def number(self, severity: Severity) -> int:
        """Return the number of findings of this severity."""
        return sum(len(group.findings) for group in self.groups if group.severity == severity)

    @cached_property
    def boxes(self) -> np.ndarray:
        """The boxes of the objects that training uses, (G, 4), at the resolution of the validation transforms."""
        return np.concatenate([np.zeros((0, 4), np.float32), *(read.boxes for read in self.images)])

    @cached_property
    def counts(self) -> list[int]:
        """The number of objects of each image."""
        return [len(read.labels) for read in self.images]

    @cached_property
    def summary(self) -> str:
        """The statistics as text."""
        return summarize(complete_for_evaluation(_usable(self)))


@dataclass(frozen=True)
class Examination:
    """The splits, and what a training would say at its start."""

    splits: Sequence[Examined]
    settings: Settings
    datasets: Mapping[str, DetectionDataset]  # by the name of the split; those that training accepts
    refusals: Sequence[str]  # messages of the training that would not start
    traps: Sequence[str]  # what is warned of at its start

    @property
    def errors(self) -> int:
        """The number of findings for which training refuses to start."""
        return sum(split.number("error") for split in self.splits)


def examine(config: ExperimentConfig, splits: Sequence[Split], *, workers: int) -> Examination:
    """Read every image of the splits once, and return what was found.

    Args:
        config: the experiment.
        splits: to read.
        workers: processes that read images.

    Raises:
        InputError: an annotation file cannot be read or does not match the schema, or a transform is invalid.
    """
    settings, transform = model_settings(config), config.data.build_validation_transform()
    examined: list[Examined] = []
    for name in splits:
        dataset_config = config.data.train if name == "train" else config.data.validation
        subject = subject_of(dataset_config, config.data.root, f"data.{name}")
        images = read_images(subject, transform, workers=workers)
        split = Examined(subject, images, split_findings(subject, images), ())
        of_settings = limits(split.boxes, split.counts, settings)
        if examined:  # anchors and resolution are chosen for the training images
            of_settings = [limit._replace(remedy=limit.remedy if limit.at_inference else "") for limit in of_settings]
        examined.append(replace(split, limits=of_settings))
    if len(examined) == 2:
        train, validation = examined
        shared = shared_images(train.subject, train.images, validation.subject, validation.images)
        examined[1] = replace(validation, findings=[*validation.findings, *shared])
    datasets, refusals = _datasets(config, [split.subject for split in examined])
    traps = data_warnings(config, *datasets.values()) if len(datasets) == 2 and not refusals else []
    return Examination(examined, settings, datasets, refusals, [*model_warnings(config), *traps])


def model_settings(config: ExperimentConfig) -> Settings:
    """Return the settings of the model that limit what it can find."""
    rpn, resizes = config.model.rpn, [t for t in config.data.validation_transforms if isinstance(t, ResizeConfig)]
    strides = config.model.neck.out_strides(config.model.backbone.strides)
    return Settings(
        anchor_sizes=rpn.anchor_sizes,
        anchor_ratios=rpn.anchor_ratios,
        anchor_strides=tuple(strides),
        background=rpn.background,
        cell=min(strides),
        detections_per_image=config.model.detection.detections_per_image,
        short_side=max(resizes[-1].short_side) if resizes else None,
    )


def _datasets(config: ExperimentConfig, subjects: Sequence[Subject]) -> tuple[dict[str, DetectionDataset], list[str]]:
    """Return the datasets that training accepts, by name, and why it refuses the others, or both together."""
    build = {"data.train": config.data.build_train, "data.validation": config.data.build_validation}
    datasets: dict[str, DetectionDataset] = {}
    refusals = []
    for subject in subjects:
        try:
            datasets[subject.name] = subject.dataset or build[subject.name]()
        except InputError as error:
            refusals.append(f"{subject.name}: {error}")
    if len(datasets) == 2:
        try:
            config.data.require_fit(*datasets.values())
        except InputError as error:
            refusals.append(str(error))
    return datasets, refusals


def _usable(split: Examined) -> dict[str, Any]:
    """Return the annotations without those that training refuses or drops, in COCO format."""
    subject = split.subject
    left_out = {
        key for finding in split.findings if subject.treatment(finding) != "kept" for key in finding.annotation_ids
    }
    known = {image["id"] for image in subject.images}
    return {
        "images": list({image["id"]: image for image in subject.images}.values()),
        "annotations": list(_first_of_each(subject, known, left_out)),
        "categories": list({category["id"]: category for category in subject.data["categories"]}.values()),
    }


def _first_of_each(subject: Subject, images: set[int], left_out: set[int]) -> Iterator[Any]:
    """Yield the first annotation of each id, of known images and classes, that is not left out."""
    seen = set(left_out)
    for annotation in subject.data["annotations"]:
        known = annotation["image_id"] in images and annotation["category_id"] in subject.classes.category_ids
        if known and annotation["id"] not in seen:
            seen.add(annotation["id"])
            yield annotation
