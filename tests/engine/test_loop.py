import itertools
import os
import signal

import pytest
import torch
from torch import nn

from maskrcnn.engine import step as engine_step
from maskrcnn.engine.checkpoint import CheckpointFolder, TrainingState, load_checkpoint, restore
from maskrcnn.engine.ema import ExponentialAverage
from maskrcnn.engine.loop import Interrupted, Intervals, Speedometer, StopRequest, TrainingConfig, train
from maskrcnn.engine.metrics import TIMING_KEYS, Measurement, MetricsWriter, read_records
from maskrcnn.engine.optimizer import AdamWConfig, SGDConfig
from maskrcnn.engine.schedule import MultiStepConfig
from maskrcnn.engine.step import TrainingStep
from maskrcnn.runtime.processes import Processes
from maskrcnn.structures import AxisAlignedMap, Batch, ClassTable, ImageBatch, Losses, MaskTables, Targets

CPU = torch.device("cpu")
STEPS = 12


@pytest.fixture(autouse=True)
def _one_thread():
    """Use one thread, which is fastest for a tiny model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Toy(nn.Module):
    """A small model with five losses, batch norm (has state) and dropout (draws from the global generator)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.25))
        self.head = nn.Linear(8, 5)
        self.steps = 0
        self.on_step = {}  # functions to call in a training step, by its number

    def forward(self, images: ImageBatch, targets: Targets, observe=None) -> Losses:
        if self.training:
            self.steps += 1
            self.on_step.get(self.steps, lambda: None)()
        outputs = self.head(self.body(images.pixels.float().flatten(1) / 255))
        return Losses(*(outputs - targets.boxes[:, 0, :1]).float().square().mean(0))


def make_batch(iteration):
    """Return the batch of the step after `iteration`. Its content depends only on that number."""
    generator = torch.Generator().manual_seed(iteration)
    zeros = torch.zeros(4, 1, 2)
    ones = torch.ones(4, 1, dtype=torch.int64)
    masks = MaskTables(torch.zeros(0), zeros[..., 0].long(), zeros.long(), zeros, torch.ones(4, 2))
    return Batch(
        image_ids=tuple(range(4 * iteration, 4 * iteration + 4)),
        images=ImageBatch(
            torch.randint(0, 256, (4, 3, 2, 2), generator=generator, dtype=torch.uint8),
            torch.full((4, 2), 2),
            torch.zeros(4, dtype=torch.int64),
        ),
        targets=Targets(torch.rand(4, 1, 4, generator=generator), ones, masks, ones.bool()),
        maps=(AxisAlignedMap(),) * 4,
        original_sizes=((2, 2),) * 4,
    )


def make_loader(start):
    iteration = start
    while True:
        yield (make_batch(iteration),)
        iteration += 1


def state_of(model, config=None, *, precision="fp32", ema_decay=None):
    return TrainingState(
        model,
        (config or SGDConfig(lr=0.05)).build(model, batch_size=16),
        torch.amp.GradScaler("cpu", enabled=precision == "fp16"),
        ExponentialAverage(model, decay=ema_decay) if ema_decay else None,
    )


class Run:
    """One process of a run. It starts from the last checkpoint in the folder, if there is one."""

    def __init__(self, folder, optimizer_config=None, iterations=STEPS, ema_decay=None, step=None, **options):
        torch.manual_seed(0)
        self.folder, self.iterations, self.options = folder, iterations, options
        self.model = Toy()
        self.step_options = step or {}
        precision = self.step_options.get("precision", "fp32")
        self.state = state_of(self.model, optimizer_config, precision=precision, ema_decay=ema_decay)
        self.evaluated_at = []
        self.start = 0
        last = folder / "checkpoints" / "last.pt"
        if last.exists():
            checkpoint = load_checkpoint(last)
            restore(checkpoint, self.state, source=str(last))
            self.start = checkpoint.iteration
        self.checkpoints = CheckpointFolder(
            last.parent,
            state=self.state,
            classes=ClassTable(("toy",), (1,)),
            config={},
            metric="segm/AP",
        )

    def evaluate(self, iteration):
        self.evaluated_at.append(iteration)
        self.model.eval()
        with torch.no_grad():
            batch = make_batch(1000)
            metrics = {"segm/AP": -self.model(batch.images, batch.targets).total.item()}
        self.checkpoints.keep_best(iteration, metrics)
        return Measurement(metrics, images_per_second=1.0)

    def train(self):
        options = {"evaluate": self.evaluate, "intervals": Intervals(evaluate=4, save=3, log=2)}
        schedule = MultiStepConfig(iterations=STEPS, steps=(9,), warmup_iterations=4).build()
        with MetricsWriter(self.folder, start=self.start) as writer, StopRequest() as stop:
            train(
                TrainingStep(self.state, Processes(CPU), **self.step_options),
                make_loader(self.start),
                schedule,
                start=self.start,
                iterations=self.iterations,
                writer=writer,
                save=self.checkpoints.save,
                stop=stop,
                **{**options, **self.options},
            )
        return self

    def records(self):
        records = read_records(self.folder / "metrics.jsonl")
        return [{key: value for key, value in record.items() if key not in TIMING_KEYS} for record in records]


def without_lr(groups):
    """Return the parameter groups without the current learning rate, which each step sets again."""
    return [{key: value for key, value in group.items() if key != "lr"} for group in groups]


def assert_same_state(left, right):
    """Check that the checkpoints of two runs are equal bit for bit."""
    for name in ("last.pt", "best.pt"):
        a, b = (load_checkpoint(run.folder / "checkpoints" / name) for run in (left, right))
        assert (a.iteration, a.metrics) == (b.iteration, b.metrics)
        assert all(torch.equal(tensor, b.model[key]) for key, tensor in a.model.items())
        assert without_lr(a.optimizer["param_groups"]) == without_lr(b.optimizer["param_groups"])
        for index, state in a.optimizer["state"].items():
            assert all(torch.equal(value, b.optimizer["state"][index][key]) for key, value in state.items())
        assert torch.equal(a.random_states["torch"], b.random_states["torch"])


@pytest.mark.parametrize("config", [SGDConfig(lr=0.05), AdamWConfig(lr=0.02)], ids=lambda config: config.kind)
@pytest.mark.parametrize("stop", [5, 6, 8], ids=lambda stop: f"after {stop}")
def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(tmp_path, config, stop):
    uninterrupted = Run(tmp_path / "uninterrupted", config).train()
    first = Run(tmp_path / "resumed", config)
    first.model.on_step[stop] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted):
        first.train()
    second = Run(tmp_path / "resumed", config)
    assert second.start == stop
    second.train()
    assert_same_state(uninterrupted, second)
    assert second.records() == uninterrupted.records()
    assert first.evaluated_at + second.evaluated_at == uninterrupted.evaluated_at == [4, 8, 12]


def test_a_run_killed_between_checkpoints_repeats_its_steps(tmp_path):
    uninterrupted = Run(tmp_path / "uninterrupted").train()
    first = Run(tmp_path / "resumed")
    first.model.on_step[8] = lambda: 1 / 0  # the last checkpoint is of step 6, so step 7 is repeated
    with pytest.raises(ZeroDivisionError):
        first.train()
    second = Run(tmp_path / "resumed")
    assert second.start == 6
    second.train()
    assert_same_state(uninterrupted, second)
    assert second.records() == uninterrupted.records()


def test_a_run_killed_during_an_evaluation_repeats_it(tmp_path):
    uninterrupted = Run(tmp_path / "uninterrupted").train()

    def die(iteration):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Run(tmp_path / "resumed", evaluate=die).train()
    second = Run(tmp_path / "resumed")
    assert second.start == 4
    second.train()
    assert second.evaluated_at == [4, 8, 12]
    assert_same_state(uninterrupted, second)
    assert second.records() == uninterrupted.records()


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    Run(tmp_path).train()
    again = Run(tmp_path).train()
    assert (again.start, again.model.steps, again.evaluated_at) == (STEPS, 0, [])


def test_training_lowers_the_loss_and_records_the_steps(tmp_path):
    run = Run(tmp_path).train()
    train_records = [record for record in run.records() if record["kind"] == "train"]
    assert [record["iteration"] for record in train_records] == [2, 4, 6, 8, 10, 12]
    assert train_records[-1]["loss"] < 0.8 * train_records[0]["loss"]
    # Step 2 follows one finished step of the warm-up of 4. Step 10 follows nine, where the learning rate drops.
    assert train_records[0]["lr"] == pytest.approx(0.05 * (0.001 + 0.999 / 4))
    assert [train_records[i]["lr"] for i in (2, 3, 4)] == pytest.approx([0.05, 0.05, 0.005])
    assert train_records[0]["losses"].keys() == set(Losses._fields)


def test_each_record_measures_the_speed_since_the_one_before(tmp_path, monkeypatch):
    squares = (float(n * n) for n in itertools.count())  # the blocks last 1, 5, 9, ... seconds
    monkeypatch.setattr("maskrcnn.engine.loop.Speedometer", lambda: Speedometer(clock=lambda: next(squares)))
    Run(tmp_path, iterations=4).train()
    train_records = [record for record in read_records(tmp_path / "metrics.jsonl") if record["kind"] == "train"]
    speeds = [record["images_per_second"] for record in train_records]
    assert speeds == [8 / (1 + 5 + 9 + 13), 8 / (17 + 21 + 25 + 29)]


def test_the_last_step_is_saved_evaluated_and_logged_whatever_the_intervals(tmp_path):
    run = Run(tmp_path, iterations=3, intervals=Intervals(evaluate=100, save=100, log=100)).train()
    assert load_checkpoint(tmp_path / "checkpoints" / "last.pt").iteration == 3
    kinds = [(record["kind"], record["iteration"]) for record in run.records()]
    assert kinds == [("train", 3), ("evaluation", 3), ("end", 3)]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_stops(tmp_path, number, status):
    handler = signal.getsignal(number)
    run = Run(tmp_path)
    run.model.on_step[5] = lambda: os.kill(os.getpid(), number)
    with pytest.raises(Interrupted, match=f"{number.name}: stopped after iteration 5") as stopped:
        run.train()
    assert stopped.value.status == status
    assert run.model.steps == 5
    checkpoint = load_checkpoint(tmp_path / "checkpoints" / "last.pt")
    assert checkpoint.iteration == 5
    assert torch.equal(checkpoint.model["head.weight"], run.model.head.weight)
    assert signal.getsignal(number) is handler


def test_a_second_signal_acts_at_once(capfd):
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal is signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert "SIGINT: finishing this step" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_ignored_signal_stays_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) == signal.SIG_IGN
        assert stop.signal is None
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, before)


def poisoned(place):
    """Return a function that makes the loss of a run NaN, or only its gradient infinite or NaN."""

    def poison(run):
        if place == "loss":
            run.model.head.bias.data[2] = torch.nan
        else:
            run.model.head.weight.register_hook(lambda gradient: gradient * torch.inf)
        run.before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}

    return poison


@pytest.mark.parametrize("interrupt", [False, True])
def test_results_that_arrive_late_are_recorded_alike(tmp_path, monkeypatch, interrupt):
    """As from a GPU: the device decides about a step, and its results arrive some steps later."""
    usual = Run(tmp_path / "usual").train()
    monkeypatch.setattr(engine_step, "can_skip_on_device", lambda optimizer, device: True)
    late = Run(tmp_path / "late")
    if interrupt:
        late.model.on_step[7] = lambda: os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            late.train()
        late = Run(tmp_path / "late")
    late.train()
    assert late.records() == usual.records()
    assert_same_state(late, usual)


def test_a_late_report_of_a_step_that_is_not_finite(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_step, "can_skip_on_device", lambda optimizer, device: True)
    run = Run(tmp_path, intervals=Intervals(evaluate=100, save=100, log=2))
    run.model.on_step[4] = lambda: poisoned("gradient")(run)
    with pytest.raises(FloatingPointError, match=r"iteration 4: .*image ids 12, 13, 14, 15"):
        run.train()
    assert run.model.steps == 6
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, run.before[name])
    assert [record["iteration"] for record in run.records()] == [2]


@pytest.mark.parametrize("clip_norm", [None, 1.0])
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("loss", r"iteration 4: .*_rpn_box_reg \d\S*, loss_classifier nan, .*; image ids 12, 13, 14, 15"),
        ("gradient", r"iteration 4: .* loss_classifier \d\S*, .*gradient norm (nan|inf); image ids 12, 13, 14, 15"),
    ],
)
def test_training_stops_before_a_step_that_is_not_finite(tmp_path, place, message, clip_norm):
    run = Run(tmp_path, step={"clip_norm": clip_norm})
    run.model.on_step[4] = lambda: poisoned(place)(run)
    with pytest.raises(FloatingPointError, match=message):
        run.train()
    for name, parameter in run.model.named_parameters():
        torch.testing.assert_close(parameter.data, run.before[name], rtol=0, atol=0, equal_nan=True)
    assert load_checkpoint(tmp_path / "checkpoints" / "last.pt").iteration == 3


def test_speed_counts_waiting_and_working_alone():
    ticks = iter([0.0, 1.0, 10.0, 13.0])
    speed = Speedometer(clock=lambda: next(ticks))
    assert (speed.images_per_second, speed.data_share) == (0.0, 0.0)
    with speed.waiting():
        pass  # one second
    with speed.working(images=8):
        pass  # three seconds, nine after the wait ended
    assert (speed.images_per_second, speed.data_share) == (2.0, 0.25)
    speed.reset()
    assert speed.images_per_second == 0.0


def test_default_configuration_is_the_reference_recipe():
    config = TrainingConfig()
    assert (config.batch_size, config.optimizer, config.schedule) == (16, SGDConfig(), MultiStepConfig())
    assert TrainingConfig.model_validate(config.model_dump(mode="json")) == config
