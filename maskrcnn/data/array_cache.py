"""The arrays of large annotation files, kept in a cache folder, so that the next start does not read JSON.

A cache file is an array of bytes in numpy's format (`.npy`, read without pickle): a header in JSON with the state of
the annotation file (size and times) and the place of each array, then the arrays. It is mapped into memory, so all
processes of a machine share it. It is made anew if the annotation file changed, or if a byte of it changed or is
missing.

The folder is `$XDG_CACHE_HOME/maskrcnn/annotations`, by default in `~/.cache`. Only this module writes there, under a
lock, and only files whose names it makes from the path of the annotation file; nothing is written beside the data.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from maskrcnn.paths import expand
from maskrcnn.runtime.files import write_atomically

logger = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]

FORMAT = 1  # of the header, and of what `flatten` computes: another value makes all cache files anew
SMALLEST = 2**24  # bytes; a smaller annotation file is read in a second
WAIT = 600.0  # seconds for another process that reads the same annotation file
ALIGNMENT = 64  # bytes


def cache_folder() -> Path:
    """Return the folder of the cache files; it may not exist."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expand(home) / "maskrcnn" / "annotations"


@dataclass(frozen=True)
class Mapped:
    """The arrays of a cache file, by name. A copy in another process maps the file, too: only its path is pickled."""

    path: Path
    checksum: str
    arrays: Arrays

    def __reduce__(self) -> tuple[Callable[..., Mapped], tuple[Path, str]]:
        return _again, (self.path, self.checksum)


def _again(path: Path, checksum: str) -> Mapped:
    mapped = _map(path)
    if mapped.checksum != checksum:
        raise OSError(f"{path}: the annotations changed while a process was started")
    return mapped


def cached(source: Path, layout: Sequence[str], read: Callable[[], Arrays | None]) -> Mapped | None:
    """Return the arrays of an annotation file from its cache file, which is made if there is none that is valid.

    Args:
        source: the annotation file.
        layout: names of the arrays; a cache file with others is made anew.
        read: returns the arrays from the annotation file itself; None: they cannot be cached.

    Returns:
        None if `source` is small, `read` returns None, or the cache cannot be written, which is said once.

    Raises:
        InputError: from `read`.
    """
    state = _state(source)
    if state is None or state["size"] < SMALLEST:
        return None
    expected = {"format": FORMAT, "source": state, "layout": list(layout)}
    path = cache_folder() / _name(source)
    found = _valid(path, expected)
    if found is not None:
        return found
    try:
        with _locked(path):
            found = _valid(path, expected)  # another process may have written it in the meantime
            if found is not None:
                return found
            arrays = read()
            if arrays is None or _state(source) != state:
                return None
            _write(path, expected, arrays)
            return _valid(path, expected)
    except (OSError, NotImplementedError, Timeout) as error:
        _say_once(path.parent, getattr(error, "strerror", None) or str(error))
        return None


def _state(source: Path) -> dict[str, int] | None:
    """Return what changes when the file changes; None if there is no such file."""
    try:
        status = source.stat()
    except (OSError, ValueError):  # whoever reads the file says so
        return None
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns}


def _name(source: Path) -> str:
    path = os.path.realpath(source)
    stem = re.sub(r"[^A-Za-z0-9_.-]", "_", source.stem)[:64]
    return f"{stem}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}.npy"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")).acquire(timeout=WAIT):
        yield


@lru_cache
def _say_once(folder: Path, reason: str) -> None:
    logger.warning("%s: cannot keep annotations there (%s); each start reads the annotation file", folder, reason)


# ---- The file


def _write(path: Path, identity: Mapping[str, Any], arrays: Arrays) -> None:
    """Write a cache file. Raises OSError if that fails."""
    content = [np.ascontiguousarray(array) for array in arrays.values()]
    ends = np.cumsum([0, *(-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in content)]).tolist()
    places = {
        name: [array.dtype.str, list(array.shape), start]
        for name, array, start in zip(arrays, content, ends, strict=False)
    }
    header = {**identity, "sha256": _checksum(content), "arrays": places}
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    length = 8 + len(text) + ends[-1]

    def write(file: BinaryIO) -> None:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (length,)})
        file.write(len(text).to_bytes(8, "little") + text)
        for array in content:
            file.write(_bytes(array))
            file.write(bytes(-array.nbytes % ALIGNMENT))

    write_atomically(path, write)


def _checksum(arrays: Iterable[np.ndarray]) -> str:
    checksum = hashlib.sha256()
    for array in arrays:
        checksum.update(_bytes(array))
    return checksum.hexdigest()


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _valid(path: Path, identity: Mapping[str, Any]) -> Mapped | None:
    """Return the arrays of a cache file, or None if there is none with this identity, or it is damaged."""
    if not path.is_file():
        return None
    try:
        header, _ = _open(path)
        if {key: header[key] for key in identity} != identity:
            return None
        mapped = _map(path)
        if _checksum(mapped.arrays.values()) != mapped.checksum:
            raise ValueError("another checksum")
        return mapped
    except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
        logger.info("%s: the cache file is damaged (%s); it is made anew", path, error)
        return None


def _open(path: Path) -> tuple[dict[str, Any], np.ndarray]:
    """Return the header of a cache file and the bytes behind it. Raises ValueError if it is damaged."""
    blob = np.load(path, mmap_mode="r", allow_pickle=False)
    if blob.dtype != np.uint8 or blob.ndim != 1:
        raise ValueError("not an array of bytes")
    length = int.from_bytes(blob[:8].tobytes(), "little")
    if length > len(blob) - 8:
        raise ValueError("cut off")
    return json.loads(blob[8 : 8 + length].tobytes()), blob[8 + length :].view(np.ndarray)


def _map(path: Path) -> Mapped:
    """Return the arrays of a cache file, whose content is not verified. Raises OSError or ValueError."""
    header, payload = _open(path)
    arrays = {}
    for name, (dtype, shape, start) in header["arrays"].items():
        kind = np.dtype(dtype)
        if kind.kind not in "iufb":
            raise ValueError(f"{name} has the type {dtype}")
        size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        if not 0 <= start <= start + size <= len(payload):
            raise ValueError("cut off")
        arrays[name] = payload[start : start + size].view(kind).reshape(shape)
    return Mapped(path, header["sha256"], arrays)
