"""Kernels of this project for GPUs, in Triton: `nms` and `roi`. See docs/gpu.md for what is proven of them.

Only this module can be imported without Triton, which torch brings along on Linux, but not on Windows.
"""

from __future__ import annotations

import importlib.util
from typing import Literal, NamedTuple

import torch

from maskrcnn.errors import InputError

Kernels = Literal["auto", "torchvision", "triton"]

# What `auto` means. "triton" from the day on which the `gpu` tests have passed, which docs/gpu.md records.
AUTO: Kernels = "torchvision"


class Pooling(NamedTuple):
    """What a RoI layer reads of a box, as `roi.pool_levels` takes it; see `maskrcnn.ops.roi` for the meaning."""

    reads: Literal["average", "maximum", "cells"]  # of sample points, of sample points, maximum of cells
    quantize: Literal["none", "round", "floor"] = "none"  # the box
    samples: int = 0  # N, of points; 0: one point per cell, for the average alone
    aligned: bool = True


def uses_triton(kernels: Kernels) -> bool:
    """Return whether a GPU runs kernels of this project, instead of operators of torch and torchvision."""
    return (AUTO if kernels == "auto" else kernels) == "triton"


def obstacle(kernels: Kernels, device: torch.device) -> str | None:
    """Return why kernels that were asked for cannot run on a device, or None if they can."""
    if kernels != "triton":
        return None
    if device.type != "cuda":
        return f"model.kernels is triton, which needs a GPU of CUDA, but the device is {device}"
    if importlib.util.find_spec("triton") is None:
        return "model.kernels is triton, but the package triton is not installed here"
    return None


def require(kernels: Kernels, device: torch.device, *, deterministic: bool = False) -> None:
    """Raise InputError if kernels were asked for that cannot run.

    Args:
        kernels: the value of `model.kernels`.
        device: of the model.
        deterministic: the value of `training.deterministic`.
    """
    problem = obstacle(kernels, device)
    if problem:
        raise InputError(f"{problem}; set model.kernels to auto")
    if kernels == "triton" and deterministic:
        raise InputError(
            "training.deterministic is true, but with model.kernels triton the RoI layers add up their gradients in "
            "any order; set one of them to another value"
        )
