from __future__ import annotations

import math
import pickle
import zlib
from typing import get_args

import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from pydantic import ValidationError

from maskrcnn.data import shapes
from maskrcnn.data.shapes import SHAPES, ShapeName, ShapesConfig, ShapesDataset
from maskrcnn.structures import Example, MaskCrop


def scenes(**options: object) -> ShapesDataset:
    return ShapesConfig(**{"length": 60, **options}).build()


def full_masks(example: Example) -> np.ndarray:
    """Return the full-size masks, (G, H, W) bool."""
    planes = np.zeros((len(example.masks), *example.pixels.shape[1:]), dtype=bool)
    for plane, mask in zip(planes, example.masks, strict=True):
        height, width = mask.pixels.shape
        plane[mask.y : mask.y + height, mask.x : mask.x + width] = mask.pixels
    return planes


def depth_at(name: ShapeName, u: float, v: float, a: float = 20.0, b: float = 20.0) -> float:
    return float(SHAPES[name](np.array([float(u)]), np.array([float(v)]), a, b)[0])


def test_scenes_are_the_same_on_every_machine():
    dataset = scenes(length=5, seed=7)
    masks = pixels = 0
    for index in range(len(dataset)):
        example = dataset[index]
        masks = zlib.crc32(full_masks(example).tobytes() + bytes(example.labels.tolist()), masks)
        pixels = zlib.crc32(example.pixels.numpy().tobytes(), pixels)
    assert (masks, pixels) == (2248904955, 1020124344)


def test_a_scene_depends_on_seed_and_index_alone():
    dataset = scenes(length=8)
    backwards = {index: dataset[index] for index in reversed(range(8))}
    longer = pickle.loads(pickle.dumps(scenes(length=1000)))
    for index in range(8):
        for other in (backwards[index], longer[index]):
            assert torch.equal(dataset[index].pixels, other.pixels)
            assert torch.equal(dataset[index].boxes, other.boxes)
    assert not torch.equal(dataset[0].pixels, dataset[1].pixels)
    assert not torch.equal(dataset[0].pixels, scenes(seed=1)[0].pixels)


def test_an_example_has_the_documented_types_and_shapes():
    dataset = scenes(height=96, width=160)
    example = dataset[4]
    assert example.image_id == dataset.image_id(4) == 5
    assert example.pixels.shape == (3, 96, 160)
    assert example.pixels.dtype == torch.uint8
    assert example.boxes.dtype == torch.float32
    assert example.labels.dtype == torch.int64
    assert all(mask.pixels.dtype == np.uint8 for mask in example.masks)
    assert dataset.image_sizes().tolist() == [[96, 160]] * 60
    with pytest.raises(IndexError):
        dataset[60]


def test_masks_are_disjoint_and_boxes_tight():
    for example in map(scenes().__getitem__, range(60)):
        planes = full_masks(example)
        assert planes.sum(axis=0).max() <= 1
        for plane, box in zip(planes, example.boxes.tolist(), strict=True):
            rows, columns = np.nonzero(plane)
            assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_later_objects_hide_earlier_ones_but_never_too_much():
    dataset = scenes(objects=(8, 12), sizes=(0.2, 0.7))
    hidden = 0
    for index in range(30):
        layout = dataset._arrange(dataset._generator(index))
        for k, window in enumerate(layout.windows):
            inside = window.depth >= 0
            owner = layout.owner[window.rows, window.columns][inside]
            assert (owner >= k + 1).all()
            assert (owner == k + 1).sum() >= max(16, 0.4 * inside.sum())
            hidden += (owner > k + 1).any()
    assert hidden > 20


def test_every_class_appears_with_its_label():
    labels = torch.cat([example.labels for example in map(scenes().__getitem__, range(60))])
    assert labels.unique().tolist() == list(range(1, 9))
    dataset = scenes(classes=["star", "ring"])
    assert dataset.classes.names == ("star", "ring")
    assert dataset.classes.category_ids == (1, 2)
    assert get_args(ShapeName) == tuple(SHAPES)


@pytest.mark.parametrize("name", ["ring", "frame"])
def test_rings_and_frames_have_a_hole(name: ShapeName):
    example = scenes(classes=[name], objects=(1, 1), sizes=(0.5, 0.5))[0]
    (mask,) = example.masks
    middle = mask.pixels[mask.pixels.shape[0] // 2]
    assert len(np.flatnonzero(np.diff(middle))) >= 2  # object, hole, object
    assert middle[len(middle) // 2] == 0


def test_depths_by_hand():
    assert depth_at("rectangle", 15, 0) == 5
    assert depth_at("rectangle", 0, -23) == -3
    assert depth_at("disc", 19, 0) == pytest.approx(1, abs=0.05)
    assert depth_at("disc", 0, 11, b=10.0) == pytest.approx(-1, abs=0.1)
    assert depth_at("disc", 0, 0) > 1
    assert depth_at("ring", 0, 0) < -5
    assert depth_at("ring", 15, 0) > 3
    assert depth_at("frame", 15, 0) == 4  # 5 from the outer edge, 4 from the inner one
    assert depth_at("triangle", 20, 0) == pytest.approx(0)
    assert depth_at("triangle", -20, 20) == pytest.approx(0)
    assert depth_at("triangle", 0, 0) == pytest.approx(20 / math.sqrt(5))
    assert depth_at("cross", 15, 0) > 4
    assert depth_at("cross", 15, 15) < -5
    assert depth_at("star", -19, 0) < -5  # between two points of the star
    assert depth_at("star", -20 * math.cos(math.pi / 5), 20 * math.sin(math.pi / 5)) == pytest.approx(0, abs=1e-9)
    assert depth_at("crescent", -15, 0) > 3
    assert depth_at("crescent", 10, 0) < -5


def test_a_window_holds_the_whole_shape():
    centre, angle, extents = (60.3, 50.8), (0.6, 0.8), (30.0, 18.0)
    for shape in SHAPES.values():
        window = shapes._window(shape, centre, angle, extents, (128, 128))
        assert (window.depth[[0, -1]] < 0).all()
        assert (window.depth[:, [0, -1]] < 0).all()


def test_a_turned_rectangle_covers_its_area_at_its_place():
    window = shapes._window(SHAPES["rectangle"], (60.3, 50.8), (0.6, 0.8), (30.0, 18.0), (128, 128))
    rows, columns = np.nonzero(window.depth >= 0)
    assert len(rows) == pytest.approx(60 * 36, rel=0.01)
    assert (columns + window.columns.start + 0.5).mean() == pytest.approx(60.3, abs=0.1)
    assert (rows + window.rows.start + 0.5).mean() == pytest.approx(50.8, abs=0.1)
    # The longer axis has the direction (0.6, 0.8), down and right.
    assert np.corrcoef(rows, columns)[0, 1] > 0.2


def test_edges_are_antialiased():
    canvas = np.zeros((3, 8, 8), dtype=np.float32)
    window = shapes._window(SHAPES["rectangle"], (4.0, 4.0), (1.0, 0.0), (2.25, 2.0), (8, 8))
    white = np.ones_like(window.depth, dtype=np.float32)
    shapes._blend(canvas, window, shapes.BLACK, shapes.WHITE, white)
    row = canvas[0, 4] / 255
    np.testing.assert_allclose(row, [0, 0.25, 1, 1, 1, 1, 0.25, 0], atol=1e-6)
    assert (window.depth >= 0).sum() == 16


def test_sizes_lie_in_their_range_and_small_ones_are_frequent():
    dataset = scenes(length=200, classes=["disc"], objects=(1, 1), sizes=(0.1, 0.7))
    extents = []
    for index in range(200):
        _, window = dataset._draw_object(dataset._generator(index))
        extents.append(math.sqrt((window.depth >= 0).sum() * 4 / math.pi))  # diameter of a disc of the same area
    assert 40 < max(extents) <= 0.7 * 128 + 1
    assert 12 > min(extents) >= 0.1 * 128 * math.sqrt(0.5) - 1
    assert 22 < np.median(extents) < 34  # the median of the longer axis is sqrt(0.1 * 0.7) * 128 = 34


def test_ground_truth_holds_the_same_masks_as_the_examples():
    dataset = scenes(length=12, objects=(0, 5), classes=["star", "ring", "disc"])
    truth = dataset.ground_truth()
    assert [image["id"] for image in truth["images"]] == list(range(1, 13))
    assert truth["categories"] == [{"id": 1, "name": "star"}, {"id": 2, "name": "ring"}, {"id": 3, "name": "disc"}]
    assert [entry["id"] for entry in truth["annotations"]] == list(range(1, len(truth["annotations"]) + 1))
    for index in range(12):
        example = dataset[index]
        entries = [entry for entry in truth["annotations"] if entry["image_id"] == example.image_id]
        assert [entry["category_id"] for entry in entries] == example.labels.tolist()
        for entry, plane, (x1, y1, x2, y2) in zip(entries, full_masks(example), example.boxes.tolist(), strict=True):
            assert (rle.decode(entry["segmentation"]) == plane).all()
            assert entry["area"] == plane.sum()
            assert entry["bbox"] == [x1, y1, x2 - x1, y2 - y1]
            assert entry["iscrowd"] == 0


def test_a_scene_without_objects():
    dataset = scenes(length=2, objects=(0, 0))
    example = dataset[0]
    assert example.boxes.shape == (0, 4)
    assert example.labels.shape == (0,)
    assert example.masks == ()
    assert dataset.ground_truth()["annotations"] == []


def test_objects_stand_out_by_the_contrast_and_noise_has_its_deviation():
    plain, noisy = scenes(length=1, noise=0.0), scenes(length=1, noise=10.0)
    difference = noisy[0].pixels.float() - plain[0].pixels.float()
    assert difference.std() == pytest.approx(10.0, rel=0.05)
    rng = scenes()._generator(0)
    grey = shapes.Colour(128.0, 128.0, 128.0)
    for _ in range(50):
        assert shapes._contrasting(rng, [grey], 0.2).distance(grey) >= 0.2


def test_directions_and_sizes_are_drawn_evenly():
    rng = scenes()._generator(1)
    angles = np.array([math.atan2(*shapes._direction(rng)) for _ in range(4000)])
    assert np.histogram(angles, bins=4, range=(-math.pi, math.pi))[0] == pytest.approx([1000] * 4, rel=0.12)
    logs = np.log2([shapes._log_uniform(rng, 1.0, 16.0) for _ in range(4000)])
    assert np.histogram(logs, bins=4, range=(0, 4))[0] == pytest.approx([1000] * 4, rel=0.12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objects": (3, 2)}, "0 <= minimum <= maximum"),
        ({"sizes": (0.0, 0.5)}, "0.001 <= minimum"),
        ({"sizes": (1e-300, 0.5)}, "0.001 <= minimum"),  # drawing such sizes would not end
        ({"objects": (1, 10**9)}, "maximum <= 1000"),
        ({"sizes": (0.2, 1.5)}, "maximum <= 1"),
        ({"classes": ("disc", "disc")}, "only once"),
        ({"classes": ("hexagon",)}, "'star'"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options: dict[str, object], message: str):
    with pytest.raises(ValidationError, match=message):
        ShapesConfig(**options)


def test_masks_are_what_a_batch_takes():
    mask = scenes()[0].masks[0]
    assert isinstance(mask, MaskCrop)
    assert mask.pixels.flags.c_contiguous
    assert mask.pixels.any(axis=0)[[0, -1]].all()
    assert mask.pixels.any(axis=1)[[0, -1]].all()
