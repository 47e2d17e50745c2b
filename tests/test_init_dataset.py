"""The command `maskrcnn init-dataset`: its configuration, which trains, and its messages."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from label_files import CLASSES, outlines, write_scenes

from maskrcnn.cli import main
from maskrcnn.experiment import load_config

pytestmark = pytest.mark.usefixtures("logging_restored")

# A model that trains in a second; all that `init-dataset` wrote stays.
SMALL = (
    "model.backbone={kind: resnet, depth: 18, width: 8, norm: bn, freeze: 0, weights: none}",
    "model.neck.channels=8",
    "model.box_head.width=16",
    "model.mask_head={kind: fcn, depth: 1, width: 8}",
    "training.schedule.iterations=2",
    "training.schedule.steps=[1]",
    "training.workers=0",
    "evaluation.pictures=0",
)

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command in the temporary folder and returns its exit status and all that it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["maskrcnn", *arguments])
        with pytest.raises(SystemExit) as exited:
            main()
        printed = capsys.readouterr()
        return int(exited.value.code or 0), printed.out + printed.err

    return run


def write_coco(path: Path, images: Path, count: int, names: tuple[str, ...] = CLASSES) -> None:
    """Write scenes and their annotations; the last one of each has no object."""
    scenes = write_scenes(images, count)
    entries = [(image, *item) for image, scene in enumerate(scenes, start=1) for item in scene.objects]
    content = {
        "images": [
            {"id": number, "file_name": scene.name, "height": 60, "width": 88}
            for number, scene in enumerate(scenes, start=1)
        ],
        "annotations": [
            {
                "id": number, "image_id": image, "category_id": 1 + CLASSES.index(name), "area": float(mask.sum()),
                "bbox": [0.0, 0.0, 10.0, 10.0], "iscrowd": 0,
                "segmentation": [[value for point in ring for value in point] for ring in outlines(mask)],
            }
            for number, (image, name, mask) in enumerate(entries, start=1)
        ],
        "categories": [{"id": number, "name": name} for number, name in enumerate(names, start=1)],
    }  # fmt: skip
    path.write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "my data"
    write_coco_pair(folder)
    return folder


def write_coco_pair(folder: Path, names: tuple[str, ...] = CLASSES) -> None:
    (folder / "annotations").mkdir(parents=True)
    for split, count in (("train", 4), ("val", 2)):
        write_coco(folder / "annotations" / f"{split}.json", folder / f"{split}_images", count, names)


def test_the_configuration_trains(folder: Path, command: Command) -> None:
    status, printed = command("init-dataset", "my data", "--out", "mine.yaml")
    assert status == 0, printed
    assert "wrote mine.yaml; next: maskrcnn train mine.yaml --out runs/mine" in printed
    sets = [f"--set={key}" for key in SMALL]
    status, printed = command("train", "mine.yaml", "--out", "runs/mine", "--device=cpu", *sets)
    assert status == 0, printed
    assert Path("runs/mine/checkpoints/last.pt").exists()


def test_each_value_has_its_figure(folder: Path, command: Command) -> None:
    assert command("init-dataset", "my data", "--out", "mine.yaml")[0] == 0
    config = load_config("mine.yaml")
    assert config.data.num_classes == 3
    assert config.training.batch_size == 2
    assert config.training.schedule.iterations == 400  # type: ignore[attr-defined]
    text = Path("mine.yaml").read_text()
    assert "# the median short side of the images is 60 px; at 60 px, a tenth of the objects are below 10 px" in text
    assert "# 90 % of the objects are from 16 to 16 px at this size; these anchors reach 100.0 % of them" in text
    assert config.model.rpn.anchor_sizes == ((16,), (32,), (64,), (128,), (256,))
    assert "# objects: disc " in text
    assert "# no image has more than 5 objects\n  detection:\n    detections_per_image: 100" in text
    assert "# 4 images: 400 steps of 2 are 200 epochs" in text


def test_files_by_name_and_swapped_classes(tmp_path: Path, command: Command) -> None:
    names = ("left hand", "right hand", "a\u2028imports: [evil]")
    write_coco(tmp_path / "a.json", tmp_path / "photos", 3, names)
    shutil.copy(tmp_path / "a.json", tmp_path / "b.json")
    files = ["--train", "a.json", "--validation", "b.json"]
    status, printed = command("init-dataset", *files, "--images", "photos", "--out", "new/c.yaml")
    assert status == 0, printed
    config = load_config("new/c.yaml", [f"data.root={tmp_path}"])
    assert config.imports == ()
    assert config.data.train_transforms[0].swap == (("left hand", "right hand"),)  # type: ignore[attr-defined]
    assert len(config.data.build_train()) == 3


def test_nothing_is_overwritten(folder: Path, command: Command) -> None:
    Path("mine.yaml").write_text("mine")
    status, printed = command("init-dataset", "my data", "--out", "mine.yaml")
    assert status == 2
    assert "error: mine.yaml: exists already; name another file with --out" in printed
    assert Path("mine.yaml").read_text() == "mine"


def test_degenerate_objects_are_dropped_and_said(folder: Path, command: Command) -> None:
    path = folder / "annotations" / "train.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["bbox"] = [3, 3, 0, 0]
    path.write_text(json.dumps(content))
    assert command("init-dataset", "my data", "--out", "mine.yaml")[0] == 0
    assert "# degenerate: 1 (ids 1) have a box without area" in Path("mine.yaml").read_text()
    assert load_config("mine.yaml").data.train.degenerate == "drop"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--out=x.yaml"], "error: nowhere: no such folder"),
        (["my data", "--out=x.json"], "error: --out x.json: the name of a configuration ends in .yaml"),
        (["--out=x.yaml"], "error: name either FOLDER, or both files"),
        (["my data", "--train=x.json", "--out=x.yaml"], "error: name either FOLDER, or both files"),
        (["my data/annotations", "--out=x.yaml"], "train.json: its image 'photo_0.png' is in none of my data/annotat"),
        (["my data", "--images=.", "--out=x.yaml"], "train.json: its image 'photo_0.png' is in none of .; --images"),
        (["other", "--out=x.yaml"], "with 'val' in its path; the files are: none. Name them with --train"),
    ],
)
def test_wrong_arguments(folder: Path, command: Command, arguments: list[str], message: str) -> None:
    (folder.parent / "other").mkdir()
    status, printed = command("init-dataset", *arguments)
    assert status == 2
    assert message in printed
    assert not Path("x.yaml").exists()


def test_classes_that_differ(folder: Path, command: Command) -> None:
    path = folder / "annotations" / "val.json"
    content = json.loads(path.read_text())
    content["categories"][0]["name"] = "disk"
    path.write_text(json.dumps(content))
    status, printed = command("init-dataset", "my data", "--out", "x.yaml")
    assert status == 2
    assert "have different classes" in printed
