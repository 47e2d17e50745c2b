"""Whole training runs: resuming, early stopping, averaged weights, precision, and steps that are not finite."""

from __future__ import annotations

import os
import re
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from maskrcnn.config import read_config
from maskrcnn.engine.checkpoint import load_checkpoint
from maskrcnn.engine.loop import Interrupted
from maskrcnn.engine.metrics import TIMING_KEYS, read_records
from maskrcnn.engine.replay import load_replay
from maskrcnn.engine.step import TrainingStep, require_precision
from maskrcnn.errors import InputError
from maskrcnn.experiment import ExperimentConfig, evaluate_checkpoint, load, load_predictor
from maskrcnn.models.mask_rcnn import MaskRCNN
from maskrcnn.runtime.files import without_nan
from maskrcnn.runtime.processes import Processes
from maskrcnn.structures import Losses
from maskrcnn.training_run import train_experiment, use_fast_kernels

pytestmark = pytest.mark.usefixtures("logging_restored")

REPOSITORY = Path(__file__).parents[1]
CPU = torch.device("cpu")

EXPERIMENT = f"""
base: {Path(__file__).parent / "tiny.yaml"}
training:
  batch_size: 4
  optimizer: {{kind: adamw, lr: 1.0e-3, base_batch: 4}}
  schedule: {{iterations: 6, warmup_iterations: 2}}
  evaluate_every: 4
  checkpoint_every: 2
evaluation: {{batch_size: 2}}
"""


def train(out: Path, *overrides: str, resume: bool = False) -> Path:
    path = out.with_suffix(".yaml")
    path.write_text(EXPERIMENT)
    config = read_config(path, ExperimentConfig, overrides)
    train_experiment(config, out, resume=resume, init=None, processes=Processes(CPU))
    return out


def records(run: Path) -> list[dict[str, Any]]:
    all_fields = read_records(run / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key not in TIMING_KEYS} for record in all_fields]


def assert_same_end(one: Path, other: Path) -> None:
    """Check that weights, averaged weights, optimizer state and records are equal bit for bit."""
    left, right = (load_checkpoint(run / "checkpoints" / "last.pt") for run in (one, other))
    assert left.iteration == right.iteration
    assert left.model.keys() == right.model.keys()
    assert left.average.keys() == right.average.keys()
    assert all(torch.equal(value, right.model[name]) for name, value in left.model.items())
    assert all(torch.equal(value, right.average[name]) for name, value in left.average.items())
    for index, state in left.optimizer["state"].items():
        assert all(torch.equal(value, right.optimizer["state"][index][key]) for key, value in state.items())
    assert left.scaler == right.scaler
    assert records(one) == records(other)


TRANSFORMS = (
    "{kind: horizontal_flip}, {kind: mosaic, side: 64}, {kind: affine}, {kind: large_scale_jitter, side: 64}, "
    "{kind: copy_paste, balanced: true}, {kind: color_jitter}, {kind: gaussian_blur}, {kind: jpeg}, {kind: cutout}"
)
STEP_FEATURES = (
    "training.grad_accum_steps=2",
    "training.ema_decay=0.9",
    "training.clip_norm=5.0",
    "evaluation.losses=true",
    "evaluation.best_metric=ema/mask/AP50",
)
DATA_FEATURES = (
    f"data.train_transforms=[{TRANSFORMS}]",
    "training.sampler.kind=class_balanced",
    "training.workers=2",
)


@pytest.mark.parametrize(
    "options",
    [(*STEP_FEATURES, *DATA_FEATURES), (*STEP_FEATURES, "training.precision=fp16")],
    ids=["data", "fp16"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop within an epoch (of 2 steps), with gradient accumulation and averaged weights.

    The first run has workers, images drawn by class and transforms that read other images, the second a loss scaler.
    """
    uninterrupted = train(tmp_path / "uninterrupted", *options)
    start = TrainingStep.start

    def stop_after_3(self: TrainingStep, batches: Any, iteration: int, **kwargs: Any) -> None:
        start(self, batches, iteration, **kwargs)
        if iteration == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "start", stop_after_3)
        with pytest.raises(Interrupted, match="stopped after iteration 3"):
            train(tmp_path / "resumed", *options)
    resumed = train(tmp_path / "resumed", *options, resume=True)
    assert_same_end(uninterrupted, resumed)
    evaluation = next(record for record in records(uninterrupted) if record["kind"] == "evaluation")
    assert {"mask/AP", "ema/mask/AP"} <= evaluation["metrics"].keys()
    assert evaluation["losses"].keys() == set(Losses._fields)
    assert load_checkpoint(uninterrupted / "checkpoints" / "last.pt").average


def test_averaged_weights_are_evaluated_alone_as_in_training(tmp_path: Path) -> None:
    run = train(tmp_path / "run", "training.ema_decay=0.5", "model.detection.detections_per_image=20")
    config = read_config(run / "config.yaml", ExperimentConfig)
    last = run / "checkpoints" / "last.pt"
    evaluation = next(record for record in reversed(records(run)) if record["kind"] == "evaluation")
    for average, prefix in ((False, ""), (True, "ema/")):
        metrics = evaluate_checkpoint(config, last, tmp_path / f"out{average}", CPU, average=average).summary()
        assert without_nan(metrics) == {name: evaluation["metrics"][prefix + name] for name in metrics}
    results = [(folder / "results.json").read_text() for folder in (run / "evaluation", run / "evaluation" / "average")]
    assert results[0] != results[1]
    without_ema = train(
        tmp_path / "without_ema", "training.schedule={kind: cosine, iterations: 1, warmup_iterations: 0}"
    )
    with pytest.raises(InputError, match=r"last\.pt: it holds no averaged weights"):
        load_predictor(config, without_ema / "checkpoints" / "last.pt", CPU, average=True)


def test_the_weights_that_the_best_metric_names_are_used_by_default(tmp_path: Path) -> None:
    options = ("training.ema_decay=0.5", "evaluation.best_metric=ema/mask/AP")
    run = train(tmp_path / "run", *options)
    config = read_config(run / "config.yaml", ExperimentConfig)
    best = load_checkpoint(run / "checkpoints" / "best.pt")
    for average, expected in ((None, best.average), (True, best.average), (False, best.model)):
        for predictor in (
            load_predictor(config, run / "checkpoints" / "best.pt", CPU, average=average),
            load(run / "checkpoints" / "best.pt", device="cpu", average=average),
        ):
            state = predictor.model.state_dict()
            assert all(torch.equal(value, expected[name]) for name, value in state.items())
    assert any(not torch.equal(value, best.average[name]) for name, value in best.model.items())


# Without selections by threshold or rank, in which a rounding error could change the step by percents.
SMOOTH = (
    "model.box_head.smooth_l1_beta=1.0",  # the gradient of L1 is discontinuous
    "model.rpn.smooth_l1_beta=1.0",
    "model.rpn.training={pre_nms_top_n: 100, post_nms_top_n: 100}",
    "model.rpn.nms_threshold=1.0",
    "model.sampling={batch_size_per_image: 200, positive_fraction: 1.0}",
)


def test_gradient_accumulation_equals_the_whole_batch(tmp_path: Path) -> None:
    """Equal to float tolerance. Frozen norms, because batch norm statistics are those of the smaller batches."""
    options = (
        *SMOOTH,
        "model.backbone.norm=frozen_bn",
        "training.optimizer={kind: sgd, lr: 0.01, base_batch: 4}",
        "training.schedule={kind: cosine, iterations: 3, warmup_iterations: 0}",
    )
    one, other = (train(tmp_path / str(steps), *options, f"training.grad_accum_steps={steps}") for steps in (1, 4))
    left, right = (load_checkpoint(run / "checkpoints" / "last.pt").model for run in (one, other))
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=1e-4, atol=1e-6)


def test_deterministic_runs_are_equal_bit_for_bit(tmp_path: Path) -> None:
    try:
        one, other = (
            train(tmp_path / name, *STEP_FEATURES, *DATA_FEATURES, "training.deterministic=true")
            for name in ("one", "other")
        )
        assert_same_end(one, other)
        assert "deterministic: true" in (one / "environment.txt").read_text()
    finally:
        torch.use_deterministic_algorithms(False)


def test_early_stopping(tmp_path: Path) -> None:
    options = ("training.optimizer.lr=1.0e-12", "training.evaluate_every=1", "training.patience=2")
    run = train(tmp_path / "run", *options)
    kinds = [(record["kind"], record["iteration"]) for record in records(run) if record["kind"] != "train"]
    end = kinds[-1][1]
    best = load_checkpoint(run / "checkpoints" / "best.pt").iteration
    assert kinds[-1][0] == "end"
    assert end == best + 2 < 6
    assert "no improvement in the last evaluations" in (run / "train.log").read_text()
    before = records(run)
    train(run, *options, resume=True)  # a finished run does nothing
    assert records(run) == before


def test_checkpoints_are_kept(tmp_path: Path) -> None:
    run = train(tmp_path / "run", "training.keep_checkpoints=2")
    names = ["best.pt", "iteration_00000004.pt", "iteration_00000006.pt", "last.pt"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == names


def test_the_length_may_be_in_epochs(tmp_path: Path) -> None:
    run = train(
        tmp_path / "run", "training.schedule={kind: cosine, epochs: 1.5, iterations: null, warmup_iterations: 1}"
    )
    assert records(run)[-1] == {"kind": "end", "iteration": 3}  # 10 images are 2 batches of 4


def test_bfloat16_learns(tmp_path: Path) -> None:
    run = train(tmp_path / "run", "training.precision=bf16")
    losses = [record["loss"] for record in records(run) if record["kind"] == "train"]
    assert losses[-1] < losses[0]


def test_the_best_metric_of_an_average_needs_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there are no averaged weights: set training\.ema_decay"):
        train(tmp_path / "run", "evaluation.best_metric=ema/mask/AP")


# Values that are not finite.


def test_a_step_that_is_not_finite_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    diverging = ("training.optimizer={kind: sgd, lr: 1.0e+30, base_batch: 4}", "training.schedule.warmup_iterations=0")
    with pytest.raises(FloatingPointError, match=r"iteration (\d): .*mask .*image ids .*replay_batch\.py repeats it"):
        train(tmp_path / "run", *diverging)
    (stored,) = (tmp_path / "run" / "replay").iterdir()
    replay = load_replay(stored)
    assert [len(batch.images) for batch in replay.batches] == [4]
    monkeypatch.setattr(sys, "argv", ["replay_batch.py", str(stored)])
    with pytest.raises(SystemExit) as exited:
        runpy.run_path(str(REPOSITORY / "tools" / "replay_batch.py"), run_name="__main__")
    assert exited.value.code == 1
    output = capsys.readouterr().out
    assert "gradient norm" in output
    assert "nan" in output or "inf" in output


def test_a_file_that_is_not_a_replay_file_is_refused(tmp_path: Path) -> None:
    run = train(tmp_path / "run", "training.schedule={kind: cosine, iterations: 1, warmup_iterations: 0}")
    with pytest.raises(InputError, match=r"last\.pt: not a replay file"):
        load_replay(run / "checkpoints" / "last.pt")


# Buckets.


def test_a_training_with_buckets(tmp_path: Path) -> None:
    """The scenes are 64 x 64: one shape holds them, and the other is reported. Batches of 3 objects do not fit."""
    buckets = "training.buckets={shapes: [[64, 64], [64, 128]], objects: [2], mask_entries: 20000}"
    run = train(tmp_path / "run", buckets, "data.train.objects=[1, 3]")
    assert [record["iteration"] for record in records(run) if record["kind"] == "train"] == list(range(1, 7))
    log = (run / "train.log").read_text()
    assert "no training image has the aspect ratio of 64 x 128" in log
    assert re.search(r"\d batches before iteration \d did not fit in training.buckets", log)


def test_buckets_that_no_image_fits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"training.buckets.shapes: no image fits in 32 x 32.* has 64 x 64 px"):
        train(tmp_path / "run", "training.buckets={shapes: [[32, 32]]}")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.cuda_graph=true"], "training.cuda_graph: true needs a GPU, but the device is cpu"),
        (["training.compile=step"], "training.compile: step needs a GPU, but the device is cpu"),
    ],
)
def test_a_cpu_refuses_what_needs_a_gpu(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        train(tmp_path / "run", "training.buckets={shapes: [[64, 64]]}", *overrides)
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=r"needs batches of few shapes: set training.buckets"):
        train(tmp_path / "run", *overrides)


def test_a_gpu_without_bf16_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    require_precision("bf16", CPU)
    require_precision("fp16", torch.device("cuda"))
    with pytest.raises(InputError, match=r"bf16: Tesla T4 has no bfloat16 units .*; use fp16 or fp32"):
        require_precision("bf16", torch.device("cuda"))


def test_fast_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    precision = torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    try:
        use_fast_kernels(cudnn_benchmark=False, tf32=False)
        assert (torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()) == (False, precision)
        use_fast_kernels(cudnn_benchmark=True, tf32=True)
        assert (torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()) == (True, "high")
    finally:
        torch.set_float32_matmul_precision(precision)


def test_the_recipe_part_for_a_gpu(tmp_path: Path) -> None:
    """It holds for the sizes of COCO's recipes, and a CPU refuses it before anything is written."""
    path = tmp_path / "gpu.yaml"
    path.write_text("base: [coco/mask_rcnn_r50_fpn_1x, base/speed/gpu]\n")
    settings = read_config(path, ExperimentConfig).training
    assert settings.buckets is not None
    settings.buckets.require_multiples(32)
    with pytest.raises(InputError, match="cuda_graph: true needs a GPU"):
        settings.execution.require_device(CPU, 1)
    with pytest.raises(InputError, match="deterministic excludes cudnn_benchmark"):
        read_config(path, ExperimentConfig, ["training.deterministic=true"])


def test_compiled_parts_are_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(MaskRCNN, "compile_dense", lambda model, **options: compiled.append(options))
    train(tmp_path / "run", "training.compile=parts", "training.schedule.iterations=1")
    assert compiled == [{"backend": "inductor"}]
