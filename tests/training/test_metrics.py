import json

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from maskrcnn.training.metrics import TIMING_KEYS, Measurement, MetricsWriter, Step, last_record, read_records


def step(iteration, objectness=0.25):
    return Step(
        iteration,
        losses={"objectness": objectness, "mask": 0.5},
        lr=0.02,
        gradient_norm=3.0,
        images_per_second=4.0,
        data_share=0.125,
        peak_memory=3 * 2**29,
    )


def test_records_hold_the_documented_keys(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.log_step(step(20))
        writer.log_evaluation(20, Measurement({"segm/AP": 0.5}, 7.5))
    train, evaluation = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert train == {
        "kind": "train",
        "iteration": 20,
        "loss": 0.75,
        "losses": {"objectness": 0.25, "mask": 0.5},
        "lr": 0.02,
        "gradient_norm": 3.0,
        "images_per_second": 4.0,
        "data_share": 0.125,
        "peak_memory": 3 * 2**29,
    }
    assert train.keys() > TIMING_KEYS
    assert evaluation == {"kind": "evaluation", "iteration": 20, "metrics": {"segm/AP": 0.5}, "images_per_second": 7.5}


def test_numbers_that_json_lacks_are_null(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.log_evaluation(1, Measurement({"segm/AP": float("nan"), "bbox/AP": float("inf")}, 7.5))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text)["metrics"] == {"segm/AP": None, "bbox/AP": None}


def test_a_record_is_on_disk_before_the_file_closes(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.log_step(step(20))
        assert len(read_records(tmp_path / "metrics.jsonl")) == 1


def test_a_resumed_run_drops_what_it_repeats(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for iteration in (10, 20, 30):
            writer.log_step(step(iteration))
        writer.log_evaluation(20, Measurement({"segm/AP": 0.5}, 7.5))
        writer.log_evaluation(30, Measurement({"segm/AP": 0.6}, 7.5))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "itera')  # a kill in the middle of a line
    with MetricsWriter(tmp_path, start=20) as writer:
        assert writer.last_evaluation == 20
        writer.log_step(step(30, objectness=1.0))
    records = read_records(tmp_path / "metrics.jsonl")
    assert [(record["kind"], record["iteration"]) for record in records] == [
        ("train", 10),
        ("train", 20),
        ("evaluation", 20),
        ("train", 30),
    ]
    assert records[-1]["losses"]["objectness"] == 1.0


def test_a_run_from_the_start_has_no_past(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.log_evaluation(5, Measurement({"segm/AP": 0.5}, 7.5))
    with MetricsWriter(tmp_path) as writer:
        assert writer.last_evaluation is None
    assert read_records(tmp_path / "metrics.jsonl") == []


def test_tensorboard_reads_the_events_back_across_a_resume(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for iteration in (10, 20, 30):
            writer.log_step(step(iteration))
        writer.log_evaluation(20, Measurement({"segm/AP": 0.5}, 7.5))
    with MetricsWriter(tmp_path, start=20) as writer:
        writer.log_step(step(30, objectness=1.0))
        writer.log_step(step(40, objectness=2.0))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {
        "train/loss",
        "train/losses/objectness",
        "train/losses/mask",
        "train/lr",
        "train/gradient_norm",
        "train/images_per_second",
        "train/data_share",
        "train/peak_memory",
        "evaluation/segm/AP",
        "evaluation/images_per_second",
    }
    objectness = [(event.step, event.value) for event in events.Scalars("train/losses/objectness")]
    assert objectness == [(10, 0.25), (20, 0.25), (30, 1.0), (40, 2.0)]
    assert [(event.step, event.value) for event in events.Scalars("evaluation/segm/AP")] == [(20, 0.5)]
    assert events.Scalars("train/lr")[0].value == pytest.approx(0.02)


def test_step_in_one_line():
    assert str(step(20)) == "loss 0.750, lr 2.00e-02, 4.00 images/s, data 12%, 1.5 GiB; objectness 0.250, mask 0.500"


def test_the_last_record_is_the_last_complete_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert last_record(path) is None
    path.write_text("")
    assert last_record(path) is None
    with MetricsWriter(tmp_path) as writer:
        for iteration in range(1, 1001):  # more than is read at once
            writer.log_step(step(iteration))
    with path.open("a") as file:
        file.write('{"kind": "train", "itera')
    assert last_record(path) == read_records(path)[-1]
    assert last_record(path)["iteration"] == 1000
