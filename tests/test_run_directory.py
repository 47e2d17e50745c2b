"""Run directories: who may use them, resuming, and the description of the environment."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from maskrcnn.config import Section
from maskrcnn.data.shapes import ShapesConfig
from maskrcnn.errors import InputError
from maskrcnn.run_directory import RunDirectory, environment


class Inner(Section):
    lr: float = 0.1


class Training(Section):
    batch_size: int = 2
    seed: int = 0
    precision: str = "fp32"
    workers: int = 0


class Config(Section):
    inner: Inner = Inner()
    steps: tuple[int, ...] = (1, 2)
    training: Training = Training()


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
    stored = yaml.safe_load(run.config.read_text())
    assert (stored["inner"], stored["steps"]) == ({"lr": 0.1}, [1, 2])


def test_an_empty_folder_is_taken(tmp_path: Path) -> None:
    assert claimed(tmp_path).config.exists()


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("text")
    assert f"{tmp_path} is not empty and not a run directory" in refusal(tmp_path)


@pytest.mark.parametrize("make", [started, saved])
@pytest.mark.parametrize("resume", [False, True])
def test_another_experiment_is_refused_and_its_differences_listed(
    make: Callable[[Path], RunDirectory], resume: bool, tmp_path: Path
) -> None:
    make(tmp_path)
    message = refusal(tmp_path, OTHER, resume=resume)
    assert ("cannot be resumed with this configuration" if resume else "holds another experiment") in message
    assert str(tmp_path) in message
    assert "inner.lr: 0.1 -> 0.5" in message
    assert "steps: [1, 2] -> [1]" in message
    assert "--out" in message


def changed(**keys: object) -> Config:
    return Config(training=Training(**keys))


def test_resuming_lists_what_may_change_and_what_may_not(tmp_path: Path) -> None:
    started(tmp_path)
    lines = refusal(tmp_path, changed(batch_size=4, seed=1, precision="bf16", workers=2), resume=True).splitlines()
    groups = [index for index, line in enumerate(lines) if line.startswith("  ") and line.endswith(":")]
    refused, warned, harmless = (lines[first + 1 :] for first in groups)
    assert [line.split(" (")[0].strip() for line in refused[:2]] == [
        "training.batch_size: 2 -> 4",
        "training.seed: 0 -> 1",
    ]
    assert warned[0].startswith("    training.precision: fp32 -> bf16 (rounding differs from the next training step on")
    assert harmless[0].startswith("    training.workers: 0 -> 2 (")
    assert f"--init {tmp_path / 'checkpoints' / 'last.pt'}" in lines[-1]


def test_resuming_reports_and_stores_a_harmless_change(tmp_path: Path) -> None:
    run = started(tmp_path)
    reported = run.claim(changed(workers=2), resume=True)
    assert "training.workers: 0 -> 2" in reported
    assert "may not change" not in reported
    assert yaml.safe_load(run.config.read_text())["training"]["workers"] == 2
    assert run.claim(changed(workers=2), resume=True) == ""
    assert run.claim(changed(workers=2, precision="bf16"), resume=True).startswith("  changes training or metrics")


def test_a_key_newer_than_the_run_does_not_block_it(tmp_path: Path) -> None:
    """The defaults of new keys keep the behaviour of the older version."""
    run = started(tmp_path)
    stored = yaml.safe_load(run.config.read_text())
    del stored["training"]["seed"], stored["inner"]
    run.config.write_text(yaml.safe_dump(stored))
    assert "training.seed: 0 -> 1" in refusal(tmp_path, changed(seed=1), resume=True)
    assert run.claim(CONFIG, resume=True) == ""


@pytest.mark.parametrize("text", ["steps: [1, 2", "gone: 1\n"])
def test_a_stored_configuration_that_cannot_be_read_is_named(tmp_path: Path, text: str) -> None:
    run = started(tmp_path)
    run.config.write_text(text)
    assert str(run.config) in refusal(tmp_path, resume=True)


def test_a_kill_while_first_claiming_leaves_the_folder_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("os.replace", die)
    child = os.fork()
    if child == 0:
        RunDirectory(tmp_path).claim(CONFIG, resume=False)
    os.waitpid(child, 0)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml.tmp"]
    assert "holds no run to resume" in refusal(tmp_path, resume=True)
    claimed(tmp_path)
    assert not list(tmp_path.glob("*.tmp"))


def test_a_kill_while_claiming_leaves_the_old_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = started(tmp_path)
    before = run.config.read_text()

    def die(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", die)
    with pytest.raises(KeyboardInterrupt):
        run.claim(changed(workers=2), resume=True)
    assert run.config.read_text() == before


@pytest.mark.parametrize("make", [started, saved])
def test_the_same_experiment_needs_resume(make: Callable[[Path], RunDirectory], tmp_path: Path) -> None:
    make(tmp_path)
    assert "add --resume" in refusal(tmp_path)
    RunDirectory(tmp_path).claim(CONFIG, resume=True)


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_never_began_leaves_the_folder_free(resume: bool, tmp_path: Path) -> None:
    """For example after a wrong path of weights: a corrected command must be able to use the same folder."""
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
    assert f"{tmp_path / 'file'}: cannot write there (Not a directory)" in refusal(tmp_path / "file")
    assert "cannot write there" in refusal(tmp_path / "file" / "run")


def test_a_configuration_of_the_user_is_kept(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("training: {seed: 1}\n")
    assert "config.yaml was not written by a run" in refusal(tmp_path)
    assert "config.yaml was not written by a run" in refusal(tmp_path, resume=True)


def test_the_lock_leaves_other_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("text")
    with pytest.raises(InputError, match="not a run directory"), RunDirectory(tmp_path).lock(CONFIG, resume=False):
        pass
    with (
        pytest.raises(InputError, match="no run to resume"),
        RunDirectory(tmp_path / "absent").lock(CONFIG, resume=True),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_environment_is_described_at_each_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tools/train.py", "a config.yaml"])
    run = claimed(tmp_path)
    data = {"train": ShapesConfig(length=3).build(), "validation": ShapesConfig(length=2, seed=5).build()}
    for _ in range(2):
        run.describe_environment(seed=7, device=torch.device("cpu"), data=data)
    first, second, rest = run.environment.read_text().split("\n\n")
    assert first == second
    assert not rest
    lines = dict(line.split(": ", 1) for line in first.splitlines())
    assert lines["command"].endswith("tools/train.py 'a config.yaml'")
    assert lines["seed"] == "7"
    assert lines["train images"].startswith("3, sha256 of their ids ")
    assert lines["validation generated"].startswith("shapes; seed 5; image_size (128, 128); ")
    assert lines["torch"] == torch.__version__.split("+")[0] or lines["torch"] == torch.__version__
    assert "cores" in lines["device"]
    assert {"commit", "threads", "python", "torchvision", "numpy", "pycocotools"} <= lines.keys()


def test_the_environment_names_numerical_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("HOME", "a secret")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    lines = dict(line.split(": ", 1) for line in environment(torch.device("cpu")))
    assert (lines["OMP_NUM_THREADS"], lines["processes"], lines["deterministic"]) == ("3", "4", "true")
    assert not lines.keys() & {"CUDA_VISIBLE_DEVICES", "HOME", "cuda", "driver"}


@pytest.mark.gpu
def test_the_environment_names_the_gpu() -> None:
    lines = dict(line.split(": ", 1) for line in environment(torch.device("cuda")))
    assert lines["device"].startswith(torch.cuda.get_device_name())
    assert "GiB" in lines["device"]
    assert lines["cuda"] == torch.version.cuda
    assert {"driver", "cudnn"} <= lines.keys()


def test_the_contents_are_named(tmp_path: Path) -> None:
    run = claimed(tmp_path)
    assert all(str(path) in run.contents() for path in (run.metrics, run.predictions, run.evaluation, run.checkpoints))


def test_a_full_disk_error_names_the_path_and_advises_to_resume(tmp_path: Path) -> None:
    run = claimed(tmp_path)
    with (
        pytest.raises(OSError, match=r"No space left on device; make room.*--resume") as error,
        run.explaining_full_disks(),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.filename == str(tmp_path)
    with pytest.raises(OSError, match="make room") as error, run.explaining_full_disks():
        raise OSError(errno.EROFS, "Read-only file system", str(run.last))
    assert error.value.filename == str(run.last)
    with pytest.raises(ConnectionError, match="gone"), run.explaining_full_disks():
        raise ConnectionError("gone")
