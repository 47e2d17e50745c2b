"""Objects that are annotated with a box alone: every transform keeps their flag beside their box."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

import maskrcnn.experiment  # noqa: F401 (defines all kinds)
from maskrcnn.config.parts import choices_of
from maskrcnn.data.mixing import MixingConfig
from maskrcnn.data.rasters import occlude
from maskrcnn.data.rle import empty_crop
from maskrcnn.data.shapes import ShapesDataset
from maskrcnn.data.transforms import Compose, TransformConfig
from maskrcnn.structures import Example

SCENES = ShapesDataset(length=12, seed=3)
KINDS = {kind: choice for kind, choice in choices_of(TransformConfig).items() if choice.__module__[:9] == "maskrcnn."}
SETTINGS: dict[str, dict[str, Any]] = {
    "resize": {"short_side": [90], "long_side": 120},
    "large_scale_jitter": {"side": 96, "scale": [0.3, 2.0]},
    "mosaic": {"side": 96, "probability": 1.0},
}


class OddWithoutMasks:
    """The scenes; objects with an odd label have a box alone."""

    classes = SCENES.classes
    image_id = staticmethod(SCENES.image_id)
    labels = staticmethod(SCENES.labels)
    image_sizes = staticmethod(SCENES.image_sizes)
    ground_truth = staticmethod(SCENES.ground_truth)

    def __len__(self) -> int:
        return len(SCENES)

    def __getitem__(self, index: int) -> Example:
        example = SCENES[index]
        has_mask = example.labels % 2 == 0
        masks = [mask if has else empty_crop() for mask, has in zip(example.masks, has_mask.tolist(), strict=True)]
        return dataclasses.replace(example, masks=tuple(masks), has_mask=has_mask)


DATASET = OddWithoutMasks()


@pytest.mark.parametrize("kind", KINDS)
def test_every_transform_keeps_the_flags(kind: str) -> None:
    settings = SETTINGS.get(kind, {"probability": 1.0} if "probability" in KINDS[kind].model_fields else {})
    transform = KINDS[kind].model_validate({"kind": kind, **settings}).build_for(DATASET, Compose(()))
    seen = set()
    for index in range(len(DATASET)):
        example = transform(DATASET[index], np.random.default_rng(index))
        assert example.has_mask.dtype == torch.bool
        assert torch.equal(example.has_mask, example.labels % 2 == 0)
        assert len(example.boxes) == len(example.masks) == len(example.has_mask)
        for mask, has_mask in zip(example.masks, example.has_mask.tolist(), strict=True):
            assert has_mask or not mask.pixels.size
        seen |= set(example.has_mask.tolist())
    assert seen == {True, False}
    assert issubclass(KINDS[kind], MixingConfig) == (kind in ("copy_paste", "mosaic"))


def test_a_box_that_is_covered_goes() -> None:
    example = Example(
        image_id=1,
        pixels=torch.zeros(3, 20, 20, dtype=torch.uint8),
        boxes=torch.tensor([[2.5, 2, 6, 6], [2, 2, 8, 6], [2, 2, 6, 6]]),
        labels=torch.tensor([1, 2, -1]),
        masks=(empty_crop(),) * 3,
        has_mask=torch.zeros(3, dtype=torch.bool),
    )
    covered = np.zeros((20, 20), bool)
    covered[2:6, 2:6] = True
    assert occlude(example, covered).labels.tolist() == [2, -1]


def test_flags_must_be_as_many_as_objects() -> None:
    example = SCENES[0]
    assert dataclasses.replace(example, labels=torch.ones(7)).has_mask.tolist() == [True] * 7
    with pytest.raises(AssertionError, match="2 flags `has_mask` of 4 objects"):
        dataclasses.replace(example, labels=torch.ones(4), has_mask=torch.tensor([True, False]))
