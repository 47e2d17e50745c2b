"""Numbers of a GPU on the host, without waiting for the GPU when they are asked for."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """A copy of tensors on the host. Its constructor starts the copy, and its methods wait for it.

    A GPU works through its queue in order, so the wait is short if further work was queued after the copy.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors = [tensor.to("cpu", non_blocking=True) for tensor in tensors]  # from a GPU, to page-locked memory
        self._copied = torch.cuda.Event() if any(tensor.is_cuda for tensor in tensors) else None
        if self._copied is not None:
            self._copied.record()

    def tensors(self) -> list[Tensor]:
        """Return the copies."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensors

    def tolist(self) -> list[float]:
        """Return the values of a single tensor."""
        (tensor,) = self.tensors()
        return tensor.tolist()
