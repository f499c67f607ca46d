"""A search space of one's own: a DAG of modules in a few lines.

budgetnet search --data digits --space examples/own_space.py:two_branches --budget 'params<=60%'
"""

from torch import nn

import budgetnet as bn
from budgetnet.blocks import conv_bn, pooled_classifier


def two_branches(
    *, channels: int = 16, classes: int = 10, in_channels: int = 1, image_size: int = 8
) -> bn.SuperNetwork:
    """Three kinds of layer between the same two nodes, twice; the search keeps what pays."""

    def layers(start: str, end: str) -> list[bn.Edge]:
        depthwise = nn.Sequential(
            nn.Conv2d(channels, channels, 5, padding=2, groups=channels), nn.Conv2d(channels, channels, 1)
        )
        return [
            bn.Edge(start=start, end=end, name=f"{end}.conv", module=conv_bn(channels, channels)),
            bn.Edge(start=start, end=end, name=f"{end}.depthwise", module=depthwise),
            bn.Edge(start=start, end=end, name=f"{end}.skip", module=nn.Identity()),
        ]

    return bn.SuperNetwork(
        [
            bn.Edge(start="x", end="a", module=conv_bn(in_channels, channels, stride=2, relu=True), fixed=True),
            *layers("a", "b"),
            *layers("b", "c"),
            bn.Edge(start="a", end="c", name="long skip", module=nn.Identity()),
            bn.Edge(start="c", end="y", module=pooled_classifier(channels, classes), fixed=True),
        ],
        input_shape=(in_channels, image_size, image_size),
        nodes=[bn.Node(name=name, activation=nn.ReLU()) for name in "bc"],
        name="two_branches",
        options={"channels": channels, "classes": classes, "in_channels": in_channels, "image_size": image_size},
    )
