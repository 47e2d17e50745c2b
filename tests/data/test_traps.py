"""Each silent trap is reported, and sound data is not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maskrcnn.data import traps
from maskrcnn.data.coco import CocoConfig, CocoDataset
from maskrcnn.data.shapes import ShapesConfig
from maskrcnn.errors import InputError
from maskrcnn.experiment import data_warnings, load_config, model_warnings
from maskrcnn.structures import ClassTable, Example, MaskCrop

SCENES = ShapesConfig(length=8, seed=1).build()
TINY = Path(__file__).parents[1] / "tiny.yaml"


class Labels:
    """A dataset of labels alone."""

    def __init__(self, *labels: list[int]) -> None:
        self._labels = labels
        self.classes = ClassTable(("_background_", "cat", "dog"), (0, 1, 2))

    def __len__(self) -> int:
        return len(self._labels)

    def labels(self, index: int) -> np.ndarray:
        return np.array(self._labels[index], np.int64)

    def image_id(self, index: int) -> int:
        return 100 + index


def labels(*rows: list[int]) -> Any:
    return Labels(*rows)


def test_a_dataset_without_objects() -> None:
    assert list(traps.classes_without_example(labels([], [-1], []))) == ["there is no object in any of its 3 images"]


def test_classes_without_an_example() -> None:
    (message,) = traps.classes_without_example(labels([2], [], [3, 2]))
    assert message.startswith("1 of 3 classes have no object: _background_. The model cannot learn them")
    assert list(traps.classes_without_example(labels([2], [3, 1, -1]))) == []


def rectangle(box: tuple[int, int, int, int], written: tuple[float, float, float, float]) -> Example:
    """Return an image of 100 x 80 px with one mask that fills `box` and a box `written`."""
    x1, y1, x2, y2 = box
    return Example(
        image_id=7,
        pixels=torch.zeros((3, 80, 100), dtype=torch.uint8),
        boxes=torch.tensor([written]),
        labels=torch.tensor([1]),
        masks=(MaskCrop(x1, y1, np.ones((y2 - y1, x2 - x1), np.uint8)),),
    )


BOXES = [(10, 10, 40, 30), (30, 20, 60, 70), (5, 40, 25, 60), (50, 8, 90, 30)]


def test_boxes_written_as_corners() -> None:
    misread = [rectangle(b, (b[0], b[1], min(b[0] + b[2], 100.0), min(b[1] + b[3], 80.0))) for b in BOXES]
    (message,) = traps.boxes_against_masks(misread)
    assert message == (
        "4 of 4 boxes disagree with their masks; in image 7 a box is (10, 10, 50, 40) and its mask reaches over "
        "(10, 10, 40, 30) (x1, y1, x2, y2). They look written as x1, y1, x2, y2: COCO's `bbox` is x, y, width, height"
    )


def test_boxes_that_disagree_with_masks() -> None:
    moved = [rectangle(b, (b[0] - 5.0, b[1] - 8.0, b[2] - 5.0, b[3] - 8.0)) for b in BOXES]
    (message,) = traps.boxes_against_masks(moved)
    assert "boxes disagree with their masks; in image 7 a box is (5, 2, 35, 22)" in message
    assert message.endswith("Boxes and masks train different heads, so one of them learns what is wrong")


def test_boxes_that_fit_their_masks() -> None:
    near = [rectangle(b, (b[0] - 1.5, b[1] + 1.0, b[2] + 1.9, b[3] - 0.5)) for b in BOXES]
    assert list(traps.boxes_against_masks(near)) == []
    assert list(traps.boxes_against_masks([SCENES[index] for index in range(8)])) == []
    one_of_21 = [rectangle(BOXES[0], (0.0, 0, 99, 79)), *[rectangle(BOXES[0], (10.0, 10, 40, 30))] * 20]
    assert list(traps.boxes_against_masks(one_of_21)) == []
    without = dataclasses.replace(SCENES[0], boxes=torch.zeros(0, 4), labels=torch.zeros(0).long(), masks=())
    assert list(traps.boxes_against_masks([without])) == []


def test_more_objects_than_detections() -> None:
    (message,) = traps.too_many_objects(labels([1] * 5, [1] * 12, [-1] * 50, [2]), detections_per_image=10)
    assert message == (
        "1 of 4 images have more objects than model.detection.detections_per_image, 10; image 101 has 12. Not more "
        "than 88.9% of the objects can be found"
    )
    assert list(traps.too_many_objects(labels([1] * 10, []), detections_per_image=10)) == []


def test_objects_far_below_the_smallest_anchor() -> None:
    small = [rectangle(BOXES[0], (10.0, 10, 26, 26))] * 3
    (message,) = traps.small_objects([*small, rectangle(BOXES[0], (0.0, 0, 90, 70))], smallest_anchor=32)
    assert message.startswith(
        "half of the objects are smaller than 16 px (square root of the area, after resizing), but"
    )
    assert "the smallest anchor has 32 px: no anchor has an IoU of 0.3" in message
    assert list(traps.small_objects(small, smallest_anchor=16)) == []
    assert list(traps.small_objects([], smallest_anchor=16)) == []


@pytest.mark.parametrize("names", [("left shoe", "right shoe"), ("Left", "hat", "Right"), ("shoe_right", "shoe_left")])
def test_classes_that_a_flip_confuses(names: tuple[str, ...]) -> None:
    classes = ClassTable(names, tuple(range(len(names))))
    left = next(name for name in names if "left" in name.lower())
    right = next(name for name in names if "right" in name.lower())
    (message,) = traps.mirrored_classes(classes, ())
    assert f"'{left}' look like '{right}'" in message
    assert f"swap: [[{left}, {right}]]" in message
    assert list(traps.mirrored_classes(classes, [(right, left)])) == []


def test_classes_that_no_flip_confuses() -> None:
    assert list(traps.mirrored_classes(ClassTable(("leftover", "bright spot", "left"), (1, 2, 3)), ())) == []


@pytest.fixture
def coco(tmp_path: Path) -> Callable[..., CocoDataset]:
    """Builds a COCO dataset of the images with the given numbers, all in one folder."""

    def build(name: str, *numbers: int) -> CocoDataset:
        for number in numbers:
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
        images = [{"id": n, "file_name": f"{n}.png", "height": 8, "width": 8} for n in numbers]
        content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
        (tmp_path / name).write_text(json.dumps(content))
        return CocoConfig(root=tmp_path, annotations=Path(name), images=Path()).build()

    return build


def test_images_in_both_splits(coco: Callable[..., CocoDataset], tmp_path: Path) -> None:
    train, validation, other = coco("train.json", 1, 2, 3), coco("val.json", 3, 4), coco("other.json", 5)
    (message,) = traps.shared_images(train, validation)
    assert message.startswith("1 of 2 validation images are training images")
    assert message.endswith("3.png")
    assert list(traps.shared_images(train, other)) == []
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "4.png")
    (tmp_path / "1.png").write_bytes((tmp_path / "4.png").read_bytes())
    (message,) = traps.shared_images(train, validation)
    assert message.startswith("2 of 2 validation images are training images")
    assert list(traps.shared_images(train, other)) == []
    assert list(traps.shared_images(SCENES, SCENES)) == []


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (np.full((8, 8), 4095, np.uint16), "its pixels have 16 bits and values up to 4095, of which the upper 8 bits"),
        (
            np.full((8, 8), 0.75, np.float32),
            "its pixels are floating-point numbers up to 0.75, which are read as 0..255",
        ),
        (np.full((8, 8, 3), 3, np.uint8), "its values of 8 bits end at 3"),
    ],
    ids=["12 bits in 16", "float", "8 bits"],
)
def test_dark_images(coco: Callable[..., CocoDataset], tmp_path: Path, pixels: np.ndarray, words: str) -> None:
    dataset = coco("train.json", 1, 2)
    Image.fromarray(np.full((8, 8), 200, np.uint8)).save(tmp_path / "1.png")
    assert list(traps.dark_images(dataset, [dataset[0]])) == []
    Image.fromarray(pixels).save(tmp_path / "2.png", format="TIFF")
    (message,) = traps.dark_images(dataset, [dataset[0], dataset[1]])
    assert message.startswith("1 of 2 images are nearly black, without a value above 15 of 255; ")
    assert f"2.png: {words}" in message


def test_dark_images_that_are_no_files() -> None:
    dark = rectangle(BOXES[0], (10.0, 10, 40, 30))
    (message,) = traps.dark_images(SCENES, [dark])
    assert message.endswith("such as image 7")


def test_a_frozen_backbone_of_random_weights() -> None:
    warnings = model_warnings(load_config(TINY, ["model.backbone.freeze=2"]))
    assert [line.partition(", so")[0] for line in warnings] == [
        "model.backbone has random weights (weights: none), and its first 2 stages are frozen"
    ]
    warnings = model_warnings(load_config(TINY, ["model.backbone.norm=frozen_bn"]))
    assert "its batch norms are frozen, so they normalise nothing" in warnings[0]
    assert model_warnings(load_config(TINY)) == []
    assert model_warnings(load_config("coco/mask_rcnn_r50_fpn_1x")) == []


def test_an_image_that_cannot_be_read_is_left_out_of_the_sample() -> None:
    class Broken:
        def __len__(self) -> int:
            return 300

        def __getitem__(self, index: int) -> Example:
            if index == 0:
                raise InputError("0.jpg: is broken")
            return rectangle(BOXES[0], (0.0, 0, 1, 1))

    dataset: Any = Broken()
    assert len(traps.sample(dataset)) == traps.SAMPLE - 1
    assert traps.evenly_spaced(300, 4) == [0, 100, 199, 299]
    assert traps.evenly_spaced(2, 4) == [0, 1]


def test_the_warnings_of_an_experiment_name_the_split() -> None:
    config = load_config(
        TINY,
        ["model.rpn.anchor_sizes=[[500]]", "model.detection.detections_per_image=1", "data.validation.objects=[2, 3]"],
    )
    small, many = data_warnings(config, *config.data.build_both())
    assert small.startswith("data.train: half of the objects are smaller than")
    assert many.startswith(
        "data.validation: 2 of 2 images have more objects than model.detection.detections_per_image, 1"
    )
    sound = load_config(TINY, ["model.rpn.anchor_sizes=[[16]]", "model.detection.detections_per_image=10"])
    assert data_warnings(sound, *sound.data.build_both()) == []
