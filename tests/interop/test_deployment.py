"""Export of whole models, and the check of the file."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from maskrcnn.cli import main
from maskrcnn.config import read_config, to_dict
from maskrcnn.data.loader import collate
from maskrcnn.data.transforms import Compose, Resize
from maskrcnn.engine.checkpoint import Checkpoint, save_checkpoint
from maskrcnn.engine.predictor import Predictor, without_objects
from maskrcnn.errors import InputError
from maskrcnn.experiment import ExperimentConfig
from maskrcnn.interop import deployment
from maskrcnn.interop.deployment import export_model, metadata_of, runner
from maskrcnn.interop.export_check import Checked, CheckFailed, check, compare
from maskrcnn.interop.graph import DetectionGraph
from maskrcnn.models.mask_rcnn import MaskRCNN
from maskrcnn.structures import ClassTable

CLASSES = ClassTable(("disc", "cross"), (1, 7))
TESTS = Path(__file__).parents[1]
IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 50, 75), dtype=np.uint8))


def predictor_of(config: str, *overrides: str) -> Predictor:
    torch.manual_seed(0)
    experiment = read_config(TESTS / config, ExperimentConfig, overrides)
    return experiment.predictor(experiment.model.build(2, pretrained=False).eval(), CLASSES)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return predictor_of("tiny_fpn.yaml")


def outputs_of(model: MaskRCNN, images: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return DetectionGraph(model)(images)


def test_the_graph_finds_what_the_model_finds(predictor: Predictor) -> None:
    examples = [without_objects(pixels) for pixels in IMAGES]
    detections = predictor.model.detect(collate(examples, [0, 0], predictor.model.size_divisor).images)
    boxes, labels, scores, masks = outputs_of(predictor.model, IMAGES)
    assert torch.equal(labels, detections.labels.clamp(min=0))
    assert torch.equal(boxes, detections.boxes)
    assert torch.equal(scores, detections.scores.clamp(min=0))
    assert torch.equal(masks, detections.masks)


def test_slots_without_a_detection_are_zero() -> None:
    model = predictor_of("tiny_fpn.yaml", "model.detection.score_threshold=1.0").model
    assert all(not output.any() for output in outputs_of(model, IMAGES))


def test_the_metadata(predictor: Predictor) -> None:
    metadata = json.loads(json.dumps(metadata_of(predictor)))
    assert metadata["classes"] == ["disc", "cross"]
    assert metadata["category_ids"] == [1, 7]
    resize = {"name": "Resize", "short_side": [64], "long_side": 64, "rounding": "nearest", "antialias": True}
    assert metadata["transforms"] == [resize]
    assert metadata["pixels"]["mean"] == pytest.approx([123.675, 116.28, 103.53])
    assert (metadata["stride"], metadata["mask_size"], metadata["detections_per_image"]) == (32, 28, 5)


def test_transforms_of_other_packages_have_their_name(predictor: Predictor) -> None:
    def doubled(example: Any, rng: Any) -> Any:
        return example

    other = Predictor(predictor.model, CLASSES, Compose((doubled, Resize((5,), 9))))
    assert [step["name"] for step in metadata_of(other)["transforms"]] == ["doubled", "Resize"]


# ---- The check


def outputs(boxes: Sequence[Sequence[float]], labels: Sequence[int], scores: Sequence[float]) -> list[Tensor]:
    return [torch.tensor(boxes), torch.tensor(labels), torch.tensor(scores), torch.full((len(labels), 2, 2), 0.5)]


BOXES = [[0.0, 0, 4, 4], [1.0, 0, 5, 4], [9.0, 9, 20, 20], [0.0, 0, 0, 0]]
FOUND = outputs(BOXES, [1, 1, 2, 0], [0.9, 0.9, 0.4, 0.0])


@pytest.mark.parametrize(
    ("theirs", "passed"),
    [
        (FOUND, True),
        (outputs([BOXES[1], BOXES[0], *BOXES[2:]], [1, 1, 2, 0], [0.9, 0.9, 0.4, 0]), True),  # equal scores
        (outputs(BOXES, [1, 1, 0, 0], [0.9, 0.9, 0, 0]), True),  # the lowest score may be below the threshold there
        (outputs([*BOXES[:2], [9.0, 9, 20.01, 20], BOXES[3]], [1, 1, 2, 0], [0.9, 0.9, 0.4, 0]), False),
        (outputs(BOXES, [1, 2, 2, 0], [0.9, 0.9, 0.4, 0]), False),  # another class
        (outputs(BOXES, [1, 1, 2, 0], [0.9, 0.89, 0.4, 0]), False),
        (outputs(BOXES, [1, 1, 2, 2], [0.9, 0.9, 0.4, 0.5]), False),  # one more
        (outputs(BOXES, [1, 0, 2, 0], [0.9, 0, 0.4, 0]), False),  # one less
        ([*FOUND[:3], FOUND[3] + 0.01], False),  # other masks
        (FOUND[:3], True),  # no mask head
    ],
)
def test_detections_are_compared(theirs: list[Tensor], passed: bool) -> None:
    result = compare(FOUND[: len(theirs)], theirs, (30, 40))
    assert result.detections == 3
    assert result.passed == passed


def test_no_detection_is_compared() -> None:
    nothing = outputs(BOXES, [0, 0, 0, 0], [0.0, 0, 0, 0])
    assert compare(nothing, nothing, (30, 40)) == Checked(30, 40, 0, 0, 0, 0)
    assert str(compare(nothing, nothing, (30, 40))) == "30 x 40 px: no detection in both"
    assert not compare(nothing, FOUND, (30, 40)).passed


def test_one_of_the_three_images_is_without_a_detection() -> None:
    model = predictor_of("tiny.yaml", "model.detection.score_threshold=0.5").model
    with torch.no_grad():
        model.box_head.cls_score.weight.mul_(10)  # scores above 0.6 in the scenes and of 0.16 in the grey image
    checked = check(model, lambda images: outputs_of(model, images))
    assert [result.detections > 0 for result in checked] == [True, True, False]
    with pytest.raises(CheckFailed, match="300 x 410 px: 4 detections, boxes to 1 px"):
        check(model, lambda images: _shifted(model, images))


def test_a_file_that_differs_is_not_left(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(deployment, "_write", lambda predictor, path: path.write_bytes(b"wrong"))
    monkeypatch.setattr(deployment, "runner", lambda path: lambda images: _shifted(predictor.model, images))
    with pytest.raises(CheckFailed, match="other detections than the model"):
        export_model(predictor, tmp_path / "new" / "model.pt2")
    assert list((tmp_path / "new").iterdir()) == []


def _shifted(model: MaskRCNN, images: Tensor) -> list[Tensor]:
    boxes, *others = outputs_of(model, images)
    return [boxes + 1, *others]


# ---- Wrong input


def test_wrong_names_and_existing_files_are_refused(predictor: Predictor, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.pth: the suffix says the format: \.onnx, or \.pt2"):
        export_model(predictor, tmp_path / "model.pth")
    existing = tmp_path / "model.pt2"
    existing.write_text("mine")
    with pytest.raises(InputError, match=r"model\.pt2 exists"):
        export_model(predictor, existing)
    assert existing.read_text() == "mine"
    with pytest.raises(InputError, match="cannot write there"):
        export_model(predictor, existing / "model.pt2")


def test_missing_packages_are_named(predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"onnx and onnxscript: pip install 'maskrcnn\[export\]'"):
        export_model(predictor, tmp_path / "model.onnx")
    assert runner(tmp_path / "model.onnx") is None


# ---- Whole models: tracing takes long

POOL, FLOOR = "{kind: roi_pool}", "{kind: roi_pool, rounding: floor}"
WARP, ALIGN = "{kind: roi_warp, aggregate: maximum}", "{kind: roi_align, aggregate: maximum}"
ANCHORS = "model.rpn.anchor_sizes=[[16, 32]]"
MODELS: dict[str, tuple[str, ...]] = {
    "fpn": ("tiny_fpn.yaml",),
    "fpn, group norm, no masks": ("tiny_fpn.yaml", "model.neck={kind: fpn, channels: 32, norm: gn}",
                                  "model.mask_head=null", "evaluation.best_metric=box/AP"),
    "one map, roi_pool, other heads": ("tiny.yaml", f"model.roi={POOL}", "model.mask_head={kind: mlp, width: 8}",
                                       "model.box_head={kind: conv_fc, convs: 1, conv_width: 8, width: 8}"),
    "one map, roi_pool and roi_warp": ("tiny.yaml", f"model.roi={WARP}", f"model.box_head.roi={FLOOR}"),
    "one map, roi_align, softmax": ("tiny.yaml", f"model.roi={ALIGN}", "model.mask_head.output=softmax"),
    "c4": ("tiny.yaml", "model.backbone={out_features: [res4], res5_on_regions: true}", ANCHORS,
           "model.box_head={kind: mean}", "model.mask_head={kind: fcn, pool_size: 14, depth: 0, width: 8}"),
    "vgg": ("tiny.yaml", "model.backbone={kind: vgg, depth: 11, weights: none, out_features: [conv5]}", ANCHORS),
}  # fmt: skip


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["maskrcnn", *map(str, arguments)])
        with pytest.raises(SystemExit) as exited:
            main()
        output = capsys.readouterr()
        return int(exited.value.code or 0), output.out + output.err

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_onnx_finds_what_the_model_finds(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    predictor = predictor_of(*MODELS[name])
    checked = export_model(predictor, tmp_path / "model.onnx")
    assert len(checked) == 3
    assert all(result.detections for result in checked[:2])
    run = runner(tmp_path / "model.onnx")
    assert run is not None
    for images in (IMAGES[:1], IMAGES[:, :, :33, :10], IMAGES[:, :, :1, :1]):
        results, expected = run(images), outputs_of(predictor.model, images)
        assert all(torch.allclose(ours, theirs, atol=1e-3) for ours, theirs in zip(results, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fpn", "c4"])
def test_torch_export_finds_what_the_model_finds(name: str, tmp_path: Path) -> None:
    predictor = predictor_of(*MODELS[name])
    assert len(export_model(predictor, tmp_path / "model.pt2")) == 3
    run = runner(tmp_path / "model.pt2")
    assert run is not None
    for images in (IMAGES[:1], IMAGES[:, :, :33, :10]):
        results, expected = run(images), outputs_of(predictor.model, images)
        assert all(torch.allclose(ours, theirs, atol=1e-3) for ours, theirs in zip(results, expected, strict=True))
    extra = {"metadata.json": ""}
    torch.export.load(tmp_path / "model.pt2", extra_files=extra)
    assert json.loads(extra["metadata.json"])["classes"] == ["disc", "cross"]


@pytest.mark.slow
def test_the_command(command: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    config = read_config(TESTS / "tiny.yaml", ExperimentConfig)
    state = config.model.build(2, pretrained=False).state_dict()
    save_checkpoint(tmp_path / "best.pt", Checkpoint(0, state, {}, {}, {}, {}, CLASSES, to_dict(config), {}, {}))
    arguments = ["export", "--weights", tmp_path / "best.pt", "--out"]
    status, output = command(*arguments, tmp_path / "model.pt2")
    assert status == 0, output
    assert "wrote" in output
    assert "compared with the model:\n  300 x 410 px: 4 detections, boxes to " in output
    status, output = command(*arguments, tmp_path / "model.pt2")
    assert (status, "model.pt2 exists" in output) == (2, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "model.pt2"]


@pytest.mark.slow
def test_the_examples_of_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They find the same as the predictor, up to the resizing, which is Pillow's there."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    predictor = predictor_of("tiny.yaml", "data.validation_transforms.resize.short_side=[50]")
    predictor.model.box_head.cls_score.bias.data[1] = 5.0  # scores above 0.5
    monkeypatch.chdir(tmp_path)
    Image.fromarray(IMAGES[0].permute(1, 2, 0).numpy()).save("photo.png")
    for name in ("model.onnx", "model.pt2"):
        export_model(predictor, Path(name))
    page = (TESTS.parent / "docs" / "export.md").read_text(encoding="utf-8")
    onnx, torch_export = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    exec(onnx, {})
    lines = capsys.readouterr().out.splitlines()
    instances = predictor(tmp_path / "photo.png")
    assert len(lines) == len(instances) > 0
    for line, name, score, box in zip(lines, instances.class_names, instances.scores, instances.boxes, strict=True):
        words = re.fullmatch(r"(\w+) (\S+) \((.*)\) \d+", line)
        assert words is not None
        assert words[1] == name
        assert float(words[2]) == pytest.approx(float(score), abs=0.02)
        assert [float(value) for value in words[3].split(",")] == pytest.approx(box.tolist(), abs=2)
    found: dict[str, Any] = {}
    exec(torch_export, found)
    assert found["classes"] == ["disc", "cross"]
    assert found["boxes"].shape == (1, 4, 4)
