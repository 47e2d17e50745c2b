"""Pictures of validation images at each evaluation and after training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskrcnn.config import read_config
from maskrcnn.data.coco import CocoConfig
from maskrcnn.engine import pictures
from maskrcnn.engine.pictures import (
    PREVIEW_IMAGES,
    NamesImages,
    draw_ground_truth,
    draw_predictions,
    preview_pictures,
    title_of,
)
from maskrcnn.experiment import ExperimentConfig

TINY = Path(__file__).parents[1] / "tiny.yaml"


def experiment() -> ExperimentConfig:
    return read_config(TINY, ExperimentConfig, ["data.validation.length=6"])


def previews(count: int, out: Path) -> dict[str, np.ndarray]:
    """Write the pictures of predictions to `out` and return the preview pictures of an evaluation."""
    config = experiment()
    dataset = config.data.build_validation()
    predictor = config.predictor(config.model.build(len(dataset.classes)), dataset.classes)
    draw_predictions(predictor, dataset, count, out, min_score=0)
    return preview_pictures(predictor, dataset, count, min_score=0)


def test_previews_are_the_first_pictures(tmp_path: Path) -> None:
    preview = previews(5, tmp_path)
    written = sorted(path.stem for path in tmp_path.iterdir() if path.stem != "overview")
    assert written == ["1", "2", "3", "4", "5"]
    assert list(preview) == written[:PREVIEW_IMAGES]
    assert all((np.array(Image.open(tmp_path / f"{name}.png")) == picture).all() for name, picture in preview.items())


def test_a_sheet_of_large_photographs_is_small(tmp_path: Path) -> None:
    """Each has the file name that the annotations give it, and its own file has its full size."""
    objects: dict[str, list[dict[str, Any]]] = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "height": 2000, "width": 3000} for i in (1, 2, 3)],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [],
    }
    (tmp_path / "objects.json").write_text(json.dumps(objects))
    for image in objects["images"]:
        Image.new("RGB", (3000, 2000)).save(tmp_path / image["file_name"])
    dataset = CocoConfig(root=tmp_path, annotations=Path("objects.json"), images=Path(".")).build()
    assert isinstance(dataset, NamesImages)
    assert dataset.image_name(2) == "3.jpg"
    draw_ground_truth(
        ((str(n), title_of(dataset, n), dataset[n]) for n in range(len(dataset))), dataset.classes, tmp_path / "out"
    )
    with Image.open(tmp_path / "out" / "contact_sheet.png") as sheet, Image.open(tmp_path / "out" / "1.png") as single:
        assert single.size == (3000, 2000)
        assert max(sheet.size) <= 1600


def test_previews_are_shrunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "PREVIEW_SIDE", 100)
    (picture,) = previews(1, tmp_path).values()
    assert picture.shape[1] == 100
    assert previews(0, tmp_path) == {}
