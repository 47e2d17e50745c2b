"""The sides of the benchmark `data`: photographs and annotations from files to batches, and decoders of JPEG.

The photographs are those of a folder in COCO's layout. Each side does all in one process without a data loader, as one
worker would. The first round reads the files into the memory of the system.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms import v2

from maskrcnn.config import read_config
from maskrcnn.data.coco import CocoDataset
from maskrcnn.data.loader import collate
from maskrcnn.data.traps import evenly_spaced
from maskrcnn.experiment import ExperimentConfig

CONFIG = Path(__file__).parents[2] / "configs" / "coco" / "mask_rcnn_r50_fpn_1x.yaml"
BATCH = 2  # images
SIZE_DIVISOR = 32

Step = Callable[[], dict[str, float]]


class Photos(NamedTuple):
    """The photographs of a run."""

    root: Path  # in COCO's layout
    split: str  # such as train2017
    count: int

    @property
    def annotations(self) -> Path:
        """The annotation file of the split."""
        return self.root / "annotations" / f"instances_{self.split}.json"

    def experiment(self) -> ExperimentConfig:
        """Return our configuration for these photographs, with a flip and a short side of 800 as torchvision's."""
        changes = [f"root={self.root}", f"train.annotations={self.annotations}", f"train.images={self.split}"]
        changes += ["train_transforms=[{kind: horizontal_flip}, {kind: resize}]"]
        return read_config(CONFIG, ExperimentConfig, [f"data.{change}" for change in changes])


def our_data(photos: Photos) -> Step:
    """Return a step that loads the photographs as a worker of our training loader does, ready for the model."""
    config = photos.experiment()
    dataset = config.data.build_train()
    transform = config.data.build_train_transform(dataset)
    indices = evenly_spaced(len(dataset), photos.count)

    def step() -> dict[str, float]:
        size = 0
        for start in range(0, len(indices), BATCH):
            seeds = indices[start : start + BATCH]
            examples = [transform(dataset[index], np.random.default_rng(index)) for index in seeds]
            batch = collate(examples, seeds, SIZE_DIVISOR)
            size += sum(_bytes(batch.images)) + sum(_bytes(batch.targets))
        return _work(len(indices), size)

    return step


def torchvision_data(photos: Photos, *, resized: bool) -> Step:
    """Return a step with the parts of torchvision's training reference: full-size masks, flip, float pixels.

    Args:
        photos: the same photographs as on our side.
        resized: also normalise, resize and pad, which its model does otherwise, after the copy to the device.
    """
    with redirect_stdout(sys.stderr):  # pycocotools prints, and stdout is for the figures
        dataset = CocoDetection(photos.root / photos.split, photos.annotations)
    wrapped = wrap_dataset_for_transforms_v2(dataset, target_keys=("boxes", "labels", "masks"))
    flip = v2.RandomHorizontalFlip(0.5)
    transform = v2.Compose([v2.ToImage(), flip, v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])
    resize = GeneralizedRCNNTransform(800, 1333, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    ours = photos.experiment().data.build_train()
    image_ids = [ours.image_id(index) for index in evenly_spaced(len(ours), photos.count)]
    indices = [dataset.ids.index(image_id) for image_id in image_ids]

    def step() -> dict[str, float]:
        size = 0
        for start in range(0, len(indices), BATCH):
            pairs = [transform(*wrapped[index]) for index in indices[start : start + BATCH]]
            images, targets = [image for image, _ in pairs], [target for _, target in pairs]
            if resized:
                batch, targets = resize(images, targets)
                images = [batch.tensors]
            size += sum(_bytes([*images, *(target.values() for target in targets)]))
        return _work(len(indices), size)

    return step


def _work(images: int, size: int) -> dict[str, float]:
    return {"images": images, "KiB to the device per image": round(size / images / 1024)}


def _bytes(record: Any) -> Iterator[int]:
    """Yield the size of each tensor in a record or in nested lists, in bytes."""
    if isinstance(record, Tensor):
        yield record.numel() * record.element_size()
    elif is_dataclass(record):
        for each in fields(record):
            yield from _bytes(getattr(record, each.name))
    elif isinstance(record, Iterable):
        for each in record:
            yield from _bytes(each)


# ---- Decoders


def pillow(code: bytes) -> np.ndarray:
    """Decode with Pillow, as `read_image` does."""
    with Image.open(io.BytesIO(code)) as image:
        return np.array(image.convert("RGB"))


def torchvision_io(code: bytes) -> np.ndarray:
    """Decode with torchvision."""
    return decode_jpeg(torch.frombuffer(bytearray(code), dtype=torch.uint8), ImageReadMode.RGB).movedim(0, -1).numpy()


def simplejpeg(code: bytes) -> np.ndarray:
    """Decode with simplejpeg."""
    import simplejpeg

    return simplejpeg.decode_jpeg(code, colorspace="RGB")


def decoding(photos: Photos, decode: Callable[[bytes], np.ndarray]) -> Step:
    """Return a step that decodes the photographs from memory, and counts those that differ from Pillow's pixels."""
    dataset = photos.experiment().data.build_train()
    assert isinstance(dataset, CocoDataset)
    files = dataset.files()
    codes = [Path(files[index]).read_bytes() for index in evenly_spaced(len(files), photos.count)]
    different = sum(not np.array_equal(decode(code), pillow(code)) for code in codes)

    def step() -> dict[str, float]:
        for code in codes:
            decode(code)
        return {"images": len(codes), "images with other pixels": different}

    return step


def prepare(task: str, side: str, photos: Photos) -> Step:
    """Return a repeat of a task on one side."""
    if task == "decoders":
        return decoding(photos, {"Pillow": pillow, "torchvision": torchvision_io, "simplejpeg": simplejpeg}[side])
    return our_data(photos) if side == "ours" else torchvision_data(photos, resized=side.endswith("resized"))
