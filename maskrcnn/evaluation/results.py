"""Detections as COCO results: boxes and masks in pixels of the original image, and the file that holds them.

Shapes: B images, D detections, M mask side.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from maskrcnn.data.coco_file import Rle
from maskrcnn.data.rle import counts_from_string
from maskrcnn.errors import InputError
from maskrcnn.ops.masks import PasteConvention, encode_masks
from maskrcnn.structures import Batch, ClassTable, Detections

SHOWN = 5  # problems that a message lists before it only counts them

Number = Annotated[float, Field(allow_inf_nan=False)]


class CocoResult(TypedDict):
    """One detection. The box is `(x, y, width, height)`; `coco_results` gives both the box and the mask."""

    image_id: int
    category_id: int
    score: Number
    bbox: NotRequired[Annotated[list[Number], Field(min_length=4, max_length=4)]]
    segmentation: NotRequired[Rle]


_SCHEMA = TypeAdapter(list[CocoResult])


def coco_results(
    detections: Detections, batch: Batch, classes: ClassTable, paste: PasteConvention = "exact"
) -> list[dict[str, Any]]:
    """Bring the detections of a batch back to the original images, in the form of COCO's results files.

    Boxes are divided by the image's scale and clipped to the original image, and masks are pasted there.

    Args:
        detections: in pixels of the resized images.
        batch: the images that they were found in.
        classes: category ids of the labels.
        paste: how masks become pixels; see `maskrcnn.ops.masks.paste_probabilities`.

    Returns:
        `{"image_id", "category_id", "bbox", "score", "segmentation"}` of each detection, image by image, best first.
    """
    # `Detections.to` does not wait for copies from a GPU; `Tensor.cpu` does.
    boxes, scores, labels, masks = (
        tensor.cpu() for tensor in (detections.boxes, detections.scores, detections.labels, detections.masks)
    )
    results = []
    for b, image_id in enumerate(batch.image_ids):
        found = labels[b] > 0
        height, width = batch.original_sizes[b]
        original = _original_boxes(boxes[b][found], batch.scales[b], height, width)
        columns = zip(
            labels[b][found].tolist(),
            _xyxy_to_xywh(original).tolist(),
            scores[b][found].tolist(),
            encode_masks(masks[b][found], original, height, width, convention=paste),
            strict=True,
        )
        results += [
            {
                "image_id": image_id,
                "category_id": classes.category_ids[label - 1],
                "bbox": box,
                "score": score,
                "segmentation": mask,
            }
            for label, box, score, mask in columns
        ]
    return results


def _original_boxes(boxes: Tensor, scale: tuple[float, float], height: int, width: int) -> Tensor:
    return (boxes / boxes.new_tensor([*scale, *scale])).clamp(
        min=boxes.new_zeros(4), max=boxes.new_tensor([width, height, width, height])
    )


def _xyxy_to_xywh(boxes: Tensor) -> Tensor:
    xywh = boxes.clone()
    xywh[:, 2:] -= boxes[:, :2]
    return xywh


def write_results(path: Path, results: Iterable[dict[str, Any]]) -> None:
    """Write a COCO results file, one result a line, as they come from `results`.

    The file appears under its name when it is complete; until then it is `<name>.partial`.
    """
    partial = path.with_name(path.name + ".partial")
    separator = "[\n"
    with partial.open("w", encoding="utf-8") as file:
        for result in results:
            file.write(separator + json.dumps(result))
            separator = ",\n"
        file.write("[]\n" if separator == "[\n" else "\n]\n")
    os.replace(partial, path)


def read_results(path: Path) -> list[dict[str, Any]]:
    """Read and check a COCO results file: a list of boxes, of masks as run-length codes, or of both.

    Raises:
        InputError: it names the file and lists the first of all problems, each with the place of the result.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path.absolute()}: cannot read the results file ({error.strerror})") from None
    try:
        results = _SCHEMA.validate_json(text)
    except ValidationError as error:
        raise InputError(_schema_message(path, error)) from None
    problems = [f"[{place}]: {problem}" for place, result in enumerate(results) if (problem := _flaw(result))]
    if problems:
        raise InputError(_message(path, problems))
    return [dict(result) for result in results]


def _flaw(result: CocoResult) -> str | None:
    """What the schema cannot see: nothing to measure, or run lengths that do not fill their image."""
    if "segmentation" not in result:
        return None if "bbox" in result else "has neither 'bbox' nor 'segmentation'"
    height, width = result["segmentation"]["size"]
    counts = result["segmentation"]["counts"]
    try:
        if isinstance(counts, str):
            lengths = counts_from_string(counts.encode("ascii", "replace"))
        else:
            lengths = np.array(counts, np.int64)
    except ValueError as error:
        return f"segmentation: {error}"
    if (lengths < 0).any() or lengths.sum() != height * width:
        return f"segmentation: its run lengths do not add up to its size, {height} x {width}"
    return None


def _schema_message(path: Path, error: ValidationError) -> str:
    found = error.errors(include_url=False, include_input=False, include_context=False)
    if found[0]["type"] == "json_invalid":
        return f"{path.absolute()}: is not JSON ({found[0]['msg'].removeprefix('Invalid JSON: ')})"
    if not found[0]["loc"]:
        return f"{path.absolute()}: is not a COCO results file, which is a list of detections"
    return _message(path, [f"{_place(problem['loc'])}: {problem['msg'].lower()}" for problem in found])


def _place(location: tuple[int | str, ...]) -> str:
    """Write where in the file a problem lies: `[3].bbox[2]`."""
    keys = [key for key in location if key not in ("text", "numbers")]  # the schema's own tags
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)


def _message(path: Path, problems: list[str]) -> str:
    more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    listed = "\n  ".join(["", *problems[:SHOWN], *more])
    return f"{path.absolute()}: is not a COCO results file; problems by the place in the list:{listed}"
