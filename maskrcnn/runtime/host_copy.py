"""Numbers of a GPU on the host, without waiting for the GPU when they are asked for."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """A copy of a tensor on the host. Its constructor starts the copy, and `tolist` waits for it.

    A GPU works through its queue in order, so the wait is short if further work was queued after the copy.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._values = tensor.to("cpu", non_blocking=True)  # from a GPU, to page-locked memory
        self._copied = torch.cuda.Event() if tensor.is_cuda else None
        if self._copied is not None:
            self._copied.record()

    def tolist(self) -> list[float]:
        """Return the values."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._values.tolist()
