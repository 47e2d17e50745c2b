"""One implementation in one benchmark, in a separate process, so that the peak memory is that of this task.

`tools/benchmark.py` starts the worker with a `Job` as JSON. The worker writes lines of JSON: first its environment; for
each input line, the duration of one repetition and its workload; at the end of its input, its peak memory.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torchvision.ops
from pycocotools import mask as cocoapi
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN as TorchvisionMaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.roi_heads import paste_masks_in_image

from maskrcnn.config import read_config
from maskrcnn.data.loader import collate
from maskrcnn.engine.checkpoint import TrainingState
from maskrcnn.engine.instances import Instances
from maskrcnn.engine.step import TrainingStep
from maskrcnn.evaluation.bootstrap import draw_counts, resampled_figures
from maskrcnn.evaluation.matches import EVERY, Matches
from maskrcnn.experiment import ExperimentConfig, choose_device
from maskrcnn.models.mask_rcnn import MaskRCNN
from maskrcnn.ops.masks import encode_masks
from maskrcnn.ops.roi import roi_align
from maskrcnn.run_directory import environment
from maskrcnn.runtime.console import run_main
from maskrcnn.runtime.memory import keep_freed_memory, peak_memory
from maskrcnn.runtime.processes import Processes
from maskrcnn.structures import Batch, ClassTable, Example, MaskCrop

CONFIG = Path(__file__).parents[2] / "configs" / "coco" / "mask_rcnn_r50_fpn_1x.yaml"
NUM_CLASSES = 90  # torchvision's COCO models have this many and background
OBJECTS = 8  # per image; COCO has 7 on average

Step = Callable[[], dict[str, float]]  # performs the task once and returns its workload


@dataclass(frozen=True)
class Job:
    """A task and the conditions of its measurement."""

    task: Literal["training", "inference", "roi", "masks", "bootstrap", "data", "decoders"]
    side: str
    height: int
    width: int
    threads: int
    precision: Literal["fp32", "bf16"]
    device: str
    photos: tuple[str, str, int] | None = None  # root, split and number, for `data` and `decoders` (data_steps.py)


# ---- The scene: the same images and objects for both implementations


class Scene(NamedTuple):
    """An image of noise with elliptical objects."""

    pixels: Tensor  # (3, H, W) uint8
    boxes: Tensor  # (OBJECTS, 4) float32, integer pixel coordinates
    labels: Tensor  # (OBJECTS,) int64
    crops: list[np.ndarray]  # the masks, cropped to their boxes


def draw_scene(height: int, width: int, seed: int) -> Scene:
    """Draw a scene of ellipses whose sides are between 1/8 and 2/3 of the image height."""
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.uniform(np.log(height / 8), np.log(height / 1.5), (OBJECTS, 2))).round()
    corners = (rng.uniform(size=(OBJECTS, 2)) * ([width, height] - sizes).clip(0)).round()
    ends = np.minimum(corners + sizes, [width, height])
    return Scene(
        pixels=torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8)),
        boxes=torch.from_numpy(np.concatenate([corners, ends], axis=1)).float(),
        labels=torch.from_numpy(rng.integers(1, NUM_CLASSES + 1, OBJECTS)),
        crops=[_ellipse(int(h), int(w)) for w, h in ends - corners],
    )


def _ellipse(height: int, width: int) -> np.ndarray:
    y, x = (np.arange(height) + 0.5) / height * 2 - 1, (np.arange(width) + 0.5) / width * 2 - 1
    return (y[:, None] ** 2 + x**2 <= 1).astype(np.uint8)


def _scenes(job: Job, count: int) -> list[Scene]:
    return [draw_scene(job.height, job.width, seed) for seed in range(count)]


def _our_batch(scenes: list[Scene], size_divisor: int) -> Batch:
    examples = []
    for index, scene in enumerate(scenes):
        corners = scene.boxes[:, :2].int().tolist()
        masks = tuple(MaskCrop(x, y, crop) for (x, y), crop in zip(corners, scene.crops, strict=True))
        examples.append(Example(index, scene.pixels, scene.boxes, scene.labels, masks))
    return collate(examples, list(range(len(scenes))), size_divisor)


def _torchvision_target(scene: Scene) -> dict[str, Tensor]:
    masks = torch.zeros(OBJECTS, *scene.pixels.shape[1:], dtype=torch.uint8)
    for mask, box, crop in zip(masks, scene.boxes.int().tolist(), scene.crops, strict=True):
        mask[box[1] : box[3], box[0] : box[2]] = torch.from_numpy(crop)
    return {"boxes": scene.boxes, "labels": scene.labels, "masks": masks}


# ---- The models


def _our_experiment() -> ExperimentConfig:
    return read_config(CONFIG, ExperimentConfig, ["model.rpn.training.post_nms_top_n=2000"])  # as in torchvision


def _our_model(config: ExperimentConfig, device: torch.device) -> MaskRCNN:
    model = config.model.build(NUM_CLASSES, pretrained=False)
    _draw_weights(model, model.box_head.cls_score)
    return model.to(device)


def _torchvision_model(job: Job, device: torch.device) -> TorchvisionMaskRCNN:
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=torchvision.ops.FrozenBatchNorm2d, trainable_layers=3
    )
    sides = sorted((job.height, job.width))  # so that its transform does not resize the image
    model = TorchvisionMaskRCNN(backbone, NUM_CLASSES + 1, min_size=sides[0], max_size=sides[1])
    _draw_weights(model, model.roi_heads.box_predictor.cls_score)
    return model.to(device)


@torch.no_grad()
def _draw_weights(model: nn.Module, scores: nn.Linear) -> None:
    """Draw the same random weights for both models, so that they have the same workload.

    Both have their parameters in the same order. Only the last layers differ in shape: torchvision predicts boxes and
    masks for background too. Three classes get high scores, so that each image has 100 detections.
    """
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        # torchvision calls our `neck` `backbone.fpn`.
        in_backbone = name.startswith("backbone.") and not name.startswith("backbone.fpn.")
        std = (2 / parameter[0].numel()) ** 0.5 if in_backbone else 0.01 * (parameter.dim() > 1)
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    for name, weight in model.named_buffers():
        if name.endswith(
            "bn3.weight"
        ):  # the last norm of each residual branch; small weights keep the activations bounded
            weight.fill_(0.2)
    scores.bias[1:4] += 5


def _count_regions(box_head: nn.Module, mask_head: nn.Module) -> dict[str, float]:
    """Return a dict of the number of RoIs in the last call of each head; forward hooks update it."""
    counts: dict[str, float] = {}
    for name, head in (("box regions", box_head), ("mask regions", mask_head)):

        def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Any, name: str = name) -> None:
            counts[name] = len(inputs[0])

        head.register_forward_hook(count)
    return counts


# ---- The tasks


def our_training(job: Job, device: torch.device) -> Step:
    """Return a training step of this project's training loop."""
    config = _our_experiment()
    model = _our_model(config, device)
    batch = _our_batch(_scenes(job, 2), model.size_divisor)
    optimizer = config.training.optimizer.build(model, batch_size=len(batch.images))
    training_step = TrainingStep(TrainingState(model, optimizer), Processes(device), precision=job.precision)
    counts = _count_regions(model.box_head, model.mask_head)

    def step() -> dict[str, float]:
        training_step([batch], 1)
        return counts

    return step


def torchvision_training(job: Job, device: torch.device) -> Step:
    """Return a training step as in torchvision's reference scripts."""
    model = _torchvision_model(job, device).train()
    images = [scene.pixels / 255 for scene in _scenes(job, 2)]
    targets = [_torchvision_target(scene) for scene in _scenes(job, 2)]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(
        trainable, lr=0.0025, momentum=0.9, weight_decay=1e-4
    )  # 0.02 for 16 images, scaled to 2
    counts = _count_regions(model.roi_heads.box_head, model.roi_heads.mask_head)

    def step() -> dict[str, float]:
        targets_on_device = [{key: value.to(device) for key, value in target.items()} for target in targets]
        with _autocast(job, device):
            losses = model([image.to(device) for image in images], targets_on_device)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        return counts

    return step


def our_inference(job: Job, device: torch.device) -> Step:
    """Return a step that detects the objects of one image and encodes the results, as evaluation does."""
    model = _our_model(_our_experiment(), device).eval()
    batch = _our_batch(_scenes(job, 1), model.size_divisor)
    classes = ClassTable(tuple(f"class {label}" for label in range(NUM_CLASSES)), tuple(range(NUM_CLASSES)))
    counts = _count_regions(model.box_head, model.mask_head)

    def step() -> dict[str, float]:
        with _autocast(job, device):
            detections = model.detect(batch.images.to(device))
        (instances,) = Instances.of_batch(detections, batch, classes)
        return counts | {"detections": len(instances.to_coco(image_id=0))}

    return step


def torchvision_inference(job: Job, device: torch.device) -> Step:
    """Return a step that calls torchvision's model in eval mode."""
    model = _torchvision_model(job, device).eval()
    image = _scenes(job, 1)[0].pixels / 255
    counts = _count_regions(model.roi_heads.box_head, model.roi_heads.mask_head)

    @torch.no_grad()
    def step() -> dict[str, float]:
        with _autocast(job, device):
            detections = model([image.to(device)])
        return counts | {"detections": len(detections[0]["masks"])}

    return step


def _roi_step(job: Job, device: torch.device, *, ours: bool) -> Step:
    """Return a step of RoIAlign, forward and backward, on a feature map in the memory format of the model."""
    generator = torch.Generator().manual_seed(0)
    height, width = -(-job.height // 4), -(-job.width // 4)
    features = torch.rand(1, 256, height, width, generator=generator).to(device)
    features = features.to(memory_format=torch.channels_last if ours else torch.contiguous_format).requires_grad_()
    boxes, images = _boxes(job, 1000, generator).to(device), torch.zeros(1000, dtype=torch.int64, device=device)
    output_gradient = torch.rand(1000, 256, 7, 7, generator=generator).to(device)

    def step() -> dict[str, float]:
        features.grad = None
        with _autocast(job, device):
            if ours:
                pooled = roi_align(features, boxes, images, stride=4, size=7, aligned=False)
            else:
                pooled = torchvision.ops.roi_align(features, [boxes], 7, 0.25, 2, aligned=False)
        pooled.backward(output_gradient)
        assert features.grad is not None
        return {"sum": float(pooled.detach().sum()), "gradient sum": float(features.grad.sum())}

    return step


def _boxes(job: Job, count: int, generator: torch.Generator) -> Tensor:
    """Return (count, 4) boxes with sides between 1/40 of the image and the whole image."""
    image_size = torch.tensor([job.width, job.height], dtype=torch.float32)
    sizes = image_size * torch.exp(-3.7 * torch.rand(count, 2, generator=generator))
    corners = (image_size - sizes) * torch.rand(count, 2, generator=generator)
    return torch.cat((corners, corners + sizes), dim=1)


def _masks_step(job: Job, device: torch.device, *, ours: bool) -> Step:
    """Return a step that converts mask probabilities, as smooth as those of a trained head, to run-length codes."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(100, 1, 4, 4, generator=generator)
    masks = nn.functional.interpolate(coarse, size=28, mode="bicubic").clamp(0, 1).to(device)
    boxes = _boxes(job, 100, generator).to(device)
    size = (job.height, job.width)

    def step() -> dict[str, float]:
        encode = partial(encode_masks, convention="torchvision") if ours else _paste_and_encode
        codes = encode(masks[:, 0] if ours else masks, boxes, *size)
        return {"masks": len(codes), "pixels": float(cocoapi.area(codes).sum())}

    return step


def _paste_and_encode(masks: Tensor, boxes: Tensor, height: int, width: int) -> list[dict[str, Any]]:
    """Paste and encode as torchvision's model and its reference evaluation (coco_eval.py), but 0.5 counts as inside."""
    pasted = (paste_masks_in_image(masks, boxes, (height, width)) >= 0.5).cpu().numpy()
    return [cocoapi.encode(np.array(mask[0, :, :, np.newaxis], dtype=np.uint8, order="F"))[0] for mask in pasted]


def random_matches(images: int, categories: int, objects: int, detections: int) -> Matches:
    """Return random matches like those of a good model on COCO.

    80 % of the objects are detected, at 1 to 10 IoU thresholds; all other detections are false positives. Categories
    and sizes are distributed as in COCO: 41 % of the objects are small, 34 % medium, 25 % large.
    """
    rng = np.random.default_rng(0)
    category_shares = np.arange(1, categories + 1) ** -0.9
    probabilities = category_shares / category_shares.sum()
    object_images = rng.integers(images, size=objects)
    object_categories = np.sort(rng.choice(categories, objects, p=probabilities))
    object_sizes = rng.choice(3, objects, p=[0.41, 0.34, 0.25]) + 1

    detected = np.flatnonzero(rng.random(objects) < 0.8)
    num_false = detections - len(detected)
    image = np.concatenate([object_images[detected], rng.integers(images, size=num_false)])
    category = np.concatenate([object_categories[detected], rng.choice(categories, num_false, p=probabilities)])
    size = np.concatenate([object_sizes[detected], rng.integers(1, 4, num_false)])
    score = np.concatenate([rng.beta(5, 2, len(detected)), rng.beta(1, 8, num_false)])
    hits = 2 ** rng.integers(1, 11, len(detected)) - 1  # a bit for each IoU threshold
    hits = np.concatenate([hits, np.zeros(num_false, np.int64)])
    order = np.lexsort((-score, category))
    in_range = _areas_of(size[order])
    return Matches(
        image_ids=np.arange(images),
        category_ids=np.arange(categories),
        object_images=object_images.astype(np.int32),
        object_categories=object_categories.astype(np.int32),
        object_areas=_areas_of(object_sizes),
        images=image[order].astype(np.int32),
        categories=category[order].astype(np.int32),
        scores=score[order],
        true_positives=(hits[order][:, None] * in_range).astype(np.uint16),
        ignored=(EVERY * ~in_range).astype(np.uint16),
    )


def _areas_of(sizes: np.ndarray) -> np.ndarray:
    """Return the (n, 4) bool membership in the area ranges all, small (size 1), medium (2) and large (3)."""
    return (np.arange(4) == 0) | (np.arange(4) == sizes[:, None])


def our_bootstrap(job: Job, device: torch.device) -> Step:
    """Return a step of the bootstrap that an ablation report computes for each run."""
    matches = random_matches(images=5000, categories=80, objects=36_000, detections=250_000)
    counts = draw_counts(5000, 1000, seed=0)
    work = {"images": 5000, "objects": 36_000, "detections": 250_000, "resamples": 1000}

    def step() -> dict[str, float]:
        figures = resampled_figures(matches, counts)
        return work | {f"mean {name}": float(values.mean()) for name, values in figures.items()}

    return step


def _autocast(job: Job, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=job.precision == "bf16")


STEPS: dict[tuple[str, str], Callable[[Job, torch.device], Step]] = {
    ("training", "ours"): our_training,
    ("training", "torchvision"): torchvision_training,
    ("inference", "ours"): our_inference,
    ("inference", "torchvision"): torchvision_inference,
    ("roi", "ours"): partial(_roi_step, ours=True),
    ("roi", "torchvision"): partial(_roi_step, ours=False),
    ("masks", "ours"): partial(_masks_step, ours=True),
    ("masks", "torchvision"): partial(_masks_step, ours=False),
    ("bootstrap", "ours"): our_bootstrap,
}


# ---- The protocol


def main() -> None:
    """Prepare the task, then perform it once per input line."""
    job = Job(**json.loads(sys.argv[1]))
    if job.side == "ours":
        keep_freed_memory()
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    device = choose_device(job.device)
    step = _prepared(job, device)
    _write_line(environment(device))
    for _ in sys.stdin:
        start = time.perf_counter()
        work = step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        _write_line([time.perf_counter() - start, work])
    _write_line(peak_memory(device))


def _prepared(job: Job, device: torch.device) -> Step:
    if job.photos is None:
        return STEPS[job.task, job.side](job, device)
    import data_steps

    root, split, count = job.photos
    return data_steps.prepare(job.task, job.side, data_steps.Photos(Path(root), split, count))


def _write_line(value: Any) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    run_main(main)
