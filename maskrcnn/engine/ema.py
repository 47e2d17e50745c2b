"""Exponential moving average (EMA) of the model weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ExponentialAverage:
    """The exponential moving average of the parameters and norm statistics of a model.

    The average is initialized with the current state of the model. Training step `n` (from 1) multiplies it by
    min(`decay`, (1 + n) / (10 + n)), so that the initial weights are forgotten quickly. The model must be on its device
    already, since the average keeps references to its parameters and buffers.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self._model = model
        self._average = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        # Listed once: a state dict takes longer to build than the average to update.
        pairs = [(self._average[name], tensor) for name, tensor in model.state_dict(keep_vars=True).items()]
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the average with the model state after training step `step`. Integer buffers (counters) are copied."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for average, counter in self._copied:
            average.copy_(counter)
        averages, currents = zip(*self._averaged, strict=True)
        torch._foreach_lerp_(averages, currents, weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Load the averaged weights into the model for this block and restore the model weights afterwards."""
        model_state = {name: tensor.detach().clone() for name, tensor in self._model.state_dict().items()}
        self._model.load_state_dict(self._average)
        try:
            yield
        finally:
            self._model.load_state_dict(model_state)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averaged weights by name, as in the state dict of the model. The tensors are not copied."""
        return self._average

    def load(self, average: Mapping[str, Tensor]) -> None:
        """Load averaged weights with the names and shapes of the model's state dict."""
        for name, tensor in self._average.items():
            tensor.copy_(average[name])
