"""Image files that a user names, and their pixels, read ahead by threads."""

from __future__ import annotations

import glob
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

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
) -> Iterator[ReadImage]:
    """Yield the images in order, at most two per worker ahead of those that were taken.

    Workers are threads: Pillow decodes without holding Python's lock, and an image of any size needs no shared memory.

    Args:
        files: the files.
        prepare: a function that also runs in the workers, such as a resize.
        workers: number of threads; 0 reads an image when it is taken.
    """
    if workers == 0:
        yield from (_read(position, file, prepare) for position, file in enumerate(files))
        return
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque[Future[ReadImage]] = deque()
        for position, file in enumerate(files):
            ahead.append(pool.submit(_read, position, file, prepare))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _read(position: int, file: Path, prepare: Callable[[Tensor], Example] | None) -> ReadImage:
    try:
        pixels = read_image(file)
    except InputError as error:
        return ReadImage(position, None, None, str(error))
    return ReadImage(position, pixels, prepare(pixels) if prepare else None, "")
