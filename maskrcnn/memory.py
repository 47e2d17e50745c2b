"""Memory: how much a process took, and the C library's allocator, tuned for large tensors that come and go."""

from __future__ import annotations

import ctypes
import platform
import resource

import torch

# Of mallopt(3), from malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST = 2**30  # bytes; glibc caps nothing below on 64 bits


def keep_freed_memory() -> None:
    """Let freed memory stay with the process, to be used again; for training and inference on a CPU.

    By default glibc maps each tensor above 32 MiB anew and gives it back at once, and the kernel then clears every
    page again: a third of the time of a step. The process holds up to a fifth more memory. Elsewhere than on glibc
    this does nothing.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST)
    libc.mallopt(_M_TRIM_THRESHOLD, _LARGEST)


def peak_memory(device: torch.device) -> int:
    """The most bytes so far: of tensors on a GPU, else of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kibibytes = platform.system() == "Linux"  # elsewhere ru_maxrss counts bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if kibibytes else 1)
