"""Whole training, evaluation and prediction runs on small generated images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maskrcnn.config import read_config
from maskrcnn.data.shapes import ShapesConfig
from maskrcnn.engine.checkpoint import CheckpointFolder, load_checkpoint, save_checkpoint
from maskrcnn.engine.evaluator import Evaluator
from maskrcnn.engine.metrics import TIMING_KEYS, read_records
from maskrcnn.engine.prediction import ImagesSkipped, PredictionOptions, predict_images
from maskrcnn.engine.predictor import Predictor
from maskrcnn.errors import InputError
from maskrcnn.experiment import ExperimentConfig, choose_device, evaluate_checkpoint, load_predictor
from maskrcnn.experiment import load as load_weights
from maskrcnn.interop.agreement import require_same_meaning
from maskrcnn.models.mask_rcnn import MaskRCNNConfig
from maskrcnn.runtime.outputs import LOCK, MARKER
from maskrcnn.runtime.processes import Processes
from maskrcnn.structures import ClassTable
from maskrcnn.training_run import initialize, train_experiment

pytestmark = pytest.mark.usefixtures("logging_restored")

CPU = torch.device("cpu")
LAST = 4

EXPERIMENT = f"""
base: {Path(__file__).parent / "tiny_fpn.yaml"}
model:
  backbone: {{width: 32, norm: gn, freeze: 5}}
data:
  train: {{length: 8, classes: [disc, cross, star]}}
  validation: {{length: 3, classes: [disc, cross, star]}}
training:
  optimizer: {{kind: sgd, lr: 0.05}}
  schedule: {{iterations: 4}}
  evaluate_every: 2
evaluation: {{pictures: 2}}
"""


def load(folder: Path, *overrides: str) -> ExperimentConfig:
    path = folder / "experiment.yaml"
    path.write_text(EXPERIMENT)
    return read_config(path, ExperimentConfig, overrides)


def train(config: ExperimentConfig, out: Path, *, resume: bool = False, init: Path | None = None) -> None:
    train_experiment(config, out, resume=resume, init=init, processes=Processes(CPU))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. The checkpoint after two steps is beside its folder."""
    folder = tmp_path_factory.mktemp("experiment")
    save = CheckpointFolder.save

    def save_and_copy(self: CheckpointFolder, iteration: int) -> None:
        save(self, iteration)
        shutil.copy(self.last, folder / f"{iteration}.pt")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointFolder, "save", save_and_copy)
        train(load(folder), folder / "run")
    return folder / "run"


# Training.


def test_a_run_writes_all_files(run: Path) -> None:
    files = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    events = {name for name in files if name.startswith("tensorboard/events")}
    assert len(events) == 1
    assert files - events == {
        LOCK, MARKER, "config.yaml", "environment.txt", "train.log", "metrics.jsonl",
        "checkpoints/last.pt", "checkpoints/best.pt",
        "evaluation/metrics.json", "evaluation/results.json",
        "predictions/1.png", "predictions/2.png", "predictions/overview.png",
    }  # fmt: skip
    assert "training on 8 images, 3 classes" in (run / "train.log").read_text()
    assert read_config(run / "config.yaml", ExperimentConfig) == load(run.parent)


def test_steps_and_evaluations_are_recorded(run: Path) -> None:
    records = read_records(run / "metrics.jsonl")
    assert [(record["kind"], record["iteration"]) for record in records] == [
        ("train", 1), ("train", 2), ("evaluation", 2), ("train", 3), ("train", 4), ("evaluation", 4),
        ("end", 4),
    ]  # fmt: skip
    assert records[-2]["metrics"].keys() >= {"box/AP", "mask/AP", "mask/AP50", "mask/APs"}
    stored = json.loads((run / "evaluation" / "metrics.json").read_text())
    assert stored["mask/AP"] == records[-2]["metrics"]["mask/AP"]
    assert stored["classes"].keys() == {"disc", "cross", "star"}


def test_the_checkpoint_has_the_class_table(run: Path) -> None:
    checkpoint = load_checkpoint(run / "checkpoints" / "last.pt")
    assert checkpoint.iteration == LAST
    assert checkpoint.classes.names == ("disc", "cross", "star")


def halfway(run: Path, out: Path) -> Path:
    """Copy the run with its checkpoint after two steps to `out`."""
    shutil.copytree(run, out)
    shutil.copy(run.parent / "2.pt", out / "checkpoints" / "last.pt")
    return out


def test_a_resumed_run_equals_an_uninterrupted_one(run: Path, tmp_path: Path) -> None:
    other = halfway(run, tmp_path / "run")
    train(load(tmp_path), other, resume=True)
    assert "resuming after iteration 2" in (other / "train.log").read_text()
    one, two = (load_checkpoint(folder / "checkpoints" / "last.pt") for folder in (run, other))
    assert two.iteration == LAST
    assert all(torch.equal(value, two.model[name]) for name, value in one.model.items())
    first, second = (
        [{key: value for key, value in record.items() if key not in TIMING_KEYS} for record in read_records(path)]
        for path in (run / "metrics.jsonl", other / "metrics.jsonl")
    )
    assert first == second


def test_a_run_without_a_checkpoint_resumes_at_its_beginning(run: Path, tmp_path: Path) -> None:
    """A run that was killed early resumes with the same command as any other."""
    other = halfway(run, tmp_path / "run")
    for file in (other / "checkpoints").iterdir():
        file.unlink()
    train(load(tmp_path), other, resume=True)
    one, two = (load_checkpoint(folder / "checkpoints" / "last.pt") for folder in (run, other))
    assert all(torch.equal(value, two.model[name]) for name, value in one.model.items())


def test_a_finished_run_does_nothing_more(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "run"
    shutil.copytree(run, other)
    monkeypatch.setattr(Evaluator, "timed", None)  # a call raises TypeError
    train(load(tmp_path), other, resume=True)
    assert read_records(other / "metrics.jsonl") == read_records(run / "metrics.jsonl")


def test_a_refused_start_leaves_the_folder_free(tmp_path: Path) -> None:
    wrong = load(tmp_path, f"model.backbone.weights={tmp_path / 'absent.pth'}")
    with pytest.raises(InputError, match=r"absent\.pth"):
        train(wrong, tmp_path / "run")
    with pytest.raises(InputError, match=r"init\.pt"):
        train(load(tmp_path), tmp_path / "run", init=tmp_path / "init.pt")
    train(load(tmp_path, "training.schedule.iterations=1"), tmp_path / "run")


def test_an_image_that_cannot_be_read_costs_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Image 5 is broken: the steps before it are saved, and a resumed run continues there."""
    config = load(tmp_path)
    read = type(config.data.train.build()).__getitem__
    broken = 5

    def read_or_refuse(self: Any, index: int) -> Any:
        if len(self) == 8 and index == broken:
            raise InputError("picture 5 is broken")
        return read(self, index)

    monkeypatch.setattr(type(config.data.train.build()), "__getitem__", read_or_refuse)
    stops = []
    for resume in (False, True):
        with pytest.raises(InputError, match="picture 5 is broken"):
            train(config, tmp_path / "run", resume=resume)
        stops.append(load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt").iteration)
    assert 0 < stops[0] == stops[1] < LAST
    broken = -1
    train(config, tmp_path / "run", resume=True)
    assert load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt").iteration == LAST


def test_classes_that_differ_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.num_classes is 4, but the annotations have 3 classes: disc"):
        train(load(tmp_path, "data.num_classes=4"), tmp_path / "run")
    with pytest.raises(InputError, match=r"data\.train and data\.validation have different classes"):
        train(load(tmp_path, "data.validation.classes=[disc, cross]"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_best_metric_must_exist(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'mask/AP50'"):
        load(tmp_path, "evaluation.best_metric=mask/APP50")


def test_a_metric_needs_a_package_that_defines_it(tmp_path: Path) -> None:
    message = r"1 problem\n  evaluation\.metrics\[0\]\.kind: 'found' is not one of lvis"
    with pytest.raises(InputError, match=message):
        load(tmp_path, "evaluation.metrics=[{kind: found}]", "evaluation.best_metric=found/objects")


# Initial weights from another run.


def test_class_rows_are_loaded_by_class_name(run: Path, tmp_path: Path) -> None:
    config = load(
        tmp_path,
        "data.train.classes=[star, ring, disc, cross]",
        "data.validation.classes=[star, ring, disc, cross]",
        "training.schedule.iterations=1",
        "training.optimizer.lr=1.0e-9",
    )
    source = run / "checkpoints" / "last.pt"
    train(config, tmp_path / "run", init=source)
    log = (tmp_path / "run" / "train.log").read_text()
    table = [line.split() for line in log.partition("rows of the classes:\n")[2].splitlines()[:4]]
    assert table == [["star", "from", "the", "file"], ["disc", "from", "the", "file"],
                     ["cross", "from", "the", "file"], ["ring", "new"]]  # fmt: skip
    before, after = load_checkpoint(source), load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")
    source_rows, rows = before.model["mask_head.logits.weight"], after.model["mask_head.logits.weight"]
    torch.testing.assert_close(rows[[0, 2, 3]], source_rows[[2, 0, 1]])
    torch.testing.assert_close(after.model["rpn.head.conv.weight"], before.model["rpn.head.conv.weight"])
    assert after.iteration == 1


def test_weights_that_fit_in_part_are_listed(run: Path, tmp_path: Path) -> None:
    config = load(tmp_path, "training.schedule.iterations=1", "model.box_head.width=32")
    train(config, tmp_path / "run", init=run / "checkpoints" / "last.pt")
    log = (tmp_path / "run" / "train.log").read_text()
    assert "does not fit  box_head.trunk.1.weight: [16, 392] in the file, [32, 392] in the model" in log


def test_weights_of_which_nothing_fits_are_refused(run: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.pt"
    content = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    torch.save({**content, "model": {"stem.weight": torch.zeros(3)}}, foreign)
    with pytest.raises(InputError, match=r"foreign\.pt: only 0 of the \d+ values of the backbone fit the model"):
        train(load(tmp_path), tmp_path / "run", init=foreign)


def test_initial_weights_with_another_meaning_are_refused_with_the_remedy(run: Path, tmp_path: Path) -> None:
    config = load(tmp_path, "model.pixels.order=bgr", "model.box_head.bbox_reg_weights=[1.0, 1.0, 1.0, 1.0]")
    with pytest.raises(InputError, match=r"last\.pt: the configuration contradicts what the weights need:") as refusal:
        train(config, tmp_path / "run", init=run / "checkpoints" / "last.pt")
    message = str(refusal.value)
    assert 'model.pixels.order: "rgb" in the file, "bgr" here' in message
    assert "--set 'model.box_head.bbox_reg_weights=[10.0, 10.0, 5.0, 5.0]'" in message


@pytest.mark.parametrize(
    ("norms", "fits"),
    [(("frozen_bn", "bn"), True), (("bn", "gn"), False), (("gn", "gn"), True), (("none", "bn"), False)],
)
def test_batch_norms_may_be_frozen_or_not(norms: tuple[str, str], fits: bool) -> None:
    sections = [
        {"backbone": {"kind": "resnet", "norm": norm, "norm_eps": 1e-5 if norm != "gn" else 1e-3}} for norm in norms
    ]
    trained, model = map(MaskRCNNConfig.model_validate, sections)
    if fits:
        require_same_meaning(model, trained, "weights")
    else:
        with pytest.raises(InputError, match=f"--set 'model.backbone.norm=\"{norms[0]}\"'"):
            require_same_meaning(model, trained, "weights")


@pytest.mark.parametrize("kept", [0.4, 0.6])
def test_initial_weights_need_half_of_the_backbone(run: Path, tmp_path: Path, kept: float) -> None:
    """Although all heads fit."""
    checkpoint = load_checkpoint(run / "checkpoints" / "last.pt")
    backbone = {name: tensor.numel() for name, tensor in checkpoint.model.items() if name.startswith("backbone.")}
    left = sum(backbone.values())
    for name, size in sorted(backbone.items(), key=lambda item: -item[1]):
        if left - size >= kept * sum(backbone.values()):
            left -= size
            del checkpoint.model[name]
    save_checkpoint(tmp_path / "part.pt", checkpoint)
    config = load(tmp_path).model
    model = config.build(3)
    if kept < 0.5:
        with pytest.raises(InputError, match=rf"part\.pt: only {left} of the {sum(backbone.values())} values"):
            initialize(model, config, tmp_path / "part.pt", checkpoint.classes)
    else:
        initialize(model, config, tmp_path / "part.pt", checkpoint.classes)


# Evaluation and prediction.


def test_evaluating_a_checkpoint_gives_the_metrics_of_its_run(run: Path, tmp_path: Path) -> None:
    evaluation = evaluate_checkpoint(load(tmp_path), run / "checkpoints" / "last.pt", tmp_path / "out", CPU)
    stored = json.loads((run / "evaluation" / "metrics.json").read_text())
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == stored == evaluation.to_dict()
    assert (tmp_path / "out" / "results.json").read_text() == (run / "evaluation" / "results.json").read_text()
    assert (tmp_path / "out" / "predictions" / "overview.png").is_file()


@pytest.mark.parametrize(
    ("override", "change"),
    [
        ("model.box_head.width=32", "model.box_head.width: 16 -> 32"),
        ("model.roi={kind: roi_pool}", "model.roi.kind: roi_align -> roi_pool"),
        ("model.rpn.anchor_sizes=[[9], [16], [32], [48], [64]]", "model.rpn.anchor_sizes: "),
        ("model.pixels.order=bgr", "model.pixels.order: rgb -> bgr"),
    ],
)
def test_weights_of_another_model_are_refused(run: Path, tmp_path: Path, override: str, change: str) -> None:
    last, message = run / "checkpoints" / "last.pt", rf"last\.pt: the configuration has another model .*\n  {change}"
    with pytest.raises(InputError, match=message) as refusal:
        load_predictor(load(tmp_path, override), last, CPU)
    assert f"or add --set '{override.partition('=')[0]}" in str(refusal.value)
    with pytest.raises(InputError, match=message):
        load_weights(last, overrides=[override])


def test_a_key_of_inference_may_differ_from_the_training(run: Path, tmp_path: Path) -> None:
    overrides = ["model.detection.nms_threshold=0.3", "model.rpn.inference.post_nms_top_n=5", "training.workers=3",
                 "model.mask_head.paste=torchvision", "model.backbone.weights=other.pth"]  # fmt: skip
    load_predictor(load(tmp_path, *overrides), run / "checkpoints" / "last.pt", CPU)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(run: Path, tmp_path: Path, value: float) -> None:
    checkpoint = load_checkpoint(run / "checkpoints" / "last.pt")
    checkpoint.model["mask_head.logits.bias"][0] = value
    save_checkpoint(tmp_path / "broken.pt", checkpoint)
    with pytest.raises(
        InputError, match=r"broken\.pt: these parameters .* NaN or infinite:\n  mask_head\.logits\.bias$"
    ):
        load_weights(tmp_path / "broken.pt")


def test_a_dataset_of_other_classes_is_refused(run: Path, tmp_path: Path) -> None:
    config = load(tmp_path, "data.validation.classes=[disc, ring, star]")
    with pytest.raises(InputError, match=r"last\.pt and data\.validation have different classes"):
        evaluate_checkpoint(config, run / "checkpoints" / "last.pt", tmp_path / "out", CPU)


class Renumbered:
    """A dataset with other category ids than the training set."""

    def __init__(self) -> None:
        self.dataset = ShapesConfig(length=2, height=64, width=64, classes=("disc", "cross", "star")).build()
        self.classes = ClassTable(self.dataset.classes.names, (70, 80, 90))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dataset, name)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def ground_truth(self) -> dict[str, Any]:
        data = self.dataset.ground_truth()
        ids = dict(zip(self.dataset.classes.category_ids, self.classes.category_ids, strict=True))
        categories = [{**category, "id": ids[category["id"]]} for category in data["categories"]]
        annotations = [{**entry, "category_id": ids[entry["category_id"]]} for entry in data["annotations"]]
        return {**data, "categories": categories, "annotations": annotations}


def test_results_have_the_category_ids_of_the_annotations(run: Path, tmp_path: Path) -> None:
    """Only the class names must be the same as in the training set, not the category ids."""
    predictor = load_predictor(load(tmp_path), run / "checkpoints" / "last.pt", CPU)
    Evaluator(Renumbered())(predictor, tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results
    assert {result["category_id"] for result in results} <= {70, 80, 90}


@pytest.fixture(scope="module")
def predictor(run: Path) -> Predictor:
    return load_predictor(load(run.parent), run / "checkpoints" / "last.pt", CPU)


def picture(path: Path, width: int, height: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_predicting_images_of_any_size(predictor: Predictor, tmp_path: Path) -> None:
    files = [picture(tmp_path / "in" / "b.jpg", 100, 50), picture(tmp_path / "in" / "a.PNG", 33, 70)]
    (tmp_path / "in" / "notes.txt").write_text("no image")
    results = json.loads(
        predict_images(predictor, [tmp_path / "in"], tmp_path / "out", PredictionOptions(min_score=0.0)).read_text()
    )
    written = {path.name for path in (tmp_path / "out").iterdir()} - {LOCK, MARKER}
    assert written == {"a.png", "b.png", "results.json"}
    width, height = Image.open(tmp_path / "out" / "b.png").size
    assert width == 2 * height  # small images are drawn larger
    assert {(result["image_id"], result["file_name"]) for result in results} == {(1, str(files[1])), (2, str(files[0]))}
    for result in results:
        width, height = {1: (33, 70), 2: (100, 50)}[result["image_id"]]
        x, y, box_width, box_height = result["bbox"]
        assert 0 <= x <= x + box_width <= width + 1e-3
        assert 0 <= y <= y + box_height <= height + 1e-3
        assert result["segmentation"]["size"] == [height, width]


def test_detections_below_the_score_are_left_out(predictor: Predictor, tmp_path: Path) -> None:
    path = picture(tmp_path / "a.png", 64, 64)
    assert (
        json.loads(predict_images(predictor, [path], tmp_path / "out", PredictionOptions(min_score=1.0)).read_text())
        == []
    )


def test_images_of_one_name_do_not_replace_each_other(predictor: Predictor, tmp_path: Path) -> None:
    same_name = [picture(tmp_path / "x" / "a.png", 64, 64), picture(tmp_path / "y" / "a.jpg", 64, 64)]
    predict_images(
        predictor,
        [*same_name, picture(tmp_path / "y" / "b.png", 64, 64)],
        tmp_path / "out",
        PredictionOptions(min_score=0.5),
    )
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"a_1.png", "a_2.png", "b.png"}


def test_a_broken_image_is_skipped_and_reported(
    predictor: Predictor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = [picture(tmp_path / "in" / f"{name}.png", 64, 64) for name in "abc"]
    files[1].write_bytes(files[1].read_bytes()[:100])
    (tmp_path / "in" / "loop.png").symlink_to(tmp_path / "in" / "loop.png")
    with pytest.raises(ImagesSkipped, match="2 of 4 images were skipped"):
        predict_images(predictor, [tmp_path / "in"], tmp_path / "out", PredictionOptions(min_score=0.0))
    assert [message.split(": ")[1] for message in caplog.messages if message.startswith("skipped: ")] == [
        str(files[1]), str(tmp_path / "in" / "loop.png"),
    ]  # fmt: skip
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {(result["image_id"], result["file_name"]) for result in results} == {(1, str(files[0])), (3, str(files[2]))}
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"a.png", "c.png"}


def test_the_users_images_are_not_overwritten(predictor: Predictor, tmp_path: Path) -> None:
    path = picture(tmp_path / "in" / "a.png", 64, 64)
    before = path.read_bytes()
    with pytest.raises(InputError, match="the pictures would replace the images"):
        predict_images(predictor, [path], tmp_path / "in", PredictionOptions(min_score=0.5))
    assert path.read_bytes() == before


def test_there_must_be_images(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.jpg").write_text("no image")
    for wrong, message in (
        ("absent.jpg", "no such image or folder"),
        ("empty", "no image in"),
        ("text.jpg", "cannot be"),
    ):
        with pytest.raises(InputError, match=message) as refusal:
            predict_images(predictor, [tmp_path / wrong], tmp_path / "out", PredictionOptions(min_score=0.5))
        assert wrong in str(refusal.value)


def test_detections_do_not_depend_on_the_batch_size(predictor: Predictor, tmp_path: Path) -> None:
    dataset = load(tmp_path).data.build_validation()
    for batch_size in (1, 3):
        Evaluator(dataset, batch_size=batch_size)(predictor, tmp_path / str(batch_size))
    one, three = (json.loads((tmp_path / str(n) / "results.json").read_text()) for n in (1, 3))
    assert [result["image_id"] for result in one] == [result["image_id"] for result in three]
    for single, batched_result in zip(one, three, strict=True):
        assert single["score"] == pytest.approx(batched_result["score"], abs=1e-4)
        assert single["bbox"] == pytest.approx(batched_result["bbox"], abs=1e-2)


def test_a_checkpoint_is_enough(predictor: Predictor, run: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    instances = predictor(image)
    same = load_weights(run / "checkpoints" / "last.pt")(image)
    assert len(same) > 0
    assert same.class_names == instances.class_names
    assert torch.equal(same.boxes, instances.boxes)
    assert torch.equal(same.masks, instances.masks)
    fewer = load_weights(str(run / "checkpoints" / "last.pt"), overrides=["model.detection.detections_per_image=2"])
    assert torch.equal(fewer(image).boxes, instances.boxes[:2])


def test_a_wrong_override_of_a_checkpoint_is_refused(run: Path) -> None:
    with pytest.raises(InputError, match=r"last\.pt: 1 problem\n  model\.detection\.detections: unknown key"):
        load_weights(run / "checkpoints" / "last.pt", overrides=["model.detection.detections=2"])


def test_kernels_for_a_gpu_are_refused_on_a_cpu(run: Path, tmp_path: Path) -> None:
    message = (
        r"^model\.kernels is triton, which needs a GPU of CUDA, but the device is cpu; set model\.kernels to auto$"
    )
    asked_for = load(tmp_path, "model.kernels=triton")
    with pytest.raises(InputError, match=message):
        train(asked_for, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match=message):
        load_predictor(asked_for, run / "checkpoints" / "last.pt", CPU)
    with pytest.raises(InputError, match=message):
        load_weights(run / "checkpoints" / "last.pt", device="cpu", overrides=["model.kernels=triton"])


def test_weights_that_were_trained_with_kernels_for_a_gpu_run_on_a_cpu(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    trained["config"]["model"]["kernels"] = "triton"
    torch.save(trained, tmp_path / "last.pt")
    with caplog.at_level("INFO", logger="maskrcnn"):
        predictor = load_weights(tmp_path / "last.pt", device="cpu")
    assert f"{tmp_path / 'last.pt'}: model.kernels is triton, which needs a GPU" in caplog.text
    assert predictor.model.box_pooler.pooling is None


def test_a_model_without_a_mask_head(tmp_path: Path) -> None:
    """It trains, resumes, evaluates and predicts boxes."""
    changes = ("model.mask_head=null", "evaluation.best_metric=box/AP")
    train(load(tmp_path, *changes), tmp_path / "run")
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert all(record["losses"]["loss_mask"] == 0 for record in records if record["kind"] == "train")
    stored = json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())
    assert "box/AP" in stored
    assert "mask/AP" not in stored
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    evaluation = evaluate_checkpoint(load(tmp_path, *changes), last, tmp_path / "out", CPU)
    assert evaluation.mask is None
    instances = load_weights(last)(np.zeros((48, 64, 3), np.uint8))
    assert not instances.has_masks
    assert instances.draw(min_score=0).size == (5 * 64, 5 * 48)
    assert all("segmentation" not in result for result in instances.to_coco(1))
    with pytest.raises(ValueError, match="no mask head"):
        _ = instances.masks
    with pytest.raises(InputError, match=r"best_metric is mask/AP, but model\.mask_head is null: use box/AP"):
        load(tmp_path, "model.mask_head=null")


# Devices.


def test_devices() -> None:
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type in ("cpu", "cuda")
    with pytest.raises(InputError, match="--device abacus"):
        choose_device("abacus")


@pytest.mark.parametrize("name", ["mps", "mps:0", "xpu", "meta", "hpu", "mtia", "privateuseone"])
def test_devices_that_torch_knows_but_the_model_does_not_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=f"--device {name}: only cpu and cuda are supported"):
        choose_device(name)


def test_a_missing_gpu_is_refused() -> None:
    with pytest.raises(InputError, match="--device cuda:99: torch sees"):
        choose_device("cuda:99")
