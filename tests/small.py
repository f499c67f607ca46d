"""Small graphs and networks that several tests can enumerate."""

from __future__ import annotations

import copy
import importlib
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from random import Random
from types import ModuleType

import networkx as nx
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from budgetnet import Edge, Node, SuperNetwork
from budgetnet.graph import Graph


def import_torchvision() -> ModuleType:
    """Torchvision, without its compiled operators where these are for torch of another kind: no classifier has any."""
    while True:
        try:
            return importlib.import_module("torchvision")
        except RuntimeError as error:
            missing = re.fullmatch(r"operator (torchvision::\w+) does not exist", str(error))
            if missing is None:
                raise
            torch.library.define(missing[1], "() -> ()")


def random_graph(seed: int, nodes: int, extra: int) -> Graph:
    """A DAG whose nodes all lie on a path; `extra` edges more, parallel ones among them; indices in no order."""
    random = Random(seed)
    pairs = [(random.randrange(node), node) for node in range(1, nodes)]
    pairs += [(node, random.randrange(node + 1, nodes)) for node in range(nodes - 1) if node not in dict(pairs)]
    pairs += [tuple(sorted(random.sample(range(nodes), 2))) for _ in range(extra)]
    random.shuffle(pairs)
    place = random.sample(range(nodes), nodes)
    edges = tuple((place[start], place[end]) for start, end in pairs)
    return Graph(tuple(f"n{node}" for node in range(nodes)), edges, place[0], place[-1])


def graphs(nodes: int = 6, extra: int = 3) -> st.SearchStrategy[Graph]:
    """Random graphs of 2 to `nodes` nodes."""
    return st.builds(random_graph, st.integers(0, 2**32 - 1), st.integers(2, nodes), st.integers(0, extra))


def every(bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """All `(2**bits, bits)` rows of bits."""
    return torch.tensor(list(product((0, 1), repeat=bits)), dtype=dtype)


def reachable(graph: Graph, kept: Sequence[bool]) -> tuple[set[int], set[int]]:
    """Nodes the source reaches, and nodes that reach the sink, over kept edges, by networkx."""
    drawn = nx.MultiDiGraph()
    drawn.add_nodes_from(range(len(graph.nodes)))
    drawn.add_edges_from(edge for edge, bit in zip(graph.edges, kept, strict=True) if bit)
    return {graph.source} | nx.descendants(drawn, graph.source), {graph.sink} | nx.ancestors(drawn, graph.sink)


def slow_used(graph: Graph, kept: Sequence[bool]) -> list[bool]:
    """Kept edges between a node that is reached and one that reaches the sink."""
    ahead, behind = reachable(graph, kept)
    return [bool(bit) and a in ahead and b in behind for bit, (a, b) in zip(kept, graph.edges, strict=True)]


def network_on(
    graph: Graph, *, seed: int = 0, fixed: Sequence[int] = (), channels: int = 3, side: int = 4
) -> SuperNetwork:
    """Convolutions of several kinds on the edges of a graph, ReLU on its nodes, and a classifier behind its sink."""
    random = Random(seed)
    kinds = [
        lambda: nn.Conv2d(channels, channels, 1, bias=False),
        lambda: nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)),
        lambda: nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, groups=channels), nn.PReLU()),
        nn.Identity,
    ]
    edges = [
        Edge(start=graph.nodes[a], end=graph.nodes[b], module=random.choice(kinds)(), name=f"e{i}", fixed=i in fixed)
        for i, (a, b) in enumerate(graph.edges)
    ]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4))
    edges.append(Edge(start=graph.nodes[graph.sink], end="y", module=head, name="head", fixed=True))
    inner = [name for place, name in enumerate(graph.nodes) if place != graph.source]
    network = SuperNetwork(
        edges,
        input_shape=(channels, side, side),
        source=graph.nodes[graph.source],
        nodes=[Node(name=name, activation=nn.ReLU()) for name in inner],
    )
    return stir(network, seed)


def stir(network: SuperNetwork, seed: int) -> SuperNetwork:
    """The network with random weights and batch-norm statistics, so that nothing cancels or stays at its start."""
    generator = torch.Generator().manual_seed(seed)

    def normal(size: torch.Size) -> Tensor:
        return torch.randn(size, generator=generator)

    with torch.no_grad():
        for name, value in network.named_parameters():
            if name != "gates.values":
                value.copy_(normal(value.shape) / max(1, value[0].numel()) ** 0.5)
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.weight.copy_(1 + 0.3 * normal(part.weight.shape))
                part.running_mean.copy_(0.3 * normal(part.running_mean.shape))
                part.running_var.copy_((0.3 * normal(part.running_var.shape)).exp())
    return network


def unsettled(network: nn.Module, run: Callable[[nn.Module, Tensor], object], batches: Iterable[Tensor]) -> float:
    """How far batch norms that `run` passes are from the mean over batches of their inputs' mean and variance."""
    network = copy.deepcopy(network).train()
    kept = {name: value.clone() for name, value in network.named_buffers()}
    seen: dict[str, list[Tensor]] = defaultdict(list)
    for name, part in network.named_modules():
        if isinstance(part, nn.BatchNorm2d):

            def look(_: nn.Module, given: tuple[Tensor], name: str = name) -> None:
                rows = given[0].detach().transpose(0, 1).flatten(1)
                seen[name].append(torch.stack([rows.mean(dim=1), rows.var(dim=1)]))

            part.register_forward_pre_hook(look)
    with torch.no_grad():
        for x in batches:
            run(network, x)
    assert seen
    gaps = [
        torch.stack(own).mean(dim=0) - torch.stack([kept[f"{name}.running_mean"], kept[f"{name}.running_var"]])
        for name, own in seen.items()
    ]
    return max(float(gap.abs().max()) for gap in gaps)


def exact(network: SuperNetwork, seed: int) -> SuperNetwork:
    """The network in float64 with small whole numbers for weights: its sums do not round, in whatever order."""
    generator = torch.Generator().manual_seed(seed)
    network.double()
    with torch.no_grad():
        for value in (*network.parameters(), *network.buffers()):
            value.copy_(torch.randint(-1, 2, value.shape, generator=generator))
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eps = 0.0
                part.running_var.fill_(1)
                part.weight.fill_(1)
    return network


def connected(network: SuperNetwork, count: int, seed: int, probability: float = 0.6) -> Tensor:
    """`(count, G)` random architectures that connect input and output."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.zeros(0, network.gate_count)
    for _ in range(200):
        drawn = torch.bernoulli(torch.full((16 * count, network.gate_count), probability), generator=generator)
        found = torch.cat([found, drawn[network.connects(network.used(drawn))]])
        if len(found) >= count:
            return found[:count]
    raise AssertionError("no such architecture was drawn")
