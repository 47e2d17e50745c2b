"""A running average of the weights, which is often better than the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class ExponentialAverage:
    """The exponential moving average of a model's parameters and of the statistics of its norms.

    The average starts at the state that the model has when it is made. Step `n` (from 1) keeps the share `decay` of
    it, or (1 + n) / (10 + n) where that is less, so that it forgets the beginning.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self._model = model
        self._average = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the model as it is after `step`; whole numbers (counters) are copied."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        averages, currents = [], []
        for name, tensor in self._model.state_dict().items():
            if tensor.is_floating_point():
                averages.append(self._average[name])
                currents.append(tensor)
            else:
                self._average[name].copy_(tensor)
        torch._foreach_lerp_(averages, currents, share)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the averaged weights inside the block, and its own again after it."""
        own = {name: tensor.detach().clone() for name, tensor in self._model.state_dict().items()}
        self._model.load_state_dict(self._average)
        try:
            yield
        finally:
            self._model.load_state_dict(own)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights, under the model's names."""
        return self._average

    def load(self, average: Mapping[str, Tensor]) -> None:
        """Go on from averaged weights, of the model's names and shapes."""
        for name, tensor in self._average.items():
            tensor.copy_(average[name])
