"""COCO annotation files in JSON: the schema, reading and validation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pycocotools import mask as cocoapi
from pydantic import ConfigDict, Discriminator, Field, Tag, TypeAdapter, ValidationError
from pydantic_core import from_json
from typing_extensions import NotRequired, TypedDict

from maskrcnn.data.findings import Finding
from maskrcnn.data.rle import counts_from_string
from maskrcnn.errors import InputError, first_of
from maskrcnn.paths import read_file

# The schema. Additional keys are kept. COCO has coordinates slightly outside the image. They are limited because
# pycocotools allocates memory in proportion to the length of a polygon. Ids are stored in 64 bits, run lengths in 32.

Id = Annotated[int, Field(strict=True, ge=-(2**63), lt=2**63)]
Side = Annotated[int, Field(strict=True, ge=1, lt=2**16)]  # px
Coordinate = Annotated[float, Field(ge=-1e5, le=1e5)]
Polygon = list[Coordinate]


class Rle(TypedDict):
    """A run-length encoded mask of image size: `counts` is a list of run lengths, or COCO's compressed string."""

    size: Annotated[list[Side], Field(min_length=2, max_length=2)]
    counts: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[Annotated[int, Field(strict=True, ge=0, lt=2**32)]], Tag("numbers")],
        Discriminator(lambda counts: "text" if isinstance(counts, str) else "numbers"),
    ]


class _ExtensibleDict(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]


class Image(_ExtensibleDict):
    """One entry of `images`; sizes in pixels."""

    id: Id
    file_name: str
    height: Side
    width: Side


class Annotation(_ExtensibleDict):
    """One entry of `annotations`; the box is `(x, y, width, height)`."""

    id: Id
    image_id: Id
    category_id: Id
    bbox: Annotated[list[Coordinate], Field(min_length=4, max_length=4)]
    segmentation: NotRequired[  # without it, or with null or an empty list, the object has a box alone
        Annotated[
            Annotated[list[Polygon], Tag("polygons")] | Annotated[Rle, Tag("rle")],
            Discriminator(lambda mask: "rle" if isinstance(mask, dict) else "polygons"),
        ]
        | None
    ]
    iscrowd: NotRequired[Literal[0, 1]]
    area: NotRequired[Annotated[float, Field(ge=0, allow_inf_nan=False)]]


class Category(_ExtensibleDict):
    """One entry of `categories`."""

    id: Id
    name: str


class CocoFile(_ExtensibleDict):
    """The whole annotation file."""

    images: list[Image]
    annotations: list[Annotation]
    categories: list[Category]


_SCHEMA = TypeAdapter(CocoFile)


def read_coco_json(path: Path) -> dict[str, Any]:
    """Return the content of a COCO annotation file.

    The file must match the schema, ids must be unique, and annotations must refer to existing images and categories.

    Raises:
        InputError: the file cannot be read or is invalid. The message counts all problems and lists the first ones
            with the position and id of the entry.
    """
    data = parse_coco_json(path)
    refuse(path, [finding.message for finding in id_faults(data)])
    return data


def parse_coco_json(path: Path) -> dict[str, Any]:
    """Return the content of a COCO annotation file that matches the schema; ids are not checked.

    Raises:
        InputError: the file cannot be read or does not match the schema.
    """
    try:
        text = read_file(path)
    except OSError as error:
        raise InputError(
            f"{path.absolute()}: cannot read the annotation file ({error.strerror}). Put the file there, or set "
            "`annotations` in the config; datasets/README.md says how to get COCO and how to use your own data."
        ) from None
    try:
        data = _SCHEMA.validate_json(text)
    except ValidationError as error:
        raise InputError(_schema_message(path, text, error)) from None
    return dict(data)


def refuse(path: Path, problems: Sequence[str], advice: str = "") -> None:
    """Raise InputError that lists the problems of a file, followed by `advice`; do nothing if there are none."""
    if problems:
        raise InputError(f"{path.absolute()}: {listed(problems)}{advice}")


def listed(problems: Sequence[str]) -> str:
    """Return the number of problems, followed by the first problems, one per line."""
    count = "1 problem:" if len(problems) == 1 else f"{len(problems)} problems:"
    return "\n  ".join([count, *first_of(problems)])


def _schema_message(path: Path, text: bytes, error: ValidationError) -> str:
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    if errors[0]["type"] == "json_invalid":
        return f"{path.absolute()}: is not JSON ({errors[0]['msg'].removeprefix('Invalid JSON: ')})"
    raw = from_json(text)
    problems = [f"{_position(raw, details['loc'])}: {details['msg'].lower()}" for details in errors]
    return f"{path.absolute()}: is not a COCO annotation file; {listed(problems)}"


def _position(raw: Any, location: tuple[int | str, ...]) -> str:
    """Return the position of an error in the file, such as `annotations[3] (id 17).bbox[2]`."""
    keys = [key for key in location if key not in ("polygons", "rle", "text", "numbers")]  # without the schema's tags
    names = [f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys]
    if len(keys) >= 2 and isinstance(entry := raw[keys[0]][keys[1]], dict) and "id" in entry:
        names.insert(2, f" (id {entry['id']})")
    return "".join(names).removeprefix(".") or "the file"


def id_faults(data: Mapping[str, Any]) -> list[Finding]:
    """Return ids that are used twice, and annotations of unknown images and categories."""
    return [*_repeated_ids(data), *_dangling_references(data)]


def _repeated_ids(data: Mapping[str, Any]) -> Iterable[Finding]:
    entries: dict[str, Sequence[Any]] = {
        "image": data["images"],
        "annotation": data["annotations"],
        "category": data["categories"],
    }
    for name, records in entries.items():
        counts = Counter(record["id"] for record in records)
        texts = [f"{name} id {key} is used {count} times" for key, count in counts.items() if count > 1]
        yield from (Finding("duplicate_id", text) for text in texts)


def _dangling_references(data: Mapping[str, Any]) -> Iterable[Finding]:
    images = {image["id"] for image in data["images"]}
    categories = {category["id"] for category in data["categories"]}
    for annotation in data["annotations"]:
        if annotation["image_id"] not in images:
            text = f"no image has the id {annotation['image_id']}"
            yield Finding("dangling_id", text, annotation_ids=(annotation["id"],))
        if annotation["category_id"] not in categories:
            text = f"no category has the id {annotation['category_id']}"
            yield Finding("dangling_id", text, annotation_ids=(annotation["id"],))


def complete_for_evaluation(data: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of `data` with `iscrowd` and `area` in every annotation, as pycocotools requires.

    A missing `iscrowd` becomes 0. A missing `area` is computed from the mask, or from the box if there is no mask.
    """
    sizes = {image["id"]: (image["height"], image["width"]) for image in data["images"]}
    annotations = [{"iscrowd": 0, **annotation} for annotation in data["annotations"]]
    for annotation in annotations:
        if "area" not in annotation:
            annotation["area"] = _area(annotation, *sizes[annotation["image_id"]])
    return {**data, "annotations": annotations}


def _area(annotation: dict[str, Any], height: int, width: int) -> float:
    mask = annotation.get("segmentation") or []
    if isinstance(mask, dict):
        return float(run_lengths(mask["counts"])[1::2].sum())
    polygons = [polygon for polygon in mask if len(polygon) >= 6]
    if not polygons:
        return float(annotation["bbox"][2] * annotation["bbox"][3])
    return float(cocoapi.area(cocoapi.merge(cocoapi.frPyObjects(polygons, height, width))))


def fit_in_image(lengths: np.ndarray, height: int, width: int) -> bool:
    """Return whether run lengths, int64, are those of a mask of this size. No sum of hostile lengths overflows."""
    area = height * width
    return bool(((lengths >= 0) & (lengths <= area)).all() and lengths.sum() == area)


def run_lengths(counts: str | list[int]) -> np.ndarray:
    """Return the run lengths of an `Rle`, int64.

    Raises:
        ValueError: the compressed string is empty or truncated.
    """
    if isinstance(counts, str):
        return counts_from_string(counts.encode("ascii", "replace"))
    return np.array(counts, np.int64)
