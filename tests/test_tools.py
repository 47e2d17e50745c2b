"""The command-line tools: normal use, and the error for every kind of wrong input."""

from __future__ import annotations

import errno
import json
import logging
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launcher import TIMEOUT, Ended, Launcher
from PIL import Image

from maskrcnn.runtime import outputs
from maskrcnn.runtime.outputs import LOCK, MARKER, locked

REPOSITORY = Path(__file__).parents[1]
TOOLS = sorted((REPOSITORY / "tools").glob("*.py"))

EXPERIMENT = f"""
base: {REPOSITORY / "tests" / "tiny_fpn.yaml"}
model:
  backbone: {{norm: frozen_bn, freeze: 5}}
data:
  root: DATA
  train: {{kind: coco, annotations: objects.json, images: images}}
  validation: {{kind: coco, annotations: objects.json, images: images}}
  train_transforms: {{resize: {{short_side: [48]}}}}
  validation_transforms: {{resize: {{short_side: [48]}}}}
"""


Run = Callable[..., Ended]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Return a function that runs a tool in this process, like `python tools/NAME.py ARGUMENTS`."""
    root, package = logging.getLogger(), logging.getLogger("maskrcnn")
    before = root.handlers[:], root.level, package.level

    def run(name: str, *arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", [f"tools/{name}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            runpy.run_path(str(REPOSITORY / "tools" / f"{name}.py"), run_name="__main__")
        assert isinstance(exited.value.code, int)
        return Ended(exited.value.code, *capsys.readouterr())

    yield run
    for handler in set(root.handlers) - set(before[0]):
        handler.close()
    root.handlers = before[0]
    root.setLevel(before[1])
    package.setLevel(before[2])


class Dataset:
    """A COCO dataset of four images with one rectangle each, and an experiment on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "images").mkdir(parents=True)
        rng = np.random.default_rng(0)
        for key in range(1, 5):
            Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(self.image(key))
        self.data: dict[str, Any] = {
            "images": [{"id": key, "file_name": f"{key}.png", "height": 48, "width": 64} for key in range(1, 5)],
            "annotations": [self.rectangle(key) for key in range(1, 5)],
            "categories": [{"id": 3, "name": "cat"}, {"id": 90, "name": "dog"}],
        }
        self.write()
        self.config = folder / "experiment.yaml"
        self.config.write_text(EXPERIMENT.replace("DATA", str(folder)))

    def image(self, key: int) -> Path:
        return self.folder / "images" / f"{key}.png"

    @staticmethod
    def rectangle(key: int) -> dict[str, Any]:
        polygon = [10, 10, 40, 10, 40, 30, 10, 30]
        category = 3 if key % 2 else 90
        return {
            "id": key,
            "image_id": key,
            "category_id": category,
            "bbox": [10, 10, 30, 20],
            "segmentation": [polygon],
        }

    def write(self) -> None:
        (self.folder / "objects.json").write_text(json.dumps(self.data))


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(tmp_path / "data")


@pytest.fixture(scope="module")
def weights(launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the model and the classes above, trained by the command line in a separate process."""
    folder = tmp_path_factory.mktemp("tools")
    config = Dataset(folder / "data").config
    done = launcher.run("tools/train.py", config, "--out", folder / "run", "--device", "cpu")
    assert done.status == 0, done.err
    return folder / "run" / "checkpoints" / "last.pt"


def python(*arguments: str) -> Ended:
    """Run `python *arguments` without anything that is imported already."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=TIMEOUT)
    return Ended(done.returncode, done.stdout, done.stderr)


def assert_refused(outcome: Ended, *words: str) -> None:
    """Check for status 2 and a single error message with all `words`. Log lines may come before it."""
    assert outcome.status == 2, outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.err.count("error: ") == 1
    message = outcome.err.partition("error: ")[2]
    for word in words:
        assert word in message


# Help.


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_help_needs_no_torch(path: Path) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{str(path)!r}, '--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as exited: assert not exited.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = python("-c", code)
    assert done.status == 0, done.err
    assert done.out.startswith("usage: ")


def test_the_maskrcnn_command_lists_its_commands_without_torch() -> None:
    code = (
        "import sys; from maskrcnn.cli import main; sys.argv = ['maskrcnn', '--help']\n"
        "try: main()\n"
        "except SystemExit as exited: assert not exited.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = python("-c", code)
    assert done.status == 0, done.err
    listed = {line.split()[0] for line in done.out.splitlines() if line.startswith("    ")}
    assert {path.stem.replace("_", "-") for path in TOOLS} - {"benchmark"} <= listed


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--version"], 0, "maskrcnn "),
        (["--print-completion", "bash"], 0, "_shtab_maskrcnn"),
        (["show-config", "configs/shapes/mask_rcnn_r18_fpn.yaml"], 0, "kind: resnet"),
        (["show-config", "absent.yaml"], 2, "error: absent.yaml"),
        (["tarin"], 2, "'tarin'"),
    ],
)
def test_the_maskrcnn_command(launcher: Launcher, arguments: list[str], status: int, words: str) -> None:
    done = launcher.run("-m", "maskrcnn", *arguments)
    assert done.status == status
    assert words in done.out + done.err
    assert "Traceback" not in done.err


# Normal use.


def test_training_writes_a_run_directory(weights: Path) -> None:
    run = weights.parent.parent
    assert {path.name for path in run.iterdir()} - {LOCK, MARKER} == {
        "config.yaml", "environment.txt", "train.log", "metrics.jsonl", "tensorboard", "checkpoints", "evaluation",
        "predictions",
    }  # fmt: skip
    assert "train.py" in (run / "environment.txt").read_text()


def test_a_run_continues_only_with_resume(tool: Run, dataset: Dataset, tmp_path: Path) -> None:
    train = ["train", dataset.config, "--out", tmp_path / "run", "--set", "training.schedule.iterations=1"]
    assert tool(*train).status == 0
    assert_refused(tool(*train), str(tmp_path / "run"), "--resume")
    outcome = tool(*train, "--resume")
    assert outcome.status == 0
    assert "resuming after iteration 1" in outcome.err
    assert_refused(tool(*train, "--set", "training.batch_size=1", "--resume"), "training.batch_size: 2 -> 1 (")
    outcome = tool(*train[:-1], "training.schedule.iterations=2", "--resume")
    assert outcome.status == 0
    assert "training.schedule.iterations: 1 -> 2 (the learning rate follows" in outcome.err
    assert "training.schedule.iterations: 1 -> 2" in (tmp_path / "run" / "train.log").read_text()


def test_a_run_of_a_living_process_is_left_alone(
    tool: Run, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "WAIT", 0)
    run = tmp_path / "run"
    train = ["train", dataset.config, "--out", run, "--set", "training.schedule.iterations=1"]
    with locked(run):
        assert_refused(tool(*train), f"{run}: another process is writing there")
        assert [path.name for path in run.iterdir()] == [LOCK]
    assert tool(*train).status == 0
    with locked(run):
        assert_refused(tool(*train, "--resume"), f"{run}: another process is writing there")


def test_the_run_directory_has_the_name_of_the_config(
    tool: Run, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tool("train", dataset.config, "--set", "training.schedule.iterations=1").status == 0
    assert (tmp_path / "runs" / "experiment" / "checkpoints" / "last.pt").is_file()


def test_weights_of_other_classes_start_a_run(tool: Run, dataset: Dataset, weights: Path, tmp_path: Path) -> None:
    dataset.data["categories"].append({"id": 91, "name": "owl"})
    dataset.write()
    outcome = tool("train", dataset.config, "--out", tmp_path / "run", "--init", weights)
    assert outcome.status == 0
    rows = [line.split()[0] for line in outcome.err.splitlines() if line.endswith((" from the file", " new"))]
    assert rows == ["cat", "dog", "owl"]


def test_evaluating_a_checkpoint(tool: Run, dataset: Dataset, weights: Path, tmp_path: Path) -> None:
    outcome = tool("eval", dataset.config, "--weights", weights, "--out", tmp_path / "out")
    assert outcome.status == 0
    assert "AP50" in outcome.err
    stored = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert stored["classes"].keys() == {"cat", "dog"}
    written = {path.name for path in (tmp_path / "out").iterdir()} - {LOCK, MARKER}
    assert written == {"metrics.json", "results.json", "predictions"}

    again = tool("eval", "--annotations", dataset.folder / "objects.json",
                 "--predictions", tmp_path / "out" / "results.json", "--out", tmp_path / "files")  # fmt: skip
    assert again.status == 0
    assert json.loads((tmp_path / "files" / "metrics.json").read_text()) == stored


EXPECTED = {
    "segm": (0.319545, 0.562288, 0.298927, 0.387374, 0.310183, 0.326934, 0.268230, 0.415449, 0.416839),
    "bbox": (0.504581, 0.696973, 0.572982, 0.585626, 0.519400, 0.501398, 0.386813, 0.593680, 0.595353),
}
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100")


@pytest.mark.parametrize("backend", ["faster", "pycocotools"])
@pytest.mark.parametrize("kind", ["segm", "bbox"])
def test_the_metrics_of_cocoapi(tool: Run, shared_data: Path, tmp_path: Path, kind: str, backend: str) -> None:
    folder = shared_data / "cocoapi_fixture"
    outcome = tool(
        "eval",
        *("--annotations", folder / "instances_val2014_100.json"),
        *("--predictions", folder / f"instances_val2014_fake{kind}100_results.json"),
        *("--backend", backend, "--out", tmp_path),
    )
    assert outcome.status == 0
    stored = json.loads((tmp_path / "metrics.json").read_text())
    prefix = {"segm": "mask", "bbox": "box"}[kind]
    metrics = [stored[f"{prefix}/{metric}"] for metric in METRICS]
    assert metrics == pytest.approx(EXPECTED[kind], abs=1e-6)


def test_predicting_on_photographs(tool: Run, shared_data: Path, weights: Path, tmp_path: Path) -> None:
    photographs = sorted((shared_data / "coco_subset" / "val2017").glob("*.jpg"))[:2]
    outcome = tool(
        "predict",
        photographs[0],
        photographs[1],
        "--weights",
        weights,
        "--out",
        tmp_path,
        "--score",
        0,
    )
    assert outcome.status == 0
    assert {path.name for path in tmp_path.glob("*.png")} == {f"{path.stem}.png" for path in photographs}
    results = json.loads((tmp_path / "results.json").read_text())
    assert {result["image_id"] for result in results} == {1, 2}
    assert {result["category_id"] for result in results} <= {3, 90}
    for result in results:
        with Image.open(result["file_name"]) as image:
            assert result["segmentation"]["size"] == [image.height, image.width]


def test_the_options_of_a_prediction(tool: Run, dataset: Dataset, weights: Path, tmp_path: Path) -> None:
    predict = ["predict", dataset.image(1), "--weights", weights, "--out", tmp_path / "out"]
    tiled = ("--tile", 40, "--overlap", 8, "--nms", "mask", "--format", "yolo", "png", "--classes", "cat", "--score", 0)
    assert tool(*predict, *tiled, "--no-pictures").status == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {result["category_id"] for result in results} <= {3}
    assert all(result["segmentation"]["size"] == [48, 64] for result in results)
    assert (tmp_path / "out" / "classes.txt").read_text() == "cat\ndog\n"
    assert len((tmp_path / "out" / "labels" / "1.txt").read_text().splitlines()) <= len(results)
    assert not list((tmp_path / "out").glob("*.png"))
    assert_refused(tool(*predict, "--classes", "cta"), "--classes 'cta' is not one of cat, dog; did you mean 'cat'?")
    assert_refused(tool(*predict, "--overlap", 8), "--overlap needs --tile")
    assert_refused(tool(*predict, "--tile", 40, "--overlap", 40), "--overlap 40: it must be less")


def test_showing_a_configuration(tool: Run, dataset: Dataset) -> None:
    outcome = tool("show_config", dataset.config, "--set", "model.roi.kind=roi_pool")
    assert outcome.status == 0
    assert "roi:\n    kind: roi_pool" in outcome.out
    assert json.loads(tool("show_config", "--schema").out)["properties"].keys() >= {"base", "model", "data"}


# Arguments.


@pytest.mark.parametrize(
    "arguments",
    [
        ["train"],
        ["train", "a.yaml", "--resume", "--init", "b.pt"],
        ["eval", "a.yaml"],
        ["eval", "--annotations", "a.json"],
        ["eval", "a.yaml", "--weights", "b.pt", "--annotations", "a.json", "--predictions", "c.json"],
        ["predict", "b.jpg", "--out", "c"],
        ["show_config"],
        ["show_config", "a.yaml", "--schema"],
    ],
    ids=" ".join,
)
def test_wrong_arguments(tool: Run, arguments: list[str]) -> None:
    outcome = tool(*arguments)
    assert outcome.status == 2
    assert "error: " in outcome.err
    assert "Traceback" not in outcome.err


def test_a_missing_device_is_refused(tool: Run, dataset: Dataset, tmp_path: Path) -> None:
    assert_refused(tool("train", dataset.config, "--out", tmp_path / "run", "--device", "abacus"), "--device abacus")
    assert not (tmp_path / "run").exists()


# Configurations.


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.rpn.batch_size_per_imgae=8", ["model.rpn.batch_size_per_imgae", "did you mean 'batch_size_per_image'"]),
        ("model.roi.kind=roi_aling", ["model.roi.kind", "did you mean 'roi_align'"]),
        ("modle={}", ["modle", "did you mean 'model'"]),
        ("training.batch_size=two", ["training.batch_size", "expected an int", "'two'"]),
        ("training.workers=-1", ["training.workers"]),
        ("training.workers", ["--set training.workers: expected KEY=VALUE"]),
        ("model.rpn.anchor_sizes=[[8]]", ["anchor_sizes has 1 levels", "returns 5 maps"]),
        ("model.backbone.weights=absent.pth", ["absent.pth"]),
    ],
)
def test_wrong_keys(tool: Run, dataset: Dataset, tmp_path: Path, override: str, words: list[str]) -> None:
    outcome = tool("train", dataset.config, "--out", tmp_path / "run", "--set", override)
    assert_refused(outcome, *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("training: {seed: 1, seed: 2}\n", ["'seed' is given twice"]),
        ("base: absent.yaml\n", ["absent.yaml"]),
        ("training: [\n", ["not valid YAML"]),
        ("- 1\n", ["expected a mapping"]),
        ("{}\n", ["data", "missing"]),
    ],
)
def test_wrong_yaml(tool: Run, tmp_path: Path, text: str, words: list[str]) -> None:
    (tmp_path / "wrong.yaml").write_text(text)
    for name in ("train", "show_config"):
        assert_refused(tool(name, tmp_path / "wrong.yaml"), "wrong.yaml", *words)


def test_no_configuration(tool: Run, tmp_path: Path) -> None:
    assert_refused(tool("train", tmp_path / "absent.yaml"), "absent.yaml")
    assert_refused(tool("train", tmp_path), str(tmp_path))


def test_all_problems_come_at_once(tool: Run, dataset: Dataset) -> None:
    outcome = tool("train", dataset.config, "--set", "training.sed=1", "--set", "model.roi.kind=roi_pol")
    assert_refused(outcome, "2 problems", "training.sed", "model.roi.kind")


# Datasets.


def without_area(data: dict[str, Any]) -> None:
    data["annotations"][0]["bbox"] = [10, 10, 0, 20]


def short_polygon(data: dict[str, Any]) -> None:
    data["annotations"][1]["segmentation"] = [[1, 1, 5, 5]]


def unknown_image(data: dict[str, Any]) -> None:
    data["annotations"][2]["image_id"] = 77


def unknown_category(data: dict[str, Any]) -> None:
    data["annotations"][2]["category_id"] = 78


def outside_folder(data: dict[str, Any]) -> None:
    data["images"][0]["file_name"] = "../../secret.png"


def absolute(data: dict[str, Any]) -> None:
    data["images"][3]["file_name"] = "/etc/passwd"


def no_categories(data: dict[str, Any]) -> None:
    del data["categories"]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (unknown_image, ["annotation 3", "no image has the id 77"]),
        (unknown_category, ["annotation 3", "no category has the id 78"]),
        (outside_folder, ["image 1", "../../secret.png", "points outside"]),
        (absolute, ["image 4", "/etc/passwd", "points outside"]),
        (no_categories, ["categories"]),
    ],
)
def test_wrong_annotations(
    tool: Run, dataset: Dataset, tmp_path: Path, spoil: Callable[[dict[str, Any]], None], words: list[str]
) -> None:
    spoil(dataset.data)
    dataset.write()
    assert_refused(tool("train", dataset.config, "--out", tmp_path / "run"), "objects.json", *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without_area, ["annotation 1 (image 1)", "no area"]),
        (short_polygon, ["annotation 2 (image 2)", "fewer than three points"]),
    ],
)
def test_degenerate_objects_are_refused_if_the_config_says_so(
    tool: Run, dataset: Dataset, tmp_path: Path, spoil: Callable[[dict[str, Any]], None], words: list[str]
) -> None:
    spoil(dataset.data)
    dataset.write()
    command = ("train", dataset.config, "--set", "data.train.degenerate=refuse", "--out", tmp_path / "run")
    assert_refused(tool(*command), "objects.json", *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": 1}', "null"])
def test_json_that_is_not_coco(tool: Run, dataset: Dataset, weights: Path, tmp_path: Path, text: str) -> None:
    (dataset.folder / "objects.json").write_text(text)
    assert_refused(tool("train", dataset.config, "--out", tmp_path / "run"), "objects.json")
    assert_refused(tool("eval", dataset.config, "--weights", weights, "--out", tmp_path / "out"), "objects.json")


def test_no_annotations(tool: Run, dataset: Dataset, tmp_path: Path) -> None:
    (dataset.folder / "objects.json").unlink()
    train = tool("train", dataset.config, "--out", tmp_path / "run")
    assert_refused(train, str(dataset.folder / "objects.json"), "datasets/README.md")
    results = tmp_path / "results.json"
    results.write_text("[]")
    from_files = tool("eval", "--annotations", dataset.folder / "objects.json", "--predictions", results)
    assert_refused(from_files, str(dataset.folder / "objects.json"))


def test_no_images(tool: Run, dataset: Dataset, tmp_path: Path) -> None:
    (dataset.folder / "images").rename(dataset.folder / "pictures")
    outcome = tool("train", dataset.config, "--out", tmp_path / "run")
    assert_refused(outcome, str(dataset.folder / "images"), "datasets/README.md")


def test_a_missing_image_is_found_before_anything_is_written(tool: Run, dataset: Dataset, tmp_path: Path) -> None:
    dataset.image(3).unlink()
    outcome = tool("train", dataset.config, "--out", tmp_path / "run")
    assert_refused(outcome, f"{dataset.folder / 'images'}: 1 of ", " images are missing: 3.png.")
    assert not (tmp_path / "run").exists()


def spoil_bytes(path: Path) -> None:
    path.write_bytes(b"no image")


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


def resize(path: Path) -> None:
    Image.new("RGB", (48, 64)).save(path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_bytes, ["cannot be read as an image"]),
        (cut_off, ["cannot be read as an image"]),
        (resize, ["the image is 48 x 64 pixels", "objects.json says 64 x 48", "image 3"]),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_wrong_images(
    tool: Run, dataset: Dataset, tmp_path: Path, spoil: Callable[[Path], None], words: list[str], workers: int
) -> None:
    spoil(dataset.image(3))
    outcome = tool("train", dataset.config, "--out", tmp_path / "run", "--set", f"training.workers={workers}")
    assert_refused(outcome, "data.train", str(dataset.image(3)), *words)
    assert not (tmp_path / "run").exists()


def test_a_wrong_number_of_classes(tool: Run, dataset: Dataset, tmp_path: Path) -> None:
    outcome = tool("train", dataset.config, "--out", tmp_path / "run", "--set", "data.num_classes=80")
    assert_refused(outcome, "data.num_classes is 80", "2 classes: cat, dog")


# Checkpoints and results.


def test_no_checkpoint(tool: Run, dataset: Dataset, tmp_path: Path) -> None:
    absent = tmp_path / "absent.pt"
    assert_refused(tool("eval", dataset.config, "--weights", absent), str(absent))
    assert_refused(tool("predict", dataset.image(1), "--weights", absent, "--out", tmp_path), str(absent))
    assert_refused(tool("train", dataset.config, "--out", tmp_path / "run", "--init", absent), str(absent))


@pytest.mark.parametrize("content", [b"", b"no checkpoint", "state dict", "half"])
def test_files_that_are_not_checkpoints_are_refused(
    tool: Run, dataset: Dataset, weights: Path, tmp_path: Path, content: bytes | str
) -> None:
    wrong = tmp_path / "wrong.pt"
    if content == "state dict":
        torch.save({"conv1.weight": torch.zeros(1)}, wrong)
    elif content == "half":
        wrong.write_bytes(weights.read_bytes()[:100_000])
    else:
        assert isinstance(content, bytes)
        wrong.write_bytes(content)
    assert_refused(tool("eval", dataset.config, "--weights", wrong), str(wrong))


def test_a_run_whose_checkpoint_is_damaged(tool: Run, dataset: Dataset, tmp_path: Path) -> None:
    train = ["train", dataset.config, "--out", tmp_path / "run", "--set", "training.schedule.iterations=1"]
    assert tool(*train).status == 0
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    last.write_bytes(last.read_bytes()[:100_000])
    assert_refused(tool(*train, "--resume"), str(last), "damaged")


def test_weights_that_do_not_fit(tool: Run, dataset: Dataset, weights: Path, tmp_path: Path) -> None:
    other = ("--set", "model.mask_head.width=16")
    expected = (str(weights), "model.mask_head.width: 8 -> 16")
    assert_refused(tool("eval", dataset.config, "--weights", weights, *other), *expected)
    predict = ["predict", dataset.config, dataset.image(1), "--weights", weights, "--out", tmp_path]
    assert_refused(tool(*predict, *other), *expected)


def test_weights_of_other_classes_cannot_be_evaluated(tool: Run, dataset: Dataset, weights: Path) -> None:
    dataset.data["categories"][0]["name"] = "lynx"
    dataset.write()
    assert_refused(tool("eval", dataset.config, "--weights", weights), str(weights), "lynx, dog", "cat, dog")


def test_images_that_cannot_be_predicted(tool: Run, dataset: Dataset, weights: Path, tmp_path: Path) -> None:
    dataset.image(2).write_bytes(b"no image")
    predict = ["predict", "--weights", weights, "--out", tmp_path / "out"]
    assert_refused(tool(*predict, tmp_path / "absent.jpg"), str(tmp_path / "absent.jpg"))
    assert_refused(tool(*predict, dataset.image(2)), str(dataset.image(2)))
    assert_refused(tool(*predict[:-1], dataset.folder / "images", dataset.image(1)), "the pictures would replace")
    outcome = tool(*predict, dataset.folder / "images")
    assert outcome.status == 1
    assert f"skipped: {dataset.image(2)}: cannot be read" in outcome.err
    assert outcome.err.endswith("1 of 4 images were skipped; results.json has the others\n")
    assert {result["image_id"] for result in json.loads((tmp_path / "out" / "results.json").read_text())} <= {1, 3, 4}


def commands_with_out(dataset: Dataset, weights: Path) -> list[tuple[str | Path, ...]]:
    annotations = dataset.folder / "objects.json"
    results = dataset.folder / "results.json"
    results.write_text("[]")
    return [
        ("train", dataset.config),
        ("eval", dataset.config, "--weights", weights),
        ("eval", "--annotations", annotations, "--predictions", results),
        ("predict", "--weights", weights, dataset.image(1)),
        ("inspect_dataset", dataset.config),
    ]


@pytest.mark.parametrize("command", range(5))
def test_no_file_of_the_user_is_overwritten(tool: Run, dataset: Dataset, weights: Path, command: int) -> None:
    tool_and_arguments = commands_with_out(dataset, weights)[command]
    user = dataset.folder / "user"
    shutil.copytree(dataset.folder / "images", user)
    for name in ("config.yaml", "metrics.json", "results.json", "predictions"):
        (user / name).write_text("the user's")
    before = {path.name: path.read_bytes() for path in user.iterdir()}
    assert_refused(tool(*tool_and_arguments, "--out", user), str(user), "with --out")
    assert {path.name: path.read_bytes() for path in user.iterdir()} == before


@pytest.mark.parametrize("command", range(5))
@pytest.mark.parametrize("kind", ["file", "loop", "too long"])
def test_a_folder_that_cannot_be_written_to_is_named(
    tool: Run, dataset: Dataset, weights: Path, command: int, kind: str, tmp_path: Path
) -> None:
    out = tmp_path / ("x" * 300 if kind == "too long" else kind)
    if kind == "file":
        out.write_text("the user's")
    elif kind == "loop":
        out.symlink_to(out)
    assert_refused(tool(*commands_with_out(dataset, weights)[command], "--out", out), str(out))


def test_inspect_dataset_draws_what_the_network_sees(tool: Run, dataset: Dataset, tmp_path: Path) -> None:
    jitter = "data.train_transforms=[{kind: large_scale_jitter, side: 330}, {kind: copy_paste}]"
    command = ("inspect_dataset", dataset.config, "--augmented", "--count", 9)
    outcome = tool(*command, "--set", jitter, "--out", tmp_path / "out")
    assert outcome.status == 0
    assert "objects" not in outcome.out
    names = sorted(path.name for path in (tmp_path / "out").glob("0*.png"))
    assert [name[:5] for name in names] == [f"{number:04}_" for number in range(1, 10)]
    assert {name[5:] for name in names} == {"1.png", "2.png", "3.png", "4.png"}
    with Image.open(tmp_path / "out" / names[0]) as picture:
        assert picture.size == (330, 330)
    refused = tool(*command, "--split", "validation", "--out", tmp_path / "other")
    assert_refused(refused, "--augmented draws training images")
    unknown = tool(
        *command, "--set", "data.train_transforms.horizontal_flip.swap=[[cat, cow]]", "--out", tmp_path / "o"
    )
    assert_refused(unknown, "names 'cow', which is no class; the classes are cat, dog")


def test_a_full_disk_is_named(
    tool: Run, dataset: Dataset, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # without a file name, as Pillow does

    monkeypatch.setattr(Image.Image, "save", fail)
    out = tmp_path / "out"
    outcome = tool("predict", "--weights", weights, dataset.image(1), "--out", out)
    assert_refused(outcome, f"{out / '1.png'}: No space left on device")
    outcome = tool("inspect_dataset", dataset.config, "--out", out)
    assert_refused(outcome, f"{out / '1.png'}: No space left on device")


@pytest.mark.parametrize(
    ("results", "words"),
    [
        ("nonsense", ["is not JSON"]),
        ('{"a": 1}', ["not a COCO results file"]),
        ('[{"image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4]}]', ["[0].score"]),
        ('[{"image_id": 9, "category_id": 3, "score": 1, "bbox": [1, 2, 3, 4]}]', ["image_id 9"]),
    ],
)
def test_wrong_results(tool: Run, dataset: Dataset, tmp_path: Path, results: str, words: list[str]) -> None:
    (tmp_path / "results.json").write_text(results)
    outcome = tool("eval", "--annotations", dataset.folder / "objects.json", "--predictions", tmp_path / "results.json")
    assert_refused(outcome, *words)


def test_a_run_directory_that_cannot_be_made(tool: Run, dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_refused(tool("train", dataset.config, "--out", tmp_path / "file"), str(tmp_path / "file"))


def test_wrong_input_in_a_separate_process(launcher: Launcher, dataset: Dataset) -> None:
    ended = launcher.run("tools/train.py", dataset.config, "--set", "model.roi.kind=roi_aling")
    assert_refused(ended, "did you mean 'roi_align'")
    assert not ended.out


# Signals.


@pytest.mark.skipif(os.name != "posix", reason="process groups need POSIX")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_all_processes_saves_the_state(
    launcher: Launcher, dataset: Dataset, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    """`timeout`, Ctrl-C and SLURM also send the signal to the data loader workers."""
    run = tmp_path / "run"
    overrides = ["training.workers=1", "training.schedule.iterations=100000", "training.checkpoint_every=100000"]
    settings = [argument for override in overrides for argument in ("--set", override)]
    process = launcher.start("tools/train.py", dataset.config, "--out", run, "--device", "cpu", *settings)
    process.wait_for(lambda: (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text() != "")
    os.killpg(process.pid, number)
    ended = process.end()
    assert ended.status == status, ended.err
    assert "Traceback" not in ended.err
    assert "which is saved; resume with --resume" in ended.err
    saved = torch.load(run / "checkpoints" / "last.pt", weights_only=True)
    assert saved["iteration"] >= 1
