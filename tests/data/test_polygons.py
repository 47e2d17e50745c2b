"""Polygons of masks: exact without a tolerance, close to the mask with one; holes, several parts, touching corners."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from maskrcnn.data.mask_crops import iou
from maskrcnn.data.polygons import _signed_area, join, polygons_of
from maskrcnn.structures import MaskCrop


def crop_of(picture: str, x: int = 0, y: int = 0) -> MaskCrop:
    return MaskCrop(x, y, np.array([[c == "#" for c in row] for row in picture.split()], np.uint8))


def covered(ring: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the pixels (height, width) whose centres the ring encloses, by the even-odd rule."""
    ys, xs = np.mgrid[:height, :width] + 0.5
    inside = np.zeros((height, width), bool)
    for (x1, y1), (x2, y2) in zip(ring, np.roll(ring, -1, axis=0), strict=True):
        if y1 != y2:
            inside ^= ((y1 > ys) != (y2 > ys)) & (xs < x1 + (ys - y1) * (x2 - x1) / (y2 - y1))
    return inside


def test_a_rectangle_has_four_corners() -> None:
    (ring,) = polygons_of(crop_of("## ## ##", x=10, y=20))
    assert sorted(map(tuple, ring.tolist())) == [(10, 20), (10, 23), (12, 20), (12, 23)]
    assert _signed_area(ring) == 6


def test_pixels_that_touch_at_a_corner_are_two_parts() -> None:
    assert [len(ring) for ring in polygons_of(crop_of("#. .#"), 0)] == [4, 4]
    assert [len(ring) for ring in polygons_of(crop_of(".# #."), 0)] == [4, 4]


def test_a_hole_is_cut_free() -> None:
    (ring,) = polygons_of(crop_of("##### #...# #...# #...# #####"), 0)
    assert _signed_area(ring) == 16
    assert len(ring) == 4 + 4 + 2
    island = polygons_of(crop_of("##### #...# #.#.# #...# #####"), 0)
    assert sorted(map(_signed_area, island)) == [1, 16]


@pytest.mark.parametrize("seed", range(30))
def test_without_a_tolerance_polygons_cover_the_mask_exactly(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((12, 15)) < (0.3, 0.5, 0.8)[seed % 3]
    rings = polygons_of(MaskCrop(0, 0, mask.astype(np.uint8)), 0)
    assert sum(map(_signed_area, rings)) == mask.sum()
    parts = [covered(ring, 12, 15) for ring in rings]
    assert (np.sum(parts, axis=0) == mask).all()
    if rings:
        assert (covered(join(rings), 12, 15) == mask).all()


@pytest.mark.parametrize("side", [16, 60, 300])
def test_a_ring_is_simplified(side: int) -> None:
    image = Image.new("L", (side, side))
    ImageDraw.Draw(image).ellipse((0, 0, side - 1, side - 1), fill=1)
    ImageDraw.Draw(image).ellipse((side // 3, side // 3, side // 2, side // 2), fill=0)
    mask = MaskCrop(0, 0, np.array(image))
    exact, simple = polygons_of(mask, 0), polygons_of(mask)
    assert len(simple) == len(exact) == 1
    assert len(simple[0]) < len(exact[0]) / 2
    again = MaskCrop(0, 0, covered(simple[0], side, side).astype(np.uint8))
    assert iou(mask, again) > 1 - 1.5 / side


def test_small_and_empty_masks() -> None:
    assert [len(ring) for ring in polygons_of(crop_of("#"))] == [4]
    assert len(polygons_of(crop_of("##########"))) == 1
    assert polygons_of(MaskCrop(0, 0, np.zeros((0, 0), np.uint8))) == []
