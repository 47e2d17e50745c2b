"""Optimizers: which parameters decay, how fast they learn, and how long a gradient may be."""

from __future__ import annotations

import logging
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from maskrcnn.config import Section
from maskrcnn.errors import InputError

logger = logging.getLogger(__name__)

Momentum = Annotated[float, Field(ge=0, lt=1)]

_NORM_LAYERS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.GroupNorm, nn.LayerNorm, nn.RMSNorm),
)

# One kernel for all parameters halves the time of a step; elsewhere torch has no such kernel, or we cannot test it.
_FUSED_DEVICES = frozenset({"cpu", "cuda"})


class SGDConfig(Section):
    """Stochastic gradient descent with momentum: the reference recipe (Detectron2's defaults)."""

    kind: Literal["sgd"] = "sgd"
    lr: PositiveFloat = Field(0.02, description="learning rate for a batch of `base_batch` images")
    base_batch: PositiveInt = Field(16, description="the batch that `lr` is meant for; others scale it linearly")
    momentum: Momentum = 0.9
    weight_decay: NonNegativeFloat = 1e-4
    norm_weight_decay: NonNegativeFloat = Field(0.0, description="decay of weights and biases of norm layers")

    def build(self, model: nn.Module, *, batch_size: int) -> Optimizer:
        """Return the optimizer of the parameters that learn, for steps of `batch_size` images."""
        lr = scaled_lr(self.lr, base_batch=self.base_batch, batch_size=batch_size)
        groups = parameter_groups(
            model, lr=lr, weight_decay=self.weight_decay, norm_weight_decay=self.norm_weight_decay
        )
        return SGD(groups, lr=lr, momentum=self.momentum, fused=_can_fuse(model))


class AdamWConfig(Section):
    """Adam with decoupled weight decay; norm layers do not decay."""

    kind: Literal["adamw"] = "adamw"
    lr: PositiveFloat = Field(1e-4, description="learning rate for a batch of `base_batch` images")
    base_batch: PositiveInt = Field(16, description="the batch that `lr` is meant for; others scale it linearly")
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 0.05

    def build(self, model: nn.Module, *, batch_size: int) -> Optimizer:
        """Return the optimizer of the parameters that learn, for steps of `batch_size` images."""
        lr = scaled_lr(self.lr, base_batch=self.base_batch, batch_size=batch_size)
        groups = parameter_groups(model, lr=lr, weight_decay=self.weight_decay, norm_weight_decay=0.0)
        return AdamW(groups, lr=lr, betas=self.betas, fused=_can_fuse(model))


OptimizerConfig = Annotated[SGDConfig | AdamWConfig, Field(discriminator="kind")]


def scaled_lr(lr: float, *, base_batch: int, batch_size: int) -> float:
    """Scale a learning rate in proportion to the batch (Goyal et al. 2017), and say so in the log."""
    scaled = lr * batch_size / base_batch
    logger.info("learning rate %g = %g x batch %d / base batch %d", scaled, lr, batch_size, base_batch)
    return scaled


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float, norm_weight_decay: float
) -> list[dict[str, Any]]:
    """Split the parameters that need a gradient into those of norm layers and all others.

    Biases of other layers decay like weights, as in Detectron2. Each group states its own `initial_lr`, which
    `set_learning_rate` multiplies; parameters carry their names.
    """
    norm_ids = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, _NORM_LAYERS)
        for parameter in module.parameters(recurse=False)
    }
    learning = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    decayed = [(name, parameter) for name, parameter in learning if id(parameter) not in norm_ids]
    norms = [(name, parameter) for name, parameter in learning if id(parameter) in norm_ids]
    groups = ((decayed, weight_decay), (norms, norm_weight_decay))
    return [{"params": named, "initial_lr": lr, "weight_decay": decay} for named, decay in groups if len(named) > 0]


def set_learning_rate(optimizer: Optimizer, factor: float) -> float:
    """Give every group its initial rate times `factor`; return the rate of the first group."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])


def clip_gradients(optimizer: Optimizer, max_norm: float | None) -> Tensor:
    """Shorten the gradient of all parameters together to `max_norm` (None: leave it); return its norm before."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def load_optimizer_state(optimizer: Optimizer, state: dict[str, Any], *, source: str) -> None:
    """Take momenta and step counts from an optimizer's state dict; rates and decay stay as configured.

    Raises InputError, which names `source`, where the state belongs to other parameters or another optimizer.
    """
    own = optimizer.state_dict()
    if _parameter_names(state) != _parameter_names(own):
        raise InputError(
            f"{source}: its optimizer state belongs to other parameters than those that learn now; to resume, keep "
            "the model and what is frozen as they were, or start anew from these weights with --init"
        )
    if _hyperparameter_names(state) != _hyperparameter_names(own):
        raise InputError(
            f"{source}: its state is of another kind of optimizer than {type(optimizer).__name__}; to resume, keep "
            "training.optimizer.kind, or start anew from these weights with --init"
        )
    optimizer.load_state_dict({"state": state["state"], "param_groups": own["param_groups"]})


def _parameter_names(state: dict[str, Any]) -> list[list[str]]:
    return [group["param_names"] for group in state["param_groups"]]


def _hyperparameter_names(state: dict[str, Any]) -> list[set[str]]:
    return [set(group) for group in state["param_groups"]]


def _can_fuse(model: nn.Module) -> bool:
    return all(parameter.device.type in _FUSED_DEVICES for parameter in model.parameters())
