"""Output folders: one process writes at a time, a kill blocks nobody, and files of the user are kept."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from maskrcnn.errors import InputError
from maskrcnn.runtime import outputs
from maskrcnn.runtime.outputs import LOCK, MARKER, locked, output_folder

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


@contextmanager
def holder(folder: Path) -> Iterator[int]:
    """Another process that holds the lock, and has a worker of its own; both sleep."""
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os.setsid()
        with locked(folder):
            os.fork()
            os.write(writer, b"x")
            time.sleep(60)
        os._exit(0)
    os.read(reader, 1)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)


@needs_fork
def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "WAIT", 0)
    with holder(tmp_path / "run") as process:
        with pytest.raises(InputError, match=r"run: another process is writing there"), locked(tmp_path / "run"):
            pass
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        with locked(tmp_path / "run"):  # although the worker of the killed process lives
            pass


def test_the_lock_is_free_after_an_error(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), locked(tmp_path):
            raise ZeroDivisionError


@pytest.mark.parametrize("kind", ["file", "below a file", "loop"])
def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_text("text")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    folder = {"file": tmp_path / "file", "below a file": tmp_path / "file" / "a", "loop": tmp_path / "loop"}[kind]
    with pytest.raises(InputError, match=f"{folder}: cannot write there"), locked(folder):
        pass


def fill(folder: Path, *names: str) -> None:
    """Write output as a command does."""
    with output_folder(folder):
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("output")


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() or path.is_symlink()}


def test_a_folder_of_output_is_filled_again(tmp_path: Path) -> None:
    fill(tmp_path / "out", "a.png", "predictions/1.png")
    fill(tmp_path / "out", "a.png", "b.png")
    fill(tmp_path / "out")
    assert names(tmp_path / "out") == {LOCK, MARKER, "a.png", "b.png", "predictions/1.png"}


def add_file(out: Path, user: Path) -> None:
    (out / "b.png").write_text("the user's")


def add_file_below(out: Path, user: Path) -> None:
    (out / "predictions" / "2.png").write_text("the user's")


def add_link(out: Path, user: Path) -> None:
    (out / "a.png").unlink()
    (out / "a.png").symlink_to(user)


def forget(out: Path, user: Path) -> None:
    (out / MARKER).unlink()


def garble(out: Path, user: Path) -> None:
    (out / MARKER).write_text("[")


@pytest.mark.parametrize("change", [add_file, add_file_below, add_link, forget, garble])
def test_a_folder_with_other_files_is_refused(tmp_path: Path, change: Callable[[Path, Path], None]) -> None:
    user, out = tmp_path / "user.png", tmp_path / "out"
    user.write_text("the user's")
    fill(out, "a.png", "predictions/1.png")
    change(out, user)
    before = {name: (out / name).read_text() for name in names(out)}
    with pytest.raises(InputError, match=r"out: files here were not written by maskrcnn \(.*(png|predictions)"):
        fill(out, "a.png", "b.png")
    assert {name: (out / name).read_text() for name in names(out)} == before
    assert user.read_text() == "the user's"


def test_a_folder_of_the_user_gets_no_file(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("text")
    with pytest.raises(InputError, match=r"not written by maskrcnn \(thesis.tex\)"):
        fill(tmp_path, "a.png")
    assert names(tmp_path) == {"thesis.tex"}


@needs_fork
def test_a_folder_of_a_killed_command_is_filled_again(tmp_path: Path) -> None:
    process = os.fork()
    if process == 0:
        with output_folder(tmp_path / "out"):
            (tmp_path / "out" / "a.png").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(process, 0)
    fill(tmp_path / "out", "a.png")
    assert (tmp_path / "out" / "a.png").read_text() == "output"
