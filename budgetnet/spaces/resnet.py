"""ResNets whose residual branches, or the channels in them, have gates (Herrmann et al., sections 3.4 and S4)."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from budgetnet.blocks import conv_layers, padded_identity, pooled_classifier
from budgetnet.checks import Size, at_least, image_shape, one_of, positive
from budgetnet.errors import ConfigError
from budgetnet.gated import GatedSequential
from budgetnet.spaces.gating import Gating, Granularity, Stream, granularities
from budgetnet.supernet import Edge, Node, SuperNetwork

IMAGENET = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
"""Blocks in each of the four groups of the networks for ImageNet; those of 50 and 101 layers are bottlenecks."""


def resnet(
    *,
    depth: int = 20,
    channels: int | None = None,
    expansion: float = 1.0,
    classes: int | None = None,
    image_size: Size | None = None,
    in_channels: int = 3,
    gates: str = "channels",
    granularity: Granularity = 1,
    where: str = "hidden",
    conditional: bool = False,
    logits: int = 1,
    memory: bool = False,
    lock: bool = False,
    shortcut: str = "projection",
    task: str = "classification",
) -> SuperNetwork:
    """A ResNet for CIFAR (depth 6n + 2) or ImageNet (18, 34, 50, 101) whose residual branches can be closed or slimmed.

    Each block is an edge, the branch, beside its shortcut, which is always kept; the ReLU after their sum is
    the node's. So every block may be closed altogether, those with a projection too: the constant
    number of gates that stay open in layers without a shortcut (section 4.2) has no place here, as
    the stem and the classifier have no gates. The bottlenecks have their stride in the 3x3
    convolution ("v1.5", S1.4). Convolutions have no bias; where pretrained weights come from:
    `weights.load_torchvision`.

    Args:
        depth: 6n + 2: three groups of n basic blocks (20, 32, 44, 56, 110); or 18, 34 (basic blocks), 50, 101.
        channels: of the first group's 3x3 convolutions, twice as many in each further one; None for 16
            (CIFAR) or 64 (ImageNet).
        expansion: hidden channels of every branch, times the usual number, so that a search may place more of
            them than the usual network has; 2 at depth 50 or 101 is torchvision's wide_resnet50_2 or 101_2.
        classes: size of the output; None for 10 or 1000.
        image_size: pixels, one side or (height, width); None for 32 or 224.
        in_channels: channels of the input.
        gates: "channels", "layers", "both" or "none".
        granularity: channels a gate controls, one number or one for each group; "paper" for depth 50 and
            101: 16, 32, 64, 128 where a branch ends and half that inside (section 4.2).
        where: "hidden" channels of the branch, those of its "output" as well, or of both its "ends"; "stream": hidden
            ones and those that all branches and shortcuts of a group add to, so that the group becomes narrower.
        conditional: gates look at the input of their block.
        logits: learned for each gate, 1 or 2.
        memory: conditional gates of a block see each other's tentative decisions.
        lock: identical blocks of a group share their gates, and end as identical, smaller ones.
            Conditional gates on channels are decided by the first of these blocks.
        shortcut: where the shape changes, "projection" (1x1 convolution and batch norm) or "identity"
            (every other pixel, and zeros for new channels).
        task: "classification".

    Raises:
        ConfigError: an option is outside its range.

    Source: He et al., arXiv:1512.03385; gates as in `Gating`.
    """
    blocks = groups_of_blocks(depth)
    imagenet, bottleneck = depth in IMAGENET, depth in (50, 101)
    channels = channels if channels is not None else 64 if imagenet else 16
    classes = classes if classes is not None else 1000 if imagenet else 10
    image_size = image_size if image_size is not None else 224 if imagenet else 32
    at_least(1, channels=channels, classes=classes, in_channels=in_channels)
    positive(expansion=expansion)
    one_of("shortcut", shortcut, ("projection", "identity"))
    one_of("task", task, ("classification",))
    options = {name: value for name, value in locals().items() if name in resnet.__annotations__}
    gating = Gating(gates=gates, where=where, conditional=conditional, logits=logits, memory=memory, lock=lock)
    sizes = group_granularities(granularity, len(blocks), bottleneck=bottleneck)

    first, stream = stem(in_channels, channels, imagenet), Stream("stem", sizes[0][1])
    if gating.streams:
        first = GatedSequential(*first, gating.of_stream("output", channels, stream))
    edges = [Edge(start="x", end="stem", module=first, name="input", kind="input", fixed=True)]
    nodes = [Node(name="stem", position=(0, 0))]
    start, into = "stem", channels
    for group, count in enumerate(blocks):
        usual = channels * 2**group
        hidden, out = max(1, round(usual * expansion)), usual * (4 if bottleneck else 1)
        for block in range(count):
            end, stride = f"g{group}.{block}", 2 if group > 0 and block == 0 else 1
            alike = f"g{group}" if (into, stride) == (out, 1) else None
            before, stream = stream, stream if alike else Stream(f"g{group}", sizes[group][1])
            layers = branch((into, hidden, out), stride, bottleneck, gating, sizes[group], alike, (before, stream))
            edge = beside(start, end, (into, out), stride, shortcut)
            if gating.streams and edge.kind == "projection":
                at_ends = gating.of_stream("input", into, before), gating.of_stream("output", out, stream)
                edge = replace(edge, module=GatedSequential(at_ends[0], *edge.module.children(), at_ends[1]))
            edges += [edge, gating.edge(start, end, layers)]
            nodes.append(Node(name=end, activation=nn.ReLU(), position=(len(nodes), group)))
            start, into = end, out
    head = pooled_classifier(into, classes)
    if gating.streams:
        head = GatedSequential(gating.of_stream("input", into, stream), *head)
    edges.append(Edge(start=start, end="y", module=head, name="output", kind="output", fixed=True))
    return SuperNetwork(
        edges,
        input_shape=image_shape(in_channels, image_size),
        nodes=[*nodes, Node(name="y", position=(len(nodes), len(blocks) - 1))],
        name="resnet",
        options=options,
        pairs=logits == 2,
    )


def groups_of_blocks(depth: int) -> tuple[int, ...]:
    """Blocks in each group of a ResNet of that depth."""
    if isinstance(depth, int) and not isinstance(depth, bool):
        if depth in IMAGENET:
            return IMAGENET[depth]
        if depth >= 8 and depth % 6 == 2:
            return (depth // 6,) * 3
    known = ", ".join(str(known) for known in IMAGENET)
    raise ConfigError(f"depth must be 6n + 2 (8, 14, 20, ...) or one of {known}, got {depth!r}")


def group_granularities(given: Granularity, groups: int, *, bottleneck: bool) -> list[tuple[int, int]]:
    """Channels a gate controls in each group, inside a branch and at its ends."""
    if given == "paper" and bottleneck:
        return [(8 * 2**group, 16 * 2**group) for group in range(groups)]
    return [(size, size) for size in granularities(given, groups, "group", paper=bottleneck)]


def stem(in_channels: int, channels: int, imagenet: bool) -> nn.Sequential:
    """What stands before the first block: a 3x3 convolution, or a 7x7 one of stride 2 and a max-pool."""
    if not imagenet:
        return nn.Sequential(*conv_layers(in_channels, channels, activation=nn.ReLU()))
    layers = conv_layers(in_channels, channels, kernel=7, stride=2, activation=nn.ReLU())
    return nn.Sequential(*layers, nn.MaxPool2d(3, 2, padding=1))


def branch(
    widths: tuple[int, int, int],
    stride: int,
    bottleneck: bool,
    gating: Gating,
    granularity: tuple[int, int],
    alike: str | None,
    streams: tuple[Stream, Stream],
) -> list[nn.Module]:
    """The layers of a branch of `widths` (into, hidden, out), gates behind convolutions; `streams`: read, written."""
    into, hidden, out = widths
    inside, ends = granularity
    read, written = streams if gating.streams else (None, None)
    layers = gating.site("input", into, ends, alike=alike, stream=read)
    if bottleneck:
        layers += conv_layers(into, hidden, kernel=1, activation=nn.ReLU())
        layers += gating.site("hidden0", hidden, inside, alike=alike)
        layers += conv_layers(hidden, hidden, stride=stride, activation=nn.ReLU())
        layers += gating.site("hidden1", hidden, inside, alike=alike)
        layers += conv_layers(hidden, out, kernel=1)
    else:
        layers += conv_layers(into, hidden, stride=stride, activation=nn.ReLU())
        layers += gating.site("hidden0", hidden, inside, alike=alike)
        layers += conv_layers(hidden, out)
    return layers + gating.site("output", out, ends, alike=alike, stream=written)


def beside(start: str, end: str, widths: tuple[int, int], stride: int, shortcut: str) -> Edge:
    """The shortcut of a block, which is always kept; where it only moves values it takes no step."""
    into, out = widths
    module: nn.Module
    if (into, stride) == (out, 1):
        module, kind = nn.Identity(), "identity"
    elif shortcut == "identity":
        module, kind = padded_identity(into, out, stride=stride), "identity"
    else:
        module, kind = nn.Sequential(*conv_layers(into, out, kernel=1, stride=stride)), "projection"
    steps = 0 if kind == "identity" else 1
    return Edge(start=start, end=end, module=module, name=f"{end}.skip", kind=kind, fixed=True, steps=steps)
