"""CVAT for images to COCO."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from label_files import CLASSES, HEIGHT, WIDTH, Scene, assert_same, convert, masks_of, outlines, write_scenes
from PIL import Image

from maskrcnn.data.converters import cvat
from maskrcnn.data.converters.conversion import Conversion
from maskrcnn.errors import InputError

LABELS = "".join(f"<label><name>{name}</name><type>any</type></label>" for name in CLASSES)
HEAD = f"<annotations><version>1.1</version><meta><task><labels>{LABELS}</labels></task></meta>"


def image(name: str, shapes: str, extra: str = "") -> str:
    return f'<image id="0" name="{name}" {extra} width="{WIDTH}" height="{HEIGHT}">{shapes}</image>'


def mask_element(name: str, mask: np.ndarray) -> str:
    rows, columns = mask.nonzero()
    crop = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    runs = [(value, len(list(run))) for value, run in itertools.groupby(crop.ravel().tolist())]
    counts = [*([0] if runs[0][0] else []), *(length for _, length in runs)]
    place = f'left="{columns.min()}" top="{rows.min()}" width="{crop.shape[1]}" height="{crop.shape[0]}"'
    return f'<mask label="{name}" occluded="0" rle="{", ".join(map(str, counts))}" {place} z_order="0"/>'


def polygon_elements(number: int, name: str, mask: np.ndarray) -> str:
    rings = (";".join(f"{x:.2f},{y:.2f}" for x, y in ring) for ring in outlines(mask))
    return "".join(f'<polygon label="{name}" points="{ring}" group_id="{number}"/>' for ring in rings)


def write(folder: Path, body: str, head: str = HEAD) -> Path:
    if not (folder / "a.png").exists():
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "a.png")
    (folder / "annotations.xml").write_text(f"{head}{body}</annotations>")
    return folder / "annotations.xml"


def test_masks_pixel_by_pixel(tmp_path: Path) -> None:
    scenes = write_scenes(tmp_path / "images")
    elements = [image(scene.name, "".join(mask_element(*item) for item in scene.objects)) for scene in scenes]
    data = convert("cvat", write(tmp_path, "".join(elements)))[""]
    assert [category["name"] for category in data["categories"]] == list(CLASSES)
    assert_same(masks_of(data), scenes)


def test_polygons_in_groups(tmp_path: Path) -> None:
    scenes = write_scenes(tmp_path / "images")

    def shapes(scene: Scene) -> str:
        return "".join(polygon_elements(number, *item) for number, item in enumerate(scene.objects, start=1))

    data = convert("cvat", write(tmp_path, "".join(image(scene.name, shapes(scene)) for scene in scenes)))[""]
    assert all(isinstance(entry["segmentation"], list) for entry in data["annotations"])
    assert_same(masks_of(data), scenes)


def test_ellipses_and_boxes(tmp_path: Path) -> None:
    ellipse = '<ellipse label="disc" cx="44.5" cy="30.5" rx="20.25" ry="8.25" rotation="90"/>'
    box = '<box label="ring" xtl="10" ytl="20" xbr="30" ybr="24" rotation="90"/>'
    data = convert("cvat", write(tmp_path, image("a.png", ellipse + box)))[""]
    oval, turned = data["annotations"]
    assert turned["bbox"] == pytest.approx([18, 12, 4, 20])
    assert "segmentation" not in turned
    _, mask = masks_of({**data, "annotations": [oval]})["a.png"][0]
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    assert (mask == (((columns - 44) / 8.25) ** 2 + ((rows - 30) / 20.25) ** 2 <= 1)).all()


def test_subsets_are_splits_and_points_are_left_out(tmp_path: Path) -> None:
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "b.png")
    body = image("a.png", '<points label="disc" points="1,1"/>', 'subset="Train"') + image("b.png", "", 'subset="Val"')
    conversion = Conversion(write(tmp_path, body))
    splits = cvat.read(conversion)
    assert {name: len(data["images"]) for name, data in splits.items()} == {"train": 1, "val": 1}
    assert next(conversion.notices()).startswith("1 shapes of type points are left out: ")


def test_labels_of_tags_and_points_are_no_classes(tmp_path: Path) -> None:
    head = HEAD.replace("</labels>", "<label><name>dark</name><type>tag</type></label></labels>")
    data = convert("cvat", write(tmp_path, image("a.png", ""), head))[""]
    assert [category["name"] for category in data["categories"]] == list(CLASSES)


MASK = '<mask label="disc" rle="{}" left="{}" top="0" width="4" height="3"/>'
DOUBLING = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'


@pytest.mark.parametrize(
    ("body", "head", "message"),
    [
        (image("b.png", ""), HEAD, r"annotations\.xml: there is no image 'b\.png' in "),
        (image("../a.png", ""), HEAD, r"annotations\.xml: the image '\.\./a\.png' lies outside of the image folder"),
        (image("/etc/passwd", ""), HEAD, r"annotations\.xml: the image '/etc/passwd' lies outside of the image folder"),
        (image("a.png", "").replace("60", "61"), HEAD, r"the image a\.png has 88 x 60 .* is for 88 x 61"),
        (image("a.png", "").replace("60", "x"), HEAD, r"image a\.png: height is not a number from"),
        (image("a.png", "", 'subset="../x"'), HEAD, r"its subset '\.\./x' is no name of letters"),
        (image("a.png", MASK.format("3, 4", 0)), HEAD, r"a\.png, shape 0: its run lengths do not add up to 4 x 3"),
        (image("a.png", MASK.format("x", 0)), HEAD, r"a\.png, shape 0: its rle is not a list of numbers"),
        (
            image("a.png", MASK.format("12", 86)),
            HEAD,
            r"mask of 4 x 3 pixels at \(86, 0\) does not lie in",
        ),
        (image("a.png", '<polygon points="1,2;3"/>'), HEAD, r"a\.png, shape 0: its points are not numbers"),
        (image("a.png", '<polygon points="1,2;3,4;nan,1"/>'), HEAD, r"shape 0: a coordinate is not a number from"),
        (image("a.png", '<polygon points="1,2;3,4;5,1"/>'), HEAD, r"a\.png, shape 0: it has no label"),
        (image("a.png", "<box/>"), HEAD, r"a\.png: xtl is not a number"),
        ("<track/>", HEAD, r"annotations\.xml: this is CVAT for video"),
        ("", HEAD, r"annotations\.xml: there is no annotated image"),
        ("<image", HEAD, r"annotations\.xml: cannot be read as XML \(not well-formed"),
        ("<a>" * 40, HEAD, r"annotations\.xml: cannot be read as XML \(elements nest more than 32 deep"),
        (image("a.png", ""), DOUBLING + HEAD, r"annotations\.xml: cannot be read as XML \(it has a document type"),
        (
            image("a.png", ""),
            '<?xml version="1.0" encoding="x-no"?>' + HEAD,
            r"annotations\.xml: cannot be read as XML",
        ),
    ],
)
def test_wrong_files(tmp_path: Path, body: str, head: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        convert("cvat", write(tmp_path, body, head))


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a file, such as annotations\.xml"):
        convert("cvat", tmp_path)
