"""Where data come from, for the record of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol, runtime_checkable

from maskrcnn.data.dataset import DetectionDataset

SHOWN_IDS = 10


@runtime_checkable
class HasOrigin(Protocol):
    """A dataset that can tell more about its origin than the interface of datasets; optional."""

    def origin(self) -> Mapping[str, str]:
        """Return texts by name: files with their digests, parameters of generated data, what was dropped and why."""


def describe(dataset: DetectionDataset) -> dict[str, str]:
    """Return what identifies the images of a dataset, as texts by name. No image is opened."""
    ids = [dataset.image_id(index) for index in range(len(dataset))]
    images = {"images": f"{len(ids)}, sha256 of their ids {digest(map(str, ids))}"}
    return images | dict(dataset.origin()) if isinstance(dataset, HasOrigin) else images


def digest(names: Iterable[str]) -> str:
    """Return the SHA-256 of a list of names, one per line, in hexadecimal digits."""
    return hashlib.sha256("".join(f"{name}\n" for name in names).encode()).hexdigest()


def count_and_ids(ids: Sequence[int]) -> str:
    """Return the number of ids and the first ones, as text."""
    more = ", ..." if len(ids) > SHOWN_IDS else ""
    return f"{len(ids)} (ids {', '.join(map(str, ids[:SHOWN_IDS]))}{more})"


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits. A file that did not change is read once by a process."""
    status = path.stat()
    return _file_digest(path, status.st_mtime_ns, status.st_size)


@lru_cache
def _file_digest(path: Path, modified: int, size: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
