"""YOLO segmentation text to COCO."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from label_files import CLASSES, HEIGHT, WIDTH, Scene, assert_same, convert, masks_of, outlines, write_scenes
from PIL import Image

from maskrcnn.data.converters import yolo
from maskrcnn.data.converters.conversion import Conversion
from maskrcnn.data.polygons import join
from maskrcnn.errors import InputError

NAMES = "names: [disc, ring, cross]\n"


def label_text(scene: Scene) -> str:
    """Return a line for each object, with six decimals: a polygon along the edges of pixels, its parts connected."""
    lines = []
    for name, mask in scene.objects:
        points = join([np.array(ring) for ring in outlines(mask)]) / (WIDTH, HEIGHT)
        lines.append(" ".join([str(CLASSES.index(name)), *(f"{value:.6f}" for value in points.flatten())]))
    return "".join(f"{line}\n" for line in lines)


def write(folder: Path, line: str, description: str = f"train: images\n{NAMES}") -> Path:
    """Write a data set of one photograph with one label line."""
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "images" / "a.png")
    (folder / "labels" / "a.txt").write_text(line)
    (folder / "data.yaml").write_text(description)
    return folder


def test_splits_of_data_yaml(tmp_path: Path) -> None:
    splits = {}
    for split in ("train", "val"):
        splits[split] = write_scenes(tmp_path / "images" / split, 3 if split == "train" else 2)
        (tmp_path / "labels" / split).mkdir(parents=True)
        for scene in splits[split]:
            if scene.objects:
                (tmp_path / "labels" / split / scene.name).with_suffix(".txt").write_text(label_text(scene))
    names = "names:\n  0: disc\n  1: ring\n  2: cross\n"
    (tmp_path / "data.yaml").write_text(f"path: ../datasets/shapes\ntrain: images/train\nval: ../images/val\n{names}")
    found = convert("yolo", tmp_path)
    assert list(found) == ["train", "val"]
    for split, data in found.items():
        assert [category["name"] for category in data["categories"]] == list(CLASSES)
        assert data["images"][0]["file_name"] == f"images/{split}/photo_0.png"
        assert_same(masks_of(data), splits[split])


def test_a_folder_with_classes_txt(tmp_path: Path) -> None:
    scenes = write_scenes(tmp_path / "images")
    (tmp_path / "labels").mkdir()
    for scene in scenes:
        (tmp_path / "labels" / scene.name).with_suffix(".txt").write_text(label_text(scene))
    (tmp_path / "classes.txt").write_text("disc\nring\ncross\n")
    assert_same(masks_of(convert("yolo", tmp_path)[""]), scenes)


def test_polygons_stay_polygons_and_boxes_have_no_mask(tmp_path: Path) -> None:
    line = "1 0.25 0.1 0.5 0.1 0.5 0.6 0.25 0.6\n\n2 0.5 0.5 0.5 0.25\n"
    conversion = Conversion(write(tmp_path, line))
    polygon, box = yolo.read(conversion)["train"]["annotations"]
    assert polygon["segmentation"] == [pytest.approx([22, 6, 44, 6, 44, 36, 22, 36])]
    assert polygon["bbox"] == pytest.approx([22, 6, 22, 30])
    assert polygon["area"] == 660
    assert box["bbox"] == pytest.approx([22, 22.5, 44, 15])
    assert "segmentation" not in box
    assert next(conversion.notices()).startswith("1 label files have boxes, whose objects have no mask: ")


def test_a_list_of_images(tmp_path: Path) -> None:
    write(tmp_path, "", f"train: train.txt\n{NAMES}")
    (tmp_path / "train.txt").write_text("./images/a.png\n\n")
    assert convert("yolo", tmp_path / "data.yaml")["train"]["images"][0]["file_name"] == "images/a.png"
    (tmp_path / "train.txt").write_text("../../images/b.png\n")
    with pytest.raises(InputError, match=r"train\.txt: there is no image 'images/b\.png'"):
        convert("yolo", tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x 0 0 1 0 1 1", r"a\.txt, line 1: the class must be a number from 0 to 2, not 'x'"),
        ("3 0 0 1 0 1 1", r"line 1: the class must be a number from 0 to 2, not '3'"),
        ("9" * 5000 + " 0 0 1 0 1 1", r"line 1: the class must be a number from 0 to 2"),
        ("\n0 0 0 1 0 1 2 3", r"line 2: expected a class and a polygon"),
        ("0 0 0 1 0 1", r"line 1: expected a class and a polygon of at least three points"),
        ("0 0 0 1 0 1 x", r"line 1: a coordinate is not a number"),
        ("0 0 0 1 0 1 nan", r"line 1: a coordinate is not from 0 to 1"),
        ("0 5 5 20 5 20 20", r"line 1: a coordinate is not from 0 to 1"),
    ],
)
def test_wrong_lines(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        convert("yolo", write(tmp_path, line))


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ("train: pictures\n" + NAMES, r"data\.yaml: there is no folder or list of images 'pictures' below"),
        ("train: /etc\n" + NAMES, r"data\.yaml: there is no folder or list of images '/etc' below"),
        ("train: {a: b}\n" + NAMES, r"data\.yaml: a split must be a path"),
        ("train: images\n", r"data\.yaml: names: expected the names of the classes"),
        ("train: images\nnames: [a, [b]]\n", r"data\.yaml: names: expected the names of the classes"),
        ("train: images\nnames: [a, a]\n", r"data\.yaml: names: a name is there twice"),
        ("train: images\nnames: {1: a}\n", r"data\.yaml: names: the keys must be the numbers from 0 to 0"),
        (NAMES, r"data\.yaml: it names none of the splits train, val, test"),
        ("[", r"data\.yaml: not valid YAML: "),
        ("[" * 5000, r"data\.yaml: not valid YAML: "),
        ("- a", r"data\.yaml: expected a mapping"),
        ("a: &a [*a]\n", r"data\.yaml: not valid YAML: found unconstructable recursive node"),
        ("#" * 2**21, r"data\.yaml: cannot read the file \(it has 2097152 bytes, more than"),
    ],
)
def test_wrong_descriptions(tmp_path: Path, description: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        convert("yolo", write(tmp_path, "", description))


def test_wrong_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is neither data\.yaml nor classes\.txt"):
        convert("yolo", tmp_path)
    (tmp_path / "classes.txt").write_text("a")
    with pytest.raises(InputError, match=r"labels: no such folder"):
        convert("yolo", tmp_path)
