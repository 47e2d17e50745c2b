"""Test-time augmentation."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from maskrcnn.cli import predict
from maskrcnn.data.transforms import Compose, Resize
from maskrcnn.engine.instances import Instances
from maskrcnn.engine.predictor import Predictor
from maskrcnn.engine.tiles import TiledDetector
from maskrcnn.engine.tta import AugmentedDetector, default_short_sides
from maskrcnn.errors import InputError
from maskrcnn.experiment import load_config
from maskrcnn.models.mask_rcnn import MaskRCNN
from maskrcnn.structures import ClassTable

TINY = Path(__file__).parents[1] / "tiny_fpn.yaml"
PIXELS = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 40, 60), dtype=np.uint8))


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    torch.manual_seed(0)
    model = load_config(TINY).model.build(2)
    return Predictor(model, ClassTable(("disc", "cross"), (1, 2)), Compose((Resize((64,), 96),)))


def assert_close(ours: Instances, theirs: Instances, tolerance: float = 1e-4) -> None:
    assert len(ours) == len(theirs) > 0
    assert torch.equal(ours.labels, theirs.labels)
    for name in ("boxes", "scores", "mask_probabilities"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=0, atol=tolerance)


@pytest.mark.parametrize("sides", [(), (64,)])
def test_one_view_is_the_prediction(predictor: Predictor, sides: tuple[int, ...]) -> None:
    assert_close(AugmentedDetector(predictor, short_sides=sides).detect(PIXELS), predictor(PIXELS))


def test_a_model_without_a_mask_head(predictor: Predictor) -> None:
    torch.manual_seed(0)
    model = load_config(TINY, ["model.mask_head=null", "evaluation.best_metric=box/AP"]).model.build(2)
    boxes_alone = replace(predictor, model=model)
    instances = AugmentedDetector(boxes_alone).detect(PIXELS)
    assert_close(instances, boxes_alone(PIXELS))
    assert not instances.has_masks


def mirrored(instances: Instances) -> Instances:
    boxes = instances.boxes.clone()
    boxes[:, [0, 2]] = instances.width - instances.boxes[:, [2, 0]]
    return replace(instances, boxes=boxes, mask_probabilities=instances.mask_probabilities.flip(-1))


def test_a_flipped_image_has_the_flipped_detections(predictor: Predictor) -> None:
    """Both views of an image are those of its mirror image."""
    detector = AugmentedDetector(predictor, flip=True, short_sides=(48, 64))
    one, other = detector.detect(PIXELS), detector.detect(PIXELS.flip(-1))
    assert not torch.allclose(one.boxes, predictor(PIXELS).boxes, atol=0.1)
    assert_close(mirrored(other), one)


def test_the_masks_of_a_symmetric_image_are_symmetric(predictor: Predictor) -> None:
    """An object in the middle gets the mean of its mask and the mirrored one; one at the side has a twin."""
    half = PIXELS[..., :32]
    symmetric = torch.cat((half, half.flip(-1)), dim=-1)
    plain = predictor(symmetric)
    loose = replace(predictor, model=_with_all_boxes(predictor.model))
    instances = AugmentedDetector(loose, flip=True).detect(symmetric)
    mirror = mirrored(instances)
    for n in range(len(instances)):
        twins = (instances.labels == mirror.labels[n]) & ((instances.boxes - mirror.boxes[n]).abs().amax(dim=1) < 1e-3)
        assert twins.any()
        twin = int(twins.int().argmax())
        assert instances.scores[twin] == pytest.approx(float(mirror.scores[n]), abs=1e-5)
        torch.testing.assert_close(instances.mask_probabilities[twin], mirror.mask_probabilities[n], rtol=0, atol=1e-4)
    assert len(instances) > len(plain)


def _with_all_boxes(model: MaskRCNN) -> MaskRCNN:
    """The model without a suppression or a limit that could keep one of two twins."""
    import copy

    changed = copy.copy(model)
    changed.selector = copy.copy(model.selector)
    changed.selector.nms_threshold, changed.selector.detections_per_image = 1.0, 1000
    return changed


def test_views_find_what_one_does_not(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Boxes of both views are pooled; of two with an IoU above the threshold the better one stays."""
    boxes = {
        False: [[0.0, 0, 10, 10], [20, 0, 30, 10]],
        True: [[0.0, 0, 10, 10.5], [40, 20, 50, 30]],
    }
    scores = {False: [0.9, 0.6], True: [0.8, 0.7]}
    seen: list[Tensor] = []

    def detect_boxes(self: MaskRCNN, features: object, sizes: Tensor) -> object:
        flip = len(seen) == 1
        seen.append(sizes)
        detections = original(self, features, sizes)
        found = torch.tensor(boxes[flip]) * 1.6  # 40 pixels of the image are 64
        if flip:
            found[:, [0, 2]] = 96 - found[:, [2, 0]]
        zero = torch.zeros(1, 2, 0, 0)
        return replace(
            detections,
            boxes=found[None],
            scores=torch.tensor([scores[flip]]),
            labels=torch.ones(1, 2).long(),
            masks=zero,
        )

    original = MaskRCNN.detect_boxes
    monkeypatch.setattr(MaskRCNN, "detect_boxes", detect_boxes)
    instances = AugmentedDetector(predictor, flip=True).detect(PIXELS)
    expected = torch.tensor([[0.0, 0, 10, 10], [40, 20, 50, 30], [20, 0, 30, 10]])
    torch.testing.assert_close(instances.boxes, expected, rtol=0, atol=1e-4)
    assert instances.scores.tolist() == pytest.approx([0.9, 0.7, 0.6])


def test_batches_and_tiles(predictor: Predictor) -> None:
    detector = AugmentedDetector(predictor, flip=True)
    other = PIXELS.flip(-2)
    batch = detector.detect_prepared([detector.prepare(PIXELS), detector.prepare(other)])
    assert_close(batch[1], detector.detect(other))
    assert (batch[0].height, batch[0].width) == (40, 60)
    tiled = TiledDetector(detector, size=40, overlap=10).detect(PIXELS)
    assert len(tiled) > 0
    assert tiled.has_masks


def test_nothing_is_found(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor.model.selector, "score_threshold", 1.0)
    instances = AugmentedDetector(predictor, flip=True).detect(PIXELS)
    assert len(instances) == 0
    assert instances.masks.shape == (0, 40, 60)


def test_sizes_need_a_resize(predictor: Predictor) -> None:
    assert default_short_sides(predictor) == (48, 64, 80)
    other = replace(predictor, transform=Compose(()))
    AugmentedDetector(other, flip=True)
    with pytest.raises(InputError, match=r"needs one transform of kind resize .* there are 0"):
        AugmentedDetector(other, short_sides=(64,))
    with pytest.raises(InputError, match="kind resize"):
        default_short_sides(other)


def test_the_views_of_the_command() -> None:
    parser = argparse.ArgumentParser()
    predict.add_arguments(parser)
    required = ["photo.png", "--weights", "best.pt", "--out", "found"]
    assert parser.parse_args(required).tta == ()
    assert parser.parse_args([*required, "--tta", "flip,scales,640"]).tta == ("flip", "scales", "640")
    for text in ("", "flip,", "flop", "31", "10001", "-64", "flip 64", "٦٤"):
        with pytest.raises(SystemExit) as exited:
            parser.parse_args([*required, f"--tta={text}"])
        assert exited.value.code == 2
