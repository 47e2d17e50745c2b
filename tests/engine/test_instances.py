"""Detections of an image: original pixels, selection, masks, COCO results and pictures.

Shapes: B images, D detections, M mask side.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pycocotools.mask
import pytest
import torch

from maskrcnn.data.mask_crops import window_of
from maskrcnn.data.rle import empty_crop
from maskrcnn.engine.instances import Instances
from maskrcnn.evaluation.average_precision import evaluate
from maskrcnn.ops.mask_tables import tabulate
from maskrcnn.ops.masks import PasteConvention
from maskrcnn.structures import AxisAlignedMap, Batch, ClassTable, Detections, ImageBatch, MaskCrop, Targets
from maskrcnn.visualization.colours import class_colour

CLASSES = ClassTable(names=("cat", "dog"), category_ids=(5, 90))


def make_batch() -> Batch:
    """Return two images without objects: 40 x 60 scaled by 2, and 30 x 50 scaled by 2 in x and 3 in y."""
    images = ImageBatch(
        torch.zeros(2, 3, 96, 128), torch.tensor([[80, 120], [90, 100]]), torch.zeros(2, dtype=torch.int64)
    )
    maps = (AxisAlignedMap(2.0, 2.0), AxisAlignedMap(2.0, 3.0))
    no_mask = torch.zeros(2, 1, dtype=torch.bool)
    targets = Targets(torch.zeros(2, 1, 4), torch.full((2, 1), -1), tabulate([[], []], maps, 1), no_mask)
    return Batch((11, 12), images, targets, maps, ((40, 60), (30, 50)))


def make_detections() -> Detections:
    boxes = torch.tensor(
        [[[20.0, 20, 40, 60], [100, 60, 120.5, 80], [0, 0, 0, 0]], [[20, 30, 40, 60], [0] * 4, [0] * 4]]
    )
    scores = torch.tensor([[0.75, 0.5, -torch.inf], [0.25, -torch.inf, -torch.inf]])
    labels = torch.tensor([[2, 1, -1], [1, -1, -1]])
    return Detections(boxes, scores, labels, torch.ones(2, 3, 28, 28))


def results_of(detections: Detections, paste: PasteConvention = "exact") -> list[dict[str, Any]]:
    batch = make_batch()
    instances = zip(batch.image_ids, Instances.of_batch(detections, batch, CLASSES, paste), strict=True)
    return [result for image_id, of_image in instances for result in of_image.to_coco(image_id)]


def test_detections_return_to_the_original_images() -> None:
    results = results_of(make_detections())
    assert [(r["image_id"], r["category_id"], r["score"]) for r in results] == [
        (11, 90, 0.75),
        (11, 5, 0.5),
        (12, 5, 0.25),
    ]
    assert [r["bbox"] for r in results] == [[10, 10, 10, 20], [50, 30, 10, 10], [10, 10, 10, 10]]
    assert [r["segmentation"]["size"] for r in results] == [[40, 60], [40, 60], [30, 50]]
    masks = [pycocotools.mask.decode(r["segmentation"]) for r in results]
    assert [int(mask.sum()) for mask in masks] == [200, 100, 100]
    assert masks[0][10:30, 10:20].all()
    json.dumps(results)


def test_torchvisions_paste_makes_larger_masks() -> None:
    results = results_of(make_detections(), paste="torchvision")
    assert int(pycocotools.mask.area(results[2]["segmentation"])) == 144


def test_no_detections() -> None:
    padding = torch.full((2, 3), -1)
    empty = Detections(torch.zeros(2, 3, 4), padding * torch.inf, padding, torch.zeros(2, 3, 28, 28))
    assert results_of(empty) == []
    no_detections = Detections(
        torch.zeros(2, 0, 4), torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0, 7, 7)
    )
    assert results_of(no_detections) == []


def test_results_are_evaluated_as_they_come() -> None:
    results = results_of(make_detections())
    ground_truth: dict[str, Any] = {
        "images": [
            {"id": 11, "file_name": "a", "height": 40, "width": 60},
            {"id": 12, "file_name": "b", "height": 30, "width": 50},
        ],
        "categories": [{"id": 5, "name": "cat"}, {"id": 90, "name": "dog"}],
        "annotations": [
            {key: r[key] for key in ("image_id", "category_id", "bbox", "segmentation")} | {"id": i}
            for i, r in enumerate(results)
        ],
    }
    figures = evaluate(ground_truth, results).summary()
    assert figures["mask/AP"] == figures["box/AP"] == pytest.approx(1)


# Use in a program.


@pytest.fixture
def instances() -> Instances:
    (first, _) = Instances.of_batch(make_detections(), make_batch(), CLASSES)
    return first


def test_names_and_masks(instances: Instances) -> None:
    assert len(instances) == 2
    assert instances.class_names == ("dog", "cat")
    assert instances.masks.shape == (2, 40, 60)
    assert instances.masks.dtype == torch.bool
    decoded = [pycocotools.mask.decode(result["segmentation"]) for result in instances.to_coco(image_id=3)]
    assert np.array_equal(instances.masks.numpy(), np.stack(decoded))
    assert not len(instances[:0].masks)


def in_pixels(*masks: MaskCrop) -> Instances:
    """Return instances of class cat and decreasing score with these masks, in an image of 100 x 50 pixels."""
    boxes = torch.tensor([window_of(mask) for mask in masks], dtype=torch.float32).reshape(-1, 4)
    count = len(masks)
    scores, labels = torch.linspace(0.9, 0.5, count), torch.ones(count, dtype=torch.int64)
    return Instances(boxes, scores, labels, torch.zeros(count, 0, 0), 50, 100, CLASSES, pixel_masks=masks)


SQUARE = MaskCrop(10, 20, np.ones((5, 5), np.uint8))
TWO_PARTS = MaskCrop(40, 10, np.array([[1, 1, 0, 1]] * 3, np.uint8))


def test_masks_in_pixels_are_masks_too() -> None:
    both = in_pixels(SQUARE, TWO_PARTS)
    assert both.has_masks
    assert both.masks.sum(dim=(1, 2)).tolist() == [25, 9]
    assert both[both.scores < 0.7].mask_crops == [TWO_PARTS]
    assert both[-1].mask_crops == both[[1]].mask_crops == [TWO_PARTS]
    for result, mask in zip(both.to_coco(1), both.masks.numpy(), strict=True):
        assert (pycocotools.mask.decode(result["segmentation"]) == mask).all()


def test_labelme_has_a_polygon_for_each_part() -> None:
    content = in_pixels(SQUARE, TWO_PARTS).to_labelme("../a.jpg")
    assert [(shape["label"], shape["group_id"]) for shape in content["shapes"]] == [
        ("cat", None),
        ("cat", 1),
        ("cat", 1),
    ]
    assert sorted(content["shapes"][0]["points"]) == [[10, 20], [10, 25], [15, 20], [15, 25]]
    assert content["shapes"][0]["description"] == "score 0.900"
    assert content["shapes"][0]["shape_type"] == "polygon"
    assert (content["imagePath"], content["imageHeight"], content["imageWidth"]) == ("../a.jpg", 50, 100)
    json.dumps(content)


def test_yolo_has_a_line_for_each_instance() -> None:
    first, second = in_pixels(SQUARE, TWO_PARTS, empty_crop()).to_yolo()
    label, *values = map(float, first.split())
    assert label == 0
    corners = np.array(values).reshape(-1, 2) * (100, 50)
    assert sorted(map(tuple, corners.tolist())) == [(10, 20), (10, 25), (15, 20), (15, 25)]
    assert len(second.split()) == 1 + 2 * (4 + 4 + 2)  # both parts, and the way between them and back


def test_boxes_of_a_model_without_masks(instances: Instances) -> None:
    boxes_alone = dataclasses.replace(instances, mask_probabilities=torch.zeros(2, 0, 0))
    (shape, _) = boxes_alone.to_labelme("a.jpg")["shapes"]
    assert (shape["shape_type"], shape["points"]) == ("rectangle", [[10, 10], [20, 30]])
    assert boxes_alone.to_yolo()[0] == "1 0.250000 0.500000 0.166667 0.500000"  # of 60 x 40 pixels


def test_supervision(instances: Instances, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="pip install supervision"):
        instances.to_supervision()
    monkeypatch.setitem(sys.modules, "supervision", SimpleNamespace(Detections=SimpleNamespace))
    detections = instances.to_supervision()
    assert detections.xyxy.tolist() == instances.boxes.tolist()
    assert (detections.mask == instances.masks.numpy()).all()
    assert detections.class_id.tolist() == [1, 0]
    assert detections.data["class_name"].tolist() == ["dog", "cat"]


def test_selection(instances: Instances) -> None:
    assert instances[1].class_names == instances[-1].class_names == ("cat",)
    assert instances[[1, 0]].scores.tolist() == [0.5, 0.75]
    confident = instances[instances.scores > 0.6]
    assert confident.boxes.tolist() == [[10, 10, 20, 30]]
    assert confident.to_coco(5) == instances.to_coco(5)[:1]
    assert len(instances[:0]) == 0


def test_pictures(instances: Instances) -> None:
    with pytest.raises(ValueError, match="no image to draw on"):
        instances.draw()
    with_image = dataclasses.replace(instances, image=torch.zeros(3, 40, 60, dtype=torch.uint8))
    picture = np.array(with_image.draw())
    assert picture.shape == (40 * 6, 60 * 6, 3)  # small images are enlarged
    assert picture.any()
    assert not np.array(with_image.draw(min_score=0.8)).any()
    by_class = np.array(with_image.draw(colour_by="class"))
    assert (by_class[120, 60] == class_colour(2)).all()


def test_crops_and_binary_images_equal_the_masks(instances: Instances) -> None:
    for mask, crop, image in zip(instances.masks.numpy(), instances.mask_crops, instances.to_png(), strict=True):
        height, width = crop.pixels.shape
        assert (mask[crop.y : crop.y + height, crop.x : crop.x + width] == crop.pixels).all()
        assert mask.sum() == crop.pixels.sum()
        assert image.mode == "1"
        assert (np.array(image) == mask).all()
    boxes_alone = dataclasses.replace(instances, mask_probabilities=torch.zeros(2, 0, 0))
    assert boxes_alone.mask_crops == []
    with pytest.raises(ValueError, match="no mask head"):
        boxes_alone.to_png()
