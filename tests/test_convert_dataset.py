"""The command `maskrcnn convert-dataset`: its files, messages and exit status."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from label_files import label_image, write_scenes
from PIL import Image

from maskrcnn.cli import main
from maskrcnn.data.coco import CocoConfig

pytestmark = pytest.mark.usefixtures("logging_restored")


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    (tmp_path / "labels").mkdir()
    for scene in write_scenes(tmp_path / "photos", 5):
        Image.fromarray(label_image(scene)).save(tmp_path / "labels" / scene.name)
    return tmp_path / "labels"


def run(monkeypatch: pytest.MonkeyPatch, labels: Path, *arguments: str) -> int:
    images = f"--images={labels.parent / 'photos'}"
    monkeypatch.setattr(
        sys, "argv", ["maskrcnn", "convert-dataset", str(labels), "--from", "masks", images, *arguments]
    )
    with pytest.raises(SystemExit) as exited:
        main()
    return int(exited.value.code or 0)


def test_a_file(labels: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (labels / "photo_4.png").unlink()
    out = labels.parent / "all.json"
    assert run(monkeypatch, labels, f"--out={out}", "--classes=shape") == 0
    data = json.loads(out.read_text())
    count = len(data["annotations"])
    printed = capsys.readouterr().out
    assert f"all.json: 4 images, {count} objects, 1 classes: shape\n" in printed
    assert "note: 1 photographs without a label image are left out: photo_4.png\n" in printed
    dataset = CocoConfig(root=labels.parent, annotations="all.json", images="photos").build()  # type: ignore[arg-type]
    masks = [mask for index in range(len(dataset)) for mask in dataset[index].masks]
    assert sum(int(mask.pixels.sum()) for mask in masks) == sum(entry["area"] for entry in data["annotations"])


def test_a_training_and_a_validation_file(
    labels: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = labels.parent / "new" / "folder"
    assert run(monkeypatch, labels, f"--out={out}", "--validation=0.4") == 0
    assert sorted(path.name for path in out.iterdir()) == ["train.json", "val.json"]
    assert len(json.loads((out / "val.json").read_text())["images"]) == 2
    advice = f"next: maskrcnn init-dataset --train {out / 'train.json'} --validation {out / 'val.json'} --images "
    assert advice in capsys.readouterr().out


def test_nothing_is_overwritten(
    labels: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = labels.parent / "out"
    out.mkdir()
    (out / "val.json").write_text("mine")
    (labels.parent / "mine.json").write_text("mine")
    assert run(monkeypatch, labels, f"--out={out}", "--validation=0.4") == 2
    assert run(monkeypatch, labels, f"--out={labels.parent / 'mine.json'}") == 2
    assert [path.name for path in out.iterdir()] == ["val.json"]
    errors = capsys.readouterr().err
    assert f"error: {out / 'val.json'}: exists already" in errors
    assert f"error: {labels.parent / 'mine.json'}: exists already" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out=x.json", "--validation=0.5"], "--validation writes two files: name a folder with --out"),
        (["--out=x", "--classes=a,a"], "argument --classes: expected names, each once"),
        (["--out=x", "--validation=2"], "argument --validation: expected a number from 0 to 1"),
        (["--out=x", "--from=voice"], "argument --from: invalid choice: 'voice'"),
    ],
)
def test_wrong_arguments(
    labels: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert run(monkeypatch, labels, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_broken_file_is_one_message(
    labels: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.zeros((60, 88, 3), np.uint8)).save(labels / "photo_2.png")
    assert run(monkeypatch, labels, f"--out={labels.parent / 'x.json'}") == 2
    assert not (labels.parent / "x.json").exists()
    errors = capsys.readouterr().err
    assert f"error: {labels / 'photo_2.png'}: its pixels are colours (mode RGB)" in errors
    assert "Traceback" not in errors
