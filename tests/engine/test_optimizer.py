import logging

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from maskrcnn.engine.optimizer import (
    AdamWConfig,
    OptimizerConfig,
    SGDConfig,
    clip_gradients,
    load_optimizer_state,
    scaled_lr,
    set_learning_rate,
)
from maskrcnn.errors import InputError

BUILDERS = [SGDConfig(lr=0.1, weight_decay=0.01), AdamWConfig(lr=0.1, weight_decay=0.01)]


@pytest.fixture
def model() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 1, bias=False))


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(2, 3, 5, 5)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("config", BUILDERS, ids=lambda config: config.kind)
def test_norm_layers_have_no_weight_decay(model, config):
    optimizer = config.build(model, batch_size=16)
    decay = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]}
    norms = dict.fromkeys(["1.weight", "1.bias", "2.weight", "2.bias"], 0.0)
    assert decay == {"0.weight": 0.01, "0.bias": 0.01, "3.weight": 0.01, **norms}


def test_bias_weight_decay_and_merged_groups(model):
    optimizer = SGDConfig(weight_decay=0.01, bias_weight_decay=0.0).build(model, batch_size=16)
    names = [group["param_names"] for group in optimizer.param_groups]
    assert names == [["0.weight", "3.weight"], ["0.bias", "1.weight", "1.bias", "2.weight", "2.bias"]]
    optimizer = AdamWConfig(weight_decay=0.01, norm_weight_decay=0.02, bias_weight_decay=0.03).build(
        model, batch_size=16
    )
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.03, 0.02]


class Detector(nn.Module):
    """Two stages, the first with a norm layer, and a head."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(1, 1, bias=False)
        self.first = nn.Sequential(nn.Linear(1, 1), nn.LayerNorm(1))
        self.second = nn.Linear(1, 1, bias=False)

    def stages(self):
        return [self.first, self.second]


@pytest.mark.parametrize("config", BUILDERS, ids=lambda config: config.kind)
def test_stages_further_from_the_heads_learn_slower(config):
    factors = {"backbone_lr_factor": 0.5, "layer_decay": 0.8}
    optimizer = config.model_copy(update=factors).build(Detector(), batch_size=16)
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}
    first, second = 0.1 * 0.5 * 0.8**2, 0.1 * 0.5 * 0.8
    assert rates == pytest.approx(
        {
            "head.weight": 0.1,
            "first.0.weight": first,
            "first.0.bias": first,
            "first.1.weight": first,
            "first.1.bias": first,
            "second.weight": second,
        }
    )
    assert len(optimizer.param_groups) == 4  # the first stage has two groups, with and without weight decay


def test_the_logged_rate_is_that_of_the_heads():
    """Also if the heads are frozen or the first group belongs to the backbone."""
    model = Detector()
    model.head.requires_grad_(False)
    optimizer = SGDConfig(lr=0.5, backbone_lr_factor=0.1).build(model, batch_size=16)
    assert set_learning_rate(optimizer, 0.1) == pytest.approx(0.05)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.005, 0.005])


def test_frozen_parameters_are_left_out(model):
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    model[2].requires_grad_(False)
    optimizer = SGDConfig().build(model, batch_size=16)
    assert [group["param_names"] for group in optimizer.param_groups] == [["3.weight"]]


@pytest.mark.parametrize("config", BUILDERS, ids=lambda config: config.kind)
def test_the_fused_kernel_is_used(model, config):
    assert config.build(model, batch_size=16).defaults["fused"] is True


def test_sgd_steps_as_by_hand():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    optimizer = SGDConfig(lr=0.1, momentum=0.5, weight_decay=0.25).build(model, batch_size=16)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(1, 1)).sum().backward()  # gradient 1
        optimizer.step()
    # Step 1: momentum 1 + 0.25 * 2 = 1.5, weight 2 - 0.15 = 1.85.
    # Step 2: momentum 0.5 * 1.5 + 1 + 0.25 * 1.85 = 2.2125, weight 1.85 - 0.22125.
    torch.testing.assert_close(model.weight.item(), 1.62875)


def test_rate_scales_with_the_batch_and_says_so(model, caplog):
    with caplog.at_level(logging.INFO):
        optimizer = SGDConfig(lr=0.02, base_batch=16).build(model, batch_size=2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0025, 0.0025]
    assert caplog.messages == ["learning rate 0.0025 = 0.02 x batch 2 / base batch 16"]
    assert scaled_lr(0.02, base_batch=16, batch_size=64) == 0.08


def test_factor_multiplies_the_initial_rate_each_time(model):
    optimizer = SGDConfig(lr=0.5).build(model, batch_size=16)
    assert set_learning_rate(optimizer, 0.1) == pytest.approx(0.05)
    assert set_learning_rate(optimizer, 0.1) == pytest.approx(0.05)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.05])


@pytest.mark.parametrize(("max_norm", "expected"), [(None, [3.0, 4.0]), (10.0, [3.0, 4.0]), (1.0, [0.6, 0.8])])
def test_clipping_bounds_the_norm_of_all_gradients(max_norm, expected):
    model = nn.Sequential(nn.Linear(1, 1), nn.LayerNorm(1))  # two groups, one gradient norm
    optimizer = SGDConfig().build(model, batch_size=16)
    model[0].weight.grad = torch.tensor([[3.0]])
    model[1].bias.grad = torch.tensor([4.0])
    assert clip_gradients(optimizer, max_norm).item() == 5.0
    clipped = torch.stack([model[0].weight.grad.squeeze(), model[1].bias.grad.squeeze()])
    torch.testing.assert_close(clipped, torch.tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", BUILDERS, ids=lambda config: config.kind)
def test_loaded_state_keeps_the_configured_rates(model, config):
    optimizer = config.build(model, batch_size=16)
    step(model, optimizer)
    fresh = config.model_copy(update={"lr": 0.3}).build(model, batch_size=16)
    load_optimizer_state(fresh, optimizer.state_dict(), source="last.pt")
    assert fresh.param_groups[0]["lr"] == 0.3
    key = "momentum_buffer" if config.kind == "sgd" else "exp_avg"
    for parameter, state in optimizer.state.items():
        assert torch.equal(fresh.state[parameter][key], state[key])


def test_state_of_other_parameters_is_refused(model):
    state = SGDConfig().build(model, batch_size=16).state_dict()
    model[0].requires_grad_(False)
    with pytest.raises(InputError, match=r"last\.pt: .* other parameters"):
        load_optimizer_state(SGDConfig().build(model, batch_size=16), state, source="last.pt")


def test_state_of_other_groups_is_refused(model):
    state = SGDConfig().build(model, batch_size=16).state_dict()
    with pytest.raises(InputError, match=r"last\.pt: .* other groups; to resume, keep .* layer_decay"):
        load_optimizer_state(SGDConfig(bias_weight_decay=0.0).build(model, batch_size=16), state, source="last.pt")


def test_state_of_another_optimizer_is_refused(model):
    state = SGDConfig().build(model, batch_size=16).state_dict()
    with pytest.raises(InputError, match=r"last\.pt: .* another kind of optimizer than AdamW"):
        load_optimizer_state(AdamWConfig().build(model, batch_size=16), state, source="last.pt")


def test_kind_chooses_the_optimizer(choose):
    assert choose(OptimizerConfig, {"kind": "adamw", "lr": 0.001}) == AdamWConfig(lr=0.001)
    with pytest.raises(ValidationError):
        choose(OptimizerConfig, {"kind": "adamw", "momentum": 0.9})
