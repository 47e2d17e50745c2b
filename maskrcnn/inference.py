"""What can be done with a trained model: find objects, measure how well, draw them."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as cocoapi
from tqdm import tqdm

from maskrcnn.data.images import read_image
from maskrcnn.data.loader import DetectionDataset, collate, evaluation_loader
from maskrcnn.data.transforms import Transform
from maskrcnn.errors import InputError
from maskrcnn.evaluation.average_precision import Backend, Evaluation, diagnose, evaluate
from maskrcnn.evaluation.results import coco_results, write_results
from maskrcnn.experiment import ExperimentConfig, require_same_classes
from maskrcnn.memory import keep_freed_memory
from maskrcnn.models.mask_rcnn import MaskRCNN
from maskrcnn.ops.masks import PasteConvention
from maskrcnn.structures import Batch, ClassTable, Example, Losses
from maskrcnn.training.checkpoint import load_checkpoint, load_weights
from maskrcnn.training.distributed import Processes
from maskrcnn.visualization import contact_sheet, draw_objects, save_image, shrink, side_by_side

logger = logging.getLogger(__name__)

Result = dict[str, Any]  # one detection in COCO's results format

# At COCO's sizes, these 4 pictures take some 5 MB at each evaluation.
PREVIEW_IMAGES = 4
PREVIEW_SIDE = 1280  # px, of the two pictures beside each other

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


@dataclass(frozen=True)
class Predictor:
    """A model with what it takes to use it: its classes, the transform of images, the device."""

    model: MaskRCNN
    classes: ClassTable
    transform: Transform
    paste: PasteConvention
    device: torch.device

    @classmethod
    def of(cls, config: ExperimentConfig, model: MaskRCNN, classes: ClassTable, device: torch.device) -> Predictor:
        """The predictor of an experiment's model."""
        transform = config.data.validation_transforms.build()
        return cls(model, classes, transform, config.model.mask_head.paste, device)

    def __call__(self, batch: Batch) -> list[Result]:
        """What is found in a batch, as COCO results in pixels of the original images, best first in each image."""
        self.model.eval()
        detections = self.model.detect(batch.images.to(self.device))
        return coco_results(detections, batch, self.classes, paste=self.paste)


def load_predictor(
    config: ExperimentConfig, weights: Path, device: torch.device, *, average: bool = False
) -> Predictor:
    """The predictor of a checkpoint, with its averaged weights if `average`.

    Raises InputError unless every tensor fits the configuration's model.
    """
    keep_freed_memory()
    checkpoint = load_checkpoint(weights)
    if average and not checkpoint.average:
        raise InputError(f"{weights}: it holds no averaged weights (training.ema_decay keeps them); leave --ema away")
    model = config.model.build(len(checkpoint.classes), pretrained=False)
    chosen = checkpoint.average if average else checkpoint.model
    load_weights(model, chosen, source=str(weights)).require_complete()
    return Predictor.of(config, model.to(device), checkpoint.classes, device)


def evaluate_checkpoint(
    config: ExperimentConfig, weights: Path, out: Path, device: torch.device, *, average: bool = False
) -> Evaluation:
    """Evaluate a checkpoint on the validation set; figures, results and pictures go to folder `out`."""
    dataset = config.data.build_validation()
    predictor = load_predictor(config, weights, device, average=average)
    require_same_classes(predictor.classes, dataset.classes, str(weights), "data.validation")
    found, _ = evaluate_predictor(config, predictor, dataset, out)
    draw_predictions(config, predictor, dataset, out / "predictions")
    return found


def evaluate_predictor(
    config: ExperimentConfig,
    predictor: Predictor,
    dataset: DetectionDataset,
    out: Path,
    processes: Processes | None = None,
) -> tuple[Evaluation, float]:
    """Run over `dataset`, write `results.json` and `metrics.json` to folder `out`, and log the tables.

    Several processes share the images; the main one measures and writes. With the same threads and kind of device the
    results are those of one process. Every process must call this, and gets what is returned.

    Returns the figures, and the images per second that it took to find the objects.
    """
    processes = processes or Processes(predictor.device)
    processes.share_buffers(predictor.model)
    # The class names agree; the ids are those of the annotations that the results are compared with.
    predictor = replace(predictor, classes=dataset.classes)
    began = time.perf_counter()
    results = _find_all(config, predictor, dataset, processes)
    images_per_second = len(dataset) / (time.perf_counter() - began)

    def measure() -> Evaluation:
        out.mkdir(parents=True, exist_ok=True)
        write_results(out / "results.json", results)
        return report(dataset.ground_truth(), results, out, backend=config.evaluation.backend)

    return processes.from_main(measure), images_per_second


def _find_all(
    config: ExperimentConfig, predictor: Predictor, dataset: DetectionDataset, processes: Processes
) -> list[Result]:
    """What is found in all images, in their order, on the main process; nothing on others."""
    hidden = None if processes.is_main else True  # None: where there is no terminal
    batches = tqdm(_batches(config, predictor, dataset, processes), desc="evaluating", leave=False, disable=hidden)
    shares = processes.gather([predictor(batch) for batch in batches]) or []
    # The first batch is the first process's first, the second one the second process's first, and so on.
    turns = zip_longest(*shares, fillvalue=[])
    return [result for turn in turns for found in turn for result in found]


@torch.no_grad()
def validation_losses(
    config: ExperimentConfig, predictor: Predictor, dataset: DetectionDataset, processes: Processes
) -> dict[str, float]:
    """The terms of the loss by name, means over the images of `dataset`, with the model as it is for inference.

    Several processes share the images. Every one must call this, and gets what is returned.
    """
    processes.share_buffers(predictor.model)
    predictor.model.eval()
    sums = torch.zeros(len(Losses._fields), dtype=torch.float64)
    for batch in _batches(config, predictor, dataset, processes):
        losses = predictor.model(batch.images.to(predictor.device), batch.targets.to(predictor.device))
        sums += torch.stack(tuple(losses)).double().cpu() * len(batch.images)
    gathered = processes.gather(sums)
    means = processes.broadcast((torch.stack(gathered or [sums]).sum(dim=0) / len(dataset)).tolist())
    return dict(zip(Losses._fields, means, strict=True))


def report(
    ground_truth: dict[str, Any] | Path, results: Sequence[Result], out: Path | None, *, backend: Backend
) -> Evaluation:
    """Measure `results`, log the tables, and write `metrics.json` to folder `out` if there is one."""
    found = evaluate(ground_truth, results, backend=backend)
    logger.info("%s\n\n%s", found.format_class_table(), found.format_table())
    if not any(figures.ap50 > 0 for figures in (found.box, found.mask) if figures is not None):
        logger.warning("AP50 is 0. %s", diagnose(ground_truth, results) or "Nothing was detected.")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "metrics.json").write_text(json.dumps(found.to_dict(), indent=2) + "\n", encoding="utf-8")
    return found


def _batches(
    config: ExperimentConfig, predictor: Predictor, dataset: DetectionDataset, processes: Processes
) -> Iterable[Batch]:
    return evaluation_loader(
        dataset,
        predictor.transform,
        batch_size=config.evaluation.batch_size,
        workers=config.training.workers,
        size_divisor=predictor.model.size_divisor,
        rank=processes.rank,
        world=processes.world,
    )


def draw_ground_truth(dataset: DetectionDataset, count: int, out: Path) -> None:
    """Draw the first `count` images with their objects: one PNG each, and all in `contact_sheet.png`, in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    pictures = []
    for index in range(min(count, len(dataset))):
        example = dataset[index]
        pictures.append(_draw_truth(example, dataset.classes))
        save_image(out / f"{example.image_id}.png", pictures[-1])
    if pictures:
        save_image(out / "contact_sheet.png", contact_sheet(pictures, columns=4))


def draw_predictions(config: ExperimentConfig, predictor: Predictor, dataset: DetectionDataset, out: Path) -> None:
    """Draw the first images of `dataset`, ground truth beside prediction: one PNG each, and all in `overview.png`."""
    out.mkdir(parents=True, exist_ok=True)
    pairs = []
    for image_id, pair in _pairs(config, predictor, dataset, config.evaluation.pictures):
        pairs.append(pair)
        save_image(out / f"{image_id}.png", pair)
    if pairs:
        save_image(out / "overview.png", contact_sheet(pairs, columns=2))


def preview_pictures(
    config: ExperimentConfig, predictor: Predictor, dataset: DetectionDataset
) -> dict[str, np.ndarray]:
    """Draw the first few of what `draw_predictions` draws, small enough to be kept at every evaluation, by image id."""
    count = min(PREVIEW_IMAGES, config.evaluation.pictures)
    return {str(image_id): shrink(pair, PREVIEW_SIDE) for image_id, pair in _pairs(config, predictor, dataset, count)}


def _pairs(
    config: ExperimentConfig, predictor: Predictor, dataset: DetectionDataset, count: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the id of each of the first `count` images, and a picture: its ground truth beside the prediction."""
    for index in range(min(count, len(dataset))):
        example = dataset[index]
        results = predictor(_batch_of_one(predictor, example))
        found = draw_results(
            _as_picture(example), results, predictor.classes, min_score=config.evaluation.picture_score
        )
        yield example.image_id, side_by_side(_draw_truth(example, dataset.classes), found)


def draw_results(image: np.ndarray, results: Sequence[Result], classes: ClassTable, *, min_score: float) -> np.ndarray:
    """Draw the COCO results of one image `(H, W, 3)` whose score is at least `min_score`."""
    shown = [result for result in results if result["score"] >= min_score]
    corners = [(x, y, x + width, y + height) for x, y, width, height in (result["bbox"] for result in shown)]
    return draw_objects(
        image,
        corners,
        [classes.category_ids.index(result["category_id"]) + 1 for result in shown],
        [cocoapi.decode(result["segmentation"]).astype(bool) for result in shown],
        classes.names,
        [result["score"] for result in shown],
    )


def _draw_truth(example: Example, classes: ClassTable) -> np.ndarray:
    return draw_objects(_as_picture(example), example.boxes, example.labels, example.masks, classes.names)


def _batch_of_one(predictor: Predictor, example: Example) -> Batch:
    transformed = predictor.transform(example, np.random.default_rng(0))
    return collate([transformed], [0], predictor.model.size_divisor)


def _as_picture(example: Example) -> np.ndarray:
    return example.pixels.permute(1, 2, 0).contiguous().numpy()


def predict_images(predictor: Predictor, inputs: Sequence[Path], out: Path, *, min_score: float) -> Path:
    """Find and draw the objects in images that have no ground truth.

    Writes one PNG for each image, and `results.json`: COCO's results format, with a `file_name` for each detection,
    `image_id` counting the images from 1. Returns the path of that file.

    Raises:
        InputError: an input does not exist or is no image, or `out` is its folder. Images before it are done.
    """
    files = list(_image_files(inputs))
    out.mkdir(parents=True, exist_ok=True)
    if any(path.resolve().parent == out.resolve() for path in files):
        raise InputError(f"{out}: the pictures would replace the images there; name another folder with --out")
    found: list[Result] = []
    pairs = tqdm(list(zip(files, _picture_names(files), strict=True)), desc="predicting", disable=None)
    for image_id, (path, name) in enumerate(pairs, start=1):
        nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), ()
        example = Example(image_id, read_image(path), *nothing)
        results = [result for result in predictor(_batch_of_one(predictor, example)) if result["score"] >= min_score]
        picture = draw_results(_as_picture(example), results, predictor.classes, min_score=min_score)
        save_image(out / name, picture)
        found += [{**result, "file_name": str(path)} for result in results]
    write_results(out / "results.json", found)
    logger.info("%d images, %d objects: pictures and results.json are in %s", len(files), len(found), out)
    return out / "results.json"


def _picture_names(files: Sequence[Path]) -> list[str]:
    """The image's own name, with its number where several images share it."""
    uses = Counter(path.stem for path in files)
    return [
        f"{path.stem}.png" if uses[path.stem] == 1 else f"{path.stem}_{image_id}.png"
        for image_id, path in enumerate(files, start=1)
    ]


def _image_files(inputs: Sequence[Path]) -> Iterator[Path]:
    for path in inputs:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise InputError(f"{path}: no image in this folder ({', '.join(sorted(IMAGE_SUFFIXES))})")
            yield from inside
        elif path.is_file():
            yield path
        else:
            raise InputError(f"{path}: no such image or folder")
