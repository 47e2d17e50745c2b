"""Pictures of ground truth, alone and beside predictions."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from maskrcnn.data.dataset import DetectionDataset
from maskrcnn.data.rasters import rasterize_masks
from maskrcnn.engine.predictor import Predictor
from maskrcnn.runtime.outputs import output_folder
from maskrcnn.structures import ClassTable, Example
from maskrcnn.visualization.colours import ColourBy
from maskrcnn.visualization.drawing import draw_objects, save_image, shrink
from maskrcnn.visualization.pairs import Objects, draw_pair
from maskrcnn.visualization.sheets import GAP, THUMBNAIL_SIDE, THUMBNAILS, Thumbnail, contact_sheet

# With COCO images, 4 pictures take about 5 MB per evaluation.
PREVIEW_IMAGES = 4
PREVIEW_SIDE = 1280  # px, longer side of a ground truth and prediction pair


@runtime_checkable
class NamesImages(Protocol):
    """A dataset whose images have file names. A sheet has these names; otherwise the image ids."""

    def image_name(self, index: int) -> str:
        """Return the file name of an image."""


def draw_ground_truth(
    examples: Iterable[tuple[str, str, Example]], classes: ClassTable, out: Path, *, colour_by: ColourBy = "instance"
) -> None:
    """Draw examples with their objects: a PNG of each, and `contact_sheet.png` of the first `THUMBNAILS`.

    Args:
        examples: the name of the PNG without its suffix, the title on the sheet, and the example, which may be
            transformed.
        classes: names of the labels.
        out: folder of the files to write.
        colour_by: what has a colour of its own.

    Raises:
        InputError: `out` is not a folder for output (`outputs.output_folder`), or an image cannot be read.
    """
    thumbnails: list[Thumbnail] = []
    with output_folder(out):
        for name, title, example in examples:
            image, truth = _image(example), _ground_truth(rasterize_masks(example))
            drawing = (image, truth.boxes, truth.labels, truth.masks, classes.names)
            save_image(out / f"{name}.png", draw_objects(*drawing, colour_by=colour_by))
            if len(thumbnails) < THUMBNAILS:
                small = draw_objects(*drawing, scale=reduction(image, THUMBNAIL_SIDE), colour_by=colour_by)
                thumbnails.append(Thumbnail(title, small))
        if thumbnails:
            save_image(out / "contact_sheet.png", contact_sheet(thumbnails))


def draw_predictions(
    predictor: Predictor,
    dataset: DetectionDataset,
    count: int,
    out: Path,
    *,
    min_score: float,
    colour_by: ColourBy = "instance",
) -> None:
    """Draw ground truth beside prediction for the first `count` images of a dataset, with matches and misses marked.

    Writes one PNG per image (`visualization.pairs.draw_pair`), and `overview.png` of the first `THUMBNAILS`, to folder
    `out`.
    """
    out.mkdir(parents=True, exist_ok=True)
    thumbnails = []
    for index in range(min(count, len(dataset))):
        pair = _pair(predictor, dataset, index, min_score)
        save_image(out / f"{pair.image_id}.png", pair.draw(None, colour_by))
        if index < THUMBNAILS:
            small = pair.draw(reduction(pair.image, THUMBNAIL_SIDE), colour_by)
            thumbnails.append(Thumbnail(title_of(dataset, index), small))
    if thumbnails:
        save_image(out / "overview.png", contact_sheet(thumbnails))


def preview_pictures(
    predictor: Predictor,
    dataset: DetectionDataset,
    count: int,
    *,
    min_score: float,
    colour_by: ColourBy = "instance",
) -> dict[str, np.ndarray]:
    """Return the first pictures of `draw_predictions` by image id, reduced in size to be stored at every evaluation."""
    pairs = (_pair(predictor, dataset, index, min_score) for index in range(min(PREVIEW_IMAGES, count, len(dataset))))
    return {
        str(pair.image_id): shrink(pair.draw(reduction(pair.image, (PREVIEW_SIDE - GAP) // 2), colour_by), PREVIEW_SIDE)
        for pair in pairs
    }


def reduction(image: np.ndarray, longest: int) -> float | None:
    """Return the `scale` of `draw_objects` with which the longer side has `longest` pixels; None if it has fewer."""
    factor = longest / max(image.shape[:2])
    return factor if factor < 1 else None


class _Pair(NamedTuple):
    """Ground truth and detections of an image."""

    image_id: int
    image: np.ndarray  # (H, W, 3) uint8 RGB
    truth: Objects
    prediction: Objects
    names: tuple[str, ...]

    def draw(self, scale: float | None, colour_by: ColourBy) -> np.ndarray:
        """Return the picture of `draw_pair`."""
        return draw_pair(self.image, self.truth, self.prediction, self.names, scale=scale, colour_by=colour_by)


def _pair(predictor: Predictor, dataset: DetectionDataset, index: int, min_score: float) -> _Pair:
    example = dataset[index]
    instances = predictor.detect_example(example)
    prediction = instances[instances.scores >= min_score].drawn_objects()
    return _Pair(example.image_id, _image(example), _ground_truth(example), prediction, dataset.classes.names)


def _image(example: Example) -> np.ndarray:
    return example.pixels.permute(1, 2, 0).contiguous().numpy()


def _ground_truth(example: Example) -> Objects:
    return Objects(example.boxes.double().numpy(), example.labels.tolist(), example.masks)


def title_of(dataset: DetectionDataset, index: int) -> str:
    """Return the file name of an image, or its id if the dataset has no names."""
    return dataset.image_name(index) if isinstance(dataset, NamesImages) else str(dataset.image_id(index))
