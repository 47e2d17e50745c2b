"""Pictures of ground truth and predictions, and predictions for image files."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from maskrcnn.data.dataset import DetectionDataset
from maskrcnn.data.rasters import rasterize_masks
from maskrcnn.engine.instances import Result
from maskrcnn.engine.predictor import Predictor
from maskrcnn.errors import InputError, first_of
from maskrcnn.evaluation.results import write_results
from maskrcnn.runtime.outputs import output_folder
from maskrcnn.structures import ClassTable, Example
from maskrcnn.visualization.drawing import contact_sheet, draw_objects, save_image, shrink, side_by_side

logger = logging.getLogger(__name__)

# With COCO images, 4 pictures take about 5 MB per evaluation.
PREVIEW_IMAGES = 4
PREVIEW_SIDE = 1280  # px, longer side of a ground truth and prediction pair

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


def draw_ground_truth(examples: Iterable[tuple[str, Example]], classes: ClassTable, out: Path) -> None:
    """Draw examples with their objects: a PNG `NAME.png` of each and `contact_sheet.png`, in folder `out`.

    Args:
        examples: pairs of a name and an example, which may be transformed.
        classes: names of the labels.
        out: folder of the files to write.

    Raises:
        InputError: `out` is not a folder for output (`outputs.output_folder`), or an image cannot be read.
    """
    pictures = []
    with output_folder(out):
        for name, example in examples:
            pictures.append(_draw_ground_truth(rasterize_masks(example), classes))
            save_image(out / f"{name}.png", pictures[-1])
        if pictures:
            save_image(out / "contact_sheet.png", contact_sheet(pictures, columns=4))


def draw_predictions(
    predictor: Predictor, dataset: DetectionDataset, count: int, out: Path, *, min_score: float
) -> None:
    """Draw ground truth beside prediction for the first `count` images of a dataset.

    Writes one PNG per image and `overview.png` to folder `out`.
    """
    out.mkdir(parents=True, exist_ok=True)
    pairs = []
    for image_id, pair in _pairs(predictor, dataset, count, min_score):
        pairs.append(pair)
        save_image(out / f"{image_id}.png", pair)
    if pairs:
        save_image(out / "overview.png", contact_sheet(pairs, columns=2))


def preview_pictures(
    predictor: Predictor, dataset: DetectionDataset, count: int, *, min_score: float
) -> dict[str, np.ndarray]:
    """Return the first pictures of `draw_predictions` by image id, reduced in size to be stored at every evaluation."""
    pairs = _pairs(predictor, dataset, min(PREVIEW_IMAGES, count), min_score)
    return {str(image_id): shrink(pair, PREVIEW_SIDE) for image_id, pair in pairs}


def _pairs(
    predictor: Predictor, dataset: DetectionDataset, count: int, min_score: float
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield image id and a picture of ground truth beside prediction for the first `count` images."""
    for index in range(min(count, len(dataset))):
        example = dataset[index]
        prediction = predictor.detect_example(example).picture(min_score=min_score)
        yield example.image_id, side_by_side(_draw_ground_truth(example, dataset.classes), prediction)


def _draw_ground_truth(example: Example, classes: ClassTable) -> np.ndarray:
    image = example.pixels.permute(1, 2, 0).contiguous().numpy()
    return draw_objects(image, example.boxes, example.labels, example.masks, classes.names)


class ImagesSkipped(Exception):  # noqa: N818 (the other images are done)
    """Some images could not be read; pictures and `results.json` of the others are complete."""


def predict_images(predictor: Predictor, inputs: Sequence[Path], out: Path, *, min_score: float) -> Path:
    """Detect and draw objects in images without ground truth.

    Writes one PNG per image, and `results.json` in COCO's results format. There, each detection also has the
    `file_name` of its image, and `image_id` counts the images from 1. Images that cannot be read are reported and
    skipped.

    Args:
        predictor: the predictor.
        inputs: image files, or folders of images.
        out: folder of the files to write.
        min_score: detections with a lower score are left out.

    Returns:
        The path of `results.json`.

    Raises:
        InputError: an input does not exist, no image can be read, `out` is the folder of an input image or not a folder
            for output (`outputs.output_folder`).
        ImagesSkipped: some images cannot be read; raised when all others are done.
    """
    files = list(_image_files(inputs))
    if any(os.path.dirname(os.path.realpath(path)) == os.path.realpath(out) for path in files):
        raise InputError(f"{out}: the pictures would replace the images there; name another folder with --out")
    results: list[Result] = []
    problems: list[str] = []
    with output_folder(out):
        named_files = tqdm(list(zip(files, _picture_names(files), strict=True)), desc="predicting", disable=None)
        for image_id, (path, name) in enumerate(named_files, start=1):
            try:
                instances = predictor(path)
            except InputError as error:
                logger.warning("skipped: %s", error)
                problems.append(str(error))
                continue
            instances = instances[instances.scores >= min_score]
            save_image(out / name, instances.picture(min_score=min_score))
            results += [{**result, "file_name": str(path)} for result in instances.to_coco(image_id)]
        if len(problems) == len(files):
            raise InputError("\n".join(first_of(problems)))
        write_results(out / "results.json", results)
    done = len(files) - len(problems)
    logger.info("%d images, %d objects: pictures and results.json are in %s", done, len(results), out)
    if problems:
        raise ImagesSkipped(f"{len(problems)} of {len(files)} images were skipped; results.json has the others")
    return out / "results.json"


def _picture_names(files: Sequence[Path]) -> list[str]:
    """Return a PNG name for each image: its own name, followed by its number if another picture would have this name.

    The names differ even where the file system ignores case.
    """
    counts = Counter(path.stem.casefold() for path in files)
    taken = {stem for stem, count in counts.items() if count == 1}
    names = []
    for image_id, path in enumerate(files, start=1):
        name = path.stem
        if counts[name.casefold()] > 1:
            name += f"_{image_id}"
            while name.casefold() in taken:
                name += f"_{image_id}"
            taken.add(name.casefold())
        names.append(f"{name}.png")
    return names


def _image_files(inputs: Sequence[Path]) -> Iterator[Path]:
    for path in inputs:
        if os.path.isdir(path):  # False also for a path that the system refuses, such as one that is too long
            images = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
            if not images:
                raise InputError(f"{path}: no image in this folder ({', '.join(sorted(IMAGE_SUFFIXES))})")
            yield from images
        elif os.path.isfile(path):
            yield path
        else:
            raise InputError(f"{path}: no such image or folder")
