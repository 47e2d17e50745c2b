"""One training step: forward and backward pass with gradient accumulation, checks for NaN, and the optimizer."""

from __future__ import annotations

import itertools
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from maskrcnn.engine.checkpoint import TrainingState
from maskrcnn.engine.graphs import EAGER, Execution, Recorder, Replays
from maskrcnn.engine.optimizer import can_skip_on_device, clip_gradients, fill_momentum, make_recordable, step_unless
from maskrcnn.errors import InputError
from maskrcnn.runtime.host_copy import HostCopy
from maskrcnn.runtime.processes import Processes, without_exchange
from maskrcnn.structures import Batch, Diagnostics, ImageBatch, Losses, Targets

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
    numbers: HostCopy  # those of `_Numbers`, and then the diagnostics of each batch
    diagnose: bool  # whether the diagnostics are wanted


class _Numbers(NamedTuple):
    """The positions of the numbers of a step in a tensor: the loss terms come first."""

    norm: int = len(Losses._fields)  # of the gradient
    here: int = norm + 1  # 1 if the step is finite on this process
    everywhere: int = norm + 2  # 1 if it is on all processes; otherwise the optimizer does not step


AT = _Numbers()


class _Diagnosed(nn.Module):
    """The losses of a model with the diagnostics of the batch. As a module without a callback, it can be compiled."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: ImageBatch, targets: Targets, diagnose: bool) -> tuple[Losses, list[Diagnostics]]:
        """Return the losses, and one record of diagnostics if they are wanted."""
        observed: list[Diagnostics] = []
        return self.model(images, targets, observe=observed.append if diagnose else None), observed


def require_precision(precision: Precision, device: torch.device) -> None:
    """Raise InputError, with what to do, if the device does not compute in this precision."""
    has_bf16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" and not has_bf16:
        raise InputError(
            f"training.precision: bf16: {torch.cuda.get_device_name(device)} has no bfloat16 units (they came with "
            "Ampere); use fp16 or fp32"
        )


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
        execution: Execution = EAGER,
        recorder: Recorder | None = None,
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
            execution: whether and how to compile the step, and the buckets of the batches.
            recorder: records CUDA graphs of what is done with batches in the buckets; None: no graphs.
        """
        self.state = state
        self.processes = processes
        self.outside = 0  # batches that were not in `execution.buckets`
        self._forward: nn.Module = processes.wrap(
            execution.compiled(_Diagnosed(state.model)),
            exchange=execution.gradient_exchange,
            static=not execution.accumulates,
        )
        self._execution = execution
        self._replays = None if recorder is None else Replays(recorder)
        self._precision: Precision = precision
        self._clip_norm = clip_norm
        self._skips, self._skipped = skips, 0
        self._keep = keep
        self._asks_host = not can_skip_on_device(state.optimizer, processes.device)
        if self._replays is not None and not self._asks_host:
            make_recordable(state.optimizer, processes.device)
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
        always = self._execution.is_static  # a step with diagnostics would be another graph than one without
        with self._stream(), _explaining_out_of_memory(batches, iteration):
            buffers = [buffer.clone() for buffer in self.state.model.buffers()] if self._skips else []
            terms, diagnostics = self.gradients(batches, diagnose=diagnose or always)

            def report(numbers: Tensor) -> None:
                copy = HostCopy(torch.cat((numbers, diagnostics)))
                self._started.append(_Started(iteration, batches, copy, diagnose))

            if self._replays is not None and not self._asks_host:
                updated = self._replays("update", self._judge_and_update, terms)
                report(updated[:-1])
                taken = updated[-1] > 0
            else:
                numbers = self._judge(terms)
                report(numbers)
                if self._asks_host:
                    self._finished += self._collect(keep=0)  # raises before anything changes
                taken = self._update(numbers)
            # The forward pass of a step that is not finite may have made the running statistics of norms invalid.
            for buffer, value_before in zip(self.state.model.buffers() if buffers else (), buffers, strict=True):
                buffer.copy_(torch.where(taken, buffer, value_before))
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

    def gradients(self, batches: Sequence[Batch], *, diagnose: bool = False) -> tuple[Tensor, Tensor]:
        """Accumulate the gradient of the mean loss over `batches`, times the loss scale, in the parameters.

        Args:
            batches: the batches of this process, all with equally many images.
            diagnose: whether to compute the diagnostics.

        Returns:
            The terms of the mean loss in the order of `Losses`, `(5,)`, and the diagnostics of each batch, one after
            another.
        """
        self.state.model.train()
        self.state.optimizer.zero_grad(set_to_none=self._replays is None)  # recordings know the gradients' memory
        means: Tensor | None = None
        diagnostics = []
        for number, batch in enumerate(batches, start=1):
            # Gradients are averaged over processes once per iteration, in the backward pass of the last batch.
            with nullcontext() if number == len(batches) else without_exchange(self._forward):
                numbers = self._run(batch, len(batches), diagnose)
            terms = numbers[: AT.norm] / len(batches)
            means = terms if means is None else means + terms
            diagnostics.append(numbers[AT.norm :].clone())  # the next replay overwrites it
        assert means is not None
        return means, torch.cat(diagnostics)

    def _run(self, batch: Batch, count: int, diagnose: bool) -> Tensor:
        """Add the gradient of one of `count` batches; return its loss terms and diagnostics."""
        device, buckets = self.processes.device, self._execution.buckets
        images = batch.images.to(device, non_blocking=device.type == "cuda")
        targets = batch.targets.to(device, non_blocking=device.type == "cuda")
        is_inside = buckets is None or buckets.holds(batch)
        self.outside += not is_inside

        def work(*tensors: Tensor) -> Tensor:
            remaining = iter(tensors)
            inputs = images.with_tensors(remaining), targets.with_tensors(remaining)
            with self._execution.compiling(is_inside):
                return self._backward(*inputs, count, diagnose)

        tensors = (*images.tensors(), *targets.tensors())
        if self._replays is not None and is_inside:
            return self._replays("gradient", work, *tensors)
        return work(*tensors)

    def _backward(self, images: ImageBatch, targets: Targets, count: int, diagnose: bool) -> Tensor:
        device = self.processes.device
        with torch.autocast(device.type, AUTOCAST.get(self._precision), enabled=self._precision != "fp32"):
            losses, diagnostics = self._forward(images, targets, diagnose)
        self.state.scaler.scale(losses.total / count).backward()
        return torch.stack([*(term.detach() for term in losses), *itertools.chain.from_iterable(diagnostics)])

    def _stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._replays is None else self._replays.recorder.stream()

    def _judge(self, terms: Tensor) -> Tensor:
        """Clip the gradient, and return the numbers of the step (see `_Numbers`) from its loss terms `(5,)`."""
        self.state.scaler.unscale_(self.state.optimizer)
        values = torch.cat((terms, clip_gradients(self.state.optimizer, self._clip_norm)[None]))
        finite = values.isfinite()
        here = finite[:-1].all()
        if self._precision == "fp16":
            # A gradient may overflow because of the loss scale: the step is skipped and the scale reduced.
            here = here & (finite[-1] | (self.state.scaler.scale(torch.ones_like(values[-1])) > SMALLEST_SCALE))
        else:
            here = here & finite[-1]
        return torch.cat((values, torch.stack((here, ~self.processes.any_on_device(~here)))))

    def _update(self, numbers: Tensor) -> Tensor:
        """Take the optimizer step unless it is not finite; return whether it was taken, a scalar bool tensor."""
        optimizer, everywhere = self.state.optimizer, numbers[AT.everywhere] > 0
        if self._asks_host:
            taken = everywhere
            if taken:
                if self.state.scaler.is_enabled():  # which may skip the step
                    fill_momentum(optimizer)
                self.state.scaler.step(optimizer)
        else:
            self._rejected.copy_(torch.where(everywhere, 0, self._rejected + 1))
            # More cannot be taken back: further steps must leave the weights as they are until the host raises.
            self._halted.copy_(self._halted | (self._rejected > self._skips))
            taken = everywhere & ~self._halted
            step_unless(optimizer, ~(taken & numbers[AT.norm].isfinite()))
        self.state.scaler.update()
        return taken

    def _judge_and_update(self, terms: Tensor) -> Tensor:
        """Return the numbers, and 1 if the step was taken."""
        numbers = self._judge(terms)
        return torch.cat((numbers, self._update(numbers)[None]))

    def _collect(self, *, keep: int) -> list[StepResult]:
        """Return the results of the started steps except for the last `keep`."""
        results = []
        while len(self._started) > keep:
            iteration, batches, copy, diagnose = self._started.popleft()
            numbers = copy.tolist()
            losses, norm = dict(zip(Losses._fields, numbers[: AT.norm], strict=True)), numbers[AT.norm]
            if numbers[AT.everywhere]:
                self._skipped = 0
            else:
                self._report(iteration, batches, losses, norm, invalid_here=not numbers[AT.here])
            diagnostics = _means(numbers[AT.everywhere + 1 :]) if diagnose else {}
            results.append(StepResult(iteration, losses, norm, diagnostics))
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
