"""The training step: gradient accumulation, precision, clipping, values that are not finite, and out of memory."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from maskrcnn.engine import step as step_module
from maskrcnn.engine.checkpoint import TrainingState
from maskrcnn.engine.ema import ExponentialAverage
from maskrcnn.engine.optimizer import AdamWConfig, OptimizerConfig, SGDConfig
from maskrcnn.engine.step import TrainingStep
from maskrcnn.runtime.processes import Processes
from maskrcnn.structures import AxisAlignedMap, Batch, Diagnostics, ImageBatch, Losses, MaskTables, Targets

CPU = Processes(torch.device("cpu"))


class Toy(nn.Module):
    """A small model with five losses that are means over images; `poison` multiplies its input."""

    def __init__(self, *, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.Tanh())
        self.head = nn.Linear(8, 5)
        self.poison = 1.0

    def forward(
        self, images: ImageBatch, targets: Targets, observe: Callable[[Diagnostics], None] | None = None
    ) -> Losses:
        if observe is not None:
            observe(Diagnostics(torch.tensor(0.5), torch.tensor(math.nan)))
        outputs = self.head(self.body(images.pixels.float().flatten(1) / 255 * self.poison))
        return Losses(*(outputs - targets.boxes[:, 0, :1]).float().square().mean(0))


def batch_of(seeds: Sequence[int]) -> Batch:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    pixels = [torch.randint(0, 256, (3, 2, 2), generator=generator, dtype=torch.uint8) for generator in generators]
    count = len(seeds)
    zeros = torch.zeros(count, 1, 2)
    masks = MaskTables(torch.zeros(0), zeros[..., 0].long(), zeros.long(), zeros, torch.ones(count, 2))
    boxes = torch.stack([torch.rand(1, 4, generator=generator) for generator in generators])
    return Batch(
        image_ids=tuple(seeds),
        images=ImageBatch(torch.stack(pixels), torch.full((count, 2), 2), torch.tensor(seeds)),
        targets=Targets(boxes, torch.ones(count, 1, dtype=torch.int64), masks, torch.ones(count, 1, dtype=torch.bool)),
        maps=(AxisAlignedMap(),) * count,
        original_sizes=((2, 2),) * count,
    )


ONE_BATCH = [batch_of(range(6))]
THREE_BATCHES = [batch_of((0, 1)), batch_of((2, 3)), batch_of((4, 5))]


def step_of(model: nn.Module, *, lr: float = 0.1, average: ExponentialAverage | None = None, **options) -> TrainingStep:
    fp16 = options.get("precision") == "fp16"
    optimizer = SGDConfig(lr=lr, momentum=0.0, weight_decay=0.0).build(model, batch_size=16)
    state = TrainingState(model, optimizer, torch.amp.GradScaler("cpu", enabled=fp16), average)
    return TrainingStep(state, CPU, **options)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten().float() for tensor in model.state_dict().values()])


def test_gradient_accumulation_equals_one_batch() -> None:
    one, other = Toy(), Toy()
    for iteration in range(1, 6):
        expected = step_of(one, clip_norm=0.5)(ONE_BATCH, iteration)
        result = step_of(other, clip_norm=0.5)(THREE_BATCHES, iteration)
        assert result.losses == pytest.approx(expected.losses)
        assert result.gradient_norm == pytest.approx(expected.gradient_norm)
    torch.testing.assert_close(weights(one), weights(other))


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_precision_applies_to_activations_and_not_to_weights(precision: str, dtype: torch.dtype) -> None:
    model, reference = Toy(), Toy()
    dtypes = []
    model.head.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    step = step_of(model, precision=precision)
    if precision == "fp16":
        step.state.scaler.load_state_dict({**step.state.scaler.state_dict(), "scale": 1024.0})
    result = step(ONE_BATCH, 1)
    expected = step_of(reference)(ONE_BATCH, 1)
    assert dtypes == [dtype]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    # The gradient is divided by the loss scale of 1024 before clipping and before the step.
    assert result.gradient_norm == pytest.approx(expected.gradient_norm, rel=0.02)
    torch.testing.assert_close(weights(model), weights(reference), rtol=0.02, atol=0.002)


def test_clipping_bounds_the_step_and_reports_the_norm_before() -> None:
    model = Toy()
    before = weights(model)
    result = step_of(model, lr=1.0, clip_norm=0.01)(ONE_BATCH, 1)
    assert result.gradient_norm > 0.02
    assert (weights(model) - before).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_diagnostics_are_returned_on_request_and_without_nan() -> None:
    step = step_of(Toy())
    assert step(THREE_BATCHES, 1).diagnostics == {}
    assert step(THREE_BATCHES, 2, diagnose=True).diagnostics == {"proposal_recall": 0.5}


def test_the_average_follows_the_weights() -> None:
    model = Toy()
    average = ExponentialAverage(model, decay=0.5)
    before = model.head.weight.detach().clone()
    step_of(model, average=average)(ONE_BATCH, 100)
    torch.testing.assert_close(average.state_dict()["head.weight"], (before + model.head.weight.detach()) / 2)


# Values that are not finite. On a GPU the device decides; on a CPU a fused optimizer does the same.


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module, "can_skip_on_device", lambda optimizer, device: True)


@pytest.fixture(params=["host", "device"])
def decided_by(request: pytest.FixtureRequest) -> None:
    if request.param == "device":
        request.getfixturevalue("on_device")


@pytest.mark.usefixtures("decided_by")
def test_a_step_that_is_not_finite_is_refused_and_stored(tmp_path: Path) -> None:
    model = Toy()
    before = weights(model)
    model.poison = math.nan
    stored = []

    def keep(iteration: int, batches: Sequence[Batch]) -> Path:
        stored.append((iteration, batches))
        return tmp_path / "step.pt"

    message = (
        r"iteration 7: .* loss_classifier nan.*image ids 0, 1, 2, 3, 4, 5\. "
        r".*step\.pt: tools/replay_batch\.py repeats it"
    )
    with pytest.raises(FloatingPointError, match=message):
        step_of(model, keep=keep)(THREE_BATCHES, 7)
    assert stored == [(7, THREE_BATCHES)]
    assert torch.equal(weights(model), before)


@pytest.mark.usefixtures("decided_by")
def test_steps_may_be_skipped_so_many_times_in_a_row(caplog: pytest.LogCaptureFixture) -> None:
    model = Toy(norm=True)
    step = step_of(model, skips=2)
    step(ONE_BATCH, 1)
    before = weights(model)  # includes the norm statistics, which a skipped step must not change
    model.poison = math.inf
    with caplog.at_level(logging.WARNING):
        step(ONE_BATCH, 2)
        step(ONE_BATCH, 3)
    assert torch.equal(weights(model), before)
    assert "iteration 3: " in caplog.text
    assert "Skipped 2 of at most 2 steps in a row." in caplog.text
    model.poison = 1.0
    step(ONE_BATCH, 4)  # a finite step resets the count
    assert not torch.equal(weights(model), before)
    model.poison = math.inf
    step(ONE_BATCH, 5)
    step(ONE_BATCH, 6)
    with pytest.raises(FloatingPointError, match="iteration 7"):
        step(ONE_BATCH, 7)


@pytest.mark.usefixtures("decided_by")
def test_a_gradient_that_overflows_in_fp16_lowers_the_scale_and_costs_the_step_alone() -> None:
    model = Toy()
    step = step_of(model, precision="fp16")
    scaler = step.state.scaler
    scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**40})
    before = weights(model)
    result = step(ONE_BATCH, 1)
    assert not math.isfinite(result.gradient_norm)
    assert torch.equal(weights(model), before)
    assert scaler.get_scale() == 2.0**39
    scaler.load_state_dict({**scaler.state_dict(), "scale": 1024.0})
    assert math.isfinite(step(ONE_BATCH, 2).gradient_norm)
    assert not torch.equal(weights(model), before)


@pytest.mark.usefixtures("on_device")
def test_results_from_a_device_are_late() -> None:
    step = step_of(Toy())
    arrived = []
    for iteration in range(1, 6):
        step.start(ONE_BATCH, iteration)
        arrived.append([result.iteration for result in step.results()])
    assert arrived == [[], [], [1], [2], [3]]
    assert [result.iteration for result in step.results(wait=True)] == [4, 5]


@pytest.mark.usefixtures("on_device")
def test_no_step_is_taken_after_one_that_must_be_reported() -> None:
    model = Toy()
    stored = []
    step = step_of(model, keep=lambda iteration, batches: stored.append((iteration, batches)) or Path("step.pt"))
    before = []
    for iteration, poison in ((1, 1.0), (2, math.nan), (3, 1.0), (4, 1.0)):
        model.poison = poison
        before.append(weights(model))
        step.start(ONE_BATCH if iteration == 2 else THREE_BATCHES, iteration)
        if iteration < 4:
            step.results()
    with pytest.raises(FloatingPointError, match=r"iteration 2: .* image ids 0, 1, 2, 3, 4, 5"):
        step.results()
    assert stored == [(2, ONE_BATCH)]
    assert not torch.equal(before[0], before[1])
    assert torch.equal(weights(model), before[1])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("poison", [[math.nan, 1, 1], [1, math.inf, 1], [1, 1, 1]], ids=str)
@pytest.mark.parametrize("config", [SGDConfig(lr=0.1, momentum=0.9), AdamWConfig(lr=0.01)], ids=lambda c: c.kind)
def test_device_and_host_decide_alike(
    poison: list[float], precision: str, config: OptimizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the first step is skipped, for which momentum buffers do not exist yet."""
    results = []
    for on_device in (False, True):
        monkeypatch.setattr(step_module, "can_skip_on_device", lambda *arguments, answer=on_device: answer)
        model = Toy(norm=True)
        scaler = torch.amp.GradScaler("cpu", enabled=precision == "fp16", init_scale=8.0)
        state = TrainingState(model, config.build(model, batch_size=16), scaler)
        step = TrainingStep(state, CPU, precision=precision, skips=1)
        for iteration, factor in enumerate([*poison, 1.0, 1.0], start=1):
            model.poison = factor
            step.start(ONE_BATCH, iteration)
        results.append((weights(model), [(r.losses, r.gradient_norm) for r in step.results(wait=True)]))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][0].isfinite().all()
    assert results[0][1][-2:] == results[1][1][-2:]


def test_a_first_step_that_overflows_in_fp16_leaves_no_momentum() -> None:
    """torch creates the momentum buffers in the first step, and leaves them uninitialised if it is skipped."""
    model = Toy()
    optimizer = SGDConfig(lr=0.1, momentum=0.9, weight_decay=0.0).build(model, batch_size=16)
    state = TrainingState(model, optimizer, torch.amp.GradScaler("cpu", init_scale=2.0**40))
    TrainingStep(state, CPU, precision="fp16")(ONE_BATCH, 1)
    assert all(not state["momentum_buffer"].any() for state in optimizer.state.values())


# Out of memory.


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_says_what_did_not_fit_and_what_helps(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Toy()

    def fail(*arguments: object, **options: object) -> Losses:
        raise error

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(
        MemoryError, match=r"iteration 3: .* 2 images of 2 x 2 px .* up to 1 objects .*grad_accum_steps"
    ) as raised:
        step_of(model)(THREE_BATCHES, 3)
    assert raised.value.__cause__ is error


def test_other_errors_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Toy()
    monkeypatch.setattr(model, "forward", lambda *arguments, **options: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step_of(model)(ONE_BATCH, 1)
