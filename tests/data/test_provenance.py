"""What a run records about its data."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from PIL import Image

from maskrcnn.data.coco import CocoConfig
from maskrcnn.data.provenance import count_and_ids, describe
from maskrcnn.data.shapes import ShapesConfig


def described(folder: Path, **changes: Any) -> dict[str, str]:
    """Describe a dataset of four images: an object, a crowd region, a box without area, and nothing."""
    folder.mkdir(exist_ok=True)
    square = [[4, 5, 8, 5, 8, 9, 4, 9]]
    entry = {"category_id": 1, "bbox": [4, 5, 4, 4], "segmentation": square}
    crowd = {"iscrowd": 1, "segmentation": {"size": [20, 30], "counts": [600]}}
    names = changes.pop("names", ["1.png", "2.png", "3.png", "4.png"])
    data = {
        "images": [{"id": n + 1, "file_name": name, "height": 20, "width": 30} for n, name in enumerate(names)],
        "annotations": [
            {"id": 11, "image_id": 1, **entry},
            {"id": 12, "image_id": 2, **entry, **crowd},
            {"id": 13, "image_id": 3, **entry, "bbox": [4, 5, 0, 4]},
        ],
        "categories": [{"id": 1, "name": "leaf"}],
    }
    (folder / "a.json").write_text(json.dumps(data))
    for name in names:
        Image.new("RGB", (30, 20)).save(folder / name)
    return describe(CocoConfig(root=folder, annotations="a.json", images="", degenerate="drop", **changes).build())


def test_files_have_digests_and_what_was_dropped_is_listed(tmp_path: Path) -> None:
    text = described(tmp_path, filter_empty=True)
    assert text.pop("images").startswith("1, sha256 of their ids ")
    assert text.pop("files").startswith(f"in {tmp_path.name}, sha256 of their names ")
    assert text == {
        "annotations": f"a.json, sha256 {hashlib.sha256((tmp_path / 'a.json').read_bytes()).hexdigest()}",
        "dropped crowd regions": "1 (ids 12)",
        "dropped degenerate objects": "1 (ids 13)",
        "dropped images without objects": "3 (ids 2, 3, 4)",
    }


def test_other_images_have_another_description(tmp_path: Path) -> None:
    whole = described(tmp_path)
    assert described(tmp_path) == whole
    assert described(tmp_path, crowd="ignore").keys() == whole.keys() - {"dropped crowd regions"}
    assert described(tmp_path, image_ids=(1, 2))["images"] != whole["images"]
    renamed = described(tmp_path, names=["5.png", "2.png", "3.png", "4.png"])
    assert renamed["images"] == whole["images"]
    assert renamed["files"] != whole["files"]


def test_the_folder_may_differ_between_machines(tmp_path: Path) -> None:
    one, other = (described(tmp_path / name) for name in ("one", "other"))
    assert {key for key in one if one[key] != other[key]} == {"files"}


def test_many_ids_are_cut() -> None:
    assert count_and_ids(range(1000)) == "1000 (ids 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...)"


def test_generated_data_have_their_parameters() -> None:
    text = describe(ShapesConfig(length=2, seed=5, classes=("disc", "ring")).build())
    assert text["generated"].startswith("shapes; seed 5; image_size (128, 128); objects (2, 6); ")
    assert text["generated"].endswith("; classes disc, ring")
