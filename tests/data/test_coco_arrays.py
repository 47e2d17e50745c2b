"""Annotations as flat arrays, by hand and against the entries of real files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as cocoapi

from maskrcnn.data.coco_arrays import CocoArrays, flatten
from maskrcnn.data.coco_file import read_coco_json
from maskrcnn.data.coco_objects import choose_objects, findings_of

TRIANGLE = [1.25, 2.0, 8.0, 2.0, 5.01, 9.99]
BOX = [1.0, 2.0, 7.0, 8.0]


def data(*annotations: dict[str, Any]) -> dict[str, Any]:
    defaults = {"image_id": 4, "category_id": 9, "bbox": BOX}
    return {
        "images": [
            {"id": 9, "file_name": "b/ü.jpg", "height": 20, "width": 30},
            {"id": 4, "file_name": "a.jpg", "height": 10, "width": 12},
            {"id": 7, "file_name": "", "height": 1, "width": 1},
        ],
        "annotations": [{"id": number, **defaults, **entry} for number, entry in enumerate(annotations, 50)],
        "categories": [{"id": 9, "name": "tree"}, {"id": 2, "name": "bush"}],
    }


def test_by_hand() -> None:
    arrays = flatten(
        data(
            {"image_id": 9, "segmentation": [TRIANGLE, TRIANGLE[::-1]]},
            {"segmentation": {"size": [10, 12], "counts": [5, 10, 105]}, "category_id": 2},
            {"image_id": 9, "segmentation": None},
            {"segmentation": [TRIANGLE], "iscrowd": 1},
            {"image_id": 9, "segmentation": [TRIANGLE]},
        )
    )
    assert arrays.image_ids.tolist() == [4, 7, 9]
    assert arrays.image_sizes.tolist() == [[10, 12], [1, 1], [20, 30]]
    assert [arrays.image_name(index) for index in range(3)] == ["a.jpg", "", "b/ü.jpg"]
    assert [(arrays.category_name(index), arrays.category_ids[index]) for index in range(2)] == [
        ("bush", 2),
        ("tree", 9),
    ]
    assert arrays.annotation_starts.tolist() == [0, 2, 2, 5]
    assert arrays.ids.tolist() == [51, 53, 50, 52, 54]
    assert arrays.categories.tolist() == [0, 1, 1, 1, 1]
    assert arrays.crowds.tolist() == [False, True, False, False, False]
    assert arrays.boxes.tolist() == [BOX] * 5
    assert [[each.tolist() for each in arrays.polygons(row)] for row in range(5)] == [
        [], [], [TRIANGLE, TRIANGLE[::-1]], [], [TRIANGLE]
    ]  # fmt: skip
    assert [arrays.run_lengths(row).tolist() for row in range(5)] == [[5, 10, 105], [], [], [], []]
    assert not arrays.malformed


def test_nothing() -> None:
    arrays = flatten({"images": [], "annotations": [], "categories": []})
    assert arrays.annotation_starts.tolist() == [0]
    assert arrays.boxes.shape == (0, 4)
    assert arrays.image_sizes.shape == (0, 2)


def test_masks_that_are_malformed_are_empty() -> None:
    arrays = flatten(
        data(
            {"segmentation": [TRIANGLE]},
            {"segmentation": {"size": [10, 12], "counts": [5]}},
            {"segmentation": [TRIANGLE, [1.0, 2.0, 3.0, 4.0, 5.0]]},
        )
    )
    assert {row: (finding.fault, finding.message) for row, finding in arrays.malformed.items()} == {
        1: ("invalid_rle", "annotation 51 (image 4): its run lengths do not add up to the image size, 10 x 12"),
        2: (
            "invalid_polygon",
            "annotation 52 (image 4): a polygon has an odd number of coordinates; expected x, y pairs",
        ),
    }
    assert [len(arrays.run_lengths(row)) + len(arrays.polygons(row)) for row in range(3)] == [1, 0, 0]
    assert not arrays.short_polygons.any()
    assert not arrays.empty_masks.any()


def test_short_polygons_are_left_out_and_empty_masks_are_marked() -> None:
    outside, line = [40.0, 5.0, 45.0, 5.0, 45.0, 9.0], [1.0, 2.0, 3.0, 4.0]
    masks: list[Any] = [
        [TRIANGLE, line],
        [line, []],
        [outside],
        [outside, TRIANGLE],
        [outside, line],
        {"size": [10, 12], "counts": [5, 0, 115]},
        {"size": [10, 12], "counts": [119, 1]},
        [],
        None,
    ]
    arrays = flatten(data(*({"segmentation": mask} for mask in masks)))
    short, empty = [0, 1, 4], [2, 4, 5]
    assert np.flatnonzero(arrays.short_polygons).tolist() == short
    assert np.flatnonzero(arrays.empty_masks).tolist() == empty
    assert [len(arrays.polygons(row)) for row in range(len(masks))] == [1, 0, 1, 2, 1, 0, 0, 0, 0]
    choice = choose_objects(arrays, np.arange(3), np.array([1, 2]), keep_crowds=False)
    assert choice.objects.rows.tolist() == [0, 3, 6, 7, 8]
    assert choice.objects.labels.tolist() == [2] * 5
    assert choice.objects.has_mask.tolist() == [True, True, True, False, False]
    assert {fault: rows.tolist() for fault, rows in choice.faults.items() if len(rows)} == {
        "short_polygon": short, "empty_mask": empty, "no_mask": [7, 8]
    }  # fmt: skip
    assert [(finding.fault, *finding.annotation_ids) for finding in findings_of(arrays, choice.faults)] == [
        ("short_polygon", 50),
        ("short_polygon", 51),
        ("empty_mask", 52),
        ("empty_mask", 54),
        ("short_polygon", 54),
        ("empty_mask", 55),
        ("no_mask", 57),
        ("no_mask", 58),
    ]


def test_the_first_rule_that_an_annotation_breaks_decides() -> None:
    flat, odd = [1.0, 2.0, 0.0, 8.0], [[1.0, 2.0, 3.0]]
    arrays = flatten(
        data(
            {"image_id": 9, "bbox": flat, "segmentation": odd},
            {"image_id": 9, "segmentation": odd, "iscrowd": 1},
            {"image_id": 9, "bbox": flat, "segmentation": odd, "iscrowd": 1},
            {"image_id": 9, "segmentation": odd},
            {"image_id": 9, "segmentation": odd, "category_id": 2},
            {"image_id": 4, "segmentation": odd},
        )
    )
    images, labels = np.array([2]), np.array([0, 1])
    kept, dropped = (choose_objects(arrays, images, labels, keep_crowds=keep) for keep in (True, False))
    assert [(kept.objects.rows.tolist(), kept.objects.labels.tolist())] == [([2], [-1])]
    assert dropped.objects.rows.tolist() == []
    found = [(finding.fault, *finding.annotation_ids, finding.image_id) for finding in findings_of(arrays, kept.faults)]
    assert found == [("empty_box", 50, 9), ("empty_box", 52, 9), ("invalid_polygon", 53, 9)]
    assert {reason: ids.tolist() for reason, ids in kept.dropped.items()} == {
        "crowd regions": [], "degenerate objects": [50, 52, 53]
    }  # fmt: skip
    assert {reason: ids.tolist() for reason, ids in dropped.dropped.items()} == {
        "crowd regions": [51, 52], "degenerate objects": [50, 53]
    }  # fmt: skip


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_the_arrays_hold_what_the_file_says(shared_data: Path, split: str) -> None:
    content = read_coco_json(shared_data / "coco_subset" / "annotations" / f"instances_{split}.json")
    arrays: CocoArrays = flatten(content)
    entries = {entry["id"]: entry for entry in content["annotations"]}
    assert sorted(arrays.ids.tolist()) == sorted(entries)
    images = {image["id"]: image for image in content["images"]}
    for image, image_id in enumerate(arrays.image_ids.tolist()):
        assert arrays.image_name(image) == images[image_id]["file_name"]
        first, last = arrays.annotation_starts[image : image + 2].tolist()
        for row in range(first, last):
            entry = entries[int(arrays.ids[row])]
            assert entry["image_id"] == image_id
            assert entry["bbox"] == arrays.boxes[row].tolist()
            assert entry["category_id"] == arrays.category_ids[arrays.categories[row]]
            assert entry["iscrowd"] == arrays.crowds[row]
            if not entry["iscrowd"]:
                assert [polygon.tolist() for polygon in arrays.polygons(row)] == entry["segmentation"]


def test_compressed_run_lengths() -> None:
    mask = np.zeros((10, 12), np.uint8, order="F")
    mask[2:5, 3:7] = 1
    code = cocoapi.encode(mask)
    arrays = flatten(data({"segmentation": {"size": [10, 12], "counts": code["counts"].decode()}}))
    assert arrays.run_lengths(0).tolist() == [32, 3, 7, 3, 7, 3, 7, 3, 55]
    assert {array.dtype.kind for array in arrays.arrays().values()} == {"i", "u", "f", "b"}
