"""The training engine as a whole: resuming, stopping early, averaged weights, precision, and steps that go wrong."""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from maskrcnn.config import load_config
from maskrcnn.errors import InputError
from maskrcnn.experiment import ExperimentConfig
from maskrcnn.inference import evaluate_checkpoint, load_predictor
from maskrcnn.structures import Losses
from maskrcnn.training.checkpoint import load_checkpoint
from maskrcnn.training.distributed import Processes
from maskrcnn.training.loop import Interrupted
from maskrcnn.training.metrics import TIMING_KEYS, read_records, without_nan
from maskrcnn.training.replay import load_replay
from maskrcnn.training.step import TrainingStep
from maskrcnn.training_run import train_experiment

pytestmark = pytest.mark.usefixtures("logging_restored")

REPOSITORY = Path(__file__).parents[1]
CPU = torch.device("cpu")

EXPERIMENT = """
model:
  backbone: {kind: resnet, depth: 18, width: 8, output: c5, norm: bn, freeze: 0, weights: none}
  rpn:
    anchor_sizes: [[32]]
    batch_size_per_image: 8
    training: {pre_nms_top_n: 8, post_nms_top_n: 8}
    inference: {pre_nms_top_n: 8, post_nms_top_n: 8}
  sampling: {batch_size_per_image: 8}
  box_head: {kind: fc, width: 16}
  mask_head: {kind: fcn, pool_size: 7, depth: 1, width: 8}
  detection: {detections_per_image: 4, score_threshold: 0.0}
data:
  train: {kind: shapes, length: 10, height: 64, width: 64, classes: [disc, cross]}
  validation: {kind: shapes, length: 2, height: 64, width: 64, classes: [disc, cross], seed: 1}
  train_transforms: {short_side: [64], long_side: 64}
  validation_transforms: {short_side: [64], long_side: 64, flip: 0}
training:
  batch_size: 4
  workers: 0
  optimizer: {kind: adamw, lr: 1.0e-3, base_batch: 4}
  schedule: {kind: cosine, iterations: 6, warmup_iterations: 2}
  evaluate_every: 4
  checkpoint_every: 2
  log_every: 1
evaluation: {batch_size: 2, pictures: 1}
"""


def train(out: Path, *overrides: str, resume: bool = False) -> Path:
    path = out.with_suffix(".yaml")
    path.write_text(EXPERIMENT)
    config = load_config(path, ExperimentConfig, overrides)
    train_experiment(config, out, resume=resume, init=None, processes=Processes(CPU))
    return out


def records(run: Path) -> list[dict[str, Any]]:
    found = read_records(run / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key not in TIMING_KEYS} for record in found]


def assert_same_end(one: Path, other: Path) -> None:
    """Bit for bit: weights, averaged weights, optimizer, and what is on record."""
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


EVERYTHING = (
    "training.grad_accum_steps=2",
    "training.ema_decay=0.9",
    "training.workers=2",
    "training.clip_norm=5.0",
    "evaluation.losses=true",
    "evaluation.best_metric=ema/mask/AP50",
)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_stopped_run_ends_like_an_undisturbed_one_with_all_there_is(
    tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of an epoch (of 2 steps), with workers, accumulation, averaged weights and a loss scaler."""
    options = (*EVERYTHING, f"training.precision={precision}")
    whole = train(tmp_path / "whole", *options)
    take = TrainingStep.__call__

    def stop_after_3(self: TrainingStep, batches: Any, iteration: int, **how: Any) -> Any:
        found = take(self, batches, iteration, **how)
        if iteration == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(TrainingStep, "__call__", stop_after_3)
        with pytest.raises(Interrupted, match="stopped after iteration 3"):
            train(tmp_path / "halves", *options)
    halves = train(tmp_path / "halves", *options, resume=True)
    assert_same_end(whole, halves)
    evaluation = next(record for record in records(whole) if record["kind"] == "evaluation")
    assert {"mask/AP", "ema/mask/AP"} <= evaluation["metrics"].keys()
    assert evaluation["losses"].keys() == set(Losses._fields)
    assert load_checkpoint(whole / "checkpoints" / "last.pt").average


def test_averaged_weights_are_evaluated_alone_as_in_training(tmp_path: Path) -> None:
    run = train(tmp_path / "run", "training.ema_decay=0.5", "model.detection.detections_per_image=20")
    config = load_config(run / "config.yaml", ExperimentConfig)
    last = run / "checkpoints" / "last.pt"
    evaluation = next(record for record in reversed(records(run)) if record["kind"] == "evaluation")
    for average, prefix in ((False, ""), (True, "ema/")):
        found = evaluate_checkpoint(config, last, tmp_path / f"out{average}", CPU, average=average)
        assert without_nan(found.summary()) == {name: evaluation["metrics"][prefix + name] for name in found.summary()}
    scores = [(folder / "results.json").read_text() for folder in (run / "evaluation", run / "evaluation" / "average")]
    assert scores[0] != scores[1]
    plain = train(tmp_path / "plain", "training.schedule={kind: cosine, iterations: 1, warmup_iterations: 0}")
    with pytest.raises(InputError, match=r"last\.pt: it holds no averaged weights"):
        load_predictor(config, plain / "checkpoints" / "last.pt", CPU, average=True)


# Nothing that training chooses by a threshold or a rank: rounding could decide it, and steps would differ by percents.
SMOOTH = (
    "model.box_head.smooth_l1_beta=1.0",  # the gradient of L1 is a sign
    "model.rpn.smooth_l1_beta=1.0",
    "model.rpn.training={pre_nms_top_n: 100, post_nms_top_n: 100}",
    "model.rpn.nms_threshold=1.0",
    "model.sampling={batch_size_per_image: 200, positive_fraction: 1.0}",
)


def test_accumulation_takes_the_steps_of_the_whole_batch(tmp_path: Path) -> None:
    """To float tolerance; without norms of batches, whose statistics are those of the parts."""
    options = (
        *SMOOTH,
        "model.backbone.norm=frozen_bn",
        "training.optimizer={kind: sgd, lr: 0.01, base_batch: 4}",
        "training.schedule={kind: cosine, iterations: 3, warmup_iterations: 0}",
    )
    one, other = (train(tmp_path / str(parts), *options, f"training.grad_accum_steps={parts}") for parts in (1, 4))
    left, right = (load_checkpoint(run / "checkpoints" / "last.pt").model for run in (one, other))
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=1e-4, atol=1e-6)


def test_deterministic_runs_are_equal_bit_for_bit(tmp_path: Path) -> None:
    try:
        one, other = (train(tmp_path / name, *EVERYTHING, "training.deterministic=true") for name in ("one", "other"))
        assert_same_end(one, other)
        assert "deterministic: true" in (one / "environment.txt").read_text()
    finally:
        torch.use_deterministic_algorithms(False)


def test_training_ends_early_where_evaluations_no_longer_improve(tmp_path: Path) -> None:
    options = ("training.optimizer.lr=1.0e-12", "training.evaluate_every=1", "training.patience=2")
    run = train(tmp_path / "run", *options)
    kinds = [(record["kind"], record["iteration"]) for record in records(run) if record["kind"] != "train"]
    end = kinds[-1][1]
    best = load_checkpoint(run / "checkpoints" / "best.pt").iteration
    assert kinds[-1][0] == "end"
    assert end == best + 2 < 6
    assert "no better evaluation for a while" in (run / "train.log").read_text()
    before = records(run)
    train(run, *options, resume=True)  # it has come to its end, and stays there
    assert records(run) == before


def test_checkpoints_are_kept(tmp_path: Path) -> None:
    run = train(tmp_path / "run", "training.keep_checkpoints=2")
    names = ["best.pt", "iteration_00000004.pt", "iteration_00000006.pt", "last.pt"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == names


def test_the_length_may_be_in_epochs(tmp_path: Path) -> None:
    run = train(
        tmp_path / "run", "training.schedule={kind: cosine, epochs: 1.5, iterations: null, warmup_iterations: 1}"
    )
    assert records(run)[-1] == {"kind": "end", "iteration": 3}  # 10 scenes are 2 batches of 4


def test_bfloat16_learns(tmp_path: Path) -> None:
    run = train(tmp_path / "run", "training.precision=bf16")
    losses = [record["loss"] for record in records(run) if record["kind"] == "train"]
    assert losses[-1] < losses[0]


def test_the_best_metric_of_an_average_needs_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there are no averaged weights: set training\.ema_decay"):
        train(tmp_path / "run", "evaluation.best_metric=ema/mask/AP")


# What is not finite.


def test_a_step_that_is_not_finite_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = ("training.optimizer={kind: sgd, lr: 1.0e+30, base_batch: 4}", "training.schedule.warmup_iterations=0")
    with pytest.raises(FloatingPointError, match=r"iteration (\d): .*mask .*image ids .*replay_batch\.py repeats it"):
        train(tmp_path / "run", *wild)
    (stored,) = (tmp_path / "run" / "replay").iterdir()
    replay = load_replay(stored)
    assert [len(batch.images) for batch in replay.batches] == [4]
    monkeypatch.setattr(sys, "argv", ["replay_batch.py", str(stored)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(REPOSITORY / "tools" / "replay_batch.py"), run_name="__main__")
    assert end.value.code == 1
    told = capsys.readouterr().out
    assert "gradient norm" in told
    assert "nan" in told or "inf" in told


def test_a_file_that_holds_no_step_is_refused(tmp_path: Path) -> None:
    run = train(tmp_path / "run", "training.schedule={kind: cosine, iterations: 1, warmup_iterations: 0}")
    with pytest.raises(InputError, match=r"last\.pt: this is no stored step"):
        load_replay(run / "checkpoints" / "last.pt")
