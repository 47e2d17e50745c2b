"""LVIS and COCO files, with their images checked."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from label_files import CLASSES, HEIGHT, WIDTH, assert_same, convert, masks_of, outlines, write_scenes

from maskrcnn.data.coco import CocoConfig
from maskrcnn.errors import InputError
from maskrcnn.evaluation.lvis import lvis_figures


def lvis(folder: Path) -> dict[str, Any]:
    """Write scenes as images of COCO, and return their annotations as LVIS v1 has them."""
    scenes = write_scenes(folder / "val2017")
    images = [
        {
            "id": 100 + number, "height": HEIGHT, "width": WIDTH, "neg_category_ids": [9],
            "not_exhaustive_category_ids": [], "coco_url": f"http://images.cocodataset.org/val2017/{scene.name}",
        }
        for number, scene in enumerate(scenes)
    ]  # fmt: skip
    annotations = [
        {
            "id": len(scenes) * 1000 + number, "image_id": image["id"], "category_id": 5 + CLASSES.index(name),
            "segmentation": [[value for point in ring for value in point] for ring in outlines(mask)],
            "area": float(mask.sum()), "bbox": [0.0, 0.0, 9.0, 9.0],
        }
        for image, scene in zip(images, scenes, strict=True)
        for number, (name, mask) in enumerate(scene.objects, start=10 * image["id"])
    ]  # fmt: skip
    categories = [{"id": i, "name": name, "frequency": "r", "synset": "x"} for i, name in enumerate(CLASSES, start=5)]
    return {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": categories}


def write(folder: Path, data: Any) -> Path:
    (folder / "lvis.json").write_text(json.dumps(data))
    return folder / "lvis.json"


def test_what_differs_from_coco(tmp_path: Path) -> None:
    source = lvis(tmp_path)
    data = convert("lvis", write(tmp_path, copy.deepcopy(source)))[""]
    assert [image.pop("file_name") for image in data["images"]] == [
        f"val2017/photo_{number}.png" for number in range(3)
    ]
    assert [entry.pop("iscrowd") for entry in data["annotations"]] == [0] * len(data["annotations"])
    assert data == source


def test_the_result_is_a_dataset(tmp_path: Path) -> None:
    data = convert("lvis", write(tmp_path, lvis(tmp_path)))[""]
    (tmp_path / "coco.json").write_text(json.dumps(data))
    dataset = CocoConfig(root=tmp_path, annotations="coco.json", images=".").build()  # type: ignore[arg-type]
    assert dataset.classes.names == CLASSES
    assert lvis_figures(dataset.ground_truth(), [])["mask_APr"] == 0
    scenes = write_scenes(tmp_path / "again")
    assert_same(masks_of(data), scenes)
    again = convert("coco", tmp_path / "coco.json")
    assert again == {"": data}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("images", 0, "coco_url"), "http://x/../secret.jpg", r"lvis\.json: the image '\.\./secret\.jpg' lies outside"),
        (("images", 0, "coco_url"), "http://x/val2017/9.jpg", r"lvis\.json: there is no image 'val2017/9\.jpg' in"),
        (("images", 0, "height"), 61, r"lvis\.json: the image val2017/photo_0\.png has 88 x 60 .* is for 88 x 61"),
        (
            ("images", 0, "neg_category_ids"),
            None,
            r"is not an LVIS annotation file; .*\n  images\[0\]\.neg",
        ),
        (("annotations", 0, "image_id"), 7, r"lvis\.json: 1 problem:\n  annotation \d+: no image has the id 7"),
        (("categories", 0, "id"), 6, r"category id 6 is used 2 times"),
        (("annotations",), {}, r"lvis\.json: is not an LVIS annotation file"),
    ],
)
def test_wrong_files(tmp_path: Path, path: tuple[Any, ...], value: Any, message: str) -> None:
    data = lvis(tmp_path)
    parent: Any = data
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    with pytest.raises(InputError, match=message):
        convert("lvis", write(tmp_path, data))


def test_no_name_and_given_classes(tmp_path: Path) -> None:
    data = lvis(tmp_path)
    del data["images"][1]["coco_url"]
    with pytest.raises(InputError, match=r"image 101 has neither coco_url nor file_name"):
        convert("lvis", write(tmp_path, data))
    data["images"][1]["file_name"] = "val2017/photo_1.png"
    with pytest.raises(InputError, match=r"the file has its classes and their ids; omit --classes"):
        convert("lvis", write(tmp_path, data), classes="disc")
