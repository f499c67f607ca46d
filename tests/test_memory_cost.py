"""Memory is what the extracted network takes: its state's bytes, and the values that are alive while it runs."""

from __future__ import annotations

import weakref
from copy import deepcopy
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import connected, every, network_on, random_graph, stir
from test_gated import gated_network
from torch import Tensor, fx, nn
from torch.autograd import grad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from budgetnet import Budget, Edge, Node, SearchOptions, SuperNetwork, search
from budgetnet.budgets import check_reachable, cost_name, parse_cost
from budgetnet.costs import Memory
from budgetnet.costs.footprints import peak_activations
from budgetnet.costs.measured import MeasuredModel
from budgetnet.costs.memory import MemoryCost
from budgetnet.data import load
from budgetnet.errors import ConfigError, UnreachableBudget
from budgetnet.export import FORMATS, export
from budgetnet.extraction import extract, fold_batch_norm, state_bytes
from budgetnet.gated import ChannelGate, GatedSequential
from budgetnet.graph import Graph
from budgetnet.measure import measure_file, measure_network
from budgetnet.spaces import conv_fabric, densenet_exits, mobilenet_v2, resnet, resnet_fabric

KINDS = ("params", "activations", "total")
SPACES = {
    "resnet_fabric": resnet_fabric(width=2, channels=4, classes=5, image_size=8),
    "conv_fabric": conv_fabric(width=3, depth=3, channels=4, classes=5, image_size=8),
    "segmentation": conv_fabric(width=2, depth=3, channels=3, classes=2, image_size=(4, 12), task="segmentation"),
    "channels": resnet(depth=8, channels=6, image_size=8, granularity=4),
    "layers": resnet(depth=14, channels=4, image_size=8, gates="layers"),
    "ends": resnet(depth=8, channels=4, image_size=8, gates="both", where="ends", shortcut="identity"),
    "bottlenecks": resnet(depth=50, channels=2, image_size=32, classes=3, granularity=3, where="ends"),
    "mobilenet_v2": mobilenet_v2(width=0.25, image_size=16, strides="cifar", classes=4),
    "expanded": mobilenet_v2(width=0.25, image_size=16, strides="cifar", granularity=2, where="hidden"),
    "densenet_exits": densenet_exits(depth=10, growth=4, conditional=False, exit_channels=8, image_size=16),
}
SEEDS = st.integers(0, 2**16)


def counted(network: SuperNetwork, kept: Tensor) -> list[tuple[int, int]]:
    """On the extracted networks: the bytes of their state, and those of values alive by a walk over their graphs."""
    found = []
    for row in kept:
        plain = fold_batch_norm(extract(network, row[None])).float()
        params = sum(value.numel() * value.element_size() for value in plain.state_dict().values())
        found.append((params, peak_activations(plain, torch.zeros(1, *network.input_shape))))
    return found


def modelled(network: SuperNetwork, kept: Tensor) -> list[tuple[float, float]]:
    used = network.used(kept)
    return list(zip(*[bound(network, of)(used).tolist() for of in KINDS[:2]], strict=True))


@cache
def bound(network: SuperNetwork, of: str) -> MemoryCost:
    return Memory(of).bind(network)


@settings(max_examples=3, deadline=None)
@pytest.mark.parametrize("network", SPACES.values(), ids=SPACES)
@given(SEEDS, st.floats(0.5, 0.95))
def test_memory_is_that_of_the_extracted_network(network: SuperNetwork, seed: int, probability: float):
    ways = [network.architecture(name) for name in network.architecture_names]
    kept = torch.cat([connected(network, 2, seed, probability), *ways])
    assert modelled(network, kept) == counted(network, kept)


@settings(max_examples=12, deadline=None)
@given(SEEDS, st.booleans())
def test_memory_of_branches_with_gates_anywhere(seed: int, lock: bool):
    """Gates before, between and behind layers of several kinds, also where all channels are open or none are cut."""
    network = gated_network(seed, lock=lock)
    kept = torch.cat([connected(network, 3, seed, 0.8), network.architecture("full")])
    assert modelled(network, kept) == counted(network, kept)


def moving(graph: Graph, seed: int) -> SuperNetwork:
    """Modules on a graph that compute, move, view or hand on what they read, also in layers of a user's own."""
    random = Random(seed)
    size = 3
    kinds = [
        nn.Identity,
        lambda: nn.Dropout(0.5),
        lambda: nn.Sequential(nn.Identity(), nn.Unflatten(1, (size, 1)), nn.Flatten(1, 2)),
        lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(size, 5), nn.ReLU(), nn.Linear(5, size)),
        lambda: nn.Sequential(nn.Sequential(nn.Linear(size, 7), nn.Unflatten(1, (7, 1)), Sliced(size)), nn.Identity()),
        lambda: GatedSequential(ChannelGate(size), nn.Dropout(0.5)),
        lambda: GatedSequential(nn.Linear(size, 4), ChannelGate(4, 3), nn.Linear(4, size), ChannelGate(size, name="b")),
    ]
    activations = [None, nn.ReLU, nn.Dropout, lambda: nn.Sequential(nn.PReLU(), nn.Sigmoid())]
    edges = [
        Edge(start=graph.nodes[a], end=graph.nodes[b], module=random.choice(kinds)(), name=f"e{place}")
        for place, (a, b) in enumerate(graph.edges)
    ]
    nodes = [
        Node(name=name, activation=None if (make := random.choice(activations)) is None else make())
        for place, name in enumerate(graph.nodes)
        if place != graph.source
    ]
    ends = {"source": graph.nodes[graph.source], "sink": graph.nodes[graph.sink]}
    return SuperNetwork(edges, input_shape=(size,), nodes=nodes, **ends)


class Sliced(nn.Module):
    """A module that no tracer is shown into; its output keeps all that it reads in memory."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        if float(x.shape[0]) < 0:
            raise ValueError
        return x[:, : self.size, 0]


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.integers(2, 6), st.integers(0, 5))
def test_what_is_handed_on_or_viewed_is_alive_once(seed: int, nodes: int, extra: int):
    network = moving(random_graph(seed, nodes, extra), seed)
    kept = torch.cat([connected(network, 4, seed, 0.85), network.architecture("full")])
    assert modelled(network, kept) == counted(network, kept)


class Allocated(TorchDispatchMode):
    """What torch itself has in memory: the storages of all tensors that operators gave and something still refers to.

    Args:
        held: places in memory that do not count.
    """

    def __init__(self, held: set[int]) -> None:
        super().__init__()
        self.held, self.peak, self.given = held, 0, list[tuple[weakref.ref, int, int]]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self.given.append((weakref.ref(value), storage.data_ptr(), storage.nbytes()))
        self.given = [each for each in self.given if each[0]() is not None and each[1] not in self.held]
        self.peak = max(self.peak, sum({place: size for _, place, size in self.given}.values()))
        return result


@pytest.mark.parametrize("name", ["resnet_fabric", "conv_fabric", "ends", "mobilenet_v2", "densenet_exits"])
def test_the_peak_is_what_torch_has_in_memory(name: str):
    """While python runs the network layer by layer, dropping each value behind its last use; weights not counted.

    A copy of the input is made first, for the caller holds on to the input itself.
    """
    network = SPACES[name]
    for row in connected(network, 3, seed=1, probability=0.8):
        plain = fold_batch_norm(extract(network, row[None]))
        copied = fx.symbolic_trace(nn.Sequential(nn.AvgPool2d(1), plain)).eval()
        x = torch.zeros(1, *network.input_shape)
        held = {value.data_ptr() for value in copied.state_dict().values()}
        with torch.no_grad(), Allocated(held) as seen:
            copied(x)
        assert peak_activations(plain, x) == seen.peak


def test_a_chain_and_a_residual_block_by_hand():
    """4 values of 4 bytes in each channel. A chain: what is read and what is written. A block: also what waits."""
    wide = nn.Sequential(nn.Conv2d(2, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1))
    skip = Edge(start="x", end="y", module=nn.Identity(), name="skip")
    network = SuperNetwork([skip, Edge(start="x", end="y", module=wide, name="wide")], input_shape=(2, 2, 2))
    value, kept = 4 * 4 * 2, torch.tensor([[0.0, 1], [1, 0], [1, 1]])
    params = 4 * (2 * 6 + 6 + 6 * 2 + 2)  # the batch norm is in the first convolution
    assert Memory("params").bind(network)(kept).tolist() == [params, 0, params]
    chain, identity, block = 2 * 3 * value, value, value + 2 * 3 * value
    assert Memory("activations").bind(network)(kept).tolist() == [chain, identity, block]
    assert Memory().bind(network)(kept).tolist() == [chain + params, identity, block + params]


def test_a_value_lives_until_its_last_reader():
    """x is read again at the end, a is not: at b's convolution x, a and b are alive, at the sum x, its module's, b."""
    edges = [("x", "a", 4), ("a", "b", 1), ("b", "y", 1), ("x", "y", 1)]
    modules = {"xa": nn.Conv2d(1, 4, 1), "ab": nn.Conv2d(4, 1, 1), "by": nn.Conv2d(1, 1, 1), "xy": nn.Conv2d(1, 1, 1)}
    network = SuperNetwork(
        [Edge(start=a, end=b, module=modules[a + b], name=a + b) for a, b, _ in edges], input_shape=(1, 1, 1)
    )
    model = Memory("activations").bind(network)
    assert model(torch.ones(1, 4)).tolist() == [4 * (1 + 4 + 1)]
    assert model(torch.tensor([[1.0, 1, 1, 0]])).tolist() == [4 * (1 + 4)]
    assert model(torch.tensor([[0.0, 0, 0, 1]])).tolist() == [4 * (1 + 1)]


def test_gathered_channels_are_held_by_their_numbers():
    """One of 3 channels is read and written: 8 bytes for the one, 8 for each of the 3, and the weight that is left."""
    layers = [ChannelGate(3, name="in"), nn.Conv2d(3, 3, 1, bias=False), ChannelGate(3, name="out")]
    edges = [Edge(start="x", end="y", module=GatedSequential(*layers), fixed=True)]
    network = SuperNetwork(edges, input_shape=(3, 2, 2))
    used = torch.tensor([[1.0, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 1, 0], [1, 1, 1, 1, 0, 1, 1]])
    assert Memory("params").bind(network)(used).tolist() == [4 * 9, 4 + 8 + 24, 4 * 6 + 24]
    # all: 3 + 3 channels; gathered 3 + 1, 1 + 1, with zeros 1 + 2, scattered 2 + 3; read 3 + 2, 2 + 3, 3 + 3
    assert Memory("activations").bind(network)(used).tolist() == [16 * 6, 16 * 5, 16 * 6]


def test_a_batch_norm_that_stands_behind_no_convolution_is_held_by_its_open_channels():
    """4 numbers of 4 bytes for each channel, and how many batches it saw, 8 bytes, once."""
    layers = [nn.Conv2d(1, 3, 1), nn.ReLU(), nn.BatchNorm2d(3), ChannelGate(3), nn.Conv2d(3, 1, 1, bias=False)]
    edges = [Edge(start="x", end="y", module=GatedSequential(*layers), fixed=True)]
    network = SuperNetwork(edges, input_shape=(1, 2, 2))
    kept = torch.tensor([[1.0, 1, 1], [0, 1, 0], [1, 0, 1]])
    channel = 4 * (2 + 4 + 1)
    assert [params for params, _ in modelled(network, kept)] == [8 + 3 * channel, 8 + channel, 8 + 2 * channel]
    assert modelled(network, kept) == counted(network, kept)


@pytest.mark.parametrize("network", SPACES.values(), ids=SPACES)
def test_costs_of_many_architectures_are_the_costs_of_each(network: SuperNetwork, monkeypatch):
    used = network.used(connected(network, 7, seed=2, probability=0.8))
    for of in KINDS:
        model = bound(network, of)
        together = model(used)
        assert together.dtype == torch.float64
        assert together.tolist() == [float(model(row[None])) for row in used]
        assert torch.equal(model(used.bool()), together)
        monkeypatch.setattr("budgetnet.costs.memory.CHUNK", 3)
        assert torch.equal(model(used), together)
        assert model(network.used(torch.zeros(1, network.gate_count)) * 0).tolist() == [0]


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_a_module_more_never_takes_less(seed: int):
    network = SPACES["resnet_fabric"] if seed % 2 else SPACES["conv_fabric"]
    less = connected(network, 8, seed)
    more = torch.maximum(less, connected(network, 8, seed + 1))
    for of in KINDS:
        model = bound(network, of)
        assert (model(network.used(more)) >= model(network.used(less))).all()


def gradient(model, used: Tensor) -> Tensor:
    used = used.double().clone().requires_grad_()
    return grad(model(used).sum(), used)[0]


@settings(max_examples=10, deadline=None)
@given(SEEDS)
def test_the_peak_lies_above_its_tangents(seed: int):
    """It is the largest of linear functions of the open channels, so that no step along the gradient promises more."""
    network = SPACES["expanded"]
    generator = torch.Generator().manual_seed(seed)
    kept = torch.bernoulli(torch.full((6, network.gate_count), 0.5), generator=generator)
    used = network.used(kept).double()
    model = bound(network, "activations")
    costs, slopes = model(used), gradient(model, used)
    promised = costs[:, None] + slopes @ used.t() - (slopes * used).sum(dim=1, keepdim=True)
    assert (costs[None] >= promised - 1e-6).all()
    assert (slopes[:, len(network.graph.edges) :].sum(dim=1) > 0).all()


def test_the_gradient_of_held_bytes_is_what_flipping_a_group_costs():
    network = SPACES["channels"]
    model = Memory("params").bind(network)
    used = network.used(connected(network, 1, seed=4, probability=0.8)).double()
    slopes = gradient(model, used)[0]
    for unit in range(len(network.graph.edges), network.units):
        other = used.clone()
        other[0, unit] = 1 - used[0, unit]
        change = (model(other) - model(used)).detach() / (other[0, unit] - used[0, unit])
        assert float(slopes[unit]) == pytest.approx(float(change))


def test_a_total_that_training_can_follow():
    """The gradient of open channels and edges points to less memory, and is of the right size on the way down."""
    network = SPACES["channels"]
    kept = network.architecture("full").requires_grad_()
    (slope,) = grad(Memory().bind(network)(network.pathwise(kept)).sum(), kept)
    assert (slope > 0).all()


# --- the smallest network ----------------------------------------------------------------------------------------

TINY = {
    "conv": conv_fabric(width=2, depth=3, channels=3, classes=2, image_size=8),
    "segmentation": conv_fabric(width=2, depth=3, channels=3, classes=2, image_size=8, task="segmentation"),
    "resnet": resnet_fabric(width=1, channels=3, classes=2, image_size=8),
}


def least(network: SuperNetwork, of: str) -> tuple[float, float]:
    """What the smallest network takes, as it was found and of all."""
    bound = Budget(Memory(of), at_most=1e12).bind(network)
    used = network.used(every(network.gate_count))
    used = used[network.connects(used)]
    found = network.used(bound.cheapest(network))
    assert bool(network.connects(found))
    return float(bound.model(found)), float(bound.model(used).min())


@pytest.mark.parametrize("of", KINDS)
@pytest.mark.parametrize("network", TINY.values(), ids=TINY)
def test_the_smallest_is_the_smallest_of_all_architectures(network: SuperNetwork, of: str):
    found, smallest = least(network, of)
    assert found == smallest


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.integers(2, 5), st.integers(0, 3), st.sampled_from(KINDS))
def test_the_smallest_of_own_networks_is_the_smallest(seed: int, nodes: int, extra: int, of: str):
    network = network_on(random_graph(seed, nodes, extra), seed=seed)
    found, smallest = least(network, of)
    assert found == smallest


def chain(seed: int) -> SuperNetwork:
    """Two branches one behind the other, a choice of two at each place, with gates at their ends and inside."""
    random = Random(seed)
    edges = []
    for place, (start, end) in enumerate((("x", "a"), ("a", "y"))):
        for twin in range(2):
            hidden, kernel = random.randint(1, 6), random.choice((1, 3))
            layers: list[nn.Module] = [
                nn.Conv2d(4, hidden, kernel, padding=kernel // 2),
                nn.ReLU(),
                ChannelGate(hidden, 3, name="hidden", always_open=random.randint(0, 1)),
                nn.Conv2d(hidden, 4, 1),
            ]
            layers = [ChannelGate(4, random.choice((2, 3)), name="in"), *layers] if random.random() < 0.5 else layers
            layers += [ChannelGate(4, random.choice((2, 3)), name="out")] if random.random() < 0.5 else []
            edges.append(Edge(start=start, end=end, module=GatedSequential(*layers), name=f"{place}.{twin}"))
    return SuperNetwork(edges[: 3 if seed % 3 else 4], input_shape=(4, 2, 2))


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.sampled_from(KINDS))
def test_the_smallest_with_gates_at_the_ends_is_the_smallest(seed: int, of: str):
    """Closing some channels of an end costs the gathering of the others, which closing none does not."""
    network = chain(seed)
    if network.gate_count <= 14:
        found, smallest = least(network, of)
        assert found == smallest


def test_the_least_total_may_be_neither_the_least_held_nor_the_least_peak():
    """Three ways: few weights with a large value between, many weights and small values, and one between."""
    ways = {"wide": (1, 8), "heavy": (5, 1), "middle": (3, 2)}
    edges = []
    for name, (kernel, hidden) in ways.items():
        layers = [nn.Conv2d(1, hidden, kernel, padding=kernel // 2), nn.Conv2d(hidden, 1, 1)]
        edges.append(Edge(start="x", end="y", module=nn.Sequential(*layers), name=name))
    network = SuperNetwork(edges, input_shape=(1, 4, 4))
    bits = torch.eye(3)
    held, peak, total = (Memory(of).bind(network)(bits).tolist() for of in KINDS)
    assert (held, peak) == ([100, 112, 92], [576, 128, 192])
    for of, costs in zip(KINDS, (held, peak, total), strict=True):
        best = Budget(Memory(of), at_most=1e9).bind(network).cheapest(network)
        assert costs[int(best.argmax())] == min(costs)


def test_a_limit_out_of_reach_says_what_the_smallest_consists_of():
    network = TINY["conv"]
    smallest = least(network, "total")[0]
    [row] = check_reachable(network, [Budget(Memory(), at_most=smallest).bind(network)])
    assert row["smallest"] == smallest
    message = rf"must be at most .* bytes, but .* takes {smallest:.6g}: \d+ B of parameters and \d+ B of activations"
    with pytest.raises(UnreachableBudget, match=message):
        check_reachable(network, [Budget(Memory(), at_most=smallest - 1).bind(network)])


# --- the file ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "trained"),
    [
        ("resnet_fabric", True),
        ("ends", True),
        pytest.param("mobilenet_v2", True, marks=pytest.mark.slow),
        ("densenet_exits", True),
        ("segmentation", False),
    ],
)
def test_bytes_of_the_file_are_those_that_an_export_writes(name: str, trained: bool, tmp_path: Path):
    """To the byte, with channels gathered and scattered, and where biases of zeros are left out."""
    network = deepcopy(SPACES[name]).eval()
    network = stir(network, 0) if trained else network
    kept = connected(network, 1, seed=1, probability=0.7)
    plain = fold_batch_norm(extract(network, kept))
    file, pt2 = (export(plain, tmp_path / f"n.{kind}", torch.zeros(1, *network.input_shape)) for kind in FORMATS)
    model = Memory("file").bind(network)
    assert isinstance(model, MeasuredModel)
    [found] = model.measure(kept)
    assert found.low == found.value == found.high == file.stat().st_size
    assert (model.beforehand(kept).value == found.value) == trained
    assert float(model(network.used(kept))) == pytest.approx(found.value, rel=0.08)
    # the files themselves, which hold what the extracted network does
    costs, others = (measure_file(path, ["macs", "params", "memory:params", "memory:file"]) for path in (file, pt2))
    zeros = sum(value.numel() for value in plain.parameters() if not value.any())
    assert (zeros == 0) == trained
    assert costs["costs"]["memory:file"] == found.value
    assert costs["costs"]["macs"] == others["costs"]["macs"]
    assert costs["costs"]["params"] == others["costs"]["params"] - zeros
    assert costs["costs"]["memory:params"] == others["costs"]["memory:params"] - 4 * zeros
    assert others["costs"]["memory:params"] == state_bytes(plain)
    assert others["costs"]["memory:file"] == pt2.stat().st_size
    assert costs["units"]["memory:file"] == "B"


@pytest.mark.parametrize("name", ["resnet_fabric", "ends"])
def test_predicted_bytes_of_the_file_rank_networks_and_have_a_gradient(name: str):
    network = stir(deepcopy(SPACES[name]).eval(), 0)
    model = Memory("file").bind(network)
    kept = connected(network, 12, seed=3, probability=0.7)
    used = network.used(kept)
    predicted, seen = model(used), torch.tensor([one.value for one in model.measure(kept)], dtype=torch.float64)
    assert torch.corrcoef(torch.stack([predicted, seen]))[0, 1] > 0.99
    assert ((predicted / seen - 1).abs() < 0.1).all()  # the smallest file has 4 KB
    assert model(used * 0).tolist() == [0] * len(used)
    assert (gradient(model, used).sum(dim=1) > 0).all()


def test_a_file_holds_what_its_parameters_take_and_a_constant_for_each_module():
    """Of a pointwise convolution the same is left however many channels it has."""
    sizes = []
    for channels in (16, 24, 32):
        layers = [nn.Conv2d(3, channels, 1), nn.Conv2d(channels, 3, 1)]
        network = SuperNetwork([Edge(start="x", end="y", module=nn.Sequential(*layers))], input_shape=(3, 4, 4))
        [found] = Memory("file").bind(network).measure(torch.ones(1, 1))
        sizes.append(found.value - 4 * (7 * channels + 3))
    assert max(sizes) - min(sizes) <= 4  # lengths and sizes above 127 take a byte more
    assert sizes[0] < 600


def test_a_search_keeps_a_limit_on_the_size_of_its_file(tmp_path: Path):
    """What the result says is the size of network.onnx."""
    torch.manual_seed(0)
    space = resnet_fabric(width=1, channels=4, image_size=8, in_channels=1)
    options = SearchOptions(epochs=3, warmup=0.34, finetune=0.33, candidates=4)
    digits = load("digits").subset(256, seed=0)
    found = search(space, digits, ["memory:file<=70%"], options, out=tmp_path / "run")
    [row] = found.result["budgets"]
    assert row["met"]
    assert row["cost"] == "memory:file"
    assert row["value"] == (tmp_path / "run" / "network.onnx").stat().st_size <= row["limit"]
    full = fold_batch_norm(extract(stir(space, 0).eval(), space.architecture("full")))
    whole = export(full, tmp_path / "full.onnx", torch.zeros(1, 1, 8, 8)).stat().st_size
    assert row["limit"] == pytest.approx(0.7 * whole)
    assert row["value"] > 0.4 * whole


# --- how it is asked for -----------------------------------------------------------------------------------------


def test_memory_is_asked_for_by_name():
    assert [parse_cost(text) for text in ("memory", "memory:params", "memory[of=activations]", "memory:file")] == [
        Memory(),
        Memory("params"),
        Memory("activations"),
        Memory("file"),
    ]
    assert [cost_name(Memory(of)) for of in KINDS] == ["memory:params", "memory:activations", "memory"]
    assert cost_name(Memory("file")) == "memory:file"
    assert Budget.parse("memory:activations<=20KB").at_most == "20KB"


def test_memory_is_measured():
    network = SPACES["channels"]
    kept = network.architecture("full")
    found = measure_network(network, kept, ["memory", "memory:params", "memory:activations"])
    [(params, activations)] = counted(network, kept)
    assert list(found["costs"].values()) == [params + activations, params, activations]
    assert set(found["units"].values()) == {"B"}


def test_memory_that_cannot_be_told():
    with pytest.raises(ConfigError, match="memory is of params, activations, total or file, got 'gpu'"):
        Memory("gpu")
    network = densenet_exits(depth=10, growth=4, exit_channels=8)
    for of in ("total", "file"):
        with pytest.raises(
            ConfigError, match="memory cannot be a cost where gates look at the input, as those of dense"
        ):
            Memory(of).bind(network)


@pytest.mark.parametrize(
    ("network", "params", "activations"),
    [
        (resnet(depth=20, gates="none"), 1_086_760, 196_608),
        (resnet(depth=56, gates="none"), 3_414_568, 196_608),
        (mobilenet_v2(gates="none"), 13_951_264, 9_633_792),
    ],
    ids=["ResNet-20", "ResNet-56", "MobileNetV2"],
)
def test_numbers_of_the_documentation(network: SuperNetwork, params: int, activations: int):
    """ResNets: three values of 16 x 32 x 32, a sum; MobileNetV2: 96 x 112 x 112 before and behind a ReLU6."""
    used = network.used(network.architecture("full"))
    assert Memory("params").bind(network)(used).tolist() == [params]
    assert Memory("activations").bind(network)(used).tolist() == [activations]
