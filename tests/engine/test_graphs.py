"""A training step as recordings, which a stand-in for CUDA graphs makes and replays on a CPU; and compiled."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from maskrcnn.config import read_config
from maskrcnn.data.buckets import BucketsConfig
from maskrcnn.data.loader import training_loader
from maskrcnn.engine import graphs
from maskrcnn.engine import step as step_module
from maskrcnn.engine.checkpoint import TrainingState
from maskrcnn.engine.ema import ExponentialAverage
from maskrcnn.engine.graphs import Execution, Recording
from maskrcnn.engine.optimizer import SGDConfig, set_learning_rate
from maskrcnn.engine.step import StepResult, TrainingStep
from maskrcnn.errors import InputError
from maskrcnn.experiment import ExperimentConfig
from maskrcnn.ops import cpu
from maskrcnn.runtime.processes import Processes
from maskrcnn.structures import Batch, Diagnostics, ImageBatch, Losses, Targets

TINY = Path(__file__).parents[1] / "tiny_fpn.yaml"
FEW = ["model.rpn.training={pre_nms_top_n: 12, post_nms_top_n: 8}", "model.sampling.batch_size_per_image=8"]
CPU = torch.device("cpu")
BUCKETS = BucketsConfig(shapes=((64, 64), (64, 96)), objects=(2, 4), mask_entries=8000)
aten = torch.ops.aten


def tensors_in(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def new_tensors(func: Any, results: Any) -> list[Tensor]:
    """Return the results of an operation that are neither views nor written in place."""
    values = results if len(func._schema.returns) > 1 else [results]
    fresh = [value for value, returned in zip(values, func._schema.returns, strict=False) if not returned.alias_info]
    return tensors_in(fresh)


class Emulator(TorchDispatchMode):
    """Records the operations of work, and repeats them with the tensors of the recording, as a CUDA graph does.

    As in a capture, nothing has changed after a recording, and the host may not read a value.
    """

    def __init__(self) -> None:
        super().__init__()
        self.recordings = self.replays = 0

    def stream(self) -> AbstractContextManager[object]:
        return nullcontext()

    def record(self, work: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Recording:
        self.recordings += 1
        self.calls: list[Any] = []
        self.own: set[int] = set()  # memory that the recording allocates
        self.before: dict[int, tuple[Any, Any]] = {}  # other memory that it changes
        with self:
            output = work(*inputs)
        for storage, content in self.before.values():
            storage.copy_(content)
        calls = self.calls

        def replay() -> None:
            self.replays += 1
            with torch.no_grad():
                for func, args, kwargs, outputs in calls:
                    for target, result in zip(outputs, new_tensors(func, func(*args, **kwargs)), strict=True):
                        target.copy_(result)

        return Recording(replay, inputs, output)

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "profiler":
            return func(*args, **kwargs)
        assert func not in (aten._local_scalar_dense.default, aten.nonzero.default), f"the host reads a value: {func}"
        arguments = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | kwargs
        written = [each.name for each in func._schema.arguments if each.alias_info and each.alias_info.is_write]
        if func is aten.native_batch_norm.default:  # its schema does not say so
            written = ["running_mean", "running_var"]
        for tensor in tensors_in([arguments.get(name) for name in written]):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.own and storage._cdata not in self.before:
                self.before[storage._cdata] = storage, storage.clone()
        results = func(*args, **kwargs)
        outputs = new_tensors(func, results)
        self.own.update(tensor.untyped_storage()._cdata for tensor in outputs)
        if outputs or written:
            self.calls.append((func, args, kwargs, outputs))
        return results


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "takes_short_cuts", lambda tensor: False)
    monkeypatch.setattr(step_module, "can_skip_on_device", lambda optimizer, device: True)
    monkeypatch.setattr(graphs, "WARM_UP", 1)


def settings_of(*overrides: str) -> ExperimentConfig:
    return read_config(
        TINY, ExperimentConfig, [*FEW, "training.optimizer={kind: sgd, lr: 0.02, base_batch: 2}", *overrides]
    )


def training(
    settings: ExperimentConfig, recorder: Emulator | None = None, execution: Execution | None = None, **options: Any
) -> TrainingStep:
    torch.manual_seed(0)
    model = settings.model.build(2, pretrained=False)
    scaler = torch.amp.GradScaler("cpu", enabled=options.get("precision") == "fp16", init_scale=2.0**8)
    optimizer = settings.training.optimizer.build(model, batch_size=2)
    state = TrainingState(model, optimizer, scaler, ExponentialAverage(model, decay=0.9))
    execution = execution or Execution(cuda_graph=True, buckets=BUCKETS)
    return TrainingStep(state, Processes(CPU), execution=execution, recorder=recorder, **options)


def batches(settings: ExperimentConfig, *, accumulate: int = 1, buckets: BucketsConfig = BUCKETS) -> Iterator[Any]:
    dataset = settings.data.train.build()
    return iter(
        training_loader(
            dataset,
            settings.data.build_train_transform(dataset),
            batch_size=2 * accumulate,
            seed=0,
            workers=0,
            size_divisor=32,
            grad_accum_steps=accumulate,
            buckets=buckets,
        )
    )


def run(step: TrainingStep, steps: Sequence[Sequence[Batch]]) -> list[StepResult]:
    for iteration, each in enumerate(steps, start=1):
        set_learning_rate(step.state.optimizer, 0.5 ** (iteration % 3))
        step.start(each, iteration, diagnose=iteration % 2 == 0)
    return step.results(wait=True)


def assert_same_training(one: TrainingStep, other: TrainingStep, steps: Sequence[Sequence[Batch]]) -> list[StepResult]:
    """Check that both compute the same bits."""
    results, others = run(one, steps), run(other, steps)
    assert str(results) == str(others)  # nan included
    for left, right in ((one.state.model, other.state.model), (one.state.average, other.state.average)):
        assert left is not None
        assert right is not None
        weights = right.state_dict()
        assert [name for name, tensor in left.state_dict().items() if not torch.equal(tensor, weights[name])] == []
    return results


def shape_of(batch: Batch) -> tuple[int, ...]:
    return (*batch.images.pixels.shape[2:], batch.targets.labels.shape[1])


MODES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "sgd": ({}, []),
    "clipped in bf16": ({"precision": "bf16", "clip_norm": 0.5}, []),
    "adamw in fp16": ({"precision": "fp16"}, ["training.optimizer={kind: adamw, lr: 0.0009765625, base_batch: 2}"]),
}


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("mode", ["sgd", "adamw in fp16", pytest.param("clipped in bf16", marks=pytest.mark.slow)])
def test_replays_compute_what_steps_compute(mode: str) -> None:
    options, overrides = MODES[mode]
    settings = settings_of("data.train.objects=[1, 5]", *overrides)
    emulator = Emulator()
    steps = list(islice(batches(settings), 10))
    shapes = Counter(shape_of(batch) for (batch,) in steps if BUCKETS.holds(batch))
    outside = 10 - shapes.total()
    assert min(shapes.values()) > graphs.WARM_UP
    assert len(shapes) == 2
    assert outside > 0
    step = training(settings, emulator, **options)
    results = assert_same_training(training(settings, **options), step, steps)
    assert emulator.recordings == 3  # one for each shape, and the update of the weights
    assert emulator.replays == sum(count - graphs.WARM_UP for count in shapes.values()) + 10 - graphs.WARM_UP
    assert step.outside == outside
    assert [bool(result.diagnostics) for result in results] == [iteration % 2 == 0 for iteration in range(1, 11)]
    assert len({result.gradient_norm for result in results}) == 10


@pytest.mark.usefixtures("as_on_a_gpu")
def test_replays_accumulate_gradients() -> None:
    settings, emulator = settings_of("data.train.objects=[1, 2]"), Emulator()
    steps = list(islice(batches(settings, accumulate=2), 4))
    assert_same_training(training(settings), training(settings, emulator), steps)
    assert emulator.replays >= 4


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_replay_skips_a_step_that_is_not_finite() -> None:
    """Weights and statistics of norms stay as they are."""
    settings, emulator = settings_of("data.train.objects=[1, 2]"), Emulator()
    buckets = BUCKETS.model_copy(update={"objects": (4,)})
    execution = Execution(cuda_graph=True, buckets=buckets)
    steps = []
    for iteration, (batch,) in enumerate(islice(batches(settings, buckets=buckets), 6)):
        pixels = batch.images.pixels * (torch.nan if iteration == 3 else 1.0)
        steps.append([batch._replace(images=replace(batch.images, pixels=pixels))])
    recorded = training(settings, emulator, execution, skips=1)
    results = assert_same_training(training(settings, None, execution, skips=1), recorded, steps)
    assert emulator.recordings == 2
    assert [math.isfinite(result.gradient_norm) for result in results] == [True] * 3 + [False, True, True]


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_recording_must_not_read_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in finds what a capture refuses."""
    settings = settings_of("data.train.objects=[1, 2]")
    step = training(settings, Emulator())
    forward = step.state.model.forward

    def reading(*arguments: Any, **options: Any) -> Any:
        losses = forward(*arguments, **options)
        float(losses.total.detach())
        return losses

    monkeypatch.setattr(step.state.model, "forward", reading)
    with pytest.raises(AssertionError, match="the host reads a value"):
        run(step, list(islice(batches(settings), 4)))


@pytest.mark.usefixtures("as_on_a_gpu")
def test_an_optimizer_that_asks_the_host_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module, "can_skip_on_device", lambda optimizer, device: False)
    settings, emulator = settings_of("data.train.objects=[1, 2]"), Emulator()
    step = training(settings, emulator)
    assert_same_training(training(settings), step, list(islice(batches(settings), 3)))
    assert emulator.recordings == 1
    assert all(isinstance(group["lr"], float) for group in step.state.optimizer.param_groups)


# Compilation.


class Toy(nn.Module):
    """Five losses that depend on the whole batch."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, images: ImageBatch, targets: Targets, observe: Callable[[Diagnostics], None]) -> Losses:
        content = images.pixels.float().mean() + targets.boxes.sum() + targets.masks.sums.float().mean()
        observe(Diagnostics(content, content))
        return Losses(*(self.scale * content))


def test_a_shape_is_compiled_once() -> None:
    """Over 20 random batches. What fits in no bucket is not compiled."""
    settings, counter = settings_of("data.train.objects=[1, 5]"), CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    toy = Toy()
    state = TrainingState(toy, SGDConfig(lr=1e-9).build(toy, batch_size=2))
    step = TrainingStep(state, Processes(CPU), execution=Execution("step", buckets=BUCKETS, backend=counter))
    steps = list(islice(batches(settings), 20))
    run(step, steps)
    assert step.outside > 0
    assert counter.frame_count == len({shape_of(batch) for (batch,) in steps if BUCKETS.holds(batch)}) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_model_is_compiled_once_for_each_bucket(backend: str) -> None:
    """As a whole, for losses and diagnostics."""
    settings = read_config(TINY.with_name("tiny.yaml"), ExperimentConfig, [*FEW, "data.train.objects=[1, 5]"])
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    step = training(settings, None, Execution(compile="step", buckets=BUCKETS, backend=counter))
    plain = training(settings)
    steps = list(islice(batches(settings), 20))
    shapes = {shape_of(batch) for (batch,) in steps if BUCKETS.holds(batch)}
    results, expected = run(step, steps), run(plain, steps)
    assert step.outside == plain.outside > 0
    assert counter.frame_count == len(shapes) == 2
    for one, other in zip(results, expected, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-4)
        assert one.diagnostics == pytest.approx(other.diagnostics)


# What cannot be.


def model_of(*overrides: str) -> Any:
    return settings_of(*overrides).model.build(2, pretrained=False)


def test_what_cannot_be_run_is_one_message() -> None:
    graph, compiled = Execution(cuda_graph=True, buckets=BUCKETS), Execution(compile="step", buckets=BUCKETS)
    gpu = torch.device("cuda")
    with pytest.raises(InputError, match=r"cuda_graph: true needs a GPU, but the device is cpu"):
        graph.require_device(CPU, 1)
    with pytest.raises(InputError, match=r"compile: step needs a GPU, but the device is cpu"):
        compiled.require_device(CPU, 1)
    with pytest.raises(InputError, match=r"needs batches of few shapes: set .*buckets"):
        Execution(compile="step").require_device(gpu, 1)
    with pytest.raises(InputError, match="works in a single process, but there are 2"):
        graph.require_device(gpu, 2)
    with pytest.raises(InputError, match="a head has batch norms"):
        compiled.require_model(model_of("model.mask_head.norm=bn"))
    for fine in (graph, compiled):
        fine.require_device(gpu, 1)
        fine.require_model(model_of())
    compiled.require_device(gpu, 2)
    Execution(compile="parts").require_device(CPU, 2)
