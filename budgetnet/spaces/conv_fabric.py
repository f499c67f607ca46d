"""The convolutional neural fabric: a grid of columns and resolutions, each hearing its neighbours (BSN, Fig. 1b)."""

from __future__ import annotations

from torch import nn

from budgetnet.blocks import conv_bn, initialise, upsample_conv
from budgetnet.checks import Size, at_least, image_shape, one_of
from budgetnet.errors import ConfigError
from budgetnet.supernet import Edge, Node, SuperNetwork


def conv_fabric(
    *,
    width: int = 8,
    depth: int | None = None,
    channels: int | None = None,
    classes: int = 10,
    image_size: Size = 32,
    in_channels: int = 3,
    task: str = "classification",
) -> SuperNetwork:
    """A fabric of `width` columns and `depth` resolutions, all of `channels` feature maps.

    Layer (l, s) hears (l-1, s-1) through a convolution of stride 2, (l-1, s) through one of stride
    1 and (l-1, s+1) through upsampling by 2 and a convolution. The first column is also a chain
    downwards, the last one a chain down to the coarsest layer, which classifies, or up to the
    finest, which labels every pixel.

    Args:
        width: columns W; 1, 2, 4 are the papers' baselines of the fabric of 8.
        depth: resolutions H, each half the one before; None for as many as halve the image evenly.
        channels: feature maps everywhere, None for 128 (classification) or 64 (segmentation).
        classes: size of the output, for each image or each pixel.
        image_size: pixels, one side or (height, width), divisible by `2**(depth - 1)`.
        in_channels: channels of the input.
        task: "classification" or "segmentation".

    Raises:
        ConfigError: an option is outside its range.

    Source: BSN, section 4.1 and appendix; Saxena and Verbeek, arXiv:1606.02492.
    """
    options = dict(locals())
    one_of("task", task, ("classification", "segmentation"))
    dense = task == "segmentation"
    at_least(1, width=width, classes=classes, in_channels=in_channels)
    channels = (64 if dense else 128) if channels is None else channels
    _, height, breadth = image_shape(in_channels, image_size)
    if depth is None:
        depth = next(halvings for halvings in range(1, 32) if height % 2**halvings or breadth % 2**halvings)
    at_least(1, depth=depth, channels=channels)
    options |= {"depth": depth, "channels": channels}
    shape = image_shape(in_channels, image_size, divisor=2 ** (depth - 1))
    if depth == 1 and width == 1:
        raise ConfigError("a fabric of one column and one resolution has no choice: width or depth must be > 1")
    if dense and width == 1:
        raise ConfigError("a fabric for segmentation needs width > 1: its first column leads down, its last one up")

    nodes = [
        # a sum takes a step even of one input (docs/counting.md); the first layer is the input convolution itself
        Node(name=name(column, scale), activation=nn.ReLU(), steps=1, position=(column, scale))
        for column in range(width)
        for scale in range(depth)
        if column or scale
    ]
    nodes.append(Node(name=name(0, 0), position=(0, 0)))
    stem = conv_bn(in_channels, channels, relu=True)
    edges = [Edge(start="x", end=name(0, 0), module=stem, name="input", kind="input", fixed=True)]
    edges += [between((0, scale - 1), (0, scale), channels) for scale in range(1, depth)]
    for column in range(1, width):
        for scale in range(depth):
            for source in (scale - 1, scale, scale + 1):
                if 0 <= source < depth:
                    edges.append(between((column - 1, source), (column, scale), channels))
    if width > 1:
        chain = range(depth - 1) if not dense else range(depth - 1, 0, -1)
        edges += [between((width - 1, s), (width - 1, s - 1 if dense else s + 1), channels) for s in chain]
    last = name(width - 1, 0 if dense else depth - 1)
    output = head(shape, depth, channels, classes, dense)
    edges.append(Edge(start=last, end="y", module=output, name="output", kind="output", fixed=True))
    nodes.append(Node(name="y", position=(width, 0 if dense else depth - 1)))
    return SuperNetwork(edges, input_shape=shape, nodes=nodes, name="conv_fabric", options=options)


def name(column: int, scale: int) -> str:
    """Name of the layer at (column l, scale s)."""
    return f"l{column}.s{scale}"


def between(start: tuple[int, int], end: tuple[int, int], channels: int) -> Edge:
    """The convolution from one layer to another: down, same or up one scale."""
    change = end[1] - start[1]
    module = upsample_conv(channels) if change < 0 else conv_bn(channels, channels, stride=1 + change)
    kind = {1: "down", 0: "same", -1: "up"}[change]
    return Edge(start=name(*start), end=name(*end), module=module, kind=kind)


def head(shape: tuple[int, int, int], depth: int, channels: int, classes: int, dense: bool) -> nn.Module:
    """A 1x1 convolution to the classes, of every pixel or of the (pooled) coarsest layer."""
    convolution = initialise(nn.Conv2d(channels, classes, 1))
    if dense:
        return convolution
    pool = [] if shape[1] == shape[2] == 2 ** (depth - 1) else [nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*pool, convolution, nn.Flatten())
