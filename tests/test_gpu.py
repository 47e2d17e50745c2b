"""What only a GPU can show: `make gpu` runs these tests first, those with the Triton kernels later."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from maskrcnn.config import read_config
from maskrcnn.data.buckets import BucketsConfig
from maskrcnn.data.loader import evaluation_loader, training_loader
from maskrcnn.engine.checkpoint import TrainingState
from maskrcnn.engine.ema import ExponentialAverage
from maskrcnn.engine.feeding import copied_to
from maskrcnn.engine.graphs import EAGER, CudaRecorder, Execution, Recorder
from maskrcnn.engine.optimizer import set_learning_rate
from maskrcnn.engine.step import StepResult, TrainingStep
from maskrcnn.experiment import ExperimentConfig
from maskrcnn.models.mask_rcnn import MaskRCNN
from maskrcnn.ops.kernels import Kernels
from maskrcnn.runtime.processes import Processes
from maskrcnn.structures import Batch

pytestmark = pytest.mark.gpu

CONFIG = read_config(Path(__file__).parent / "tiny_fpn.yaml", ExperimentConfig)
GPU = torch.device("cuda")
with_either_kernels = pytest.mark.parametrize("kernels", ["torchvision", "triton"])


def build(device: torch.device, kernels: Kernels = "auto") -> MaskRCNN:
    torch.manual_seed(0)
    return CONFIG.model.model_copy(update={"kernels": kernels}).build(2, pretrained=False).to(device)


BUCKETS = BucketsConfig(shapes=((64, 64),), objects=(8,), mask_entries=20_000)


def batches_in_buckets(model: MaskRCNN) -> Iterator[Sequence[Batch]]:
    """Return the batches of training steps, padded to one shape."""
    dataset = CONFIG.data.train.build()
    loader = training_loader(
        dataset,
        CONFIG.data.build_train_transform(dataset),
        batch_size=2,
        seed=0,
        workers=0,
        size_divisor=model.size_divisor,
        pin_memory=torch.cuda.is_available(),
        buckets=BUCKETS,
    )
    return iter(copied_to(GPU, loader))


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


def training(
    device: torch.device,
    precision: str = "fp32",
    execution: Execution = EAGER,
    recorder: Recorder | None = None,
    *,
    kernels: Kernels = "auto",
) -> TrainingStep:
    model = build(device, kernels)
    optimizer = CONFIG.training.optimizer.build(model, batch_size=2)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    state = TrainingState(model, optimizer, scaler, ExponentialAverage(model, decay=0.99))
    return TrainingStep(
        state, Processes(device), precision=precision, clip_norm=1.0, execution=execution, recorder=recorder
    )


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Let CUDA raise an error where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@with_either_kernels
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_ten_steps_without_synchronisation(precision: str, kernels: Kernels) -> None:
    step = training(GPU, precision, kernels=kernels)
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


@with_either_kernels
def test_detection_without_synchronisation(kernels: Kernels) -> None:
    model = build(GPU, kernels).eval()
    images = next(batches(model)).images.to(GPU)
    model.detect(images)
    with no_synchronisation():
        detections = model.detect(images)
    assert detections.valid.any()


@with_either_kernels
def test_losses_gradients_and_detections_equal_those_of_a_cpu(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    results = []
    for device in (torch.device("cpu"), GPU):
        model = build(device, kernels)
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


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_replays_compute_what_steps_compute(precision: str) -> None:
    """A CUDA graph runs the same kernels; atomic additions have no fixed order."""
    execution = Execution(cuda_graph=True, buckets=BUCKETS)
    results = []
    for recorder in (None, CudaRecorder(GPU)):
        step = training(GPU, precision, execution, recorder)
        stream = batches_in_buckets(step.state.model)
        for iteration, each in zip(range(1, 11), stream, strict=False):
            set_learning_rate(step.state.optimizer, 1 / iteration)
            step.start(each, iteration, diagnose=True)
        results.append(step.results(wait=True))
        assert step.outside == 0
    for one, other in zip(*results, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=0.02, abs=0.02)
        assert one.diagnostics == pytest.approx(other.diagnostics, abs=0.1)


def test_replays_do_not_synchronise() -> None:
    step = training(GPU, "bf16", Execution(cuda_graph=True, buckets=BUCKETS), CudaRecorder(GPU))
    stream = batches_in_buckets(step.state.model)
    for iteration in range(1, 7):
        step.start(next(stream), iteration)
    prepared = [next(stream) for _ in range(5)]
    with no_synchronisation():
        for iteration, each in enumerate(prepared, start=7):
            step.start(each, iteration)
            step.results()
    step.results(wait=True)


def test_a_replayed_step_that_is_not_finite_is_not_taken() -> None:
    step = training(GPU, "fp32", Execution(cuda_graph=True, buckets=BUCKETS), CudaRecorder(GPU))
    stream = batches_in_buckets(step.state.model)
    for iteration in range(1, 7):
        step.start(next(stream), iteration)
    step.results(wait=True)
    bias = step.state.model.box_head.cls_score.bias
    with torch.no_grad():
        bias.fill_(math.nan)
    before = [parameter.detach().clone() for parameter in step.state.model.parameters()]
    step.start(next(stream), 7)
    with pytest.raises(FloatingPointError, match=r"iteration 7: "):
        step.results(wait=True)
    for parameter, value in zip(step.state.model.parameters(), before, strict=True):
        assert parameter is bias or torch.equal(parameter, value)


@pytest.mark.slow
@pytest.mark.parametrize("recorded", [False, True], ids=["compiled", "compiled and recorded"])
def test_a_compiled_step(recorded: bool) -> None:
    """inductor takes minutes for it."""
    execution = Execution("step", recorded, BUCKETS)
    plain, compiled = training(GPU), training(GPU, "fp32", execution, CudaRecorder(GPU) if recorded else None)
    results = []
    for step in (plain, compiled):
        stream = batches_in_buckets(step.state.model)
        for iteration in range(1, 7):
            step.start(next(stream), iteration)
        results.append([result.losses for result in step.results(wait=True)])
    for one, other in zip(*results, strict=True):
        assert one == pytest.approx(other, rel=0.02, abs=0.02)
