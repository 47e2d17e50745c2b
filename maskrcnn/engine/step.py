"""One training step: forward and backward pass with gradient accumulation, checks for NaN, and the optimizer."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from maskrcnn.engine.checkpoint import TrainingState
from maskrcnn.engine.optimizer import can_skip_on_device, clip_gradients, fill_momentum, step_unless
from maskrcnn.runtime.host_copy import HostCopy
from maskrcnn.runtime.processes import Processes, without_exchange
from maskrcnn.structures import Batch, Diagnostics, Losses

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16", "fp16"]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
SMALLEST_SCALE = 1.0  # at this loss scale, a gradient that is not finite is an error and not an fp16 overflow

LAG = 2  # steps by which the results from a GPU are late, so that the host queues the next step without waiting

Keep = Callable[[int, Sequence[Batch]], Path]


@dataclass(frozen=True)
class StepResult:
    """The results of a training step on this process."""

    iteration: int
    losses: Mapping[str, float]  # each loss term, mean over the images
    gradient_norm: float  # 2-norm of the gradient averaged over all processes, before clipping
    diagnostics: Mapping[str, float]  # proposal and sampling diagnostics; empty unless requested


class _Started(NamedTuple):
    """A step that was started, and what it takes to report it when its numbers arrive."""

    iteration: int
    batches: Sequence[Batch]
    numbers: HostCopy  # losses, gradient norm, diagnostics of each batch, and the two flags of `_Verdict`


class _Verdict(NamedTuple):
    """Whether a step is finite, scalar bool tensors."""

    here: Tensor  # on this process
    everywhere: Tensor  # on all processes; otherwise the optimizer does not step


class TrainingStep:
    """Forward pass, backward pass and optimizer step, with gradient accumulation.

    The batches of an iteration are processed one after another and their gradients averaged. They have equally many
    images, so the result is the gradient of the whole batch, except for the statistics of batch norms.

    A step whose losses or gradient are not finite is not taken. On a GPU with a fused optimizer the device decides, and
    the host learns it `LAG` steps later. If it must raise then, the steps in between have not been taken either. If the
    step is one of the `skips`, `keep` gets the weights after these steps.
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
        self._asks_host = not can_skip_on_device(state.optimizer, processes.device)
        self._started: deque[_Started] = deque()
        self._finished: list[StepResult] = []
        # On the device: the number of rejected steps in a row, and whether there were too many of them.
        self._rejected = torch.zeros((), dtype=torch.int64, device=processes.device)
        self._halted = torch.zeros((), dtype=torch.bool, device=processes.device)

    def __call__(self, batches: Sequence[Batch], iteration: int, *, diagnose: bool = False) -> StepResult:
        """Compute the gradient, update the weights, and wait for the result: `start` and `results`."""
        self.start(batches, iteration, diagnose=diagnose)
        *_, result = self.results(wait=True)
        return result

    def start(self, batches: Sequence[Batch], iteration: int, *, diagnose: bool = False) -> None:
        """Compute the gradient and update the weights. On a GPU, this only queues the work.

        Args:
            batches: the batches of this process, all with equally many images.
            iteration: number of the step, counted from 1.
            diagnose: whether to compute the diagnostics.

        Raises:
            FloatingPointError: as `results`; not on a GPU.
            MemoryError: out of memory. The message lists settings that reduce memory.
        """
        optimizer, scaler = self.state.optimizer, self.state.scaler
        diagnostics: list[Diagnostics] = []
        buffers = [buffer.clone() for buffer in self.state.model.buffers()] if self._skips else []
        with _explaining_out_of_memory(batches, iteration):
            terms = self.gradients(batches, diagnostics.append if diagnose else None)
            scaler.unscale_(optimizer)
            values = torch.stack([*terms, clip_gradients(optimizer, self._clip_norm)])
        verdict = self._verdict(values)
        numbers = torch.cat((values, *map(torch.stack, diagnostics), torch.stack(verdict)))
        self._started.append(_Started(iteration, batches, HostCopy(numbers)))
        if self._asks_host:
            self._finished += self._collect(keep=0)  # raises before anything changes
        self._update(verdict, values, buffers)
        scaler.update()
        if self.state.average is not None:
            self.state.average.update(iteration)

    def results(self, *, wait: bool = False) -> list[StepResult]:
        """Return the results that have arrived since the last call, in order: on a GPU, those of `LAG` steps earlier.

        Args:
            wait: wait for those of all steps that were started.

        Raises:
            FloatingPointError: a loss or the gradient is not finite in more than `skips` consecutive steps. The weights
                are those before that step.
        """
        results = self._finished + self._collect(keep=0 if wait else LAG)
        self._finished = []
        return results

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

    def _verdict(self, values: Tensor) -> _Verdict:
        """Return whether losses and gradient norm, `(6,)`, are finite."""
        finite = values.isfinite()
        here = finite[:-1].all()
        if self._precision == "fp16":
            # A gradient may overflow because of the loss scale: the step is skipped and the scale reduced.
            here = here & (finite[-1] | (self.state.scaler.scale(torch.ones_like(values[-1])) > SMALLEST_SCALE))
        else:
            here = here & finite[-1]
        return _Verdict(here, ~self.processes.any_on_device(~here))

    def _update(self, verdict: _Verdict, values: Tensor, buffers: Sequence[Tensor]) -> None:
        """Take the optimizer step unless it is not finite. `buffers` are those before the step, or empty."""
        optimizer = self.state.optimizer
        if self._asks_host:
            taken = verdict.everywhere
            if taken:
                if self.state.scaler.is_enabled():  # which may skip the step
                    fill_momentum(optimizer)
                self.state.scaler.step(optimizer)
        else:
            self._rejected = torch.where(verdict.everywhere, 0, self._rejected + 1)
            # More cannot be taken back: further steps must leave the weights as they are until the host raises.
            self._halted = self._halted | (self._rejected > self._skips)
            taken = verdict.everywhere & ~self._halted
            step_unless(optimizer, ~(taken & values[-1].isfinite()))
        # The forward pass of a step that is not finite may have made the running statistics of norms invalid.
        for buffer, value_before in zip(self.state.model.buffers() if buffers else (), buffers, strict=True):
            buffer.copy_(torch.where(taken, buffer, value_before))

    def _collect(self, *, keep: int) -> list[StepResult]:
        """Return the results of the started steps except for the last `keep`."""
        results = []
        while len(self._started) > keep:
            iteration, batches, copy = self._started.popleft()
            *numbers, here, everywhere = copy.tolist()
            count = len(Losses._fields)
            losses = dict(zip(Losses._fields, numbers[:count], strict=True))
            if everywhere:
                self._skipped = 0
            else:
                self._report(iteration, batches, losses, numbers[count], invalid_here=not here)
            results.append(StepResult(iteration, losses, numbers[count], _means(numbers[count + 1 :])))
        return results

    def _report(
        self, iteration: int, batches: Sequence[Batch], losses: Mapping[str, float], norm: float, *, invalid_here: bool
    ) -> None:
        """Store and report a step that is not finite. Raises FloatingPointError after too many of them in a row."""
        self._skipped += 1
        message = _not_finite_message(iteration, batches, losses, norm)
        if self._keep is not None and invalid_here:
            message += (
                f" The weights and the batch are in {self._keep(iteration, batches)}: tools/replay_batch.py repeats it."
            )
        if self._skipped > self._skips:
            self.processes.wait()  # torchrun stops all processes when one exits, so wait until the step is stored
            raise FloatingPointError(message)
        logger.warning("%s Skipped %d of at most %d steps in a row.", message, self._skipped, self._skips)


def _means(numbers: Sequence[float]) -> dict[str, float]:
    """Return the mean of each value over the batches in which it is not NaN; a value that is always NaN is left out.

    `numbers` are the diagnostics of one batch after another.
    """
    fields = Diagnostics._fields
    columns = {name: [x for x in numbers[i :: len(fields)] if not math.isnan(x)] for i, name in enumerate(fields)}
    return {name: sum(values) / len(values) for name, values in columns.items() if values}


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
