"""LabelMe files to COCO."""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from label_files import CLASSES, HEIGHT, WIDTH, assert_same, convert, masks_of, outlines, write_scenes
from PIL import Image

from maskrcnn.data.converters import labelme
from maskrcnn.data.converters.conversion import Conversion
from maskrcnn.errors import InputError


def content(shapes: list[dict[str, Any]], image: str = "photo_0.png", **fields: Any) -> dict[str, Any]:
    return {
        "version": "5.4.1", "flags": {}, "shapes": shapes, "imagePath": image, "imageData": None,
        "imageHeight": HEIGHT, "imageWidth": WIDTH, **fields,
    }  # fmt: skip


def shape(kind: str, points: Any, label: str = "disc", **fields: Any) -> dict[str, Any]:
    return {"label": label, "points": points, "group_id": None, "shape_type": kind, "flags": {}, **fields}


def mask_shape(mask: np.ndarray, label: str = "disc") -> dict[str, Any]:
    """Return the shape that LabelMe writes for a mask: the PNG of its bounding box, and two corners inside of it."""
    rows, columns = mask.nonzero()
    x1, x2, y1, y2 = columns.min(), columns.max(), rows.min(), rows.max()
    file = io.BytesIO()
    Image.fromarray(mask[y1 : y2 + 1, x1 : x2 + 1]).save(file, "PNG")
    text = base64.b64encode(file.getvalue()).decode()
    return shape("mask", [[float(x1), float(y1)], [float(x2), float(y2)]], label, mask=text)


def write(folder: Path, shapes: list[dict[str, Any]], **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    if not (folder / "photo_0.png").exists():
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "photo_0.png")
    (folder / "photo_0.json").write_text(json.dumps(content(shapes, **fields)))
    return folder


def test_masks_pixel_by_pixel(tmp_path: Path) -> None:
    scenes = write_scenes(tmp_path)
    for scene in scenes:
        shapes = [mask_shape(mask, name) for name, mask in scene.objects]
        (tmp_path / scene.name).with_suffix(".json").write_text(json.dumps(content(shapes, scene.name)))
    data = convert("labelme", tmp_path)[""]
    assert [category["name"] for category in data["categories"]] == sorted(CLASSES)
    assert_same(masks_of(data), scenes)


def test_polygons_in_groups(tmp_path: Path) -> None:
    """A polygon along the edges of pixels, one for each part; holes are cut free through a line of no width."""
    scenes = write_scenes(tmp_path / "photos")
    (tmp_path / "json").mkdir()
    for scene in scenes:
        shapes = [
            shape("polygon", ring, name, group_id=number)
            for number, (name, mask) in enumerate(scene.objects)
            for ring in outlines(mask)
        ]
        path = tmp_path / "json" / f"{Path(scene.name).stem}.json"
        path.write_text(json.dumps(content(shapes, f"..\\photos\\{scene.name}")))
    data = convert("labelme", tmp_path / "json", tmp_path / "photos", "ring,disc,cross")[""]
    assert [category["name"] for category in data["categories"]] == ["ring", "disc", "cross"]
    assert all(isinstance(entry["segmentation"], list) for entry in data["annotations"])
    assert_same(masks_of(data), scenes)


def test_rectangles_and_circles(tmp_path: Path) -> None:
    write(tmp_path, [shape("rectangle", [[30, 20], [10, 5]]), shape("circle", [[40.5, 30.5], [50.75, 30.5]], "ring")])
    data = convert("labelme", tmp_path / "photo_0.json")[""]
    (_, rectangle), (_, circle) = masks_of(data)["photo_0.png"]
    assert data["annotations"][0]["segmentation"] == [[30, 20, 10, 20, 10, 5, 30, 5]]
    assert data["annotations"][0]["bbox"] == [10, 5, 20, 15]
    assert rectangle[5:20, 10:30].all()
    assert rectangle.sum() == 300
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    assert (circle == (np.hypot(rows - 30, columns - 40) <= 10.25)).all()


KINDS = ("point", "line", "polygon", "circle")


def test_what_has_no_area_is_left_out_and_said(tmp_path: Path) -> None:
    shapes = [
        shape("point", [[1, 1]]),
        shape("line", [[1, 1], [2, 2]]),
        shape("polygon", [[1, 1], [2, 2]]),
        shape("circle", [[1, 1], [1, 1]]),
        shape("circle", [[1, 1], [1.2, 1]]),
        shape("rectangle", [[1, 1], [9, 9]]),
    ]
    conversion = Conversion(write(tmp_path, shapes))
    assert len(labelme.read(conversion)[""]["annotations"]) == 1
    kinds = [notice.split(" without")[0] for notice in conversion.notices()]
    assert kinds == [f"{count} shapes of type {kind}" for count, kind in zip((1, 1, 1, 2), KINDS, strict=True)]


def test_a_polygon_and_a_mask_of_a_group_are_one_object(tmp_path: Path) -> None:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[30:40, 30:50] = True
    part = {**mask_shape(mask), "group_id": 3}
    write(tmp_path, [shape("rectangle", [[0, 0], [10, 10]], group_id=3), part, shape("rectangle", [[0, 0], [4, 4]])])
    data = convert("labelme", tmp_path)[""]
    (_, both), _ = masks_of(data)["photo_0.png"]
    expected = mask.copy()
    expected[:10, :10] = True
    assert (both == expected).all()
    assert data["annotations"][0]["bbox"] == [0, 0, 50, 40]


PNG = mask_shape(np.ones((HEIGHT, WIDTH), bool))


@pytest.mark.parametrize(
    ("shapes", "fields", "message"),
    [
        ([], {"imagePath": "other.png"}, r"photo_0\.json: there is no image 'other\.png' in "),
        ([], {"imagePath": "../../../etc/passwd"}, r"photo_0\.json: there is no image 'passwd' in "),
        ([], {"imageHeight": 61}, r"photo_0\.json: the image photo_0\.png has 88 x 60 .* is for 88 x 61"),
        ([], {"imagePath": 3}, r"photo_0\.json: is not a LabelMe file; 1 problem:\n  imagePath: .*valid string"),
        ([shape("polygon", [[1]])], {}, r"shapes\[0\]\.points\[0\]: .*at least 2"),
        ([shape("circle", [[1, 1]])], {}, r"photo_0\.json: shapes\[0\]: a circle has two points, not 1"),
        ([shape("polygon", [[0, 0], [1, 1], [2e5, 0]])], {}, r"shapes\[0\]: a coordinate is not a number from -100000"),
        ([shape("polygon", [[0, 0], [math.nan, 1]])], {}, r"photo_0\.json: is not (JSON|a LabelMe file)"),
        ([shape("polygon", [[0, 0], [1e5, 1e5]] * 50)], {}, r"shapes\[0\]: the outline is longer than 4e\+06 px"),
        ([{**PNG, "mask": "?"}], {}, r"shapes\[0\]: its mask is not base64"),
        ([{**PNG, "mask": "AAAA"}], {}, r"shapes\[0\]: the PNG of its mask: cannot be read as a label image"),
        ([{**PNG, "points": [[1, 0], [9, 9]]}], {}, r"shapes\[0\]: its mask of 88 x 60 pixels at \(1, 0\) reaches out"),
    ],
)
def test_wrong_files(tmp_path: Path, shapes: list[dict[str, Any]], fields: dict[str, Any], message: str) -> None:
    write(tmp_path, shapes, **fields)
    with pytest.raises(InputError, match=message):
        convert("labelme", tmp_path)


def test_deep_json_and_other_json(tmp_path: Path) -> None:
    write(tmp_path, [])
    (tmp_path / "photo_0.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"photo_0\.json: is not JSON \(recursion limit exceeded"):
        convert("labelme", tmp_path)
    (tmp_path / "photo_0.json").write_text("{}")
    with pytest.raises(InputError, match=r"photo_0\.json: is not a LabelMe file; 2 problems"):
        convert("labelme", tmp_path)


def test_an_image_that_is_annotated_twice(tmp_path: Path) -> None:
    write(tmp_path, [])
    (tmp_path / "again.json").write_text((tmp_path / "photo_0.json").read_text())
    with pytest.raises(InputError, match=r"the image photo_0\.png is annotated twice"):
        convert("labelme", tmp_path)


def test_no_object_and_no_class(tmp_path: Path) -> None:
    write(tmp_path, [])
    with pytest.raises(InputError, match=r"there is no object, so there is no class; --classes names the classes"):
        convert("labelme", tmp_path)
    assert convert("labelme", tmp_path, classes="disc")[""]["categories"] == [{"id": 1, "name": "disc"}]


def test_a_class_that_was_not_given(tmp_path: Path) -> None:
    write(tmp_path, [shape("rectangle", [[0, 0], [4, 4]])])
    with pytest.raises(InputError, match=r"photo_0\.png has the class 'disc' is not one of disk; did you mean 'disk'"):
        convert("labelme", tmp_path, classes="disk")
