"""Checks of polygons agree with the masks that pycocotools draws."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as cocoapi

from maskrcnn.data.polygon_checks import without_pixels

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools under numpy 2


def test_masks_without_a_pixel_are_those_that_pycocotools_draws_empty() -> None:
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
    assert without_pixels(objects, np.array(sizes)).tolist() == empty


def test_no_objects() -> None:
    assert without_pixels([], np.zeros((0, 2), np.int64)).tolist() == []
