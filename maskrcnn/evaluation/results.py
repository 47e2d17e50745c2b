"""COCO results files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from maskrcnn.data.coco_file import Id, Rle, fit_in_image, run_lengths
from maskrcnn.errors import InputError, first_of
from maskrcnn.paths import read_file
from maskrcnn.runtime.files import write_atomically

Number = Annotated[float, Field(allow_inf_nan=False)]


class CocoResult(TypedDict):
    """One detection. The box is `(x, y, width, height)`."""

    image_id: Id
    category_id: Id
    score: Number
    bbox: NotRequired[Annotated[list[Number], Field(min_length=4, max_length=4)]]
    segmentation: NotRequired[Rle]


_SCHEMA = TypeAdapter(list[CocoResult])


def write_results(path: Path, results: Iterable[dict[str, Any]]) -> None:
    """Write a COCO results file atomically, with one result per line. The results may come from a generator."""

    def write(file: BinaryIO) -> None:
        separator = "[\n"
        for result in results:
            file.write((separator + json.dumps(result)).encode())
            separator = ",\n"
        file.write(b"[]\n" if separator == "[\n" else b"\n]\n")

    write_atomically(path, write)


def read_results(path: Path) -> list[dict[str, Any]]:
    """Return the results of a COCO results file. Each result has a box, a mask in RLE, or both.

    Raises:
        InputError: the file cannot be read or is invalid. The message lists the first problems with the list index of
            the result.
    """
    try:
        text = read_file(path)
    except OSError as error:
        raise InputError(f"{path.absolute()}: cannot read the results file ({error.strerror})") from None
    try:
        results = _SCHEMA.validate_json(text)
    except ValidationError as error:
        raise InputError(_schema_message(path, error)) from None
    problems = [f"[{index}]: {problem}" for index, result in enumerate(results) if (problem := _problem(result))]
    if problems:
        raise InputError(_message(path, problems))
    return [dict(result) for result in results]


def _problem(result: CocoResult) -> str | None:
    """Return a problem that the schema does not check: no box and no mask, or a wrong sum of run lengths."""
    if "segmentation" not in result:
        return None if "bbox" in result else "has neither 'bbox' nor 'segmentation'"
    height, width = result["segmentation"]["size"]
    try:
        lengths = run_lengths(result["segmentation"]["counts"])
    except ValueError as error:
        return f"segmentation: {error}"
    if not fit_in_image(lengths, height, width):
        return f"segmentation: its run lengths do not add up to its size, {height} x {width}"
    return None


def _schema_message(path: Path, error: ValidationError) -> str:
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    if errors[0]["type"] == "json_invalid":
        return f"{path.absolute()}: is not JSON ({errors[0]['msg'].removeprefix('Invalid JSON: ')})"
    if not errors[0]["loc"]:
        return f"{path.absolute()}: is not a COCO results file; expected a list of detections"
    return _message(path, [f"{_position(details['loc'])}: {details['msg'].lower()}" for details in errors])


def _position(location: tuple[int | str, ...]) -> str:
    """Return the position of an error in the file, such as `[3].bbox[2]`."""
    keys = [key for key in location if key not in ("text", "numbers")]  # without the schema's tags
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)


def _message(path: Path, problems: list[str]) -> str:
    lines = [f"{path.absolute()}: is not a COCO results file; problems by list index:", *first_of(problems)]
    return "\n  ".join(lines)
