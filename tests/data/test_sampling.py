from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from maskrcnn.data.loader import BatchSampler, Draw, training_loader
from maskrcnn.data.sampling import ClassBalancedConfig, RepeatFactorConfig, UniformConfig, drawn_positions
from maskrcnn.data.shapes import ShapesConfig
from maskrcnn.data.transforms import Resize
from maskrcnn.errors import InputError
from maskrcnn.structures import ClassTable


class Labels:
    """A dataset of labels alone."""

    def __init__(self, *labels: list[int], classes: int = 3) -> None:
        self._labels = labels
        self.classes = ClassTable(tuple("abcdef"[:classes]), tuple(range(classes)))

    def __len__(self) -> int:
        return len(self._labels)

    def labels(self, index: int) -> np.ndarray:
        return np.array(self._labels[index], np.int64)


def weights(config: RepeatFactorConfig | ClassBalancedConfig, *labels: list[int], classes: int = 3) -> list[float]:
    dataset: Any = Labels(*labels, classes=classes)
    return config.weights(dataset).tolist()


def draws(count: int, **options: Any) -> list[list[Draw]]:
    sizes = np.array([(48, 32) if i % 3 == 0 else (32, 40) for i in range(len(options["weights"]))])
    return list(islice(BatchSampler(sizes, seed=3, **options), count))


# ---- Weights by hand


def test_repeat_factors_by_hand() -> None:
    """Class 1 is in all of eight images, class 2 in two, class 3 in one; 0.5 / (1 / 8) = 4."""
    images = [[1, 1], [1, 2], [2, 1, 3], [1, -1], [1], [1], [1], [1]]
    factors = [1, 2**0.5, 2, 1, 1, 1, 1, 1]
    assert weights(RepeatFactorConfig(threshold=0.5), *images) == pytest.approx(factors)
    assert weights(RepeatFactorConfig(threshold=1 / 8), *images) == [1] * 8
    assert weights(RepeatFactorConfig(threshold=1), [], [], [], [1]) == [1, 1, 1, 2]


def test_balanced_classes_by_hand() -> None:
    images = [[1, 1, 2], [1], [1], [1], [], [-1]]
    assert weights(ClassBalancedConfig(), *images) == pytest.approx([1 / 4 + 1, 1 / 4, 1 / 4, 1 / 4, 0, 0])
    assert weights(ClassBalancedConfig(), [], classes=1) == [0]


def test_the_default_weighs_nothing() -> None:
    dataset: Any = Labels([1], [2])
    assert UniformConfig().weights(dataset) is None


# ---- Draws


@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(1, 200))
def test_an_image_is_drawn_its_share_rounded_up_or_down(seed: int, num_images: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    given_weights = rng.integers(0, 5, num_images) * rng.random(num_images)
    given_weights[rng.integers(num_images)] += 1
    positions = drawn_positions(given_weights, count, rng)
    assert len(positions) == len(set(positions.tolist())) == count
    drawn = np.bincount(positions % num_images, minlength=num_images)
    share = count * given_weights / given_weights.sum()
    assert (drawn >= np.floor(share - 1e-9)).all()
    assert (drawn <= np.ceil(share + 1e-9)).all()
    repeats = {image: sorted(positions[positions % num_images == image] // num_images) for image in range(num_images)}
    assert all(numbers == list(range(len(numbers))) for numbers in repeats.values())


@pytest.mark.parametrize("weight", [1.0, 0.1, 3])
def test_equal_weights_draw_each_image_once(weight: float) -> None:
    for seed in range(20):
        positions = drawn_positions(np.full(30, weight), 30, np.random.default_rng(seed))
        assert sorted(positions) == list(range(30))


def test_frequencies_are_those_of_the_weights() -> None:
    counts = Counter(
        draw.image for batch in draws(2500, batch_size=4, weights=np.array([0, 1, 2, 0.5, 1.5])) for draw in batch
    )
    assert counts.keys() == {1, 2, 3, 4}
    shares = [counts[image] / 10000 for image in range(5)]
    assert shares == pytest.approx([0, 0.2, 0.4, 0.1, 0.3], abs=0.012)


def test_two_draws_of_an_image_have_different_seeds() -> None:
    batches = draws(50, batch_size=4, weights=np.array([9.0, 1, 1, 1]))
    seeds = [draw.seed for batch in batches for draw in batch]
    assert len(set(seeds)) == 200


@pytest.mark.parametrize("start", [1, 5, 12])
def test_weighted_draws_depend_neither_on_the_start_nor_on_the_processes(start: int) -> None:
    options: dict[str, Any] = {"batch_size": 4, "weights": np.linspace(0, 3, 22)}
    whole = draws(start + 4, **options)[start:]
    assert draws(4, start=start, **options) == whole
    shares = [draws(4, start=start, rank=rank, world=2, **options) for rank in range(2)]
    assert [first + second for first, second in zip(*shares, strict=True)] == whole


def test_a_batch_holds_one_orientation_except_for_what_is_left() -> None:
    for epoch in range(5):
        batches = draws(7, batch_size=4, weights=np.linspace(0, 3, 28), start=7 * epoch)
        assert sum(len({draw.image % 3 == 0 for draw in batch}) == 2 for batch in batches) <= 1


def test_workers_do_not_change_weighted_batches() -> None:
    scenes = ShapesConfig(length=9, height=32, width=32, objects=(1, 3)).build()
    options: dict[str, Any] = {"weights": ClassBalancedConfig().weights(scenes), "batch_size": 2, "size_divisor": 32}
    loaders = (training_loader(scenes, Resize((32,), 64), seed=1, workers=workers, **options) for workers in (0, 1))
    without, with_workers = ([batch.image_ids for (batch,) in islice(loader, 6)] for loader in loaders)
    assert without == with_workers


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (np.ones(3), "training.sampler: expected 4 finite weights of at least 0, one per image"),
        (np.array([1, 2, np.nan, 1]), "training.sampler: expected 4 finite weights"),
        (np.array([1, 2, -1, 1]), "training.sampler: expected 4 finite weights"),
        (np.zeros(4), "training.sampler: the weight of every image is 0; has the training set any object?"),
    ],
)
def test_wrong_weights_are_refused(wrong: np.ndarray, words: str) -> None:
    with pytest.raises(InputError, match=words.replace("?", r"\?")):
        BatchSampler(np.full((4, 2), 32), batch_size=2, seed=0, weights=wrong)
