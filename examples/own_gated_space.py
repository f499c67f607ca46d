"""Gates of one's own: groups of channels, and a layer, of a plain CNN for digits, at most half of its multiply-adds.

python examples/own_gated_space.py
"""

import torch
from torch import nn

import budgetnet as bn


def gated_cnn(
    *, channels: int = 16, classes: int = 10, in_channels: int = 1, image_size: int = 8, by_input: bool = False
) -> bn.SuperNetwork:
    """Four convolutions; with `by_input` it depends on the image what is closed."""

    def convolution(into: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(into, channels, 3, stride, padding=1, bias=False), nn.BatchNorm2d(channels)]

    def gated(into: int, stride: int = 1, always_open: int = 0) -> bn.GatedSequential:
        hidden = bn.ChannelGate(channels, granularity=4, always_open=always_open)  # groups of 4, between two layers
        return bn.GatedSequential(*convolution(into), nn.ReLU(), hidden, *convolution(channels, stride))

    head = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
    gate = bn.ConditionalGates if by_input else None
    return bn.SuperNetwork(
        [  # with nothing beside it the first edge stays, and one group inside it; the second may go as a whole
            bn.Edge(start="x", end="a", module=gated(in_channels, stride=2, always_open=1), fixed=True, gate=gate),
            bn.Edge(start="a", end="b", module=gated(channels), name="layer", gate=gate),
            bn.Edge(start="a", end="b", module=nn.Identity(), name="shortcut", fixed=True),
            bn.Edge(start="b", end="y", module=head, fixed=True),
        ],
        input_shape=(in_channels, image_size, image_size),
        name="gated_cnn",
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    found = bn.search(gated_cnn(), bn.data.load("digits"), ["macs<=50%"], bn.SearchOptions(epochs=12))
    print(found.result["test"], found.result["budgets"])
    print("wrote", bn.export(found.network(), found.run / "mine.onnx", torch.zeros(1, 1, 8, 8)))
