"""The sides of the benchmark of loading do the same work. Nothing here looks at the clock."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

TOOLS = Path(__file__).parents[1] / "tools"


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def steps() -> ModuleType:
    return load(TOOLS / "benchmarks" / "data_steps.py")


@pytest.fixture
def photos(steps: ModuleType, tmp_path: Path) -> Any:
    """Three photographs of 80 x 60 px, each with one object, and one without."""
    for folder in ("annotations", "train2017"):
        (tmp_path / folder).mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    images = [{"id": number, "file_name": f"{number}.jpg", "height": 60, "width": 80} for number in range(1, 5)]
    for image in images:
        Image.fromarray(pixels).save(tmp_path / "train2017" / image["file_name"])
    entry = {"category_id": 1, "bbox": [5, 5, 30, 30], "area": 450, "iscrowd": 0}
    annotations = [
        {"id": number, "image_id": number, "segmentation": [[5, 5, 35, 5, 35, 35]], **entry} for number in (1, 2, 4)
    ]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "leaf"}]}
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    return steps.Photos(tmp_path, "train2017", 64)


def test_both_sides_load_the_same_photographs(steps: ModuleType, photos: Any) -> None:
    works = [steps.prepare("data", side, photos)() for side in ("ours", "torchvision", "torchvision, resized")]
    assert [work["images"] for work in works] == [3, 3, 3]
    key = "KiB to the device per image"
    cells = 800 * 1088 * 3  # enlarged and padded
    assert works[0][key] == pytest.approx(cells / 1024, rel=0.01)
    assert works[1][key] == round((60 * 80 * (3 * 4 + 1) + 4 * 4 + 8) / 1024)
    assert works[2][key] == pytest.approx((4 * cells + 800 * 1066) / 1024, rel=0.01)


@pytest.mark.parametrize("decoder", ["Pillow", "torchvision", "simplejpeg"])
def test_decoders_give_the_same_pixels(steps: ModuleType, photos: Any, decoder: str) -> None:
    if decoder == "simplejpeg":
        pytest.importorskip("simplejpeg")
    assert steps.prepare("decoders", decoder, photos)() == {"images": 3, "images with other pixels": 0}


def test_the_report_compares_with_every_side() -> None:
    benchmark = load(TOOLS / "benchmark.py")
    sides = [
        benchmark.Side(name, [benchmark.Repeat(seconds, {"images": 3})] * 2, 2**20)
        for name, seconds in (("ours", 1.0), ("torchvision", 3.0), ("torchvision, resized", 5.0))
    ]
    text = benchmark.report([benchmark.Measurement("data", sides, ["torch: 2.99"])], {"photos": ("coco", "val", 3)})
    assert "## data: 3.00 (3.00 to 3.00) times as fast, 1.00 times the memory than torchvision; 5.00" in text
    assert "precision" not in text
