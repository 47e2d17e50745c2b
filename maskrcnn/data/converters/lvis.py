"""LVIS v1 JSON, which differs from COCO's in three ways.

An image has no `file_name`: it is the end of its `coco_url`, such as `val2017/000000000139.jpg`, because the splits of
LVIS mix those of COCO. Objects have no `iscrowd`; it becomes 0. What LVIS alone has stays as it is: `neg_category_ids`
and `not_exhaustive_category_ids` of images, `frequency` and `synset` of categories. Ids and the order of classes stay.
"""

from __future__ import annotations

from pydantic import ConfigDict, TypeAdapter
from typing_extensions import NotRequired, TypedDict

from maskrcnn.data.coco_file import Annotation, Category, Id, Side, id_faults, refuse
from maskrcnn.data.converters.coco import with_checked_images
from maskrcnn.data.converters.conversion import CocoData, Conversion
from maskrcnn.data.converters.reading import read_json
from maskrcnn.errors import InputError


class _ExtensibleDict(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]


class LvisImage(_ExtensibleDict):
    """One entry of `images`."""

    id: Id
    height: Side
    width: Side
    coco_url: NotRequired[str]
    file_name: NotRequired[str]  # of LVIS v0.5
    neg_category_ids: list[Id]
    not_exhaustive_category_ids: list[Id]


class LvisFile(_ExtensibleDict):
    """The whole file."""

    images: list[LvisImage]
    annotations: list[Annotation]
    categories: list[Category]


_SCHEMA = TypeAdapter(LvisFile)


def read(conversion: Conversion) -> dict[str, CocoData]:
    """Return the content of a file, with the name of each image."""
    data = read_json(conversion.source, _SCHEMA, "an LVIS annotation file", most=None)
    refuse(conversion.source, [finding.message for finding in id_faults(data)])
    images = [{**image, "file_name": _file_name(image, conversion)} for image in data["images"]]
    annotations = [{"iscrowd": 0, **annotation} for annotation in data["annotations"]]
    return {"": with_checked_images({**data, "images": images, "annotations": annotations}, conversion)}


def _file_name(image: LvisImage, conversion: Conversion) -> str:
    if "file_name" in image:
        return image["file_name"]
    if "coco_url" not in image:
        raise InputError(f"{conversion.source}: image {image['id']} has neither coco_url nor file_name")
    return "/".join(image["coco_url"].split("/")[-2:])
