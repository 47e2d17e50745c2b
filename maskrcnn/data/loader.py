"""From a dataset to batches: in which order, with which seeds, padded how.

What iteration i of a training trains on is a function of i and the seed alone. It does not depend on the number of
worker processes or GPUs, nor on where a run was resumed.

Shapes: N images of the dataset, B images of a batch, H, W of the padded batch, G the most objects of an image in it.
"""

from __future__ import annotations

import itertools
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from maskrcnn.data.transforms import Transform
from maskrcnn.errors import InputError
from maskrcnn.ops.mask_tables import tabulate
from maskrcnn.structures import Batch, ClassTable, Example, ImageBatch, Targets

ENOUGH_OPEN_FILES = 4096  # a tensor from a worker holds one; the usual soft limit is 1024, on macOS 256


class DetectionDataset(Protocol):
    """What a dataset offers."""

    @property
    def classes(self) -> ClassTable:
        """The classes; they give the labels their meaning."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def image_id(self, index: int) -> int:
        """Return the id by which results name the image."""

    def image_sizes(self) -> np.ndarray:
        """Return height and width of each image, (N, 2), without opening any."""

    def ground_truth(self) -> dict[str, Any]:
        """Return images, annotations and categories in COCO's format, for an evaluator."""


class Draw(NamedTuple):
    """An image of the dataset, and the seed of everything random that happens to it this time."""

    image: int  # its index
    seed: int


class BatchSampler:
    """The endless order of training batches.

    An epoch shows each image once, in random order, except for `N % batch_size` drawn anew each time that it leaves
    out. Batches hold images that are all portrait or all landscape, so that little padding is needed; the few that are
    left of both kinds share a batch. A dataset smaller than a batch is repeated within it.

    Args:
        sizes: (N, 2) height and width of the images.
        batch_size: images of one iteration, on all processes together.
        seed: not negative.
        start: the iteration to begin with.
        rank, world: this process takes the `rank`-th of `world` equal pieces of each batch.
        grad_accum_steps: into how many equal parts it cuts its piece; each is yielded by itself.
    """

    def __init__(
        self,
        sizes: np.ndarray,
        *,
        batch_size: int,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        grad_accum_steps: int = 1,
    ) -> None:
        assert len(sizes) > 0
        assert 0 <= rank < world
        if batch_size % (world * grad_accum_steps):
            raise InputError(
                f"training.batch_size: {batch_size} images cannot be shared equally by {world} processes that compute "
                f"them in {grad_accum_steps} parts (training.grad_accum_steps)"
            )
        self.batch_size, self.seed, self.start = batch_size, seed, start
        self.rank, self.world, self.grad_accum_steps = rank, world, grad_accum_steps
        self._num_images = len(sizes)
        repeats = -(-batch_size // len(sizes))
        self._landscape = np.tile(sizes[:, 1] >= sizes[:, 0], repeats)

    @property
    def batches_per_epoch(self) -> int:
        """Iterations that make an epoch."""
        return batches_per_epoch(self._num_images, self.batch_size)

    def __iter__(self) -> Iterator[list[Draw]]:
        first, skipped = divmod(self.start, self.batches_per_epoch)
        mine = slice(self.rank * self.grad_accum_steps, (self.rank + 1) * self.grad_accum_steps)
        for epoch in itertools.count(first):
            for batch in self._batches(epoch)[skipped:]:
                for part in batch.reshape(self.world * self.grad_accum_steps, -1)[mine]:
                    yield [self._draw(epoch, position) for position in part.tolist()]
            skipped = 0

    def _batches(self, epoch: int) -> np.ndarray:
        """Return the batches of an epoch as positions in the (repeated) dataset, (batches, batch_size)."""
        rng = np.random.default_rng((self.seed, epoch, 0))
        order = rng.permutation(len(self._landscape))[: self.batches_per_epoch * self.batch_size]
        landscape, portrait = order[self._landscape[order]], order[~self._landscape[order]]
        whole = [len(group) // self.batch_size * self.batch_size for group in (landscape, portrait)]
        rest = np.concatenate([landscape[whole[0] :], portrait[whole[1] :]])
        grouped = np.concatenate([landscape[: whole[0]], portrait[: whole[1]], rest])
        return rng.permutation(grouped.reshape(-1, self.batch_size))

    def _draw(self, epoch: int, position: int) -> Draw:
        # The batch plays no part, so a rearranged epoch changes no image's augmentation. The epoch's order has key 0.
        state = np.random.SeedSequence((self.seed, epoch, position + 1)).generate_state(1, np.uint64)
        return Draw(position % self._num_images, int(state[0]) >> 1)  # 63 bits: seeds travel as int64


def batches_per_epoch(num_images: int, batch_size: int) -> int:
    """Return how many iterations make an epoch: images beyond whole batches are left out, few are repeated."""
    return max(num_images // batch_size, 1)


def collate(examples: Sequence[Example], seeds: Sequence[int], size_divisor: int) -> Batch:
    """Pad images and objects to common sizes; height and width become multiples of `size_divisor`."""
    most = max(1, *(len(example.labels) for example in examples))
    sizes = torch.tensor([example.pixels.shape[1:] for example in examples])  # (B, 2)
    height, width = (-(-side // size_divisor) * size_divisor for side in sizes.amax(dim=0).tolist())
    pixels = torch.zeros((len(examples), 3, height, width), dtype=torch.uint8)
    boxes = torch.zeros((len(examples), most, 4))
    labels = torch.full((len(examples), most), -1)
    for b, example in enumerate(examples):
        pixels[b, :, : sizes[b, 0], : sizes[b, 1]] = example.pixels
        boxes[b, : len(example.boxes)] = example.boxes
        labels[b, : len(example.labels)] = example.labels
    scales = tuple(example.scale for example in examples)
    masks = tabulate([example.masks for example in examples], scales, most)
    return Batch(
        image_ids=tuple(example.image_id for example in examples),
        images=ImageBatch(pixels, sizes, torch.tensor(seeds)),
        targets=Targets(boxes, labels, masks),
        scales=scales,
        original_sizes=tuple(_original_size(example) for example in examples),
    )


def _original_size(example: Example) -> tuple[int, int]:
    height, width = example.pixels.shape[1:]
    return round(height / example.scale[1]), round(width / example.scale[0])


def training_loader(
    dataset: DetectionDataset,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    workers: int,
    size_divisor: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    grad_accum_steps: int = 1,
) -> Iterable[tuple[Batch, ...]]:
    """Return the endless batches of a training, from iteration `start` on, `grad_accum_steps` for each.

    `BatchSampler` explains their order.

    Iterating raises InputError, as the dataset worded it, where an image cannot be used.
    """
    stream = BatchSampler(
        dataset.image_sizes(),
        batch_size=batch_size,
        seed=seed,
        start=start,
        rank=rank,
        world=world,
        grad_accum_steps=grad_accum_steps,
    )
    batches = iter(_Batches(dataset, transform, stream, workers=workers, size_divisor=size_divisor))
    return zip(*[batches] * grad_accum_steps, strict=True)


def evaluation_loader(
    dataset: DetectionDataset,
    transform: Transform,
    *,
    batch_size: int,
    workers: int,
    size_divisor: int,
    rank: int = 0,
    world: int = 1,
) -> Iterable[Batch]:
    """Return each image of the dataset once, in order; it can be iterated again. The last batch may be smaller.

    Of several processes, the `rank`-th takes every `world`-th batch: the same batches as one process has, so that an
    image shares its padding with the same others.
    """
    draws = [Draw(image, seed=image) for image in range(len(dataset))]
    batches = [draws[i : i + batch_size] for i in range(0, len(draws), batch_size)]
    return _Batches(dataset, transform, batches[rank::world], workers=workers, size_divisor=size_divisor)


class _Batches:
    """A data loader that raises a worker's InputError as it was, without the worker's traceback in its message."""

    def __init__(
        self,
        dataset: DetectionDataset,
        transform: Transform,
        draws: Iterable[list[Draw]],
        *,
        workers: int,
        size_divisor: int,
    ) -> None:
        if workers > 0:
            _allow_open_files()
        self._loader = DataLoader(
            _Examples(dataset, transform),
            batch_sampler=draws,
            collate_fn=partial(_collate_unless_wrong, size_divisor=size_divisor),
            num_workers=workers,
            worker_init_fn=_leave_signals_to_the_parent,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else each iteration would draw from the global one
        )

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            if isinstance(batch, InputError):
                raise batch
            yield batch


class _Examples(Dataset):
    """Examples by draw, transformed, with their seeds. What the user got wrong is returned, to be raised later."""

    def __init__(self, dataset: DetectionDataset, transform: Transform) -> None:
        self.dataset, self.transform = dataset, transform

    def __getitem__(self, draw: Draw) -> tuple[Example, int] | InputError:
        try:
            example = self.dataset[draw.image]
        except InputError as error:
            return InputError(*error.args)  # the cause may not pickle
        return self.transform(example, np.random.default_rng(draw.seed)), draw.seed


def _collate_unless_wrong(
    items: Sequence[tuple[Example, int] | InputError], *, size_divisor: int
) -> Batch | InputError:
    for item in items:
        if isinstance(item, InputError):
            return item
    examples, seeds = zip(*items, strict=True)
    return collate(examples, seeds, size_divisor)


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ctrl-C, `timeout` and SLURM signal a whole group; a worker that died of it would end the step being finished."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _allow_open_files() -> None:
    """Raise the process's own limit on open files; where that is not enough, pass tensors by name instead."""
    if sys.platform == "win32":  # has no such limit
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < ENOUGH_OPEN_FILES:
        soft = ENOUGH_OPEN_FILES if hard == resource.RLIM_INFINITY else min(ENOUGH_OPEN_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < ENOUGH_OPEN_FILES:
            torch.multiprocessing.set_sharing_strategy("file_system")
