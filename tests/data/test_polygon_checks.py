"""Checks of polygons agree with the masks that pycocotools draws."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as cocoapi

from maskrcnn.data import polygon_checks
from maskrcnn.data.polygon_checks import without_pixels

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools under numpy 2


def test_masks_without_a_pixel_are_those_that_pycocotools_draws_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    objects, sizes = [], []
    for _ in range(3000):
        size, centre = rng.integers(5, 60, 2), rng.uniform(-10, 70, 2)
        extent = 10 ** rng.uniform(-1.5, 1.5, 2)  # specks, slivers, and polygons larger than the image
        corners = [(centre + rng.normal(size=(rng.integers(3, 8), 2)) * extent) for _ in range(rng.integers(1, 3))]
        objects.append([polygon.ravel().tolist() for polygon in corners])
        sizes.append(size)
    masks = [
        cocoapi.merge(cocoapi.frPyObjects(polygons, *size.tolist()))
        for polygons, size in zip(objects, sizes, strict=True)
    ]
    empty = [cocoapi.area(mask) == 0 for mask in masks]
    assert 300 < sum(empty) < 2700
    monkeypatch.setattr(polygon_checks, "BLOCK", 1000)
    assert without_pixels(*flat(objects), np.array(sizes)).tolist() == empty
    monkeypatch.setattr(polygon_checks, "BLOCK", 1)
    assert without_pixels(*flat(objects[:100]), np.array(sizes[:100])).tolist() == empty[:100]


def flat(objects: list[list[list[float]]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return coordinates, the first one of each polygon, and the first polygon of each object."""
    polygons = [polygon for polygons in objects for polygon in polygons]
    starts = [np.cumsum([0, *map(len, rows)]) for rows in (polygons, objects)]
    return np.array([number for polygon in polygons for number in polygon], np.float64), *starts


def test_no_objects() -> None:
    assert without_pixels(*flat([]), np.zeros((0, 2), np.int64)).tolist() == []
    assert without_pixels(*flat([[], []]), np.full((2, 2), 9)).tolist() == [False, False]
