"""Every kind of fault that is planted is found, by file and id, and training does about it what the finding says."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from maskrcnn.data.coco import CocoConfig
from maskrcnn.data.findings import FAULTS, Treatment
from maskrcnn.data.image_checks import require_files
from maskrcnn.data.transforms import Compose, ResizeConfig
from maskrcnn.errors import InputError
from maskrcnn.inspection.reading import read_images
from maskrcnn.inspection.splits import shared_images, split_findings
from maskrcnn.inspection.subject import Subject, subject_of

HEIGHT, WIDTH = 48, 64
OBJECTS = 8  # of an image
RESIZE = Compose((ResizeConfig(short_side=(96,), long_side=200).build(),))


def picture(seed: int) -> Image.Image:
    """Return a picture of a few blurred colours, different for each seed."""
    colours = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(colours).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def rectangle(x: float, y: float, width: float, height: float) -> list[float]:
    return [x, y, x + width, y, x + width, y + height, x, y + height]


class Planted:
    """Two sound splits of three images with eight objects each, in which a test plants a fault."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.splits = {"train": self._split(1), "validation": self._split(11)}

    def _split(self, first: int) -> dict[str, Any]:
        ids = range(first, first + 3)
        for key in ids:
            picture(key).save(self.image(key))
        return {
            "images": [{"id": key, "file_name": f"{key}.png", "height": HEIGHT, "width": WIDTH} for key in ids],
            "annotations": [self._object(key, number) for key in ids for number in range(OBJECTS)],
            "categories": [{"id": 3, "name": "cat"}, {"id": 9, "name": "dog"}],
        }

    @staticmethod
    def _object(image: int, number: int) -> dict[str, Any]:
        x, y = 2 + 16 * (number % 4), 3 + 24 * (number // 4)
        return {
            "id": 100 * image + number,
            "image_id": image,
            "category_id": (3, 9)[number % 2],
            "bbox": [x, y, 12, 16],
            "segmentation": [rectangle(x, y, 12, 16)],
            "area": 192,
        }

    def image(self, key: int) -> Path:
        return self.folder / f"{key}.png"

    def annotation(self, key: int) -> dict[str, Any]:
        return next(entry for entry in self.splits["train"]["annotations"] if entry["id"] == key)

    def config(self, split: str, **options: Any) -> CocoConfig:
        path = self.folder / f"{split}.json"
        path.write_text(json.dumps(self.splits[split]))
        return CocoConfig(root=self.folder, annotations=path, images=Path(), **options)

    def findings(self, **options: Any) -> list[tuple[str, Subject, Any]]:
        subjects = [subject_of(self.config(name, **options), Path(), f"data.{name}") for name in self.splits]
        images = [read_images(subject, RESIZE, workers=0) for subject in subjects]
        found = [
            (finding.fault, subject, finding)
            for subject, read in zip(subjects, images, strict=True)
            for finding in split_findings(subject, read)
        ]
        shared = shared_images(subjects[0], images[0], subjects[1], images[1])
        return [*found, *((finding.fault, subjects[1], finding) for finding in shared)]


@pytest.fixture
def planted(tmp_path: Path) -> Planted:
    return Planted(tmp_path)


# ---- What is planted


def changed(**changes: Any) -> Callable[[Planted], None]:
    """Plant a fault in annotation 103, the fourth object of training image 1."""
    return lambda planted: planted.annotation(103).update(changes)


def cut(planted: Planted) -> None:
    planted.image(2).write_bytes(planted.image(2).read_bytes()[:-100])


def turned(orientation: int) -> Callable[[Planted], None]:
    def plant(planted: Planted) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture(2).save(planted.image(2), exif=exif)

    return plant


def without_mask(planted: Planted) -> None:
    del planted.annotation(103)["segmentation"]


def renamed(name: str) -> Callable[[Planted], None]:
    def plant(planted: Planted) -> None:
        planted.splits["train"]["categories"][0]["name"] = name

    return plant


def more_classes(planted: Planted) -> None:
    planted.splits["train"]["categories"].append({"id": 0, "name": "_background_"})


def few_of_a_class(planted: Planted) -> None:
    for annotation in planted.splits["train"]["annotations"][3:]:
        annotation["category_id"] = 3


def twice(planted: Planted) -> None:
    copy = {**planted.annotation(103), "id": 999, "bbox": [50, 3, 12, 15], "area": 180}
    planted.splits["train"]["annotations"].append({**copy, "segmentation": [rectangle(50, 3, 12, 15)]})


def repeated_id(planted: Planted) -> None:
    planted.annotation(104)["id"] = 103


def elsewhere(planted: Planted) -> None:
    planted.splits["train"]["images"][1]["file_name"] = "../2.png"


def same_bytes(source: int, target: int) -> Callable[[Planted], None]:
    return lambda planted: planted.image(target).write_bytes(planted.image(source).read_bytes()) and None


def encoded_again(planted: Planted) -> None:
    """Store a smaller JPEG of training image 2 as validation image 12."""
    file = io.BytesIO()
    picture(2).resize((40, 30)).save(file, "JPEG", quality=60)
    planted.image(12).write_bytes(file.getvalue())
    planted.splits["validation"]["images"][1].update(height=30, width=40)
    planted.splits["validation"]["annotations"] = [
        entry for entry in planted.splits["validation"]["annotations"] if entry["image_id"] != 12
    ]


def dark(dtype: type, value: float) -> Callable[[Planted], None]:
    def plant(planted: Planted) -> None:
        Image.fromarray(np.full((HEIGHT, WIDTH), value, dtype)).save(planted.image(2), format="TIFF")

    return plant


def corners(planted: Planted) -> None:
    planted.annotation(102).update(bbox=[34, 3, 46, 19])


BOW_TIE = [50.0, 3, 62, 19, 62, 3, 50, 19]
COUNTS = [HEIGHT * WIDTH // 2, HEIGHT * WIDTH // 2]


class Case(NamedTuple):
    """A planted fault, where it is found, and words of its text."""

    fault: str
    plant: Callable[[Planted], object]
    file: str = "1.png"
    annotations: tuple[int, ...] = (103,)
    words: str = ""


CASES = {
    "missing": Case("missing_image", lambda planted: planted.image(2).unlink(), "2.png", ()),
    "no image": Case("unreadable_image", lambda planted: planted.image(2).write_text("no image"), "2.png", ()),
    "cut off": Case("truncated_image", cut, "2.png", ()),
    "size": Case(
        "size_mismatch", lambda planted: picture(2).crop((0, 0, 60, 48)).save(planted.image(2)), "2.png", (), "60 x 48"
    ),
    "exif": Case("exif_mismatch", turned(6), "2.png", (), "48 x 64"),
    "exif, same size": Case("exif_orientation", turned(3), "2.png", (), "is 3"),
    "outside folder": Case("outside_folder", elsewhere, "../2.png", ()),
    "repeated annotation": Case("duplicate_id", repeated_id, "", (), "annotation id 103 is used 2 times"),
    "unknown image": Case("dangling_id", changed(image_id=77), "", (103,), "no image has the id 77"),
    "unknown class": Case("dangling_id", changed(category_id=78), "", (103,), "no category has the id 78"),
    "no mask": Case("no_mask", without_mask),
    "half a point": Case("invalid_polygon", changed(segmentation=[[1.0, 2, 3, 4, 5, 6, 7]])),
    "short rle": Case("invalid_rle", changed(segmentation={"size": [HEIGHT, WIDTH], "counts": [5, 5]})),
    "rle of another size": Case("invalid_rle", changed(segmentation={"size": [5, 2], "counts": [5, 5]})),
    "no width": Case("empty_box", changed(bbox=[50, 3, 0, 16])),
    "box outside": Case("empty_box", changed(bbox=[70, 3, 12, 16])),
    "two points": Case("short_polygon", changed(segmentation=[[50.0, 3, 62, 19]])),
    "line": Case("empty_mask", changed(segmentation=[[50.0, 3, 56, 9, 62, 15]])),
    "polygon outside": Case("empty_mask", changed(segmentation=[rectangle(70, 3, 12, 16)])),
    "empty rle": Case("empty_mask", changed(segmentation={"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]})),
    "box as corners": Case("box_mask", corners, annotations=(102,), words="it looks written as x1, y1, x2, y2"),
    "box elsewhere": Case("box_mask", changed(bbox=[44, 0, 12, 16])),
    "half the image": Case("box_mask", changed(segmentation={"size": [HEIGHT, WIDTH], "counts": COUNTS})),
    "twice": Case("near_duplicate", twice, annotations=(103, 999), words="both dog"),
    "12 bits": Case("dark_image", dark(np.uint16, 4095), "2.png", (), "16 bits and values up to 4095"),
    "float": Case("dark_image", dark(np.float32, 1.0), "2.png", (), "floating-point numbers up to 1,"),
    "in both splits": Case("same_image", same_bytes(2, 12), "12.png", (), "training image 2, 2.png"),
    "encoded again": Case("similar_image", encoded_again, "12.png", (), "training image 2, 2.png"),
    "twice in a split": Case("repeated_image", same_bytes(1, 2), "2.png", (), "image 1, 1.png"),
    "background": Case("unused_class", more_classes, "", (), "'_background_'"),
    "no name": Case("unnamed_class", renamed(" "), "", (), "category 3"),
    "name of another class": Case("unnamed_class", renamed("dog"), "", (), "category 3 is not the only one"),
    "few": Case("rare_class", few_of_a_class, "", (), "class 'dog' (category 9) has 1 objects"),
    "bow tie": Case("crossing_polygon", changed(segmentation=[BOW_TIE], area=96)),
    "leaves the image": Case("outside_polygon", changed(segmentation=[rectangle(50, 3, 19, 16)], bbox=[50, 3, 14, 16])),
    "area of the box": Case(
        "area_mask", changed(segmentation=[[50.0, 3, 62, 3, 50, 19]]), words="it is that of the box"
    ),
}


def test_sound_data_has_no_findings(planted: Planted) -> None:
    assert planted.findings() == []
    for name in planted.splits:
        require_files(planted.config(name).build(), name)


def test_masks_of_a_size_that_no_photograph_has_are_not_decoded(planted: Planted) -> None:
    """They would take gigabytes; the size is reported."""
    planted.splits["train"]["images"][0].update(height=65535, width=65535)
    half = {"size": [65535, 65535], "counts": [65535, 65535**2 - 65535]}
    planted.annotation(103)["segmentation"] = half
    assert {fault for fault, _, _ in planted.findings()} <= {"size_mismatch", "rare_class"}


def test_every_kind_of_fault_is_planted() -> None:
    assert {case.fault for case in CASES.values()} == set(FAULTS)


@pytest.mark.parametrize("name", CASES)
def test_planted_faults_are_found(planted: Planted, name: str) -> None:
    case = CASES[name]
    case.plant(planted)
    found = [finding for fault, _, finding in planted.findings() if fault == case.fault]
    assert (case.file, case.annotations) in [(finding.file, finding.annotation_ids) for finding in found]
    assert any(case.words in finding.text for finding in found)
    treatment = FAULTS[case.fault].treatment
    assert treated(planted) == treatment
    if treatment == "dropped":
        assert treated(planted, degenerate="refuse") == "refused"
        subjects = {subject.treatment(finding) for _, subject, finding in planted.findings(degenerate="refuse")}
        assert "refused" in subjects


def treated(planted: Planted, **options: Any) -> Treatment:
    """Return what training does with the data."""
    expected = len(planted.splits["train"]["annotations"])
    try:
        dataset = planted.config("train", **options).build()
        require_files(dataset, "data.train")
        examples = [dataset[index] for index in range(len(dataset))]
    except InputError:
        return "refused"
    assert all([mask.pixels.any() for mask in each.masks] == each.has_mask.tolist() for each in examples)
    return "kept" if sum(len(example.labels) for example in examples) == expected else "dropped"
