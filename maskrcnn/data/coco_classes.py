"""The classes of a COCO file that are in use: chosen by name, and renamed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from maskrcnn.data.coco_arrays import CocoArrays
from maskrcnn.data.coco_file import refuse
from maskrcnn.structures import ClassTable

Categories = Sequence[Mapping[str, Any]]


def choose_classes(file: Path, data: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Return the annotation data with only the named categories and their annotations.

    Raises:
        InputError: a name is unknown.
    """
    categories = _chosen(file, data["categories"], names)
    ids = {category["id"] for category in categories}
    annotations = [entry for entry in data["annotations"] if entry["category_id"] in ids]
    return {**data, "categories": categories, "annotations": annotations}


def rename_classes(file: Path, data: dict[str, Any], rename: Mapping[str, str]) -> dict[str, Any]:
    """Return the annotation data with new class names; classes of the same name become one, with the lowest id.

    Raises:
        InputError: a name is unknown.
    """
    categories, class_of = _renamed(file, data["categories"], rename)
    annotations = [
        {**entry, "category_id": class_of[entry["category_id"]]["id"]} if entry["category_id"] in class_of else entry
        for entry in data["annotations"]
    ]
    return {**data, "categories": categories, "annotations": annotations}


def choose_labels(
    file: Path, arrays: CocoArrays, names: tuple[str, ...], rename: Mapping[str, str]
) -> tuple[np.ndarray, ClassTable]:
    """Return the label of each category, 0 for one that is not in use, and the classes, in the order of their ids.

    Args:
        file: the annotation file, for messages.
        arrays: its content.
        names: of the classes to use, as `choose_classes` takes them; empty: all.
        rename: new names, as `rename_classes` takes them.

    Raises:
        InputError: a name is unknown.
    """
    ids = arrays.category_ids.tolist()
    categories: Categories = [{"id": key, "name": arrays.category_name(index)} for index, key in enumerate(ids)]
    if names:
        categories = _chosen(file, categories, names)
    class_of = {category["id"]: category for category in categories}
    if rename:
        categories, class_of = _renamed(file, categories, rename)
    table = ClassTable(
        names=tuple(category["name"] for category in categories),
        category_ids=tuple(category["id"] for category in categories),
    )
    label_of = {key: label for label, key in enumerate(table.category_ids, 1)}
    return np.array([label_of[class_of[key]["id"]] if key in class_of else 0 for key in ids], np.int64), table


def _chosen(file: Path, categories: Categories, names: tuple[str, ...]) -> Categories:
    known = {category["name"] for category in categories}
    refuse(file, [f"`classes` names '{name}', which is not in the file" for name in names if name not in known])
    return [category for category in categories if category["name"] in names]


def _renamed(
    file: Path, categories: Categories, rename: Mapping[str, str]
) -> tuple[Categories, dict[int, Mapping[str, Any]]]:
    """Return the new categories in the order of their ids, one for each name, and that of each old id."""
    known = {category["name"] for category in categories}
    refuse(file, [f"`rename` names '{name}', which is not among the classes" for name in rename if name not in known])
    by_name: dict[str, Mapping[str, Any]] = {}
    class_of = {}
    for category in sorted(categories, key=lambda category: category["id"]):
        name = rename.get(category["name"], category["name"])
        class_of[category["id"]] = by_name.setdefault(name, {**category, "name": name})
    return list(by_name.values()), class_of
