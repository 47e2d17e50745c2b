"""Batches on their way to the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from maskrcnn.structures import Batch, Dense


def copied_to(device: torch.device, loader: Iterable[Sequence[Batch]]) -> Iterable[Sequence[Batch]]:
    """Return the batches of each training step with their tensors on a GPU; for a CPU, the loader itself.

    A batch in page-locked memory is copied on a stream of its own, which does not wait for the kernels of earlier
    steps. The host loads a batch while up to `engine.step.LAG` steps before it still run, so the copy runs beside them.
    """
    return _copies(device, loader) if device.type == "cuda" else loader


def _copies(device: torch.device, loader: Iterable[Sequence[Batch]]) -> Iterator[Sequence[Batch]]:
    stream = torch.cuda.Stream(device)

    def copy(record: Dense) -> Dense:
        with torch.cuda.stream(stream):
            return record.to(device, non_blocking=True)

    for batches in loader:
        copies = [batch._replace(images=copy(batch.images), targets=copy(batch.targets)) for batch in batches]
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        for batch in copies:
            for tensor in (*batch.images.tensors(), *batch.targets.tensors()):
                tensor.record_stream(current)  # its memory may be used again only after the step
        yield copies
