"""Locks of folders: one process writes to a folder at a time, and a kill blocks nobody."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from maskrcnn.errors import InputError
from maskrcnn.runtime import outputs
from maskrcnn.runtime.outputs import locked

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
