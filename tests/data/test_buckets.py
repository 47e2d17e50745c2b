"""Buckets: batches are padded to few shapes, and nothing else about them changes."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from maskrcnn.data.buckets import BatchShape, BucketsConfig
from maskrcnn.data.loader import BatchSampler, collate, training_loader
from maskrcnn.data.transforms import Resize
from maskrcnn.errors import InputError
from maskrcnn.structures import ClassTable, Example, MaskCrop

BUCKETS = BucketsConfig(shapes=((32, 64), (64, 32), (32, 48)), objects=(2, 4), mask_entries=30)
COCO = BucketsConfig(shapes=((800, 1344), (1344, 800), (800, 1088)))


def example(image_id: int, height: int, width: int, objects: int, side: int = 3) -> Example:
    return Example(
        image_id=image_id,
        pixels=torch.full((3, height, width), 7, dtype=torch.uint8),
        boxes=torch.tensor([[0.0, 0.0, 2.0, 3.0]] * objects).reshape(-1, 4),
        labels=torch.ones(objects, dtype=torch.int64),
        masks=(MaskCrop(0, 0, np.ones((side, 2), np.uint8)),) * objects,
    )


class Scenes:
    """Landscape, square and portrait images with up to 20 objects."""

    classes = ClassTable(("thing",), (1,))

    def __len__(self) -> int:
        return 60

    def image_sizes(self) -> np.ndarray:
        return np.array([[(30, 60), (30, 45), (60, 30), (40, 40)][index % 4] for index in range(60)])

    def __getitem__(self, index: int) -> Example:
        height, width = self.image_sizes()[index].tolist()
        return example(index, height, width, objects=20 if index == 17 else index % 5)


def test_an_image_belongs_to_the_shape_in_which_it_is_largest() -> None:
    sizes = np.array([(480, 640), (640, 480), (427, 640), (300, 1000), (1000, 300), (500, 500)])
    assert COCO.assign(sizes).tolist() == [2, 1, 0, 0, 1, 2]


@pytest.mark.parametrize(
    ("shape", "images", "bucket"),
    [
        (BatchShape(32, 40, 1, 5), 1, BatchShape(32, 48, 2, 30)),
        (BatchShape(32, 48, 2, 60), 2, BatchShape(32, 48, 2, 60)),
        (BatchShape(32, 49, 3, 60), 2, BatchShape(32, 64, 4, 60)),
        (BatchShape(33, 32, 4, 5), 2, BatchShape(64, 32, 4, 60)),
        (BatchShape(33, 33, 1, 5), 2, None),
        (BatchShape(32, 32, 5, 5), 2, None),
        (BatchShape(32, 32, 1, 61), 2, None),
    ],
)
def test_the_smallest_bucket_that_holds_a_batch(shape: BatchShape, images: int, bucket: BatchShape | None) -> None:
    assert BUCKETS.fit(shape, images) == bucket


def test_padding_is_all_that_a_bucket_adds() -> None:
    examples = [example(1, 20, 40, 1), example(2, 32, 30, 3)]
    plain, padded = collate(examples, [5, 6], 8), collate(examples, [5, 6], 8, BUCKETS)
    assert not BUCKETS.holds(plain)
    assert BUCKETS.holds(padded)
    assert padded.images.pixels.shape == (2, 3, 32, 48)
    assert torch.equal(padded.images.pixels[..., :40], plain.images.pixels)
    assert not padded.images.pixels[..., 40:].any()
    assert torch.equal(padded.images.sizes, plain.images.sizes)
    assert padded.targets.labels.tolist() == [[1, -1, -1, -1], [1, 1, 1, -1]]
    assert torch.equal(padded.targets.boxes[:, :3], plain.targets.boxes)
    masks, expected = padded.targets.masks, plain.targets.masks
    assert len(masks.sums) == 60
    assert torch.equal(masks.sums[: len(expected.sums)], expected.sums)
    assert torch.equal(masks.starts[:, :3], expected.starts)
    assert torch.equal(masks.origins[:, :3], expected.origins)


@pytest.mark.parametrize(
    "examples",
    [[example(1, 20, 40, 1), example(2, 40, 20, 1)], [example(1, 20, 40, 5)], [example(1, 20, 40, 2, side=20)]],
    ids=["sides", "objects", "masks"],
)
def test_a_batch_that_fits_in_none_keeps_its_shape(examples: list[Example]) -> None:
    seeds = range(len(examples))
    plain, padded = collate(examples, seeds, 8), collate(examples, seeds, 8, BUCKETS)
    assert not BUCKETS.holds(padded)
    assert padded.images.pixels.shape == plain.images.pixels.shape
    assert padded.targets.boxes.shape == plain.targets.boxes.shape
    assert torch.equal(padded.targets.masks.sums, plain.targets.masks.sums)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_yields_few_shapes(workers: int) -> None:
    buckets = BUCKETS.model_copy(update={"mask_entries": 100})
    loader = training_loader(
        Scenes(),  # type: ignore[arg-type]
        Resize((32,), 64),
        batch_size=2,
        seed=0,
        workers=workers,
        size_divisor=16,
        buckets=buckets,
    )
    shapes: Counter[Any] = Counter()
    outside = 0
    for (batch,) in islice(loader, 60):  # two epochs
        if buckets.holds(batch):
            shapes[tuple(batch.images.pixels.shape[2:]), batch.targets.labels.shape[1]] += 1
        else:
            outside += 1
    assert {shape for shape, _ in shapes} == {(32, 64), (64, 32), (32, 48)}
    assert len(shapes) <= 6
    assert outside <= 6  # the image with 20 objects, and what remains of each epoch


def test_each_image_is_still_drawn_once() -> None:
    sizes = Scenes().image_sizes()
    batches = list(islice(BatchSampler(sizes, batch_size=4, seed=0, buckets=BUCKETS), 15))
    assert sorted(draw.image for batch in batches for draw in batch) == list(range(60))
    groups = BUCKETS.assign(sizes)
    assert sum(len({groups[draw.image] for draw in batch}) > 1 for batch in batches) <= 2


def test_wrong_buckets() -> None:
    with pytest.raises(ValidationError, match="objects must ascend, but are \\[4, 2\\]"):
        BucketsConfig(shapes=((32, 32),), objects=(4, 2))
    with pytest.raises(InputError, match=r"800 x 1333: the sides must be multiples of 32.*use 800 x 1344"):
        BucketsConfig(shapes=((800, 1333),)).require_multiples(32)
    with pytest.raises(InputError, match=r"no image fits in 32 x 64, 64 x 32, 32 x 48: the smallest .* has 40 x 80 px"):
        BUCKETS.require_fit([example(1, 40, 80, 1), example(2, 80, 80, 1)])
    BUCKETS.require_fit([example(1, 400, 80, 1), example(2, 32, 64, 1)])
    assert BUCKETS.unused_shapes(np.array([(30, 60), (30, 45)])) == [
        "training.buckets.shapes: no training image has the aspect ratio of 64 x 32, which is not used"
    ]
