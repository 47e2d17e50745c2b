"""docs/augmentation.md and its picture show every transform and sampler."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from PIL import Image

import maskrcnn.experiment  # noqa: F401 (defines all kinds)
from maskrcnn.config.parts import Part, choices_of
from maskrcnn.data.sampling import SamplerConfig
from maskrcnn.data.transforms import TransformConfig

REPOSITORY = Path(__file__).parents[2]


def own_kinds(point: type[Part]) -> set[str]:
    return {kind for kind, choice in choices_of(point).items() if choice.__module__.startswith("maskrcnn.")}


@pytest.mark.parametrize("point", [TransformConfig, SamplerConfig])
def test_every_kind_is_listed(point: type[Part]) -> None:
    text = (REPOSITORY / "docs" / "augmentation.md").read_text()
    assert [kind for kind in sorted(own_kinds(point)) if f"`{kind}`" not in text] == []


def test_every_transform_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sheet = tmp_path / "sheet.png"
    monkeypatch.setattr("sys.argv", ["draw_transforms", "--out", str(sheet)])
    names = runpy.run_path(str(REPOSITORY / "docs" / "images" / "draw_transforms.py"), run_name="__main__")
    kinds = {config.kind for config in names["TRANSFORMS"].values() if config}
    assert kinds == own_kinds(TransformConfig) - {"resize"}
    stored = REPOSITORY / "docs" / "images" / "transforms.png"
    assert stored.stat().st_size < 300_000
    with Image.open(sheet) as drawn, Image.open(stored) as picture:
        assert drawn.size == picture.size
