"""The layers that stand on edges and nodes: plain `torch.nn`, so that what is extracted needs no other package."""

from __future__ import annotations

import torch
from torch import fx, nn


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


def conv_layers(
    channels_in: int,
    channels_out: int,
    *,
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
    activation: nn.Module | None = None,
) -> list[nn.Module]:
    """Convolution (without bias, padded to keep the size), batch norm and, where given, an activation.

    They come as a list, so that gates can stand between them.
    """
    conv = nn.Conv2d(channels_in, channels_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [initialise(conv), nn.BatchNorm2d(channels_out), *([] if activation is None else [activation])]


def padded_identity(channels_in: int, channels_out: int, *, stride: int = 1) -> nn.Module:
    """The shortcut without parameters: every `stride`-th pixel, and zeros for the channels that are new.

    `(B, channels_in, H, W)` to `(B, channels_out, ceil(H / stride), ceil(W / stride))`.

    Source: He et al., arXiv:1512.03385, option A.
    """
    # the last three of (B, C, H, W) are padded: nothing to width and height, zeros behind the channels
    zeros = nn.ZeroPad3d((0, 0, 0, 0, 0, channels_out - channels_in))
    return nn.Sequential(nn.AvgPool2d(1, stride), zeros)


def dense_layer(channels: int, growth: int, *, bottleneck: bool) -> nn.Module:
    """Batch norm, ReLU, 3x3 convolution to `growth` channels; with a bottleneck of `4 growth` by a 1x1 one before it.

    Source: Huang et al., arXiv:1608.06993, section 3.
    """
    layers: list[nn.Module] = [nn.BatchNorm2d(channels), nn.ReLU()]
    if bottleneck:
        layers += conv_layers(channels, 4 * growth, kernel=1, activation=nn.ReLU())
        channels = 4 * growth
    conv = nn.Conv2d(channels, growth, 3, padding=1, bias=False)
    return nn.Sequential(*layers, initialise(conv))


def dense_block(channels: int, layers: int, growth: int, *, bottleneck: bool) -> nn.Module:
    """Layers that each read all before them: `(B, channels, H, W)` to `(B, channels + layers growth, H, W)`.

    Source: Huang et al., arXiv:1608.06993, Eq. 2.
    """
    graph, parts = fx.Graph(), nn.Module()
    value = graph.placeholder("x")
    for place in range(layers):
        parts.add_module(f"layer{place}", dense_layer(channels + place * growth, growth, bottleneck=bottleneck))
        value = graph.call_function(torch.cat, ([value, graph.call_module(f"layer{place}", (value,))], 1))
    graph.output(value)
    return fx.GraphModule(parts, graph, class_name="DenseBlock")


def transition(channels_in: int, channels_out: int) -> nn.Module:
    """Between dense blocks: batch norm, ReLU, 1x1 convolution, and an average pool to half the size."""
    conv = nn.Conv2d(channels_in, channels_out, 1, bias=False)
    return nn.Sequential(nn.BatchNorm2d(channels_in), nn.ReLU(), initialise(conv), nn.AvgPool2d(2))


def exit_classifier(channels: int, classes: int, *, hidden: int = 128, pool: int = 1) -> nn.Module:
    """An early classifier: two 3x3 convolutions of stride 2, a global average pool and a linear layer.

    The features are averaged over squares of side `pool` before, where that is not 1.

    Source: Huang et al., *Multi-scale dense networks*, arXiv:1703.09844; Herrmann et al., S1.5. Differs: the
    pool is global, so that maps of any size can be classified; on 8x8 maps it is theirs.
    """
    convolutions = [
        *([nn.AvgPool2d(pool)] if pool > 1 else []),
        *conv_layers(channels, hidden, stride=2, activation=nn.ReLU()),
        *conv_layers(hidden, hidden, stride=2, activation=nn.ReLU()),
    ]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(hidden, classes))


def upsample_conv(channels: int) -> nn.Module:
    """Nearest-neighbour upsampling by 2, then a 3x3 convolution and batch norm (BSN appendix, CNF)."""
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), *conv_bn(channels, channels).children())


def pooled_classifier(channels: int, classes: int) -> nn.Sequential:
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
