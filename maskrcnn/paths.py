"""Paths that a user gives: `~` stands for the home directory, and only regular files are opened for reading."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path, PureWindowsPath
from typing import BinaryIO


def expand(path: str | Path) -> Path:
    """Return the path with the home directory in place of a leading `~`."""
    return Path(os.path.expanduser(path))


def leaves_folder(name: str) -> bool:
    """Return True for absolute paths and paths that contain "..", on any system. Symbolic links are allowed."""
    path = PureWindowsPath(name)  # splits at both kinds of slash
    return bool(path.anchor) or ".." in path.parts


def require_file(path: Path, *, most: int | None = None) -> None:
    """Check that a path leads to a regular file, without opening it: a pipe would block, and a device may never end.

    Args:
        path: the path; symbolic links are followed.
        most: maximum size in bytes.

    Raises:
        OSError: there is no such file, it is something else, or it is too large. `strerror` is the reason.
    """
    try:
        status = path.stat()
    except ValueError:
        raise OSError(errno.EINVAL, "a path must not contain a null character", str(path)) from None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is a pipe, a socket or a device, not a file", str(path))
    if most is not None and status.st_size > most:
        raise OSError(errno.EFBIG, f"it has {status.st_size} bytes, more than {most}", str(path))


def open_file(path: Path, *, most: int | None = None) -> BinaryIO:
    """Open a regular file for reading; see `require_file`."""
    require_file(path, most=most)
    return path.open("rb")


def read_file(path: Path, *, most: int | None = None) -> bytes:
    """Return the content of a regular file, without a UTF-8 byte order mark; see `require_file`."""
    with open_file(path, most=most) as file:
        return file.read().removeprefix(b"\xef\xbb\xbf")
