"""Prediction from images in any form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskrcnn.data.transforms import Resize
from maskrcnn.engine.predictor import Predictor
from maskrcnn.errors import InputError
from maskrcnn.experiment import load_config
from maskrcnn.structures import ClassTable

TINY = Path(__file__).parents[1] / "tiny.yaml"


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    torch.manual_seed(0)
    model = load_config(TINY).model.build(2)
    return Predictor(model, ClassTable(("disc", "cross"), (1, 2)), Resize((64,), 64))


PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)


def test_every_form_of_an_image_gives_the_same_instances(predictor: Predictor, tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "image.png")
    tensor = torch.from_numpy(PIXELS).permute(2, 0, 1)
    forms = [tmp_path / "image.png", str(tmp_path / "image.png"), Image.fromarray(PIXELS), PIXELS, tensor]
    (first, *others) = predictor(forms)
    assert len(first) > 0
    assert first.image is not None
    assert (first.height, first.width) == (40, 60)
    assert torch.equal(first.image, tensor)
    for other in others:
        assert torch.equal(other.boxes, first.boxes)
        assert torch.equal(other.masks, first.masks)
    assert torch.equal(predictor(PIXELS).scores, first.scores)
    assert predictor([]) == []


def test_a_reversed_view_of_an_array_is_read(predictor: Predictor) -> None:
    assert torch.equal(predictor(PIXELS[:, :, ::-1]).boxes, predictor(PIXELS[:, :, ::-1].copy()).boxes)


@pytest.mark.parametrize(
    ("image", "description"),
    [
        (PIXELS.astype(np.float32), r"ndarray \(40, 60, 3\) of float32"),
        (PIXELS[:, :, 0], r"ndarray \(40, 60\) of uint8"),
        (torch.zeros(40, 60, 3, dtype=torch.uint8), r"Tensor \(40, 60, 3\) of uint8"),
        (np.zeros((0, 60, 3), np.uint8), r"ndarray \(0, 60, 3\) of uint8"),
    ],
)
def test_other_arrays_are_refused(predictor: Predictor, image: np.ndarray | torch.Tensor, description: str) -> None:
    with pytest.raises(InputError, match=rf"array \(H, W, 3\) of uint8 RGB values, not {description}"):
        predictor(image)


def test_a_missing_file_is_refused(predictor: Predictor, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.jpg: no such image file"):
        predictor(tmp_path / "absent.jpg")


def test_prediction_leaves_the_global_state_alone(predictor: Predictor) -> None:
    torch.manual_seed(3)
    states = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["pos"], torch.get_num_threads()
    predictor(PIXELS)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state(legacy=False)["state"]["pos"], torch.get_num_threads()) == states[1:]
