"""Output of commands: one process at a time writes to a folder, and no file that this package did not write is lost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from maskrcnn.errors import InputError, first_of
from maskrcnn.runtime.files import write_text

LOCK = ".maskrcnn.lock"
# The list of the files that this package wrote to a folder. It is empty while a command writes there, and after a kill.
MARKER = ".maskrcnn"
WAIT = 10.0  # seconds for the end of another process: the runs of a killed ablation save and stop by themselves


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create a folder and hold its lock, so that no other process locks it. The end of the process releases the lock.

    Raises:
        InputError: another process holds the lock, or the folder cannot be created or written to.
    """
    lock = FileLock(folder / LOCK)
    with explaining(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=WAIT)
        except Timeout:
            message = "another process is writing there; wait for its end, or choose another folder with --out"
            raise InputError(f"{folder}: {message}") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def output_folder(folder: Path) -> Iterator[None]:
    """Lock the output folder of a command. It is new, empty, or holds only files that earlier commands wrote.

    Raises:
        InputError: the folder holds other files, another process writes there, or it cannot be written to.
    """
    with explaining(folder):
        foreign = _foreign_files(folder)  # before the lock, which is a file too
    if foreign:
        raise InputError(
            f"{folder}: files here were not written by maskrcnn ({', '.join(first_of(foreign))}); choose a new or "
            "empty folder with --out"
        )
    with locked(folder):
        with explaining(folder):
            write_text(folder / MARKER, "")
        try:
            yield
        finally:
            with suppress(OSError):  # a full disk, which another error reports
                names = [name for name, path in _files(folder).items() if not path.is_symlink()]
                write_text(folder / MARKER, json.dumps(names))


@contextmanager
def explaining(folder: Path) -> Iterator[None]:
    """Raise InputError, which names the folder, in place of an OSError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{folder}: cannot write there ({error.strerror})") from error


def _foreign_files(folder: Path) -> list[str]:
    """Return the names of the files in a folder that are not known to be written by this package."""
    marker = folder / MARKER
    if not folder.exists():
        return []
    if not marker.is_file():  # do not walk through a folder of any size
        return sorted(path.name for path in folder.iterdir() if path.name != LOCK)
    try:
        written = json.loads(marker.read_text(encoding="utf-8") or "null")
    except ValueError:
        written = []
    if written is None:
        return []
    return sorted(name for name, path in _files(folder).items() if path.is_symlink() or name not in written)


def _files(folder: Path) -> dict[str, Path]:
    """Return all files below a folder but lock and marker, and links, by their names relative to the folder."""
    own = {folder / LOCK, folder / MARKER}
    paths = (path for path in folder.rglob("*") if path not in own and (path.is_symlink() or not path.is_dir()))
    return {path.relative_to(folder).as_posix(): path for path in paths}
