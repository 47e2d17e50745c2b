"""One training step: from the batches of one iteration to changed weights, or to a clear refusal."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from maskrcnn.structures import Batch, Diagnostics, Losses
from maskrcnn.training.checkpoint import TrainingState
from maskrcnn.training.distributed import Processes, without_exchange
from maskrcnn.training.optimizer import clip_gradients

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16", "fp16"]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
SMALLEST_SCALE = 1.0  # fp16 gradients that overflow even without being scaled up are not the scaler's fault

Keep = Callable[[int, Sequence[Batch]], Path]


@dataclass(frozen=True)
class StepResult:
    """What a step found, on this process."""

    losses: Mapping[str, float]  # means over the images
    gradient_norm: float  # over all processes, before clipping
    diagnostics: Mapping[str, float]  # empty unless they were asked for


class TrainingStep:
    """Forward, backward, and the optimizer.

    The batches of an iteration are computed one after another and their gradients averaged: they have equally many
    images, so this is the gradient of all of them at once (but for the statistics of batch norms).
    """

    def __init__(
        self,
        state: TrainingState,
        processes: Processes,
        *,
        precision: Precision = "fp32",
        clip_norm: float | None = None,
        skips: int = 0,
        keep: Keep | None = None,
    ) -> None:
        """Set up the step.

        Args:
            state: what steps change; its model is on the processes' device.
            processes: which compute the step together, each with images of its own.
            precision: of matrix products (autocast).
            clip_norm: longest gradient allowed; None leaves it.
            skips: how many steps in a row may be left out because a loss or gradient is not finite.
            keep: stores the weights and batches of such a step, for `tools/replay_batch.py`; returns where.
        """
        self.state = state
        self.processes = processes
        self._forward: nn.Module = processes.wrap(state.model)
        self._precision: Precision = precision
        self._clip_norm = clip_norm
        self._skips, self._skipped = skips, 0
        self._keep = keep

    def __call__(self, batches: Sequence[Batch], iteration: int, *, diagnose: bool = False) -> StepResult:
        """Take a step.

        Raises:
            FloatingPointError: a loss or the gradient is not finite, too many times in a row; the step was not taken.
            MemoryError: it did not fit; the message says what helps.
        """
        optimizer, scaler = self.state.optimizer, self.state.scaler
        seen: list[Diagnostics] = []
        statistics = [buffer.clone() for buffer in self.state.model.buffers()] if self._skips else []
        with _memory_explained(batches, iteration):
            terms = self.gradients(batches, seen.append if diagnose else None)
            scaler.unscale_(optimizer)
            norm = clip_gradients(optimizer, self._clip_norm)
            # On a GPU this waits for the backward pass, once a step: the price of never stepping on a bad gradient.
            *values, length = torch.stack([*terms, norm]).tolist()
        losses = dict(zip(Losses._fields, values, strict=True))
        if self._is_sound(iteration, batches, losses, length):
            scaler.step(optimizer)
        else:  # the statistics of norms may have gone bad in the forward pass
            for now, before in zip(self.state.model.buffers(), statistics, strict=True):
                now.copy_(before)
        scaler.update()
        if self.state.average is not None:
            self.state.average.update(iteration)
        return StepResult(losses, length, _means(seen))

    def gradients(
        self, batches: Sequence[Batch], observe: Callable[[Diagnostics], None] | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Compute the gradient of the mean loss, times the scaler's scale; return the terms of that loss, detached."""
        self.state.model.train()
        self.state.optimizer.zero_grad()
        device = self.processes.device
        asynchronous = device.type == "cuda"
        sums: tuple[torch.Tensor, ...] = ()
        for number, batch in enumerate(batches, start=1):
            images = batch.images.to(device, non_blocking=asynchronous)
            targets = batch.targets.to(device, non_blocking=asynchronous)
            # Gradients are averaged over processes once an iteration, in the backward pass of its last batch.
            with nullcontext() if number == len(batches) else without_exchange(self._forward):
                with torch.autocast(device.type, AUTOCAST.get(self._precision), enabled=self._precision != "fp32"):
                    losses: Losses = self._forward(images, targets, observe=observe)
                self.state.scaler.scale(losses.total / len(batches)).backward()
            terms = tuple(term.detach() / len(batches) for term in losses)
            sums = tuple(map(torch.add, sums, terms)) if sums else terms
        return sums

    def _is_sound(self, iteration: int, batches: Sequence[Batch], losses: Mapping[str, float], norm: float) -> bool:
        """Whether the optimizer may step. All processes answer alike."""
        finite = all(map(math.isfinite, losses.values()))
        # A gradient that overflows for its scale: the scaler leaves the step out itself, and tries a smaller one.
        overflow = finite and self._precision == "fp16" and self.state.scaler.get_scale() > SMALLEST_SCALE
        bad = not finite or not (overflow or math.isfinite(norm))
        if not self.processes.any(bad):
            self._skipped = 0
            return True
        self._skipped += 1
        message = _what_is_not_finite(iteration, batches, losses, norm)
        if self._keep is not None and bad:
            message += f" Weights and batch are in {self._keep(iteration, batches)}: tools/replay_batch.py repeats it."
        if self._skipped > self._skips:
            self.processes.wait()  # the end of one process is the end of all: not before the step is stored
            raise FloatingPointError(message)
        logger.warning("%s (%d of at most %d in a row)", message, self._skipped, self._skips)
        return False


def _means(seen: Sequence[Diagnostics]) -> dict[str, float]:
    """The mean of each figure over the batches in which there was something to measure; none if there was nothing."""
    means = {}
    for name in Diagnostics._fields if seen else ():
        values = [value for item in seen if not math.isnan(value := float(getattr(item, name)))]
        if values:
            means[name] = sum(values) / len(values)
    return means


def _image_ids(batches: Sequence[Batch]) -> str:
    return ", ".join(str(image_id) for batch in batches for image_id in batch.image_ids)


def _what_is_not_finite(iteration: int, batches: Sequence[Batch], losses: Mapping[str, float], norm: float) -> str:
    terms = ", ".join(f"{name} {value:g}" for name, value in losses.items())
    return (
        f"iteration {iteration}: a loss or the gradient is not finite: {terms}; gradient norm {norm:g}; image ids "
        f"{_image_ids(batches)}. The step was not taken. A lower learning rate, a longer warm-up or "
        "training.clip_norm often helps."
    )


@contextmanager
def _memory_explained(batches: Sequence[Batch], iteration: int) -> Iterator[None]:
    """Turn "out of memory" into a message that says what did not fit, and what to change."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "allocate memory" not in str(error):
            raise
        largest = max(batches, key=lambda batch: batch.images.pixels.numel())
        height, width = largest.images.pixels.shape[-2:]
        objects = max(int(batch.targets.valid.sum(dim=1).max()) for batch in batches)
        raise MemoryError(
            f"iteration {iteration}: out of memory with {len(largest.images)} images of {height} x {width} px at a "
            f"time and up to {objects} objects in an image (image ids {_image_ids(batches)}). What helps: a larger "
            "training.grad_accum_steps (fewer images at a time, with the same result), training.precision: bf16, "
            "model.backbone.checkpoint_activations: true, a smaller data.train_transforms.short_side"
        ) from error
