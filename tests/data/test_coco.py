from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as cocoapi
from pycocotools.coco import COCO

from maskrcnn.data.coco import CocoConfig, CocoDataset
from maskrcnn.errors import InputError
from maskrcnn.structures import MaskCrop

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # pycocotools under numpy 2

HEIGHT, WIDTH = 20, 30
SQUARE = [4.0, 5.0, 8.0, 5.0, 8.0, 9.0, 4.0, 9.0]


def annotation(annotation_id: int, **changes: Any) -> dict[str, Any]:
    entry = {"id": annotation_id, "image_id": 1, "category_id": 1, "bbox": [4, 5, 4, 4], "segmentation": [SQUARE]}
    return {**entry, **changes}


def coco(annotations: list[dict[str, Any]], images: int = 1) -> dict[str, Any]:
    return {
        "images": [
            {"id": image_id, "file_name": f"{image_id}.png", "height": HEIGHT, "width": WIDTH}
            for image_id in range(1, images + 1)
        ],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "leaf"}],
    }


Write = Callable[[Any], Path]
Open = Callable[..., CocoDataset]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(data: Any) -> Path:
        path = tmp_path / "objects.json"
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        return path

    return write


@pytest.fixture
def open_dataset(write: Write, tmp_path: Path) -> Open:
    def open_dataset(data: dict[str, Any], **options: Any) -> CocoDataset:
        for image in data["images"]:
            Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / Path(image["file_name"]).name)
        return CocoDataset(write(data), tmp_path, **options)

    return open_dataset


def paste(crop: MaskCrop, height: int, width: int) -> np.ndarray:
    full = np.zeros((height, width), np.uint8)
    rows, columns = crop.pixels.shape
    full[crop.y : crop.y + rows, crop.x : crop.x + columns] = crop.pixels
    return full


# Valid files.


def test_one_square(open_dataset: Open) -> None:
    example = open_dataset(coco([annotation(7)]))[0]
    assert example.image_id == 1
    assert example.pixels.shape == (3, HEIGHT, WIDTH)
    assert example.boxes.tolist() == [[4, 5, 8, 9]]
    assert example.labels.tolist() == [1]
    (mask,) = example.masks
    assert (mask.x, mask.y) == (4, 5)
    assert mask.pixels.tolist() == np.ones((4, 4)).tolist()


@pytest.mark.parametrize("ids", [(0, 1, 2), (1, 2, 3), (7, 90, 1000), (9, 2, 5)], ids=str)
def test_category_ids_may_be_any(open_dataset: Open, ids: tuple[int, int, int]) -> None:
    data = coco([annotation(category_id, category_id=category_id) for category_id in ids])
    data["categories"] = [{"id": category_id, "name": f"class {category_id}"} for category_id in ids]
    dataset = open_dataset(data)
    assert dataset.classes.category_ids == tuple(sorted(ids))
    for label, category_id in zip(dataset[0].labels.tolist(), ids, strict=True):
        assert dataset.classes.category_ids[label - 1] == category_id
        assert dataset.classes.names[label - 1] == f"class {category_id}"


def test_all_kinds_of_masks_in_one_file(open_dataset: Open) -> None:
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[3:9, 10:12] = expected[15:, 29:] = 1
    compressed = cocoapi.encode(np.asfortranarray(expected))
    flat = expected.T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat, prepend=0))
    counts = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    second = [20, 1, 28, 1, 24, 8]
    segmentations: list[Any] = [
        [SQUARE],
        [SQUARE, second],
        {"size": [HEIGHT, WIDTH], "counts": counts},
        {"size": [HEIGHT, WIDTH], "counts": compressed["counts"].decode()},
    ]
    data = coco([annotation(i, segmentation=mask) for i, mask in enumerate(segmentations)])
    masks = [paste(mask, HEIGHT, WIDTH) for mask in open_dataset(data)[0].masks]
    assert masks[0].sum() == 16
    assert masks[1].sum() > 16
    assert np.array_equal(masks[2], expected)
    assert np.array_equal(masks[3], expected)


def test_crowds_are_dropped_or_kept_as_regions_to_ignore(open_dataset: Open) -> None:
    crowd = annotation(2, iscrowd=1, segmentation={"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]})
    data = coco([annotation(1), crowd])
    assert open_dataset(data)[0].labels.tolist() == [1]
    example = open_dataset(data, crowd="ignore")[0]
    assert example.labels.tolist() == [1, -1]
    assert [mask.pixels.size for mask in example.masks] == [16, 0]


@pytest.mark.parametrize("crowd", ["drop", "ignore"])
def test_images_without_objects(open_dataset: Open, crowd: str) -> None:
    data = coco([annotation(1, image_id=2), annotation(2, image_id=3, iscrowd=1)], images=3)
    empty = open_dataset(data, crowd=crowd)[0]
    assert empty.boxes.shape == (0, 4)
    assert empty.labels.shape == (0,)
    assert empty.masks == ()
    filtered = open_dataset(data, crowd=crowd, filter_empty=True)
    assert [filtered.image_id(i) for i in range(len(filtered))] == [2]


def test_boxes_are_cut_to_the_image(open_dataset: Open) -> None:
    assert open_dataset(coco([annotation(1, bbox=[-3, 18, 100, 5])]))[0].boxes.tolist() == [[0, 18, 30, 20]]


def test_images_can_be_chosen(open_dataset: Open) -> None:
    data = coco([annotation(1)], images=3)
    dataset = open_dataset(data, image_ids=(3, 1))
    assert [dataset.image_id(i) for i in range(len(dataset))] == [1, 3]
    with pytest.raises(InputError, match="names image 4"):
        open_dataset(data, image_ids=(1, 4))


def test_classes_can_be_chosen(open_dataset: Open) -> None:
    data = coco([annotation(1), annotation(2, category_id=7), annotation(3, category_id=9, image_id=2)], images=2)
    data["categories"] += [{"id": 9, "name": "tree"}, {"id": 7, "name": "bud"}]
    dataset = open_dataset(data, classes=("tree", "leaf"))
    assert (dataset.classes.names, dataset.classes.category_ids) == (("leaf", "tree"), (1, 9))
    assert [dataset[i].labels.tolist() for i in range(2)] == [[1], [2]]
    truth = dataset.ground_truth()
    assert [entry["id"] for entry in truth["annotations"]] == [1, 3]
    assert [category["id"] for category in truth["categories"]] == [1, 9]
    assert len(open_dataset(data, classes=("tree",), filter_empty=True)) == 1
    with pytest.raises(InputError, match="`classes` names 'flower', which is not in the file"):
        open_dataset(data, classes=("leaf", "flower"))


def test_classes_can_be_renamed_and_merged(open_dataset: Open) -> None:
    data = coco([annotation(1), annotation(2, category_id=7), annotation(3, category_id=9, image_id=2)], images=2)
    data["categories"] += [{"id": 9, "name": "tree"}, {"id": 7, "name": "bud", "supercategory": "plant"}]
    dataset = open_dataset(data, rename={"leaf": "foliage", "tree": "foliage"})
    assert (dataset.classes.names, dataset.classes.category_ids) == (("foliage", "bud"), (1, 7))
    assert [dataset[i].labels.tolist() for i in range(2)] == [[1, 2], [1]]
    truth = dataset.ground_truth()
    assert [entry["category_id"] for entry in truth["annotations"]] == [1, 7, 1]
    assert truth["categories"][1] == {"id": 7, "name": "bud", "supercategory": "plant"}
    assert open_dataset(data, classes=("bud",), rename={"bud": "leaf"}).classes.names == ("leaf",)
    for classes in ((), ("bud", "leaf")):
        with pytest.raises(InputError, match="`rename` names 'flower', which is not among the classes"):
            open_dataset(data, classes=classes, rename={"flower": "leaf"})
    with pytest.raises(InputError, match="`rename` names 'tree', which is not among the classes"):
        open_dataset(data, classes=("leaf",), rename={"tree": "leaf"})


def test_sizes_and_config(open_dataset: Open, tmp_path: Path) -> None:
    data = coco([annotation(1)], images=2)
    data["images"].reverse()
    data["images"][0]["height"] = 99
    open_dataset(data)
    dataset = CocoConfig(root=tmp_path, annotations=Path("objects.json"), images=Path()).build()
    assert dataset.image_sizes().tolist() == [[HEIGHT, WIDTH], [99, WIDTH]]


def test_a_pickled_dataset_is_the_same(open_dataset: Open) -> None:
    dataset = open_dataset(coco([annotation(1)]))
    assert pickle.loads(pickle.dumps(dataset))[0].boxes.tolist() == dataset[0].boxes.tolist()


def test_ground_truth_is_the_file_less_the_images_not_in_use(open_dataset: Open) -> None:
    data = coco([annotation(1, note="kept"), annotation(2, image_id=2)], images=2)
    truth = open_dataset(data, image_ids=(1,)).ground_truth()
    assert truth["images"] == data["images"][:1]
    assert truth["annotations"] == [{**data["annotations"][0], "iscrowd": 0, "area": 16.0}]


# Invalid files.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"segmentation": [[1, 2, 3, 4, 5, 6, 7]]}, "odd number of coordinates"),
        ({"segmentation": {"size": [5, 5], "counts": [25]}}, r"has size \[5, 5\], but its image has size \[20, 30\]"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [5, 5]}}, "do not add up"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": "12"}}, "do not add up"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": "o"}}, "cut off"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": "o" * 20 + "1"}}, "more than 60 bits"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": "\u20ac"}}, r"annotation 3 \(image 1\)"),
    ],
)
def test_malformed_masks_are_refused(open_dataset: Open, changes: dict[str, Any], message: str) -> None:
    data = coco([annotation(3, **changes)])
    with pytest.raises(InputError, match=message):
        open_dataset(data)
    with pytest.raises(InputError, match=r"annotation 3 \(image 1\)"):
        open_dataset(data, degenerate="refuse")


@pytest.mark.parametrize("segmentation", [..., None, []], ids=["missing", "null", "empty list"])
def test_an_object_may_have_a_box_alone(
    open_dataset: Open, caplog: pytest.LogCaptureFixture, segmentation: Any
) -> None:
    entry = annotation(3, segmentation=segmentation)
    if segmentation is ...:
        del entry["segmentation"]
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset(coco([annotation(1), entry]))
    assert "1 of 2 objects have no mask" in caplog.text
    assert dataset[0].has_mask.tolist() == [True, False]
    assert [mask.pixels.size for mask in dataset[0].masks] == [16, 0]
    assert dataset[0].boxes.tolist() == [[4, 5, 8, 9]] * 2
    assert dataset.origin()["objects without a mask"] == "1 (ids 3)"


@pytest.mark.parametrize(
    ("changes", "num_objects"),
    [
        ({"bbox": [4, 5, 0, 4]}, 1),
        ({"bbox": [4, 5, 4, -4]}, 1),
        ({"bbox": [40, 5, 4, 4]}, 1),
        ({"bbox": [4, 5, 1e-9, 4]}, 1),
        ({"segmentation": [[]]}, 1),
        ({"segmentation": [[1, 2, 3, 4]]}, 1),
        ({"segmentation": [SQUARE, [1, 2, 3, 4]]}, 2),
        ({"segmentation": [[40, 5, 45, 5, 45, 9]]}, 1),
        ({"segmentation": [[4, 5, 6, 7, 8, 9]]}, 1),
        ({"segmentation": [[4.1, 5.1, 4.2, 5.1, 4.2, 5.2]]}, 1),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}}, 1),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [5, 0, HEIGHT * WIDTH - 5]}}, 1),
    ],
    ids=[
        "no width",
        "negative",
        "outside",
        "no width in float32",
        "no point",
        "two points",
        "one polygon of two",
        "polygon outside",
        "line",
        "speck",
        "no run",
        "run of no length",
    ],
)
def test_degenerate_objects_are_refused_or_dropped_with_a_warning(
    open_dataset: Open, caplog: pytest.LogCaptureFixture, changes: dict[str, Any], num_objects: int
) -> None:
    data = coco([annotation(1), annotation(66, **changes)])
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset(data)
    assert len(dataset[0].labels) == len(dataset[0].masks) == num_objects
    assert all(mask.pixels.any() for mask in dataset[0].masks)
    assert "annotation 66" in caplog.text
    with pytest.raises(InputError, match=r"annotation 66 \(image 1\)[\s\S]*`degenerate: drop`"):
        open_dataset(data, degenerate="refuse")


def test_a_polygon_without_a_pixel_beside_another_one_is_no_fault(open_dataset: Open) -> None:
    data = coco([annotation(1, segmentation=[[4.1, 5.1, 4.2, 5.1, 4.2, 5.2], SQUARE])])
    assert open_dataset(data, degenerate="refuse")[0].masks[0].pixels.sum() == 16


@pytest.mark.parametrize("name", ["../1.png", "/etc/1.png", "a/../../1.png", "..\\1.png", "C:\\1.png"])
def test_file_names_must_stay_in_the_folder(open_dataset: Open, name: str) -> None:
    data = coco([])
    data["images"][0]["file_name"] = name
    with pytest.raises(InputError, match=r"image 1: its file_name .* points outside"):
        open_dataset(data)


def test_missing_images_are_noticed_at_once(write: Write, tmp_path: Path) -> None:
    path = write(coco([annotation(1)]))
    with pytest.raises(InputError, match=r"train2017: no such folder.*README"):
        CocoDataset(path, tmp_path / "train2017")
    with pytest.raises(InputError, match=r"1 of 1 images are missing: 1\.png\. "):
        CocoDataset(path, tmp_path)


def test_every_missing_image_is_found(write: Write, tmp_path: Path) -> None:
    data = coco([], images=30)
    for image in data["images"]:
        image["file_name"] = f"{image['id'] % 2}/{image['id']}.png"
    images = tmp_path / "images"
    (images / "0").mkdir(parents=True)
    for image in data["images"]:
        if image["id"] % 2 == 0:
            (images / image["file_name"]).touch()
    (images / "0/30.png").unlink()
    (images / "0/30.png").symlink_to("30.png")
    with pytest.raises(InputError, match=r"16 of 30 images are missing: 1/1\.png, 1/3\.png, .*, and 6 more\. "):
        CocoDataset(write(data), images)
    (images / "0/30.png").unlink()
    (images / "0/30.png").symlink_to("2.png")
    (images / "1").symlink_to("0")
    with pytest.raises(InputError, match="15 of 30 images are missing"):
        CocoDataset(write(data), images)


def test_no_image_left_is_an_error(open_dataset: Open) -> None:
    with pytest.raises(InputError, match="no image with objects is left"):
        open_dataset(coco([]), filter_empty=True)


def test_an_image_of_another_size_is_refused_when_it_is_read(open_dataset: Open, tmp_path: Path) -> None:
    dataset = open_dataset(coco([annotation(1)]))
    Image.new("RGB", (31, 20)).save(tmp_path / "1.png")
    with pytest.raises(InputError, match=r"1\.png: the image is 31 x 20 .* says 30 x 20 \(image 1\)\.$"):
        dataset[0]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "1.png", exif=exif)
    with pytest.raises(InputError, match="EXIF"):
        dataset[0]


# The COCO subset.


@pytest.mark.parametrize(("split", "images", "objects"), [("train2017", 343, 2974), ("val2017", 206, 1786)])
def test_the_real_subset(shared_data: Path, split: str, images: int, objects: int) -> None:
    file = shared_data / "coco_subset" / "annotations" / f"instances_{split}.json"
    dataset = CocoDataset(file, shared_data / "coco_subset" / split, crowd="ignore")
    assert len(dataset) == images
    assert len(dataset.classes) == 80
    reference = COCO(file)
    num_objects = 0
    for i in range(len(dataset)):
        example = dataset[i]
        assert tuple(example.pixels.shape[1:]) == tuple(dataset.image_sizes()[i])
        entries = reference.imgToAnns[example.image_id]
        for entry, mask, label in zip(entries, example.masks, example.labels.tolist(), strict=True):
            num_objects += 1
            assert (label == -1) == bool(entry["iscrowd"])
            if label > 0 and i % 3 == 0:  # full-size masks of pycocotools are slow
                assert dataset.classes.category_ids[label - 1] == entry["category_id"]
                expected = reference.annToMask(entry)
                assert np.array_equal(paste(mask, *expected.shape), expected)
    assert num_objects == objects


def test_ground_truth_of_the_real_subset_is_the_file_itself(shared_data: Path) -> None:
    file = shared_data / "coco_subset" / "annotations" / "instances_val2017.json"
    truth = CocoDataset(file, shared_data / "coco_subset" / "val2017").ground_truth()
    assert truth == json.loads(file.read_text())
