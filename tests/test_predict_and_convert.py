"""Files that `predict --format` writes are read back by `convert-dataset`: a model can pre-label a data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from label_files import Scene, assert_same, convert, masks_of, write_scenes
from painted import CLASSES, PaintedDetector, paint
from PIL import Image

from maskrcnn.engine.formats import Format
from maskrcnn.engine.prediction import PredictionOptions, predict_images
from maskrcnn.structures import MaskCrop

NAMES = ",".join(CLASSES.names)


@pytest.fixture
def scenes(tmp_path: Path) -> list[Scene]:
    """Photographs on which the objects of generated scenes are painted, as the detector finds them."""
    scenes = write_scenes(tmp_path / "photos", sizes=(0.6, 0.9))
    for scene in scenes:
        canvas = np.zeros((60, 88, 3), np.uint8)
        for number, (name, mask) in enumerate(scene.objects, start=1):
            paint(canvas, number, 1 + CLASSES.names.index(name), MaskCrop(0, 0, mask.astype(np.uint8)))
        Image.fromarray(canvas).save(tmp_path / "photos" / scene.name)
    return scenes


# The masks of PNGs are exact. Polygons leave out points up to 0.75 px from their line, of objects of 35 to 55 px.
@pytest.mark.parametrize(
    ("written", "read", "source", "iou"),
    [("png", "masks", "masks", 1.0), ("labelme", "labelme", "labelme", 0.9), ("yolo", "yolo", ".", 0.9)],
)
def test_round_trip(tmp_path: Path, scenes: list[Scene], written: Format, read: str, source: str, iou: float) -> None:
    options = PredictionOptions(formats=(written,), pictures=False)
    predict_images(PaintedDetector(), [tmp_path / "photos"], tmp_path / "out", options)
    data = convert(read, tmp_path / "out" / source, tmp_path / "photos", NAMES)[""]
    assert [category["name"] for category in data["categories"]] == list(CLASSES.names)
    assert_same(masks_of(data), scenes, iou=iou)
