"""The figure of the RoI layers, and the tool that draws it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from maskrcnn.cli import explain_roi
from maskrcnn.config import read_config, to_dict
from maskrcnn.engine.checkpoint import CheckpointFolder, TrainingState
from maskrcnn.errors import InputError
from maskrcnn.experiment import ExperimentConfig
from maskrcnn.structures import ClassTable
from maskrcnn.visualization.roi_layers import (
    BINS,
    BOX,
    HIGH,
    LOW,
    POINT,
    Shades,
    View,
    draw_box,
    draw_roi_layers,
    plain,
    shade_map,
)

EXPERIMENT = """
model:
  backbone: {kind: resnet, depth: 18, width: 8, norm: bn, freeze: 0, weights: none}
  neck: {kind: fpn, channels: 4}
  rpn: {anchor_sizes: [[8], [16], [32], [48], [64]]}
  box_head: {kind: fc, width: 8}
data:
  train: {kind: shapes}
  validation: {kind: shapes}
  validation_transforms: [{kind: resize, short_side: [96], long_side: 128}]
"""

Explain = Callable[..., np.ndarray]


@pytest.fixture
def explain(tmp_path: Path) -> Explain:
    """Return a function that runs the tool in this process and returns the figure, (h, w, 3)."""

    def call(*arguments: object) -> np.ndarray:
        out = tmp_path / "new folder" / "roi.png"
        parser = argparse.ArgumentParser()
        explain_roi.add_arguments(parser)
        explain_roi.run(parser.parse_args(["--out", str(out), *map(str, arguments)]))
        return np.array(Image.open(out).convert("RGB"))

    return call


def count(picture: np.ndarray, colour: tuple[int, int, int]) -> int:
    """Return the number of pixels with a colour, within the tolerance of the colour quantisation."""
    return int((np.abs(picture.astype(int) - colour).max(axis=2) <= 6).sum())


def test_a_map_is_drawn_with_box_bins_and_points(explain: Explain):
    picture = explain("--map", "8x8", "--box", "1,1,6,8", "--output", "2x2")
    assert min(picture.shape[:2]) > 600
    assert min(count(picture, colour) for colour in (BOX, BINS, POINT)) > 500


def test_it_draws_the_same_picture_again(explain: Explain):
    arguments = ("--map", "6x6", "--stride", 32, "--box", "0,0,100,50")
    assert np.array_equal(explain(*arguments), explain(*arguments, "--output", "7x7"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--map", "8x8", "--box", "1,1,6"), "--box 1,1,6: expected four numbers"),
        (("--map", "8x8", "--box", "1,1,6,x"), "--box 1,1,6,x: expected four numbers"),
        (("--map", "8x8", "--box", "1,1,6,inf"), "must be finite"),
        (("--map", "8x8", "--box", "1,1,1,8"), "--box 1,1,1,8: the box has no area"),
        (("--map", "8x8", "--box", "6,8,1,1"), "the box has no area"),
        (("--map", "8x8", "--box", "8,0,9,9"), "--box 8,0,9,9: it lies outside the map of 8 x 8 pixels"),
        (("--map", "4x8", "--stride", "2", "--box=-4,-4,0,5"), "--box -4,-4,0,5: it lies outside the map of 16 x 8"),
        (("--map", "8", "--box", "1,1,6,8"), "--map 8: expected two whole numbers HxW"),
        (("--map", "0x8", "--box", "1,1,6,8"), "--map 0x8: both numbers must be from 1 to 100"),
        (("--map", "8x8", "--box", "1,1,6,8", "--output", "2x3"), "--output 2x3: the RoI layers make square grids"),
        (("--map", "8x8", "--box", "1,1,6,8", "--out", "x.gif"), "--out x.gif: the picture is a PNG"),
        (("--box", "1,1,6,8"), "give either --map HxW or --image FILE"),
        (("--map", "8x8", "--image", "x.jpg", "--box", "1,1,6,8"), "give either --map HxW or --image FILE"),
        (("--map", "8x8", "--config", "x.yaml", "--box", "1,1,6,8"), "need --image FILE"),
        (("--image", "x.jpg", "--box", "1,1,6,8"), "--image needs --config FILE"),
        (("--image", "no.jpg", "--config", "x.yaml", "--box", "1,1,6,8"), "no.jpg: no such image file"),
    ],
)
def test_wrong_input_gives_one_clear_message(explain: Explain, arguments: tuple[str, ...], message: str):
    with pytest.raises(InputError) as error:
        explain(*arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def photograph(tmp_path: Path) -> tuple[Path, Path]:
    """Return the paths of an image of 80 x 120 pixels and of an experiment."""
    pixels = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    (tmp_path / "experiment.yaml").write_text(EXPERIMENT)
    return tmp_path / "photo.png", tmp_path / "experiment.yaml"


def test_an_image_is_read_by_the_configs_backbone(explain: Explain, photograph: tuple[Path, Path]):
    image, config = photograph
    picture = explain("--image", image, "--config", config, "--box", "10,10,60,50", "--output", "2x2")
    assert min(count(picture, colour) for colour in (BOX, BINS, POINT)) > 100


def test_the_map_is_the_one_that_the_box_head_reads(photograph: tuple[Path, Path]):
    model, transform, origin = explain_roi._load_model(photograph[1], [], None)
    assert origin == "RANDOM WEIGHTS"
    pixels = torch.zeros(3, 80, 120, dtype=torch.uint8)
    # 80 x 120 becomes 85 x 128, padded to 96 x 128.
    features, stride, box = explain_roi._feature_map(model, transform, pixels, (0.0, 0.0, 60.0, 40.0))
    assert stride == 4
    assert features.shape == (4, 24, 32)
    assert box == pytest.approx((0.0, 0.0, 64.0, 42.5))
    _, stride, _ = explain_roi._feature_map(model, transform, pixels, (-400.0, -400.0, 400.0, 400.0))
    assert stride == 32  # 850 x 853 px


def test_a_checkpoint_gives_the_weights(photograph: tuple[Path, Path], tmp_path: Path):
    load_model = explain_roi._load_model
    config = read_config(photograph[1], ExperimentConfig)
    model = config.model.build(2)
    optimizer = config.training.optimizer.build(model, batch_size=1)
    classes = ClassTable(("cat", "dog"), (1, 2))
    state = TrainingState(model, optimizer)
    CheckpointFolder(tmp_path, state=state, classes=classes, config=to_dict(config), metric="mask/AP").save(1)
    loaded, _, origin = load_model(photograph[1], [], tmp_path / "last.pt")
    assert origin == "weights of last.pt"
    assert all(torch.equal(saved, read) for saved, read in zip(model.parameters(), loaded.parameters(), strict=True))
    with pytest.raises(InputError, match=r"no\.pt"):
        load_model(photograph[1], [], tmp_path / "no.pt")


def test_a_box_outside_the_image_is_wrong_input(explain: Explain, photograph: tuple[Path, Path]):
    image, config = photograph
    with pytest.raises(InputError, match=r"it lies outside .* of 120 x 80 pixels"):
        explain("--image", image, "--config", config, "--box", "120,0,130,10")


# The figure


def draw(features: torch.Tensor, box: tuple[float, float, float, float], size: int) -> np.ndarray:
    return draw_roi_layers(features, box, stride=1, size=size, title="title", notes=["note"])


@pytest.mark.parametrize(
    "box",
    [
        (-500.0, -500.0, 900.0, 900.0),  # huge
        (3.0, 3.0, 3.1, 3.1),  # much smaller than a cell
        (7.9, 7.9, 30.0, 30.0),  # beyond the corner
        (0.0, 0.0, 8.0, 0.2),  # very flat
    ],
)
@pytest.mark.parametrize("size", [1, 5])
def test_awkward_boxes_can_be_drawn(box: tuple[float, float, float, float], size: int):
    picture = draw(torch.randn(8, 8), box, size)
    assert max(picture.shape) < 4000
    assert count(picture, BOX) > 50


def test_a_constant_map_can_be_drawn():
    assert draw(torch.zeros(4, 4), (0.0, 0.0, 2.0, 2.0), 2).shape[2] == 3


def test_a_view_clips_rectangles():
    view = View(left=-1, top=2, columns=10, rows=4, cell=20)
    assert view.size == (200, 80)
    assert view.rectangle((0, 1.5), (2, 3)) == (20, 0, 50, 20)
    assert view.rectangle((-5, 50), (-5, 50)) == (0, 0, 200, 80)


def test_numbers_have_no_trailing_zeros():
    assert [plain(value) for value in (2.5, 3.0, 20.78125, -0.001, 0.0, -1.5)] == [
        "2.5",
        "3",
        "20.78",
        "0",
        "0",
        "-1.5",
    ]
    assert Shades(0, 77).text(38.75) == "38.75"
    assert Shades(-0.003, 0.001).text(0.00123456) == "0.00123"


def test_low_values_are_light_and_high_values_dark():
    shades = Shades.of(torch.tensor([0.0, 10.0]))
    assert [shades.colour(value)[0] for value in (-5.0, 0.0, 10.0)] == [LOW, LOW, HIGH]


def test_a_map_is_shaded_from_black_to_white():
    assert shade_map(torch.tensor([[-1.0, 0.0], [1.0, 1.0]]))[:, :, 0].tolist() == [[0, 128], [255, 255]]


def test_a_context_image_has_the_box_at_its_position():
    picture = draw_box(np.zeros((10, 20, 3), dtype=np.uint8), (10.0, 0.0, 20.0, 10.0), "title")
    rows, columns = np.nonzero((picture == BOX).all(axis=2))
    assert (columns.min(), columns.max()) == (16 + 210, 16 + 419)
    assert rows.min() == 56


def test_a_file_of_the_user_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.new("RGB", (8, 8)).save(path)
    (tmp_path / "link.png").symlink_to(tmp_path / "absent.png")
    (tmp_path / "text.png").write_text("no picture")
    for out in (path, tmp_path / "link.png", tmp_path / "text.png", tmp_path):
        with pytest.raises(InputError, match="was not written by this command"):
            explain_roi._require_own(out)
