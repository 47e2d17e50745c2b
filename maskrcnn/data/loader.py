"""Batch sampler, collate function and data loaders.

The batch of training step i depends only on i and the seed. It does not depend on the number of worker processes or
GPUs, nor on the step at which a run was resumed.

Shapes: N images of the dataset, B images of a batch, H and W of the padded batch, G largest number of objects of an
image in the batch.
"""

from __future__ import annotations

import itertools
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from maskrcnn.data.buckets import BatchShape, BucketsConfig
from maskrcnn.data.dataset import DetectionDataset
from maskrcnn.data.sampling import drawn_positions
from maskrcnn.data.transforms import Transform
from maskrcnn.errors import InputError
from maskrcnn.ops.mask_tables import table_entries, tabulate
from maskrcnn.structures import Batch, Example, ImageBatch, Targets

ENOUGH_OPEN_FILES = 4096  # each tensor from a worker keeps a file open; the usual soft limit is 1024, on macOS 256


class Draw(NamedTuple):
    """One drawn image: its index in the dataset, and the seed of its augmentation and of its RoI sampling."""

    image: int
    seed: int


class BatchSampler:
    """An infinite batch sampler that groups images by orientation, or by the shape of their bucket.

    An epoch contains each image once, or as often as its weight says (`SamplerConfig`), in random order, except for
    `N % batch_size` random draws that it skips. The images of a batch are all portrait or all landscape, which reduces
    padding; the remaining images of all groups share batches. A dataset smaller than a batch is repeated within the
    batch.

    Args:
        sizes: (N, 2) height and width of the images.
        batch_size: images per training step, over all processes.
        seed: a non-negative number.
        weights: (N,) how often each image is drawn in relation to the others; None: each once.
        start: the first training step.
        rank, world: index of this process and number of processes; each process takes an equal share of each batch.
        grad_accum_steps: number of micro-batches per process and training step; each is yielded separately.
        buckets: groups the images by shape; None: by orientation.

    Raises:
        InputError: `batch_size` is not divisible by `world * grad_accum_steps`, or the weights are invalid.
    """

    def __init__(
        self,
        sizes: np.ndarray,
        *,
        batch_size: int,
        seed: int,
        weights: np.ndarray | None = None,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        grad_accum_steps: int = 1,
        buckets: BucketsConfig | None = None,
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
        self._num_draws = len(sizes) * -(-batch_size // len(sizes))  # in an epoch, before the remainder is skipped
        self._groups = np.where(sizes[:, 1] >= sizes[:, 0], 0, 1) if buckets is None else buckets.assign(sizes)
        self._weights = weights if weights is None else _checked(weights, len(sizes))

    @property
    def batches_per_epoch(self) -> int:
        """The number of training steps per epoch."""
        return batches_per_epoch(self._num_images, self.batch_size)

    def __iter__(self) -> Iterator[list[Draw]]:
        first_epoch, first_batch = divmod(self.start, self.batches_per_epoch)
        rank_slice = slice(self.rank * self.grad_accum_steps, (self.rank + 1) * self.grad_accum_steps)
        for epoch in itertools.count(first_epoch):
            for batch in self._epoch_batches(epoch)[first_batch:]:
                for micro_batch in batch.reshape(self.world * self.grad_accum_steps, -1)[rank_slice]:
                    yield [self._draw(epoch, position) for position in micro_batch.tolist()]
            first_batch = 0

    def _epoch_batches(self, epoch: int) -> np.ndarray:
        """Return the batches of an epoch, (batches, batch_size): `i + N * k` for draw k of image i."""
        rng = np.random.default_rng((self.seed, epoch, 0))
        if self._weights is None:
            order = rng.permutation(self._num_draws)
        else:
            order = drawn_positions(self._weights, self._num_draws, rng)
        order = order[: self.batches_per_epoch * self.batch_size]
        group_of_draw = self._groups[order % self._num_images]
        groups = [order[group_of_draw == group] for group in range(self._groups.max() + 1)]
        full = [len(group) // self.batch_size * self.batch_size for group in groups]
        whole = [group[:length] for group, length in zip(groups, full, strict=True)]
        remainder = [group[length:] for group, length in zip(groups, full, strict=True)]
        grouped = np.concatenate([*whole, *remainder])
        return rng.permutation(grouped.reshape(-1, self.batch_size))

    def _draw(self, epoch: int, position: int) -> Draw:
        # The seed does not depend on the batch, so another batch size gives the same augmentation. Key 0 is the order.
        state = np.random.SeedSequence((self.seed, epoch, position + 1)).generate_state(1, np.uint64)
        return Draw(position % self._num_images, int(state[0]) >> 1)  # 63 bits, to fit int64


def _checked(weights: np.ndarray, num_images: int) -> np.ndarray:
    """Return the weights as float64. Raises InputError if they are invalid."""
    weights = np.asarray(weights, np.float64)
    if weights.shape != (num_images,) or not np.isfinite(weights).all() or (weights < 0).any():
        raise InputError(f"training.sampler: expected {num_images} finite weights of at least 0, one per image")
    if not weights.any():
        raise InputError("training.sampler: the weight of every image is 0; has the training set any object?")
    return weights


def batches_per_epoch(num_images: int, batch_size: int) -> int:
    """Return the number of training steps per epoch: `num_images // batch_size`, at least 1."""
    return max(num_images // batch_size, 1)


def collate(
    examples: Sequence[Example], seeds: Sequence[int], size_divisor: int, buckets: BucketsConfig | None = None
) -> Batch:
    """Pad images and objects to common sizes and return them as a batch.

    Args:
        examples: B transformed examples.
        seeds: B seeds, one per image.
        size_divisor: height and width of the padded images are multiples of it.
        buckets: shapes to pad to; a batch that fits in none of them is padded as without buckets.
    """
    sizes = torch.tensor([example.pixels.shape[1:] for example in examples])  # (B, 2)
    masks = [example.masks for example in examples]
    height, width = (-(-side // size_divisor) * size_divisor for side in sizes.amax(dim=0).tolist())
    shape = BatchShape(height, width, max(1, *(len(each.labels) for each in examples)), table_entries(masks))
    if buckets is not None:
        shape = buckets.fit(shape, len(examples)) or shape
    pixels = torch.zeros((len(examples), 3, shape.height, shape.width), dtype=torch.uint8)
    boxes = torch.zeros((len(examples), shape.objects, 4))
    labels = torch.full((len(examples), shape.objects), -1)
    has_mask = torch.zeros((len(examples), shape.objects), dtype=torch.bool)
    for b, example in enumerate(examples):
        pixels[b, :, : sizes[b, 0], : sizes[b, 1]] = example.pixels
        boxes[b, : len(example.boxes)] = example.boxes
        labels[b, : len(example.labels)] = example.labels
        has_mask[b, : len(example.has_mask)] = example.has_mask
    maps = tuple(example.map for example in examples)
    return Batch(
        image_ids=tuple(example.image_id for example in examples),
        images=ImageBatch(pixels, sizes, torch.tensor(seeds)),
        targets=Targets(boxes, labels, tabulate(masks, maps, shape.objects, shape.entries), has_mask),
        maps=maps,
        original_sizes=tuple(example.original_size for example in examples),
    )


def training_loader(
    dataset: DetectionDataset,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    workers: int,
    size_divisor: int,
    weights: np.ndarray | None = None,
    pin_memory: bool = False,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    grad_accum_steps: int = 1,
    buckets: BucketsConfig | None = None,
) -> Iterable[tuple[Batch, ...]]:
    """Return an infinite iterable over the micro-batches of each training step, from step `start` on.

    Each item is a tuple of `grad_accum_steps` batches. See `BatchSampler` for the order of the images and `weights`.
    Set `pin_memory` if the batches go to a GPU. With `buckets`, the images of a batch share the shape of a bucket.

    Raises:
        InputError: `batch_size` is not divisible by `world * grad_accum_steps`, the weights are invalid, or a bucket
            is no multiple of `size_divisor`. During iteration: the dataset cannot read an image.
    """
    if buckets is not None:
        buckets.require_multiples(size_divisor)
    sampler = BatchSampler(
        dataset.image_sizes(),
        batch_size=batch_size,
        seed=seed,
        weights=weights,
        start=start,
        rank=rank,
        world=world,
        grad_accum_steps=grad_accum_steps,
        buckets=buckets,
    )
    merge = partial(_collate_or_error, size_divisor=size_divisor, buckets=buckets)
    batches = _Batches(dataset, transform, sampler, merge=merge, workers=workers, pin_memory=pin_memory)
    return zip(*[iter(batches)] * grad_accum_steps, strict=True)


def training_examples(
    dataset: DetectionDataset,
    transform: Transform,
    *,
    batch_size: int,
    seed: int,
    weights: np.ndarray | None = None,
) -> Iterator[Example]:
    """Return the images of a training in their order, transformed as for it. They are loaded in this process.

    Raises:
        InputError: the weights are invalid, or, during iteration, the dataset cannot read an image.
    """
    sampler = BatchSampler(dataset.image_sizes(), batch_size=batch_size, seed=seed, weights=weights)
    return transformed(dataset, transform, itertools.chain.from_iterable(sampler))


def transformed(dataset: DetectionDataset, transform: Transform, draws: Iterable[Draw]) -> Iterator[Example]:
    """Yield the drawn images of a dataset, transformed. Raises InputError if one cannot be read."""
    examples = _Examples(dataset, transform)
    for draw in draws:
        item = examples[draw]
        if isinstance(item, InputError):
            raise item
        yield item[0]


def evaluation_loader(
    dataset: DetectionDataset,
    transform: Transform,
    *,
    batch_size: int,
    workers: int,
    size_divisor: int,
    pin_memory: bool = False,
    rank: int = 0,
    world: int = 1,
) -> Iterable[Batch]:
    """Return an iterable over the batches of the dataset in order, each image once. The last batch may be smaller.

    With several processes, process `rank` gets every `world`-th batch. Batches are the same as with one process, so
    the padding of an image does not depend on the number of processes.

    Raises:
        InputError: during iteration: the dataset cannot read an image.
    """
    draws = [Draw(image, seed=image) for image in range(len(dataset))]
    batches = [draws[i : i + batch_size] for i in range(0, len(draws), batch_size)]
    merge = partial(_collate_or_error, size_divisor=size_divisor)
    return _Batches(dataset, transform, batches[rank::world], merge=merge, workers=workers, pin_memory=pin_memory)


class _Batches:
    """A data loader that re-raises a worker's InputError without the worker's traceback in the message."""

    def __init__(
        self,
        dataset: DetectionDataset,
        transform: Transform,
        draws: Iterable[list[Draw]],
        *,
        merge: Callable[[Sequence[tuple[Example, int] | InputError]], Batch | InputError],
        workers: int,
        pin_memory: bool,
    ) -> None:
        if workers > 0:
            _allow_open_files()
        self._loader = DataLoader(
            _Examples(dataset, transform),
            batch_sampler=draws,
            collate_fn=merge,
            num_workers=workers,
            worker_init_fn=ignore_signals,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # keeps the global generator unchanged
        )

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            if isinstance(batch, InputError):
                raise batch
            yield batch


class _Examples(Dataset):
    """Returns transformed examples with their seeds, or the InputError of an image, for the main process to raise."""

    def __init__(self, dataset: DetectionDataset, transform: Transform) -> None:
        self.dataset, self.transform = dataset, transform

    def __getitem__(self, draw: Draw) -> tuple[Example, int] | InputError:
        try:
            example = self.transform(self.dataset[draw.image], np.random.default_rng(draw.seed))
        except InputError as error:  # of this image, or of another one that the transform reads
            return InputError(*error.args)  # the cause may not pickle
        return example, draw.seed


def _collate_or_error(
    items: Sequence[tuple[Example, int] | InputError], *, size_divisor: int, buckets: BucketsConfig | None = None
) -> Batch | InputError:
    for item in items:
        if isinstance(item, InputError):
            return item
    examples, seeds = zip(*items, strict=True)
    return collate(examples, seeds, size_divisor, buckets)


def ignore_signals(worker: int) -> None:
    """Ignore SIGINT and SIGTERM in a worker, so that the main process can finish its training step.

    Ctrl-C, `timeout` and SLURM send the signal to the whole process group.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _allow_open_files() -> None:
    """Raise the soft limit on open files; if the hard limit is too low, share tensors through the file system."""
    if sys.platform == "win32":  # has no limit on open files
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < ENOUGH_OPEN_FILES:
        soft = ENOUGH_OPEN_FILES if hard == resource.RLIM_INFINITY else min(ENOUGH_OPEN_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        if soft < ENOUGH_OPEN_FILES:
            torch.multiprocessing.set_sharing_strategy("file_system")
