"""Cityscapes to COCO."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from label_files import HEIGHT, WIDTH, Scene, assert_same, convert, masks_of, write_scenes
from PIL import Image

from maskrcnn.data.converters import cityscapes
from maskrcnn.data.converters.conversion import Conversion
from maskrcnn.errors import InputError

IDS = {"disc": (24, "person"), "ring": (26, "car"), "cross": (33, "bicycle")}


def write(root: Path) -> dict[str, list[Scene]]:
    """Write scenes as `gtFine` and `leftImg8bit`; 7 is the class of a road, without objects."""
    splits = {}
    for split, city in (("train", "aachen"), ("val", "ulm")):
        photographs, labels = root / "leftImg8bit" / split / city, root / "gtFine" / split / city
        labels.mkdir(parents=True)
        splits[split] = []
        for number, scene in enumerate(write_scenes(photographs)):
            stem = f"{city}_{number:06d}_000019"
            (photographs / scene.name).rename(photographs / f"{stem}_leftImg8bit.png")
            values = np.full((HEIGHT, WIDTH), 7, np.uint16)
            for index, (name, mask) in enumerate(scene.objects):
                values[mask] = IDS[name][0] * 1000 + index
            Image.fromarray(values).save(labels / f"{stem}_gtFine_instanceIds.png")
            objects = [(IDS[name][1], mask) for name, mask in scene.objects]
            splits[split].append(Scene(f"{stem}_leftImg8bit.png", objects))
    return splits


@pytest.mark.parametrize("folder", ["", "gtFine"])
def test_masks_pixel_by_pixel(tmp_path: Path, folder: str) -> None:
    splits = write(tmp_path)
    data = convert("cityscapes", tmp_path / folder)
    assert [category["id"] for category in data["val"]["categories"]] == [24, 25, 26, 27, 28, 31, 32, 33]
    assert data["val"]["images"][0]["file_name"].startswith("val/ulm/ulm_000000")
    for split, scenes in splits.items():
        assert_same(masks_of(data[split]), scenes)


def test_groups_are_crowds_and_caravans_are_left_out(tmp_path: Path) -> None:
    write(tmp_path)
    values = np.full((HEIGHT, WIDTH), 7, np.uint16)
    values[:10], values[20:30], values[40:50] = 26, 29001, 24000
    Image.fromarray(values).save(tmp_path / "gtFine/train/aachen/aachen_000000_000019_gtFine_instanceIds.png")
    conversion = Conversion(tmp_path)
    entries = [each for each in cityscapes.read(conversion)["train"]["annotations"] if each["image_id"] == 1]
    assert [(each["category_id"], each["iscrowd"], each["area"]) for each in entries] == [
        (26, 1, 10 * WIDTH),
        (24, 0, 10 * WIDTH),
    ]
    assert next(conversion.notices()).startswith("1 regions of class caravan are left out: train/aachen/")


def test_wrong_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder gtFine"):
        convert("cityscapes", tmp_path)
    write(tmp_path)
    path = tmp_path / "gtFine/train/aachen/aachen_000000_000019_gtFine_instanceIds.png"
    Image.fromarray(np.full((HEIGHT, WIDTH), 7000, np.uint16)).save(path)
    with pytest.raises(InputError, match=r"instanceIds\.png: the value 7000 is of no class with objects"):
        convert("cityscapes", tmp_path)
    path.rename(path.with_name("x_gtFine_instanceIds.png"))
    with pytest.raises(InputError, match=r"there is no image 'train/aachen/x_leftImg8bit\.png'"):
        convert("cityscapes", tmp_path)
