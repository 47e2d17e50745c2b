"""Validation of results against the ground truth, and conversion to the input of pycocotools."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pycocotools import mask as cocoapi

from maskrcnn.data.coco_file import complete_for_evaluation, read_coco_json
from maskrcnn.errors import InputError, first_of

logger = logging.getLogger(__name__)

IouType = Literal["bbox", "segm"]


def read_ground_truth(ground_truth: dict[str, Any] | Path) -> dict[str, Any]:
    """Return the content of a COCO annotation file, with `iscrowd` and `area` in every annotation.

    Raises:
        InputError: the file cannot be read or is invalid.
    """
    if isinstance(ground_truth, dict):
        return complete_for_evaluation(ground_truth)
    return complete_for_evaluation(read_coco_json(ground_truth))


def check_references(data: dict[str, Any], results: Sequence[dict[str, Any]]) -> None:
    """Check that image ids and mask sizes match the ground truth; log a warning for unknown categories.

    Raises:
        InputError: results have unknown image ids, or a mask has another size than its image.
    """
    sizes = {image["id"]: [image["height"], image["width"]] for image in data["images"]}
    if unknown := sorted({result["image_id"] for result in results} - sizes.keys()):
        raise InputError(
            f"the results contain {len(unknown)} images that are not in the ground truth "
            f"(image_id {_listed(unknown)}); are they from another split?"
        )
    for result in results:
        size = sizes[result["image_id"]]
        if "segmentation" in result and list(result["segmentation"]["size"]) != size:
            raise InputError(
                f"the results have a mask of size {list(result['segmentation']['size'])} for image "
                f"{result['image_id']}, whose height and width are {size}"
            )
    categories = {category["id"] for category in data["categories"]}
    if unknown := sorted({result["category_id"] for result in results} - categories):
        logger.warning("results of categories that are not in the ground truth are ignored: %s", _listed(unknown))


def _listed(ids: Sequence[int]) -> str:
    return ", ".join(first_of([str(number) for number in ids]))


def measurable(iou_types: Sequence[IouType], results: Sequence[dict[str, Any]]) -> list[IouType]:
    """Return the IoU types that can be evaluated: without `segm` if no result has a mask.

    Raises:
        InputError: only some results have masks, or `segm` is the only IoU type and no result has a mask.
    """
    num_masks = sum("segmentation" in result for result in results)
    if "segm" not in iou_types or num_masks == len(results):
        return list(iou_types)
    if num_masks > 0:
        raise InputError(f"{len(results) - num_masks} of {len(results)} results have no 'segmentation'")
    if "bbox" not in iou_types:
        raise InputError("the results have no 'segmentation', so there are no masks to measure")
    logger.info("the results have no masks: only boxes are evaluated")
    return ["bbox"]


def coco_objects(kind: IouType, annotations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return copies of the annotations with ids from 1; with `segm`, each has a mask (`_with_masks`).

    The copies are needed because pycocotools modifies annotations. It treats a match with id 0 as no match.
    """
    if kind == "segm":
        annotations = _with_masks(annotations)
    return [{**annotation, "id": number} for number, annotation in enumerate(annotations, 1)]


def _with_masks(annotations: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return annotations that all have a mask, without polygons of fewer than three points.

    An annotation without a mask becomes a crowd region with the shape of its box. So it is not an object to find, and
    detections of its class whose masks lie in the box are neither right nor wrong: at an IoU threshold t, those of
    which at least a part t lies in it. pycocotools has no other way to ignore an object; its `ignore` is overwritten.
    """
    with_masks, without_mask_ids = [], []
    for annotation in annotations:
        mask = annotation.get("segmentation")
        if isinstance(mask, list):  # pycocotools reads a polygon of four numbers as a box
            mask = [polygon for polygon in mask if len(polygon) >= 6]
        if mask:
            with_masks.append({**annotation, "segmentation": mask})
        else:
            x, y, width, height = annotation["bbox"]
            corners = [x, y, x + width, y, x + width, y + height, x, y + height]
            with_masks.append({**annotation, "segmentation": [corners], "iscrowd": 1})
            without_mask_ids.append(annotation["id"])
    if without_mask_ids:
        logger.info(
            "%d annotations have no mask; mask metrics ignore them and what is detected in their boxes: %s",
            len(without_mask_ids),
            _listed(without_mask_ids),
        )
    return with_masks


def coco_detections(kind: IouType, results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return results as annotations, with ids from 1 and the mask area (`segm`) or box area (`bbox`)."""
    if kind == "segm":
        masks = [_compressed(result["segmentation"]) for result in results]
        shapes = [{"segmentation": mask, "area": float(cocoapi.area(mask))} for mask in masks]
    else:
        boxes = [_box(result) for result in results]
        shapes = [{"bbox": box, "area": box[2] * box[3]} for box in boxes]
    return [
        {
            "id": number,
            "image_id": result["image_id"],
            "category_id": result["category_id"],
            "score": result["score"],
            "iscrowd": 0,
            **shape,
        }
        for number, (result, shape) in enumerate(zip(results, shapes, strict=True), 1)
    ]


def _compressed(mask: dict[str, Any]) -> dict[str, Any]:
    return mask if isinstance(mask["counts"], (str, bytes)) else cocoapi.frPyObjects(mask, *mask["size"])


def _box(result: dict[str, Any]) -> list[float]:
    if "bbox" in result:
        return list(result["bbox"])
    if "segmentation" not in result:
        raise InputError(f"a result of image {result['image_id']} has neither 'bbox' nor 'segmentation'")
    return cocoapi.toBbox(_compressed(result["segmentation"])).tolist()
