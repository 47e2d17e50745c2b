"""Optimizers: which parameters decay, how fast they learn, and how long a gradient may be."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from maskrcnn.config import Section
from maskrcnn.errors import InputError

logger = logging.getLogger(__name__)

Momentum = Annotated[float, Field(ge=0, lt=1)]
LayerDecay = Annotated[float, Field(gt=0, le=1)]

_NORM_LAYERS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.GroupNorm, nn.LayerNorm, nn.RMSNorm),
)

# One kernel for all parameters halves the time of a step; elsewhere torch has no such kernel, or we cannot test it.
_FUSED_DEVICES = frozenset({"cpu", "cuda"})


class _OptimizerConfig(Section):
    """What all optimizers share: how the rate scales with the batch, and which parameters get what of it."""

    lr: PositiveFloat
    base_batch: PositiveInt = Field(16, description="the batch that `lr` is meant for; others scale it linearly")
    weight_decay: NonNegativeFloat
    norm_weight_decay: NonNegativeFloat = Field(0.0, description="decay of weights and biases of norm layers")
    bias_weight_decay: NonNegativeFloat | None = Field(
        None, description="decay of all other biases; null: that of weights, as in Detectron2"
    )
    backbone_lr_factor: PositiveFloat = Field(1.0, description="by which the backbone's stages learn faster or slower")
    layer_decay: LayerDecay = Field(
        1.0, description="by which a stage learns slower than what follows it; neck and heads learn at the full rate"
    )

    def groups(self, model: nn.Module, *, lr: float) -> list[dict[str, Any]]:
        """Return `parameter_groups` with these settings, at the rate `lr`."""
        return parameter_groups(
            model,
            lr=lr,
            weight_decay=self.weight_decay,
            norm_weight_decay=self.norm_weight_decay,
            bias_weight_decay=self.weight_decay if self.bias_weight_decay is None else self.bias_weight_decay,
            backbone_lr_factor=self.backbone_lr_factor,
            layer_decay=self.layer_decay,
        )


class SGDConfig(_OptimizerConfig):
    """Stochastic gradient descent with momentum: the reference recipe (Detectron2's defaults)."""

    kind: Literal["sgd"] = "sgd"
    lr: PositiveFloat = Field(0.02, description="learning rate for a batch of `base_batch` images")
    momentum: Momentum = 0.9
    weight_decay: NonNegativeFloat = 1e-4

    def build(self, model: nn.Module, *, batch_size: int) -> Optimizer:
        """Return the optimizer of the parameters that learn, for steps of `batch_size` images."""
        lr = scaled_lr(self.lr, base_batch=self.base_batch, batch_size=batch_size)
        return SGD(self.groups(model, lr=lr), lr=lr, momentum=self.momentum, fused=_can_fuse(model))


class AdamWConfig(_OptimizerConfig):
    """Adam with decoupled weight decay."""

    kind: Literal["adamw"] = "adamw"
    lr: PositiveFloat = Field(1e-4, description="learning rate for a batch of `base_batch` images")
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 0.05

    def build(self, model: nn.Module, *, batch_size: int) -> Optimizer:
        """Return the optimizer of the parameters that learn, for steps of `batch_size` images."""
        lr = scaled_lr(self.lr, base_batch=self.base_batch, batch_size=batch_size)
        return AdamW(self.groups(model, lr=lr), lr=lr, betas=self.betas, fused=_can_fuse(model))


OptimizerConfig = Annotated[SGDConfig | AdamWConfig, Field(discriminator="kind")]


def scaled_lr(lr: float, *, base_batch: int, batch_size: int) -> float:
    """Scale a learning rate in proportion to the batch (Goyal et al. 2017), and say so in the log."""
    scaled = lr * batch_size / base_batch
    logger.info("learning rate %g = %g x batch %d / base batch %d", scaled, lr, batch_size, base_batch)
    return scaled


@runtime_checkable
class HasStages(Protocol):
    """A model that says which of its parts are stages of the backbone."""

    def stages(self) -> Sequence[nn.Module]:
        """Return the stages, from the image to the heads; parameters of none of them are the neck's and the heads'."""


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    norm_weight_decay: float,
    bias_weight_decay: float,
    backbone_lr_factor: float = 1.0,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Put the parameters that need a gradient into groups of equal rate and decay.

    A stage of the backbone (`HasStages`) that is the n-th from the heads learns at `lr * backbone_lr_factor *
    layer_decay ** n`, n counted from 1, everything else at `lr` (the layer decay of BEiT, arXiv 2106.08254, with
    stages for layers). Each group states its own `initial_lr`, which `set_learning_rate` multiplies; parameters carry
    their names.
    """
    norms, rates = _norm_parameters(model), _stage_factors(model, backbone_lr_factor, layer_decay)
    groups: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = bias_weight_decay if name.endswith("bias") else weight_decay
        decay = norm_weight_decay if parameter in norms else decay
        groups.setdefault((lr * rates.get(parameter, 1.0), decay), []).append((name, parameter))
    return [
        {"params": named, "lr": rate, "initial_lr": rate, "weight_decay": decay}
        for (rate, decay), named in groups.items()
    ]


def _norm_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of norm layers."""
    norms = (module for module in model.modules() if isinstance(module, _NORM_LAYERS))
    return {parameter for norm in norms for parameter in norm.parameters(recurse=False)}


def _stage_factors(model: nn.Module, backbone_lr_factor: float, layer_decay: float) -> dict[nn.Parameter, float]:
    """By what the rate of each parameter of the backbone's stages is multiplied."""
    stages = model.stages() if isinstance(model, HasStages) else ()
    return {
        parameter: backbone_lr_factor * layer_decay**depth
        for depth, stage in enumerate(reversed(stages), start=1)
        for parameter in stage.parameters()
    }


def set_learning_rate(optimizer: Optimizer, factor: float) -> float:
    """Give every group its initial rate times `factor`; return the base rate times it, which is the heads' rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return float(optimizer.defaults["lr"]) * factor


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
    before, now = _parameter_names(state), _parameter_names(own)
    if set().union(*before) != set().union(*now):
        raise InputError(
            f"{source}: its optimizer state belongs to other parameters than those that learn now; to resume, keep "
            "the model and what is frozen as they were, or start anew from these weights with --init"
        )
    if before != now:
        raise InputError(
            f"{source}: its optimizer has the parameters in other groups; to resume, keep training.optimizer, above "
            "all its weight decays, backbone_lr_factor and layer_decay, or start anew from these weights with --init"
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
