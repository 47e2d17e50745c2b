"""Random starts of the layers; biases start at zero.

A head starts in one of three ways, the key `initialization` of its section. They differ in the scale of the weights:

- `fan_in`: every layer keeps the scale of its inputs, also the last one of the mask head. The default.
- `detectron2`: the mask head's last layer starts near zero (standard deviation 0.001), so its masks are 0.5 everywhere,
  and little reaches the layers below until it has grown. In 90,000 steps that is nothing; in 400 it costs a quarter of
  them (docs/learning_speed.md).
- `torchvision`: the mask head's layers are scaled by their number of outputs, the last one too; the box head has
  `torch.nn.Linear`'s own start.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import nn

Layer = nn.modules.conv._ConvNd | nn.Linear
Initialization = Literal["fan_in", "detectron2", "torchvision"]


def init_normal(layer: Layer, *, std: float) -> None:
    """Weights from a normal distribution: for predictors, whose first outputs should be near zero."""
    nn.init.normal_(layer.weight, std=std)
    _zero_bias(layer)


def init_he(layer: Layer) -> None:
    """He initialisation by the number of outputs (arXiv 1502.01852), for layers before a ReLU."""
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    _zero_bias(layer)


def init_uniform(layer: Layer) -> None:
    """Uniform with a variance of 1 / inputs: Caffe2's "Xavier", of the pyramid and of fully connected layers."""
    nn.init.kaiming_uniform_(layer.weight, a=1)
    _zero_bias(layer)


def init_convolutions(module: nn.Module) -> None:
    """`init_he` for every convolution of a backbone, as in torchvision's."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            init_he(layer)


def init_mask_convolutions(
    convs: Iterable[nn.Conv2d], upsample: nn.ConvTranspose2d, logits: nn.Conv2d, *, how: Initialization
) -> None:
    """Start the layers of a convolutional mask head; `upsample` has stride and kernel 2."""
    for conv in convs:
        init_he(conv)
    if how == "fan_in":
        # Each of its outputs reads one cell: torch's own count of inputs (and outputs) is four times too large.
        init_normal(upsample, std=(2 / upsample.in_channels) ** 0.5)
    else:
        init_he(upsample)
    init_mask_logits(logits, how=how)


def init_mask_logits(logits: nn.Conv2d | nn.Linear, *, how: Initialization) -> None:
    """Start the last layer of a mask head."""
    if how == "fan_in":
        init_uniform(logits)
    elif how == "detectron2":
        init_normal(logits, std=0.001)
    else:
        init_he(logits)


def init_linear(layer: nn.Linear, *, how: Initialization) -> None:
    """Start a hidden layer of a box or mask head."""
    if how == "torchvision":
        layer.reset_parameters()
    else:
        init_uniform(layer)


def init_box_predictors(cls_score: nn.Linear, bbox_pred: nn.Linear, *, how: Initialization) -> None:
    """Start the last layers of the box head."""
    if how == "torchvision":
        cls_score.reset_parameters()
        bbox_pred.reset_parameters()
    else:
        init_normal(cls_score, std=0.01)
        init_normal(bbox_pred, std=0.001)


def _zero_bias(layer: Layer) -> None:
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
