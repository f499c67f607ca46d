"""One paper's estimator on the other's gates, and all kinds of gates under several budgets, searched to the end.

What is useful and what is not is planted: useless modules and channels give zeros and never learn anything else.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import budgetnet as bn
from budgetnet.blocks import conv_layers
from budgetnet.delivery import Found
from budgetnet.extraction import count
from budgetnet.gated import ChannelGate, GatedSequential
from budgetnet.sites import Fixed

pytestmark = pytest.mark.usefixtures("no_files")


def search(space: bn.SuperNetwork, budgets: list[str], estimator: str, start: float, out: Path) -> Found:
    """Eight epochs of 512 images: two of warm-up, five of search, one of fine-tuning."""
    options = {"epochs": 8, "warmup": 0.25, "finetune": 0.13, "batch_size": 64, "gate_start": start, "gate_rate": 0.2}
    options |= {"candidates": 2, "recalibration": 2, "validate_every": 8, "precision": "float32", "device": "cpu"}
    digits = bn.data.load("digits").subset(512, seed=0)
    return bn.search(space, digits, budgets, bn.SearchOptions(estimator=estimator, **options), out=out)


def kill(module: nn.Module, first: int = 0) -> nn.Module:
    """Channels from the first on are 0 behind the batch norm, and so behind the ReLU, where no gradient comes from."""
    norm = next(part for part in module.modules() if isinstance(part, nn.BatchNorm2d))
    with torch.no_grad():
        norm.weight[first:] = 0
        norm.bias[first:] = 0
    return module


def assert_found(found: Found, start: float, useful: list[str], useless: list[str]) -> None:
    """Every budget kept as counted on the network itself, which predicts what the super network does; gates as planted.

    Args:
        found: by a search.
        start: logit of every gate when sampling began.
        useful: units whose gates have become more probable, and are kept.
        useless: units whose gates have become less probable, and are not kept.
    """
    x = torch.randn(16, *found.supernet.input_shape, generator=torch.Generator().manual_seed(0))
    counted = count(found.plain, x[:1])
    assert all(counted[entry["cost"]] == entry["value"] <= entry["limit"] for entry in found.result["budgets"])
    with torch.no_grad():
        output, _ = found.supernet(x, Fixed(found.architecture))
        torch.testing.assert_close(found.network()(x), output, rtol=1e-4, atol=1e-5)
    assert found.result["equivalence"]["extracted"] < 1e-4
    assert output.std(dim=0).min() > 0
    moved = found.supernet.logits() - start
    assert (gates(found, useful, moved) > 0.2).all()
    assert (gates(found, useless, moved) < -0.2).all()
    assert gates(found, useful, found.architecture[0]).all()
    assert not gates(found, useless, found.architecture[0]).any()


def gates(found: Found, units: list[str], values: Tensor) -> Tensor:
    """The values of these units' gates."""
    names = found.supernet.unit_names()
    return values[[found.supernet.gate_of[names.index(unit)] for unit in units]]


def test_the_score_function_learns_which_channels_to_keep(tmp_path):
    """REINFORCE on the gates of the second paper: half of each block's channels are useless."""
    torch.manual_seed(0)
    space = bn.spaces.resnet(depth=8, channels=8, image_size=8, in_channels=1, granularity=[4, 8, 16])
    for module in space.modules_on_edges:
        if isinstance(module, GatedSequential):
            kill(module, module.sites[0].channels // 2)
    found = search(space, ["macs<=60%"], "score", 0.0, tmp_path / "run")
    useful, useless = ([f"g{group}.0.block.hidden0[{half}]" for group in range(3)] for half in (0, 1))
    assert_found(found, 0.0, useful, useless)


def test_gumbel_learns_which_edges_of_a_fabric_to_keep(tmp_path):
    """Straight-through gradients on the first paper's edges: of three ways to the last layer one gives zeros."""
    torch.manual_seed(0)
    space = bn.spaces.conv_fabric(width=2, depth=2, channels=8, image_size=8, in_channels=1)
    useless = ["l0.s0>l0.s1", "l0.s1>l1.s0", "l0.s1>l1.s1"]
    for name, module in zip(space.edge_names, space.modules_on_edges, strict=True):
        if name in useless:  # no ReLU follows in the module: what is 0 is kept so
            for value in kill(module).requires_grad_(False).parameters():
                value.zero_()
    found = search(space, ["macs<=55%"], "gumbel", 2.0, tmp_path / "run")
    assert_found(found, 2.0, ["l0.s0>l1.s1", "l1.s0>l1.s1"], useless)


def layers(into: int, out: int, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(*conv_layers(into, out, kernel=kernel, activation=nn.ReLU()))


def planted() -> bn.SuperNetwork:
    """One edge sees the upper half of an image, and one layer the lower half: both are of use.

    Of the edges beside them, the layer's channels and a layer behind, which has many parameters and few MACs, none is.
    """
    halves = [nn.Sequential(nn.ZeroPad2d((0, 0, *cut)), *layers(1, 8)) for cut in ((0, -4), (-4, 0))]
    dear = nn.Sequential(*kill(layers(8, 8)), nn.Conv2d(8, 8, 3, padding=1, bias=False))
    layer = GatedSequential(*kill(layers(8, 8), 4), ChannelGate(8, 4), *conv_layers(8, 8, kernel=1))
    wide = nn.Sequential(nn.Linear(64, 24), nn.ReLU(), nn.Linear(24, 64, bias=False))
    for value in wide[0].parameters():
        nn.init.zeros_(value)
    edges = [
        bn.Edge(start="x", end="upper", module=halves[0], fixed=True),
        bn.Edge(start="x", end="lower", module=halves[1], fixed=True),
        bn.Edge(start="upper", end="sum", module=nn.Sequential(*conv_layers(8, 8)), name="useful"),
        bn.Edge(start="upper", end="sum", module=dear, name="useless"),
        bn.Edge(start="lower", end="sum", module=kill(layers(8, 8, kernel=1)), name="shortcut", fixed=True),
        bn.Edge(start="lower", end="sum", module=layer, name="layer"),
        bn.Edge(start="sum", end="pool", module=nn.Sequential(nn.AdaptiveAvgPool2d((2, 4)), nn.Flatten()), fixed=True),
        bn.Edge(start="pool", end="end", module=nn.Identity(), name="past", fixed=True),
        bn.Edge(start="pool", end="end", module=wide, name="wide"),
        bn.Edge(start="end", end="y", module=nn.Linear(64, 10), fixed=True),
    ]
    return bn.SuperNetwork(edges, input_shape=(1, 8, 8), nodes=[bn.Node(name="sum", activation=nn.ReLU())])


@pytest.mark.parametrize("estimator", ["score", "gumbel"])
def test_edges_layers_and_channels_are_learned_together_under_two_budgets(estimator, tmp_path):
    """The wide layer takes 4 % of the MACs and half of the parameters: it is the second budget that closes it."""
    torch.manual_seed(0)
    found = search(planted(), ["macs<=48%", "params<=33%"], estimator, 0.0, tmp_path / "run")
    assert_found(found, 0.0, ["useful", "layer", "layer.hidden[0]"], ["useless", "layer.hidden[1]", "wide"])
