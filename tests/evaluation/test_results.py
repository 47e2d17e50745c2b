"""Conversion of detections to COCO results; writing, reading and validation of results files.

Shapes: B images, D detections, M mask side.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask
import pytest
import torch

from maskrcnn.errors import InputError
from maskrcnn.evaluation.average_precision import evaluate
from maskrcnn.evaluation.results import coco_results, read_results, write_results
from maskrcnn.ops.mask_tables import tabulate
from maskrcnn.structures import Batch, ClassTable, Detections, ImageBatch, Targets

CLASSES = ClassTable(names=("cat", "dog"), category_ids=(5, 90))


def make_batch() -> Batch:
    """Return two images without objects: 40 x 60 scaled by 2, and 30 x 50 scaled by 2 in x and 3 in y."""
    images = ImageBatch(
        torch.zeros(2, 3, 96, 128), torch.tensor([[80, 120], [90, 100]]), torch.zeros(2, dtype=torch.int64)
    )
    scales = ((2.0, 2.0), (2.0, 3.0))
    targets = Targets(torch.zeros(2, 1, 4), torch.full((2, 1), -1), tabulate([[], []], scales, 1))
    return Batch((11, 12), images, targets, scales, ((40, 60), (30, 50)))


def make_detections() -> Detections:
    boxes = torch.tensor(
        [[[20.0, 20, 40, 60], [100, 60, 120.5, 80], [0, 0, 0, 0]], [[20, 30, 40, 60], [0] * 4, [0] * 4]]
    )
    scores = torch.tensor([[0.75, 0.5, -torch.inf], [0.25, -torch.inf, -torch.inf]])
    labels = torch.tensor([[2, 1, -1], [1, -1, -1]])
    return Detections(boxes, scores, labels, torch.ones(2, 3, 28, 28))


def test_detections_return_to_the_original_images() -> None:
    results = coco_results(make_detections(), make_batch(), CLASSES)
    assert [(r["image_id"], r["category_id"], r["score"]) for r in results] == [
        (11, 90, 0.75),
        (11, 5, 0.5),
        (12, 5, 0.25),
    ]
    assert [r["bbox"] for r in results] == [[10, 10, 10, 20], [50, 30, 10, 10], [10, 10, 10, 10]]
    assert [r["segmentation"]["size"] for r in results] == [[40, 60], [40, 60], [30, 50]]
    masks = [pycocotools.mask.decode(r["segmentation"]) for r in results]
    assert [int(mask.sum()) for mask in masks] == [200, 100, 100]
    assert masks[0][10:30, 10:20].all()
    json.dumps(results)


def test_torchvisions_paste_makes_larger_masks() -> None:
    results = coco_results(make_detections(), make_batch(), CLASSES, paste="torchvision")
    assert int(pycocotools.mask.area(results[2]["segmentation"])) == 144


def test_no_detections() -> None:
    padding = torch.full((2, 3), -1)
    empty = Detections(torch.zeros(2, 3, 4), padding * torch.inf, padding, torch.zeros(2, 3, 28, 28))
    assert coco_results(empty, make_batch(), CLASSES) == []
    no_detections = Detections(
        torch.zeros(2, 0, 4), torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0, 7, 7)
    )
    assert coco_results(no_detections, make_batch(), CLASSES) == []


def test_results_are_evaluated_as_they_come() -> None:
    results = coco_results(make_detections(), make_batch(), CLASSES)
    ground_truth: dict[str, Any] = {
        "images": [
            {"id": 11, "file_name": "a", "height": 40, "width": 60},
            {"id": 12, "file_name": "b", "height": 30, "width": 50},
        ],
        "categories": [{"id": 5, "name": "cat"}, {"id": 90, "name": "dog"}],
        "annotations": [
            {key: r[key] for key in ("image_id", "category_id", "bbox", "segmentation")} | {"id": i}
            for i, r in enumerate(results)
        ],
    }
    figures = evaluate(ground_truth, results).summary()
    assert figures["mask/AP"] == figures["box/AP"] == pytest.approx(1)


# --- Files ---------------------------------------------------------------------------------------------------------


def test_files_give_back_what_was_written(tmp_path: Path) -> None:
    results = coco_results(make_detections(), make_batch(), CLASSES)
    write_results(tmp_path / "results.json", iter(results))
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert read_results(tmp_path / "results.json") == results
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_files_of_no_results(tmp_path: Path) -> None:
    write_results(tmp_path / "results.json", [])
    assert read_results(tmp_path / "results.json") == []


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_results(tmp_path / "results.json", [{"a": 1}])
    with pytest.raises(TypeError):
        write_results(tmp_path / "results.json", [{"a": 2}, {"a": np.zeros(1)}])
    assert json.loads((tmp_path / "results.json").read_text()) == [{"a": 1}]


def test_the_official_results_are_read(shared_data: Path) -> None:
    folder = shared_data / "cocoapi_fixture"
    for kind, key in (("bbox", "bbox"), ("segm", "segmentation")):
        path = folder / f"instances_val2014_fake{kind}100_results.json"
        results = read_results(path)
        assert len(results) == 734
        assert all(key in result for result in results)
        assert results == json.loads(path.read_text())


GOOD: dict[str, Any] = {"image_id": 1, "category_id": 1, "score": 0.5, "bbox": [1, 2, 3, 4]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "is not JSON"),
        ('{"annotations": []}', "is not a COCO results file; expected a list of detections"),
        (json.dumps([GOOD, {**GOOD, "bbox": [1, 2, 3]}]), r"\[1\]\.bbox: list should have at least 4"),
        (json.dumps([{"image_id": 1, "category_id": 1}]), r"\[0\]\.score: field required"),
        (json.dumps([{**GOOD, "image_id": "a.jpg"}]), r"\[0\]\.image_id: input should be a valid integer"),
        ('[{"image_id": 1, "category_id": 1, "bbox": [0, 0, 1, 1], "score": NaN}]', r"\[0\]\.score"),
        (json.dumps([{"image_id": 1, "category_id": 1, "score": 0.5}]), r"\[0\]: has neither 'bbox' nor"),
        (json.dumps([{**GOOD, "segmentation": [[1, 2, 3, 4, 5, 6]]}]), r"\[0\]\.segmentation"),
        (
            json.dumps([{**GOOD, "segmentation": {"size": [3, 4], "counts": "36"}}]),
            r"\[0\]: segmentation: its run lengths do not add up to its size, 3 x 4",
        ),
        (
            json.dumps([{**GOOD, "segmentation": {"size": [3, 4], "counts": [6, 7]}}]),
            r"\[0\]: segmentation: its run lengths do not add up",
        ),
        # "=" is 13 and "O" is -1
        (json.dumps([{**GOOD, "segmentation": {"size": [3, 4], "counts": "=O"}}]), "run lengths do not add up"),
        (json.dumps([{**GOOD, "segmentation": {"size": [3, 4], "counts": ""}}]), "empty or cut off"),
        (json.dumps([{}] * 4), "and 2 more"),
    ],
)
def test_wrong_files_are_refused_by_name(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as error:
        read_results(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.json: cannot read the results file"):
        read_results(tmp_path / "none.json")
