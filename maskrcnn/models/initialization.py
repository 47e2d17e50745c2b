"""Random starts of the layers, as the references have them; biases start at zero."""

from __future__ import annotations

from torch import nn

Layer = nn.modules.conv._ConvNd | nn.Linear


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


def _zero_bias(layer: Layer) -> None:
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
