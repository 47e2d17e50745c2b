"""Damaged sources of every format: a reader raises InputError, or returns data that COCO's schema accepts.

`make test` tries a few cases of each format. `python -m pytest -m slow tests/data/test_converter_fuzz.py` tries 2,000.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from label_files import convert
from PIL import Image
from pydantic import TypeAdapter

from maskrcnn.data.coco_file import CocoFile, id_faults
from maskrcnn.data.converters import FORMATS
from maskrcnn.errors import InputError

FEW, MANY = 20, 2000
SCHEMA = TypeAdapter(CocoFile)
TOKENS = (
    b"0", b"-1", b"1e999", b"nan", b"1e-300", b"70000", b"9" * 400, b"null", b"true", b"[]", b"{}", b'""', b"x",
    b"../x", b"/etc/passwd", b"C:\\x", b"a.png", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xe2\x82\xac", b"[" * 300,
    b"<a>" * 40,
    b"<!DOCTYPE a [<!ENTITY b 'c'>]>", b"&b;", b"<!--", b"]]>", b"&a [*a]", b"%", b"polygon", b"mask", b"circle",
)  # fmt: skip
LABELS = np.array([[0, 1, 1, 2]] * 3, np.uint8).repeat(4, axis=0).repeat(4, axis=1)  # of an image of 16 x 12 pixels
POLYGON = [[1.0, 1.0], [9.0, 1.0], [9.0, 8.0]]
OUTLINE = [1.0, 1.0, 9.0, 1.0, 9.0, 8.0]


def photograph(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 12)).save(path)


def labels(path: Path, values: np.ndarray = LABELS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def masks(root: Path) -> Path:
    photograph(root / "images" / "a.png")
    labels(root / "labels" / "a.png")
    labels(root / "labels" / "a" / "1.png", LABELS.astype(np.uint16) * 300)
    return root / "labels"


def labelme(root: Path) -> Path:
    photograph(root / "images" / "a.png")
    png = io.BytesIO()
    Image.fromarray(LABELS[:3, :5] > 0).save(png, "PNG")
    kinds = {"polygon": POLYGON, "rectangle": POLYGON[:2], "circle": POLYGON[::2], "mask": [[0, 0], [4, 2]]}
    mask = base64.b64encode(png.getvalue()).decode()
    common = {"group_id": 1, "mask": mask}
    shapes = [{"label": kind, "points": points, "shape_type": kind, **common} for kind, points in kinds.items()]
    content = {"shapes": shapes, "imagePath": "../images/a.png", "imageHeight": 12, "imageWidth": 16}
    (root / "json").mkdir()
    (root / "json" / "a.json").write_text(json.dumps(content))
    return root / "json"


def yolo(root: Path) -> Path:
    photograph(root / "images" / "a.png")
    (root / "labels").mkdir()
    (root / "labels" / "a.txt").write_text("0 0.1 0.1 0.9 0.1 0.5 0.8\n1 0.5 0.5 0.2 0.2\n")
    (root / "data.yaml").write_text("path: x\ntrain: images\nval: [images]\nnames: {0: a, 1: b}\n")
    return root


def cvat(root: Path) -> Path:
    photograph(root / "images" / "a.png")
    shapes = (
        '<polygon label="a" points="1,1;9,1;9,8" group_id="1"/><box label="a" xtl="1" ytl="1" xbr="4" ybr="4"/>'
        '<ellipse label="a" cx="5" cy="5" rx="3" ry="2" rotation="30"/>'
        '<mask label="b" rle="1, 3, 2" left="2" top="2" width="3" height="2"/>'
    )
    names = "<label><name>a</name></label><label><name>b</name></label>"
    image = f'<image id="0" name="a.png" width="16" height="12" subset="x">{shapes}</image>'
    (root / "annotations.xml").write_text(f"<annotations><meta><labels>{names}</labels></meta>{image}</annotations>")
    return root / "annotations.xml"


def voc(root: Path) -> Path:
    photograph(root / "JPEGImages" / "a.png")
    labels(root / "SegmentationObject" / "a.png")
    labels(root / "SegmentationClass" / "a.png")
    (root / "Annotations").mkdir()
    names = "<object><name>aeroplane</name></object><object><name>bicycle</name></object>"
    (root / "Annotations" / "a.xml").write_text(
        f"<annotation><size><width>16</width><height>12</height></size>{names}</annotation>"
    )
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    (root / "ImageSets" / "Segmentation" / "train.txt").write_text("a\n")
    return root


def cityscapes(root: Path) -> Path:
    photograph(root / "leftImg8bit" / "train" / "x" / "a_leftImg8bit.png")
    labels(root / "gtFine" / "train" / "x" / "a_gtFine_instanceIds.png", LABELS.astype(np.uint16) * 1000 + 24000)
    return root


def coco(root: Path) -> Path:
    photograph(root / "images" / "x" / "a.png")
    entry = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 8, 7], "segmentation": [OUTLINE]}
    of_lvis = {"coco_url": "http://b/x/a.png", "neg_category_ids": [], "not_exhaustive_category_ids": []}
    content = {
        "images": [{"id": 1, "height": 12, "width": 16, "file_name": "x/a.png", **of_lvis}],
        "annotations": [entry],
        "categories": [{"id": 1, "name": "a"}],
    }
    (root / "a.json").write_text(json.dumps(content))
    return root / "a.json"


SOURCES: dict[str, Callable[[Path], Path]] = {
    "cityscapes": cityscapes, "coco": coco, "cvat": cvat, "labelme": labelme, "lvis": coco, "masks": masks, "voc": voc,
    "yolo": yolo,
}  # fmt: skip

edits = st.lists(
    st.tuples(
        st.sampled_from(("word", "word", "word", "word", "insert", "replace", "delete", "cut")),
        st.floats(0, 1, exclude_max=True),  # where, as a part of the file
        st.one_of(st.sampled_from(TOKENS), st.binary(max_size=6)),
        st.integers(1, 30),  # bytes
    ),
    min_size=1,
    max_size=3,
)


def damaged(content: bytes, changes: list[tuple[str, float, bytes, int]]) -> bytes:
    for action, where, token, size in changes:
        words = list(re.finditer(rb"[\w.\-]+", content)) if action == "word" else []
        if words:
            word = words[int(where * len(words))]
            content = content[: word.start()] + token + content[word.end() :]
            continue
        at = int(where * len(content))
        kept = {"insert": at, "word": at, "replace": at + len(token), "delete": at + size, "cut": len(content)}[action]
        content = content[:at] + (b"" if action in ("delete", "cut") else token) + content[kept:]
    return content


def other_image(where: float, size: int) -> bytes:
    """Return a proper PNG, in many cases of the right size, with other numbers or of another mode."""
    mode = ("1", "L", "L", "P", "I;16", "I;16", "RGB", "LA", "RGBA")[int(9 * where)]
    rng = np.random.default_rng(int(1e9 * where))
    image = Image.new(mode, (16, 12) if size < 20 else (size, 12))
    if mode in ("L", "P", "I;16"):
        dtype, most = (np.uint16, 40000) if mode == "I;16" else (np.uint8, 256)
        image = Image.fromarray(rng.integers(0, most, (12, 16)).astype(dtype))
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def check(name: str, root: Path, count: int) -> None:
    """Try sources of a format with one damaged file."""
    source = SOURCES[name](root)
    images = next(path for path in (root / "images", root / "leftImg8bit", root / "JPEGImages") if path.is_dir())
    files = sorted(path for path in root.rglob("*") if path.is_file())
    contents = {path: path.read_bytes() for path in files}
    photographs = None if name == "yolo" else images

    def valid() -> None:
        for data in convert(name, source, photographs).values():
            accepted = SCHEMA.validate_json(json.dumps(data, allow_nan=False))
            assert not id_faults(accepted)

    valid()
    settled = 0

    @settings(max_examples=count)
    @given(st.integers(0, len(files) - 1), edits)
    def try_one(number: int, changes: list[tuple[str, float, bytes, int]]) -> None:
        nonlocal settled
        path = files[number]
        action, where, _, size = changes[0]
        is_other = action == "word" and path.suffix == ".png"
        path.write_bytes(other_image(where, size) if is_other else damaged(contents[path], changes))
        with suppress(InputError):
            valid()
        path.write_bytes(contents[path])
        settled += 1

    try_one()
    assert settled >= count


def test_every_format_is_tried() -> None:
    assert set(SOURCES) == set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_sources(tmp_path: Path, name: str) -> None:
    check(name, tmp_path, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_many_damaged_sources(tmp_path: Path, name: str) -> None:
    check(name, tmp_path, MANY)
