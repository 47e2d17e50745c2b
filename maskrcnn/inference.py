"""Inference with a trained model: prediction, evaluation, and pictures of detections."""

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
from maskrcnn.engine.checkpoint import load_checkpoint, load_weights
from maskrcnn.errors import InputError
from maskrcnn.evaluation.average_precision import Backend, Evaluation, diagnose, evaluate
from maskrcnn.evaluation.results import coco_results, write_results
from maskrcnn.experiment import ExperimentConfig, require_same_classes
from maskrcnn.models.mask_rcnn import MaskRCNN
from maskrcnn.ops.masks import PasteConvention
from maskrcnn.runtime.memory import keep_freed_memory
from maskrcnn.runtime.processes import Processes
from maskrcnn.structures import Batch, ClassTable, Example, Losses
from maskrcnn.visualization.drawing import contact_sheet, draw_objects, save_image, shrink, side_by_side

logger = logging.getLogger(__name__)

Result = dict[str, Any]  # one detection in COCO's results format

# With COCO images, 4 pictures take about 5 MB per evaluation.
PREVIEW_IMAGES = 4
PREVIEW_SIDE = 1280  # px, longer side of a ground truth and prediction pair

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


@dataclass(frozen=True)
class Predictor:
    """A model with its class table, image transform, mask paste convention and device.

    Call it with a batch to get detections as COCO results.
    """

    model: MaskRCNN
    classes: ClassTable
    transform: Transform
    paste: PasteConvention
    device: torch.device

    @classmethod
    def of(cls, config: ExperimentConfig, model: MaskRCNN, classes: ClassTable, device: torch.device) -> Predictor:
        """Return a predictor with the validation transforms and the paste convention of `config`."""
        transform = config.data.validation_transforms.build()
        return cls(model, classes, transform, config.model.mask_head.paste, device)

    def __call__(self, batch: Batch) -> list[Result]:
        """Return the detections of a batch as COCO results, by descending score within each image.

        Boxes `(x, y, width, height)` and masks are in pixels of the original images.
        """
        self.model.eval()
        detections = self.model.detect(batch.images.to(self.device))
        return coco_results(detections, batch, self.classes, paste=self.paste)


def load_predictor(
    config: ExperimentConfig, weights: Path, device: torch.device, *, average: bool = False
) -> Predictor:
    """Return the predictor of a checkpoint.

    Args:
        config: the experiment, whose model must match the checkpoint.
        weights: path of the checkpoint.
        device: where to run the model.
        average: whether to use the averaged weights of the checkpoint.

    Raises:
        InputError: the file is not a checkpoint, does not match the model, or has no averaged weights.
    """
    keep_freed_memory()
    checkpoint = load_checkpoint(weights)
    if average and not checkpoint.average:
        raise InputError(f"{weights}: it holds no averaged weights (training.ema_decay creates them); omit --ema")
    model = config.model.build(len(checkpoint.classes), pretrained=False)
    state = checkpoint.average if average else checkpoint.model
    load_weights(model, state, source=str(weights)).require_complete()
    return Predictor.of(config, model.to(device), checkpoint.classes, device)


def evaluate_checkpoint(
    config: ExperimentConfig, weights: Path, out: Path, device: torch.device, *, average: bool = False
) -> Evaluation:
    """Evaluate a checkpoint on the validation set and write metrics, results and pictures to folder `out`.

    Raises:
        InputError: the checkpoint does not match the model or the classes of the validation set.
    """
    dataset = config.data.build_validation()
    predictor = load_predictor(config, weights, device, average=average)
    require_same_classes(predictor.classes, dataset.classes, str(weights), "data.validation")
    evaluation, _ = evaluate_predictor(config, predictor, dataset, out)
    draw_predictions(config, predictor, dataset, out / "predictions")
    return evaluation


def evaluate_predictor(
    config: ExperimentConfig,
    predictor: Predictor,
    dataset: DetectionDataset,
    out: Path,
    processes: Processes | None = None,
) -> tuple[Evaluation, float]:
    """Evaluate a predictor on `dataset`, write `results.json` and `metrics.json`, and log the tables.

    The images are divided among the processes; the main process computes the metrics and writes the files. With the
    same number of threads and kind of device, the results equal those of a single process.

    Args:
        config: the experiment.
        predictor: the predictor to evaluate.
        dataset: the dataset with ground truth.
        out: folder of the two files.
        processes: the process group; None for a single process. Every process must call this function.

    Returns:
        The evaluation, which is the same on every process, and the images per second of inference, without the
        computation of the metrics.
    """
    processes = processes or Processes(predictor.device)
    processes.share_buffers(predictor.model)
    # The class names are the same, but results need the category ids of this dataset.
    predictor = replace(predictor, classes=dataset.classes)
    started_at = time.perf_counter()
    results = _predict_all(config, predictor, dataset, processes)
    images_per_second = len(dataset) / (time.perf_counter() - started_at)

    def compute_metrics() -> Evaluation:
        out.mkdir(parents=True, exist_ok=True)
        write_results(out / "results.json", results)
        return report(dataset.ground_truth(), results, out, backend=config.evaluation.backend)

    return processes.from_main(compute_metrics), images_per_second


def _predict_all(
    config: ExperimentConfig, predictor: Predictor, dataset: DetectionDataset, processes: Processes
) -> list[Result]:
    """Return the results of all images in dataset order on the main process, and an empty list on the others."""
    disable = None if processes.is_main else True  # None: disabled if stderr is not a terminal
    batches = tqdm(_batches(config, predictor, dataset, processes), desc="evaluating", leave=False, disable=disable)
    results_by_rank = processes.gather([predictor(batch) for batch in batches]) or []
    # Batch i of the dataset is on process i % world.
    rounds = zip_longest(*results_by_rank, fillvalue=[])
    return [result for batches_of_round in rounds for results in batches_of_round for result in results]


@torch.no_grad()
def validation_losses(
    config: ExperimentConfig, predictor: Predictor, dataset: DetectionDataset, processes: Processes
) -> dict[str, float]:
    """Return each loss term by name, mean over the images of `dataset`, with the model in eval mode.

    The images are divided among the processes. Every process must call this function and gets the same result.
    """
    processes.share_buffers(predictor.model)
    predictor.model.eval()
    sums = torch.zeros(len(Losses._fields), dtype=torch.float64)
    for batch in _batches(config, predictor, dataset, processes):
        losses = predictor.model(batch.images.to(predictor.device), batch.targets.to(predictor.device))
        sums += torch.stack(tuple(losses)).double().cpu() * len(batch.images)
    sums_by_rank = processes.gather(sums)
    means = processes.broadcast((torch.stack(sums_by_rank or [sums]).sum(dim=0) / len(dataset)).tolist())
    return dict(zip(Losses._fields, means, strict=True))


def report(
    ground_truth: dict[str, Any] | Path, results: Sequence[Result], out: Path | None, *, backend: Backend
) -> Evaluation:
    """Compute box and mask AP, log the tables, and write `metrics.json`.

    Args:
        ground_truth: COCO annotations, or the path of an annotation file.
        results: detections in COCO's results format.
        out: folder of `metrics.json`; None writes no file.
        backend: implementation of the COCO evaluation.
    """
    evaluation = evaluate(ground_truth, results, backend=backend)
    logger.info("%s\n\n%s", evaluation.format_class_table(), evaluation.format_table())
    if not any(metrics.ap50 > 0 for metrics in (evaluation.box, evaluation.mask) if metrics is not None):
        logger.warning("AP50 is 0. %s", diagnose(ground_truth, results) or "Nothing was detected.")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "metrics.json").write_text(json.dumps(evaluation.to_dict(), indent=2) + "\n", encoding="utf-8")
    return evaluation


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
    """Draw the ground truth of the first `count` images: one PNG per image and `contact_sheet.png`, in folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    pictures = []
    for index in range(min(count, len(dataset))):
        example = dataset[index]
        pictures.append(_draw_ground_truth(example, dataset.classes))
        save_image(out / f"{example.image_id}.png", pictures[-1])
    if pictures:
        save_image(out / "contact_sheet.png", contact_sheet(pictures, columns=4))


def draw_predictions(config: ExperimentConfig, predictor: Predictor, dataset: DetectionDataset, out: Path) -> None:
    """Draw ground truth beside prediction for the first `config.evaluation.pictures` images of `dataset`.

    Writes one PNG per image and `overview.png` to folder `out`.
    """
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
    """Return the first pictures of `draw_predictions` by image id, reduced in size to be stored at every evaluation."""
    count = min(PREVIEW_IMAGES, config.evaluation.pictures)
    return {str(image_id): shrink(pair, PREVIEW_SIDE) for image_id, pair in _pairs(config, predictor, dataset, count)}


def _pairs(
    config: ExperimentConfig, predictor: Predictor, dataset: DetectionDataset, count: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield image id and a picture of ground truth beside prediction for the first `count` images."""
    for index in range(min(count, len(dataset))):
        example = dataset[index]
        results = predictor(_batch_of_one(predictor, example))
        prediction = draw_results(
            _as_picture(example), results, predictor.classes, min_score=config.evaluation.picture_score
        )
        yield example.image_id, side_by_side(_draw_ground_truth(example, dataset.classes), prediction)


def draw_results(image: np.ndarray, results: Sequence[Result], classes: ClassTable, *, min_score: float) -> np.ndarray:
    """Return `image` `(H, W, 3)` with those of its COCO results drawn whose score is at least `min_score`."""
    detections = [result for result in results if result["score"] >= min_score]
    boxes = [(x, y, x + width, y + height) for x, y, width, height in (result["bbox"] for result in detections)]
    return draw_objects(
        image,
        boxes,
        [classes.category_ids.index(result["category_id"]) + 1 for result in detections],
        [cocoapi.decode(result["segmentation"]).astype(bool) for result in detections],
        classes.names,
        [result["score"] for result in detections],
    )


def _draw_ground_truth(example: Example, classes: ClassTable) -> np.ndarray:
    return draw_objects(_as_picture(example), example.boxes, example.labels, example.masks, classes.names)


def _batch_of_one(predictor: Predictor, example: Example) -> Batch:
    transformed = predictor.transform(example, np.random.default_rng(0))
    return collate([transformed], [0], predictor.model.size_divisor)


def _as_picture(example: Example) -> np.ndarray:
    return example.pixels.permute(1, 2, 0).contiguous().numpy()


def predict_images(predictor: Predictor, inputs: Sequence[Path], out: Path, *, min_score: float) -> Path:
    """Detect and draw objects in images without ground truth.

    Writes one PNG per image, and `results.json` in COCO's results format. There, each detection also has the
    `file_name` of its image, and `image_id` counts the images from 1.

    Args:
        predictor: the predictor.
        inputs: image files, or folders of images.
        out: folder of the files to write.
        min_score: detections with a lower score are left out.

    Returns:
        The path of `results.json`.

    Raises:
        InputError: an input does not exist or is not an image, or `out` is the folder of an input image. Images before
            an unreadable one are already written.
    """
    files = list(_image_files(inputs))
    out.mkdir(parents=True, exist_ok=True)
    if any(path.resolve().parent == out.resolve() for path in files):
        raise InputError(f"{out}: the pictures would replace the images there; name another folder with --out")
    detections: list[Result] = []
    named_files = tqdm(list(zip(files, _picture_names(files), strict=True)), desc="predicting", disable=None)
    for image_id, (path, name) in enumerate(named_files, start=1):
        no_objects = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), ()
        example = Example(image_id, read_image(path), *no_objects)
        results = [result for result in predictor(_batch_of_one(predictor, example)) if result["score"] >= min_score]
        picture = draw_results(_as_picture(example), results, predictor.classes, min_score=min_score)
        save_image(out / name, picture)
        detections += [{**result, "file_name": str(path)} for result in results]
    write_results(out / "results.json", detections)
    logger.info("%d images, %d objects: pictures and results.json are in %s", len(files), len(detections), out)
    return out / "results.json"


def _picture_names(files: Sequence[Path]) -> list[str]:
    """Return a PNG name for each image: its own name, followed by its number if several images have this name."""
    counts = Counter(path.stem for path in files)
    return [
        f"{path.stem}.png" if counts[path.stem] == 1 else f"{path.stem}_{image_id}.png"
        for image_id, path in enumerate(files, start=1)
    ]


def _image_files(inputs: Sequence[Path]) -> Iterator[Path]:
    for path in inputs:
        if path.is_dir():
            images = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
            if not images:
                raise InputError(f"{path}: no image in this folder ({', '.join(sorted(IMAGE_SUFFIXES))})")
            yield from images
        elif path.is_file():
            yield path
        else:
            raise InputError(f"{path}: no such image or folder")
