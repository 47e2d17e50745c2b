"""One training step: forward and backward pass with gradient accumulation, checks for NaN, and the optimizer."""

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

from maskrcnn.engine.checkpoint import TrainingState
from maskrcnn.engine.optimizer import clip_gradients
from maskrcnn.runtime.processes import Processes, without_exchange
from maskrcnn.structures import Batch, Diagnostics, Losses

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16", "fp16"]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
SMALLEST_SCALE = 1.0  # at this loss scale, a gradient that is not finite is an error and not an fp16 overflow

Keep = Callable[[int, Sequence[Batch]], Path]


@dataclass(frozen=True)
class StepResult:
    """The results of a training step on this process."""

    losses: Mapping[str, float]  # each loss term, mean over the images
    gradient_norm: float  # 2-norm of the gradient averaged over all processes, before clipping
    diagnostics: Mapping[str, float]  # proposal and sampling diagnostics; empty unless requested


class TrainingStep:
    """Forward pass, backward pass and optimizer step, with gradient accumulation.

    The batches of an iteration are processed one after another and their gradients averaged. They have equally many
    images, so the result is the gradient of the whole batch, except for the statistics of batch norms.
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
            state: the training state to update. Its model is on the device of `processes`.
            processes: the process group. Each process has its own images.
            precision: autocast precision.
            clip_norm: maximum gradient norm; None disables clipping.
            skips: number of consecutive steps that may be skipped because a loss or gradient is not finite.
            keep: `keep(iteration, batches)` stores the weights and batches of such a step for
                `tools/replay_batch.py` and returns the path of the file.
        """
        self.state = state
        self.processes = processes
        self._forward: nn.Module = processes.wrap(state.model)
        self._precision: Precision = precision
        self._clip_norm = clip_norm
        self._skips, self._skipped = skips, 0
        self._keep = keep

    def __call__(self, batches: Sequence[Batch], iteration: int, *, diagnose: bool = False) -> StepResult:
        """Compute the gradient and update the weights.

        Args:
            batches: the batches of this process, all with equally many images.
            iteration: number of the step, counted from 1.
            diagnose: whether to compute the diagnostics.

        Raises:
            FloatingPointError: a loss or the gradient is not finite in more than `skips` consecutive steps. The weights
                are unchanged.
            MemoryError: out of memory. The message lists settings that reduce memory.
        """
        optimizer, scaler = self.state.optimizer, self.state.scaler
        diagnostics: list[Diagnostics] = []
        buffers = [buffer.clone() for buffer in self.state.model.buffers()] if self._skips else []
        with _explaining_out_of_memory(batches, iteration):
            terms = self.gradients(batches, diagnostics.append if diagnose else None)
            scaler.unscale_(optimizer)
            norm = clip_gradients(optimizer, self._clip_norm)
            # On a GPU, tolist() waits for the backward pass, which is needed to check the gradient before the update.
            *values, gradient_norm = torch.stack([*terms, norm]).tolist()
        losses = dict(zip(Losses._fields, values, strict=True))
        if self._can_update(iteration, batches, losses, gradient_norm):
            scaler.step(optimizer)
        else:  # the forward pass may have made the running statistics of norms invalid
            for buffer, value_before in zip(self.state.model.buffers(), buffers, strict=True):
                buffer.copy_(value_before)
        scaler.update()
        if self.state.average is not None:
            self.state.average.update(iteration)
        return StepResult(losses, gradient_norm, _means(diagnostics))

    def gradients(
        self, batches: Sequence[Batch], observe: Callable[[Diagnostics], None] | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Accumulate the gradient of the mean loss over `batches`, times the loss scale, in the parameters.

        Args:
            batches: the batches of this process, all with equally many images.
            observe: called with the diagnostics of each batch.

        Returns:
            The terms of the mean loss in the order of `Losses`, detached scalars.
        """
        self.state.model.train()
        self.state.optimizer.zero_grad()
        device = self.processes.device
        asynchronous = device.type == "cuda"
        mean_terms: tuple[torch.Tensor, ...] = ()
        for number, batch in enumerate(batches, start=1):
            images = batch.images.to(device, non_blocking=asynchronous)
            targets = batch.targets.to(device, non_blocking=asynchronous)
            # Gradients are averaged over processes once per iteration, in the backward pass of the last batch.
            with nullcontext() if number == len(batches) else without_exchange(self._forward):
                with torch.autocast(device.type, AUTOCAST.get(self._precision), enabled=self._precision != "fp32"):
                    losses: Losses = self._forward(images, targets, observe=observe)
                self.state.scaler.scale(losses.total / len(batches)).backward()
            terms = tuple(term.detach() / len(batches) for term in losses)
            mean_terms = tuple(map(torch.add, mean_terms, terms)) if mean_terms else terms
        return mean_terms

    def _can_update(self, iteration: int, batches: Sequence[Batch], losses: Mapping[str, float], norm: float) -> bool:
        """Return whether the optimizer may step, which is the same on all processes.

        Raises FloatingPointError after too many consecutive steps that are not finite.
        """
        finite = all(map(math.isfinite, losses.values()))
        # A gradient may overflow because of the loss scale: the scaler then skips the step and reduces the scale.
        overflow = finite and self._precision == "fp16" and self.state.scaler.get_scale() > SMALLEST_SCALE
        invalid = not finite or not (overflow or math.isfinite(norm))
        if not self.processes.any(invalid):
            self._skipped = 0
            return True
        self._skipped += 1
        message = _not_finite_message(iteration, batches, losses, norm)
        if self._keep is not None and invalid:
            message += (
                f" The weights and the batch are in {self._keep(iteration, batches)}: tools/replay_batch.py repeats it."
            )
        if self._skipped > self._skips:
            self.processes.wait()  # torchrun stops all processes when one exits, so wait until the step is stored
            raise FloatingPointError(message)
        logger.warning("%s Skipped %d of at most %d steps in a row.", message, self._skipped, self._skips)
        return False


def _means(diagnostics: Sequence[Diagnostics]) -> dict[str, float]:
    """Return the mean of each value over the batches in which it is not NaN; a value that is always NaN is left out."""
    means = {}
    for name in Diagnostics._fields if diagnostics else ():
        values = [value for item in diagnostics if not math.isnan(value := float(getattr(item, name)))]
        if values:
            means[name] = sum(values) / len(values)
    return means


def _image_ids(batches: Sequence[Batch]) -> str:
    return ", ".join(str(image_id) for batch in batches for image_id in batch.image_ids)


def _not_finite_message(iteration: int, batches: Sequence[Batch], losses: Mapping[str, float], norm: float) -> str:
    terms = ", ".join(f"{name} {value:g}" for name, value in losses.items())
    return (
        f"iteration {iteration}: a loss or the gradient is not finite: {terms}; gradient norm {norm:g}; image ids "
        f"{_image_ids(batches)}. The step was not taken. A lower learning rate, a longer warm-up or "
        "training.clip_norm often helps."
    )


@contextmanager
def _explaining_out_of_memory(batches: Sequence[Batch], iteration: int) -> Iterator[None]:
    """Convert out-of-memory errors to a MemoryError with the batch size and the settings that reduce memory."""
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
            f"time and up to {objects} objects in an image (image ids {_image_ids(batches)}). To reduce memory, use a "
            "larger training.grad_accum_steps (fewer images at a time, same result), training.precision: bf16, "
            "model.backbone.checkpoint_activations: true, or a smaller short_side of resize in data.train_transforms"
        ) from error
