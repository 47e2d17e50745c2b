"""Whom a run directory belongs to, and what it says about how it came about."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from maskrcnn.config import Section
from maskrcnn.errors import InputError
from maskrcnn.run_directory import RunDirectory


class Inner(Section):
    lr: float = 0.1


class Config(Section):
    inner: Inner = Inner()
    steps: tuple[int, ...] = (1, 2)


CONFIG = Config()
OTHER = Config(inner=Inner(lr=0.5), steps=(1,))


def claimed(root: Path, config: Config = CONFIG) -> RunDirectory:
    run = RunDirectory(root)
    run.claim(config, resume=False)
    return run


def started(root: Path, config: Config = CONFIG) -> RunDirectory:
    run = claimed(root, config)
    run.metrics.write_text('{"kind": "train", "iteration": 20}\n')
    return run


def saved(root: Path) -> RunDirectory:
    run = claimed(root)
    run.last.write_bytes(b"")
    return run


def refusal(root: Path, config: Config = CONFIG, *, resume: bool = False) -> str:
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    with pytest.raises(InputError) as error:
        RunDirectory(root).claim(config, resume=resume)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before
    return str(error.value)


def test_a_new_folder_is_made(tmp_path: Path) -> None:
    run = claimed(tmp_path / "runs" / "a")
    assert all(folder.is_dir() for folder in (run.checkpoints, run.evaluation, run.predictions))
    assert yaml.safe_load(run.config.read_text()) == {"inner": {"lr": 0.1}, "steps": [1, 2]}


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    assert claimed(tmp_path).config.exists()


def test_a_folder_of_someone_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("three years of work")
    assert f"{tmp_path} is not empty and no run of ours" in refusal(tmp_path)


@pytest.mark.parametrize("make", [started, saved])
def test_another_experiment_is_refused_and_its_differences_listed(
    make: Callable[[Path], RunDirectory], tmp_path: Path
) -> None:
    make(tmp_path)
    for resume in (False, True):
        message = refusal(tmp_path, OTHER, resume=resume)
        assert f"{tmp_path} holds another experiment" in message
        assert "inner.lr: 0.1 -> 0.5" in message
        assert "steps: [1, 2] -> [1]" in message
        assert "--out" in message


@pytest.mark.parametrize("make", [started, saved])
def test_the_same_experiment_needs_resume(make: Callable[[Path], RunDirectory], tmp_path: Path) -> None:
    make(tmp_path)
    assert "add --resume" in refusal(tmp_path)
    RunDirectory(tmp_path).claim(CONFIG, resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_never_began_leaves_the_folder_free(resume: bool, tmp_path: Path) -> None:
    """Such as one whose weights were missing: to name others must not need another folder."""
    claimed(tmp_path)
    run = RunDirectory(tmp_path)
    run.metrics.touch()
    run.claim(OTHER, resume=resume)
    assert yaml.safe_load(run.config.read_text())["inner"]["lr"] == 0.5


def test_there_must_be_something_to_resume(tmp_path: Path) -> None:
    assert "holds no run to resume" in refusal(tmp_path / "absent", resume=True)
    assert not (tmp_path / "absent").exists()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    assert f"{tmp_path / 'file'}: cannot write the run here (Not a directory)" in refusal(tmp_path / "file")
    assert "cannot write the run here" in refusal(tmp_path / "file" / "run")


def test_the_environment_is_described_at_each_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tools/train.py", "a config.yaml"])
    run = claimed(tmp_path)
    run.describe_environment(seed=7, device=torch.device("cpu"))
    run.describe_environment(seed=7, device=torch.device("cpu"))
    first, second, rest = run.environment.read_text().split("\n\n")
    assert first == second
    assert not rest
    lines = dict(line.split(": ", 1) for line in first.splitlines())
    assert lines["command"].endswith("tools/train.py 'a config.yaml'")
    assert lines["seed"] == "7"
    assert lines["torch"] == torch.__version__.split("+")[0] or lines["torch"] == torch.__version__
    assert "cores" in lines["device"]
    assert {"commit", "threads", "python", "torchvision", "numpy", "pycocotools"} <= lines.keys()


def test_the_contents_are_named(tmp_path: Path) -> None:
    run = claimed(tmp_path)
    assert all(str(path) in run.contents() for path in (run.metrics, run.predictions, run.evaluation, run.checkpoints))
