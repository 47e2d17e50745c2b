"""Writing, reading and validation of COCO results files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskrcnn.errors import InputError
from maskrcnn.evaluation.results import read_results, write_results


def test_files_give_back_what_was_written(tmp_path: Path) -> None:
    mask = {"size": [2, 3], "counts": "132"}
    results = [
        {"image_id": n, "category_id": 5, "bbox": [1.0, 2, 3, 4], "score": 0.5, "segmentation": mask} for n in (1, 2)
    ]
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
        (json.dumps([{**GOOD, "image_id": 2**70}]), r"\[0\]\.image_id: .*less than"),
        (json.dumps([{**GOOD, "category_id": True}]), r"\[0\]\.category_id: input should be a valid integer"),
        ("[" * 10_000, "is not JSON"),
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
