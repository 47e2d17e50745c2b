"""Bounded reading of JSON, XML, text and label images, and of the headers of photographs.

Every function raises InputError, which names the file, for what is broken, too large or not of the format.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from maskrcnn.data.coco_file import listed
from maskrcnn.errors import InputError
from maskrcnn.paths import open_file, read_file

MOST_TEXT = 2**26  # bytes of a text file, or of the XML file of one image
MOST_JSON = 2**28  # bytes of the JSON file of one image, which may hold the image
MOST_XML = 2**32  # bytes of an XML file of many images; it is read piece by piece
MOST_LABELS = 2**26  # pixels of a label image: sorting them takes 24 bytes for each
MOST_VALUE = 2**16 - 1  # of a pixel of a label image, so that the number of objects is bounded
DEEPEST_XML = 32  # nested elements
LONGEST_SIDE = 2**16 - 1  # px, as in the schema of COCO files

ORIENTATION = 0x0112  # the EXIF tag
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)

Content = TypeVar("Content")


class Header(NamedTuple):
    """What the header of an image file says."""

    height: int  # of the upright image, as viewers and `maskrcnn.data.images.read_image` show it
    width: int
    orientation: int  # EXIF: 1 is upright as stored, 5 to 8 swap height and width


def read_header(path: Path) -> Header:
    """Return the size of an image. Only a PNG without EXIF data at its beginning is decoded for that."""
    try:
        with open_file(path) as file, Image.open(file) as image:
            orientation = image.getexif().get(ORIENTATION, 1)
            width, height = image.size
    except _DAMAGED as error:
        raise InputError(f"{path}: cannot be read as an image ({_reason(error)})") from error
    if max(width, height) > LONGEST_SIDE:
        raise InputError(f"{path}: the image has {width} x {height} pixels; a side has at most {LONGEST_SIDE}")
    orientation = orientation if orientation in range(2, 9) else 1
    return Header(width, height, orientation) if orientation >= 5 else Header(height, width, orientation)


def read_labels(path: Path) -> np.ndarray:
    """Return the label of each pixel, (H, W), bool or an integer type: the indices of a palette, or the grey values.

    The file has 1, 8, 16 or 32 bits for a pixel, values up to 65,535 and a compression without loss. Its EXIF
    orientation is not applied.
    """
    try:
        with open_file(path) as file:
            return decode_labels(file, str(path))
    except OSError as error:
        raise InputError(f"{path}: cannot read the file ({error.strerror})") from None


def decode_labels(file: BinaryIO, name: str) -> np.ndarray:
    """Return the labels in an open image file; see `read_labels`. `name` stands for it in messages."""
    try:
        with Image.open(file, formats=("PNG", "TIFF", "BMP", "GIF")) as image:
            if image.width * image.height > MOST_LABELS or max(image.size) > LONGEST_SIDE:
                size = f"{image.width} x {image.height}"
                raise InputError(f"{name}: it has {size} pixels; a label image has at most {MOST_LABELS}")
            if image.mode not in ("1", "L", "P") and not image.mode.startswith("I"):
                raise InputError(
                    f"{name}: its pixels are colours (mode {image.mode}); a label image has one number for each pixel"
                )
            labels = np.array(image)
    except InputError:
        raise
    except _DAMAGED as error:
        raise InputError(f"{name}: cannot be read as a label image ({_reason(error)})") from error
    if labels.min() < 0 or labels.max() > MOST_VALUE:
        raise InputError(f"{name}: a pixel has the value {labels.max()}; the values go from 0 to {MOST_VALUE}")
    return labels


def read_text(path: Path, *, most: int = MOST_TEXT) -> str:
    """Return the content of a UTF-8 file of at most so many bytes."""
    try:
        return read_file(path, most=most).decode()
    except UnicodeDecodeError:
        raise InputError(f"{path}: the file is not UTF-8 text") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read the file ({error.strerror})") from None


def read_json(path: Path, schema: TypeAdapter[Content], kind: str, *, most: int | None = MOST_JSON) -> Content:
    """Return the content of a JSON file.

    Args:
        path: the file.
        schema: of the content.
        kind: name of the schema in messages, such as `a LabelMe file`.
        most: maximum size in bytes.
    """
    try:
        return schema.validate_json(read_file(path, most=most))
    except OSError as error:
        raise InputError(f"{path}: cannot read the file ({error.strerror})") from None
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False, include_context=False)
        if errors[0]["type"] == "json_invalid":
            reason = errors[0]["msg"].removeprefix("Invalid JSON: ")
            raise InputError(f"{path}: is not JSON ({reason})") from None
        problems = [f"{_place(each['loc'])}: {each['msg'].lower()}" for each in errors]
        raise InputError(f"{path}: is not {kind}; {listed(problems)}") from None


def read_xml(path: Path, tags: set[str], *, most: int = MOST_XML) -> Iterator[ElementTree.Element]:
    """Yield the outermost elements with one of these tags, each complete, while the file is read.

    A document type is refused, so that no entity is declared or expanded.
    """
    collector = _Collector(tags)
    parser = ElementTree.XMLParser(target=collector)
    try:
        with open_file(path, most=most) as file:
            while chunk := file.read(2**16):
                parser.feed(chunk)
                yield from collector.take()
        parser.close()
    except OSError as error:
        raise InputError(f"{path}: cannot read the file ({error.strerror})") from None
    except (ElementTree.ParseError, ValueError, LookupError) as error:  # the last two are of wrong encodings
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path}: cannot be read as XML ({error})") from None


class _Collector:
    """The target of an XML parser: builds the elements with certain tags and drops all others."""

    def __init__(self, tags: set[str]) -> None:
        self.tags = tags
        self.complete: list[ElementTree.Element] = []
        self.builder: ElementTree.TreeBuilder | None = None
        self.depth = self.start_depth = 0

    def take(self) -> list[ElementTree.Element]:
        complete, self.complete = self.complete, []
        return complete

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ValueError("it has a document type, which could declare entities; remove the line <!DOCTYPE ...>")

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        self.depth += 1
        if self.depth > DEEPEST_XML:
            raise ValueError(f"elements nest more than {DEEPEST_XML} deep")
        if self.builder is None and tag in self.tags:
            self.builder, self.start_depth = ElementTree.TreeBuilder(), self.depth
        if self.builder is not None:
            self.builder.start(tag, attributes)

    def end(self, tag: str) -> None:
        if self.builder is not None:
            self.builder.end(tag)
            if self.depth == self.start_depth:
                self.complete.append(self.builder.close())
                self.builder = None
        self.depth -= 1

    def data(self, text: str) -> None:
        if self.builder is not None:
            self.builder.data(text)

    def close(self) -> None:
        pass


def _place(location: tuple[int | str, ...]) -> str:
    """Return the position of an error, such as `shapes[3].label`."""
    return (
        "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in location).removeprefix(".") or "the file"
    )


def _reason(error: BaseException) -> str:
    return str((error.strerror if isinstance(error, OSError) else None) or error or type(error).__name__)
