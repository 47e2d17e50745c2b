"""The images on which variants differ most from the baseline, with what each variant found in them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as cocoapi

from maskrcnn.ablation.comparison import signed_points
from maskrcnn.ablation.measurement import RunResult, results_file
from maskrcnn.ablation.results import AblationResults, VariantResult
from maskrcnn.data.loader import DetectionDataset
from maskrcnn.evaluation.results import read_results
from maskrcnn.structures import ClassTable, MaskCrop
from maskrcnn.visualization import LEGIBLE_SIDE, draw_objects

EACH_END = 4  # images for the largest losses, and for the largest gains
MOST = 200  # pictures in one report: at about 20 kB each, it stays at a few MB
QUALITY = 75  # of JPEG


@dataclass(frozen=True)
class Strip:
    """One image as the ground truth and every variant have it."""

    caption: str
    titles: tuple[str, ...]
    pictures: tuple[str, ...]  # data URIs of JPEGs


@dataclass(frozen=True)
class Gallery:
    """Where one variant differs most from the baseline: the largest losses first, then the largest gains."""

    variant: str
    note: str  # what the numbers under the pictures are
    losses: tuple[Strip, ...]
    gains: tuple[Strip, ...]


def galleries(results: AblationResults) -> list[Gallery]:
    """Draw a gallery for each variant that was compared, from the first finished seed of every variant.

    An image's score is that of the part of the figure that decides; see `Matches.image_scores`.
    """
    compared = results.compared
    if not compared:
        return []
    shown = _Finder(results)
    room = MOST // (2 * len(compared) * (1 + len(results.variants)))
    each = max(1, min(EACH_END, room))
    return [_gallery(variant, results, shown, each) for variant in compared]


def _gallery(variant: VariantResult, results: AblationResults, shown: _Finder, each: int) -> Gallery:
    changes = shown.scores[variant.name] - shown.scores[results.baseline]
    order = np.argsort(changes, kind="stable")
    losses = [place for place in order[:each] if changes[place] < 0]
    gains = [place for place in order[::-1][:each] if changes[place] > 0]  # nan is neither
    strips = [[shown.strip(place, float(changes[place])) for place in places] for places in (losses, gains)]
    note = (
        f"Change of an image's F1 for {shown.part} against {results.baseline}: 2 TP / (detections + objects), mean "
        f"over the IoU thresholds, of detections with a score from {shown.min_score:g} on."
    )
    return Gallery(variant.name, note, *map(tuple, strips))


class _Finder:
    """Scores every image, and draws one, for the first finished run of each variant."""

    def __init__(self, results: AblationResults) -> None:
        runs: dict[str, RunResult] = {variant.name: variant.runs[0] for variant in results.variants}
        config = next(iter(runs.values())).run.config
        self.dataset: DetectionDataset = config.data.build_validation()
        self.min_score = config.evaluation.picture_score
        self.part = results.metric.split("/")[0]
        matches = {name: result.matches[self.part] for name, result in runs.items()}
        self.image_ids = next(iter(matches.values())).image_ids
        self.scores = {name: found.image_scores(self.min_score) for name, found in matches.items()}
        self.titles = {name: f"{name}, seed {result.run.seed}" for name, result in runs.items()}
        self.results = {name: _by_image(read_results(results_file(result.run))) for name, result in runs.items()}
        self.places = {self.dataset.image_id(index): index for index in range(len(self.dataset))}

    def strip(self, place: int, change: float) -> Strip:
        """Draw one image; `place` counts the images of the matches."""
        image_id = int(self.image_ids[place])
        example = self.dataset[self.places[image_id]]
        image, classes = example.pixels.permute(1, 2, 0).numpy(), self.dataset.classes
        masks = [_full(mask, image.shape[:2]) for mask in example.masks]
        pictures = [_draw(image, example.boxes.numpy(), example.labels.tolist(), masks, None, classes)]
        for found in self.results.values():
            kept = [result for result in found.get(image_id, []) if result["score"] >= self.min_score]
            pictures.append(_draw_results(image, kept, classes))
        caption = f"image {image_id}: {signed_points(change)} points"
        return Strip(caption, ("ground truth", *self.titles.values()), tuple(map(_data_uri, pictures)))


def _by_image(results: Sequence[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    groups: dict[int, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(result["image_id"], []).append(result)
    return groups


def _draw_results(image: np.ndarray, results: Sequence[dict[str, Any]], classes: ClassTable) -> np.ndarray:
    corners = [(x, y, x + width, y + height) for x, y, width, height in (result["bbox"] for result in results)]
    labels = [classes.category_ids.index(result["category_id"]) + 1 for result in results]
    masks = [cocoapi.decode(result["segmentation"]).astype(bool) for result in results]
    return _draw(image, np.array(corners), labels, masks, [result["score"] for result in results], classes)


def _draw(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: Sequence[int],
    masks: Sequence[np.ndarray],
    scores: Sequence[float] | None,
    classes: ClassTable,
) -> np.ndarray:
    """Draw over the image, which is made smaller before and not after, so that captions stay legible.

    Args: those of `draw_objects`; the masks are full-size (H, W) bool arrays.
    """
    height, width = image.shape[:2]
    share = min(1.0, LEGIBLE_SIDE / max(height, width))
    size = max(1, round(width * share)), max(1, round(height * share))
    small = np.array(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    fitting = [np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)) for mask in masks]
    return draw_objects(small, boxes * share, labels, fitting, classes.names, scores)


def _full(mask: MaskCrop, size: tuple[int, int]) -> np.ndarray:
    full = np.zeros(size, dtype=bool)
    height, width = mask.pixels.shape
    full[mask.y : mask.y + height, mask.x : mask.x + width] = mask.pixels
    return full


def _data_uri(picture: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
