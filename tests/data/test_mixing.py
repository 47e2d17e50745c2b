from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from maskrcnn.data.crops import LargeScaleJitterConfig
from maskrcnn.data.loader import training_loader
from maskrcnn.data.mixing import CopyPaste, CopyPasteConfig, Mosaic, MosaicConfig, OtherImages, paste
from maskrcnn.data.rle import empty_crop
from maskrcnn.data.sampling import images_of_classes
from maskrcnn.data.shapes import ShapesConfig, ShapesDataset
from maskrcnn.data.transforms import Compose, HorizontalFlipConfig, RandomApply, Resize, TransformConfig
from maskrcnn.errors import InputError
from maskrcnn.structures import IDENTITY, Example, MaskCrop

SCENES = ShapesConfig(length=12, seed=3, height=64, width=80, objects=(1, 4)).build()
JITTER = LargeScaleJitterConfig(side=64, scale=(0.4, 1.6))
UNCHANGED = Compose(())


def composed(*configs: TransformConfig, dataset: ShapesDataset = SCENES) -> Compose:
    transform = UNCHANGED
    for config in configs:
        transform = Compose((*transform.steps, config.build_for(dataset, transform)))
    return transform


def full(mask: MaskCrop, height: int, width: int) -> np.ndarray:
    """Return a mask as (H, W) bool."""
    image = np.zeros((height, width), bool)
    rows, columns = mask.pixels.shape
    image[mask.y : mask.y + rows, mask.x : mask.x + columns] = mask.pixels
    return image


def square(image_id: int, size: tuple[int, int], grey: int, *boxes: tuple[int, int, int, int]) -> Example:
    """Return a grey image whose objects are full boxes (x1, y1, x2, y2) of grey + 1, + 2, ..."""
    pixels = torch.full((3, *size), grey, dtype=torch.uint8)
    for number, (x1, y1, x2, y2) in enumerate(boxes, start=1):
        pixels[:, y1:y2, x1:x2] = grey + number
    return Example(
        image_id=image_id,
        pixels=pixels,
        boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.arange(1, len(boxes) + 1),
        masks=tuple(MaskCrop(x1, y1, np.ones((y2 - y1, x2 - x1), np.uint8)) for x1, y1, x2, y2 in boxes),
    )


def assert_consistent(example: Example) -> None:
    """Nothing leaves the image, objects have all their fields, and boxes bound masks up to half a pixel."""
    height, width = example.pixels.shape[1:]
    assert len(example.boxes) == len(example.labels) == len(example.masks)
    assert example.map == IDENTITY
    assert example.original_size == (height, width)
    assert ((example.boxes >= 0) & (example.boxes <= torch.tensor([width, height, width, height]))).all()
    for box, mask in zip(example.boxes.tolist(), example.masks, strict=True):
        assert mask.pixels.any()
        rows, columns = mask.pixels.shape
        assert min(mask.x - box[0], mask.y - box[1], box[2] - mask.x - columns, box[3] - mask.y - rows) > -0.51


# ---- Copy-Paste


def test_pasting_by_hand() -> None:
    below = square(1, (10, 12), 50, (0, 0, 4, 4), (6, 2, 10, 8), (2, 5, 4, 7))
    above = square(2, (10, 10), 100, (6, 2, 10, 5), (2, 5, 4, 7))
    pasted = paste(below, above)
    assert pasted.image_id == 1
    assert pasted.boxes.tolist() == [[0, 0, 4, 4], [6, 5, 10, 8], [6, 2, 10, 5], [2, 5, 4, 7]]
    assert pasted.labels.tolist() == [1, 2, 1, 2]
    assert [full(mask, 10, 12).sum() for mask in pasted.masks] == [16, 12, 12, 4]
    assert pasted.pixels[0, 3].tolist() == [51] * 4 + [50] * 2 + [101] * 4 + [50] * 2
    assert below.pixels[0, 3, 6] == 52  # the image itself is unchanged
    assert_consistent(pasted)


@settings(max_examples=20)
@given(st.integers(0, 2**32), st.booleans())
def test_pasted_objects_lie_on_their_pixels(seed: int, jittered: bool) -> None:
    before = composed(HorizontalFlipConfig(), *([JITTER] if jittered else []))
    rng = np.random.default_rng(seed)
    example = before(SCENES[seed % 12], rng)
    pasted = CopyPaste(OtherImages(SCENES, before))(example, rng)
    if pasted is example:  # large-scale jitter left nothing to paste
        return
    assert_consistent(pasted)
    changed = (pasted.pixels != example.pixels).any(dim=0).numpy()
    masks = np.array([full(mask, *changed.shape) for mask in pasted.masks])
    assert not (changed & ~masks.any(axis=0)).any()
    if not jittered:  # the masks of a scene do not overlap, except in pixels that two of them cover by half
        assert masks.sum(axis=0).max() == 1


def test_balanced_classes_are_pasted_equally_often() -> None:
    class Rare:
        """Nine images of class 1 and 3, and one of class 1 and 2; no image of class 4."""

        classes = ShapesConfig(length=1, classes=("disc", "ring", "star", "cross")).build().classes

        def __len__(self) -> int:
            return 10

        def __getitem__(self, index: int) -> Example:
            example = square(index, (16, 16), 9, (0, 0, 3, 3), (4, 4, 9, 9), (10, 10, 12, 12), (1, 9, 3, 11))
            labels = torch.tensor([1, 2 if index == 7 else 3, -1, 1])
            return Example(
                index, example.pixels, example.boxes, labels, (*example.masks[:2], empty_crop(), *example.masks[3:])
            )

        def labels(self, index: int) -> np.ndarray:
            return self[index].labels.numpy()

    dataset: Any = Rare()
    assert [images.tolist() for images in images_of_classes(dataset)] == [
        list(range(10)),
        [7],
        [0, 1, 2, 3, 4, 5, 6, 8, 9],
        [],
    ]
    empty = square(1, (16, 16), 0)
    balanced = CopyPasteConfig(balanced=True).build_for(dataset, UNCHANGED)
    results = [balanced(empty, np.random.default_rng(seed)).labels.tolist() for seed in range(120)]
    assert all(len(set(labels)) == 1 for labels in results)
    counts = Counter(labels[0] for labels in results)
    assert counts.keys() == {1, 2, 3}
    assert min(counts.values()) > 30
    unbalanced = CopyPasteConfig(max_objects=2).build_for(dataset, UNCHANGED)
    results = [unbalanced(empty, np.random.default_rng(seed)).labels.tolist() for seed in range(50)]
    assert {len(labels) for labels in results} == {1, 2}
    assert not any(-1 in labels for labels in results)


def test_an_image_without_objects_gives_nothing() -> None:
    class Empty:
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> Example:
            return square(5, (8, 8), 1)

    dataset: Any = Empty()
    example = square(1, (10, 10), 0, (0, 0, 3, 3))
    assert CopyPaste(OtherImages(dataset, UNCHANGED))(example, np.random.default_rng(0)) is example
    assert RandomApply(CopyPaste(OtherImages(SCENES, UNCHANGED)), 0.0)(example, np.random.default_rng(0)) is example


# ---- Mosaic


@settings(max_examples=20)
@given(st.integers(0, 2**32))
def test_a_mosaic_keeps_masks_on_their_pixels(seed: int) -> None:
    """The images hold one colour for each object, which shows where its pixels are."""

    class Colours:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Example:
            return square(index, (40, 60 + 10 * index), 60 * (index + 1), (5, 4, 30, 34), (35, 2, 55, 38))

    dataset: Any = Colours()
    example = square(9, (50, 30), 0, (2, 3, 20, 45))
    mosaic = Mosaic(OtherImages(dataset, UNCHANGED), 64)(example, np.random.default_rng(seed))
    assert mosaic.pixels.shape == (3, 64, 64)
    assert mosaic.image_id == 9
    assert_consistent(mosaic)
    for label, mask in zip(mosaic.labels.tolist(), mosaic.masks, strict=True):
        inside = full(mask, 64, 64)
        interior = inside.copy()
        interior[1:-1, 1:-1] &= inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
        interior[[0, -1]] = interior[:, [0, -1]] = False
        colours = set((mosaic.pixels[0].numpy()[interior] % 60).tolist())
        assert colours <= {label}  # bilinear values stand at the edges alone


def test_a_mosaic_of_oblong_images_needs_little_memory() -> None:
    example = square(1, (2, 4000), 7, (0, 0, 3000, 2))
    mosaic = Mosaic(OtherImages(SCENES, UNCHANGED), 64)(example, np.random.default_rng(0))
    assert_consistent(mosaic)


# ---- Determinism, and where they may stand


CHAIN = (
    HorizontalFlipConfig(),
    MosaicConfig(side=64),
    JITTER,
    CopyPasteConfig(balanced=True),
)


def test_batches_depend_neither_on_workers_and_processes_nor_on_the_start() -> None:
    transform = composed(*CHAIN)
    options: dict[str, Any] = {"batch_size": 4, "seed": 5, "size_divisor": 32}
    whole = islice(training_loader(SCENES, transform, workers=0, **options), 1, 3)
    shares = [
        training_loader(SCENES, transform, workers=2 * rank, start=1, rank=rank, world=2, **options)
        for rank in range(2)
    ]
    for (batch,), (first,), (second,) in zip(whole, *(islice(share, 2) for share in shares), strict=True):
        assert batch.image_ids == first.image_ids + second.image_ids
        for piece, images in ((first, slice(0, 2)), (second, slice(2, 4))):
            valid = batch.targets.valid[images]
            assert torch.equal(batch.images.pixels[images], piece.images.pixels)
            assert torch.equal(batch.targets.labels[images][valid], piece.targets.labels[piece.targets.valid])
            assert torch.equal(batch.targets.boxes[images][valid], piece.targets.boxes[piece.targets.valid])
        sums = [part.targets.masks.sums[1:] for part in (first, second)]  # without the entry of padding
        assert torch.equal(batch.targets.masks.sums[1:], torch.cat(sums))


@pytest.mark.parametrize("config", [CopyPasteConfig(), MosaicConfig()])
def test_validation_images_are_not_mixed(config: TransformConfig) -> None:
    with pytest.raises(InputError, match=f"{config.kind} combines images of the training set"):
        config.build()


def test_another_image_that_cannot_be_read_is_named() -> None:
    class Broken:
        classes = SCENES.classes

        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> Example:
            if index == 3:
                raise InputError("pictures/3.jpg: is broken")
            return SCENES[index]

        def image_sizes(self) -> np.ndarray:
            return SCENES.image_sizes()[:8]

    dataset: Any = Broken()
    transform = Compose((Mosaic(OtherImages(dataset, Resize((32,), 64)), 32),))
    loader = training_loader(dataset, transform, batch_size=2, seed=1, workers=0, size_divisor=32)
    with pytest.raises(InputError, match=r"^pictures/3.jpg: is broken$"):
        list(islice(loader, 20))


def test_labels_are_known_without_the_images() -> None:
    for index in range(5):
        assert SCENES.labels(index).tolist() == SCENES[index].labels.tolist()
