"""Files of other frameworks in the commands and in `maskrcnn.load`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskrcnn.cli import main
from maskrcnn.config import read_config, to_dict
from maskrcnn.engine.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from maskrcnn.errors import InputError
from maskrcnn.experiment import ExperimentConfig, load
from maskrcnn.interop.files import read_weights
from maskrcnn.interop.layouts import TORCHVISION
from maskrcnn.structures import ClassTable
from maskrcnn.training_run import initialize

pytestmark = pytest.mark.usefixtures("logging_restored")

States = Callable[..., dict[str, torch.Tensor]]
Command = Callable[..., tuple[int, str]]

TINY = Path(__file__).parents[1] / "tiny_fpn.yaml"
SMALL = ["data.validation_transforms.resize.short_side=[64]", "model.detection.score_threshold=0.0"]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Returns a function that runs a command and returns its exit status and output."""

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["maskrcnn", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            main()
        output = capsys.readouterr()
        return int(exited.value.code or 0), output.out + output.err

    return run


@pytest.fixture
def foreign(tmp_path: Path, foreign_state: States) -> Path:
    """A file as torchvision's reference scripts write it."""
    path = tmp_path / "model_25.pth"
    torch.save({"model": foreign_state(TORCHVISION), "optimizer": {}, "epoch": 25}, path)
    return path


def test_a_foreign_file_is_enough_to_predict(foreign: Path, command: Command, tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "photo.png")
    instances = load(foreign, overrides=SMALL)(image)
    assert len(instances) > 0
    arguments = [word for override in SMALL for word in ("--set", override)]
    status, output = command(
        "predict", tmp_path / "photo.png", "--weights", foreign, "--out", tmp_path / "out", "--score", 0, *arguments
    )
    assert status == 0, output
    assert "torchvision Mask R-CNN" in output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [result["score"] for result in results] == pytest.approx(instances.scores.tolist(), abs=1e-5)


def test_a_converted_file_gives_the_same_and_needs_no_yaml(foreign: Path, command: Command, tmp_path: Path) -> None:
    out = tmp_path / "mine.pt"
    convert = ["convert-weights", foreign, "--out", out, "--classes", "disc,cross"]
    status, output = command(*convert, "--set", "data.validation={kind: shapes, length: 2, height: 64, width: 64, "
                             "classes: [disc, cross]}")  # fmt: skip
    assert status == 0, output
    assert "tensors loaded" in output
    assert "epsilon" not in output  # the norms are not frozen
    certificate = json.loads((tmp_path / "mine.certificate.json").read_text())
    assert len(certificate["renamed"]) == len(torch.load(foreign, weights_only=True)["model"])
    assert certificate["conventions"]["model"]["roi"]["aligned"] is False
    assert certificate["conventions"]["data"]["validation_transforms"][0]["rounding"] == "floor"
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    direct, converted = load(foreign, overrides=SMALL)(image), load(out, overrides=SMALL)(image)
    assert torch.equal(direct.boxes, converted.boxes)
    assert converted.class_names[0] in ("disc", "cross")

    status, output = command(*convert)
    assert (status, "mine.pt exists" in output) == (2, True)
    assert load_checkpoint(out).classes.names == ("disc", "cross")

    arguments = [word for override in SMALL for word in ("--set", override)]
    status, output = command("eval", "--weights", out, "--out", tmp_path / "eval", "--device", "cpu", *arguments,
                             "--set", "training.workers=0")  # fmt: skip
    assert status == 0, output
    assert "mask/AP" in json.loads((tmp_path / "eval" / "metrics.json").read_text())


@pytest.mark.parametrize(
    ("to", "name"), [("torchvision", "x.pth"), ("detectron2", "x.pth"), ("safetensors", "x.safetensors")]
)
def test_out_and_in_again(foreign: Path, command: Command, tmp_path: Path, to: str, name: str) -> None:
    first = tmp_path / "first.pt"
    assert command("convert-weights", foreign, "--out", first, "--classes", "disc,cross")[0] == 0
    status, output = command("convert-weights", first, "--to", to, "--out", tmp_path / name)
    assert status == 0, output
    assert ("model.roi.aligned: true -> false" in output) == (to == "detectron2")
    before, after = load_checkpoint(first), read_weights(tmp_path / name).checkpoint
    assert before.model.keys() == after.model.keys()
    assert all(torch.equal(tensor, after.model[key]) for key, tensor in before.model.items())
    if to == "safetensors":
        assert (after.classes, after.config) == (before.classes, before.config)
    image = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    if to != "detectron2":
        assert torch.equal(
            load(first, overrides=SMALL)(image).boxes, load(tmp_path / name, overrides=SMALL)(image).boxes
        )


def test_what_another_framework_lacks_is_refused(tiny_weights: States, command: Command, tmp_path: Path) -> None:
    config = read_config(TINY, ExperimentConfig, ["model.mask_head={kind: mlp, width: 8, pool_size: 7}"])
    state = config.model.build(2, pretrained=False).state_dict()
    checkpoint = Checkpoint(0, state, {}, {}, {}, {}, ClassTable(("disc", "cross"), (1, 2)), to_dict(config), {}, {})
    save_checkpoint(tmp_path / "mlp.pt", checkpoint)
    status, output = command("convert-weights", tmp_path / "mlp.pt", "--to", "torchvision", "--out", tmp_path / "x.pth")
    assert (status, "has no place for these tensors:\n  mask_head.hidden.0.weight" in output) == (2, True)
    status, output = command("convert-weights", tmp_path / "mlp.pt", "--to", "safetensors", "--out", tmp_path / "x.pth")
    assert (status, "has the suffix .safetensors" in output) == (2, True)


def test_a_classifier_starts_a_training(tiny_weights: States, tmp_path: Path) -> None:
    state = {
        name.removeprefix("backbone."): tensor
        for name, tensor in tiny_weights("model.backbone.norm=frozen_bn").items()
        if name.startswith("backbone.")
    }
    path = tmp_path / "resnet18.pth"
    torch.save({**state, "fc.weight": torch.zeros(10, 64), "fc.bias": torch.zeros(10)}, path)
    config = read_config(TINY, ExperimentConfig, ["model.backbone.norm=frozen_bn"]).model
    model = config.build(2, pretrained=False)
    initialize(model, config, path, ClassTable(("disc", "cross"), (1, 2)))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.backbone.state_dict().items())
    with pytest.raises(InputError, match=r"resnet18\.pth: it holds a backbone without heads; start a training from it"):
        load(path)
    bgr = config.model_copy(update={"pixels": config.pixels.model_copy(update={"order": "bgr"})})
    with pytest.raises(InputError, match=r"--set 'model\.pixels\.order=\"rgb\"'"):
        initialize(model, bgr, path, ClassTable(("disc", "cross"), (1, 2)))


def test_an_override_that_needs_other_tensors_is_refused(foreign: Path, command: Command, tmp_path: Path) -> None:
    status, output = command("convert-weights", foreign, "--out", tmp_path / "x.pt", "--set", "model.rpn.conv_depth=2")
    assert status == 2
    assert "rpn.head.more_convs.0.weight: not in the file" in output
    assert not (tmp_path / "x.pt").exists()


@pytest.mark.parametrize("names", ["disc", "disc,,cross", "disc,disc"])
def test_wrong_names_of_classes(foreign: Path, command: Command, tmp_path: Path, names: str) -> None:
    status, _ = command("convert-weights", foreign, "--out", tmp_path / "x.pt", "--classes", names)
    assert status == 2


def test_a_file_without_tensors_is_refused(command: Command, tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "x.pth")
    status, output = command("convert-weights", tmp_path / "x.pth", "--out", tmp_path / "x.pt")
    assert (status, "it holds no tensors (its keys are epoch)" in output) == (2, True)
