"""The processes of one training: who this one is, and what it tells the others.

torchrun starts the processes, one for each GPU, and describes them in environment variables; without it, there is one.
This is the one module that knows `torch.distributed`. docs/distributed.md says how to start, stop and resume.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn.parallel import DistributedDataParallel

from maskrcnn.errors import InputError

Value = TypeVar("Value")

# How long a process waits for the others: the longest evaluation on the main process, during which they idle.
TIMEOUT = timedelta(minutes=30)

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Processes:
    """All processes of a training, seen from this one; by default it is the only one.

    The methods that exchange something are collective: every process must call them, in the same order. All but
    `mean` and what `wrap` returns talk through the CPU (gloo), so they neither wait for a GPU nor take its memory.
    """

    device: torch.device  # of this process alone
    rank: int = 0  # this process, 0..world-1
    world: int = 1  # how many there are

    @property
    def is_main(self) -> bool:
        """Whether this one speaks for all: console, files, checkpoints."""
        return self.rank == 0

    def max(self, number: int) -> int:
        """Return the largest number that any process gives."""
        if self.world == 1:
            return number
        largest = torch.tensor(number)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def any(self, flag: bool) -> bool:
        """Return whether any process says yes."""
        return self.max(int(flag)) > 0

    def wait(self) -> None:
        """Return when every process has come here."""
        self.max(0)

    def gather(self, value: Value) -> list[Value] | None:
        """Return the values of all processes by rank on the main process, None on others; any that can be pickled."""
        if self.world == 1:
            return [value]
        values = [value] * self.world if self.is_main else None
        dist.gather_object(value, values)
        return values

    def broadcast(self, value: Value) -> Value:
        """Return the main process's value, which can be pickled; what the others pass is ignored."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def from_main(self, work: Callable[[], Value]) -> Value:
        """Do `work` on the main process alone, and return there and on all others what it returns."""
        return cast(Value, self.broadcast(work() if self.is_main else None))

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of a tensor over the processes, on its device; a number that is not finite reaches all."""
        if self.world == 1:
            return values
        total = values.detach().clone()
        dist.all_reduce(total)
        return total / self.world

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the main one's buffers, such as the running statistics of batch norms."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return `model` such that a backward pass averages gradients over processes; all start from the main one's.

        Losses are means over images, so equally many images on each process give the gradient of the whole batch.
        Every parameter takes part in every step (`tests/models/test_mask_rcnn.py`), so none is looked for. Buffers stay
        apart until `share_buffers`: they change nothing in training.
        """
        if self.world == 1:
            return model
        self.share_buffers(model)
        # Strides of a 1x1 kernel that lies channels_last are ambiguous; the memory is the same either way.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        with warnings.catch_warnings():
            # Newer versions of torch have another name for it, which older ones lack.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            return DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)


def without_exchange(model: nn.Module) -> AbstractContextManager[None]:
    """Inside, backward passes add to each process's own gradients; the next one outside averages the sums."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


# ---- Sums inside a model


def is_shared() -> bool:
    """Whether this process has joined others."""
    return dist.is_available() and dist.is_initialized()


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum of a tensor over the processes, through which gradients flow back to all of them."""
    return _Sum.apply(values)


class _Sum(torch.autograd.Function):
    """A value on one process changes the sum, and so the loss, on all: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)


# ---- Joining


@contextmanager
def processes(device: torch.device) -> Iterator[Processes]:
    """Join the processes that torchrun started, each with its own GPU if `device` is "cuda"; leave them at the end.

    After an exception they are not left: NCCL would wait there for processes that may be gone. torchrun ends the
    others when this one exits.

    Raises:
        InputError: the environment is torchrun's in part, or `device` does not fit it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes(device)
        return
    rank, world, own = _described(os.environ, device)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    dist.init_process_group("cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo", timeout=TIMEOUT)
    yield Processes(own, rank, world)
    dist.destroy_process_group()


def _described(environment: Mapping[str, str], device: torch.device) -> tuple[int, int, torch.device]:
    """This process's rank, the number of processes, and its own device."""
    absent = [name for name in _TORCHRUN if name not in environment]
    if absent:
        raise InputError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']}, but {', '.join(absent)} is not set: start several processes "
            "with torchrun (docs/distributed.md), or unset WORLD_SIZE"
        )
    rank, world, local = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return rank, world, _own_device(device, local)


def _own_device(device: torch.device, local_rank: int) -> torch.device:
    if device.type != "cuda":
        return device
    if device.index is not None:
        raise InputError(
            f"--device {device} names one GPU, but torchrun gives each process its own: leave --device away, and "
            "choose GPUs by CUDA_VISIBLE_DEVICES"
        )
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise InputError(
            f"process {local_rank} of this machine needs a GPU of its own, but there are {count}: start at most "
            f"{count} processes on it (--nproc-per-node {count}), or train on its CPU (--device cpu)"
        )
    return torch.device("cuda", local_rank)
