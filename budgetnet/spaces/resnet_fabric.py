"""The ResNet fabric: a ResNet whose later blocks also receive the earlier groups' layers (BSN, Figure 1a)."""

from __future__ import annotations

from torch import nn

from budgetnet.blocks import basic_block, conv_bn, pooled_classifier
from budgetnet.checks import Size, at_least, image_shape, one_of
from budgetnet.errors import ConfigError
from budgetnet.gated import ChannelGate, GatedSequential
from budgetnet.supernet import Edge, Node, SuperNetwork


def resnet_fabric(
    *,
    width: int = 3,
    channels: int = 16,
    classes: int = 10,
    image_size: Size = 32,
    in_channels: int = 3,
    groups: int = 3,
    shifts: str = "slr",
    granularity: int = 0,
    task: str = "classification",
) -> SuperNetwork:
    """A fabric that contains ResNet-(6 width + 2) as its architecture "resnet".

    Group b has `width` building blocks of `channels * 2**b` feature maps at `1 / 2**b` of the image's
    size. The blocks of the later groups receive, beside their predecessor, up to three layers of
    the group before, mirrored: block d hears block `width - 2 - d` ("s"), `width - 1 - d` ("l",
    not the first block) and `width - 3 - d` ("r", not the last); before its first block stands
    the input of that group. Every connection is a residual block and its shortcut: two choices.

    Args:
        width: blocks in a group; 3, 5, 7, 9, 18 contain ResNet-20, 32, 44, 56, 110.
        channels: feature maps of the first group.
        classes: size of the output.
        image_size: pixels, one side or (height, width), divisible by `2**(groups - 1)`.
        in_channels: channels of the input.
        groups: groups of blocks, each at half the size of the one before.
        shifts: which of the extra connections exist, letters of "slr".
        granularity: channels that a gate controls between the two convolutions of each block; 0 for no such gates.
        task: "classification".

    Raises:
        ConfigError: an option is outside its range.

    Source: BSN, section 4.1 and appendix; connections as in the authors' public code (docs/counting.md).
    """
    at_least(1, width=width, channels=channels, classes=classes, in_channels=in_channels, groups=groups)
    at_least(0, granularity=granularity)
    one_of("task", task, ("classification",))
    if set(shifts) - set("slr"):
        raise ConfigError(f"shifts must be letters of 'slr', got {shifts!r}")
    options = dict(locals())
    shape = image_shape(in_channels, image_size, divisor=2 ** (groups - 1))

    def joined(start: tuple[str, int], end: tuple[str, int], label: str = "") -> list[Edge]:
        return connection(start, end, channels, label, granularity)

    def at(group: int, block: int) -> tuple[str, int]:
        """Name and group of a layer; block -1 is the input of its group."""
        if block >= 0:
            return f"g{group}.{block}", group
        return ("stem", 0) if group == 0 else at(group - 1, width - 1)

    stem = conv_bn(in_channels, channels, relu=True)
    edges = [Edge(start="x", end="stem", module=stem, name="input", kind="input", fixed=True)]
    nodes = [Node(name="stem", position=(0, 0))]
    resnet = []
    for group in range(groups):
        for block in range(width):
            here = end, _ = at(group, block)
            nodes.append(Node(name=end, activation=nn.ReLU(), position=(1 + group * width + block, group)))
            for shift, offset in (("s", 2), ("l", 1), ("r", 3)):
                at_edge = (shift == "l" and block == 0) or (shift == "r" and block == width - 1)
                if group > 0 and shift in shifts and not at_edge:
                    edges += joined(at(group - 1, max(width - offset - block, -1)), here, shift)
            main = joined(at(group, block - 1), here)[::-1]  # the shortcut comes first here
            edges += main
            resnet += [edge.name or "" for edge in main]
    last, top = at(groups - 1, width - 1)
    head = pooled_classifier(channels * 2**top, classes)
    edges.append(Edge(start=last, end="y", module=head, name="output", kind="output", fixed=True))
    return SuperNetwork(
        edges,
        input_shape=shape,
        nodes=[*nodes, Node(name="y", position=(1 + groups * width, groups - 1))],
        name="resnet_fabric",
        options=options,
        architectures={"resnet": resnet},
    )


def connection(begin: tuple[str, int], to: tuple[str, int], channels: int, label: str, granularity: int) -> list[Edge]:
    """A residual block from a layer to another, each a name and its group, and the shortcut next to it."""
    (start, group), (end, later) = begin, to
    stride, into, out = 2 ** (later - group), channels * 2**group, channels * 2**later
    same = into == out
    shortcut = nn.Identity() if same else conv_bn(into, out, kernel=1, stride=stride)
    prefix = f"{end}.{label}" if label else end
    block = basic_block(into, out, stride=stride)
    if granularity:
        layers = list(block.children())
        block = GatedSequential(*layers[:-2], ChannelGate(out, granularity), *layers[-2:])
    return [
        Edge(start=start, end=end, module=block, name=f"{prefix}.block", kind="block"),
        Edge(start=start, end=end, module=shortcut, name=f"{prefix}.skip", kind="identity" if same else "projection"),
    ]
