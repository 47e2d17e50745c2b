"""The command `inspect-dataset`: what it prints, its page, and its exit status."""

from __future__ import annotations

import base64
import io
import json
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from html_page import Page
from PIL import Image

from maskrcnn.cli import main
from maskrcnn.experiment import load_config
from maskrcnn.inspection import examination, reading
from maskrcnn.inspection.coverage import Settings, best_iou, limits
from maskrcnn.inspection.examination import examine
from maskrcnn.inspection.text import as_text
from maskrcnn.visualization.bars import bar_chart, histogram

TINY = Path(__file__).parents[1] / "tiny.yaml"
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>"
SETTINGS = Settings(
    anchor_sizes=((32,), (64,)),
    anchor_ratios=(0.5, 1.0, 2.0),
    anchor_strides=(4, 8),
    background=0.3,
    cell=4,
    detections_per_image=5,
    short_side=100,
)

pytestmark = pytest.mark.usefixtures("logging_restored")


def write(folder: Path, name: str, **changes: Any) -> None:
    """Write an annotation file of two images, one with a bow tie and one with a box and a mask that disagree."""
    for number in (1, 2):
        colours = np.random.default_rng(len(name) + number).integers(0, 256, (12, 16, 3), np.uint8)
        Image.fromarray(colours).resize((64, 48)).save(folder / f"{name}{number}.png")
    images = [{"id": n, "file_name": f"{name}{n}.png", "height": 48, "width": 64} for n in (1, 2)]
    bow_tie, square = [10.0, 10, 40, 40, 40, 10, 10, 40], [5.0, 5, 25, 5, 25, 25, 5, 25]
    annotations = [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 10, 30, 30], "segmentation": [bow_tie]},
        {"id": 2, "image_id": 2, "category_id": 1, "bbox": [40, 10, 20, 20], "segmentation": [square]},
    ]
    data = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": HOSTILE}]}
    (folder / f"{name}.json").write_text(json.dumps({**data, **changes}))


@pytest.fixture
def inspect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def inspect(*arguments: str) -> tuple[int, str, str]:
        sets = [
            f"data.{split}={{kind: coco, root: {tmp_path}, annotations: {split}.json, images: .}}"
            for split in ("train", "validation")
        ]
        command = ["maskrcnn", "inspect-dataset", str(TINY), f"--out={tmp_path / 'out'}", *arguments]
        monkeypatch.setattr(sys, "argv", [*command, *(f"--set={value}" for value in sets)])
        with pytest.raises(SystemExit) as exited:
            main()
        return int(exited.value.code or 0), *capsys.readouterr()

    return inspect


def test_the_page_and_the_text(tmp_path: Path, inspect: Callable[..., tuple[int, str, str]]) -> None:
    write(tmp_path, "train")
    write(tmp_path, "validation")
    status, out, _ = inspect("--count=1")
    assert status == 0
    assert "data.train: 1 warning, 2 notes" in out
    assert "train2.png: annotation 2 (image 2): its box is (40, 10, 60, 30), but its mask" in out
    assert "silent traps" in out
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page(text)
    words = "".join(page.texts)
    assert HOSTILE in words  # as text
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    sources = [str(attributes["src"]) for tag, attributes in page.tags if tag == "img"]
    assert len(sources) >= 2 * (1 + 2)  # a sample, a bow tie and a box in each split
    for source in sources:
        Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/jpeg;base64,")))).verify()
    assert "prefers-color-scheme: dark" in text
    links = [str(attributes[key]) for _, attributes in page.tags for key in ("href", "src") if key in attributes]
    assert all(link.startswith(("#", "data:image/jpeg;base64,")) for link in links)
    lines = [json.loads(line) for line in (tmp_path / "out" / "findings.jsonl").read_text().splitlines()]
    assert {line["fault"] for line in lines} == {"crossing_polygon", "box_mask", "rare_class"}
    assert {line["file"] for line in lines} == {"", "train1.png", "train2.png", "validation1.png", "validation2.png"}


def test_a_hostile_file_name_is_text(tmp_path: Path, inspect: Callable[..., tuple[int, str, str]]) -> None:
    images = [{"id": 1, "file_name": "<script>alert(2)<b>", "height": 48, "width": 64}]
    write(tmp_path, "train", images=images, annotations=[])
    write(tmp_path, "validation")
    status, out, err = inspect()
    assert status == 2
    assert "error: 1 x missing image (refused by training" in out
    assert err.count("error: ") == 1
    assert "a training would refuse this data (errors: 1)" in err
    page = Page((tmp_path / "out" / "report.html").read_text())
    assert "<script>alert(2)<b>" in "".join(page.texts)
    assert not [tag for tag, _ in page.tags if tag == "script"]


def test_an_image_in_both_splits_is_shown_beside_its_twin(
    tmp_path: Path, inspect: Callable[..., tuple[int, str, str]]
) -> None:
    write(tmp_path, "train")
    write(tmp_path, "validation")
    Image.open(tmp_path / "train2.png").save(tmp_path / "validation1.png", compress_level=1)
    status, out, _ = inspect("--count=0")
    assert status == 0
    assert "1 x image that is in both splits, stored in another way" in out
    captions = re.findall(r"<figcaption>([^<]*)</figcaption></figure>", (tmp_path / "out" / "report.html").read_text())
    shown = captions.index("validation1.png: image 1: it looks like training image 2, train2.png")
    assert captions[shown + 1] == "train2.png: image 2: the training image"


def test_one_split(tmp_path: Path, inspect: Callable[..., tuple[int, str, str]]) -> None:
    write(tmp_path, "train")
    status, out, _ = inspect("--split=train", "--count=2")
    assert status == 0
    assert "data.validation" not in out
    assert (tmp_path / "out" / "1.png").exists()


def test_worker_processes_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(TINY)
    here = as_text(examine(config, ("train",), workers=0))
    monkeypatch.setattr(reading, "FEW", 0)
    assert as_text(examine(config, ("train",), workers=1)) == here
    assert "data.train: nothing is wrong" in here or "note" in here


def test_an_interrupt_ends_the_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "FEW", 0)
    monkeypatch.setattr(reading, "tqdm", interrupted)
    with pytest.raises(KeyboardInterrupt):
        examine(load_config(TINY), ("train",), workers=1)


def interrupted(items: Any, *_: object, **__: object) -> Any:
    """Send Ctrl-C to this process after the first image."""
    for item in items:
        yield item
        signal.raise_signal(signal.SIGINT)


def test_classes_that_differ_are_refused(tmp_path: Path) -> None:
    config = load_config(TINY, ["data.validation.classes=[disc, ring]"])
    examined = examine(config, ("train", "validation"), workers=0)
    (refusal,) = examined.refusals
    assert "disc" in refusal
    assert refusal.splitlines()[0] in as_text(examined)
    assert examination.model_settings(config).short_side == 64


# ---- What the settings make of the objects


def squares(*sides: float) -> np.ndarray:
    """Return squares around (64, 64)."""
    half = np.array(sides)[:, None] / 2
    return np.concatenate([64 - half, 64 - half, 64 + half, 64 + half], axis=1)


def test_the_best_anchor() -> None:
    assert best_iou(squares(32, 64, 16), SETTINGS).tolist() == pytest.approx([1.0, 1.0, 0.25])
    moved = squares(32) + 1.0  # one pixel from the centre of a cell, along both axes
    assert best_iou(moved, SETTINGS)[0] == pytest.approx(31**2 / (2 * 32**2 - 31**2))


def test_limits_and_remedies() -> None:
    boxes = squares(*[12.0] * 30, *[40.0] * 60, *[3.0] * 10)
    unreached, smaller, cut_off = limits(boxes, [60, 40], SETTINGS)
    assert (unreached.share, smaller.share, cut_off.share) == (0.4, 0.1, 0.9)
    assert unreached.remedy == "model.rpn.anchor_sizes: [[16], [32]] leaves 10.0%"
    assert smaller.remedy == "short_side: [150] of resize, with long_side to match (1.5 times as large) leaves 0.0%"
    assert cut_off.remedy == "model.detection.detections_per_image: 100 instead cuts off none"
    assert [limit.remedy for limit in limits(squares(32.0, 64.0), [1, 1], SETTINGS)] == ["", "", ""]
    assert limits(np.zeros((0, 4)), [0], SETTINGS) == []


# ---- Charts


def test_bar_charts_and_histograms() -> None:
    chart = bar_chart({HOSTILE: 3, "b": 0}, "objects")
    Page(chart)
    assert "<script>" not in chart
    chart = histogram(np.array([1.0, 2, 3, 500]), (1.0, 2.0, 4.0, 8.0), "px", marks=[4.0])
    assert chart.count("<rect") == 3
    heights = [float(height) for height in re.findall(r'<rect [^>]*height="([\d.]+)"', chart)]
    assert heights[0] * 2 == pytest.approx(heights[1])
    assert heights[0] == heights[2]
    assert histogram(np.zeros(0), (0.0, 1.0), "px").count("<rect") == 1
