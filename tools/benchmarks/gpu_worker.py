"""One way to train on a GPU, measured at several batch sizes in a process of its own, for tools/benchmarks/gpu.py.

The argument is a `Job` as JSON. Each line of the output is a JSON object: `environment`, then a `row` for each batch
size, and `stages` at last, if the job asks for them.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import worker
from torch import Tensor, nn

from maskrcnn.data.buckets import BucketsConfig
from maskrcnn.data.loader import collate
from maskrcnn.engine.checkpoint import TrainingState
from maskrcnn.engine.feeding import copied_to
from maskrcnn.engine.graphs import Compile, CudaRecorder, Execution
from maskrcnn.engine.optimizer import set_learning_rate
from maskrcnn.engine.step import TrainingStep, require_precision
from maskrcnn.experiment import choose_device
from maskrcnn.ops.mask_tables import table_entries
from maskrcnn.run_directory import environment
from maskrcnn.runtime.console import run_main
from maskrcnn.runtime.memory import peak_memory
from maskrcnn.runtime.processes import Processes
from maskrcnn.structures import Batch, Example, MaskCrop
from maskrcnn.training_run import use_fast_kernels

DIVISOR = 32
SPARE = 4  # steps before the first that is timed, besides those that come before a recording


@dataclass(frozen=True)
class Job:
    """What to measure."""

    side: Literal["ours", "torchvision"]
    precision: Literal["fp32", "bf16"]
    compile: Compile
    cuda_graph: bool
    batches: Sequence[int]  # batch sizes
    height: int  # of the images
    width: int
    steps: int  # that are timed
    device: str
    stages: bool = False  # also time the stages of a step, at the last batch size


Step = Callable[[], None]


def our_step(job: Job, count: int, device: torch.device) -> tuple[Step, TrainingStep]:
    """Return a training step of `count` images, as the training loop takes it: it starts and does not wait."""
    config = worker._our_experiment()
    model = worker._our_model(config, device)
    optimizer = config.training.optimizer.build(model, batch_size=count)
    scenes = [_examples(job, count, seed) for seed in (0, 1)]
    execution = Execution(job.compile, job.cuda_graph, _buckets(job, scenes))
    execution.require_device(device, 1)
    step = TrainingStep(
        TrainingState(model, optimizer),
        Processes(device),
        precision=job.precision,
        execution=execution,
        recorder=CudaRecorder(device) if execution.cuda_graph else None,
    )
    batches = [[collate(examples, list(range(count)), DIVISOR, execution.buckets)] for examples in scenes]
    if device.type == "cuda":
        batches = [[_pinned(batch) for batch in each] for each in batches]
    fed, iterations = iter(copied_to(device, itertools.cycle(batches))), itertools.count(1)

    def take() -> None:
        set_learning_rate(optimizer, 1e-3)  # so that random weights stay finite
        step.start(next(fed), next(iterations))
        step.results()

    return take, step


def _examples(job: Job, count: int, seed: int) -> list[Example]:
    examples = []
    for index in range(count):
        scene = worker.draw_scene(job.height, job.width, count * seed + index)
        corners = scene.boxes[:, :2].int().tolist()
        masks = tuple(MaskCrop(x, y, crop) for (x, y), crop in zip(corners, scene.crops, strict=True))
        examples.append(Example(index, scene.pixels, scene.boxes, scene.labels, masks))
    return examples


def _buckets(job: Job, scenes: Sequence[Sequence[Example]]) -> BucketsConfig:
    """Return one bucket that holds the scenes of each batch."""
    height, width = (-(-side // DIVISOR) * DIVISOR for side in (job.height, job.width))
    entries = max(table_entries([example.masks for example in examples]) for examples in scenes)
    return BucketsConfig(shapes=((height, width),), objects=(16,), mask_entries=-(-entries // len(scenes[0])))


def _pinned(batch: Batch) -> Batch:
    return batch._replace(images=batch.images.pin_memory(), targets=batch.targets.pin_memory())


def torchvision_step(job: Job, count: int, device: torch.device) -> Step:
    """Return a step of torchvision's reference scripts, with images and targets in page-locked memory."""
    model = worker._torchvision_model(job, device).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-3 * 0.02 * count / 16, momentum=0.9, weight_decay=1e-4)
    scenes = [worker.draw_scene(job.height, job.width, index) for index in range(2 * count)]
    on_gpu = device.type == "cuda"

    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=on_gpu)

    def kept(tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if on_gpu else tensor

    images = [kept(scene.pixels / 255) for scene in scenes]
    targets = [{key: kept(value) for key, value in worker._torchvision_target(scene).items()} for scene in scenes]
    halves = itertools.cycle([slice(0, count), slice(count, 2 * count)])

    def take() -> None:
        half = next(halves)
        with torch.autocast(device.type, torch.bfloat16, enabled=job.precision == "bf16"):
            losses = model(
                [moved(image) for image in images[half]],
                [{key: moved(value) for key, value in target.items()} for target in targets[half]],
            )
            total = sum(losses.values())
        if not torch.isfinite(total):  # as in its reference loop
            raise FloatingPointError(f"torchvision's losses are not finite: {losses}")
        optimizer.zero_grad()
        total.backward()
        optimizer.step()

    return take


def measure(job: Job, count: int, device: torch.device) -> dict[str, Any]:
    """Return the speed and memory of one batch size."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    step = our_step(job, count, device)[0] if job.side == "ours" else torchvision_step(job, count, device)
    for _ in range(SPARE + SPARE * job.cuda_graph):
        step()
    _wait(device)
    prepared = time.perf_counter()
    for _ in range(job.steps):
        step()
    _wait(device)
    seconds = (time.perf_counter() - prepared) / job.steps
    return {
        "batch": count,
        "images/s": count / seconds,
        "ms": 1000 * seconds,
        "GiB": peak_memory(device) / 2**30,
        "preparation, s": prepared - started,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- Stages


class Stages:
    """Times of the stages of steps, between events on the GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def now(self) -> Any:
        """Return an event after what is queued so far; on a CPU, the time."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Count the time of the block."""
        start = self.now()
        yield
        self.add(name, start, self.now())

    def add(self, name: str, start: Any, end: Any) -> None:
        """Count the time between two events."""
        self._spans[name].append((start, end))

    def of(self, name: str, function: Callable[..., Any]) -> Timed:
        """Return `function`, timed."""
        return Timed(self, name, function)

    def of_module(self, name: str, module: nn.Module) -> None:
        """Time the forward passes of a module."""
        starts: list[Any] = []
        module.register_forward_pre_hook(lambda *arguments: starts.append(self.now()))
        module.register_forward_hook(lambda *arguments: self.add(name, starts.pop(), self.now()))

    def milliseconds(self, steps: int) -> dict[str, float]:
        """Return the time of each stage in a step."""
        _wait(self._device)
        on_gpu = self._device.type == "cuda"
        return {
            name: sum(start.elapsed_time(end) if on_gpu else 1000 * (end - start) for start, end in spans) / steps
            for name, spans in self._spans.items()
        }


class Timed:
    """A function or another object that can be called, timed."""

    def __init__(self, stages: Stages, name: str, function: Callable[..., Any]) -> None:
        self._stages, self._name, self._function = stages, name, function

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Call the function."""
        with self._stages.span(self._name):
            return self._function(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)


def stage_times(job: Job, count: int, device: torch.device) -> dict[str, float]:
    """Return the milliseconds of each stage of our step, run operation by operation, and their total."""
    take, step = our_step(job, count, device)
    for _ in range(SPARE):
        take()
    stages, model = Stages(device), step.state.model
    rpn = model.rpn
    model.features = stages.of("backbone and neck", model.features)
    rpn._constant_outputs = stages.of("RPN head, dense", rpn._constant_outputs)
    rpn.loss.sample = stages.of("anchor matching and sampling", rpn.loss.sample)
    rpn.selector = stages.of("proposals and NMS", rpn.selector)
    model.sampler = stages.of("RoI matching and sampling", model.sampler)
    model.box_pooler = stages.of("RoIAlign, box head", model.box_pooler)
    model.mask_pooler = stages.of("RoIAlign, mask head", model.mask_pooler)
    model._mask_targets = stages.of("mask targets", model._mask_targets)
    stages.of_module("box head", model.box_head)
    stages.of_module("mask head", model.mask_head)
    stages.of_module("forward pass, all", step._forward)
    ends: list[Any] = []
    step._forward.register_forward_hook(lambda *arguments: ends.append(stages.now()))
    judge = stages.of("clipping and finite check", step._judge)

    def judged(terms: Tensor) -> Tensor:
        stages.add("backward pass", ends.pop(), stages.now())
        return judge(terms)

    step._judge = judged
    step._update = stages.of("optimizer", step._update)
    for _ in range(job.steps):
        with stages.span("step"):
            take()
    return stages.milliseconds(job.steps)


def main() -> None:
    """Measure, and write a line for each result."""
    job = Job(**json.loads(sys.argv[1]))
    device = choose_device(job.device)
    require_precision(job.precision, device)
    use_fast_kernels(cudnn_benchmark=True, tf32=True)
    _write("environment", environment(device))
    for count in job.batches:
        _write("row", measure(job, count, device))
    if job.stages:
        _write("stages", stage_times(job, job.batches[-1], device))


def _write(kind: str, value: Any) -> None:
    print(json.dumps({kind: value}), flush=True)


if __name__ == "__main__":
    run_main(main)
