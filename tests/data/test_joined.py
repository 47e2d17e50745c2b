"""Several datasets as one: classes, ids, evaluation, and the draws of a mixture."""

from __future__ import annotations

import logging
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maskrcnn.config import validate
from maskrcnn.data.coco_file import complete_for_evaluation
from maskrcnn.data.dataset import HasFiles
from maskrcnn.data.joined import JoinedConfig, JoinedDataset
from maskrcnn.data.loader import training_loader
from maskrcnn.data.provenance import describe
from maskrcnn.data.sampling import ClassBalancedConfig, UniformConfig, image_weights
from maskrcnn.data.shapes import ShapesConfig, ShapesDataset
from maskrcnn.data.transforms import Compose
from maskrcnn.errors import InputError
from maskrcnn.evaluation.average_precision import evaluate
from maskrcnn.structures import ClassTable, Example, MaskCrop

SIDE = 32


class Squares:
    """Images of squares with given labels."""

    def __init__(self, names: str, ids: list[int], images: dict[int, list[int]]) -> None:
        self.classes = ClassTable(tuple(names), tuple(ids))
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def image_id(self, index: int) -> int:
        return list(self.images)[index]

    def labels(self, index: int) -> np.ndarray:
        return np.array(list(self.images.values())[index], np.int64)

    def image_sizes(self) -> np.ndarray:
        return np.full((len(self), 2), SIDE)

    def __getitem__(self, index: int) -> Example:
        labels = torch.from_numpy(self.labels(index))
        boxes = torch.tensor([[0.0, 0, 9, 9]]).repeat(len(labels), 1)
        masks = (MaskCrop(0, 0, np.ones((9, 9), np.uint8)),) * len(labels)
        pixels = torch.full((3, SIDE, SIDE), self.image_id(index), dtype=torch.uint8)
        return Example(self.image_id(index), pixels, boxes, labels, masks, has_mask=labels > 1)

    def ground_truth(self) -> dict[str, Any]:
        objects = [(key, label) for key, labels in self.images.items() for label in labels]
        entry = {"bbox": [0, 0, 9, 9], "segmentation": [[0, 0, 9, 0, 9, 9, 0, 9]]}
        names = zip(self.classes.category_ids, self.classes.names, strict=True)
        return {
            "images": [{"id": key, "file_name": f"{key}.png", "height": SIDE, "width": SIDE} for key in self.images],
            "annotations": [
                {"id": number, "image_id": key, "category_id": self.classes.category_ids[label - 1], **entry}
                for number, (key, label) in enumerate(objects)
                if label > 0
            ],
            "categories": [{"id": key, "name": name} for key, name in names],
        }


FIRST = Squares("ab", [3, 7], {10: [1, 2], 11: [2], 12: []})
SECOND = Squares("bc", [1, 2], {20: [1, -1], 11: [2]})


def test_classes_are_united_by_name(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        joined = JoinedDataset([FIRST, SECOND])
    assert joined.classes == ClassTable(("a", "b", "c"), (1, 2, 3))
    assert [joined.labels(index).tolist() for index in range(5)] == [[1, 2], [2], [], [2, -1], [3]]
    for index in range(5):
        assert joined[index].labels.tolist() == joined.labels(index).tolist()
    assert joined[0].has_mask.tolist() == [False, True]
    assert joined.image_sizes().shape == (5, 2)
    assert "dataset 1 of 2 joined ones does not annotate c" in caplog.text
    assert "dataset 2 of 2 joined ones does not annotate a" in caplog.text
    for index in (-1, 5):
        with pytest.raises(IndexError):
            joined[index]


def test_ids_stay_where_they_are_unique(caplog: pytest.LogCaptureFixture) -> None:
    third = Squares("ba", [7, 3], {30: [1, 2]})
    joined = JoinedDataset([FIRST, third])
    assert joined.classes == ClassTable(("a", "b"), (3, 7))
    assert [joined.image_id(index) for index in range(4)] == [10, 11, 12, 30]
    assert joined[3].labels.tolist() == [2, 1]
    assert not caplog.text
    shared = JoinedDataset([FIRST, SECOND])
    assert [shared[index].image_id for index in range(5)] == [1, 2, 3, 4, 5]
    assert "the datasets share ids" in describe(shared)["image ids"]
    assert describe(shared)["dataset 2, images"].startswith("2, sha256")
    assert shared.image_name(4) == "11"


def test_ground_truth_of_all(recwarn: pytest.WarningsRecorder) -> None:
    joined = JoinedDataset([FIRST, SECOND])
    truth = complete_for_evaluation(joined.ground_truth())
    assert [image["file_name"] for image in truth["images"]] == ["10.png", "11.png", "12.png", "20.png", "11.png"]
    rows = [(entry["id"], entry["image_id"], entry["category_id"]) for entry in truth["annotations"]]
    assert rows == [(1, 1, 1), (2, 1, 2), (3, 2, 2), (4, 4, 2), (5, 5, 3)]
    results = [
        {"image_id": image, "category_id": category, "bbox": [0, 0, 9, 9], "score": 0.9} for _, image, category in rows
    ]
    assert evaluate(truth, results).summary()["box/AP"] == pytest.approx(1)


def test_a_mixture_by_hand() -> None:
    joined = JoinedDataset([FIRST, SECOND], [1, 3])
    weights = image_weights(UniformConfig(), joined)
    assert weights is not None
    assert weights.tolist() == pytest.approx([1 / 3] * 3 + [3 / 2] * 2)
    balanced = image_weights(ClassBalancedConfig(), joined)  # a: image 0; b: 0, 1, 3; c: 4
    assert balanced is not None
    own = [4 / 3 / (5 / 3), 1 / 3 / (5 / 3), 0, 3 * (1 / 3) / (4 / 3), 3 * 1 / (4 / 3)]
    assert balanced.tolist() == pytest.approx(own)
    assert image_weights(UniformConfig(), JoinedDataset([FIRST, SECOND])) is None
    empty = JoinedDataset([FIRST, Squares("a", [3], {5: []})], [1, 1])
    with pytest.raises(InputError, match="draws no image of dataset 2, whose weight is 1"):
        image_weights(ClassBalancedConfig(), empty)


def test_a_mixture_depends_neither_on_workers_and_processes_nor_on_the_start() -> None:
    parts = [Squares("a", [1], {start + i: [1] for i in range(size)}) for start, size in ((0, 40), (100, 8))]
    joined = JoinedDataset(parts, [1, 1])
    options: dict[str, Any] = {
        "batch_size": 4, "seed": 5, "size_divisor": 32, "weights": image_weights(UniformConfig(), joined)
    }  # fmt: skip
    whole = [batch for (batch,) in islice(training_loader(joined, Compose(()), workers=0, **options), 12)]
    counts = Counter(image_id >= 100 for batch in whole for image_id in batch.image_ids)
    assert counts == {False: 24, True: 24}
    assert set(Counter(i for b in whole for i in b.image_ids if i >= 100).values()) == {3}
    shares = [
        islice(
            training_loader(joined, Compose(()), workers=2 * rank, start=5, rank=rank, world=2, **options), 2
        )
        for rank in range(2)
    ]  # fmt: skip
    for batch, (first,), (second,) in zip(whole[5:7], *shares, strict=True):
        assert batch.image_ids == first.image_ids + second.image_ids
        assert batch.images.seeds.tolist() == first.images.seeds.tolist() + second.images.seeds.tolist()


def validated(settings: dict[str, Any]) -> JoinedConfig:
    return validate({"kind": "joined", **settings}, JoinedConfig, source="a test")


def test_the_config_builds_its_datasets(tmp_path: Path) -> None:
    scenes = {"kind": "shapes", "length": 3}
    config = validated({"datasets": [scenes, {**scenes, "seed": 1, "length": 4}], "weights": [2, 1]})
    dataset = config.with_root(tmp_path).build()
    assert len(dataset) == 7
    assert torch.equal(dataset[4].pixels, ShapesDataset(length=4, seed=1)[1].pixels)
    assert dataset[4].image_id == 5
    assert isinstance(dataset, HasFiles)
    assert dataset.files() == []
    assert config.datasets[0] == ShapesConfig(length=3)
    with pytest.raises(InputError, match="1 numbers for 2 datasets"):
        validated({"datasets": [scenes, scenes], "weights": [2]})
    with pytest.raises(InputError, match="datasets"):
        validated({"datasets": []})
    coco = {"kind": "coco", "annotations": "train.json", "images": "images"}
    (tmp_path / "train.json").write_text("{}")
    nested = validated({"datasets": [{"kind": "joined", "datasets": [coco]}]})
    first = nested.with_root(tmp_path).digest()
    (tmp_path / "train.json").write_text("{ }")
    assert nested.with_root(tmp_path).digest() != first != nested.digest()
