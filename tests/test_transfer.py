"""What a device sends is the least of all cuts of the extracted network that it can afford."""

from __future__ import annotations

import json
from math import prod
from operator import add
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import connected, every, network_on, random_graph
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from budgetnet import Budget, Edge, Node, SuperNetwork
from budgetnet.architectures import describe
from budgetnet.budgets import check_reachable, cost_name, parse_cost
from budgetnet.costs import MACs, Transfer
from budgetnet.errors import ConfigError, UnreachableBudget
from budgetnet.extraction import extract
from budgetnet.report.architecture import Architecture
from budgetnet.report.network import draw
from budgetnet.report.plans import read_cuts
from budgetnet.report.records import Record
from budgetnet.spaces import conv_fabric, densenet_exits, mobilenet_v2, resnet, resnet_fabric

SPACES = {
    "resnet_fabric": resnet_fabric(width=2, channels=4, classes=5, image_size=8),
    "conv_fabric": conv_fabric(width=3, depth=3, channels=4, classes=5, image_size=8),
    "segmentation": conv_fabric(width=2, depth=3, channels=3, classes=2, image_size=(4, 12), task="segmentation"),
    "channels": resnet(depth=8, channels=6, image_size=8, gates="both", granularity=4),
    "mobilenet_v2": mobilenet_v2(width=0.25, image_size=16, strides="cifar", classes=4, where="hidden"),
    "densenet_exits": densenet_exits(depth=10, growth=4, conditional=False, exit_channels=8, image_size=16),
}
SEEDS = st.integers(0, 2**16)


class Counting(fx.Interpreter):
    """Runs a network one operator after the other and notes the multiply-adds of each."""

    def run_node(self, n: fx.Node) -> Any:
        with FlopCounterMode(display=False) as counter:
            result = super().run_node(n)
        self.macs[n] = int(counter.get_total_flops()) // 2
        if n.target is add:
            self.macs[n] += prod(result.shape[1:])
        self.value[n] = result
        return result

    macs: dict[fx.Node, int]
    value: dict[fx.Node, Tensor]


def every_cut(network: SuperNetwork, kept: Tensor) -> list[tuple[int, int]]:
    """Bytes and the device's multiply-adds of each cut of the extracted network's graph."""
    plain = extract(network, kept).eval()
    run = Counting(plain)
    run.macs, run.value = {}, {}
    with torch.no_grad():
        run.run(torch.zeros(1, *network.input_shape))
    nodes = list(plain.graph.nodes)
    cuts = []
    for place in range(1, len(nodes)):
        sent = {source for node in nodes[place:] for source in node.all_input_nodes} & set(nodes[:place])
        cuts.append((sum(4 * run.value[node].numel() for node in sent), sum(run.macs[node] for node in nodes[:place])))
    return cuts


def least(cuts: list[tuple[int, int]], device: float) -> int:
    return min(size for size, macs in cuts if macs <= device)


@settings(max_examples=3, deadline=None)
@pytest.mark.parametrize("network", SPACES.values(), ids=SPACES)
@given(SEEDS)
def test_what_is_sent_is_the_least_of_all_cuts(network: SuperNetwork, seed: int):
    """At numbers of MACs at which another cut comes within reach, and just below them."""
    ways = [network.architecture(name) for name in network.architecture_names]
    kept = torch.cat([connected(network, 2, seed, 0.85), *ways])
    used, cuts = network.used(kept), [every_cut(network, row[None]) for row in kept]
    model = Transfer().bind(network)
    limits = sorted({macs for row in cuts for _, macs in row})
    for limit in {0, limits[-1], *Random(seed).sample(limits, min(12, len(limits)))}:
        for model.affords in (limit - 1, limit):
            if model.affords >= 0:
                assert model(used).tolist() == [least(row, model.affords) for row in cuts]


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(2, 6), st.integers(0, 5))
def test_what_is_sent_of_own_networks(seed: int, nodes: int, extra: int):
    """Identities hand values on, which are sent once."""
    network = network_on(random_graph(seed, nodes, extra), seed=seed)
    kept = torch.cat([connected(network, 3, seed), network.architecture("full")])
    used, cuts = network.used(kept), [every_cut(network, row[None]) for row in kept]
    model = Transfer().bind(network)
    for model.affords in (0, *Random(seed).sample(range(2000), 4), 10**6):
        assert model(used).tolist() == [least(row, model.affords) for row in cuts]


def narrowing() -> SuperNetwork:
    """x of 4 pixels and 2 channels to a of 6 channels, b of 1, y of 3; and from x to b directly."""
    edges = [
        Edge(start="x", end="a", module=nn.Conv2d(2, 6, 1), name="xa"),
        Edge(start="a", end="b", module=nn.Conv2d(6, 1, 1), name="ab"),
        Edge(start="x", end="b", module=nn.Conv2d(2, 1, 1), name="xb"),
        Edge(start="b", end="y", module=nn.Conv2d(1, 3, 1), name="by"),
    ]
    return SuperNetwork(edges, input_shape=(2, 2, 2), nodes=[Node(name="b", activation=nn.ReLU())])


@pytest.mark.parametrize(
    ("device", "size", "macs", "edges", "sent"),
    [
        (0, 32, 0, [], ["x"]),  # the input
        (79, 32, 0, [], ["x"]),  # both, a and x: 128 bytes; x and the sum that has begun: 48
        (80, 32, 0, [], ["x"]),
        (84, 16, 84, ["xa", "ab", "xb"], ["b"]),  # two convolutions, another and a sum
        (96, 16, 84, ["xa", "ab", "xb"], ["b"]),  # the output alone is larger
    ],
)
def test_a_cut_by_hand(device: int, size: int, macs: int, edges: list[str], sent: list[str]):
    network = narrowing()
    model, used = Transfer(str(device)).bind(network), torch.ones(1, 4)
    assert MACs().bind(network)(used).item() == 4 * (12 + 6 + 2 + 3) + 4 == 96
    assert model(used).item() == size
    cut = model.cut(used)
    assert (cut.size, cut.macs, cut.device, cut.sent) == (size, macs, edges, sent)


def test_all_of_a_network_fits_on_a_device_that_affords_it():
    """Then only the output is sent, 5 numbers."""
    network = SPACES["conv_fabric"]
    used = network.used(network.architecture("full"))
    whole = float(MACs().bind(network)(used))
    model = Transfer(f"{whole:.0f}").bind(network)
    assert model(used).item() == 4 * 5
    cut = model.cut(used)
    assert (cut.sent, len(cut.device)) == (["y"], len(network.graph.edges))
    assert Transfer(f"{whole - 1:.0f}").bind(network)(used).item() > 4 * 5


@pytest.mark.parametrize("network", SPACES.values(), ids=SPACES)
def test_costs_of_many_architectures_are_the_costs_of_each(network: SuperNetwork, monkeypatch):
    used = network.used(connected(network, 7, seed=2, probability=0.8))
    model = Transfer("20K").bind(network)
    together = model(used)
    assert together.dtype == torch.float64
    assert together.tolist() == [float(model(row[None])) for row in used] == [model.cut(row[None]).size for row in used]
    assert torch.equal(model(used.bool()), together)
    monkeypatch.setattr("budgetnet.costs.transfer.CHUNK", 3)
    assert torch.equal(model(used), together)
    assert model(torch.zeros(1, network.units)).tolist() == [0]


TINY = {
    "conv": conv_fabric(width=2, depth=3, channels=3, classes=2, image_size=8),
    "resnet": resnet_fabric(width=1, channels=3, classes=2, image_size=8),
}


@pytest.mark.parametrize("device", ["0", "1K", "2K", "8K", "1M"])
@pytest.mark.parametrize("network", TINY.values(), ids=TINY)
def test_the_smallest_is_the_smallest_of_all_architectures(network: SuperNetwork, device: str):
    bound = Budget(Transfer(device), at_most=1e9).bind(network)
    used = network.used(every(network.gate_count))
    found = float(bound.model(network.used(bound.cheapest(network))))
    assert found == float(bound.model(used)[network.connects(used)].min())


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(2, 5), st.integers(0, 3), st.integers(0, 1500))
def test_the_smallest_of_own_networks_is_the_smallest(seed: int, nodes: int, extra: int, device: int):
    network = network_on(random_graph(seed, nodes, extra), seed=seed)
    bound = Budget(Transfer(str(device)), at_most=1e9).bind(network)
    used = network.used(every(network.gate_count))
    found = float(bound.model(network.used(bound.cheapest(network))))
    assert found == float(bound.model(used)[network.connects(used)].min())


def test_a_limit_out_of_reach_says_where_the_cut_is():
    network = TINY["conv"]
    message = r"transfer:0 must be at most 100 bytes, but .* takes 768: the device sends x after 0 of 0 MAC"
    with pytest.raises(UnreachableBudget, match=message):
        check_reachable(network, [Budget(Transfer("0"), at_most=100).bind(network)])
    [row] = check_reachable(network, [Budget(Transfer("1M"), at_most="8B").bind(network)])
    assert (row["smallest"], row["unit"]) == (8, "B")


def test_the_drawing_marks_the_cut():
    """From the file alone: pale lines for the modules behind the cut, a ring around the values that are sent."""
    network = narrowing()
    for device, cloud, ringed in (("0", 4, ["x"]), ("90", 1, ["b"])):
        budgets = [Budget(Transfer(device), at_most=100).bind(network)]
        content = json.loads(json.dumps(describe(network, torch.ones(1, 4), budgets)))
        record = Record(content, "architecture.json")
        [cut] = read_cuts(record)
        assert (cut.cost, list(cut.sent)) == (f"transfer:{device}", ringed)
        drawing = draw(Architecture.read(record), cut.device, cut.sent)
        assert drawing.cut
        assert sum(line.cloud for line in drawing.lines) == cloud
        assert [dot.title.split("\n")[0] for dot in drawing.dots if dot.sent] == ringed
    whole = draw(Architecture.read(record))
    assert not whole.cut
    assert not any([*(line.cloud for line in whole.lines), *(dot.sent for dot in whole.dots)])


def test_transfer_is_asked_for_by_name():
    assert parse_cost("transfer:2.5M") == Transfer("2.5M")
    assert parse_cost("transfer[device=300K]") == Transfer("300K")
    assert cost_name(Transfer("300K")) == "transfer:300K"
    assert cost_name(Transfer()) == "transfer"
    assert [Transfer(text).affords for text in ("10M", "1.5G", "2e3", "0", "7")] == [1e7, 1.5e9, 2e3, 0, 7]


@pytest.mark.parametrize("device", ["-1", "many", "5T", "inf", "nan", "", "1e999"])
def test_devices_that_are_none(device: str):
    with pytest.raises(ConfigError, match="device must be a number of MACs >= 0, with K, M or G behind it, got "):
        Transfer(device)


def test_gates_that_look_at_the_input_are_refused():
    network = densenet_exits(depth=10, growth=4, exit_channels=8)
    with pytest.raises(ConfigError, match="transfer cannot be a cost where gates look at the input, as those of dense"):
        Transfer().bind(network)
