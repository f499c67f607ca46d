"""Costs that add up over what is used: MACs and parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from math import prod
from operator import add
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from budgetnet.costs.footprints import channel_table, least_open
from budgetnet.costs.model import CostModel
from budgetnet.errors import ConfigError
from budgetnet.gated import GatedSequential
from budgetnet.graph import Graph, both, either, opposite
from budgetnet.shapes import Shape, on_meta, once_a_kind, output_shape
from budgetnet.sites import ConditionalGates
from budgetnet.streams import Stream
from budgetnet.supernet import SuperNetwork


@dataclass(frozen=True, eq=False)
class ChannelCost:
    """Cost of an edge whose channels have gates: each layer's, by the channels that it reads and writes.

    `c(H) = sum_l w_l n_before(l)(H) n_behind(l)(H)`, n the number of open channels at a site

    Attributes:
        units: first unit of the edge's groups and the one behind the last.
        sizes: `(groups, S + 1)` channels that each group opens at each of the S sites; the last column is 0.
        weights: `(L,)` cost of each layer for one channel read and one written (or one of the two, or neither).
        before, behind: `(L,)` site of the channels it reads and writes; S where there is none.
        least: `(groups,)` 1 for the fewest groups with which the edge is not closed.

    Source: Herrmann et al., section 3.4; the exact product in place of the printed formula.
    """

    units: tuple[int, int]
    sizes: Tensor
    weights: Tensor
    before: Tensor
    behind: Tensor
    least: Tensor

    def __call__(self, used: Tensor) -> Tensor:
        """Maps `(B, U)` used units to the `(B,)` cost of this edge, where it is used; differentiable."""
        bits = used[:, slice(*self.units)].to(torch.float64)
        channels = bits @ self.sizes.to(bits.device)
        channels = torch.cat([channels[:, :-1], torch.ones_like(channels[:, :1])], dim=1)
        return (channels[:, self.before] * channels[:, self.behind]) @ self.weights.to(bits.device)


class EdgeInside(Protocol):
    """What stands in the place of an edge's cost where its channels have gates."""

    @property
    def units(self) -> tuple[int, int]:
        """First unit of the edge's groups and the one behind the last."""

    @property
    def least(self) -> Tensor:
        """`(groups,)` 1 for the fewest groups with which the edge is not closed."""

    def __call__(self, used: Tensor) -> Tensor:
        """Maps `(B, U)` used units to the `(B,)` cost of this edge, where it is used; differentiable."""


@dataclass(frozen=True, eq=False)
class EdgeCost(CostModel):
    """Sum over used edges, over the additions where they meet, and over the activations behind them.

    `C(H) = sum_e used_e(H) c_e(H) + sum_n max(0, inputs_n(H) - 1) a_n + sum_n alive_n(H) b_n`

    Attributes:
        graph: the E edges and N nodes being priced.
        per_edge: `(E,)` float64 cost of one forward pass on one example, all channels open, in `unit`.
        per_addition: `(N,)` float64 cost of adding one more input into each node.
        per_node: `(N,)` float64 cost of each node's activation, paid where anything enters.
        unit: what the numbers count: "MAC", "parameter".
        channels: of the edges whose channels have gates, the cost in their place.
        per_head: for edges with gates that look at the input, what it costs to decide, paid where the
            edge's start is reached, and left by no exit before.
        answers: of those, the exits that answer before they are decided on, and so cost as much where they are
            not taken.
        exits: edges that are exits, those of one node in the order in which they are decided, and for each
            the edges behind it.
        streams: whose nodes' additions and activations cost the share of the channels that they hold.
    """

    graph: Graph
    per_edge: Tensor
    per_addition: Tensor
    per_node: Tensor
    unit: str
    channels: Mapping[int, EdgeInside] = field(default_factory=dict)
    per_head: Mapping[int, float] = field(default_factory=dict)
    answers: Collection[int] = ()
    exits: Mapping[int, Sequence[int]] = field(default_factory=dict)
    streams: Sequence[Stream] = ()

    def decided(self) -> EdgeCost:
        """The same cost of what is extracted, which has nothing left to decide."""
        return replace(self, per_head={})

    def __call__(self, used: Tensor) -> Tensor:
        """Maps `(B, U)` used units, bits or in [0, 1], to `(B,)` float64 costs in `unit`, differentiably."""
        ends = torch.tensor([end for _, end in self.graph.edges])
        columns = used[:, : len(ends)].t().contiguous()  # (E, B): bits stay bits until they are weighed
        plain = self.per_edge.clone()
        plain[list(self.channels)] = 0
        narrow = [node for stream in self.streams for node in stream.nodes]
        by_addition, by_node = self.per_addition.clone(), self.per_node - self.per_addition
        by_addition[narrow] = by_node[narrow] = 0
        # every used input pays its addition, then each live node gets its first one back
        cost = weigh(plain + by_addition[ends], columns)
        for edge, inside in self.channels.items():
            cost = cost + columns[edge] * inside(used)
        for stream in self.streams:
            cost = cost + stream.share(used) * self._at_nodes(columns, sorted(stream.nodes))
        if by_node.any():
            entered = [node for node, entering in enumerate(self.graph.incoming) if entering]
            alive = [self._alive(columns, node) for node in entered]
            cost = cost + weigh(by_node[entered], torch.stack(alive))
        for edge, head in self.per_head.items():
            asked = self._alive(columns, self.graph.edges[edge][0])
            for exit in self._exits_before(edge):
                asked = both(asked, opposite(columns[exit])) if columns.dtype == torch.bool else asked - columns[exit]
            cost = cost + head * asked
            if edge in self.answers:
                passed = both(asked, opposite(columns[edge])) if columns.dtype == torch.bool else asked - columns[edge]
                cost = cost + float(self.per_edge[edge]) * passed
        return cost

    def _at_nodes(self, columns: Tensor, nodes: Sequence[int]) -> Tensor:
        """What nodes' additions and activations cost with all their channels, `(B,)`."""
        entering = [edge for node in nodes for edge in self.graph.incoming[node]]
        ends = [self.graph.edges[edge][1] for edge in entering]
        alive = torch.stack([self._alive(columns, node) for node in nodes])
        return weigh(self.per_addition[ends], columns[entering]) + weigh(
            self.per_node[nodes] - self.per_addition[nodes], alive
        )

    def _alive(self, columns: Tensor, node: int) -> Tensor:
        """Whether anything enters a node, `(B,)`."""
        entering = self.graph.incoming[node]
        if not entering:
            return torch.ones_like(columns[0])
        if columns.requires_grad and self.exits:
            return self._alive_past_exits(columns, entering)
        return reduce(either, [columns[edge] for edge in entering])

    def _alive_past_exits(self, columns: Tensor, entering: Sequence[int]) -> Tensor:
        """The same, with the gradient of exits: one opens or closes all at once that enters a node behind it.

        Exits exclude each other, so that p, what none before has taken, is 1 less their sum; the edges used are
        p times those that would be used without them.
        """
        taken = [columns[edge] for edge in entering if edge in self.exits]
        rest = [edge for edge in entering if edge not in self.exits]
        if rest:
            before = [columns[exit] for exit, behind in self.exits.items() if rest[0] in behind]
            passed = 1 - reduce(add, before, torch.zeros_like(columns[0]))
            share = torch.where(passed > 0, passed, 1)
            inside = share * reduce(either, [columns[edge] / share for edge in rest])
            # where an exit is taken nothing is known of what would be used: all that is there, likely
            taken.append(torch.where(passed > 0, inside, columns[rest].mean(dim=0)))
        return reduce(add, taken)

    def _exits_before(self, edge: int) -> list[int]:
        """The exits of an edge's start that decide before its own gate."""
        start = self.graph.edges[edge][0]
        here = [exit for exit in self.exits if self.graph.edges[exit][0] == start]
        return here[: here.index(edge)] if edge in here else here

    def of_edges(self, used: Tensor) -> list[float]:
        """What each edge and the node it enters cost in an architecture, `(1, U)`, had they been used alone."""
        costs = self.per_edge + self.per_node[[end for _, end in self.graph.edges]]
        for edge, inside in self.channels.items():
            costs[edge] += float(inside(used)[0]) - self.per_edge[edge]
        for edge, head in self.per_head.items():
            costs[edge] += head
        return [float(cost) for cost in costs]

    @cached_property
    def along_path(self) -> list[float]:
        """What each edge and the node it enters cost at least on a path of their own, where nothing is added.

        The smallest network is such a path. It also pays for those gates that decide against other edges.
        """
        least = torch.zeros(1, max([len(self.graph.edges), *(inside.units[1] for inside in self.channels.values())]))
        for inside in self.channels.values():
            least[0, slice(*inside.units)] = inside.least
        costs = self.of_edges(least)
        for edge, (start, _) in enumerate(self.graph.edges):
            for other, head in self.per_head.items():
                if other != edge and self.graph.edges[other][0] == start and edge not in self._exits_before(other):
                    costs[edge] += head + (float(self.per_edge[other]) if other in self.answers else 0.0)
        return costs


@dataclass(frozen=True)
class MACs:
    """Multiply-adds of one forward pass on one example: convolutions, linear layers, and the sums at nodes.

    Nothing is counted for bias, normalisation, activation, pooling and upsampling.

    Attributes:
        counting: "true", or "paper": an upsampling convolution is charged at the resolution before
            upsampling, a quarter of its work, as in the tables of BSN.
        gates: count what gates that look at the input cost to decide (Herrmann et al., S1.4).
        additions: count the sums at nodes; the second paper does not.

    Source: BSN, section 4.1 ("computation cost"); docs/counting.md says which printed digits show this reading.
    """

    counting: str = "true"
    gates: bool = True
    additions: bool = True
    key: ClassVar[str] = "macs"
    unit: ClassVar[str] = "MAC"

    def __post_init__(self) -> None:
        if self.counting not in ("true", "paper"):
            raise ConfigError(f"macs are counted true or paper, got {self.counting!r}")

    def bind(self, network: SuperNetwork) -> EdgeCost:
        """The cost of this network's architectures."""

        def count(module: nn.Module, shape: Shape) -> int:
            macs = module_macs(module, shape)
            for part in module.modules() if self.counting == "paper" else ():
                if isinstance(part, nn.Upsample) and isinstance(part.scale_factor, int | float):
                    macs //= int(part.scale_factor) ** 2
            return macs

        additions = [prod(shape) * self.additions for shape in network.shapes]
        heads = {int(edge): self._head(network, int(edge)) for edge in network.heads} if self.gates else {}
        cost = edge_cost(network, count, self.unit, additions=additions, heads=heads)
        return replace(cost, streams=network.streams)

    @staticmethod
    def _head(network: SuperNetwork, edge: int) -> float:
        shape = network.gate_shape(edge)
        # the papers count the average pool too: height x width x channels (S1.4)
        pooled = prod(shape) if isinstance(network.heads[str(edge)], ConditionalGates) else 0
        return float(module_macs(network.heads[str(edge)], shape) + pooled)


@dataclass(frozen=True)
class Params:
    """Learned numbers of the extracted network: weights, biases and the batch norms' affine terms.

    Source: BSN, section 4.1 ("memory consumption cost"), Table 3.
    """

    key: ClassVar[str] = "params"
    unit: ClassVar[str] = "parameter"

    def bind(self, network: SuperNetwork) -> EdgeCost:
        """The cost of this network's architectures.

        Raises:
            ConfigError: gates look at the input: such a network holds all parameters, whatever an example uses.
        """
        decided_once("params", network)

        def count(module: nn.Module, shape: Shape) -> int:
            return sum(value.numel() for value in module.parameters())

        return edge_cost(network, count, self.unit)


def decided_once(cost: str, network: SuperNetwork) -> None:
    """Raises ConfigError where gates look at the input: the cost, by its name, is of what is extracted."""
    if network.heads:
        raise ConfigError(f"{cost} cannot be a cost where gates look at the input, as those of {network.name} do")


def edge_cost(
    network: SuperNetwork,
    count: Callable[[nn.Module, Shape], int],
    unit: str,
    *,
    additions: Sequence[int] = (),
    heads: Mapping[int, float] | None = None,
) -> EdgeCost:
    """The cost that adds up `count(module, shape of its input)` over what is used."""
    starts = [network.shapes[start] for start, _ in network.graph.edges]
    modules = list(network.modules_on_edges)
    return EdgeCost(
        network.graph,
        as_cost([count(module, shape) for module, shape in zip(modules, starts, strict=True)]),
        as_cost(list(additions) or [0] * len(network.graph.nodes)),
        # an activation keeps the shape it is given
        as_cost([count(module, shape) for module, shape in zip(network.activations, network.shapes, strict=True)]),
        unit,
        {
            edge: channel_cost(module, network, edge, count)
            for edge, module in enumerate(modules)
            if isinstance(module, GatedSequential) and module.sites
        },
        heads or {},
        network.answers if heads else (),
        network.behind,
    )


def channel_cost(
    module: GatedSequential, network: SuperNetwork, edge: int, count: Callable[[nn.Module, Shape], int]
) -> ChannelCost:
    """The cost of an edge by its open channels.

    Each layer's count is shared among the channels it reads times those it writes; what it has once for each
    channel that it writes, such as a bias, is a count of its own.
    """
    none = len(module.sites)
    terms: list[tuple[float, int, int]] = [(0.0, none, none)]  # for a sequence of gates alone
    shape = network.shapes[network.graph.edges[edge][0]]
    full, parts = count(module, shape), 0
    for layer in module.layout:
        part = module[layer.index]
        before = none if layer.before is None or not layer.mixes else layer.before
        behind = none if layer.behind is None else layer.behind
        whole = count(part, shape)
        single = bias_count(part, count, shape) if layer.mixes and (before, behind) != (none, none) else 0
        share = (
            1 if before == none else module.sites[before].channels,
            1 if behind == none else module.sites[behind].channels,
        )
        terms.append(((whole - single) / prod(share), before, behind))
        terms.append((single / share[1], none, behind))
        parts += whole
        shape = output_shape(part, shape, network.edge_names[edge])
    weights, reads, writes = zip(*terms, strict=True)
    return ChannelCost(
        network.span(edge),
        channel_table(module),
        torch.tensor(weights, dtype=torch.float64) * (full / parts if parts else 1),  # "paper" counts the whole as less
        torch.tensor(reads),
        torch.tensor(writes),
        torch.cat([least_open(site) for site in module.sites]),
    )


def bias_count(layer: nn.Module, count: Callable[[nn.Module, Shape], int], shape: Shape) -> int:
    """What a layer's bias counts."""
    if getattr(layer, "bias", None) is None:
        return 0
    without = copy.deepcopy(layer)
    without.register_parameter("bias", None)
    return count(layer, shape) - count(without, shape)


_macs: dict[tuple[str, Shape], int] = {}


def module_macs(module: nn.Module, shape: Shape) -> int:
    """MACs of one forward pass on one example of `shape`, counted by torch on the meta device."""

    def counted() -> int:
        counter = FlopCounterMode(display=False)
        with counter:
            on_meta(module, (1, *shape))
        return int(counter.get_total_flops()) // 2  # torch counts a multiply-add as two

    return once_a_kind(_macs, module, shape, counted)


def weigh(weights: Tensor, columns: Tensor) -> Tensor:
    """`(n,)` weights of `(n, B)` columns, summed to `(B,)` float64."""
    return weights.to(columns.device) @ columns.to(torch.float64)


def as_cost(values: list[int]) -> Tensor:
    """Whole numbers as float64, exact up to 2**53."""
    return torch.tensor(values, dtype=torch.float64)
