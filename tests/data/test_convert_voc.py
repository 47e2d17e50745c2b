"""Folders as Pascal VOC's to COCO."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from label_files import HEIGHT, WIDTH, Scene, assert_same, convert, label_image, masks_of, write_scenes
from PIL import Image

from maskrcnn.data.converters.voc import CLASSES, VOID
from maskrcnn.errors import InputError

AS_VOC = {"disc": "bicycle", "ring": "dog", "cross": "tvmonitor"}


def write(root: Path, classes: tuple[str, ...] = CLASSES) -> list[Scene]:
    """Write scenes with a void border of one pixel around objects, as VOC has it."""
    scenes = write_scenes(root / "JPEGImages")
    for folder in ("SegmentationObject", "SegmentationClass", "Annotations", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    written = []
    for scene in scenes:
        objects = [(AS_VOC[name], mask) for name, mask in scene.objects]
        stem = Path(scene.name).stem
        numbers = label_image(scene)
        indices = np.zeros_like(numbers)
        for name, mask in objects:
            indices[mask] = classes.index(name) + 1
        around = np.pad(numbers > 0, 1)
        near = around[:-2, 1:-1] | around[2:, 1:-1] | around[1:-1, :-2] | around[1:-1, 2:]
        for folder, labels in (("SegmentationObject", numbers), ("SegmentationClass", indices)):
            labels[near & (numbers == 0)] = VOID
            image = Image.fromarray(labels).convert("P")
            image.putdata(labels.ravel().tolist())
            image.save(root / folder / f"{stem}.png")
        listed = "".join(f"<object><name>{name}</name><difficult>0</difficult></object>" for name, _ in objects)
        size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>"
        (root / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{size}{listed}</annotation>")
        written.append(Scene(scene.name, objects))
    (root / "ImageSets" / "Segmentation" / "train.txt").write_text("photo_0\nphoto_2\n")
    (root / "ImageSets" / "Segmentation" / "val.txt").write_text("photo_1\n")
    return written


def test_masks_pixel_by_pixel(tmp_path: Path) -> None:
    scenes = write(tmp_path)
    data = convert("voc", tmp_path)
    assert [category["name"] for category in data["train"]["categories"]] == list(CLASSES)
    assert_same(masks_of(data["train"]), [scenes[0], scenes[2]])
    assert_same(masks_of(data["val"]), [scenes[1]])


def test_own_classes_and_no_lists(tmp_path: Path) -> None:
    own = ("tvmonitor", "bicycle", "dog")
    scenes = write(tmp_path, own)
    for path in (tmp_path / "ImageSets" / "Segmentation").iterdir():
        path.unlink()
    with pytest.raises(InputError, match=r"class 3, 'bird', but .*photo_0\.xml lists bicycle, dog; --classes gives"):
        convert("voc", tmp_path)
    data = convert("voc", tmp_path, classes=",".join(own))[""]
    assert [category["name"] for category in data["categories"]] == list(own)
    assert_same(masks_of(data), scenes)


def test_without_class_images_the_order_of_the_objects_counts(tmp_path: Path) -> None:
    scenes = write(tmp_path)
    (tmp_path / "SegmentationClass").rename(tmp_path / "elsewhere")
    data = convert("voc", tmp_path)
    assert [category["name"] for category in data["val"]["categories"]] == sorted(AS_VOC.values())
    assert_same(masks_of(data["train"]), [scenes[0], scenes[2]])
    (tmp_path / "Annotations" / "photo_0.xml").write_text("<annotation/>")
    with pytest.raises(InputError, match=r"photo_0\.xml: it does not list object \d of photo_0\.png"):
        convert("voc", tmp_path)


def replace(root: Path, name: str, content: str | np.ndarray) -> None:
    path = root / name
    if isinstance(content, str):
        path.write_text(content)
    else:
        Image.fromarray(content).save(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("SegmentationObject/photo_0.png", np.ones((9, 9), np.uint8), r"photo_0\.png has 88 x 60 .* is for 9 x 9"),
        ("SegmentationObject/photo_0.png", np.ones((HEIGHT, WIDTH), np.uint16), r"photo_0\.png: expected 8 bits"),
        ("SegmentationObject/photo_0.png", "x", r"photo_0\.png: cannot be read as a label image"),
        ("SegmentationClass/photo_0.png", np.ones((9, 9), np.uint8), r"expected 8 bits for a pixel, and"),
        ("SegmentationClass/photo_0.png", np.zeros((HEIGHT, WIDTH), np.uint8), r"object 1 has the class 0, not"),
        ("Annotations/photo_0.xml", "<annotation><size><width>1</width><height>1</height></size></annotation>",
         r"photo_0\.xml: the image photo_0 has 88 x 60 pixels .* is for 1 x 1"),
        ("Annotations/photo_0.xml", "<annotation><size><width>x</width></size></annotation>", r"width 'x' is not"),
        ("Annotations/photo_0.xml", "<!DOCTYPE a><annotation/>", r"cannot be read as XML \(it has a docum"),
        ("Annotations/photo_0.xml", "<a/>", r"photo_0\.xml: there is no element <annotation>"),
        ("ImageSets/Segmentation/train.txt", "../photo_0", r"the name '\.\./photo_0' leads out of its folder"),
        ("ImageSets/Segmentation/train.txt", "photo_9", r"photo_9\.png: there is no image photo_9 in "),
    ],
)  # fmt: skip
def test_wrong_files(tmp_path: Path, name: str, content: str | np.ndarray, message: str) -> None:
    write(tmp_path)
    replace(tmp_path, name, content)
    with pytest.raises(InputError, match=message):
        convert("voc", tmp_path)


def test_another_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no folder SegmentationObject"):
        convert("voc", tmp_path)
