from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from maskrcnn.data.coco_file import complete_for_evaluation, read_coco_json
from maskrcnn.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools under numpy 2

HEIGHT, WIDTH = 20, 30
SQUARE = [4.0, 5.0, 8.0, 5.0, 8.0, 9.0, 4.0, 9.0]


def annotation(annotation_id: int, **changes: Any) -> dict[str, Any]:
    entry = {"id": annotation_id, "image_id": 1, "category_id": 1, "bbox": [4, 5, 4, 4], "segmentation": [SQUARE]}
    return {**entry, **changes}


def coco(annotations: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "images": [{"id": 1, "file_name": "1.png", "height": HEIGHT, "width": WIDTH}],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "leaf"}],
    }


Write = Callable[[Any], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(data: Any) -> Path:
        path = tmp_path / "objects.json"
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        return path

    return write


def test_a_missing_file_is_named_and_the_way_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"instances_train2017\.json: cannot read .* datasets/README\.md"):
        read_coco_json(tmp_path / "instances_train2017.json")
    with pytest.raises(InputError, match="cannot read"):
        read_coco_json(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{", r"objects\.json: is not JSON"),
        ("", r"objects\.json: is not JSON"),
        ([], r"not a COCO annotation file; 1 problem:\n  the file: .*object"),
        ({"images": [], "categories": []}, r"annotations: field required"),
        ({**coco([]), "images": {}}, r"images: .*valid array"),
        (coco([{"id": 5}]), r"annotations\[0\] \(id 5\)\.image_id: field required"),
        (coco([annotation(5, bbox=[1, 2, 3])]), r"annotations\[0\] \(id 5\)\.bbox: .*at least 4 items"),
        (coco([annotation(5, bbox=[1, 2, 3, float("nan")])]), r"bbox\[3\]: .*(greater|finite|less)"),
        (coco([annotation(5, segmentation=[["a"]])]), r"\(id 5\)\.segmentation\[0\]\[0\]: .*valid number"),
        (coco([annotation(5, segmentation=[[1e9] * 6])]), r"segmentation\[0\]\[0\]: .*less than"),
        (coco([annotation(5, segmentation={"counts": "1"})]), r"segmentation\.size: field required"),
        (coco([annotation(5, segmentation={"size": [1, 1], "counts": [-1, 2]})]), r"counts\[0\]: .*greater"),
        (coco([annotation(5, iscrowd=2)]), r"iscrowd: input should be 0 or 1"),
        (coco([annotation(2**70)]), r"annotations\[0\].*\.id: .*less than"),
        (coco([annotation(True)]), r"annotations\[0\] \(id True\)\.id: .*valid integer"),
        (coco([annotation(5, image_id=-(2**70))]), r"\(id 5\)\.image_id: .*greater than"),
        (coco([annotation(5, category_id=False)]), r"\(id 5\)\.category_id: .*valid integer"),
        (coco([annotation(5, image_id=1.5)]), r"\(id 5\)\.image_id: .*valid integer"),
        (coco([annotation(5, area=float("inf"))]), r"\(id 5\)\.area: .*finite"),
        (coco([annotation(5, segmentation={"size": [2**40, 1], "counts": "1"})]), r"size\[0\]: .*less than"),
        (coco([annotation(5, segmentation={"size": [1, 1], "counts": [2**64]})]), r"counts\[0\]: .*less than"),
        ({**coco([]), "images": [{"id": 1, "file_name": "a", "height": 2**70, "width": 1}]}, r"height: .*less than"),
        ('{"images": ' + "[" * 10_000, "is not JSON .recursion limit"),
        ('{"images": ' + "1" * 10_000, "is not JSON .number out of range"),
        ('{"images": "\\ud800"', "is not JSON"),
        (coco([annotation(5), annotation(5)]), r"annotation id 5 is used 2 times"),
        (coco([annotation(5, image_id=3)]), r"annotation 5: no image has the id 3"),
        (coco([annotation(5, category_id=3)]), r"annotation 5: no category has the id 3"),
    ],
)
def test_what_is_not_coco_is_refused(write: Write, data: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_coco_json(write(data))


def test_a_byte_order_mark_is_accepted_and_a_pipe_is_not(tmp_path: Path) -> None:
    (tmp_path / "objects.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(coco([annotation(5)])).encode())
    assert read_coco_json(tmp_path / "objects.json") == coco([annotation(5)])
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(InputError, match=r"pipe\.json: cannot read the annotation file \(it is a pipe"):
        read_coco_json(tmp_path / "pipe.json")


def test_all_problems_are_counted_and_ten_are_shown(write: Write) -> None:
    with pytest.raises(InputError) as error:
        read_coco_json(write(coco([annotation(i, image_id=-1) for i in range(25)])))
    lines = str(error.value).splitlines()
    assert lines[0].endswith("objects.json: 25 problems:")
    assert len(lines) == 12
    assert lines[-1] == "  and 15 more"


@pytest.mark.parametrize(
    ("segmentation", "area"),
    [(None, 16.0), ([SQUARE], 16.0), ({"size": [HEIGHT, WIDTH], "counts": [3, 7, 590]}, 7.0), ([], 16.0)],
    ids=["no mask", "polygon", "rle", "no polygon"],
)
def test_area_is_filled_in_where_it_is_missing(segmentation: Any, area: float) -> None:
    entry = annotation(1, segmentation=segmentation)
    assert complete_for_evaluation(coco([entry]))["annotations"][0]["area"] == area
    assert complete_for_evaluation(coco([{**entry, "area": 3}]))["annotations"][0]["area"] == 3
