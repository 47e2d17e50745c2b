"""Optimizers: parameter groups, weight decay, learning rate scaling and gradient clipping."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from maskrcnn.config import Part
from maskrcnn.errors import InputError

logger = logging.getLogger(__name__)

Momentum = Annotated[float, Field(ge=0, lt=1)]
LayerDecay = Annotated[float, Field(gt=0, le=1)]

_NORM_LAYERS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.GroupNorm, nn.LayerNorm, nn.RMSNorm),
)

# The fused kernel halves the time of an optimizer step. Other devices lack it, or it is not tested there.
_FUSED_DEVICES = frozenset({"cpu", "cuda"})


class OptimizerConfig(Part):
    """Base class of the configs of optimizers, an extension point: learning rate scaling and parameter groups."""

    lr: PositiveFloat
    base_batch: PositiveInt = Field(
        16, description="batch size for which `lr` is given; `lr` is scaled linearly for other batch sizes"
    )
    weight_decay: NonNegativeFloat
    norm_weight_decay: NonNegativeFloat = Field(0.0, description="weight decay of weights and biases of norm layers")
    bias_weight_decay: NonNegativeFloat | None = Field(
        None, description="weight decay of all other biases; null uses `weight_decay`, as in Detectron2"
    )
    backbone_lr_factor: PositiveFloat = Field(1.0, description="learning rate factor of the backbone stages")
    layer_decay: LayerDecay = Field(
        1.0, description="learning rate factor from each backbone stage to the one before it; 1 for neck and heads"
    )

    @abstractmethod
    def build(self, model: nn.Module, *, batch_size: int) -> Optimizer:
        """Return the optimizer of the trainable parameters for training steps of `batch_size` images."""

    def groups(self, model: nn.Module, *, lr: float) -> list[dict[str, Any]]:
        """Return the `parameter_groups` of `model` with these settings and the base learning rate `lr`."""
        return parameter_groups(
            model,
            lr=lr,
            weight_decay=self.weight_decay,
            norm_weight_decay=self.norm_weight_decay,
            bias_weight_decay=self.weight_decay if self.bias_weight_decay is None else self.bias_weight_decay,
            backbone_lr_factor=self.backbone_lr_factor,
            layer_decay=self.layer_decay,
        )


class SGDConfig(OptimizerConfig):
    """Stochastic gradient descent with momentum. The defaults are those of Detectron2."""

    kind: Literal["sgd"] = "sgd"
    lr: PositiveFloat = Field(0.02, description="learning rate for a batch of `base_batch` images")
    momentum: Momentum = 0.9
    weight_decay: NonNegativeFloat = 1e-4

    def build(self, model: nn.Module, *, batch_size: int) -> Optimizer:
        """Return the optimizer of the trainable parameters for training steps of `batch_size` images."""
        lr = scaled_lr(self.lr, base_batch=self.base_batch, batch_size=batch_size)
        return SGD(self.groups(model, lr=lr), lr=lr, momentum=self.momentum, fused=_can_fuse(model))


class AdamWConfig(OptimizerConfig):
    """Adam with decoupled weight decay."""

    kind: Literal["adamw"] = "adamw"
    lr: PositiveFloat = Field(1e-4, description="learning rate for a batch of `base_batch` images")
    betas: tuple[Momentum, Momentum] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 0.05

    def build(self, model: nn.Module, *, batch_size: int) -> Optimizer:
        """Return the optimizer of the trainable parameters for training steps of `batch_size` images."""
        lr = scaled_lr(self.lr, base_batch=self.base_batch, batch_size=batch_size)
        return AdamW(self.groups(model, lr=lr), lr=lr, betas=self.betas, fused=_can_fuse(model))


def scaled_lr(lr: float, *, base_batch: int, batch_size: int) -> float:
    """Return the learning rate scaled linearly with the batch size (Goyal et al. 2017), and log it."""
    scaled = lr * batch_size / base_batch
    logger.info("learning rate %g = %g x batch %d / base batch %d", scaled, lr, batch_size, base_batch)
    return scaled


@runtime_checkable
class HasStages(Protocol):
    """A model that lists the stages of its backbone."""

    def stages(self) -> Sequence[nn.Module]:
        """Return the backbone stages, in order from the image to the heads.

        Parameters outside of these stages belong to the neck and the heads.
        """


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
    """Return parameter groups with equal learning rate and weight decay; frozen parameters are left out.

    The n-th backbone stage (`HasStages`), counted from 1 at the heads, has the learning rate `lr * backbone_lr_factor *
    layer_decay ** n`. All other parameters have `lr`. This is the layer decay of BEiT (arXiv 2106.08254) with stages
    instead of layers. Each group has an `initial_lr`, which `set_learning_rate` multiplies, and named parameters.
    """
    norms, factors = _norm_parameters(model), _stage_factors(model, backbone_lr_factor, layer_decay)
    groups: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = bias_weight_decay if name.endswith("bias") else weight_decay
        decay = norm_weight_decay if parameter in norms else decay
        groups.setdefault((lr * factors.get(parameter, 1.0), decay), []).append((name, parameter))
    return [
        {"params": named, "lr": rate, "initial_lr": rate, "weight_decay": decay}
        for (rate, decay), named in groups.items()
    ]


def _norm_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of all norm layers."""
    norms = (module for module in model.modules() if isinstance(module, _NORM_LAYERS))
    return {parameter for norm in norms for parameter in norm.parameters(recurse=False)}


def _stage_factors(model: nn.Module, backbone_lr_factor: float, layer_decay: float) -> dict[nn.Parameter, float]:
    """Return the learning rate factor of each parameter in a backbone stage."""
    stages = model.stages() if isinstance(model, HasStages) else ()
    return {
        parameter: backbone_lr_factor * layer_decay**depth
        for depth, stage in enumerate(reversed(stages), start=1)
        for parameter in stage.parameters()
    }


def set_learning_rate(optimizer: Optimizer, factor: float) -> float:
    """Set the learning rate of each group to its initial rate times `factor`; return that of the heads."""
    for group in optimizer.param_groups:
        rate = group["initial_lr"] * factor
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)  # a recorded step reads this tensor
        else:
            group["lr"] = rate
    return float(optimizer.defaults["lr"]) * factor


def clip_gradients(optimizer: Optimizer, max_norm: float | None) -> Tensor:
    """Clip the gradient norm over all parameters to `max_norm`; None disables clipping.

    Returns the 2-norm before clipping, a scalar tensor.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def make_recordable(optimizer: Optimizer, device: torch.device) -> None:
    """Keep the learning rates in tensors, which a recorded step of a fused optimizer reads each time it is replayed."""
    for group in optimizer.param_groups:
        group["lr"] = torch.full((), float(group["lr"]), device=device)
        if "capturable" in group:  # of Adam, which asks for it
            group["capturable"] = True
    optimizer._warned_capturable_if_run_uncaptured = True  # the first steps are not recorded


def can_skip_on_device(optimizer: Optimizer, device: torch.device) -> bool:
    """Return whether `step_unless` works: on a GPU, with the fused optimizers of torch."""
    return device.type == "cuda" and getattr(optimizer, "_step_supports_amp_scaling", False)


def step_unless(optimizer: Optimizer, skip: Tensor) -> None:
    """Take an optimizer step unless the scalar bool tensor `skip` is true, which the host does not read."""
    fill_momentum(optimizer)
    # The attribute by which torch's GradScaler tells a fused optimizer to do nothing.
    optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
    optimizer.step()
    del optimizer.found_inf  # type: ignore[attr-defined]


def fill_momentum(optimizer: Optimizer) -> None:
    """Give a fused SGD that has not taken a step momentum buffers of zeros, with which its first step is the same.

    torch creates them in the first step, and leaves them uninitialised if the kernel skips that step. (With dampening,
    which no configuration has, the first step would differ.)
    """
    if isinstance(optimizer, SGD) and not optimizer.state:
        for group in optimizer.param_groups:
            for parameter in group["params"] if group["momentum"] and not group["dampening"] else ():
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def load_optimizer_state(optimizer: Optimizer, state: dict[str, Any], *, source: str) -> None:
    """Load the optimizer state (momenta, step counts) from a state dict; learning rates and decay are not loaded.

    Args:
        optimizer: the optimizer to load into.
        state: state dict of an optimizer.
        source: name of the checkpoint in error messages.

    Raises:
        InputError: the state belongs to other parameters, other parameter groups or another kind of optimizer.
    """
    current = optimizer.state_dict()
    stored_names, current_names = _parameter_names(state), _parameter_names(current)
    if set().union(*stored_names) != set().union(*current_names):
        raise InputError(
            f"{source}: its optimizer state belongs to other parameters than those that are trained now; to "
            "resume, keep the model and its frozen layers, or start a new run from these weights with --init"
        )
    if stored_names != current_names:
        raise InputError(
            f"{source}: its optimizer has the parameters in other groups; to resume, keep training.optimizer, in "
            "particular its weight decays, backbone_lr_factor and layer_decay, or start a new run from these weights "
            "with --init"
        )
    if _hyperparameter_names(state) != _hyperparameter_names(current):
        raise InputError(
            f"{source}: its state is of another kind of optimizer than {type(optimizer).__name__}; to resume, keep "
            "training.optimizer.kind, or start a new run from these weights with --init"
        )
    optimizer.load_state_dict({"state": state["state"], "param_groups": current["param_groups"]})


def _parameter_names(state: dict[str, Any]) -> list[list[str]]:
    return [group["param_names"] for group in state["param_groups"]]


def _hyperparameter_names(state: dict[str, Any]) -> list[set[str]]:
    return [set(group) for group in state["param_groups"]]


def _can_fuse(model: nn.Module) -> bool:
    return all(parameter.device.type in _FUSED_DEVICES for parameter in model.parameters())
