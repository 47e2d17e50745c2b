"""One training of the convergence benchmark: one side, one seed, in a process of its own.

`tools/benchmark.py convergence` starts it with a `Job` as JSON and the path of the file to write. It trains step by
step, evaluates at the marks, and writes the file when it is done. Both sides see the same batches in the same order,
start from the same backbone, take the same optimizer and schedule, and are measured by pycocotools.
"""

from __future__ import annotations

import json
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from convergence import STRETCH, Job
from pycocotools import mask as cocoapi
from screening import apply_levels
from torch import Tensor, nn
from torchvision.models import resnet18, resnet34, resnet50, resnet101
from torchvision.models.detection import MaskRCNN as TorchvisionMaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from maskrcnn.config import read_config
from maskrcnn.data.dataset import DetectionDataset
from maskrcnn.data.loader import evaluation_loader, training_loader
from maskrcnn.engine.checkpoint import seed_generators
from maskrcnn.engine.evaluator import coco_results
from maskrcnn.engine.optimizer import clip_gradients, set_learning_rate
from maskrcnn.errors import InputError
from maskrcnn.evaluation.average_precision import evaluate
from maskrcnn.experiment import ExperimentConfig
from maskrcnn.models.mask_rcnn import MaskRCNN
from maskrcnn.ops.mask_tables import full_masks
from maskrcnn.run_directory import environment
from maskrcnn.runtime.console import run_main
from maskrcnn.runtime.files import json_text, write_text
from maskrcnn.runtime.memory import keep_freed_memory
from maskrcnn.structures import Batch

SIZE_DIVISOR = 32
TERMS = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask")  # in our order
RESNETS = {18: resnet18, 34: resnet34, 50: resnet50, 101: resnet101}

Result = dict[str, Any]


@dataclass(frozen=True)
class Side:
    """A model, and how it learns and detects."""

    model: nn.Module
    losses: Callable[[Batch], Tensor]  # (5,), in the order of TERMS
    detect: Callable[[Batch], list[Result]]  # COCO results, in pixels of the original images


# ---- Ours


def our_side(config: ExperimentConfig, dataset: DetectionDataset) -> Side:
    """Our model, as the configuration builds it."""
    model = config.model.build(len(dataset.classes))
    predictor = config.predictor(model, dataset.classes)
    return Side(
        model,
        lambda batch: torch.stack(tuple(model(batch.images, batch.targets))),
        lambda batch: coco_results(predictor, batch),
    )


# ---- torchvision's


def torchvision_side(config: ExperimentConfig, dataset: DetectionDataset) -> Side:
    """torchvision's model of the same sizes and counts, on the same backbone; all else is torchvision's own."""
    ours = config.model.build(len(dataset.classes))
    model = torchvision_model(config, len(dataset.classes), ours)
    category_ids = dataset.classes.category_ids
    return Side(
        model,
        lambda batch: _torchvision_losses(model, batch),
        lambda batch: _torchvision_results(model, batch, category_ids),
    )


def torchvision_model(config: ExperimentConfig, num_classes: int, ours: MaskRCNN) -> TorchvisionMaskRCNN:
    """Build torchvision's Mask R-CNN; the backbone's stages start from those of `ours`, random ones too."""
    part = config.model
    resnet = part.backbone.kind == "resnet" and part.backbone.strides == (4, 8, 16, 32) and part.backbone.norm in NORMS
    if not resnet or part.neck.kind != "fpn":
        raise InputError("the convergence benchmark compares ResNets with a pyramid and norm frozen_bn or bn")
    if part.box_head.kind != "fc" or part.mask_head.kind != "fcn" or part.box_head.depth != 2:
        raise InputError("the convergence benchmark compares a box head of two layers and a convolutional mask head")
    channels = part.neck.channels
    # Without fields of their own in torchvision: what its parts take as objects.
    box_pooler = MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=part.box_head.pool_size, sampling_ratio=2)
    mask_pooler = MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=part.mask_head.pool_size, sampling_ratio=2)
    width = part.mask_head.width
    model = TorchvisionMaskRCNN(
        _torchvision_backbone(config, ours, channels),
        image_mean=[value / 255 for value in part.pixels.mean],
        image_std=[value / 255 for value in part.pixels.std],
        rpn_anchor_generator=AnchorGenerator(part.rpn.anchor_sizes, (part.rpn.anchor_ratios,) * 5),
        rpn_pre_nms_top_n_train=part.rpn.training.pre_nms_top_n,
        rpn_post_nms_top_n_train=part.rpn.training.post_nms_top_n,
        rpn_pre_nms_top_n_test=part.rpn.inference.pre_nms_top_n,
        rpn_post_nms_top_n_test=part.rpn.inference.post_nms_top_n,
        rpn_batch_size_per_image=part.rpn.batch_size_per_image,
        rpn_positive_fraction=part.rpn.positive_fraction,
        box_roi_pool=box_pooler,
        box_head=TwoMLPHead(channels * part.box_head.pool_size**2, part.box_head.width),
        box_predictor=FastRCNNPredictor(part.box_head.width, num_classes + 1),
        box_batch_size_per_image=part.sampling.batch_size_per_image,
        box_positive_fraction=part.sampling.positive_fraction,
        box_score_thresh=part.detection.score_threshold,
        box_nms_thresh=part.detection.nms_threshold,
        box_detections_per_img=part.detection.detections_per_image,
        mask_roi_pool=mask_pooler,
        mask_head=MaskRCNNHeads(channels, (width,) * part.mask_head.depth, 1),
        mask_predictor=MaskRCNNPredictor(width, width, num_classes + 1),
        _skip_resize=True,  # in training: the batches have their final size
    )
    return model


NORMS = {"frozen_bn": FrozenBatchNorm2d, "bn": nn.BatchNorm2d}


def _torchvision_backbone(config: ExperimentConfig, ours: MaskRCNN, channels: int) -> BackboneWithFPN:
    part = config.model.backbone
    body = RESNETS[part.depth](norm_layer=NORMS[part.norm])
    state = ours.backbone.state_dict()
    body.load_state_dict(state, strict=False)  # all but the classifier's last layer
    learns = {name for name, parameter in ours.backbone.named_parameters() if parameter.requires_grad}
    for name, parameter in body.named_parameters():
        parameter.requires_grad_(name in learns)
    widths = list(ours.backbone.channels)
    layers = {f"layer{stage}": str(stage - 1) for stage in (1, 2, 3, 4)}
    return BackboneWithFPN(body, layers, widths, channels)


def _torchvision_losses(model: TorchvisionMaskRCNN, batch: Batch) -> Tensor:
    model.train()
    masks = full_masks(batch.targets.masks, *batch.images.pixels.shape[-2:])
    targets = []
    for b, (height, width) in enumerate(batch.images.sizes.tolist()):
        there = batch.targets.valid[b]
        targets.append(
            {
                "boxes": batch.targets.boxes[b][there],
                "labels": batch.targets.labels[b][there],
                "masks": masks[b][there][:, :height, :width],
            }
        )
    losses = model(_images(batch), targets)
    return torch.stack([losses[name] for name in TERMS])


@torch.no_grad()
def _torchvision_results(model: TorchvisionMaskRCNN, batch: Batch, category_ids: Sequence[int]) -> list[Result]:
    """What `model(images)` does after its own resize, which the batch has behind it."""
    model.eval()
    normalized = [model.transform.normalize(image) for image in _images(batch)]
    sizes = [(height, width) for height, width in batch.images.sizes.tolist()]
    images = ImageList(model.transform.batch_images(normalized, SIZE_DIVISOR), sizes)
    features = model.backbone(images.tensors)
    proposals, _ = model.rpn(images, OrderedDict(features))
    found, _ = model.roi_heads(features, proposals, images.image_sizes)
    found = model.transform.postprocess(found, images.image_sizes, list(batch.original_sizes))
    results = []
    for image_id, image in zip(batch.image_ids, found, strict=True):
        masks = (image["masks"][:, 0] > 0.5).numpy().astype(np.uint8)
        boxes = image["boxes"].clone()
        boxes[:, 2:] -= boxes[:, :2]
        columns = zip(image["labels"].tolist(), boxes.tolist(), image["scores"].tolist(), masks, strict=True)
        for label, box, score, mask in columns:
            code = cocoapi.encode(np.asfortranarray(mask))
            results.append(
                {
                    "image_id": image_id,
                    "category_id": category_ids[label - 1],
                    "bbox": box,
                    "score": score,
                    "segmentation": {"size": code["size"], "counts": code["counts"].decode()},
                }
            )
    return results


def _images(batch: Batch) -> list[Tensor]:
    return [
        pixels[:, :height, :width] / 255
        for pixels, (height, width) in zip(batch.images.pixels, batch.images.sizes.tolist(), strict=True)
    ]


# ---- The training


SIDES: dict[str, Callable[[ExperimentConfig, DetectionDataset], Side]] = {
    "ours": our_side,
    "torchvision": torchvision_side,
}


def train(
    config: ExperimentConfig, side_name: str, marks: Sequence[int], high: Sequence[str] | None = None
) -> dict[str, Any]:
    """Train one side to the last mark; return the losses, means of STRETCH steps, and the figures at the marks."""
    dataset, validation = config.data.build_both()
    seed_generators(config.training.seed)
    side = SIDES[side_name](config, dataset)
    if high is not None:
        apply_levels(side.model, high)
    optimizer = config.training.optimizer.build(side.model, batch_size=config.training.batch_size)
    schedule = config.training.schedule.build()
    batches = training_loader(
        dataset,
        config.data.build_train_transform(dataset),
        batch_size=config.training.batch_size,
        seed=config.training.seed,
        workers=0,
        size_divisor=SIZE_DIVISOR,
    )
    losses, figures, seconds = [], {}, 0.0
    for iteration, (batch,) in enumerate(batches):
        if iteration in marks:
            figures[str(iteration)] = _measure(config, side, validation)
        if iteration == marks[-1]:
            break
        began = time.perf_counter()
        set_learning_rate(optimizer, schedule(iteration))
        terms = side.losses(batch)
        optimizer.zero_grad()
        terms.sum().backward()
        if config.training.clip_norm is not None:
            clip_gradients(optimizer, config.training.clip_norm)
        optimizer.step()
        seconds += time.perf_counter() - began
        losses.append(terms.tolist())
    means = [np.mean(losses[first : first + STRETCH], axis=0).round(4) for first in range(0, len(losses), STRETCH)]
    return {"losses": [mean.tolist() for mean in means], "figures": figures, "seconds": round(seconds, 1)}


def _measure(config: ExperimentConfig, side: Side, validation: DetectionDataset) -> dict[str, float]:
    batches = evaluation_loader(
        validation,
        config.data.build_validation_transform(),
        batch_size=config.evaluation.batch_size,
        workers=0,
        size_divisor=SIZE_DIVISOR,
    )
    results = [result for batch in batches for result in side.detect(batch)]
    return evaluate(validation.ground_truth(), results, backend="pycocotools").summary()


def main() -> None:
    """Train, and write the file."""
    job, out = Job(**json.loads(sys.argv[1])), Path(sys.argv[2])
    torch.set_num_threads(1)
    keep_freed_memory()
    overrides = [*job.overrides, f"training.seed={job.seed}"]
    config = read_config(Path(job.config), ExperimentConfig, overrides)
    record = train(config, job.side, job.marks, job.high)
    record |= {"job": asdict(job), "environment": environment(torch.device("cpu"))}
    write_text(out, json_text(record))


if __name__ == "__main__":
    run_main(main)
