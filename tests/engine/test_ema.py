"""The exponential moving average of weights, against a loop by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from maskrcnn.engine.ema import ExponentialAverage


def model_of(weight: float) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))
    with torch.no_grad():
        model[0].weight.fill_(weight)
        model[1].running_mean.fill_(10 * weight)
    return model


def test_the_average_by_hand() -> None:
    model = model_of(1.0)
    average = ExponentialAverage(model, decay=0.5)
    expected = 1.0
    for step, weight in enumerate((2.0, 3.0, 4.0, 5.0), start=1):
        model.load_state_dict(model_of(weight).state_dict())
        model[1].num_batches_tracked.fill_(step)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))  # 2 / 11, 3 / 12, 4 / 13, 5 / 14
        expected = decay * expected + (1 - decay) * weight
    state = average.state_dict()
    assert state["0.weight"].item() == pytest.approx(expected)
    assert state["1.running_mean"].item() == pytest.approx(10 * expected)
    assert state["1.num_batches_tracked"] == 4
    average.update(100)
    assert state["0.weight"].item() == pytest.approx((expected + 5) / 2)


def test_the_model_has_the_average_inside_the_block_alone() -> None:
    model = model_of(1.0)
    average = ExponentialAverage(model, decay=0.9)
    model.load_state_dict(model_of(3.0).state_dict())
    parameter = model[0].weight
    observed = []

    def observe_and_fail() -> None:
        with average.applied():
            observed.append((model[0].weight.item(), model[0].weight is parameter))  # optimizers refer to it
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        observe_and_fail()
    assert observed == [(1.0, True)]
    assert model[0].weight.item() == 3.0
    assert average.state_dict()["0.weight"].item() == 1.0


def test_an_update_follows_parameters_and_buffers_in_place() -> None:
    """With the bits of a loop over the state dicts, which an update does not build."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 2))
    average = ExponentialAverage(model, decay=0.9)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(1, 4):
        optimizer.zero_grad()
        model(torch.randn(6, 5)).square().sum().backward()
        optimizer.step()
        average.update(step)
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                expected[name].lerp_(tensor, 1 - min(0.9, (1 + step) / (10 + step)))
            else:
                expected[name].copy_(tensor)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in average.state_dict().items())
    assert average.state_dict()["1.num_batches_tracked"] == 3
