"""The images on which each variant differs most from the baseline, with the detections of every variant."""

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
from maskrcnn.data.dataset import DetectionDataset
from maskrcnn.evaluation.results import read_results
from maskrcnn.structures import ClassTable, MaskCrop
from maskrcnn.visualization.drawing import LEGIBLE_SIDE, draw_objects

EACH_END = 4  # images with the largest losses, and as many with the largest gains
MOST = 200  # pictures in one report; at about 20 kB each, the page stays at a few MB
QUALITY = 75  # of the JPEG files


@dataclass(frozen=True)
class Strip:
    """One image, drawn with the ground truth and with the detections of each variant."""

    caption: str
    titles: tuple[str, ...]
    pictures: tuple[str, ...]  # data URIs of JPEGs


@dataclass(frozen=True)
class Gallery:
    """The images on which one variant differs most from the baseline, each list in order of the difference."""

    variant: str
    note: str  # explains the numbers in the captions
    losses: tuple[Strip, ...]
    gains: tuple[Strip, ...]


def galleries(results: AblationResults) -> list[Gallery]:
    """Draw a gallery for each compared variant, from the first finished seed of every variant.

    Images are ordered by the change of their score, see `Matches.image_scores`; for masks or for boxes, as in the
    primary metric.
    """
    compared = results.compared
    if not compared:
        return []
    renderer = _StripRenderer(results)
    limit = MOST // (2 * len(compared) * (1 + len(results.variants)))
    count = max(1, min(EACH_END, limit))
    return [_gallery(variant, results, renderer, count) for variant in compared]


def _gallery(variant: VariantResult, results: AblationResults, renderer: _StripRenderer, count: int) -> Gallery:
    changes = renderer.scores[variant.name] - renderer.scores[results.baseline]
    order = np.argsort(changes, kind="stable")
    losses = [index for index in order[:count] if changes[index] < 0]
    gains = [index for index in order[::-1][:count] if changes[index] > 0]  # both comparisons leave out nan
    strips = [[renderer.strip(index, float(changes[index])) for index in indices] for indices in (losses, gains)]
    note = (
        f"Change of an image's {renderer.part} F1 against {results.baseline}: 2 TP / (detections + objects), averaged "
        f"over the IoU thresholds, of detections with a score of at least {renderer.min_score:g}."
    )
    return Gallery(variant.name, note, *map(tuple, strips))


class _StripRenderer:
    """Computes image scores and draws strips, from the first finished run of each variant."""

    def __init__(self, results: AblationResults) -> None:
        runs: dict[str, RunResult] = {variant.name: variant.runs[0] for variant in results.variants}
        config = next(iter(runs.values())).run.config
        self.dataset: DetectionDataset = config.data.build_validation()
        self.min_score = config.evaluation.picture_score
        self.part = results.metric.split("/")[0]
        matches = {name: result.matches[self.part] for name, result in runs.items()}
        self.image_ids = next(iter(matches.values())).image_ids
        self.scores = {name: of_variant.image_scores(self.min_score) for name, of_variant in matches.items()}
        self.titles = {name: f"{name}, seed {result.run.seed}" for name, result in runs.items()}
        self.results = {name: _by_image(read_results(results_file(result.run))) for name, result in runs.items()}
        self.dataset_index = {self.dataset.image_id(index): index for index in range(len(self.dataset))}

    def strip(self, index: int, change: float) -> Strip:
        """Draw the image at `index` of the matches; `change` is the difference of its score."""
        image_id = int(self.image_ids[index])
        example = self.dataset[self.dataset_index[image_id]]
        image, classes = example.pixels.permute(1, 2, 0).numpy(), self.dataset.classes
        masks = [_full_mask(mask, image.shape[:2]) for mask in example.masks]
        pictures = [_draw(image, example.boxes.numpy(), example.labels.tolist(), masks, None, classes)]
        for results_by_image in self.results.values():
            detections = [result for result in results_by_image.get(image_id, []) if result["score"] >= self.min_score]
            pictures.append(_draw_results(image, detections, classes))
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
    """Draw objects over the image. The image is resized before drawing, so that captions stay legible.

    Args: those of `draw_objects`; the masks are full-size (H, W) bool arrays.
    """
    height, width = image.shape[:2]
    scale = min(1.0, LEGIBLE_SIDE / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = np.array(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    small_masks = [np.array(Image.fromarray(mask).resize(size, Image.Resampling.NEAREST)) for mask in masks]
    return draw_objects(small, boxes * scale, labels, small_masks, classes.names, scores)


def _full_mask(mask: MaskCrop, size: tuple[int, int]) -> np.ndarray:
    full = np.zeros(size, dtype=bool)
    height, width = mask.pixels.shape
    full[mask.y : mask.y + height, mask.x : mask.x + width] = mask.pixels
    return full


def _data_uri(picture: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
