"""The evaluator: its report, and its limit on detections."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from maskrcnn.data.shapes import ShapesDataset
from maskrcnn.engine.evaluator import Evaluator, report
from maskrcnn.engine.instances import Instances
from maskrcnn.engine.predictor import Predictor
from maskrcnn.experiment import load_config
from maskrcnn.runtime.processes import Processes
from maskrcnn.structures import Batch

CPU = torch.device("cpu")

IMAGES = {"images": [{"id": 1, "height": 100, "width": 100}], "categories": [{"id": 1, "name": "cell"}]}


def cell(number: int) -> dict[str, Any]:
    """Return the annotation of one of 150 objects that do not touch."""
    x, y = number % 15 * 6, number // 15 * 6
    polygon = [x, y, x + 4, y, x + 4, y + 4, x, y + 4]
    box = {"bbox": [x, y, 4, 4], "area": 16, "segmentation": [polygon]}
    return {"id": number + 1, "image_id": 1, "category_id": 1, "iscrowd": 0, **box}


CELLS = [cell(number) for number in range(150)]
PERFECT = [{"image_id": 1, "category_id": 1, "bbox": each["bbox"], "score": 0.9} for each in CELLS]


def test_a_limit_above_100_detections_is_evaluated() -> None:
    ground_truth = {**IMAGES, "annotations": CELLS}
    box = report(ground_truth, PERFECT, None, backend="faster", max_detections=150).box
    assert box is not None
    assert box.ap == pytest.approx(1.0)
    assert box.ar[150] == pytest.approx(1.0)
    limited = report(ground_truth, PERFECT, None, backend="faster").box
    assert limited is not None
    assert limited.ar[100] == pytest.approx(100 / 150)


def test_the_model_sets_the_limit_above_that_of_coco() -> None:
    recipe = "shapes/mask_rcnn_r18_fpn"
    assert load_config(recipe, ["model.detection.detections_per_image=20"]).max_detections == 100
    assert load_config(recipe, ["model.detection.detections_per_image=300"]).max_detections == 300


@pytest.mark.parametrize(
    ("annotations", "results", "message"),
    [
        ([], PERFECT[:1], "The ground truth has no objects, so there is no AP."),
        (CELLS, [], "AP50 is 0. Nothing was detected."),
        (CELLS, PERFECT, None),
    ],
)
def test_a_warning_explains_an_ap_of_nothing(
    annotations: list[Any], results: list[Any], message: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    report({**IMAGES, "annotations": annotations}, results, None, backend="faster")
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ([] if message is None else [message])


class Counted(ShapesDataset):
    """Generated scenes that count how often their ground truth is read."""

    reads = 0

    def ground_truth(self) -> dict[str, Any]:
        self.reads += 1
        return super().ground_truth()


def test_the_ground_truth_is_read_once_for_all_evaluations() -> None:
    settings = load_config(
        "shapes/mask_rcnn_r18_fpn", ["data.validation.length=2", "model.detection.detections_per_image=5"]
    )
    dataset = settings.data.build_validation()
    dataset.__class__ = Counted
    evaluator = Evaluator(dataset)
    predictor = settings.predictor(settings.model.build(len(dataset.classes)), dataset.classes)
    assert evaluator(predictor).summary() == pytest.approx(evaluator(predictor).summary(), nan_ok=True)
    assert isinstance(dataset, Counted)
    assert dataset.reads == 1


def test_a_batch_is_started_before_the_one_before_it_is_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a GPU computes while the host encodes masks."""
    settings = load_config(
        "shapes/mask_rcnn_r18_fpn", ["data.validation.length=3", "model.detection.detections_per_image=2"]
    )
    dataset = settings.data.build_validation()
    predictor = settings.predictor(settings.model.build(len(dataset.classes)), dataset.classes)
    events: list[str] = []
    start = Predictor.start

    def traced(self: Predictor, batch: Batch) -> Callable[[], list[Instances]]:
        finish, image = start(self, batch), batch.image_ids[0]
        events.append(f"start {image}")
        return lambda: [events.append(f"encode {image}"), *finish()][1:]  # type: ignore[func-returns-value]

    monkeypatch.setattr(Predictor, "start", traced)
    Evaluator(dataset)(predictor)
    first, second, third = (batch.image_ids[0] for batch in Evaluator(dataset)._batches(predictor, Processes(CPU)))
    order = [f"start {first}", f"start {second}", f"encode {first}", f"start {third}", f"encode {second}"]
    assert events == [*order, f"encode {third}"]
