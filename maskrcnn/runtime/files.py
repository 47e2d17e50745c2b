"""Files: atomic writes, JSON without NaN, and tensors read without executing code."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from maskrcnn.errors import InputError
from maskrcnn.paths import require_file


def read_tensors(path: Path) -> dict[str, Any]:
    """Return the dict in a file written by `torch.save`, such as a state dict.

    The checksums in the file are verified, which torch does not do; this reads the file once more.

    Raises:
        InputError: the file is missing, unreadable, damaged or does not hold a dict. The message names the file.
    """
    return read_mapping(path, _load)


def read_mapping(path: Path, load: Callable[[Path], Any]) -> dict[str, Any]:
    """Return the dict that `load` reads from a file of tensors.

    Raises:
        InputError: the file is missing, unreadable, damaged or does not hold a dict. The message names the file.
    """
    try:
        require_file(path)
        content = load(path)
    except OSError as error:
        raise InputError(f"{path}: cannot read it: {error.strerror or error}") from error
    except Exception as error:  # unpickling arbitrary bytes can raise almost any exception
        raise InputError(
            f"{path}: this is not a file of tensors that can be read safely, or it is damaged: {_reason(error)}"
        ) from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: it holds a {type(content).__name__}, not tensors by name")
    return content


def _load(path: Path) -> Any:
    _verify_checksums(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as advice on files that torch can read in other ways
        return torch.load(path, map_location="cpu", weights_only=True)


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file atomically: write a temporary file in the same folder, sync it, then rename it to `path`.

    Args:
        path: the file to write. Its folder is created if needed.
        write: writes the content to the open file that it receives.

    Raises:
        OSError: the disk is full or not writable. The message names the file, whose previous content is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_of(path)
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # a folder that became read-only; report the first error
            temporary.unlink(missing_ok=True)
        # torch.save raises a RuntimeError in the context of the OSError.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError) and cause.filename in (None, str(temporary)):  # not of another file
            message = f"{cause.strerror}; what was there before is kept"
            raise OSError(cause.errno, message, str(path)) from error
        raise
    _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically; see `write_atomically`."""
    write_atomically(path, lambda file: file.write(text.encode()))


def json_text(value: Any, *, indent: int | None = None) -> str:
    """Return `value` as JSON, with null in place of NaN and infinite numbers, which JSON does not have."""
    return json.dumps(without_nan(value), indent=indent, allow_nan=False)


def without_nan(value: Any) -> Any:
    """Return `value` with NaN and infinite numbers replaced by None, at any depth."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def temporary_of(path: Path) -> Path:
    """Return the path of the temporary file of `write_atomically`.

    A killed process may leave this file behind; the next write to `path` replaces it.
    """
    return path.with_name(path.name + ".tmp")  # in the same folder: a rename across file systems is not atomic


def _sync_folder(folder: Path) -> None:
    """Sync a folder to disk so that a rename survives a power failure. Does nothing except on POSIX."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _verify_checksums(path: Path) -> None:
    """Raise ValueError if a record in the zip archive of a file has a wrong checksum. Other files have none."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} has a wrong checksum")


def _reason(error: Exception) -> str:
    """Return the first line of an error of `torch.load`, but no advice of torch to run code of the file."""
    text = str(error)
    if forbidden := re.search(r"GLOBAL (\S+)", text):
        return f"it refers to {forbidden[1]}, and nothing from a file is run"
    if "weights_only" in text or "weights only" in text.lower():
        return "it holds other things than tensors and plain values"
    return (text.splitlines() or [type(error).__name__])[0]
