"""Predictions for image files."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from maskrcnn.engine.instances import Result
from maskrcnn.engine.predictor import Predictor
from maskrcnn.errors import InputError, first_of
from maskrcnn.evaluation.results import write_results
from maskrcnn.runtime.outputs import output_folder
from maskrcnn.visualization.drawing import save_image

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


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
