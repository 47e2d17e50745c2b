"""Tiles: an object comes out as it does untiled, whether a tile shows it whole or not."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from painted import CLASSES, PaintedDetector, paint
from PIL import Image, ImageDraw

from maskrcnn.config import read_config
from maskrcnn.engine.instances import Instances
from maskrcnn.engine.suppression import suppress
from maskrcnn.engine.tiles import TiledDetector, tiles_of
from maskrcnn.errors import InputError
from maskrcnn.experiment import ExperimentConfig
from maskrcnn.structures import Example, MaskCrop


def shape(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return a connected mask of at most `size` x `size` pixels: a disc, a frame, a cross or a diagonal bar."""
    height, width = rng.integers(max(3, size // 4), size + 1, 2).tolist()
    image = Image.new("L", (width, height))
    draw, thick = ImageDraw.Draw(image), max(1, min(height, width) // 5)
    match rng.integers(4):
        case 0:
            draw.ellipse((0, 0, width - 1, height - 1), fill=1)
        case 1:
            draw.rectangle((0, 0, width - 1, height - 1), outline=1, width=thick)
        case 2:
            draw.rectangle((width // 2, 0, width // 2 + thick - 1, height - 1), fill=1)
            draw.rectangle((0, height // 2, width - 1, height // 2 + thick - 1), fill=1)
        case _:
            draw.polygon([(0, 0), (thick, 0), (width - 1, height - 1), (width - 1 - thick, height - 1)], fill=1)
    return np.array(image)


def scene(seed: int, side: int, size: int, tries: int) -> torch.Tensor:
    """Return a scene (3, side, side) of objects that do not hide each other, some larger than `size` pixels."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((side, side, 3), np.uint8)
    number = 0
    for attempt in range(tries):
        mask = shape(rng, min(2 * size if attempt < 3 else size, side))
        x, y = (int(rng.integers(0, side - length + 1)) for length in mask.shape[::-1])
        free = ~pixels[y : y + mask.shape[0], x : x + mask.shape[1]].any(axis=-1)
        if free[mask > 0].all():
            number += 1
            paint(pixels, number, int(rng.integers(1, 4)), MaskCrop(x, y, mask))
    assert number > 10
    return torch.from_numpy(pixels).permute(2, 0, 1)


def assert_same(tiled: Instances, untiled: Instances) -> None:
    assert tiled.scores.tolist() == untiled.scores.tolist()
    assert tiled.labels.tolist() == untiled.labels.tolist()
    assert tiled.boxes.tolist() == untiled.boxes.tolist()
    assert tiled.to_coco(1) == untiled.to_coco(1)


@pytest.mark.parametrize("overlap", [2, 16, 40])
@pytest.mark.parametrize("seed", range(5))
def test_objects_come_out_as_they_do_untiled(seed: int, overlap: int) -> None:
    """Those that fit a tile, and those that do not."""
    pixels = scene(seed, side=260, size=60, tries=80)
    detector = PaintedDetector()
    tiled = TiledDetector(detector, 64, overlap, batch_size=3).detect(pixels)
    assert_same(tiled, suppress(detector.detect(pixels), "class", 0.5))


@pytest.mark.slow
def test_a_scene_of_4096_pixels() -> None:
    pixels = scene(0, side=4096, size=1000, tries=300)
    detector = PaintedDetector()
    untiled = detector.detect(pixels)
    sides = (untiled.boxes[:, 2:] - untiled.boxes[:, :2]).amax(dim=1)
    assert (sides <= 1024).sum() > 20
    assert (sides > 1024).any()
    assert_same(TiledDetector(detector, 1024, 256).detect(pixels), suppress(untiled, "class", 0.5))


def test_tiles_cover_the_image_and_overlap() -> None:
    assert tiles_of(50, 60, 64, 16) == [(0, 0, 60, 50)]
    tiles = tiles_of(64, 200, 64, 16)
    assert tiles == [(0, 0, 64, 64), (45, 0, 109, 64), (90, 0, 154, 64), (136, 0, 200, 64)]
    for length in range(65, 400, 7):
        starts = [x for x, *_ in tiles_of(64, length, 64, 20)]
        assert starts[0] == 0
        assert starts[-1] == length - 64
        assert all(second - first <= 64 - 20 for first, second in itertools.pairwise(starts))
    with pytest.raises(InputError, match="--overlap 64: it must be less than the side of a tile, 64"):
        TiledDetector(PaintedDetector(), 64, 64)


class Noisy(PaintedDetector):
    """Is more certain of pieces than of whole objects, and takes a piece at the left border for another class."""

    def detect_prepared(self, examples: Sequence[Example]) -> list[Instances]:
        return [self.disturbed(instances) for instances in super().detect_prepared(examples)]

    def disturbed(self, instances: Instances) -> Instances:
        cut = (instances.boxes[:, :2] == 0).any(dim=1) | (instances.boxes[:, 2:] == 64).any(dim=1)
        labels = torch.where(instances.boxes[:, 0] == 0, 3, instances.labels)
        return replace(instances, scores=instances.scores + 0.001 * cut, labels=labels)


def row(*boxes: tuple[int, int, int, int]) -> torch.Tensor:
    """Return a scene of 112 x 64 pixels with a disc in each box; two tiles of 64 share columns 48 to 63."""
    pixels = np.zeros((64, 112, 3), np.uint8)
    for number, (x1, y1, x2, y2) in enumerate(boxes, start=1):
        paint(pixels, number, 1, MaskCrop(x1, y1, np.ones((y2 - y1, x2 - x1), np.uint8)))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def test_a_whole_object_is_taken_rather_than_a_better_piece() -> None:
    (found,) = TiledDetector(Noisy(), 64, 16).detect_prepared([Example(0, row((30, 10, 55, 30)), *NOTHING)])
    assert found.boxes.tolist() == [[30, 10, 55, 30]]
    assert found.scores.tolist() == pytest.approx([0.999])


def test_pieces_of_other_classes_are_joined_by_agnostic_suppression() -> None:
    pixels = row((30, 10, 90, 30))
    by_class = TiledDetector(Noisy(), 64, 16).detect(pixels)
    assert sorted(by_class.class_names) == ["cross", "disc"]
    agnostic = TiledDetector(Noisy(), 64, 16, nms="agnostic").detect(pixels)
    assert agnostic.boxes.tolist() == [[30, 10, 90, 30]]


def test_a_piece_that_another_tile_shows_inside_is_left_to_it() -> None:
    found = TiledDetector(Noisy(), 64, 16).detect(row((20, 10, 51, 30)))  # whole in the left tile, a cross in the right
    assert found.class_names == ("disc",)


def test_without_masks_boxes_are_joined() -> None:
    class Boxes(PaintedDetector):
        def detect_prepared(self, examples: Sequence[Example]) -> list[Instances]:
            return [replace(instances, pixel_masks=None) for instances in super().detect_prepared(examples)]

    found = TiledDetector(Boxes(), 64, 16).detect(row((20, 5, 100, 25), (40, 30, 55, 50), (5, 5, 15, 15)))
    assert not found.has_masks
    assert found.boxes.tolist() == [[20, 5, 100, 25], [40, 30, 55, 50], [5, 5, 15, 15]]


def test_a_scene_without_objects() -> None:
    found = TiledDetector(PaintedDetector(), 64, 16).detect(row())
    assert len(found) == 0
    assert (found.height, found.width) == (64, 112)
    assert found.to_coco(1) == []


NOTHING = (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), ())


def test_a_model_in_tiles() -> None:
    """An image of one tile is not cut; a larger one has masks of its own size."""
    config = read_config(Path(__file__).parents[1] / "tiny.yaml", ExperimentConfig)
    predictor = config.predictor(config.model.build(len(CLASSES)), CLASSES)
    pixels = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = TiledDetector(predictor, 96, 32).detect(pixels)
    assert torch.equal(whole.boxes, predictor(pixels).boxes)
    tiled = TiledDetector(predictor, 64, 32, batch_size=2).detect(pixels)
    assert tiled.masks.shape == (len(tiled), 64, 96)
    assert len(tiled) > 0


# Suppression.


def overlapping() -> Instances:
    """Return four instances: two crossing bars and a near duplicate of the second, of one class; and one of another."""
    bar, upright = np.zeros((20, 20), np.uint8), np.zeros((20, 20), np.uint8)
    bar[8:12], upright[:, 8:12] = 1, 1
    masks = tuple(MaskCrop(0, 0, mask) for mask in (bar, upright, upright, bar))
    return Instances(
        boxes=torch.tensor([[0.0, 0, 20, 20]] * 4),
        scores=torch.tensor([0.9, 0.8, 0.7, 0.6]),
        labels=torch.tensor([1, 1, 1, 2]),
        mask_probabilities=torch.zeros(4, 0, 0),
        height=20,
        width=20,
        classes=CLASSES,
        pixel_masks=masks,
    )


def test_suppression() -> None:
    instances = overlapping()
    kept = {kind: suppress(instances, kind, 0.5).scores.tolist() for kind in ("class", "agnostic", "mask")}
    assert kept["class"] == pytest.approx([0.9, 0.6])
    assert kept["agnostic"] == pytest.approx([0.9])
    assert kept["mask"] == pytest.approx([0.9, 0.8, 0.6])
    assert len(suppress(instances[:0], "mask", 0.5)) == 0
    with pytest.raises(ValueError, match="no mask head"):
        suppress(replace(instances, pixel_masks=None), "mask", 0.5)


def test_loose_suppression_leaves_the_model_as_it_is() -> None:
    config = read_config(Path(__file__).parents[1] / "tiny.yaml", ExperimentConfig)
    predictor = config.predictor(config.model.build(len(CLASSES)), CLASSES)
    loose = predictor.with_loose_nms()
    assert (predictor.nms_threshold, loose.nms_threshold) == (0.5, 0.9)
    pixels = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert len(loose(pixels)) >= len(predictor(pixels)) > 0
    boxes_alone = replace(predictor, model=replace_head(config))
    with pytest.raises(InputError, match="--nms mask: the model has no mask head"):
        boxes_alone.with_loose_nms()


def replace_head(config: ExperimentConfig) -> torch.nn.Module:
    return config.model.model_copy(update={"mask_head": None}).build(len(CLASSES))
