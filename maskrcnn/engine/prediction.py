"""Predictions for image files of any number, in constant memory."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from maskrcnn.config.explanation import not_one_of
from maskrcnn.data.image_files import ReadImage, image_files, output_names, read_images
from maskrcnn.engine.formats import WRITERS, Format, Writer, write_yolo_classes
from maskrcnn.engine.instances import Instances, Result
from maskrcnn.engine.predictor import Detector
from maskrcnn.engine.suppression import Nms, suppress
from maskrcnn.errors import InputError, first_of
from maskrcnn.evaluation.results import write_results
from maskrcnn.runtime.outputs import output_folder
from maskrcnn.runtime.threads import usable_cores
from maskrcnn.structures import ClassTable
from maskrcnn.visualization.colours import ColourBy
from maskrcnn.visualization.drawing import save_image

logger = logging.getLogger(__name__)

FEW_IMAGES = 16  # fewer images are not read ahead


class ImagesSkipped(Exception):  # noqa: N818 (the other images are done)
    """Some images could not be read; pictures and `results.json` of the others are complete."""


@dataclass(frozen=True)
class PredictionOptions:
    """What is kept of the detections, and what is written."""

    min_score: float = 0.5  # detections with a lower score are left out
    classes: tuple[str, ...] = ()  # names of the classes to keep; all if there are none
    pictures: bool = True  # whether to draw the detections
    colour_by: ColourBy = "instance"
    nms: Nms = "class"  # the model suppresses boxes within a class; "agnostic" and "mask" go on (`suppress`)
    nms_threshold: float = 0.5
    formats: tuple[Format, ...] = ("coco",)  # files of other tools to write, beside `results.json`
    batch_size: int = 1
    workers: int | None = None  # threads that read images ahead; 0 reads none ahead, None chooses


def predict_images(
    detector: Detector, inputs: Sequence[Path], out: Path, options: PredictionOptions | None = None
) -> Path:
    """Detect and draw objects in images without ground truth.

    Writes one PNG per image, and `results.json` in COCO's results format. There, each detection also has the
    `file_name` of its image, and `image_id` counts the images from 1. Images that cannot be read are reported and
    skipped. Memory does not grow with the number of images. `results.json` appears when all images are done.

    Args:
        detector: a predictor.
        inputs: image files, folders of images, or patterns (`data.image_files.image_files`).
        out: folder of the files to write.
        options: see there.

    Returns:
        The path of `results.json`.

    Raises:
        InputError: an input does not exist, no image can be read, the model has no such class, `out` is the folder of
            an input image or not a folder for output (`outputs.output_folder`).
        ImagesSkipped: some images cannot be read; raised when all others are done.
    """
    options = options or PredictionOptions()
    labels = _labels_of(options.classes, detector.classes)
    files = image_files(inputs)
    if os.path.realpath(out) in {os.path.dirname(os.path.realpath(path)) for path in files}:
        raise InputError(f"{out}: the pictures would replace the images there; name another folder with --out")
    run = _Run(detector, files, out, options, labels)
    with output_folder(out):
        if "yolo" in options.formats:
            write_yolo_classes(out, detector.classes)
        write_results(out / "results.json", run.results())
    run.report()
    if run.problems:
        raise ImagesSkipped(f"{len(run.problems)} of {len(files)} images were skipped; results.json has the others")
    return out / "results.json"


def detect_images(detector: Detector, images: Iterable[ReadImage], batch_size: int) -> Iterator[tuple[int, Instances]]:
    """Yield the index of each image, which `detector.prepare` has prepared, and its instances, batch by batch."""
    waiting: list[ReadImage] = []
    for image in images:
        waiting.append(image)
        if len(waiting) == batch_size:
            yield from _detect(detector, waiting)
            waiting = []
    if waiting:
        yield from _detect(detector, waiting)


def _detect(detector: Detector, images: Sequence[ReadImage]) -> Iterator[tuple[int, Instances]]:
    detected = detector.detect_prepared([image.prepared for image in images if image.prepared is not None])
    for image, instances in zip(images, detected, strict=True):
        yield image.position, replace(instances, image=image.pixels)


@dataclass
class _Run:
    """One call of `predict_images`, and its counts."""

    detector: Detector
    files: Sequence[Path]
    out: Path
    options: PredictionOptions
    labels: Tensor | None  # (k,) labels to keep; None keeps all
    problems: list[str] = field(default_factory=list)
    count: int = 0  # objects
    best: float | None = None  # the highest score of a detection

    @property
    def writers(self) -> list[Writer]:
        """The functions that write the files of an image for other tools."""
        return [WRITERS[name] for name in self.options.formats if name in WRITERS]

    def results(self) -> Iterator[Result]:
        """Detect and draw the objects of each image, and yield their results.

        Raises:
            InputError: no image can be read.
        """
        names, options = output_names(self.files), self.options
        workers = _workers(len(self.files)) if options.workers is None else options.workers
        images = read_images(self.files, self.detector.prepare, workers=workers)
        with tqdm(total=len(self.files), desc="predicting", unit="image", disable=None) as bar:
            readable = self._readable(images, bar)
            for index, found in detect_images(self.detector, readable, options.batch_size):
                instances = self._kept(found)
                if options.pictures:
                    picture = instances.picture(min_score=0, colour_by=options.colour_by)
                    save_image(self.out / f"{names[index]}.png", picture)
                for write in self.writers:
                    write(self.out, names[index], self.files[index], instances)
                self.count += len(instances)
                bar.update()
                for result in instances.to_coco(index + 1):
                    yield {**result, "file_name": str(self.files[index])}
        if len(self.problems) == len(self.files):
            raise InputError("\n".join(first_of(self.problems)))

    def _readable(self, images: Iterable[ReadImage], bar: tqdm) -> Iterator[ReadImage]:
        for image in images:
            if image.problem:
                logger.warning("skipped: %s", image.problem)
                self.problems.append(image.problem)
                bar.update()
            else:
                yield image

    def _kept(self, instances: Instances) -> Instances:
        if self.labels is not None:
            instances = instances[torch.isin(instances.labels, self.labels)]
        if len(instances):
            self.best = max(float(instances.scores[0]), self.best or 0.0)
        instances = instances[instances.scores >= self.options.min_score]
        if self.options.nms == "class":
            return instances
        return suppress(instances, self.options.nms, self.options.nms_threshold)

    def report(self) -> None:
        """Log the number of images and objects; without any object, the best score."""
        done = len(self.files) - len(self.problems)
        written = "pictures and results.json" if self.options.pictures else "results.json"
        logger.info("%d images, %d objects: %s are in %s", done, self.count, written, self.out)
        if self.count == 0:
            best = "there is none with a lower score" if self.best is None else f"the best score is {self.best:.2f}"
            logger.warning("no detection has a score of at least %g; %s", self.options.min_score, best)


def _workers(count: int) -> int:
    """Return the number of threads that read `count` images ahead."""
    return min(4, usable_cores()) if count >= FEW_IMAGES else 0


def _labels_of(names: Sequence[str], classes: ClassTable) -> Tensor | None:
    unknown = [not_one_of(name, classes.names) for name in names if name not in classes.names]
    if unknown:
        raise InputError("\n".join(f"--classes {problem}" for problem in first_of(unknown)))
    return torch.tensor([classes.names.index(name) + 1 for name in names]) if names else None
