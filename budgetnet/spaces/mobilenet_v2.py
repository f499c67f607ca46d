"""MobileNetV2 with gates on its inverted residuals (Herrmann et al., sections 3.4 and 4.2)."""

from __future__ import annotations

from torch import nn

from budgetnet.blocks import conv_layers, pooled_classifier
from budgetnet.checks import Size, at_least, image_shape, one_of, positive
from budgetnet.gated import GatedSequential
from budgetnet.spaces.gating import Gating, Granularity, Stream, granularities
from budgetnet.supernet import Edge, Node, SuperNetwork

STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Of each stage the expansion t, channels c, blocks n and stride s of the first (Sandler et al., Table 2)."""

PAPER: tuple[tuple[int, int, int], ...] = (
    (8, 16, 8),
    (8, 24, 8),
    (8, 24, 16),
    (8, 32, 16),
    (16, 48, 32),
    (16, 64, 32),
    (32, 64, 64),
)
"""Of each stage the channels a gate controls at g_inp, g_exp and g_out (Herrmann et al., section 4.2)."""


def mobilenet_v2(
    *,
    width: float = 1.0,
    classes: int = 1000,
    image_size: Size | None = None,
    in_channels: int = 3,
    strides: str = "imagenet",
    gates: str = "channels",
    granularity: Granularity = "paper",
    where: str = "ends",
    always_open: int = 1,
    conditional: bool = False,
    logits: int = 1,
    memory: bool = False,
    lock: bool = False,
    task: str = "classification",
) -> SuperNetwork:
    """MobileNetV2 whose inverted residuals can be closed or slimmed.

    A block is an edge: 1x1 convolution to t times the channels, 3x3 depthwise convolution, 1x1 convolution, each with
    batch norm, the first two with ReLU6; where stride and channels allow it an identity stands beside it. The sites are
    "input" (g_inp) before it, "expanded" (g_exp) behind the depthwise convolution, so that a closed channel is neither
    expanded nor filtered nor read, and "output" (g_out) behind it. In blocks without a shortcut the
    first groups of each site have no gates and are always open, and the block itself is no choice (section 4.2). The
    first block expands nothing, so that its input channels are its expanded ones: it has no site "input".

    Args:
        width: multiplier of all channels, rounded to multiples of 8; > 0.
        classes: size of the output.
        image_size: pixels, one side or (height, width); None for 224, or 32 with the strides "cifar".
        in_channels: channels of the input.
        strides: "imagenet", 32 in all; "cifar", 8 in all: the first convolution and the second stage keep the size.
        gates: "channels", "layers", "both" or "none".
        granularity: channels a gate controls, one number or one for each of the seven stages; "paper": `PAPER`.
        where: the "hidden" (expanded) channels, those of the block's "output" as well, or of both its "ends"; "stream":
            hidden ones and those that all blocks of a stage add to, so that the stage becomes narrower.
        always_open: groups of each site that are always open in blocks without a shortcut, at least the papers' 1.
        conditional: gates look at the input of their block.
        logits: learned for each gate, 1 or 2.
        memory: conditional gates of a block see each other's tentative decisions.
        lock: identical blocks of a stage, all but its first, share their gates, and end as identical, smaller ones.
            Conditional gates on channels are decided by the first of these blocks.
        task: "classification".

    Raises:
        ConfigError: an option is outside its range.
        GraphError: a site has fewer groups than are to stay open.

    Source: Sandler et al., arXiv:1801.04381; gates as in `Gating`. Differs: no dropout before the classifier.
    """
    one_of("strides", strides, ("imagenet", "cifar"))
    one_of("task", task, ("classification",))
    at_least(1, classes=classes, in_channels=in_channels)
    positive(width=width)
    small = strides == "cifar"
    image_size = image_size if image_size is not None else 32 if small else 224
    options = {name: value for name, value in locals().items() if name in mobilenet_v2.__annotations__}
    gating = Gating(
        gates=gates,
        where=where,
        conditional=conditional,
        logits=logits,
        memory=memory,
        lock=lock,
        always_open=always_open,
    )
    sizes = PAPER
    if granularity != "paper":
        sizes = tuple((size, size, size) for size in granularities(granularity, len(STAGES), "stage", paper=True))

    into = rounded(32 * width)
    first = nn.Sequential(*conv_layers(in_channels, into, stride=1 if small else 2, activation=nn.ReLU6()))
    edges = [Edge(start="x", end="stem", module=first, name="input", kind="input", fixed=True)]
    nodes = [Node(name="stem", position=(0, 0))]
    independent_ends = gating.channels and where == "ends" and not conditional
    start, stream = "stem", Stream("stem", sizes[0][2])
    for stage, (expansion, channels, blocks, stage_stride) in enumerate(STAGES):
        out = rounded(channels * width)
        for block in range(blocks):
            end = f"s{stage}.{block}"
            stride = stage_stride if block == 0 and not (small and stage == 1) else 1
            shortcut = (into, stride) == (out, 1)
            alike = f"s{stage}" if shortcut else None
            before, stream = stream, stream if shortcut else Stream(f"s{stage}", sizes[stage][2])
            # what the convolution behind all blocks reads is a stream of one writer
            behind = stream if gating.streams or (independent_ends and stage == len(STAGES) - 1) else None
            at_ends = before if gating.streams else None, behind
            layers = inverted_residual((into, out), expansion, stride, gating, sizes[stage], alike, at_ends)
            if shortcut:
                edges.append(
                    Edge(start=start, end=end, module=nn.Identity(), name=f"{end}.skip", kind="identity", fixed=True)
                )
            edges.append(gating.edge(start, end, layers, shortcut=shortcut))
            nodes.append(Node(name=end, position=(len(nodes), stage)))
            start, into = end, out
    top = rounded(1280 * max(1.0, width))
    last = nn.Sequential(*conv_layers(into, top, kernel=1, activation=nn.ReLU6()))
    if gating.streams or independent_ends:
        last = GatedSequential(gating.of_stream("input", into, stream), *last)
    edges += [
        Edge(start=start, end="last", module=last, name="last", kind="block", fixed=True),
        Edge(start="last", end="y", module=pooled_classifier(top, classes), name="output", kind="output", fixed=True),
    ]
    nodes += [
        Node(name=name, position=(len(nodes) + place, len(STAGES) - 1)) for place, name in enumerate(("last", "y"))
    ]
    return SuperNetwork(
        edges,
        input_shape=image_shape(in_channels, image_size),
        nodes=nodes,
        name="mobilenet_v2",
        options=options,
        pairs=logits == 2,
    )


def inverted_residual(
    widths: tuple[int, int],
    expansion: int,
    stride: int,
    gating: Gating,
    granularity: tuple[int, ...],
    alike: str | None,
    streams: tuple[Stream | None, Stream | None],
) -> list[nn.Module]:
    """The layers of a block of `widths` (into, out), with its gates.

    `alike` as in `Gating.site`, None where there is no shortcut; `streams`: that it reads and writes, None where its
    gates are its own.
    """
    into, out = widths
    hidden = into * expansion
    shortcut = alike is not None
    at_input, at_expanded, at_output = granularity
    layers: list[nn.Module] = []
    if expansion > 1:
        layers += gating.site("input", into, at_input, shortcut=shortcut, alike=alike, stream=streams[0])
        layers += conv_layers(into, hidden, kernel=1, activation=nn.ReLU6())
    layers += conv_layers(hidden, hidden, stride=stride, groups=hidden, activation=nn.ReLU6())
    layers += gating.site("expanded", hidden, at_expanded, shortcut=shortcut, alike=alike)
    layers += conv_layers(hidden, out, kernel=1)
    return layers + gating.site("output", out, at_output, shortcut=shortcut, alike=alike, stream=streams[1])


def rounded(channels: float) -> int:
    """The nearest multiple of 8 that is at least 8, or the next one where that were below 90 %."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest
