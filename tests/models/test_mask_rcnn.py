"""The complete model: unusual images and objects, independence of an image from its batch, shapes, compilation."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel

from maskrcnn.data.loader import collate
from maskrcnn.engine.optimizer import HasStages
from maskrcnn.errors import InputError
from maskrcnn.models.losses import mask_loss
from maskrcnn.models.mask_rcnn import MaskRCNN, MaskRCNNConfig, PixelNormalizer
from maskrcnn.models.necks.parts import NoNeck, NoNeckConfig
from maskrcnn.structures import Batch, Example, ImageBatch, Losses, MaskCrop

K = 4
SIDE = 64

BACKBONES: dict[str, dict[str, Any]] = {
    "fpn": {
        "backbone": {"kind": "resnet", "depth": 18, "width": 32},
        "neck": {"kind": "fpn", "channels": 16},
        "rpn": {"anchor_sizes": [[8], [16], [32], [64], [128]]},
        "box_head": {"kind": "fc", "width": 32},
        "mask_head": {"kind": "fcn", "depth": 1, "width": 16},
    },
    "c4": {
        "backbone": {"kind": "resnet", "depth": 18, "width": 32, "out_features": ["res4"], "res5_on_regions": True},
        "neck": {"kind": "none"},
        "rpn": {"anchor_sizes": [[8, 16, 32, 64]]},
        "box_head": {"kind": "mean"},
        "mask_head": {"kind": "fcn", "depth": 0, "width": 16},
    },
    "conv5": {
        "backbone": {"kind": "vgg", "depth": 11, "out_features": ["conv5"]},
        "neck": {"kind": "none"},
        "rpn": {"anchor_sizes": [[8, 16, 32, 64]]},
        "box_head": {"kind": "fc", "width": 32},
        "mask_head": {"kind": "fcn", "depth": 1, "width": 16},
    },
}

Objects = Sequence[tuple[tuple[float, float, float, float], int]]  # box and label
SOME: Objects = (((4, 6, 30, 40), 1), ((20, 10, 60, 50), 3), ((2, 40, 20, 62), 4))
NO_MASK = MaskCrop(0, 0, np.zeros((0, 0), np.uint8))


def build(kind: str, *, classes: int = K, **settings: Any) -> MaskRCNN:
    torch.manual_seed(1)
    sections = {key: dict(value) for key, value in BACKBONES[kind].items()}
    sections["backbone"]["weights"] = "none"
    sections["rpn"] |= {
        "training": {"pre_nms_top_n": 60, "post_nms_top_n": 30},
        "inference": {"pre_nms_top_n": 40, "post_nms_top_n": 20},
        "batch_size_per_image": 32,
    }
    small = {
        "sampling": {"batch_size_per_image": 16},
        "detection": {"detections_per_image": 10, "score_threshold": 0.0},
    }
    return MaskRCNNConfig.model_validate(sections | small | settings).build(classes)


def example(
    objects: Objects = SOME, *, key: int = 0, height: int = SIDE, width: int = SIDE, empty_masks: bool = False
) -> Example:
    """Return a random image; the mask of each object is the upper half of its box."""
    pixels = np.random.default_rng(key).integers(0, 256, (3, height, width), dtype=np.uint8)
    masks = []
    for (x1, y1, x2, y2), _ in objects:
        crop = np.ones((max(1, int(y2 - y1) // 2), max(1, int(x2 - x1))), np.uint8)
        masks.append(NO_MASK if empty_masks else MaskCrop(int(x1), int(y1), crop))
    return Example(
        image_id=key,
        pixels=torch.from_numpy(pixels),
        boxes=torch.tensor([box for box, _ in objects], dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor([label for _, label in objects], dtype=torch.int64),
        masks=tuple(masks),
    )


def batch(model: MaskRCNN, *examples: Example, divisor: int | None = None) -> Batch:
    return collate(examples, [7 + item.image_id for item in examples], divisor or model.size_divisor)


def losses(model: MaskRCNN, *examples: Example) -> Losses:
    inputs = batch(model, *examples)
    return model(inputs.images, inputs.targets)


def assert_learns(model: MaskRCNN, result: Losses) -> None:
    """Assert that all loss terms are finite and that all trainable parameters get a finite gradient."""
    assert all(term.dim() == 0 and term.isfinite() for term in result)
    model.zero_grad()
    result.total.backward()
    without_gradient = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without_gradient
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.fixture(scope="module", params=BACKBONES)
def model(request: pytest.FixtureRequest) -> MaskRCNN:
    return build(request.param)


@pytest.fixture(scope="module")
def pyramid() -> MaskRCNN:
    return build("fpn")


MASK_HEADS = {
    f"{kind}-{output}-{'all classes' if class_agnostic else 'each class'}": {
        "kind": kind, "depth": 1, "width": 8, "output": output, "class_agnostic": class_agnostic
    }
    for kind in ("fcn", "mlp")
    for output in ("sigmoid", "softmax")
    for class_agnostic in (False, True)
}  # fmt: skip
each_mask_head = pytest.mark.parametrize("mask_head", MASK_HEADS.values(), ids=MASK_HEADS)


# An image alone and in a batch.


def test_one_batch_of_two_images_equals_two_batches_of_one(model: MaskRCNN) -> None:
    one, two = example(key=1), example([((50, 50, 58, 58), 2)], key=2)  # many and few positives
    together, first, second = losses(model, one, two), losses(model, one), losses(model, two)
    for name, both, alone, other in zip(Losses._fields, together, first, second, strict=True):
        assert both > 0
        torch.testing.assert_close(both, (alone + other) / 2, rtol=1e-5, atol=1e-5, msg=lambda t, n=name: f"{n}: {t}")


def test_gradients_of_one_batch_of_two_equal_the_mean_of_two_of_one(pyramid: MaskRCNN) -> None:
    def gradients(*examples: Example) -> dict[str, Tensor]:
        pyramid.zero_grad()
        losses(pyramid, *examples).total.backward()
        return {name: p.grad.clone() for name, p in pyramid.named_parameters() if p.grad is not None}

    one, two = example(key=1), example((), key=2)
    together, first, second = gradients(one, two), gradients(one), gradients(two)
    for name, both in together.items():
        torch.testing.assert_close(both, (first[name] + second[name]) / 2, rtol=1e-4, atol=1e-5)


def test_detections_do_not_depend_on_the_rest_of_the_batch(model: MaskRCNN) -> None:
    one, two = example(key=1), example(key=2)
    together = model.detect(batch(model, one, two).images)
    alone = model.detect(batch(model, two).images)
    assert alone.valid.sum() > 3
    assert torch.equal(together.labels[1], alone.labels[0])
    for both, single in ((together.boxes, alone.boxes), (together.scores, alone.scores), (together.masks, alone.masks)):
        torch.testing.assert_close(both[1], single[0], rtol=1e-4, atol=1e-4)


def test_outputs_do_not_depend_on_train_or_eval_mode(model: MaskRCNN) -> None:
    inputs = batch(model, example())
    training = model.train()(inputs.images, inputs.targets), model.detect(inputs.images)
    evaluating = model.eval()(inputs.images, inputs.targets), model.detect(inputs.images)
    for one, other in zip(training[0], evaluating[0], strict=True):
        assert torch.equal(one, other)
    for name in ("boxes", "scores", "labels", "masks"):
        assert torch.equal(getattr(training[1], name), getattr(evaluating[1], name))


def test_sampling_depends_on_the_seed_of_the_image(pyramid: MaskRCNN) -> None:
    item = example()

    def losses_with_seed(seed: int) -> list[float]:
        inputs = collate([item], [seed], pyramid.size_divisor)
        return [term.item() for term in pyramid(inputs.images, inputs.targets)]

    assert losses_with_seed(1) == losses_with_seed(1)
    assert losses_with_seed(1) != losses_with_seed(2)


# Kinds and numbers of objects.


def test_every_parameter_learns(model: MaskRCNN) -> None:
    result = losses(model, example(key=1), example(key=2))
    assert_learns(model, result)
    assert all(p.grad.any() for name, p in model.named_parameters() if p.requires_grad and p.dim() > 1)


def test_images_without_objects(model: MaskRCNN) -> None:
    result = losses(model, example((), key=1), example((), key=2))
    assert result.loss_rpn_box_reg == result.loss_box_reg == result.loss_mask == 0
    assert result.loss_objectness > 0
    assert result.loss_classifier > 0
    assert_learns(model, result)


def test_an_image_without_objects_beside_one_with(model: MaskRCNN) -> None:
    result = losses(model, example((), key=1), example(key=2))
    assert result.loss_mask > 0
    assert_learns(model, result)


def test_objects_of_one_pixel(model: MaskRCNN) -> None:
    result = losses(model, example([((10, 10, 11, 11), 2), ((63, 63, 64, 64), 1), ((0, 0, 1, 1), 4)]))
    assert result.loss_mask > 0
    assert_learns(model, result)


def test_objects_without_area(model: MaskRCNN) -> None:
    assert_learns(model, losses(model, example([((10, 10, 10, 10), 2), ((5, 5, 20, 5), 1), ((4, 4, 30, 30), 3)])))


def test_objects_without_mask_pixels(model: MaskRCNN) -> None:
    result = losses(model, example(empty_masks=True))
    assert result.loss_mask > 0  # the target of every cell is 0
    assert_learns(model, result)


# Objects that are annotated with a box alone.


def gradients(model: MaskRCNN, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradient of every trainable parameter."""
    model.zero_grad()
    loss.backward(retain_graph=True)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def without_masks(item: Example, *numbers: int) -> Example:
    """Return the example with objects that have a box alone; all of them by default."""
    removed = numbers or range(len(item.masks))
    kept = [NO_MASK if index in removed else mask for index, mask in enumerate(item.masks)]
    has_mask = torch.tensor([mask is not NO_MASK for mask in kept], dtype=torch.bool)
    return dataclasses.replace(item, masks=tuple(kept), has_mask=has_mask)


def test_boxes_alone_train_the_boxes_as_with_masks_and_no_mask(model: MaskRCNN) -> None:
    whole, boxes = losses(model, example(key=1)), losses(model, without_masks(example(key=1)))
    assert boxes[:4] == whole[:4]
    assert boxes.loss_mask == 0 < whole.loss_mask
    of_boxes, expected = gradients(model, boxes.total), gradients(model, torch.stack(whole[:4]).sum())
    in_mask_head = {name for name in of_boxes if name.startswith("mask_head.")}
    assert in_mask_head
    assert not any(of_boxes[name].any() for name in in_mask_head)
    assert of_boxes.keys() - in_mask_head == expected.keys()
    for name, gradient in expected.items():
        assert torch.equal(of_boxes[name], gradient), name


def test_the_mask_loss_is_the_mean_over_objects_with_a_mask(pyramid: MaskRCNN, monkeypatch: pytest.MonkeyPatch) -> None:
    item, weights = without_masks(example(key=1), 0), []

    def record(outputs: Any, targets: Tensor, *, positive: Tensor, **options: Any) -> Tensor:
        weights.append(positive)
        return mask_loss(outputs, targets, positive=positive, **options)

    monkeypatch.setattr("maskrcnn.models.mask_rcnn.mask_loss", record)
    mixed = losses(pyramid, item)
    inputs = batch(pyramid, item)
    features = pyramid.features(inputs.images)
    proposals, _ = pyramid.rpn(features, inputs.images, inputs.targets)
    samples = pyramid.sampler(proposals, inputs.targets, inputs.images.seeds)
    with_mask = (samples.labels > 0) & (samples.matched != 0)
    assert 0 < with_mask.sum() == weights[0].sum() < (samples.labels > 0).sum()
    # The pixels of a mask that the object does not have do not matter.
    other = dataclasses.replace(item, masks=(example(key=1).masks[0], *item.masks[1:]))
    assert losses(pyramid, other) == mixed


def test_crowds_are_neither_objects_nor_background(pyramid: MaskRCNN) -> None:
    result = losses(pyramid, example([((0, 0, SIDE, SIDE), -1)], empty_masks=True))
    assert result.loss_box_reg == result.loss_mask == result.loss_classifier == 0
    assert_learns(pyramid, result)


def test_five_hundred_objects(model: MaskRCNN) -> None:
    rng = np.random.default_rng(0)
    corners, sides = rng.uniform(0, 50, (500, 2)), rng.uniform(1, 14, (500, 2))
    boxes = np.concatenate([corners, corners + sides], axis=1).tolist()
    objects = [(tuple(box), int(label)) for box, label in zip(boxes, rng.integers(1, K + 1, 500), strict=True)]
    assert_learns(model, losses(model, example(objects)))


# Shapes.


def shapes(model: MaskRCNN, inputs: Batch) -> list[tuple[int, ...]]:
    features = model.features(inputs.images)
    proposals = model.rpn.propose(features, inputs.images.sizes, model.rpn.training_counts)
    samples = model.sampler(proposals, inputs.targets, inputs.images.seeds)
    detections = model.detect(inputs.images)
    tensors = [*features, proposals.boxes, proposals.scores, samples.boxes, samples.labels, samples.matched]
    tensors += [detections.boxes, detections.scores, detections.labels, detections.masks]
    return [tuple(tensor.shape) for tensor in tensors]


def test_intermediate_shapes_are_constant(model: MaskRCNN) -> None:
    """For any number of objects and any size of the images within their padding."""
    many: Objects = [((x, y, x + 9, y + 9), 1) for x in range(0, 50, 10) for y in range(0, 50, 10)]
    first, *others = (
        shapes(model, batch(model, *examples, divisor=SIDE))
        for examples in (
            [example(), example(key=1)],
            [example(many), example((), key=1)],
            [example((), height=20, width=33), example((), height=64, width=17)],
        )
    )
    assert all(other == first for other in others)
    side = model.mask_pooler.size // (2 if model.region_stage is not None else 1) * 2
    assert first[-9:] == [
        (2, 30, 4), (2, 30), (2, 16, 4), (2, 16), (2, 16), (2, 10, 4), (2, 10), (2, 10), (2, 10, side, side)
    ]  # fmt: skip


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_compiled_backbone_is_compiled_once(kind: str) -> None:
    model = build(kind)
    counter = CompileCounter()
    torch._dynamo.reset()
    plain = [term.item() for term in losses(model, example(key=3))]
    model.backbone = torch.compile(model.backbone, backend=counter, fullgraph=True)
    compiled = losses(model, example(key=3))
    assert [term.item() for term in compiled] == pytest.approx(plain)
    compiled.total.backward()
    for other in (example((), key=4), example(SOME[:1], key=5, height=40)):
        inputs = batch(model, other, divisor=SIDE)  # padded to the same size
        model(inputs.images, inputs.targets).total.backward()
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    "kind", ["conv5", pytest.param("c4", marks=pytest.mark.slow), pytest.param("fpn", marks=pytest.mark.slow)]
)
def test_compiled_modules_give_the_same_results_for_several_sizes(kind: str) -> None:
    models = plain, compiled = build(kind), build(kind)
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled.compile_dense(backend=counter, fullgraph=True)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    counts = []
    for height, width in ((96, 128), (128, 192), (160, 96)):
        examples = [example(key=1, height=height), example(SOME[1:], key=2, width=width)]
        results = []
        for model in models:
            terms = losses(model, *examples)
            results.append([*terms, *torch.autograd.grad(terms.total, _trainable(model))])
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)
        counts.append(counter.frame_count)
    fixed = 2 if kind == "fpn" else 1  # backbone and, if it has layers, neck: compiled for a fixed size first
    modules = fixed + 3 + (compiled.region_stage is not None)
    assert counts == [modules, modules + fixed, modules + fixed]


def _trainable(model: MaskRCNN) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.slow
def test_compiled_modules_work_under_ddp(tmp_path: Path) -> None:
    plain, compiled = build("fpn"), build("fpn")
    torch._dynamo.reset()
    compiled.compile_dense(backend="aot_eager")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    wrapped = DistributedDataParallel(compiled, gradient_as_bucket_view=True)
    inputs = batch(plain, example(key=1), example((), key=2))
    for model in (plain, wrapped):
        model(inputs.images, inputs.targets).total.backward()
    dist.destroy_process_group()
    for one, other in zip(_trainable(plain), _trainable(compiled), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


# Memory.


def test_the_memory_format_is_kept(pyramid: MaskRCNN) -> None:
    """Also after loading contiguous weights, and in gradients and momentum buffers."""
    state = {name: value.contiguous().clone() for name, value in pyramid.state_dict().items()}
    pyramid.load_state_dict(state)
    optimizer = torch.optim.SGD(_trainable(pyramid), lr=1e-9, momentum=0.9)
    losses(pyramid, example()).total.backward()
    optimizer.step()
    kernels = [parameter for parameter in _trainable(pyramid) if parameter.dim() == 4]
    assert any(parameter.shape[2] > 1 for parameter in kernels)
    for parameter in kernels:
        for tensor in (parameter, parameter.grad, optimizer.state[parameter]["momentum_buffer"]):
            assert tensor.is_contiguous(memory_format=torch.channels_last)


# Pixels.


@pytest.mark.parametrize("order", ["rgb", "bgr"])
def test_pixels_by_hand(order: Any) -> None:
    normalize = PixelNormalizer(order=order, mean=(10.0, 20.0, 30.0), std=(2.0, 4.0, 5.0))
    pixels = torch.tensor([12, 40, 70], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    normalized = normalize(ImageBatch(pixels, torch.tensor([[1, 2]]), torch.zeros(1)))
    colour = {"rgb": [1.0, 5.0, 8.0], "bgr": [30.0, 5.0, -3.6]}[order]
    assert normalized[0, :, 0, 0].tolist() == normalized[0, :, 0, 1].tolist() == pytest.approx(colour)
    assert not normalized[0, :, 1].any()  # the padding is the mean colour


def test_detections_are_outside_the_padding(model: MaskRCNN) -> None:
    inputs = batch(model, example(height=40, width=50), example(height=17, width=30, key=1), divisor=128)
    assert inputs.images.pixels.shape == (2, 3, 128, 128)
    detections = model.detect(inputs.images)
    assert detections.valid.sum(dim=1).min() > 2
    for index, (height, width) in enumerate([(40, 50), (17, 30)]):
        boxes = detections.boxes[index][detections.valid[index]]
        assert boxes.min() >= 0
        assert boxes[:, 2].max() <= width
        assert boxes[:, 3].max() <= height
        assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_the_pixels_of_the_padding_do_not_matter(pyramid: MaskRCNN) -> None:
    images = batch(pyramid, example(height=40, width=50)).images
    pixels = images.pixels.clone()
    pixels[:, :, 40:] = 255
    pixels[:, :, :, 50:] = 99
    expected = pyramid.detect(images)
    detections = pyramid.detect(ImageBatch(pixels, images.sizes, images.seeds))
    assert torch.equal(expected.boxes, detections.boxes)


# Detections.


def test_the_mask_of_a_detection_is_that_of_its_predicted_class(model: MaskRCNN) -> None:
    layers = (model.mask_head.logits, model.box_head.cls_score)
    before = [{name: value.clone() for name, value in layer.state_dict().items()} for layer in layers]
    with torch.no_grad():
        model.box_head.cls_score.weight.zero_()  # equal scores: detections of every class
        model.box_head.cls_score.bias.zero_()
        model.mask_head.logits.weight.zero_()
        model.mask_head.logits.bias.copy_(torch.tensor([-2.0, -1, 1, 2]))
    detections = model.detect(batch(model, example()).images)
    for layer, state in zip(layers, before, strict=True):
        layer.load_state_dict(state)
    labels, masks = detections.labels[detections.valid], detections.masks[detections.valid]
    assert len(labels.unique()) > 1
    expected = torch.tensor([-2.0, -1, 1, 2]).sigmoid()[labels - 1]
    torch.testing.assert_close(masks, expected[:, None, None].expand_as(masks))


@pytest.mark.parametrize("kind", ["fpn", "c4"])
@each_mask_head
def test_every_mask_head_learns_and_detects(kind: str, mask_head: dict[str, Any]) -> None:
    model = build(kind, mask_head=mask_head | {"initialization": "detectron2"})  # masks that start near 0.5
    result = losses(model, example(key=1), example((), key=2))
    assert result.loss_mask > 0
    assert_learns(model, result)
    assert all(p.grad is not None and p.grad.any() for p in model.mask_head.parameters())
    detections = model.detect(batch(model, example()).images)
    side = 28 if kind == "fpn" or mask_head["kind"] == "mlp" else 14  # stage 5 halves the region of 14
    masks = detections.masks[detections.valid]
    assert masks.shape[1:] == (side, side)
    # At initialization, probabilities are nearly uniform over inside and outside, or over the channels.
    channels = 2 if mask_head["output"] == "sigmoid" or mask_head["class_agnostic"] else K + 1
    torch.testing.assert_close(masks, torch.full_like(masks, 1 / channels), atol=0.05, rtol=0.0)


def test_an_image_without_detections(pyramid: MaskRCNN) -> None:
    pyramid.selector.score_threshold, before = 1.0, pyramid.selector.score_threshold
    detections = pyramid.detect(batch(pyramid, example(), example(key=1)).images)
    pyramid.selector.score_threshold = before
    assert not detections.valid.any()
    assert detections.masks.shape == (2, 10, 28, 28)
    assert not detections.masks.any()


@pytest.mark.parametrize("kind", ["fpn", pytest.param("c4", marks=pytest.mark.slow)])
def test_bfloat16_on_a_cpu(kind: str) -> None:
    model = build(kind)
    inputs = batch(model, example())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        detections = model.detect(inputs.images)
        result = model(inputs.images, inputs.targets)
    assert detections.boxes.dtype == detections.scores.dtype == detections.masks.dtype == torch.float32
    assert detections.valid.sum() > 2
    assert all(term.dtype == torch.float32 for term in result)
    assert_learns(model, result)


def test_the_stages_hold_the_parameters_of_the_classifier(model: MaskRCNN) -> None:
    assert isinstance(model, HasStages)
    stages = model.stages()
    assert len(stages) == 5
    in_stages = {id(parameter) for stage in stages for parameter in stage.parameters()}
    names = {name.partition(".")[2] for name, p in model.named_parameters() if id(p) in in_stages}
    assert {name.split(".")[0] for name in names} <= {"conv1", "layer1", "layer2", "layer3", "layer4", "features"}
    assert "features.0.weight" in names or {"conv1.weight", "layer4.1.conv2.weight"} <= names


# The configuration.


def test_the_heads_of_c4_need_an_even_side() -> None:
    with pytest.raises(ValueError, match="pool_size of both heads must be a multiple of 2"):
        build("c4", mask_head={"kind": "fcn", "pool_size": 7})


def test_loss_weights_are_factors() -> None:
    weights = {"loss_mask": 2.0, "loss_rpn_box_reg": 0.0}
    plain = losses(build("fpn"), example(key=1))
    torch.manual_seed(0)  # as before each test: the same model
    weighted = losses(build("fpn", loss_weights=weights), example(key=1))
    for name, one, two in zip(Losses._fields, plain, weighted, strict=True):
        assert two == one * weights.get(name, 1.0)


@pytest.mark.parametrize("kind", ["c4", "fpn"])
def test_without_a_mask_head_the_boxes_are_the_same(kind: str) -> None:
    whole = build(kind)
    boxes_alone = build(kind, mask_head=None)
    boxes_alone.load_state_dict({k: v for k, v in whole.state_dict().items() if not k.startswith("mask_head.")})
    first, second = losses(whole, example(key=1)), losses(boxes_alone, example(key=1))
    assert second.loss_mask == 0
    assert first[:4] == second[:4]
    second.total.backward()
    batch = collate([example(key=1)], [0], whole.size_divisor)
    one, two = whole.detect(batch.images), boxes_alone.detect(batch.images)
    assert torch.equal(one.boxes, two.boxes)
    assert two.masks.shape == (*one.labels.shape, 0, 0)
    assert not any(name.startswith("mask_head") for name in boxes_alone.class_rows())


@pytest.mark.parametrize("kind", ["c4", "fpn"])
def test_each_head_may_have_a_roi_layer_of_its_own(kind: str) -> None:
    """`roi` of one head changes the losses of that head and not those of the other."""
    pool = {"roi": {"kind": "roi_pool"}}
    changes: dict[str, dict[str, Any]] = {
        "both align": {},
        "box pool": {"box_head": BACKBONES[kind]["box_head"] | pool},
        "mask pool": {"mask_head": BACKBONES[kind]["mask_head"] | pool},
        "both pool": pool,
    }
    results = {name: losses(build(kind, **change), example()) for name, change in changes.items()}
    align, pooled = results["both align"], results["both pool"]
    assert align.loss_mask != pooled.loss_mask
    assert align.loss_classifier != pooled.loss_classifier
    for name, box, mask in (("box pool", pooled, align), ("mask pool", align, pooled)):
        torch.testing.assert_close(results[name].loss_classifier, box.loss_classifier)
        torch.testing.assert_close(results[name].loss_box_reg, box.loss_box_reg)
        torch.testing.assert_close(results[name].loss_mask, mask.loss_mask)


RES4 = {"kind": "resnet", "depth": 18, "out_features": ["res4"]}
RES45 = {"kind": "resnet", "depth": 18, "out_features": ["res4", "res5"]}
ALL = {"kind": "resnet", "depth": 18}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"rpn": {"anchor_sizes": [[32]]}},
            "rpn.anchor_sizes has 1 levels, but neck.kind fpn returns 5 maps (strides 4,",
        ),
        (
            {"backbone": RES4},
            "neck.kind fpn needs two or more feature maps whose strides double, but the backbone returns 1 map "
            "(stride 16): set backbone.out_features, or neck.kind to none",
        ),
        ({"backbone": {**RES45, "res5_dilation": 2}}, "the backbone returns 2 maps (strides 16, 16)"),
        (
            {"backbone": RES45, "neck": {"kind": "none"}, "rpn": {"anchor_sizes": [[32]]}},
            "rpn.anchor_sizes has 1 levels, but neck.kind none returns 2 maps (strides 16, 32): the RPN needs one list "
            "of sizes for each; backbone.out_features and neck select the maps",
        ),
        ({"backbone": {**RES4, "res5_dilation": 2}}, "res5_dilation needs res5 in out_features"),
        ({"backbone": {**RES45, "res5_on_regions": True}}, "res5_on_regions needs out_features: [res4]"),
        ({"backbone": {**ALL, "out_features": ["res5", "res2"]}}, "one or more of res2, res3, res4, res5, in this"),
        ({"backbone": {**ALL, "out_features": []}}, "one or more of res2, res3, res4, res5, in this order, each"),
        (
            {"backbone": {"kind": "vgg", "out_features": ["conv5", "conv5"]}},
            "one or more of conv3, conv4, conv5, pool5, in this order",
        ),
    ],
)
def test_backbone_neck_and_anchors_must_fit(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        MaskRCNNConfig.model_validate(sections)


def test_without_a_neck_the_maps_need_equal_channels() -> None:
    sections = {
        "backbone": {**RES45, "weights": "none"},
        "neck": {"kind": "none"},
        "rpn": {"anchor_sizes": [[32], [64]]},
    }
    with pytest.raises(
        InputError, match=r"model\.neck: .* maps of 256, 512: select one in model\.backbone\.out_features"
    ):
        MaskRCNNConfig.model_validate(sections).build(2)


def test_two_maps_of_equal_channels_need_no_neck() -> None:
    """A VGG's conv4 and conv5 both have 512 channels."""
    vgg = {"kind": "vgg", "depth": 11, "out_features": ["conv4", "conv5"], "weights": "none"}
    model = build("conv5", backbone=vgg, rpn={"anchor_sizes": [[16], [32]]})
    assert model.rpn.anchor_generator.strides == model.box_pooler.strides == (8, 16)
    assert_learns(model, losses(model, example()))


def test_a_pyramid_may_have_fewer_levels() -> None:
    resnet = {**ALL, "out_features": ["res3", "res4", "res5"], "weights": "none"}
    model = build("fpn", backbone=resnet, rpn={"anchor_sizes": [[16], [32], [64], [128]]})
    assert model.rpn.anchor_generator.strides == (8, 16, 32, 64)
    assert model.box_pooler.strides == (8, 16, 32)
    assert_learns(model, losses(model, example()))


def test_a_region_stage_needs_the_channels_of_the_backbone() -> None:
    class Narrow(NoNeck):
        def __init__(self) -> None:
            super().__init__(8, (16,))

    config = MaskRCNNConfig.model_validate(
        {**BACKBONES["c4"], "backbone": {**BACKBONES["c4"]["backbone"], "weights": "none"}}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NoNeckConfig, "build", lambda self, **maps: Narrow())
        with pytest.raises(
            InputError, match=r"maps of 8 channels, but a stage of model\.backbone that runs on regions needs 128"
        ):
            config.build(2)


@pytest.mark.parametrize("kind", BACKBONES)
@each_mask_head
def test_class_rows_lists_the_parameters_that_depend_on_the_number_of_classes(
    kind: str, mask_head: dict[str, Any]
) -> None:
    model, other = build(kind, mask_head=mask_head), build(kind, classes=K + 2, mask_head=mask_head)
    for built, classes in ((model, K), (other, K + 2)):
        state = built.state_dict()
        assert all(len(state[name]) == rows.count(classes) for name, rows in built.class_rows().items())
    changed = {name for name, value in other.state_dict().items() if value.shape != model.state_dict()[name].shape}
    assert changed == set(model.class_rows())
