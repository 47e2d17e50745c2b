"""Initial weights of the layers; biases are zero unless stated otherwise.

A head starts in one of three ways, the key `initialization` of its section. They differ in the scale of the weights:

- `fan_in`, the default: the last layers are scaled by their number of inputs, and RoIs are background with probability
  0.9.
- `detectron2`: the last layers start near zero. The masks are then 0.5 everywhere, and hardly any gradient reaches the
  layers below until these weights have grown: negligible in 90,000 steps, but not in 400 (docs/learning_speed.md).
- `torchvision`: the last layer of the mask head is scaled by its number of outputs; the box head starts as
  `torch.nn.Linear` does, biases included.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

Layer = nn.modules.conv._ConvNd | nn.Linear
Initialization = Literal["fan_in", "detectron2", "torchvision"]

BACKGROUND = 0.9  # initial probability of background with `fan_in`


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
    """`init_he` for every convolution of a module, as in torchvision's backbones."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            init_he(layer)


def init_mask_logits(logits: nn.Conv2d | nn.Linear, *, how: Initialization) -> None:
    """Start the last layer of a mask head."""
    if how == "fan_in":
        gain = 4.0 if isinstance(logits, nn.Conv2d) else 1.0  # of 1, 4 and 11, 4 learned fastest (learning_speed.md)
        init_normal(logits, std=gain * logits.weight[0].numel() ** -0.5)
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
    if how == "detectron2":
        init_normal(cls_score, std=0.01)
        init_normal(bbox_pred, std=0.001)
        return
    for layer in (cls_score, bbox_pred):
        layer.reset_parameters()
    if how == "fan_in":
        _zero_bias(bbox_pred)
        _zero_bias(cls_score)
        with torch.no_grad():
            cls_score.bias[0] = math.log(BACKGROUND / (1 - BACKGROUND) * (cls_score.out_features - 1))


def _zero_bias(layer: Layer) -> None:
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
