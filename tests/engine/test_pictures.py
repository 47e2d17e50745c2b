"""Pictures of validation images at each evaluation and after training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskrcnn.config import read_config
from maskrcnn.engine import pictures
from maskrcnn.engine.pictures import PREVIEW_IMAGES, draw_predictions, preview_pictures
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


def test_previews_are_shrunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "PREVIEW_SIDE", 100)
    (picture,) = previews(1, tmp_path).values()
    assert picture.shape[1] == 100
    assert previews(0, tmp_path) == {}
