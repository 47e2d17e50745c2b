from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as cocoapi

from maskrcnn.data.rle import counts_from_string, crop_from_counts, crop_from_polygons
from maskrcnn.structures import MaskCrop

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools under numpy 2


def paste(crop: MaskCrop, height: int, width: int) -> np.ndarray:
    full = np.zeros((height, width), np.uint8)
    rows, columns = crop.pixels.shape
    full[crop.y : crop.y + rows, crop.x : crop.x + columns] = crop.pixels
    return full


def test_run_lengths_by_hand() -> None:
    # 3 rows, 4 columns, in column-major order: 000 011 011 000.
    crop = crop_from_counts(np.array([4, 2, 1, 2, 3]), height=3)
    assert (crop.x, crop.y) == (1, 1)
    assert crop.pixels.tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize(
    ("counts", "box"),
    [([12], None), ([0, 12], (0, 0, 4, 3)), ([0, 0, 12], None), ([11, 1], (3, 2, 1, 1)), ([2, 2, 8], (0, 0, 2, 3))],
    ids=["empty", "full", "zero-length run", "last pixel", "run over two columns"],
)
def test_edges_of_the_image(counts: list[int], box: tuple[int, int, int, int] | None) -> None:
    crop = crop_from_counts(np.array(counts), height=3)
    height, width = crop.pixels.shape
    assert (crop.x, crop.y, width, height) == (box or (0, 0, 0, 0))


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("size", [(1, 1), (7, 300), (240, 33)])
def test_random_masks_survive_pycocotools_code(size: tuple[int, int], density: float) -> None:
    mask = (np.random.default_rng(0).random(size) < density).astype(np.uint8)
    code = cocoapi.encode(np.asfortranarray(mask))["counts"]
    crop = crop_from_counts(counts_from_string(code), size[0])
    assert np.array_equal(paste(crop, *size), mask)
    if mask.any():
        assert crop.pixels.any(axis=0)[[0, -1]].all()
        assert crop.pixels.any(axis=1)[[0, -1]].all()


@pytest.mark.parametrize("code", [b"", b"o", b"12o"])
def test_a_string_that_is_cut_off_is_refused(code: bytes) -> None:
    with pytest.raises(ValueError, match="empty or cut off"):
        counts_from_string(code)


@pytest.mark.parametrize("offset", [(0, 0), (317, 203), (-20, -5), (600, 440)])
def test_polygons_equal_pycocotools_wherever_they_lie(offset: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        # Coordinates in tenths, because pycocotools rounds to fifths: half of the points are rounding ties.
        polygons = [
            (rng.integers(0, 600, (int(rng.integers(3, 9)), 2)) / 10 + offset).reshape(-1)
            for _ in range(int(rng.integers(1, 4)))
        ]
        codes = cocoapi.frPyObjects([polygon.tolist() for polygon in polygons], 480, 640)
        expected = cocoapi.decode(cocoapi.merge(codes))
        assert np.array_equal(paste(crop_from_polygons(polygons, 480, 640), 480, 640), expected)


def test_a_polygon_below_the_size_of_a_pixel_has_no_mask() -> None:
    crop = crop_from_polygons([np.array([5.0, 5.0, 5.1, 5.0, 5.1, 5.1])], 10, 10)
    assert crop.pixels.shape == (0, 0)
