"""Channels of zeros beside those of a plain network, for runtimes that are fast with round numbers of them."""

from __future__ import annotations

import copy
from typing import TypeVar, cast

from torch import Tensor, nn
from torch.nn import functional as F

from budgetnet.checks import at_least
from budgetnet.extraction import fold_batch_norm, rows_of_layers

Plain = TypeVar("Plain", bound=nn.Module)

KEEP_ZERO = (
    *(nn.Identity, nn.Dropout, nn.ReLU, nn.ReLU6, nn.LeakyReLU),
    *(nn.GELU, nn.SiLU, nn.Hardswish, nn.Tanh, nn.AvgPool2d, nn.MaxPool2d),
)
"""Layers that make zeros of a channel of zeros."""


def filled(network: Plain, block: int) -> Plain:
    """A copy for inference in which convolutions hand each other a multiple of `block` channels, some of them zero.

    It computes the same, with more multiply-adds, and in onnxruntime mostly sooner: on a CPU that has a faster layout
    for multiples of 8; 16 gain nothing more with AVX-512. Batch norms are folded. Channels are added where one dense
    convolution follows another in an `nn.Sequential`, with nothing but activations that leave 0 as it is, and
    depthwise convolutions, between them; elsewhere they are as they were.

    Args:
        network: plain, such as `Found.network()`; stays as it is.
        block: channels, 8 mostly.

    Raises:
        ConfigError: `block` is below 1.
    """
    at_least(1, block=block)
    found = fold_batch_norm(network)
    for row in rows_of_layers(found):
        layers = list(row)
        for first in range(len(layers)):
            last = next((place for place in range(first + 1, len(layers)) if not _passes_zeros(layers[place])), first)
            if last == first or not (_is_dense(layers[first]) and _is_dense(layers[last])):
                continue
            lacking = -cast(nn.Conv2d, layers[first]).out_channels % block
            layers[last] = _wider(layers[last], into=lacking)
            layers[first:last] = [_wider(layer, out=lacking) for layer in layers[first:last]]
        for place, layer in enumerate(layers):
            row[place] = layer
    return found


def wider(weight: Tensor, bias: Tensor | None, *, out: int = 0, into: int = 0) -> tuple[Tensor, Tensor | None]:
    """A convolution's weight `(O, I, h, w)` and bias `(O,)` with so many more channels, all zero."""
    more = None if bias is None else F.pad(bias.detach(), (0, out))
    return F.pad(weight.detach(), (0, 0, 0, 0, 0, into, 0, out)), more


def _is_dense(layer: nn.Module) -> bool:
    """Whether it is a convolution in which all channels mix, and nothing else."""
    return type(layer) is nn.Conv2d and layer.groups == 1 and not (layer._forward_hooks or layer._forward_pre_hooks)


def _passes_zeros(layer: nn.Module) -> bool:
    """Whether a channel of zeros that is added comes out as zeros, and changes no other channel."""
    if layer._forward_hooks or layer._forward_pre_hooks:
        return False
    depthwise = type(layer) is nn.Conv2d and 1 < layer.groups == layer.in_channels == layer.out_channels
    return depthwise or type(layer) in KEEP_ZERO


def _wider(conv: nn.Module, *, out: int = 0, into: int = 0) -> nn.Module:
    """A copy of a convolution with so many more channels, all zero; `out` of a depthwise one it reads, too.

    Anything else as it is.
    """
    if not isinstance(conv, nn.Conv2d):
        return conv
    new = copy.deepcopy(conv)
    weight, bias = wider(conv.weight, conv.bias, out=out, into=into)
    new.weight, new.bias = nn.Parameter(weight), None if bias is None else nn.Parameter(bias)
    depthwise = conv.groups > 1
    new.out_channels, new.in_channels = conv.out_channels + out, conv.in_channels + (out if depthwise else into)
    new.groups = new.out_channels if depthwise else 1
    return new
