"""What COCO's code takes: ground truth and results, checked against each other and in its form."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pycocotools import mask as cocoapi

from maskrcnn.data.coco_file import complete_for_evaluation, read_coco_json
from maskrcnn.errors import InputError

logger = logging.getLogger(__name__)

IouType = Literal["bbox", "segm"]

SHOWN = 10  # ids that a message lists before it only counts them


def read_ground_truth(ground_truth: dict[str, Any] | Path) -> dict[str, Any]:
    """Return what an annotation file in COCO's format holds, with the keys that own data may lack.

    Raises:
        InputError: the file is not COCO.
    """
    if isinstance(ground_truth, dict):
        return complete_for_evaluation(ground_truth)
    return complete_for_evaluation(read_coco_json(ground_truth))


def check_references(data: dict[str, Any], results: Sequence[dict[str, Any]]) -> None:
    """Refuse results of unknown images and masks of another size than their image; warn of unknown categories.

    Raises:
        InputError: it names the images, or the first such mask.
    """
    sizes = {image["id"]: [image["height"], image["width"]] for image in data["images"]}
    if unknown := sorted({result["image_id"] for result in results} - sizes.keys()):
        raise InputError(
            f"the results name {len(unknown)} images that the ground truth lacks (image_id {_listed(unknown)}); "
            "are they of another split?"
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
        logger.warning("results of categories that the ground truth lacks do not count: %s", _listed(unknown))


def _listed(ids: Sequence[int]) -> str:
    return ", ".join(map(str, ids[:SHOWN])) + (", ..." if len(ids) > SHOWN else "")


def measurable(iou_types: Sequence[IouType], results: Sequence[dict[str, Any]]) -> list[IouType]:
    """Leave out masks where results are boxes alone.

    Raises:
        InputError: some results have masks and others not, or masks alone are wanted and there are none.
    """
    masks = sum("segmentation" in result for result in results)
    if "segm" not in iou_types or masks == len(results):
        return list(iou_types)
    if masks > 0:
        raise InputError(f"{len(results) - masks} of {len(results)} results have no 'segmentation'")
    if "bbox" not in iou_types:
        raise InputError("the results have no 'segmentation', so there are no masks to measure")
    logger.info("the results have no masks: boxes are measured alone")
    return ["bbox"]


def coco_objects(kind: IouType, annotations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return copies of the annotations, because COCO's code writes into them, and with ids from 1 on.

    COCO takes a match with id 0 for none.
    """
    if kind == "segm":
        annotations = _with_masks(annotations)
    return [{**annotation, "id": number} for number, annotation in enumerate(annotations, 1)]


def _with_masks(annotations: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out what has no mask, and polygons of fewer than three points, some of which COCO's code reads as boxes."""
    usable, maskless = [], []
    for annotation in annotations:
        mask = annotation.get("segmentation")
        if isinstance(mask, list):
            mask = [polygon for polygon in mask if len(polygon) >= 6]
        if mask:
            usable.append({**annotation, "segmentation": mask})
        else:
            maskless.append(annotation["id"])
    if maskless:
        logger.warning("annotations without a mask are left out of the mask figures: %s", _listed(maskless))
    return usable


def coco_detections(kind: IouType, results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return results in the form of annotations: ids from 1 on, and the area that COCO counts them by."""
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
