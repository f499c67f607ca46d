"""A DenseNet that may answer early: an exit behind each dense block but the last (Herrmann et al., section 5)."""

from __future__ import annotations

from functools import partial

from torch import nn

from budgetnet.blocks import conv_layers, dense_block, exit_classifier, pooled_classifier, transition
from budgetnet.checks import Size, at_least, image_shape, one_of
from budgetnet.errors import ConfigError
from budgetnet.sites import AnswerGate, FeatureGate
from budgetnet.supernet import Edge, Node, SuperNetwork

BLOCKS = 3
"""Dense blocks, each at half the size of the one before."""


def densenet_exits(
    *,
    depth: int = 40,
    growth: int = 12,
    classes: int = 10,
    image_size: Size = 32,
    in_channels: int = 3,
    reduction: float = 0.5,
    bottleneck: bool = True,
    exit_channels: int = 128,
    exit_pool: int = 1,
    conditional: bool = True,
    exit_gates: str = "answer",
    task: str = "classification",
) -> SuperNetwork:
    """A DenseNet for CIFAR with two early exits.

    Three dense blocks, each an edge, with transitions between them. At the end of the first two a gate decides whether
    an example is classified there or goes on. The architectures "exit1", "exit2" and "full" are the three ways through.

    Args:
        depth: layers on the longest way: 6n + 4 for n layers of two convolutions a block, without bottlenecks 3n + 4.
        growth: channels that a layer adds.
        classes: size of the output.
        image_size: pixels, one side or (height, width), divisible by 4.
        in_channels: channels of the input.
        reduction: share of the channels that a transition keeps, in (0, 1]; DenseNet-BC has 0.5, DenseNet 1.
        bottleneck: a 1x1 convolution to `4 growth` channels before each 3x3 one.
        exit_channels: of the convolutions in the exits' classifiers and gates; the papers' 128.
        exit_pool: side of the squares that an exit's classifier and gate average their features over first, at most
            half of the image's side; 1 as in the paper, where exits take more MACs than a small network saves.
        conditional: the exits' gates look at each example; False for gates that do not, of which one exit
            or none remains.
        exit_gates: what those that do look at: "answer", how sure the exit's classifier is, which answers first; or
            "features", two convolutions beside it, as in the paper.
        task: "classification".

    Raises:
        ConfigError: an option is outside its range.

    Source: Huang et al., arXiv:1608.06993 (the network), arXiv:1703.09844 (the exits' classifiers); Herrmann et al.,
    sections 5 and S1.5. The paper's 95.49 % is that of depth 100, growth 12 with bottlenecks.
    """
    options = dict(locals())
    at_least(1, growth=growth, classes=classes, in_channels=in_channels)
    at_least(1, exit_channels=exit_channels, exit_pool=exit_pool)
    shape = image_shape(in_channels, image_size, divisor=2 ** (BLOCKS - 1))
    if 2 * exit_pool > min(shape[1:]):
        raise ConfigError(f"exit_pool must be at most half of the image's side {min(shape[1:])}, got {exit_pool}")
    one_of("task", task, ("classification",))
    one_of("exit_gates", exit_gates, ("answer", "features"))
    answers = conditional and exit_gates == "answer"
    gate = AnswerGate if answers else partial(FeatureGate, hidden=exit_channels, pool=exit_pool)
    if isinstance(reduction, bool) or not isinstance(reduction, int | float) or not 0 < reduction <= 1:
        raise ConfigError(f"reduction must be a number in (0, 1], got {reduction!r}")
    step = BLOCKS * (2 if bottleneck else 1)
    if not isinstance(depth, int) or isinstance(depth, bool) or depth < step + 4 or (depth - 4) % step:
        kind = "with" if bottleneck else "without"
        raise ConfigError(f"depth must be {step}n + 4 {kind} bottlenecks, n >= 1, got {depth!r}")
    layers = (depth - 4) // step

    channels = 2 * growth if bottleneck else 16
    stem = nn.Sequential(*conv_layers(in_channels, channels)[:1])  # the dense layers start with a batch norm
    edges = [Edge(start="x", end="stem", module=stem, name="input", kind="input", fixed=True)]
    nodes = [Node(name="stem", position=(0, 0))]
    start = "stem"
    for block in range(BLOCKS):
        end = f"d{block}"
        module = dense_block(channels, layers, growth, bottleneck=bottleneck)
        edges.append(Edge(start=start, end=end, module=module, name=f"{end}.block", kind="block", fixed=True))
        nodes.append(Node(name=end, position=(len(nodes), block)))
        channels += layers * growth
        if block == BLOCKS - 1:
            break
        start, kept = f"t{block}", int(reduction * channels)
        if kept < 1:
            raise ConfigError(f"reduction must leave channels of {channels}, got {reduction!r}")
        edges += [
            Edge(
                start=end,
                end="y",
                module=exit_classifier(channels, classes, hidden=exit_channels, pool=exit_pool),
                name=f"{end}.exit",
                kind="exit",
                gate=gate if conditional else None,
                exit=True,
                answers=answers,
            ),
            Edge(
                start=end,
                end=start,
                module=transition(channels, kept),
                name=f"{start}.transition",
                kind="transition",
                fixed=True,
            ),
        ]
        nodes.append(Node(name=start, position=(len(nodes), block)))
        channels = kept
    head = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), *pooled_classifier(channels, classes).children())
    edges.append(Edge(start=end, end="y", module=head, name="output", kind="output", fixed=True))
    return SuperNetwork(
        edges,
        input_shape=shape,
        nodes=[*nodes, Node(name="y", position=(len(nodes), BLOCKS - 1), steps=0)],
        name="densenet_exits",
        options=options,
        architectures={"exit1": ["d0.exit"], "exit2": ["d1.exit"]},
    )
