"""The layers that stand on edges and nodes: plain `torch.nn`, so that what is extracted needs no other package."""

from __future__ import annotations

import torch
from torch import nn


def conv_bn(channels_in: int, channels_out: int, *, kernel: int = 3, stride: int = 1, relu: bool = False) -> nn.Module:
    """Convolution (with bias, padded to keep the size), batch norm and, where asked, ReLU.

    The bias is redundant before a batch norm; the parameter counts of BSN Table 3 include it.
    """
    layers: list[nn.Module] = [
        nn.Conv2d(channels_in, channels_out, kernel, stride=stride, padding=kernel // 2),
        nn.BatchNorm2d(channels_out),
    ]
    return initialise(nn.Sequential(*layers, *([nn.ReLU()] if relu else [])))


def basic_block(channels_in: int, channels_out: int, *, stride: int = 1) -> nn.Module:
    """The residual branch of a ResNet building block: two 3x3 convolutions; the ReLU after the sum is the node's.

    Source: He et al., arXiv:1512.03385, Figure 2; BSN Figure 1a.
    """
    first = conv_bn(channels_in, channels_out, stride=stride, relu=True)
    second = conv_bn(channels_out, channels_out)
    return nn.Sequential(*first.children(), *second.children())


def upsample_conv(channels: int) -> nn.Module:
    """Nearest-neighbour upsampling by 2, then a 3x3 convolution and batch norm (BSN appendix, CNF)."""
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), *conv_bn(channels, channels).children())


def pooled_classifier(channels: int, classes: int) -> nn.Module:
    """Global average pooling and a linear layer: `(B, channels, H, W)` to `(B, classes)` logits."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def initialise(module: nn.Module) -> nn.Module:
    """He initialisation of the convolutions (arXiv:1502.01852), biases 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                torch.nn.init.zeros_(layer.bias)
    return module
