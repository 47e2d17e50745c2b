"""Label images to COCO: pixel by pixel."""

from __future__ import annotations

import json
import runpy
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from label_files import CLASSES, HEIGHT, WIDTH, Scene, assert_same, convert, label_image, masks_of, write_scenes
from PIL import Image

from maskrcnn.data.coco_file import read_coco_json
from maskrcnn.data.converters.conversion import Conversion
from maskrcnn.data.converters.objects import label_masks
from maskrcnn.data.converters.reading import Header, read_header
from maskrcnn.data.converters.splits import divide
from maskrcnn.errors import InputError


def as_objects(scenes: list[Scene], name: str = "object") -> list[Scene]:
    return [Scene(scene.name, [(name, mask) for _, mask in scene.objects]) for scene in scenes]


@pytest.mark.parametrize(("dtype", "suffix"), [(np.uint8, ""), (np.uint16, "_mask")])
def test_a_label_image_for_each_photograph(tmp_path: Path, dtype: type, suffix: str) -> None:
    scenes = write_scenes(tmp_path / "photos")
    (tmp_path / "labels").mkdir()
    for scene in scenes:
        labels = label_image(scene, dtype, first=1000 if dtype is np.uint16 else 1)
        Image.fromarray(labels).save(tmp_path / "labels" / f"{Path(scene.name).stem}{suffix}.png")
    data = convert("masks", tmp_path / "labels", tmp_path / "photos", "shape")[""]
    assert data["categories"] == [{"id": 1, "name": "shape"}]
    assert_same(masks_of(data), as_objects(scenes, "shape"))
    for entry, mask in zip(data["annotations"], (m for scene in scenes for _, m in scene.objects), strict=True):
        rows, columns = mask.nonzero()
        x, y = columns.min(), rows.min()
        assert entry["bbox"] == [x, y, columns.max() + 1 - x, rows.max() + 1 - y]
        assert entry["area"] == mask.sum()


def test_a_file_for_each_object_with_its_class_in_the_name(tmp_path: Path) -> None:
    scenes = write_scenes(tmp_path / "photos")
    for scene in scenes:
        folder = tmp_path / "masks" / Path(scene.name).stem
        folder.mkdir(parents=True)
        for number, (name, mask) in enumerate(scene.objects, start=1):
            Image.fromarray(mask).save(folder / f"{number:03d}_{name}.png")
    data = convert("masks", tmp_path / "masks", tmp_path / "photos", ",".join(CLASSES))[""]
    assert [category["name"] for category in data["categories"]] == list(CLASSES)
    assert_same(masks_of(data), scenes)


def test_the_file_is_valid_and_ids_count_over_all_splits(tmp_path: Path) -> None:
    scenes = write_scenes(tmp_path / "photos", 10)
    (tmp_path / "labels").mkdir()
    for scene in scenes:
        Image.fromarray(label_image(scene)).save(tmp_path / "labels" / scene.name)
    splits = divide(convert("masks", tmp_path / "labels", tmp_path / "photos")[""], 0.3)
    (tmp_path / "val.json").write_text(json.dumps(splits["val"]))
    assert read_coco_json(tmp_path / "val.json") == splits["val"]
    assert len(splits["val"]["images"]) == 3
    both = [image["id"] for data in splits.values() for image in data["images"]]
    assert sorted(both) == list(range(1, 11))
    with pytest.raises(InputError, match=r"--validation 0.01 of 10 images leaves one"):
        divide(convert("masks", tmp_path / "labels", tmp_path / "photos")[""], 0.01)


def test_label_masks_of_every_layout() -> None:
    """Objects of one pixel, in several parts, over whole columns, and at both ends of the image."""
    rng = np.random.default_rng(0)
    for labels in (rng.integers(0, 4, (7, 5)), np.array([[1, 1], [1, 2]]), np.full((3, 2), 7), np.zeros((2, 2), int)):
        found = dict(label_masks(labels))
        assert sorted(found) == sorted(set(labels.ravel().tolist()) - {0})
        for value, rle in found.items():
            decoded = masks_of(
                {
                    "categories": [{"id": 1, "name": "x"}],
                    "images": [{"id": 1, "file_name": "a", "height": labels.shape[0], "width": labels.shape[1]}],
                    "annotations": [{"image_id": 1, "category_id": 1, "segmentation": rle}],
                }
            )["a"][0][1]
            assert (decoded == (labels == value)).all()


def test_a_photograph_without_a_label_image_is_left_out_and_said(tmp_path: Path) -> None:
    scenes = write_scenes(tmp_path / "photos")
    (tmp_path / "labels").mkdir()
    Image.fromarray(label_image(scenes[0])).save(tmp_path / "labels" / scenes[0].name)
    conversion = Conversion(tmp_path / "labels", tmp_path / "photos")
    from maskrcnn.data.converters import masks

    assert len(masks.read(conversion)[""]["images"]) == 1
    assert list(conversion.notices()) == ["2 photographs without a label image are left out: photo_1.png, photo_2.png"]


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_sizes_are_those_of_the_upright_image(tmp_path: Path, orientation: int) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "labels").mkdir()
    image = Image.new("RGB", (40, 30))
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(tmp_path / "photos" / "a.jpg", exif=exif)
    turned = orientation == 6
    expected = Header(40, 30, 6) if turned else Header(30, 40, orientation)
    assert read_header(tmp_path / "photos" / "a.jpg") == expected
    Image.fromarray(np.ones((expected.height, expected.width), np.uint8)).save(tmp_path / "labels" / "a.png")
    data = convert("masks", tmp_path / "labels", tmp_path / "photos")[""]
    assert (data["images"][0]["height"], data["images"][0]["width"]) == (expected.height, expected.width)
    if turned:
        Image.fromarray(np.ones((30, 40), np.uint8)).save(tmp_path / "labels" / "a.png")
        with pytest.raises(
            InputError, match=r"a\.png: the image a\.jpg has 30 x 40 .* for 40 x 30\. It is stored turn"
        ):
            convert("masks", tmp_path / "labels", tmp_path / "photos")


def test_an_orientation_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").parent.mkdir(exist_ok=True)
    image = Image.new("RGB", (4, 4))
    exif = image.getexif()
    exif[0x0112] = 3
    image.save(tmp_path / "a.jpg", exif=exif)
    conversion = Conversion(tmp_path, tmp_path)
    conversion.photographs().header("a.jpg")
    assert "1 images have an EXIF orientation" in next(conversion.notices())


@pytest.mark.parametrize(
    ("name", "image", "message"),
    [
        ("other.png", Image.new("L", (WIDTH, HEIGHT)), r"other\.png: no photograph in .*photos has a name"),
        ("photo_0.png", Image.new("RGB", (WIDTH, HEIGHT)), r"photo_0\.png: its pixels are colours \(mode RGB\)"),
        ("photo_0.png", Image.new("L", (HEIGHT, WIDTH)), r"photo_0\.png: the image photo_0\.png has 88 x 60 pixels"),
        ("photo_0.png", None, r"photo_0\.png: cannot be read as a label image"),
    ],
)
def test_wrong_label_images(tmp_path: Path, name: str, image: Image.Image | None, message: str) -> None:
    write_scenes(tmp_path / "photos")
    (tmp_path / "labels").mkdir()
    if image is None:
        (tmp_path / "labels" / name).write_bytes(b"\x89PNG\r\n\x1a\nxx")
    else:
        image.save(tmp_path / "labels" / name)
    with pytest.raises(InputError, match=message):
        convert("masks", tmp_path / "labels", tmp_path / "photos")


def test_a_label_image_that_claims_too_many_pixels_is_refused_by_its_header(tmp_path: Path) -> None:
    write_scenes(tmp_path / "photos")
    (tmp_path / "labels").mkdir()
    header = struct.pack(">IIBBBBB", 8200, 8200, 8, 0, 0, 0, 0)
    chunks = [
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    ]
    (tmp_path / "labels" / "photo_0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    with pytest.raises(
        InputError, match=r"photo_0\.png: it has 8200 x 8200 pixels; a label image has at most 67108864"
    ):
        convert("masks", tmp_path / "labels", tmp_path / "photos")


@pytest.mark.parametrize("value", [-1, 65_536])
def test_values_of_32_bits_are_bounded(tmp_path: Path, value: int) -> None:
    write_scenes(tmp_path / "photos")
    (tmp_path / "labels").mkdir()
    labels = np.zeros((HEIGHT, WIDTH), np.int32)
    labels[3, 4] = 65_535
    Image.fromarray(labels).save(tmp_path / "labels" / "photo_0.tif")
    assert len(convert("masks", tmp_path / "labels", tmp_path / "photos")[""]["annotations"]) == 1
    labels[0, 0] = value
    Image.fromarray(labels).save(tmp_path / "labels" / "photo_0.tif")
    with pytest.raises(InputError, match=r"photo_0\.tif: a pixel has the value \d+; the values go from 0 to 65535"):
        convert("masks", tmp_path / "labels", tmp_path / "photos")


def test_wrong_folders_and_classes(tmp_path: Path) -> None:
    write_scenes(tmp_path / "photos")
    (tmp_path / "labels").mkdir()
    with pytest.raises(InputError, match=r"nowhere: no such file or folder"):
        convert("masks", tmp_path / "nowhere", tmp_path / "photos")
    with pytest.raises(InputError, match=r"nowhere: no such folder; --images names"):
        convert("masks", tmp_path / "labels", tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"--from masks needs --images"):
        convert("masks", tmp_path / "labels")
    with pytest.raises(InputError, match=r"must lie in different folders"):
        convert("masks", tmp_path / "photos", tmp_path / "photos")
    with pytest.raises(InputError, match=r"labels: there is no annotated image"):
        convert("masks", tmp_path / "labels", tmp_path / "photos")
    Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / "labels" / "photo_0_disc.png")
    with pytest.raises(InputError, match=r"photo_0_disc\.png: .*the name of a file ends in its class: ring, cross"):
        convert("masks", tmp_path / "labels", tmp_path / "photos", "ring,cross")
    Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / "photos" / "photo_0.bmp")
    with pytest.raises(InputError, match=r"photo_0\.bmp, photo_0\.png differ in their suffix alone"):
        convert("masks", tmp_path / "labels", tmp_path / "photos")


def test_penn_fudan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each 17 images, the last five are for validation; annotation ids begin at 1 in each file."""
    for folder in ("PNGImages", "PedMasks"):
        (tmp_path / folder).mkdir()
    for number in range(1, 18):
        Image.new("RGB", (4, 3)).save(tmp_path / "PNGImages" / f"FudanPed{number:05d}.png")
        Image.fromarray(np.array([[0, 1, 1, 2]] * 3, np.uint8)).save(
            tmp_path / "PedMasks" / f"FudanPed{number:05d}_mask.png"
        )
    monkeypatch.setattr(sys, "argv", ["prepare_penn_fudan.py", str(tmp_path)])
    for status in (0, 2):  # the second time, the files exist
        with pytest.raises(SystemExit) as exited:
            runpy.run_path(str(Path(__file__).parents[2] / "datasets" / "prepare_penn_fudan.py"), run_name="__main__")
        assert exited.value.code == status
    splits = [json.loads((tmp_path / name).read_text()) for name in ("train.json", "val.json")]
    assert [[image["id"] for image in split["images"]] for split in splits] == [list(range(1, 13)), list(range(13, 18))]
    assert splits[1]["annotations"][0] == {
        "id": 1, "image_id": 13, "category_id": 1, "bbox": [1.0, 0.0, 2.0, 3.0], "area": 6, "iscrowd": 0,
        "segmentation": {"size": [3, 4], "counts": "363"},
    }  # fmt: skip
    assert splits[1]["categories"] == [{"id": 1, "name": "person"}]
