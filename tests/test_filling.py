"""Channels of zeros: the same outputs, round numbers of channels."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import budgetnet as bn
from budgetnet.errors import ConfigError
from budgetnet.export import load
from budgetnet.extraction import extract, fold_batch_norm
from budgetnet.filling import filled

SPACES = {
    "resnet": lambda: bn.spaces.resnet(depth=8, image_size=8),
    "bottlenecks": lambda: bn.spaces.resnet(depth=50, image_size=32, channels=16, classes=5),
    "mobilenet": lambda: bn.spaces.mobilenet_v2(image_size=32, classes=5, granularity=4),
}


def cut(name: str) -> nn.Module:
    """A network with any numbers of channels, its batch norms as after training."""
    torch.manual_seed(0)
    network = SPACES[name]().eval()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            for value, low in ((part.weight.data, 0.5), (part.bias.data, -1.0), (part.running_var, 0.5)):
                value.uniform_(low, 1.5)
    full = network.architecture("full")
    kept = (torch.rand(full.shape) < 0.6).float()
    edges = [column for column in network.gate_of[: len(network.graph.edges)] if column is not None]
    kept[:, edges] = 1
    return extract(network, kept).eval()


def dense_pairs(network: nn.Module) -> list[tuple[nn.Conv2d, nn.Conv2d]]:
    """Dense convolutions that follow each other in a row, but for depthwise ones and activations between."""
    found = []
    for row in network.modules():
        if isinstance(row, nn.Sequential):
            dense = [layer for layer in row if isinstance(layer, nn.Conv2d) and layer.groups == 1]
            found += pairwise(dense)
    return found


@pytest.mark.parametrize("name", SPACES)
def test_the_same_comes_out_of_round_numbers_of_channels(name: str, tmp_path):
    network = cut(name)
    before = fold_batch_norm(network)
    x = torch.randn(2, *(3, 8, 8) if name == "resnet" else (3, 32, 32))
    odd = [first.out_channels % 8 for first, _ in dense_pairs(before)]
    assert any(odd)
    round_ones = filled(network, 8)
    assert all(first.out_channels == second.in_channels for first, second in dense_pairs(round_ones))
    assert not any(first.out_channels % 8 for first, _ in dense_pairs(round_ones))
    with torch.no_grad():
        expected = network(x)
        torch.testing.assert_close(round_ones(x), expected, rtol=1e-4, atol=1e-4)
        for value in round_ones.parameters():
            assert value.isfinite().all()
    run = load(bn.export(round_ones, tmp_path / "a.onnx", x))
    torch.testing.assert_close(run(x), expected, rtol=1e-3, atol=1e-3)
    again = filled(round_ones, 8)
    assert [value.shape for value in again.parameters()] == [value.shape for value in round_ones.parameters()]


class Looks(nn.Module):
    """Reads between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.row = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Conv2d(5, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.row(x) + self.row[0](x).mean(dim=1, keepdim=True)


@pytest.mark.parametrize(
    "network",
    [
        Looks(),
        nn.Sequential(nn.Conv2d(3, 5, 1), nn.Sigmoid(), nn.Conv2d(5, 3, 1)),
        nn.Sequential(nn.Conv2d(3, 6, 1), nn.GroupNorm(2, 6), nn.Conv2d(6, 3, 1)),
        nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1, groups=2), nn.Conv2d(6, 3, 1)),
        nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Flatten(), nn.Linear(80, 3)),
    ],
    ids=["read between", "no zeros", "mixed", "grouped", "linear"],
)
def test_what_could_change_the_outputs_stays(network: nn.Module):
    before, after = ([value.shape for value in one.parameters()] for one in (network, filled(network, 8)))
    assert before == after


def test_a_block_is_a_number_of_channels():
    with pytest.raises(ConfigError, match="block must be a whole number >= 1, got 0"):
        filled(nn.Sequential(), 0)
