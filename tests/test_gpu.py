"""What only a GPU can show: `make gpu` runs these tests first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from maskrcnn.config import read_config
from maskrcnn.data.loader import evaluation_loader
from maskrcnn.engine.checkpoint import TrainingState
from maskrcnn.engine.ema import ExponentialAverage
from maskrcnn.engine.step import StepResult, TrainingStep
from maskrcnn.experiment import ExperimentConfig
from maskrcnn.models.mask_rcnn import MaskRCNN
from maskrcnn.runtime.processes import Processes
from maskrcnn.structures import Batch

pytestmark = pytest.mark.gpu

CONFIG = read_config(Path(__file__).parent / "tiny_fpn.yaml", ExperimentConfig)
GPU = torch.device("cuda")


def build(device: torch.device) -> MaskRCNN:
    torch.manual_seed(0)
    return CONFIG.model.build(2, pretrained=False).to(device)


def batches(model: MaskRCNN) -> Iterator[Batch]:
    """Return the batches of the training images again and again, in page-locked memory if there is a GPU."""
    dataset = CONFIG.data.train.build()
    loader = evaluation_loader(
        dataset,
        CONFIG.data.build_train_transform(dataset),
        batch_size=2,
        workers=0,
        size_divisor=model.size_divisor,
        pin_memory=torch.cuda.is_available(),
    )
    return itertools.cycle(loader)


def training(device: torch.device, precision: str = "fp32") -> TrainingStep:
    model = build(device)
    optimizer = CONFIG.training.optimizer.build(model, batch_size=2)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    state = TrainingState(model, optimizer, scaler, ExponentialAverage(model, decay=0.99))
    return TrainingStep(state, Processes(device), precision=precision, clip_norm=1.0)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Let CUDA raise an error where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_ten_steps_without_synchronisation(precision: str) -> None:
    step = training(GPU, precision)
    stream = batches(step.state.model)
    results: list[StepResult] = []
    for iteration in range(1, 4):  # the first steps allocate memory and choose kernels
        step([next(stream)], iteration)
    for iteration, batch in zip(range(4, 14), stream, strict=False):
        with no_synchronisation():
            step.start([batch], iteration, diagnose=True)
            results += step.results()
    results += step.results(wait=True)
    assert [result.iteration for result in results] == list(range(4, 14))
    assert all(map(math.isfinite, results[-1].losses.values()))


def test_detection_without_synchronisation() -> None:
    model = build(GPU).eval()
    images = next(batches(model)).images.to(GPU)
    model.detect(images)
    with no_synchronisation():
        detections = model.detect(images)
    assert detections.valid.any()


def test_losses_gradients_and_detections_equal_those_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    results = []
    for device in (torch.device("cpu"), GPU):
        model = build(device)
        batch = next(batches(model))
        losses = model(batch.images.to(device), batch.targets.to(device))
        losses.total.backward()
        gradients = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        detections = model.eval().detect(batch.images.to(device)).to("cpu")
        results.append((torch.stack(tuple(losses)).detach().cpu(), gradients, detections))
    (losses, gradients, detections), (gpu_losses, gpu_gradients, gpu_detections) = results
    torch.testing.assert_close(gpu_losses, losses, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(gpu_gradients, gradients, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(gpu_detections.boxes, detections.boxes, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(gpu_detections.scores, detections.scores, rtol=1e-3, atol=1e-4)
    assert torch.equal(gpu_detections.labels, detections.labels)


def test_a_step_that_is_not_finite_is_not_taken() -> None:
    step = training(GPU)
    model, stream = step.state.model, batches(step.state.model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    model.box_head.cls_score.bias.register_hook(lambda gradient: gradient * math.nan)
    for iteration in (1, 2):
        step.start([next(stream)], iteration)
        assert step.results() == []
    with pytest.raises(FloatingPointError, match=r"iteration 1: "):
        step.results(wait=True)
    assert all(map(torch.equal, model.parameters(), before))
