"""Checks of image files against the annotations, without their pixels where that is possible.

The check before a training reads the header and the end of each file, which finds missing, foreign, empty and cut-off
files and wrong sizes. A file is decoded only where this cannot tell. Damage in the middle is found by `maskrcnn
inspect-dataset`, which decodes every image.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol, runtime_checkable

import numpy as np
from tqdm import tqdm

from maskrcnn.data.coco_file import listed
from maskrcnn.data.dataset import DetectionDataset
from maskrcnn.data.findings import Finding
from maskrcnn.data.images import open_image, read_image
from maskrcnn.data.provenance import file_digest
from maskrcnn.errors import InputError
from maskrcnn.paths import open_file

THREADS = 16  # they wait for the file system most of the time
ORIENTATION = 0x0112  # the EXIF tag; 1 is upright, 5 to 8 exchange width and height

METADATA = frozenset(("exif", "Raw profile type exif", "XML:com.adobe.xmp"))  # where a PNG can have its orientation

END = 4096  # bytes at the end of two files that are compared first
DARK = 16  # of 255; an image without a value above is nearly black

Size = tuple[int, int]  # height, width in pixels


@runtime_checkable
class ChecksFiles(Protocol):
    """A dataset of image files that can check them; optional."""

    def check_files(self) -> list[Finding]:
        """Return what is wrong with the image files, without decoding those whose header and end tell enough."""


class Header(NamedTuple):
    """What the beginning of an image file says, and whether its end is there."""

    size: Size  # with the EXIF orientation applied
    orientation: int
    mode: str  # Pillow's, such as RGB, L, I;16 (16 bits) or F (float)
    complete: bool  # False if only decoding can tell


def read_header(path: Path) -> Header:
    """Return the header of an image file.

    Raises:
        InputError: the file is missing, unreadable or not an image.
    """
    with open_image(path) as image:
        # Pillow decodes a PNG to look for EXIF data behind its pixels; those before them are there already.
        knows = image.format != "PNG" or not METADATA.isdisjoint(image.info)
        orientation = image.getexif().get(ORIENTATION, 1) if knows else 1
        height, width = (image.width, image.height) if orientation in (5, 6, 7, 8) else (image.height, image.width)
        return Header((height, width), orientation, image.mode, _ends_properly(path, image.format))


def _ends_properly(path: Path, kind: str | None) -> bool:
    """Return whether a JPEG or PNG has its end marker; False for other formats."""
    with open_file(path) as file:
        if kind == "JPEG":
            file.seek(-2, os.SEEK_END)
            return file.read() == b"\xff\xd9"
        return kind == "PNG" and _png_ends(file)


def _png_ends(file: BinaryIO) -> bool:
    """Walk through the chunks of a PNG; return True at its last one, unless EXIF data stand behind the pixels."""
    file.seek(8)
    has_pixels = False
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IEND":
            return has_pixels
        if has_pixels and kind in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
            return False
        has_pixels = has_pixels or kind == b"IDAT"
        file.seek(length + 4, os.SEEK_CUR)  # the content and its checksum
    return False


def mismatch(size: Size, expected: Size, annotations: str, image_id: int) -> str:
    """Return how the size of an image differs from that in the file `annotations`; empty if it does not."""
    if size == expected:
        return ""
    hint = (
        " Width and height are swapped: the annotations probably ignore the image's EXIF orientation."
        if size == expected[::-1]
        else ""
    )
    return (
        f"the image is {size[1]} x {size[0]} pixels (width x height), but {annotations} says {expected[1]} x "
        f"{expected[0]} (image {image_id}).{hint}"
    )


def check_file(path: Path, expected: Size, image_id: int, annotations: str) -> Finding | None:
    """Return what is wrong with an image file, or None. It is decoded if its header and end do not tell.

    Args:
        path: the image.
        expected: height and width according to the annotations.
        image_id: its id.
        annotations: the name of the annotation file, for the message.
    """
    try:
        header = read_header(path)
    except InputError as error:
        return unreadable(path, image_id, error)
    size = header.size
    if not header.complete:
        try:
            pixels = read_image(path)
        except InputError as error:
            return unreadable(path, image_id, error, has_header=True)
        size = (pixels.shape[1], pixels.shape[2])
    text = mismatch(size, expected, annotations, image_id)
    if not text:
        return None
    swapped = size == expected[::-1] and header.orientation > 1
    return Finding("exif_mismatch" if swapped else "size_mismatch", text, image_id, file=str(path))


def unreadable(path: Path, image_id: int, error: InputError, *, has_header: bool = False) -> Finding:
    """Return the finding for an image that could not be read; `has_header`: only its pixels could not."""
    text = str(error).removeprefix(f"{path.absolute()}: ")
    fault = "truncated_image" if has_header else "unreadable_image" if path.exists() else "missing_image"
    return Finding(fault, text, image_id, file=str(path))


def why_dark(path: Path) -> str:
    """Return what the file of an image that is nearly black holds, and the remedy, as a sentence without an end.

    Raises:
        InputError: the file cannot be read.
    """
    with open_image(path) as image:
        mode, brightest = image.mode, float(np.asarray(image).max())
    if mode.startswith("I"):
        return (
            f"its pixels have 16 bits and values up to {brightest:.0f}, of which the upper 8 bits are used. Stretch "
            "the values to 0..65535, or write 8 bits"
        )
    if mode == "F":
        return (
            f"its pixels are floating-point numbers up to {brightest:g}, which are read as 0..255. Write whole "
            "numbers of 8 or 16 bits"
        )
    return f"its values of 8 bits end at {brightest:.0f}"


def equal_files(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """Return the files of `second`, sorted, that are among those of `first`: the same path, or the same bytes.

    Files are read only where another one has the same size, and to the end only where their last bytes are the same.
    A file that cannot be read equals no other.
    """
    shared = set(first) & set(second)
    candidates = [set(first) - shared, set(second) - shared]
    for key in (_size_of, _end_of, _digest_of):
        keys = [{path: value for path in paths if (value := key(path))} for paths in candidates]
        common = set(keys[0].values()) & set(keys[1].values())
        candidates = [{path for path, value in of_split.items() if value in common} for of_split in keys]
    return sorted(shared | candidates[1])


def _size_of(path: str) -> int:
    with suppress(OSError):
        return os.path.getsize(path)
    return 0


def _end_of(path: str) -> bytes:
    with suppress(OSError), open_file(Path(path)) as file:
        file.seek(-min(END, os.path.getsize(path)), os.SEEK_END)
        return str(os.path.getsize(path)).encode() + file.read()
    return b""


def _digest_of(path: str) -> str:
    with suppress(OSError):
        return file_digest(Path(path))
    return ""


def check_files(files: Sequence[str], sizes: np.ndarray, ids: Sequence[int], annotations: str) -> list[Finding]:
    """Return what is wrong with N image files; see `check_file`. A progress bar is shown.

    Args:
        files: their paths.
        sizes: (N, 2) height and width according to the annotations.
        ids: image ids.
        annotations: the name of the annotation file, for the messages.
    """
    expected = [(int(height), int(width)) for height, width in sizes]
    with ThreadPoolExecutor(THREADS) as pool:
        checks = pool.map(partial(check_file, annotations=annotations), map(Path, files), expected, ids)
        progress = tqdm(checks, f"checking the images of {annotations}", len(files), leave=False, disable=None)
        return [finding for finding in progress if finding is not None]


def require_files(dataset: DetectionDataset, name: str) -> None:
    """Check the image files of a dataset, if it has any.

    Args:
        dataset: the dataset.
        name: of the dataset, for the message.

    Raises:
        InputError: files cannot be used. The message counts them and lists the first ones.
    """
    faults = dataset.check_files() if isinstance(dataset, ChecksFiles) else []
    if faults:
        raise InputError(f"{name}: {listed([f'{finding.file}: {finding.text}' for finding in faults])}")
