"""Pictures of findings, and the check for polygons that cross themselves."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskrcnn.data.findings import Finding
from maskrcnn.data.polygons import polygons_of
from maskrcnn.inspection.objects import crosses_itself
from maskrcnn.inspection.pictures import BOX, LINES, OUTSIDE, SIDE, Picture, finding_picture
from maskrcnn.inspection.subject import Subject
from maskrcnn.structures import MaskCrop


def drawn(folder: Path, *masks: Any, bbox: tuple[float, ...] = (10, 10, 20, 20)) -> np.ndarray:
    """Return the picture of a finding about annotations with these masks in a white image of 60 x 40 pixels."""
    Image.new("RGB", (60, 40), "white").save(folder / "a.png")
    data = {
        "images": [{"id": 1, "file_name": "a.png", "height": 40, "width": 60}],
        "annotations": [
            {"id": number, "image_id": 1, "category_id": 1, "bbox": list(bbox), "segmentation": mask}
            for number, mask in enumerate(masks)
        ],
        "categories": [{"id": 1, "name": "cat"}],
    }
    subject = Subject("data.train", data, folder, None, False, "a.json")
    picture = finding_picture(subject, Finding("area_mask", "it is wrong", 1, tuple(range(len(masks))), "a.png"))
    assert isinstance(picture, Picture)
    assert "it is wrong" in picture.caption
    encoded = picture.uri.removeprefix("data:image/jpeg;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")).astype(int)


def has(picture: np.ndarray, colour: tuple[int, int, int]) -> bool:
    """Return whether a colour is in a picture, as far as a JPEG keeps it."""
    return bool((np.abs(picture - colour).max(axis=2) < 60).any())


def shows_outside(picture: np.ndarray) -> bool:
    """Return whether a tenth of a picture is the grey beyond the image."""
    return bool((np.abs(picture - OUTSIDE).max(axis=2) < 12).mean() > 0.1)


POLYGON = [[12.0, 12, 28, 12, 28, 28, 12, 28]]
RLE = {"size": [40, 60], "counts": [12 * 40, 400, 1520]}


@pytest.mark.parametrize("mask", [POLYGON, RLE])
def test_box_and_outline_are_drawn(tmp_path: Path, mask: Any) -> None:
    picture = drawn(tmp_path, mask)
    assert max(picture.shape) == SIDE
    assert has(picture, BOX)
    assert has(picture, LINES[0])
    assert not has(picture, LINES[1])
    assert not shows_outside(picture)


def test_the_second_of_a_pair_has_another_colour(tmp_path: Path) -> None:
    assert has(drawn(tmp_path, POLYGON, [[14.0, 14, 30, 14, 30, 30]]), LINES[1])


def test_what_is_outside_the_image_is_shown_within_bounds(tmp_path: Path) -> None:
    picture = drawn(tmp_path, [[80.0, 10, 1e5, 10, 80, 40]], bbox=(-1e5, 5, 20, 20))
    assert shows_outside(picture)
    assert max(picture.shape) <= SIDE


@pytest.mark.parametrize("mask", [[[1.0, 2, 3]], [[]], [], {"size": [40, 60], "counts": "no"}, RLE | {"counts": [7]}])
def test_broken_masks_are_left_out(tmp_path: Path, mask: Any) -> None:
    assert has(drawn(tmp_path, mask), BOX)


def test_an_image_without_annotations_is_drawn_whole(tmp_path: Path) -> None:
    assert drawn(tmp_path).shape == (213, SIDE, 3)


def test_polygons_that_cross_themselves() -> None:
    square = np.array([[0.0, 0], [9, 0], [9, 9], [0, 9]])
    assert not crosses_itself(square)
    assert not crosses_itself(square[::-1])
    assert not crosses_itself(square[:3])
    assert not crosses_itself(np.repeat(square, 2, axis=0))
    assert crosses_itself(square[[0, 2, 1, 3]])
    pixels = np.ones((12, 12), np.uint8)
    pixels[4:8, 4:8] = 0
    (with_hole,) = polygons_of(MaskCrop(3, 5, pixels))
    assert len(with_hole) == 10
    assert not crosses_itself(with_hole)
