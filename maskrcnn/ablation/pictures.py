"""The images on which each variant differs most from the baseline, with the detections of every variant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from maskrcnn.ablation.comparison import signed_points
from maskrcnn.ablation.measurement import RunResult, results_file
from maskrcnn.ablation.results import AblationResults, VariantResult
from maskrcnn.data.coco_file import run_lengths
from maskrcnn.data.dataset import DetectionDataset
from maskrcnn.data.rle import crop_from_counts
from maskrcnn.evaluation.results import read_results
from maskrcnn.structures import ClassTable, MaskCrop
from maskrcnn.visualization.captions import Rectangle
from maskrcnn.visualization.drawing import LEGIBLE_SIDE, draw_objects
from maskrcnn.visualization.pages import data_uri

EACH_END = 4  # images with the largest losses, and as many with the largest gains
MOST = 200  # pictures in one report; at about 20 kB each, the page stays at a few MB


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
        image, classes = example.pixels.permute(1, 2, 0).contiguous().numpy(), self.dataset.classes
        # Large images are reduced before drawing, so that captions stay legible.
        reduction = LEGIBLE_SIDE / max(image.shape[:2])
        scale = reduction if reduction < 1 else None
        draw = partial(draw_objects, image, names=classes.names, scale=scale, colour_by="class")
        pictures = [draw(example.boxes, example.labels, example.masks)]
        for results_by_image in self.results.values():
            detections = [result for result in results_by_image.get(image_id, []) if result["score"] >= self.min_score]
            boxes, labels, masks, scores = _objects(detections, classes)
            pictures.append(draw(boxes, labels, masks, scores=scores))
        caption = f"image {image_id}: {signed_points(change)} points"
        return Strip(caption, ("ground truth", *self.titles.values()), tuple(map(data_uri, pictures)))


def _by_image(results: Sequence[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    groups: dict[int, list[dict[str, Any]]] = {}
    for result in results:
        groups.setdefault(result["image_id"], []).append(result)
    return groups


def _objects(
    results: Sequence[dict[str, Any]], classes: ClassTable
) -> tuple[list[Rectangle], list[int], list[MaskCrop], list[float]]:
    """Return boxes, labels, masks and scores for `draw_objects`; no masks if the results have none."""
    boxes = [(x, y, x + width, y + height) for x, y, width, height in (result["bbox"] for result in results)]
    labels = [classes.category_ids.index(result["category_id"]) + 1 for result in results]
    codes = [result["segmentation"] for result in results if "segmentation" in result]
    masks = [crop_from_counts(run_lengths(code["counts"]), height=code["size"][0]) for code in codes]
    return boxes, labels, masks, [result["score"] for result in results]
