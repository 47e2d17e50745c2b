"""Values that are computed once and used in later calls."""

from __future__ import annotations

import torch
from torch import Tensor


def may_cache(source: Tensor) -> bool:
    """Return whether what is computed from a tensor now may be used in later calls.

    Not while a CUDA graph is recorded, which computes it in each replay: memory of a recording belongs to it, and
    memory that a recording reads must never be freed. Not in inference mode, whose tensors autograd refuses. A compiler
    fuses the computation with what follows.
    """
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or source.is_inference():
        return False
    return not (source.is_cuda and torch.cuda.is_current_stream_capturing())
