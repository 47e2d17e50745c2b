from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from maskrcnn.data.loader import BatchSampler, Draw, collate, evaluation_loader, training_examples, training_loader
from maskrcnn.data.transforms import Compose, HorizontalFlip, RandomApply, Resize
from maskrcnn.errors import InputError
from maskrcnn.structures import Batch, ClassTable, Example, MaskCrop

TRANSFORM = Compose((RandomApply(HorizontalFlip(), 0.5), Resize((24, 40), 60)))
UNCHANGED = Resize((32,), 64)


def example(image_id: int, height: int, width: int, objects: int) -> Example:
    return Example(
        image_id=image_id,
        pixels=torch.full((3, height, width), image_id, dtype=torch.uint8),
        boxes=torch.tensor([[0.0, 0.0, 2.0, 3.0]] * objects).reshape(-1, 4),
        labels=torch.ones(objects, dtype=torch.int64),
        masks=(MaskCrop(0, 0, np.ones((3, 2), np.uint8)),) * objects,
    )


class BrokenError(Exception):
    """An exception with two constructor arguments, which a DataLoader cannot rebuild from a message."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one, two)


class Small:
    """Images with id and pixel value 10 + index; every third is portrait; image `i` has `i % 3` objects."""

    classes = ClassTable(("thing",), (1,))

    def __init__(self, length: int, broken: int | None = None) -> None:
        self.length, self.broken = length, broken

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        if index == self.broken:
            try:
                raise BrokenError("a", "b")
            except BrokenError as error:
                raise InputError("pictures/7.jpg: is broken") from error
        height, width = self.image_sizes()[index].tolist()
        return example(self.image_id(index), height, width, index % 3)

    def image_id(self, index: int) -> int:
        return 10 + index

    def image_sizes(self) -> np.ndarray:
        return np.array([(48, 32) if i % 3 == 0 else (32, 40) for i in range(self.length)])

    def ground_truth(self) -> dict[str, Any]:
        return {}


def draws(length: int, count: int, **options: Any) -> list[list[Draw]]:
    return list(islice(BatchSampler(Small(length).image_sizes(), **options), count))


def images(batches: Iterable[list[Draw]]) -> list[int]:
    return [draw.image for batch in batches for draw in batch]


def assert_same(one: Batch, other: Batch) -> None:
    assert one.image_ids == other.image_ids
    assert one.maps == other.maps
    for name in ("pixels", "sizes", "seeds"):
        assert torch.equal(getattr(one.images, name), getattr(other.images, name))
    assert torch.equal(one.targets.boxes, other.targets.boxes)
    assert torch.equal(one.targets.labels, other.targets.labels)
    assert torch.equal(one.targets.masks.sums, other.targets.masks.sums)


# The batch sampler.


def test_an_epoch_shows_each_image_once() -> None:
    for epoch in range(3):
        batches = draws(20, 5, batch_size=4, seed=0, start=5 * epoch)
        assert sorted(images(batches)) == list(range(20))


def test_the_remainder_of_an_epoch_changes() -> None:
    batches = draws(10, 3 * 50, batch_size=3, seed=0)
    epochs = [images(batches[i : i + 3]) for i in range(0, 150, 3)]
    left_out = [set(range(10)) - set(epoch) for epoch in epochs]
    assert all(len(skipped) == 1 for skipped in left_out)
    assert set.union(*left_out) == set(range(10))


def test_a_batch_holds_one_orientation_except_for_what_is_left() -> None:
    batches = draws(28, 7, batch_size=4, seed=3)  # 10 portrait, 18 landscape: 2 + 4 full batches, 2 + 2 images remain
    kinds = [{draw.image % 3 == 0 for draw in batch} for batch in batches]
    assert kinds.count({True}) == 2
    assert kinds.count({False}) == 4
    assert kinds != [*[{False}] * 4, *[{True}] * 2, {False, True}]  # the batches are shuffled


def test_epochs_and_seeds_differ() -> None:
    first, second = draws(20, 10, batch_size=4, seed=0)[:5], draws(20, 10, batch_size=4, seed=0)[5:]
    assert images(first) != images(second)
    assert images(draws(20, 5, batch_size=4, seed=1)) != images(first)
    seeds = [draw.seed for batch in first + second for draw in batch]
    assert len(set(seeds)) == 40
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("start", [1, 4, 5, 17])
def test_iteration_i_is_the_same_wherever_one_starts(start: int) -> None:
    options: dict[str, Any] = {"batch_size": 4, "seed": 7}
    assert draws(22, 5, start=start, **options) == draws(22, start + 5, **options)[start:]


def test_an_images_seed_depends_on_the_epoch_and_not_on_the_batch() -> None:
    small = {draw for batch in draws(24, 12, batch_size=2, seed=1) for draw in batch}
    large = {draw for batch in draws(24, 3, batch_size=8, seed=1) for draw in batch}
    assert small == large


def test_processes_share_a_batch_equally() -> None:
    whole = draws(20, 8, batch_size=4, seed=0)
    shares = [draws(20, 8, batch_size=4, seed=0, rank=rank, world=2) for rank in range(2)]
    assert [a + b for a, b in zip(*shares, strict=True)] == whole
    with pytest.raises(InputError, match="4 images cannot be shared equally by 3"):
        draws(20, 1, batch_size=4, seed=0, world=3)


def test_a_dataset_smaller_than_the_batch_is_repeated() -> None:
    counts = np.zeros(3, int)
    for batch in draws(3, 200, batch_size=4, seed=0):
        batch_counts = np.bincount(images([batch]), minlength=3)
        assert sorted(batch_counts) in ([0, 2, 2], [1, 1, 2])
        assert len({draw.seed for draw in batch}) == 4
        counts += batch_counts
    assert counts.min() > 0.8 * counts.max()


# The collate function.


def test_collate_by_hand() -> None:
    batch = collate([example(7, 5, 9, 0), example(8, 6, 4, 2)], [11, 12], 4)
    assert batch.image_ids == (7, 8)
    assert batch.images.pixels.shape == (2, 3, 8, 12)
    assert batch.images.pixels.dtype == torch.uint8
    assert batch.images.sizes.tolist() == [[5, 9], [6, 4]]
    assert batch.images.seeds.tolist() == [11, 12]
    assert batch.images.pixels[0].sum() == 3 * 5 * 9 * 7
    assert (batch.images.pixels[1, :, :6, :4] == 8).all()
    assert batch.targets.labels.tolist() == [[-1, -1], [1, 1]]
    assert batch.targets.boxes[0].eq(0).all()
    assert batch.targets.boxes[1].tolist() == [[0, 0, 2, 3]] * 2
    assert batch.targets.masks.sizes.tolist() == [[[0, 0], [0, 0]], [[3, 2], [3, 2]]]
    assert batch.targets.has_mask.tolist() == [[False, False], [True, True]]
    assert batch.original_sizes == ((5, 9), (6, 4))


def test_a_batch_without_objects_has_one_row_of_padding() -> None:
    batch = collate([example(7, 5, 9, 0)], [0], 1)
    assert batch.targets.labels.tolist() == [[-1]]
    assert batch.targets.boxes.shape == (1, 1, 4)
    assert batch.images.pixels.shape == (1, 3, 5, 9)


def test_original_sizes_survive_resizing() -> None:
    rng = np.random.default_rng(0)
    for height, width in rng.integers(1, 700, (60, 2)).tolist():
        resized = TRANSFORM(example(1, height, width, 0), rng)
        assert collate([resized], [0], 32).original_sizes == ((height, width),)


# The loaders.


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int) -> None:
    options: dict[str, Any] = {"batch_size": 3, "seed": 0, "size_divisor": 8}
    without_workers = list(islice(training_loader(Small(10), TRANSFORM, workers=0, **options), 7))
    with_workers = training_loader(Small(10), TRANSFORM, workers=workers, start=2, **options)
    for (one,), (other,) in zip(without_workers[2:], islice(with_workers, 5), strict=True):
        assert_same(one, other)


def test_the_examples_of_a_training_are_those_of_its_batches() -> None:
    options: dict[str, Any] = {"batch_size": 3, "seed": 4}
    examples = training_examples(Small(10), TRANSFORM, **options)
    for (batch,) in islice(training_loader(Small(10), TRANSFORM, workers=0, size_divisor=8, **options), 5):
        group = list(islice(examples, 3))
        assert_same(collate(group, batch.images.seeds.tolist(), 8), batch)
    with pytest.raises(InputError, match=r"pictures/7.jpg: is broken"):
        list(islice(training_examples(Small(4, broken=2), TRANSFORM, **options), 20))


def test_micro_batches_make_up_the_batch() -> None:
    options: dict[str, Any] = {"batch_size": 6, "seed": 0, "size_divisor": 8, "workers": 0}
    full_loader = training_loader(Small(10), TRANSFORM, **options)
    accumulating_loader = training_loader(Small(10), TRANSFORM, grad_accum_steps=2, start=1, **options)
    (full_batch,), micro_batches = list(islice(full_loader, 2))[1], next(iter(accumulating_loader))
    assert [len(batch.images) for batch in micro_batches] == [3, 3]
    assert sum((batch.image_ids for batch in micro_batches), ()) == full_batch.image_ids
    assert torch.equal(torch.cat([batch.images.seeds for batch in micro_batches]), full_batch.images.seeds)


def test_a_batch_that_cannot_be_shared_equally_is_refused() -> None:
    with pytest.raises(InputError, match=r"batch_size: 6 images cannot be shared equally by 2 processes .* in 2 parts"):
        BatchSampler(Small(10).image_sizes(), batch_size=6, seed=0, world=2, grad_accum_steps=2)


def test_training_draws_nothing_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    next(iter(training_loader(Small(4), TRANSFORM, batch_size=2, seed=0, workers=0, size_divisor=8)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_shows_every_image_once_and_again(workers: int) -> None:
    loader = evaluation_loader(Small(7), UNCHANGED, batch_size=3, workers=workers, size_divisor=32)
    for _ in range(2):
        batches = list(loader)
        assert [batch.image_ids for batch in batches] == [(10, 11, 12), (13, 14, 15), (16,)]
        assert batches[0].original_sizes == ((48, 32), (32, 40), (32, 40))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_input_error_of_a_dataset_is_raised_unchanged(workers: int) -> None:
    loader = evaluation_loader(Small(4, broken=2), UNCHANGED, batch_size=2, workers=workers, size_divisor=8)
    with pytest.raises(InputError) as error:
        list(loader)
    assert str(error.value) == "pictures/7.jpg: is broken"


def test_a_low_limit_on_open_files_is_raised() -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        evaluation_loader(Small(2), UNCHANGED, batch_size=2, workers=1, size_divisor=8)
        raised, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert raised == 4096 or raised == hard
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
