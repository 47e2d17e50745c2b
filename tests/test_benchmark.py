"""The benchmark runs both sides on the same work, and writes what it found. Nothing here looks at the clock."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from maskrcnn.ops.mask_tables import full_masks

TOOLS = Path(__file__).parents[1] / "tools"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def worker() -> ModuleType:
    return load(TOOLS / "benchmarks" / "worker.py")


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return load(TOOLS / "benchmark.py")


def both_sides(worker: ModuleType, task: str, precision: str = "fp32") -> list[dict[str, float]]:
    """What one repeat of each side worked on."""
    work = []
    for side in ("ours", "torchvision"):
        job = worker.Job(task, side, height=64, width=96, threads=1, precision=precision, device="cpu")
        work.append(worker.STEPS[task, side](job, torch.device("cpu"))())
    return work


def test_both_sides_encode_the_same_masks(worker: ModuleType) -> None:
    ours, theirs = both_sides(worker, "masks")
    assert ours == theirs
    assert ours["masks"] == 100
    assert ours["pixels"] > 1000


def test_both_sides_read_the_same_regions(worker: ModuleType) -> None:
    ours, theirs = both_sides(worker, "roi")
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours["sum"] > 0
    assert ours["gradient sum"] > 0


def test_both_sides_see_the_same_objects(worker: ModuleType) -> None:
    scene = worker.draw_scene(100, 150, seed=0)
    assert (scene.boxes[:, 2:] <= torch.tensor([150, 100])).all()
    theirs, ours = worker._torchvision_target(scene), worker._our_batch([scene], 1).targets
    assert torch.equal(ours.boxes[0], theirs["boxes"])
    assert torch.equal(ours.labels[0], theirs["labels"])
    assert torch.equal(full_masks(ours.masks, 100, 150)[0], theirs["masks"])


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_sides_train_and_detect_as_much(worker: ModuleType, precision: str) -> None:
    ours, theirs = both_sides(worker, "training", precision)
    assert ours.keys() == theirs.keys() == {"box regions", "mask regions"}
    assert ours["box regions"] == pytest.approx(theirs["box regions"], rel=0.1)  # anchors differ by a rounding
    assert ours["box regions"] > 100
    for side in both_sides(worker, "inference", precision):
        assert side["mask regions"] == side["detections"] == 100


def test_the_report(benchmark: ModuleType) -> None:
    ours = [benchmark.Repeat(seconds, {"masks": 100}) for seconds in (1.0, 2.0, 4.0)]
    theirs = [benchmark.Repeat(seconds, {"masks": 100}) for seconds in (3.0, 5.0, 8.0)]
    sides = [benchmark.Side("ours", ours, 3 * 2**20), benchmark.Side("torchvision", theirs, 4 * 2**20)]
    found = benchmark.Measurement("masks", sides, ["torch: 2.99"])
    text = benchmark.report([found], {"height": 80, "width": 133, "precision": "fp32"})
    assert "## masks: 2.50 (2.00 to 3.00) times as fast, 0.75 times the memory" in text
    assert "| ours | 2 | 1 | 4 | 3 | 100 |" in text
    assert "| torchvision | 5 | 3 | 8 | 4 | 100 |" in text
    assert "- torch: 2.99\n" in text
    assert "80 x 133" in text


def test_the_report_of_what_is_measured_alone(benchmark: ModuleType) -> None:
    repeats = [benchmark.Repeat(seconds, {"images": 5000}) for seconds in (1.0, 2.0, 4.0)]
    found = benchmark.Measurement("bootstrap", [benchmark.Side("ours", repeats, 3 * 2**20)], ["torch: 2.99"])
    text = benchmark.report([found], {"height": 80, "width": 133, "precision": "fp32"})
    assert "## bootstrap: 2 s\n" in text
    assert "| ours | 2 | 1 | 4 | 3 | 5000 |" in text
    assert "torchvision's side" not in text


def test_random_matches_are_those_of_a_good_model(worker: ModuleType) -> None:
    matches = worker.random_matches(images=50, categories=4, objects=400, detections=2000)
    assert matches.true_positives.shape == matches.ignored.shape == (2000, 4)
    assert not (matches.true_positives & matches.ignored).any()
    figures = matches.figures()
    assert 0.2 < figures["AP75"] < figures["AP"] < figures["AP50"] < 0.9
    for name in ("APs", "APm", "APl"):
        assert figures[name] == pytest.approx(figures["AP"], abs=0.1)


def run_tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOLS / "benchmark.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_tool_measures_and_writes(tmp_path: Path) -> None:
    out = tmp_path / "new" / "masks.md"
    options = ["--repeats", "2", "--threads", "1", "--height", "64", "--width", "96", "--out", str(out)]
    done = run_tool("masks", *options)
    assert done.returncode == 0, done.stderr
    assert out.read_text() in done.stdout
    seconds = next(line for line in done.stdout.splitlines() if line.startswith("torchvision, s:"))
    assert len(seconds.split(":")[1].split(",")) == 2


@pytest.mark.parametrize("arguments", [["speed"], ["masks", "--repeats", "0"], ["masks", "--device", "nonsense"]])
def test_wrong_arguments_leave_with_two(arguments: list[str]) -> None:
    done = run_tool(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
