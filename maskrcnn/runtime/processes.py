"""Distributed training: the process group, its collective operations, and DistributedDataParallel.

torchrun starts one process for each GPU and describes the group in environment variables. Without torchrun there is one
process. Only this module uses `torch.distributed`. docs/distributed.md explains how to start, stop and resume.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from maskrcnn.errors import InputError

Value = TypeVar("Value")
Exchange = Literal["fp32", "bf16"]

# Limit for a collective operation. The other processes wait while the main process computes the evaluation metrics.
TIMEOUT = timedelta(minutes=30)

_TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Processes:
    """The process group of a training run, as seen from this process. The default is a single process.

    Methods that communicate are collective: every process must call them in the same order. Except for `mean`,
    `any_on_device`, `share_buffers` and the module that `wrap` returns, they communicate through the CPU (gloo), so
    they do not wait for the GPU or use its memory.
    """

    device: torch.device  # device of this process
    rank: int = 0  # rank of this process, 0..world-1
    world: int = 1  # number of processes

    def __str__(self) -> str:
        return f"{self.world} processes, this one with {self.device}" if self.world > 1 else str(self.device)

    @property
    def is_main(self) -> bool:
        """Whether this is the main process (rank 0), which logs and writes all files."""
        return self.rank == 0

    def max(self, number: int) -> int:
        """Return the maximum of `number` over all processes."""
        if self.world == 1:
            return number
        largest = torch.tensor(number)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true on any process."""
        return self.max(int(flag)) > 0

    def any_on_device(self, flag: Tensor) -> Tensor:
        """Return whether a scalar bool tensor is true on any process, on the same device. The host does not wait."""
        if self.world == 1:
            return flag
        largest = flag.to(torch.int32)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest > 0

    def wait(self) -> None:
        """Wait until every process has called this method (a barrier)."""
        self.max(0)

    def gather(self, value: Value) -> list[Value] | None:
        """Return the values of all processes, in order of rank, on the main process, and None on the others.

        The values must be picklable.
        """
        if self.world == 1:
            return [value]
        values = [value] * self.world if self.is_main else None
        dist.gather_object(value, values)
        return values

    def broadcast(self, value: Value) -> Value:
        """Return the value of the main process, which must be picklable. The values of other processes are ignored."""
        if self.world == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def from_main(self, work: Callable[[], Value]) -> Value:
        """Call `work` on the main process only and return its result on every process."""
        return cast(Value, self.broadcast(work() if self.is_main else None))

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of a tensor over the processes, on the same device. NaN and infinity propagate to all."""
        if self.world == 1:
            return values
        total = values.detach().clone()
        dist.all_reduce(total)
        return total / self.world

    def share_buffers(self, model: nn.Module) -> None:
        """Copy the buffers of the main process, such as running statistics of batch norms, to every process."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def wrap(self, model: nn.Module, *, exchange: Exchange = "fp32", static: bool = False) -> nn.Module:
        """Return `model` wrapped in DistributedDataParallel, which averages gradients over the processes.

        `exchange` is the type of the numbers that processes send each other: bf16 halves their bytes, and rounds them.
        `static` tells torch that the graph of a step never changes; `without_exchange` then does not work.

        All processes start with the weights of the main process. Losses are means over images, so with equally many
        images on each process the averaged gradient is that of the whole batch. Every parameter is used in every step
        (`tests/models/test_mask_rcnn.py`), so `find_unused_parameters` is off. Buffers are not synchronized during
        training, where they do not affect the result; `share_buffers` synchronizes them.
        """
        if self.world == 1:
            return model
        self.share_buffers(model)
        # The strides of a channels_last 1x1 kernel are ambiguous; the memory layout is the same either way.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        with warnings.catch_warnings():
            # Newer versions of torch rename this argument; older versions lack the new name.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
            wrapped = DistributedDataParallel(
                model, broadcast_buffers=False, gradient_as_bucket_view=True, static_graph=static
            )
        if exchange == "bf16":
            wrapped.register_comm_hook(None, bf16_compress_hook)
        return wrapped


def without_exchange(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context for gradient accumulation: backward passes inside it do not average gradients over processes.

    The next backward pass outside the context averages the accumulated gradients.
    """
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


# ---- Differentiable sum over processes


def is_shared() -> bool:
    """Return whether this process belongs to an initialized process group."""
    return dist.is_available() and dist.is_initialized()


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum of a tensor over the processes. The operation is differentiable on every process."""
    return _Sum.apply(values)


class _Sum(torch.autograd.Function):
    """All-reduce sum. Each input affects the loss of every process, so its gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor) -> Tensor:
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)


# ---- Process group


@contextmanager
def processes(device: torch.device) -> Iterator[Processes]:
    """Join the process group that torchrun started, and leave it at the end of the block.

    With `device` "cuda", each process gets its own GPU. After an exception the group is not destroyed, because NCCL
    would wait for processes that may have exited. torchrun stops the others when this one exits.

    Raises:
        InputError: some of torchrun's environment variables are missing, or `device` does not match them.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes(device)
        return
    rank, world, local_device = _read_environment(os.environ, device)
    if local_device.type == "cuda":
        torch.cuda.set_device(local_device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if local_device.type == "cuda" else "gloo", timeout=TIMEOUT)
    yield Processes(local_device, rank, world)
    dist.destroy_process_group()


def _read_environment(environment: Mapping[str, str], device: torch.device) -> tuple[int, int, torch.device]:
    """Return the rank of this process, the number of processes, and the device of this process."""
    missing = [name for name in _TORCHRUN_VARIABLES if name not in environment]
    if missing:
        raise InputError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']}, but {', '.join(missing)} is not set: start several processes "
            "with torchrun (docs/distributed.md), or unset WORLD_SIZE"
        )
    rank, world, local_rank = (int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return rank, world, _local_device(device, local_rank)


def _local_device(device: torch.device, local_rank: int) -> torch.device:
    if device.type != "cuda":
        return device
    if device.index is not None:
        raise InputError(
            f"--device {device} names one GPU, but torchrun gives each process its own: omit --device and "
            "choose GPUs with CUDA_VISIBLE_DEVICES"
        )
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise InputError(
            f"process {local_rank} of this machine needs a GPU of its own, but there are {count}: start at most "
            f"{count} processes on it (--nproc-per-node {count}), or train on its CPU (--device cpu)"
        )
    return torch.device("cuda", local_rank)
