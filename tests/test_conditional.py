"""What skips gives what computes everything and multiplies, computes no more than is open, and so do the files."""

from __future__ import annotations

import copy
import json
import math
import pickle
from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import count, pairwise
from random import Random
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from small import stir
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from budgetnet import Edge, Node, SuperNetwork, spaces
from budgetnet.conditional import ConditionalNetwork, conditional, export_conditional, polarised
from budgetnet.conditional.branches import Limits, union
from budgetnet.conditional.heads import narrowed_head
from budgetnet.conditional.tuning import line
from budgetnet.costs.additive import edge_cost, module_macs
from budgetnet.errors import ConfigError
from budgetnet.export import load
from budgetnet.extraction import extract
from budgetnet.gated import ChannelGate, GatedSequential
from budgetnet.sites import AnswerGate, ConditionalGates, FeatureGate, Threshold

CHANNELS, SIDE = 6, 6
GATHER, NEVER = Limits(1.0, 0.0, 1.0, 0.0), Limits(0.0, 0.0, 0.0, 0.0)


class Pixels(nn.Module):
    """Gates that an example's first pixels decide: open where they are positive."""

    def __init__(self, channels: int, count: int, *, first: int = 0) -> None:
        super().__init__()
        self.places = slice(first, first + count)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0, 0, self.places]


def conv(into: int, out: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(into, out, kernel, padding=kernel // 2, **options)


def hidden(channels: int = CHANNELS, width: int = 6, granularity: int = 2) -> GatedSequential:
    gate = ChannelGate(width, granularity)
    return GatedSequential(
        conv(channels, width, bias=False), nn.BatchNorm2d(width), nn.ReLU(), gate, conv(width, channels)
    )


def any_module(random: Random, channels: bool) -> nn.Module:
    """A layer, a branch, or a branch with gates on its channels: hidden ones, at its ends, or at several places."""
    c, h, k = CHANNELS, random.choice([4, 6]), random.choice([4, 6])
    plain = [
        nn.Identity,
        lambda: conv(c, c),
        lambda: nn.Sequential(conv(c, c, bias=False), nn.BatchNorm2d(c), nn.ReLU(), conv(c, c, 1)),
        lambda: nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(inplace=True), conv(c, c, padding_mode="circular")),
    ]
    gated = [
        lambda: hidden(width=h),
        lambda: GatedSequential(
            ChannelGate(c, 2, name="input"),
            conv(c, h, padding_mode="circular"),
            nn.BatchNorm2d(h),
            nn.ReLU(),
            ChannelGate(h, 2, name="hidden"),
            conv(h, c, 1),
            nn.BatchNorm2d(c),
            ChannelGate(c, 3, name="output"),
        ),
        lambda: GatedSequential(
            conv(c, h, 1),
            nn.BatchNorm2d(h),
            nn.ReLU6(),
            conv(h, h, groups=h, bias=False),
            nn.BatchNorm2d(h),
            nn.ReLU6(),
            ChannelGate(h, 2, always_open=random.randrange(2), name="expanded"),
            conv(h, c, 1),
        ),
        lambda: GatedSequential(
            conv(c, h, 1),
            nn.BatchNorm2d(h),
            ChannelGate(h, 2, name="first"),
            nn.ReLU(),
            conv(h, k),
            nn.BatchNorm2d(k),
            nn.ReLU(),
            ChannelGate(k, 3, name="second"),
            conv(k, c, 1),
        ),
    ]
    return random.choice(gated if channels and random.random() < 0.7 else plain)()


def any_network(kind: str, seed: int, nodes: int = 5, extra: int = 3) -> SuperNetwork:
    """A random DAG with random gates: "layers", "channels", "both"; "mixed": others too that do not look; "exits";

    "locked" and "locked exits": beside them branches that share their gates.
    """
    random = Random(f"{kind} {seed}")
    edges: list[Edge] = []

    def gate(channels: int, count: int) -> nn.Module:
        memory = random.random() < 0.3
        return ConditionalGates(channels, count, hidden=3, pairs=random.random() < 0.5, memory=memory)

    def stretch(names: Sequence[str]) -> None:
        pairs = [(random.randrange(place), place) for place in range(1, len(names))]
        pairs += [(place, random.randrange(place + 1, len(names))) for place in range(len(names) - 1)]
        pairs += [tuple(sorted(random.sample(range(len(names)), 2))) for _ in range(extra)]
        for start, end in pairs:
            module = any_module(random, kind != "layers")
            sites = module.sites if isinstance(module, GatedSequential) else ()
            fixed = random.random() < (0.8 if kind == "channels" else 0.3)
            looks = random.random() < (0.5 if kind == "mixed" else 0.8)
            looks = looks and (not fixed or any(site.groups > site.always_open for site in sites))
            edges.append(
                Edge(
                    start=names[start],
                    end=names[end],
                    module=module,
                    name=f"e{len(edges)}",
                    fixed=fixed,
                    gate=gate if looks else None,
                )
            )

    def twins(names: Sequence[str]) -> None:
        """A chain that is always kept, and branches beside it whose gates are shared, here and in other stretches."""
        for start, end in pairwise(names):
            module = random.choice([nn.Identity, lambda: conv(CHANNELS, CHANNELS)])()
            edges.append(Edge(start=start, end=end, module=module, name=f"e{len(edges)}", fixed=True))
        modules = (any_module(Random(number), True) for number in count(seed))
        template = next(module for module in modules if isinstance(module, GatedSequential))
        for site in template.sites:
            site.lock = f"twin {site.name}"
        for _ in range(2):
            start, end = sorted(random.sample(range(len(names)), 2))
            ends = {"start": names[start], "end": names[end]}
            module = copy.deepcopy(template)
            edges.append(Edge(**ends, module=module, name=f"e{len(edges)}", fixed=True, gate=gate))

    names = ["x", *(f"a{place}" for place in range(1, nodes))]
    last = names[-1]
    stretch(names)
    if "locked" in kind:
        twins(names)
    if "exits" in kind:
        for place in range(random.choice([1, 2])):
            ways = [gate, lambda channels, count: FeatureGate(channels, hidden=4), AnswerGate, None]
            way = random.choice(ways if place else ways[:3])
            edges.append(
                Edge(
                    start=last,
                    end="y",
                    module=classifier(),
                    name=f"exit{place}",
                    gate=way,
                    exit=True,
                    answers=way is AnswerGate,
                )
            )
        names = [last, *(f"b{place}" for place in range(1, nodes))]
        stretch(names)
        if "locked" in kind:
            twins(names)
        last = names[-1]
    edges.append(Edge(start=last, end="y", module=classifier(), name="last", fixed=True))
    random.shuffle(edges)
    names = sorted({edge.end for edge in edges} - {"y"})
    activations = [nn.ReLU, nn.ReLU, nn.ReLU6, nn.Tanh, nn.Identity]
    network = SuperNetwork(
        edges,
        input_shape=(CHANNELS, SIDE, SIDE),
        nodes=[Node(name=name, activation=random.choice(activations)()) for name in names],
        pairs=random.random() < 0.5,
    )
    return undecided(stir(network, seed), seed).eval()


def classifier() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 4))


@torch.no_grad()
def undecided(network: SuperNetwork, seed: int) -> SuperNetwork:
    """The network with gates that open and close: weights of their heads that are not small, biases near 0."""
    generator = torch.Generator().manual_seed(seed)
    network.gates.values.copy_(torch.randn(network.gates.values.shape, generator=generator) + 1)
    for head in network.heads.values():
        for value in head.parameters():
            scale = 0.7 if value.ndim > 1 else 0.3
            value.copy_(torch.randn(value.shape, generator=generator) * scale)
    return network


def images(network: SuperNetwork, count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *network.input_shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def reference(network: SuperNetwork, x: Tensor, tau: float = 0.5) -> tuple[Tensor, Tensor]:
    output, kept = network.masked(x.clone(), Threshold(tau))
    return output, kept.expand(len(x), -1)


def told(network: ConditionalNetwork, limits: Limits, batch: int = 7) -> ConditionalNetwork:
    """The network with its edges made to run one way."""
    for edge in network.conditional_branches:
        edge.learn({batch: limits})
    return network


def decided_alike(network: SuperNetwork, one: Tensor, other: Tensor) -> bool:
    """Whether decisions use the same edges, and on them the same groups."""
    edges = len(network.graph.edges)
    a, b = network.used(one), network.used(other)
    groups = [(a[:, site.edge].bool(), slice(*site.units)) for site in network.sites]
    same = all(torch.equal(a[rows, units], b[rows, units]) for rows, units in groups)
    return same and torch.equal(a[:, :edges], b[:, :edges])


KINDS = ("layers", "channels", "both", "mixed", "exits", "locked", "locked exits")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_decisions_are_those_of_computing_everything(kind: str, seed: int):
    network = any_network(kind, seed)
    tau = Random(seed).choice([0.3, 0.5, 0.5, 0.8])
    before = copy.deepcopy(network.state_dict())
    plain = conditional(network, tau=tau)
    for batch in (1, 7):
        x = images(network, batch, seed)
        expected, kept = reference(network, x, tau)
        scale = max(1.0, float(expected.abs().max()))
        for limits in (Limits(), GATHER, NEVER, Limits(0.9, 0.02, 0.9, 0.02)):
            for memory in (torch.contiguous_format, torch.channels_last):
                given = x.clone().contiguous(memory_format=memory)
                output, own = told(plain, limits, batch).decide(given)
                torch.testing.assert_close(output, expected, rtol=0, atol=1e-4 * scale)
                torch.testing.assert_close(plain(given), expected, rtol=0, atol=1e-4 * scale)
                assert torch.equal(given, x)
                assert decided_alike(network, own, kept)
                if "exits" not in kind:  # behind an exit nobody is asked
                    asked = [column for edge in plain.conditional_branches for column in edge.columns]
                    assert torch.equal(own[:, asked], kept[:, asked])
    after = network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def gated_by_pixels(*, own: bool, groups: bool, first: int = 0, sum_of: int = 1) -> SuperNetwork:
    """Branches beside a shortcut whose gates are open where the input's first pixels are positive."""
    edges = [Edge(start="x", end="a", module=nn.Identity(), name="skip", fixed=True)]
    for place in range(sum_of):
        module = hidden() if groups else nn.Sequential(conv(CHANNELS, CHANNELS), nn.BatchNorm2d(CHANNELS))
        gate = partial(Pixels, first=first + place)
        edges.append(Edge(start="x", end="a", module=module, name=f"branch{place}", fixed=not own, gate=gate))
    edges.append(Edge(start="a", end="y", module=classifier(), name="last", fixed=True))
    nodes = [Node(name="a", activation=nn.ReLU())]
    return stir(SuperNetwork(edges, input_shape=(CHANNELS, SIDE, SIDE), nodes=nodes), 0).eval()


def opening(network: SuperNetwork, bits: Sequence[Sequence[bool]]) -> Tensor:
    """Images whose first pixels open these gates."""
    x = images(network, len(bits))
    for row, pixels in zip(x, bits, strict=True):
        for place, is_open in enumerate(pixels):
            row[0, 0, place] = 1.0 if is_open else -1.0
    return x


def macs_of(run: Any, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        run(x)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("count", range(8))
def test_a_closed_layer_is_not_computed_for_the_examples_that_close_it(count: int):
    """Any share of open rows, none and all included; each counted by torch."""
    network = gated_by_pixels(own=True, groups=False)
    plain = told(conditional(network), GATHER)
    rows = [row * 3 % 7 < count for row in range(7)]
    x = opening(network, [[row] for row in rows])
    output, kept = plain.decide(x)
    torch.testing.assert_close(output, reference(network, x)[0])
    assert kept[:, 0].tolist() == rows
    one, last = CHANNELS * CHANNELS * 9 * SIDE * SIDE, CHANNELS * 4
    assert macs_of(plain, x) == count * one + 7 * last
    # where gathering is said never to pay, all rows are computed, unless none is open
    assert macs_of(told(plain, NEVER), x) == (7 * one if count else 0) + 7 * last


@pytest.mark.parametrize("batch", [1, 7])
def test_what_is_computed_is_what_the_cost_counts(batch: int):
    """Convolutions and linear layers, one example at a time, counted by torch beside the cost of the decisions."""
    network = gated_by_pixels(own=True, groups=True, sum_of=2)
    plain = told(conditional(network), GATHER, batch)
    cost = edge_cost(network, module_macs, "MAC")
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        x = opening(network, (torch.rand(batch, 5, generator=generator) < 0.5).tolist())
        output, kept = plain.decide(x)
        torch.testing.assert_close(output, reference(network, x)[0], rtol=1e-4, atol=1e-5)
        assert macs_of(plain, x) == int(cost(network.used(kept)).sum())


@pytest.mark.parametrize("batch", [1, 7])
def test_what_is_run_before_a_later_gate_closes_is_counted(batch: int):
    """Two branches in a row: the second decides once the first has been run, whose work may come to nothing."""
    module, gate = partial(conv, CHANNELS, CHANNELS), partial(Pixels, first=0)
    edges = [
        Edge(start="x", end="a", module=nn.Identity(), fixed=True),
        Edge(start="x", end="b", module=module(), name="first", gate=gate),
        Edge(start="b", end="a", module=module(), name="second", gate=gate),
        Edge(start="a", end="y", module=classifier(), fixed=True),
    ]
    network = stir(SuperNetwork(edges, input_shape=(CHANNELS, SIDE, SIDE)), 0).eval()
    plain = told(conditional(network), GATHER, batch)
    cost, seen = edge_cost(network, module_macs, "MAC"), torch.zeros(0, 2)
    for seed in range(84 // batch):
        x = images(network, batch, seed)
        output, kept = plain.decide(x)
        torch.testing.assert_close(output, reference(network, x)[0], rtol=1e-4, atol=1e-5)
        assert macs_of(plain, x) == int(cost(network.used(kept)).sum())
        seen = torch.cat([seen, kept])
    assert [1.0, 0.0] in seen.tolist()
    assert [1.0, 1.0] in seen.tolist()


@pytest.mark.parametrize("batch", [1, 7])
def test_what_an_exit_computes_to_answer_first_is_what_the_cost_counts(batch: int):
    torch.manual_seed(0)
    network = spaces.densenet_exits(depth=10, growth=4, image_size=8, exit_channels=4)
    for head in network.heads.values():
        nn.init.normal_(head.decide.weight)
        head.reset(0.0)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            part.momentum = None  # the mean of what it saw
    reference(network, 3 * images(network, 64, 99))
    network.eval()
    plain, seen = conditional(network), set()
    cost = edge_cost(network, module_macs, "MAC", heads=dict.fromkeys(network.exits, 3.0))
    for seed in range(8):
        x = 3 * images(network, batch, seed)
        output, kept = plain.decide(x)
        expected, decisions = reference(network, x)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-5)
        assert decided_alike(network, kept, decisions)
        assert macs_of(plain, x) == int(cost(network.used(kept)).sum())
        seen |= {tuple(row) for row in kept.tolist()}
    assert len(seen) == 3 or batch == 1


def test_rows_that_open_different_groups_share_weights_and_are_masked():
    """Told that gathering costs, the rows are run together on the union of their groups."""
    network = gated_by_pixels(own=False, groups=True)
    plain = told(conditional(network), Limits(1.0, 1.0, 1.0, 0.0), 2)
    x = opening(network, [[True, False, False], [False, True, False]])
    torch.testing.assert_close(plain(x), reference(network, x)[0])
    two_of_three = 2 * 2 * (CHANNELS * 4 * 9) * SIDE * SIDE  # two rows, two convolutions on 4 of the 6 channels
    assert macs_of(plain, x) == two_of_three + 2 * CHANNELS * 4


class Operations(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("batch", [1, 7])
def test_where_all_is_open_nothing_is_gathered_or_copied(batch: int, groups: bool):
    network = gated_by_pixels(own=True, groups=groups)
    plain = conditional(network)
    x = opening(network, [[True] * 4] * batch)
    with Operations() as seen:
        plain(x)
    moves = ("index", "copy", "clone", "cat", "zeros", "mul", "gather", "scatter")
    assert not [name for name in seen.names if any(move in name for move in moves)]


def test_a_closed_layer_costs_one_example_no_copy_either():
    network = gated_by_pixels(own=True, groups=False)
    plain, x = conditional(network), opening(network, [[False]])
    with Operations() as seen:
        plain(x)
    assert "convolution" not in seen.names
    assert not [name for name in seen.names if "copy" in name or "clone" in name]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_constants_that_agree_with_the_decisions_change_no_output(kind: str, seed: int):
    """Of the gates that all examples decide alike; and all of them, for each example alone."""
    network = any_network(kind, seed)
    x = images(network, 7, seed)
    expected = reference(network, x)[0]
    before = conditional(network)
    own = before.decide(x)[1]
    constants = polarised(own.mean(dim=0), 0.0)
    plain = conditional(network, constants=constants)
    torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-4)
    asked = len({column for edge in plain.conditional_branches for column in edge.columns})
    assert asked <= int(constants.isnan().sum())
    assert parameters(plain) <= parameters(before)
    if network.connects(network.used(own[:1]))[0]:
        alone = conditional(network, constants=own[0])
        assert not alone.conditional_branches
        torch.testing.assert_close(alone(x[:1]), expected[:1], rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(ConfigError, match="must leave a path from input to output"):
            conditional(network, constants=own[0])


def parameters(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("pairs", [False, True])
def test_heads_shrink_to_the_gates_that_are_left(memory: bool, pairs: bool):
    """Of gates on a layer and its 3 groups the layer's and one group's are constants; 8 features decide each."""
    gate = partial(ConditionalGates, hidden=8, memory=memory, pairs=pairs)
    edges = [
        Edge(start="x", end="a", module=nn.Identity(), name="skip", fixed=True),
        Edge(start="x", end="a", module=hidden(), name="branch", gate=gate),
        Edge(start="a", end="y", module=classifier(), name="last", fixed=True),
    ]
    network = SuperNetwork(edges, input_shape=(CHANNELS, SIDE, SIDE))
    network = undecided(stir(network, 0), 0).eval()
    x = images(network, 64)
    nan = math.nan
    constants = torch.tensor([1.0, nan, 0.0, nan])
    plain = conditional(network, constants=constants)
    (edge,) = plain.conditional_branches
    output, kept = plain.decide(x)
    assert torch.equal(kept[:, [1, 3]], reference(network, x)[1][:, [1, 3]])
    assert kept[:, 0].all()
    assert not kept[:, 2].any()
    torch.testing.assert_close(output, network.run(x, network.used(kept)), rtol=1e-4, atol=1e-4)
    assert edge.head is not None
    if memory:  # each gate that is left is corrected by the tentative decisions of all
        first, second, recall = 4 * 8 * (CHANNELS + 1), 4 * (8 + 1), 4 * 5 + 2 * 5
        assert parameters(edge.head) == first + second + recall
    else:
        assert parameters(edge.head) == 2 * 8 * (CHANNELS + 1) + 2 * (8 + 1)
    # the weights of the closed group are gone
    assert parameters(edge.body) == (9 * CHANNELS + 1) * 4 + CHANNELS * (4 * 9 + 1)


def test_with_every_gate_constant_what_is_left_is_what_is_extracted():
    network = any_network("both", 1)
    kept = torch.ones(1, network.gate_count)
    kept[0, ::3] = 0
    plain, extracted = conditional(network, constants=kept[0]), extract(network, kept)
    x = images(network, 3)
    torch.testing.assert_close(plain(x), extracted(x), rtol=1e-4, atol=1e-4)
    whole = conditional(network, constants=torch.ones(network.gate_count))
    assert parameters(plain) < parameters(whole)
    assert macs_of(plain, x) == macs_of(extracted, x)


def with_exit(*, exits: int = 1) -> SuperNetwork:
    """A trunk whose first node has an exit, or two, decided by a pixel each that no layer changes."""
    edges = [Edge(start="x", end="a", module=nn.Identity(), name="in", fixed=True)]
    edges += [
        Edge(start="a", end="y", module=classifier(), name=f"exit{place}", gate=partial(Pixels, first=place), exit=True)
        for place in range(exits)
    ]
    edges += [
        Edge(start="a", end="b", module=conv(CHANNELS, CHANNELS), name="trunk", fixed=True),
        Edge(start="b", end="y", module=classifier(), name="last", fixed=True),
    ]
    return stir(SuperNetwork(edges, input_shape=(CHANNELS, SIDE, SIDE)), 0).eval()


@pytest.mark.parametrize("limits", [GATHER, NEVER])
@pytest.mark.parametrize("exits", [1, 2])
def test_examples_that_exit_keep_their_places_and_cost_nothing_behind(exits: int, limits: Limits):
    network = with_exit(exits=exits)
    plain = told(conditional(network), limits)
    module = dict(zip(network.edge_names, network.modules_on_edges, strict=True))
    for taken in [(), (0,), (6,), (1, 2, 5), tuple(range(7))]:
        bits = [[row in taken, row % 2 == 0] for row in range(7)]
        x = opening(network, bits)
        output, kept = plain.decide(x)
        for row, (first, second) in enumerate(bits):
            way = "exit0" if first else "exit1" if second and exits == 2 else "last"
            value = x[row : row + 1] if way != "last" else module["trunk"](x[row : row + 1])
            torch.testing.assert_close(output[row], module[way](value)[0])
        torch.testing.assert_close(output, reference(network, x)[0])
        assert kept[:, 0].tolist() == [first for first, _ in bits]
        if limits == GATHER:
            stay = sum(not (first or (second and exits == 2)) for first, second in bits)
            head = CHANNELS * 4
            assert macs_of(plain, x) == stay * CHANNELS**2 * 9 * SIDE * SIDE + 7 * head


@pytest.mark.parametrize("limits", [GATHER, NEVER])
def test_decisions_for_a_later_edge_stay_with_their_examples_where_others_exit(limits: Limits, tmp_path):
    """Pixels decide on the exit and on the groups of both branches; the first branch changes no pixel."""
    first, second = hidden(), hidden()
    first.sites[0].lock = second.sites[0].lock = "twin"
    shared = {"gate": partial(Pixels, first=1), "fixed": True}
    edges = [
        Edge(start="x", end="a", module=nn.Identity(), name="skip", fixed=True),
        Edge(start="x", end="a", module=first, name="first", **shared),
        Edge(start="a", end="y", module=classifier(), name="exit", gate=Pixels, exit=True),
        Edge(start="a", end="b", module=nn.Identity(), name="pass", fixed=True),
        Edge(start="a", end="b", module=second, name="second", **shared),
        Edge(start="b", end="y", module=classifier(), name="last", fixed=True),
    ]
    network = stir(SuperNetwork(edges, input_shape=(CHANNELS, SIDE, SIDE)), 0).eval()
    with torch.no_grad():
        for value in network.modules_on_edges[1][-1].parameters():
            value.zero_()
    plain = told(conditional(network), limits)
    bits = [[row % 3 == 0, row % 2 == 0, row < 3, row == 5] for row in range(7)]
    x = opening(network, bits)
    output, kept = plain.decide(x)
    torch.testing.assert_close(output, reference(network, x)[0])
    assert kept[:, network.own_columns(1)].bool().tolist() == [row[1:] for row in bits]
    for row in range(7):
        torch.testing.assert_close(plain(x[row : row + 1])[0], output[row])
    if limits == GATHER:
        export_conditional(plain, tmp_path / "network.onnx", x)  # which compares each example


def test_a_gate_behind_an_exit_that_was_taken_is_noted_as_closed():
    edges = [
        Edge(start="x", end="y", module=classifier(), name="exit", gate=Pixels, exit=True),
        Edge(start="x", end="a", module=nn.Identity(), name="skip", fixed=True),
        Edge(start="x", end="a", module=conv(CHANNELS, CHANNELS), name="layer", gate=partial(Pixels, first=1)),
        Edge(start="a", end="y", module=classifier(), name="last", fixed=True),
    ]
    network = SuperNetwork(edges, input_shape=(CHANNELS, SIDE, SIDE)).eval()
    plain = conditional(network)
    x = opening(network, [[True, True], [False, True], [False, False], [True, False]])
    columns = [plain.edges[place].columns[0] for place in range(4) if plain.edges[place].columns]
    names = {edge.name: edge.columns for edge in plain.conditional_branches}
    assert sorted(columns) == [0, 1]
    output, kept = plain.decide(x)
    assert kept[:, names["exit"][0]].tolist() == [1, 0, 0, 1]
    assert kept[:, names["layer"][0]].tolist() == [0, 1, 0, 0]
    torch.testing.assert_close(output, reference(network, x)[0])


def test_an_exit_that_every_input_takes_leaves_nothing_behind_it():
    network = with_exit()
    plain = conditional(network, constants=torch.ones(1))
    assert [edge.name for edge in plain.edges] == ["in", "exit0"]
    x = images(network, 3)
    torch.testing.assert_close(plain(x), plain.edges[1].body.run(x, ())[0])
    never = conditional(network, constants=torch.zeros(1))
    assert [edge.name for edge in never.edges] == ["in", "trunk", "last"]


def test_a_batch_may_be_empty():
    for network in (with_exit(), gated_by_pixels(own=True, groups=True)):
        assert conditional(network)(images(network, 0)).shape == (0, 4)


def test_it_is_a_copy_that_stays_in_evaluation_mode_and_can_be_copied_on():
    network = any_network("exits", 0)
    network.train()
    plain = conditional(network)
    assert all(part.training for part in network.modules())
    assert not any(part.training for part in plain.train().modules())
    x = images(network, 5)
    before = plain(x)
    for again in (copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        assert torch.equal(again(x), before)
        assert torch.equal(again(x[:1]), plain(x[:1]))
        with torch.no_grad():
            for value in again.parameters():
                value.zero_()
    with torch.no_grad():
        for value in (*network.parameters(), *network.buffers()):
            value.zero_()
    assert torch.equal(plain(x), before)
    assert not any(value.requires_grad for value in plain.parameters())


@pytest.mark.parametrize("batch", [1, 7])
def test_what_was_narrowed_before_follows_the_weights(batch: int):
    """Weights written to in place, loaded, or of another type."""
    network = any_network("both", 2)
    plain = told(conditional(network), GATHER, batch)
    x = images(network, batch)
    state = copy.deepcopy(plain.state_dict())
    before = plain(x)
    with torch.no_grad():
        for value in plain.parameters():
            value.mul_(0.5)
    changed = plain(x)
    assert not torch.equal(changed, before)
    assert torch.equal(changed, copy.deepcopy(plain)(x))
    plain.load_state_dict(state)
    assert torch.equal(plain(x), before)
    torch.testing.assert_close(plain.double()(x.double()).float(), before, rtol=1e-4, atol=1e-4)
    assert torch.equal(plain.float()(x), before)


def test_only_so_many_narrowed_weights_are_held():
    network = gated_by_pixels(own=False, groups=True)
    plain = conditional(network)
    (edge,) = plain.conditional_branches
    for _ in range(40):
        for bits in ([True, False, False], [False, True, True], [True, True, False]):
            plain(opening(network, [bits]))
            with torch.no_grad():
                next(edge.body.parameters()).add_(0)  # what was held is out of date
    assert len(edge.body._variants) <= 4


class Indexing(nn.Module):
    """Calls the layers of a sequence in an order of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(conv(CHANNELS, CHANNELS), nn.BatchNorm2d(CHANNELS), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[2](self.layers[0](x)))


def test_layers_that_are_called_one_by_one_or_write_in_place_are_left_to_do_so():
    traced = fx.symbolic_trace(nn.Sequential(conv(CHANNELS, CHANNELS), nn.BatchNorm2d(CHANNELS), nn.ReLU()))
    modules = [Indexing(), traced, nn.Sequential(nn.LeakyReLU(inplace=True), conv(CHANNELS, CHANNELS))]
    edges = [
        Edge(start="x", end="a", module=module, name=f"e{place}", gate=partial(Pixels, first=place))
        for place, module in enumerate(modules)
    ]
    edges.append(Edge(start="a", end="y", module=classifier(), name="last", fixed=True))
    network = stir(SuperNetwork(edges, input_shape=(CHANNELS, SIDE, SIDE)), 0).eval()
    plain = conditional(network)
    bits = [[bool(row >> place & 1) for place in range(3)] for row in range(8)]
    x = opening(network, bits)
    before, last = x.clone(), network.modules_on_edges[3]
    expected = torch.zeros(8, 4)  # where no edge is open the input and the output are not connected
    for row in range(1, 8):
        terms = [
            module(x[row : row + 1].clone()) for module, is_open in zip(modules, bits[row], strict=True) if is_open
        ]
        expected[row] = last(torch.stack(terms).sum(dim=0))[0]
    torch.testing.assert_close(plain(x), expected)
    for row in range(8):
        torch.testing.assert_close(plain(x[row : row + 1]), expected[row : row + 1])
    assert torch.equal(x, before)


def test_polarised_gates_are_those_within_the_margin():
    rates = torch.tensor([0.0, 0.01, 0.02, 0.5, 0.98, 0.995, 1.0])
    assert ["?" if math.isnan(gate) else gate for gate in polarised(rates).tolist()] == [0, 0, "?", "?", "?", 1, 1]
    assert polarised(rates, 0.0).isnan().sum() == 5


def test_the_expected_time_is_linear_in_both_shares():
    limits = Limits(rows=0.8, row_cost=0.2, channels=0.5, channel_cost=0.1)
    assert limits.time(0.8, 1.0) == pytest.approx(1)
    assert limits.time(0.4, 1.0) == pytest.approx(0.6)
    assert limits.time(None, 0.5) == pytest.approx(1)
    assert limits.time(None, 0.25) == pytest.approx(0.55)
    assert limits.time(None, 0.6) == 1  # masked
    assert limits.time(0.4, 0.25) == pytest.approx(0.2 + 0.8 * 0.5 * 0.55)
    assert NEVER.time(0.1, 1.0) > 1


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(0.25, 0.35), (0.5, 0.6), (0.75, 0.85)], (0.9, 0.1)),
        ([(0.25, 0.2), (0.75, 0.6)], (1.0, 0.0)),  # always faster
        ([(0.25, 1.5), (0.75, 2.5)], (0.0, 1.0)),  # never
        ([(0.5, 0.7)], (0.8, 0.2)),
        ([(0.25, 0.5), (0.75, 0.5)], (1.0, 0.5)),
        ([], (0.75, 0.1)),
    ],
)
def test_the_break_even_is_where_the_line_reaches_one(points, expected):
    assert line(points) == pytest.approx(expected)


def test_no_plan_is_dearer_than_running_the_whole_batch():
    """Every batch of 4 examples with 3 groups, under several limits; each row that takes the edge is in one part."""
    network = gated_by_pixels(own=True, groups=True)
    (edge,) = conditional(network).conditional_branches
    generator = torch.Generator().manual_seed(0)
    for limits in (Limits(), GATHER, NEVER, Limits(0.9, 0.3, 0.9, 0.3)):
        edge.learn({4: limits})
        for _ in range(100):
            values = (torch.rand(4, 4, generator=generator) - 0.4).tolist()
            taken = edge.takers(values, None, 4)
            parts = edge.plan(taken, 4)
            rows = [row for part in parts for row in part.rows]
            assert sorted(rows) == sorted(row for own in taken.values() for row in own)
            assert rows == [] or sorted(set(rows)) == sorted(rows)
            if parts:
                together = limits.time(None, edge.body.share(union(taken)))
                shares = [edge.body.share(part.pattern) for part in parts]
                time = sum(
                    limits.time(None if part.whole else len(part.rows) / 4, share)
                    for part, share in zip(parts, shares, strict=True)
                )
                assert time <= together + 1e-9


@pytest.mark.parametrize("batch", [1, 6])
def test_tuning_measures_every_edge_with_gates_and_is_kept_as_json(batch: int):
    network = any_network("both", 3)
    plain = conditional(network)
    x = images(network, batch)
    before = plain(x)
    table = plain.tune(x, repeats=1)
    assert set(table) == {edge.name for edge in plain.conditional_branches}
    for rows in table.values():
        assert list(rows) == [str(batch)]
        assert all(0 <= value <= 1 for value in rows[str(batch)].values())
    torch.testing.assert_close(plain(x), before, rtol=1e-4, atol=1e-4)
    other = conditional(network)
    assert other.table == {name: {} for name in table}
    other.table = json.loads(json.dumps(table))
    assert other.table == table
    edge = other.conditional_branches[0]
    assert edge.limits_at(100) == edge.limits_at(batch)  # the nearest that was measured


def run_counts(path: Any, x: Tensor) -> Counter[str]:
    """How often onnxruntime ran each kind of node, as its profiler says."""
    options = ort.SessionOptions()
    options.enable_profiling = True
    options.log_severity_level = 4
    options.profile_file_prefix = str(path)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    session.run(None, {"x": x.numpy()})
    with open(session.end_profiling()) as file:
        events = json.load(file)
    return Counter(event["args"]["op_name"] for event in events if event["name"].endswith("kernel_time"))


def operators(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """All nodes, those in branches too."""
    inside = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return [*graph.node, *(node for each in inside for node in operators(each))]


def test_the_file_runs_the_branches_that_are_open(tmp_path):
    """A layer, two groups of channels, and an exit, each open and closed: outputs, and what was run for them."""
    edges = [
        Edge(start="x", end="a", module=nn.Identity(), name="skip", fixed=True),
        Edge(start="x", end="a", module=conv(CHANNELS, CHANNELS), name="layer", gate=Pixels),
        Edge(start="a", end="y", module=classifier(), name="exit", gate=partial(Pixels, first=1), exit=True),
        Edge(start="a", end="b", module=nn.Identity(), name="on", fixed=True),
        Edge(
            start="a", end="b", module=hidden(granularity=3), name="groups", fixed=True, gate=partial(Pixels, first=2)
        ),
        Edge(start="b", end="y", module=classifier(), name="last", fixed=True),
    ]
    network = stir(SuperNetwork(edges, input_shape=(CHANNELS, SIDE, SIDE)), 0)
    with torch.no_grad():  # the first layer lets the pixels pass that decide behind it
        network.modules_on_edges[1].weight[0], network.modules_on_edges[1].bias[0] = 0, 0
    network.eval()
    plain = conditional(network)
    bits = [[bool(row >> place & 1) for place in range(4)] for row in range(16)]
    x = opening(network, bits)
    path = export_conditional(plain, tmp_path / "network.onnx", x)
    assert [file.name for file in tmp_path.iterdir()] == ["network.onnx"]
    model = onnx.load(path)
    kinds = Counter(node.op_type for node in operators(model.graph))
    # the layer, the exit, one for whether any group is open, and one or two to choose among the three patterns
    assert kinds["If"] == 5
    # three patterns hold a pair of convolutions each, in branches of their own
    assert kinds["Conv"] == 1 + 3 * 2
    assert not [node for node in model.graph.node if node.op_type == "Conv"]
    assert not {weight.name for weight in model.graph.initializer if len(weight.dims) == 4}
    run = load(path)
    expected = reference(network, x)[0]
    for row, (layer, leaves, first, second) in enumerate(bits):
        example = x[row : row + 1]
        torch.testing.assert_close(run(example), expected[row : row + 1], rtol=1e-4, atol=1e-5)
        ran = run_counts(path, example)
        assert ran["Conv"] == layer + 2 * (not leaves and (first or second))
        assert ran["Gemm"] == 1


@pytest.mark.parametrize(("block", "width"), [(0, 6), (3, 6), (4, 8), (8, 8)])
def test_many_patterns_of_groups_are_masked(tmp_path, block: int, width: int):
    """Told to write no branches for patterns: the groups are computed and multiplied, the same outputs come.

    So they do where channels of zeros fill a block up, and something is added to closed ones instead.
    """
    network = gated_by_pixels(own=True, groups=True)
    plain = conditional(network)
    x = opening(network, [[bool(row >> place & 1) for place in range(4)] for row in range(16)])
    path = export_conditional(plain, tmp_path / "network.onnx", x, branches=1, block=block)
    run = load(path)
    torch.testing.assert_close(torch.cat([run(row[None]) for row in x]), reference(network, x)[0], rtol=1e-4, atol=1e-5)
    model = onnx.load(path)
    kinds = Counter(node.op_type for node in operators(model.graph))
    assert (kinds["If"], kinds["Conv"], kinds["Resize"]) == ((1, 3, 1) if block else (1, 2, 0))
    [branch] = [
        attribute.g
        for node in model.graph.node
        for attribute in node.attribute
        if b"Conv" in attribute.g.SerializeToString()
    ]
    shapes = [weight.dims for weight in branch.initializer if list(weight.dims[2:]) == [3, 3]]
    assert shapes == [[width, CHANNELS, 3, 3], [CHANNELS, width, 3, 3]]


@pytest.mark.parametrize("always_open", [0, 1])
def test_wide_groups_are_added_up(tmp_path, always_open: int):
    """Told that groups of 2 channels are wide: a branch for each, which is run for those that open it."""
    gate = ChannelGate(6, 2, always_open=always_open)
    module = GatedSequential(conv(CHANNELS, 6), nn.BatchNorm2d(6), nn.ReLU(), gate, conv(6, CHANNELS))
    edges = [
        Edge(start="x", end="a", module=module, name="groups", fixed=True, gate=Pixels),
        Edge(start="x", end="a", module=nn.Identity(), name="skip", fixed=True),
        Edge(start="a", end="y", module=classifier(), name="last", fixed=True),
    ]
    network = stir(SuperNetwork(edges, input_shape=(CHANNELS, SIDE, SIDE)), 0).eval()
    bits = [[bool(row >> place & 1) for place in range(3 - always_open)] for row in range(8)]
    x = opening(network, bits)
    path = export_conditional(conditional(network), tmp_path / "network.onnx", x, branches=1, wide=2)
    run, expected = load(path), reference(network, x)[0]
    for row, is_open in enumerate(bits):
        torch.testing.assert_close(run(x[row : row + 1]), expected[row : row + 1], rtol=1e-4, atol=1e-5)
        assert run_counts(path, x[row : row + 1])["Conv"] == 2 * (sum(is_open) + always_open)


@pytest.mark.parametrize(
    ("kind", "seed", "options"),
    [
        ("both", 3, {}),
        ("mixed", 2, {}),
        ("exits", 1, {}),
        ("locked exits", 0, {}),
        ("both", 1, {"block": 4}),
        ("mixed", 0, {"block": 8, "branches": 1}),
    ],
)
def test_any_network_is_exported(tmp_path, kind: str, seed: int, options: dict[str, int]):
    network = any_network(kind, seed, nodes=3, extra=2)
    x = images(network, 6, seed)
    run = load(export_conditional(conditional(network), tmp_path / "network.onnx", x[:1], **options))
    expected = reference(network, x)[0]
    scale = max(1.0, float(expected.abs().max()))
    output = torch.cat([run(row[None]) for row in x])
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-4 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"block": 4}, {"block": 8, "branches": 1, "wide": 99}])
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", KINDS)
def test_many_networks_are_exported(tmp_path, kind: str, seed: int, options: dict[str, int]):
    test_any_network_is_exported(tmp_path, kind, seed, options)


class Fickle(nn.Module):
    """A layer with a branch that no exporter can follow."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_what_cannot_be_exported_is_said_in_one_line_and_leaves_the_old_file(tmp_path, monkeypatch):
    edges = [
        Edge(start="x", end="a", module=nn.Identity(), name="skip", fixed=True),
        Edge(start="x", end="a", module=nn.Tanh(), name="layer", gate=Pixels),
        Edge(start="a", end="y", module=nn.Flatten(), name="last", fixed=True),
    ]
    network = SuperNetwork(edges, input_shape=(1, 2, 2)).eval()
    plain = conditional(network)
    x = images(network, 2)
    path = tmp_path / "network.onnx"
    export_conditional(plain, path, x)
    before = path.read_bytes()
    network.modules_on_edges[1] = Fickle()
    with pytest.raises(ConfigError, match=r"^a layer cannot be written to ONNX: .*$"):
        export_conditional(conditional(network), path, x)
    with pytest.raises(
        ConfigError, match=r"^a network whose gates look at the input is .* a \.onnx file, got 'n\.pt2'$"
    ):
        export_conditional(plain, tmp_path / "n.pt2", x)
    with pytest.raises(ConfigError, match="takes an example or more, got none"):
        export_conditional(plain, path, x[:0])
    with pytest.raises(ConfigError, match=r"expected examples \(B, 1, 2, 2\), got \(1, 1, 2, 3\)"):
        export_conditional(plain, path, torch.zeros(1, 1, 2, 3))
    # a file that is not what the network is
    monkeypatch.setattr("budgetnet.conditional.onnx.load", lambda path: lambda x: torch.zeros_like(plain(x)))
    with pytest.raises(ConfigError, match=r"the exported network must give the network's outputs, got .* apart"):
        export_conditional(plain, path, x)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["network.onnx"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tau": 1.5}, r"tau must lie in \[0, 1\], got 1.5"),
        ({"constants": torch.ones(1, 2)}, r"constants must be \(2,\) of 0, 1 or NaN, got \(1, 2\)"),
        ({"constants": torch.tensor([0.5, 1.0])}, r"constants must be \(2,\) of 0, 1 or NaN"),
        ({"constants": torch.zeros(2)}, "must leave a path from input to output, got none"),
    ],
)
def test_requests_that_do_not_fit_the_network(arguments: dict[str, Any], message: str):
    edges = [
        Edge(start="x", end="a", module=nn.Identity(), name="alone"),
        Edge(start="x", end="a", module=conv(CHANNELS, CHANNELS), name="looks", gate=Pixels),
        Edge(start="a", end="y", module=classifier(), name="last", fixed=True),
    ]
    network = SuperNetwork(edges, input_shape=(CHANNELS, SIDE, SIDE)).eval()
    with pytest.raises(ConfigError, match=message):
        conditional(network, **arguments)


@pytest.mark.parametrize("batch", [1, 4])
def test_examples_are_run_in_bfloat16_too(batch: int):
    network = undecided(stir(spaces.resnet(depth=8, channels=8, conditional=True), 1), 1).eval()
    plain = conditional(network)
    x = images(network, batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert plain(x).shape == (batch, 10)
    assert plain(x).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half, torch.double])
@pytest.mark.parametrize("batch", [1, 16])
def test_exits_that_answer_first_run_in_any_float_type(dtype: torch.dtype, batch: int):
    torch.manual_seed(0)
    network = spaces.densenet_exits(depth=10, growth=4, image_size=8, exit_channels=4)
    for head in network.heads.values():
        nn.init.normal_(head.decide.weight)
        head.reset(0.0)
    reference(network, images(network, 64, 99))
    network.eval()
    x, plain = images(network, batch).to(dtype), conditional(network).to(dtype)
    expected, decisions = reference(network.to(dtype), x)
    output, kept = plain.decide(x)
    assert output.dtype == plain(x).dtype == expected.dtype == dtype
    alike = (kept == decisions).all(dim=1)  # a gate at its threshold may be rounded to either side
    assert alike.float().mean() > 0.8
    close = {} if dtype == torch.double else {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(output[alike], expected[alike], **close)


def test_inputs_and_tables_that_do_not_fit_the_network():
    network = gated_by_pixels(own=True, groups=False)
    plain = conditional(network)
    for call in (plain, plain.decide, plain.tune):
        with pytest.raises(ConfigError, match=r"expected examples \(B, 6, 6, 6\), got \(2, 3, 6, 6\)"):
            call(torch.zeros(2, 3, 6, 6))
    with pytest.raises(ConfigError, match="tuning takes an example and repeats >= 1, got 1 and 0"):
        plain.tune(images(network, 1), repeats=0)
    with pytest.raises(ConfigError, match="edges with gates are branch0, got 'last'"):
        plain.table = {"last": {}}
    with pytest.raises(ConfigError, match="rows, row_cost, channels, channel_cost for each batch size"):
        plain.table = {"branch0": {"1": {"rows": 1.0}}}
    with pytest.raises(ConfigError, match=r"margin must lie in \[0, 0.5\), got 0.5"):
        polarised(torch.ones(1), 0.5)
    with pytest.raises(ConfigError, match=r"rates must lie in \[0, 1\]"):
        polarised(torch.tensor([0.5, math.nan]))


@pytest.mark.parametrize("name", ["resnet", "mobilenet_v2", "densenet_exits"])
def test_the_spaces_skip_and_give_the_same(name: str):
    options: dict[str, Any] = {
        "resnet": {"depth": 8, "channels": 8, "gates": "both", "granularity": 4, "memory": True},
        "mobilenet_v2": {"width": 0.1, "strides": "cifar", "image_size": 8, "gates": "channels", "where": "ends"},
        "densenet_exits": {"depth": 10, "growth": 4, "image_size": 8, "exit_channels": 4},
    }[name]
    network = spaces.BY_NAME[name](**options, conditional=True)
    network = undecided(stir(network, 1), 1).eval()
    plain = conditional(network)
    for batch in (1, 5):
        x = images(network, batch)
        expected, kept = reference(network, x)
        output, own = plain.decide(x)
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-4 * scale)
        torch.testing.assert_close(plain(x), expected, rtol=0, atol=1e-4 * scale)
        assert decided_alike(network, own, kept)


@pytest.mark.parametrize("count", [1, 16, 17, 80])
def test_a_head_holds_no_weight_but_those_of_its_gates_and_decides_one_as_many(count: int):
    """However many gates: each reads 16 features of its own, and some were closed for good."""
    gates = stir(ConditionalGates(CHANNELS, count), 0).eval()
    columns = [column for column in range(count) if column % 5 != 3]
    head = narrowed_head(gates, columns, count, tau=0.5)
    assert parameters(head) == len(columns) * (16 * (CHANNELS + 1) + 16 + 1)
    x = torch.randn(3, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = gates(x)[:, columns]
        torch.testing.assert_close(head(x), expected)
        assert head(x[:0]).shape == (0, len(columns))
        for row, values in zip(x, expected, strict=True):
            torch.testing.assert_close(torch.tensor(head.one(row[None])), values)
