"""The benchmark for a GPU, tried on a CPU: what it measures, and that a report keeps what was measured."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from test_benchmark import TOOLS, load

from maskrcnn.config import read_config
from maskrcnn.errors import InputError
from maskrcnn.experiment import ExperimentConfig

CPU = torch.device("cpu")
TINY = Path(__file__).parent / "tiny_fpn.yaml"


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The worker, with a small model of ours."""
    monkeypatch.syspath_prepend(str(TOOLS / "benchmarks"))
    module = load(TOOLS / "benchmarks" / "gpu_worker.py")
    monkeypatch.setattr(module.worker, "_our_experiment", lambda: read_config(TINY, ExperimentConfig))
    return module


@pytest.fixture
def gpu() -> ModuleType:
    return load(TOOLS / "benchmarks" / "gpu.py")


def job_of(worker: ModuleType, **changes: Any) -> Any:
    settings = {"side": "ours", "precision": "fp32", "compile": "off", "cuda_graph": False, "batches": [2]}
    return worker.Job(**{**settings, "height": 64, "width": 80, "steps": 2, "device": "cpu", **changes})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_row_of_ours(worker: ModuleType, precision: str) -> None:
    row = worker.measure(job_of(worker, precision=precision), 2, CPU)
    assert row["batch"] == 2
    assert row["images/s"] == pytest.approx(2000 / row["ms"])
    assert min(row["GiB"], row["preparation, s"]) > 0


@pytest.mark.slow
def test_a_row_of_torchvision(worker: ModuleType) -> None:
    assert worker.measure(job_of(worker, side="torchvision", steps=1), 1, CPU)["images/s"] > 0


def test_batches_lie_in_a_bucket(worker: ModuleType) -> None:
    step, training = worker.our_step(job_of(worker), 2, CPU)
    step()
    step()
    assert training.outside == 0


def test_the_stages_of_a_step(worker: ModuleType) -> None:
    times = worker.stage_times(job_of(worker), 1, CPU)
    assert len(times) == 15
    assert min(times.values()) > 0
    whole, forward = times.pop("step"), times.pop("forward pass, all")
    after = sum(times.pop(name) for name in ("backward pass", "clipping and finite check", "optimizer"))
    assert sum(times.values()) < forward
    assert forward + after < whole


def test_graphs_and_a_compiled_step_need_a_gpu(worker: ModuleType) -> None:
    for changes in ({"cuda_graph": True}, {"compile": "step"}):
        with pytest.raises(InputError, match="needs a GPU"):
            worker.measure(job_of(worker, **changes), 1, CPU)


STUB = """
import json, sys, time
job = json.loads(sys.argv[1])
print(json.dumps({"environment": ["device: stub"]}), flush=True)
for batch in job["batches"]:
    if job["side"] == "torchvision" and batch > 2:
        sys.exit("error: out of memory")
    if job["cuda_graph"]:
        time.sleep(60)
    row = {"batch": batch, "images/s": 10.0, "ms": 100.0 * batch, "GiB": 1.5, "preparation, s": 2.0}
    print(json.dumps({"row": row}), flush=True)
if job["stages"]:
    print(json.dumps({"stages": {"backward pass": 12.0}}), flush=True)
"""


@pytest.fixture
def plan(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    stub = tmp_path / "stub.py"
    stub.write_text(STUB)
    monkeypatch.setattr(gpu, "WORKER", stub)
    monkeypatch.setattr(gpu, "LEAST", 0)
    return gpu.Plan([2, 8], 64, 96, steps=1, device="cpu", seconds=60, iterations=0, runs=tmp_path / "runs")


def test_the_report_holds_what_was_measured(gpu: ModuleType, plan: Any, tmp_path: Path) -> None:
    """One way fails at its second batch size, and one is cut off before its first."""
    graph = gpu._way("ours", "bf16", graph=True, limit=2.0)
    report = gpu.Report(tmp_path / "new" / "gpu.md", plan)
    end = gpu.time.monotonic() + 60
    for way, stages in ((gpu.EARLY[0], True), (gpu.EARLY[1], False), (graph, False)):
        gpu.measure(way, plan, report, end, stages=stages)
    text = report.path.read_text()
    assert text == report.text()
    assert "- device: stub" in text
    assert "| ours, bf16 | 2 | 10 | 200 | 1.5 | 2 |\n| ours, bf16 | 8 | 10 | 800 | 1.5 | 2 |\n" in text
    assert "| torchvision, bf16 | 2 | 10 | 200 | 1.5 | 2 |\n| torchvision, bf16 | error: out of memory |" in text
    assert "| ours, bf16, CUDA graph | cut off after 2 s |" in text
    assert "| backward pass | 12.00 |" in text


def test_nothing_is_started_without_time(gpu: ModuleType, plan: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(gpu, "LEAST", 20)
    text = gpu.run(plan._replace(seconds=10, iterations=5), tmp_path / "gpu.md")
    assert text.count("no time left") == len(gpu.EARLY) + len(gpu.LATE) + 1
    with pytest.raises(FileExistsError):
        gpu.run(plan, tmp_path / "gpu.md")


def test_a_training_ends_with_its_ap(gpu: ModuleType, plan: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """The command gets the settings; its metrics are read."""
    commands: list[list[str]] = []

    def run(command: list[str], **options: Any) -> Any:
        commands.append(command)
        out = Path(command[command.index("--out") + 1])
        out.mkdir(parents=True)
        train = {"kind": "train", "images_per_second": 123.4}
        evaluation = {"kind": "evaluation", "metrics": {"box/AP": 0.5, "mask/AP": 0.25}}
        (out / "metrics.jsonl").write_text("\n".join(map(json.dumps, (train, evaluation))))
        return gpu.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(gpu.subprocess, "run", run)
    report = gpu.Report(tmp_path / "gpu.md", plan._replace(iterations=7, device="cuda"))
    gpu.train(report.plan, report, gpu.time.monotonic() + 60)
    assert "| fp32 | 0.500 | 0.250 | 123.4 | 0 |" in report.text()
    assert "| bf16, CUDA graph | 0.500 | 0.250 | 123.4 | 0 |" in report.text()
    assert commands[0][0] == sys.executable
    assert "training.schedule.iterations=7" in commands[0]
    for command in commands:
        overrides = [command[index + 1] for index, word in enumerate(command) if word == "--set"]
        settings = read_config(gpu.REPOSITORY / gpu.TRAINED, ExperimentConfig, overrides)
        assert settings.training.cuda_graph == ("bf16" in command[command.index("--out") + 1])
