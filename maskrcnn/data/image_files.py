"""Image files that a user names, and their pixels, read ahead by worker processes."""

from __future__ import annotations

import glob
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from maskrcnn.data.images import read_image
from maskrcnn.errors import InputError
from maskrcnn.structures import Example

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
_PATTERN = frozenset("*?[")  # a path with one of these, where no such file exists, is a pattern


def image_files(inputs: Sequence[Path]) -> list[Path]:
    """Return the files of inputs: image files, folders, and patterns such as `photos/**/*.jpg`.

    Of folders and patterns, files with the suffix of an image are taken, sorted by name. Those whose names begin with a
    dot are not, such as the `._a.jpg` that macOS writes beside `a.jpg`.

    Raises:
        InputError: an input does not exist, or has no image.
    """
    return [file for path in inputs for file in _files_of(path)]


def _files_of(path: Path) -> list[Path]:
    if os.path.isdir(path):  # False also for a path that the system refuses, such as one that is too long
        return _images_among(path.iterdir(), f"{path}: no image in this folder")
    if os.path.isfile(path):
        return [path]
    if not _PATTERN.isdisjoint(str(path)) and "\0" not in str(path):
        return _images_among(map(Path, glob.iglob(str(path), recursive=True)), f"{path}: no image matches this pattern")
    raise InputError(f"{path}: no such image or folder")


def _images_among(paths: Iterable[Path], problem: str) -> list[Path]:
    images = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")]
    if not images:
        raise InputError(f"{problem} ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return sorted(images)


def output_names(files: Sequence[Path]) -> list[str]:
    """Return a name without suffix for each image: its own, followed by its number if another image has this name.

    The names differ even where the file system ignores case.
    """
    counts = Counter(path.stem.casefold() for path in files)
    taken = {stem for stem, count in counts.items() if count == 1}
    names = []
    for number, path in enumerate(files, start=1):
        name = path.stem
        if counts[name.casefold()] > 1:
            name += f"_{number}"
            while name.casefold() in taken:
                name += f"_{number}"
            taken.add(name.casefold())
        names.append(name)
    return names


class ReadImage(NamedTuple):
    """An image, or the problem with its file."""

    position: int  # of the file among those that are read
    pixels: Tensor | None  # (3, H, W) uint8 RGB
    prepared: Example | None  # what `prepare` made of it
    problem: str


def read_images(
    files: Sequence[Path], prepare: Callable[[Tensor], Example] | None, *, workers: int
) -> Iterable[ReadImage]:
    """Return an iterable over the images in order. At most two images per worker are read ahead.

    Args:
        files: the files.
        prepare: a function that also runs in the workers, such as a resize.
        workers: number of processes; 0 reads in this process.
    """
    return DataLoader(
        _Files(files, prepare),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator(),  # keeps the global generator unchanged
    )


@dataclass(frozen=True)
class _Files(Dataset):
    files: Sequence[Path]
    prepare: Callable[[Tensor], Example] | None

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> ReadImage:
        try:
            pixels = read_image(self.files[index])
        except InputError as error:
            return ReadImage(index, None, None, str(error))
        return ReadImage(index, pixels, self.prepare(pixels) if self.prepare else None, "")


def _ignore_interrupts(worker: int) -> None:
    """Leave Ctrl-C, which reaches the whole process group, to the main process, which ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
