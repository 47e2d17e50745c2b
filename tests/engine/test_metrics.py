import io
import json
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import STORE_EVERYTHING_SIZE_GUIDANCE, EventAccumulator

from maskrcnn.config import Section
from maskrcnn.engine import metrics
from maskrcnn.engine.metrics import (
    LONGEST_RECORD,
    TIMING_KEYS,
    Measurement,
    MetricsWriter,
    SilentWriter,
    Step,
    last_record,
    read_records,
)

NAN = float("nan")


def events_of(folder):
    return EventAccumulator(str(folder / "tensorboard"), STORE_EVERYTHING_SIZE_GUIDANCE).Reload()


def scalars(events):
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def step(iteration, objectness=0.25):
    return Step(
        iteration,
        losses={"loss_objectness": objectness, "loss_mask": 0.5},
        lr=0.02,
        gradient_norm=3.0,
        images_per_second=4.0,
        data_share=0.125,
        peak_memory=3 * 2**29,
        diagnostics={"proposal_recall": 0.75, "positive_fraction": 0.25},
    )


MEASUREMENT = Measurement(
    metrics={"box/AP": 0.25, "mask/AP": 0.5},
    images_per_second=7.5,
    classes={"cat": {"mask/AP": 0.5}, "traffic light": {"box/AP": 0.25, "mask/AP": NAN}},
    losses={"loss_objectness": 0.25, "loss_mask": 0.5},
    pictures={"17": np.full((4, 6, 3), 200, np.uint8)},
)


def test_records_hold_the_documented_keys(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.log_step(step(20))
        writer.log_evaluation(20, MEASUREMENT)
        writer.log_end()
    train, evaluation, end = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert train == {
        "kind": "train",
        "iteration": 20,
        "loss": 0.75,
        "losses": {"loss_objectness": 0.25, "loss_mask": 0.5},
        "lr": 0.02,
        "gradient_norm": 3.0,
        "images_per_second": 4.0,
        "data_share": 0.125,
        "peak_memory": 3 * 2**29,
        "proposal_recall": 0.75,
        "positive_fraction": 0.25,
    }
    assert train.keys() > TIMING_KEYS
    assert evaluation == {
        "kind": "evaluation",
        "iteration": 20,
        "metrics": {"box/AP": 0.25, "mask/AP": 0.5},
        "images_per_second": 7.5,
        "classes": {"cat": {"mask/AP": 0.5}, "traffic light": {"box/AP": 0.25, "mask/AP": None}},
        "loss": 0.75,
        "losses": {"loss_objectness": 0.25, "loss_mask": 0.5},
    }
    assert end == {"kind": "end", "iteration": 20}


def test_what_was_not_measured_is_absent(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.log_step(replace(step(20), diagnostics={}))
        writer.log_evaluation(20, Measurement({"mask/AP": 0.5}, 7.5))
    train, evaluation = read_records(tmp_path / "metrics.jsonl")
    assert not train.keys() & {"proposal_recall", "positive_fraction"}
    assert not evaluation.keys() & {"loss", "losses"}
    assert not [tag for tag in scalars(events_of(tmp_path)) if "recall" in tag or "evaluation/loss" in tag]


def test_metrics_of_averaged_weights_have_a_prefix():
    average = Measurement({"box/AP": 0.75}, 9.0, {"cat": {"mask/AP": 0.625}}, {"loss_mask": 0.1})
    both = MEASUREMENT.with_average(average)
    assert both.metrics == {"box/AP": 0.25, "mask/AP": 0.5, "ema/box/AP": 0.75}
    assert both.classes["cat"] == {"mask/AP": 0.5, "ema/mask/AP": 0.625}
    assert (both.images_per_second, both.losses) == (MEASUREMENT.images_per_second, MEASUREMENT.losses)
    assert both.curves()["class_AP/ema/mask/cat"] == 0.625
    assert both.curves()["evaluation/ema/box/AP"] == 0.75


def test_numbers_that_are_not_finite_are_null(tmp_path):
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
        file.write('{"kind": "train", "itera')  # as a kill in the middle of a write leaves it
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
    assert records[-1]["losses"]["loss_objectness"] == 1.0


def test_a_run_from_the_start_drops_all_records(tmp_path):
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
    time.sleep(1)  # TensorBoard orders files by the second of their creation, then by a number as text
    with MetricsWriter(tmp_path, start=20) as writer:
        writer.log_step(step(30, objectness=1.0))
        writer.log_step(step(40, objectness=2.0))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {
        "train/loss",
        "train/losses/loss_objectness",
        "train/losses/loss_mask",
        "train/lr",
        "train/gradient_norm",
        "train/images_per_second",
        "train/data_share",
        "train/peak_memory",
        "train/proposal_recall",
        "train/positive_fraction",
        "evaluation/segm/AP",
        "evaluation/images_per_second",
    }
    objectness = [(event.step, event.value) for event in events.Scalars("train/losses/loss_objectness")]
    assert objectness == [(10, 0.25), (20, 0.25), (30, 1.0), (40, 2.0)]
    assert [(event.step, event.value) for event in events.Scalars("evaluation/segm/AP")] == [(20, 0.5)]
    assert events.Scalars("train/lr")[0].value == pytest.approx(0.02)


def test_tensorboard_has_the_results_of_an_evaluation(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.log_evaluation(20, MEASUREMENT)
    events = events_of(tmp_path)
    assert scalars(events) == {
        "evaluation/box/AP": [(20, 0.25)],
        "evaluation/mask/AP": [(20, 0.5)],
        "evaluation/images_per_second": [(20, 7.5)],
        "evaluation/loss": [(20, 0.75)],
        "evaluation/losses/loss_objectness": [(20, 0.25)],
        "evaluation/losses/loss_mask": [(20, 0.5)],
        "class_AP/mask/cat": [(20, 0.5)],
        "class_AP/box/traffic light": [(20, 0.25)],  # NaN has no point
    }
    (picture,) = events.Images("pictures/17")
    assert picture.step == 20
    assert (np.array(Image.open(io.BytesIO(picture.encoded_image_string))) == MEASUREMENT.pictures["17"]).all()


def test_a_resumed_run_shows_its_new_pictures_alone(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for iteration in (10, 20):
            writer.log_evaluation(iteration, MEASUREMENT)
    white = MEASUREMENT._replace(pictures={"17": np.full((4, 6, 3), 255, np.uint8)})
    with MetricsWriter(tmp_path, start=10) as writer:
        writer.log_evaluation(20, white)
    pictures = events_of(tmp_path).Images("pictures/17")
    assert [picture.step for picture in pictures] == [10, 20]
    first, second = (np.array(Image.open(io.BytesIO(picture.encoded_image_string))) for picture in pictures)
    assert (first == 200).all()
    assert (second == 255).all()


class Config(Section):
    lr: float = 0.02


def test_each_start_leaves_its_configuration(tmp_path):
    for start, config in ((0, Config()), (10, Config(lr=0.5))):
        with MetricsWriter(tmp_path, start=start) as writer:
            writer.log_config(config)
            writer.log_step(step(start + 10))
    texts = events_of(tmp_path).Tensors("config/text_summary")
    configs = [(text.step, text.tensor_proto.string_val[0].decode()) for text in texts]
    assert configs == [(0, "```yaml\nlr: 0.02\n```"), (10, "```yaml\nlr: 0.5\n```")]


def test_a_run_that_goes_on_has_not_ended(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.log_evaluation(20, MEASUREMENT)
        writer.log_end()
    with MetricsWriter(tmp_path, start=20):
        pass
    assert [record["kind"] for record in read_records(tmp_path / "metrics.jsonl")] == ["evaluation"]


def test_a_silent_writer_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with SilentWriter() as writer:
        assert writer.last_evaluation is None
        writer.log_config(Config())
        writer.log_step(step(20))
        writer.log_evaluation(20, MEASUREMENT)
        writer.log_end()
    assert writer.last_evaluation == 20
    assert not list(tmp_path.iterdir())


def test_step_in_one_line():
    assert step(20).brief == "loss 0.750 lr 0.02 4 img/s data 12% 1.5 GiB"
    assert str(step(20)) == step(20).brief + "; loss_objectness 0.250, loss_mask 0.500"


def test_the_progress_of_a_long_training_fits_80_columns():
    record = Step(135_000, {"loss_mask": 1.0726}, 0.02 / 171, 3.0, 14.234, 0.123, int(10.5 * 2**30))
    line = f"135000/270000 26:15:05 left, {record.brief}"
    assert line.endswith("loss 1.073 lr 0.00012 14.2 img/s data 12% 10.5 GiB")
    assert len(line) < 80  # tqdm leaves the last column free


def test_a_record_of_many_classes_is_not_too_long(tmp_path):
    metrics_of_class = dict.fromkeys(("box/AP", "mask/AP", "ema/box/AP", "ema/mask/AP"), 1 / 3)
    with MetricsWriter(tmp_path) as writer:
        classes = {f"a class with a long name {index}": metrics_of_class for index in range(1203)}
        writer.log_evaluation(20, Measurement({}, 7.5, classes))
    assert (tmp_path / "metrics.jsonl").stat().st_size < LONGEST_RECORD / 3
    assert last_record(tmp_path / "metrics.jsonl")["classes"] == classes


def test_the_last_record_is_the_last_complete_line(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "LONGEST_RECORD", 1024)
    path = tmp_path / "metrics.jsonl"
    assert last_record(path) is None
    path.write_text("")
    assert last_record(path) is None
    with MetricsWriter(tmp_path) as writer:
        for iteration in range(1, 11):  # longer than LONGEST_RECORD
            writer.log_step(step(iteration))
    with path.open("a") as file:
        file.write('{"kind": "train", "itera')
    assert last_record(path) == read_records(path)[-1]
    assert last_record(path)["iteration"] == 10


GARBAGE = [
    b"\0" * 40,
    b"\xff\xfe binary \x80",
    b'{"kind": "train", "iter',
    b'[{"kind": "train", "iteration": 1}]',
    b'{"kind": "train"}',
    b'{"kind": "other", "iteration": 2}',
    b"[" * 100_000,
    b"1" * 10_000,
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_damaged_lines_are_left_out_with_a_warning(tmp_path, garbage, caplog):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(tmp_path) as writer:
        for iteration in (1, 2):
            writer.log_step(step(iteration))
    first, second = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([garbage, first, garbage, second, garbage, b""]))
    assert read_records(path) == [json.loads(first), json.loads(second)]
    assert caplog.messages == [f"{path}: 3 lines are damaged and left out"]
    assert last_record(path) == json.loads(second)
    MetricsWriter(tmp_path, start=2).close()
    assert path.read_bytes().splitlines() == [first, second]


def test_a_run_without_evaluations_goes_on(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        writer.log_step(step(1))
        writer.log_end()
    with MetricsWriter(tmp_path, start=1) as writer:
        assert [record["kind"] for record in read_records(tmp_path / "metrics.jsonl")] == ["train"]
