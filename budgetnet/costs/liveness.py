"""Which values are alive when, in many architectures at once, while the extracted network runs in its order."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from budgetnet.costs.footprints import FLOAT, ChannelFootprint, Footprint, folded, footprint, footprints
from budgetnet.supernet import SuperNetwork


@dataclass(frozen=True)
class Live:
    """Bytes of values that are alive, in B architectures.

    Attributes:
        alive: `(P + 1, B)` of values computed before each of P places that are read there or later; at the end those
            of the output.
        beside: `(P, B)` of what comes into being at each place, at most at once; an operator that is not used has none.
    """

    alive: Tensor
    beside: Tensor

    @property
    def peak(self) -> Tensor:
        """`(B,)` most bytes alive at once."""
        return torch.cat([self.alive[:-1] + self.beside, self.alive[-1:]]).amax(dim=0)


class Liveness:
    """The places of a network in the order in which an extracted network runs, and what is alive at each.

    Node by node in `graph.order`, of each node edge by edge. An edge has three places: while the value that it reads
    is needed, afterwards, and where its output is added to what came before; a node has two, for its activation.

    Args:
        network: the space.

    Attributes:
        at: of each edge the first of its places.
        behind: of each node the first of its own places.
        places: P.
        size: bytes of each node's value.
    """

    def __init__(self, network: SuperNetwork) -> None:
        self.graph, self.stream_of = network.graph, network.stream_of
        self.edges = footprints(network)
        self.nodes = [
            footprint(folded(module), shape) for module, shape in zip(network.activations, network.shapes, strict=True)
        ]
        self.size = [float(FLOAT * prod(shape)) for shape in network.shapes]
        self.at, self.behind, self.places = [0] * len(self.edges), [0] * len(self.nodes), 0
        for node in self.graph.order[1:]:
            for edge in self.graph.incoming[node]:
                self.at[edge], self.places = self.places, self.places + 3
            self.behind[node], self.places = self.places, self.places + 2

    def __call__(self, used: Tensor) -> Live:
        """What is alive in `(B, U)` used units, float64; differentiable."""
        count, columns = len(used), used.t()
        on = columns.detach() > 0
        prints = [edge(used) if isinstance(edge, ChannelFootprint) else edge for edge in self.edges]
        none = torch.zeros(count, dtype=torch.float64)
        alive, beside = [], []
        held = {self.graph.source: none + self.size[self.graph.source]}
        for node in self.graph.order[1:]:
            size, own = self.bytes(node, used), self.node(node, used)
            partial, begun = none, torch.zeros(count, dtype=torch.bool)  # bytes of the sum so far, if it has begun
            for edge in self.graph.incoming[node]:
                here, part = columns[edge], prints[edge]
                alive += [partial, partial, partial + here * part.held]
                beside += [here * part.first, here * part.rest, torch.where(begun, here * size, none)]
                value = torch.where(begun, here * size, here * part.held)
                partial, begun = torch.where(on[edge], value, partial), begun | on[edge]
            entered = begun.to(none)
            alive += [partial, none]
            beside += [entered * own.first, entered * own.rest]
            held[node] = partial if own.passes else entered * own.held
        return Live(torch.stack([*alive, none]) + self._nodes(held, self._last(on, prints)), torch.stack(beside))

    def bytes(self, node: int, used: Tensor) -> Tensor:
        """`(B,)` bytes of a node's value where `(B, U)` float64 units are used."""
        stream, size = self.stream_of(node), torch.full((len(used),), self.size[node], dtype=torch.float64)
        return size if stream is None else size * stream.share(used)

    def node(self, node: int, used: Tensor) -> Footprint:
        """The footprint of a node's activation where `(B, U)` float64 units are used."""
        own, stream = self.nodes[node], self.stream_of(node)
        if stream is None:
            return own
        share = stream.share(used)
        return Footprint(own.first * share, own.rest * share, own.held * share, own.passes)

    def _nodes(self, held: dict[int, Tensor], last: dict[int, Tensor]) -> Tensor:
        """`(P + 1, B)` bytes of nodes' values that are alive at each place."""
        born = torch.tensor([self._born(node) for node in held])
        sizes, ends = torch.stack([held[node] for node in held]), torch.stack([last[node] for node in held])
        changes = torch.zeros(self.places + 2, sizes.shape[1], dtype=sizes.dtype)
        return changes.index_add(0, born, sizes).scatter_add(0, ends + 1, -sizes).cumsum(dim=0)[:-1]

    def _born(self, node: int) -> int:
        """The first place behind a node's own."""
        return 0 if node == self.graph.source else self.behind[node] + 2

    def _last(self, on: Tensor, prints: list[Footprint]) -> dict[int, Tensor]:
        """Of each node the `(B,)` last places at which its value is read, the one before its first where none does."""
        last: dict[int, Tensor] = {}
        for node in reversed(self.graph.order):
            found = torch.full(on.shape[1:], self._born(node) - 1)
            if node == self.graph.sink:
                found += 1
            for edge in self.graph.outgoing[node]:
                read, passes = torch.full_like(found, self.at[edge]), torch.as_tensor(prints[edge].passes)
                if bool(passes.any()):
                    read = torch.where(passes, self._passed(edge, on, last), read)
                found = torch.where(on[edge], torch.maximum(found, read), found)
            last[node] = found
        return last

    def _passed(self, edge: int, on: Tensor, last: dict[int, Tensor]) -> Tensor:
        """The `(B,)` places at which what an edge passes on is read last, as part of the sum that it enters."""
        node = self.graph.edges[edge][1]
        entering = self.graph.incoming[node]
        place = entering.index(edge)
        found = last[node] if self.nodes[node].passes else torch.full_like(last[node], self.behind[node])
        for other in reversed(entering[place + 1 :]):
            found = torch.where(on[other], self.at[other] + 2, found)
        begun = on[list(entering[:place])].any(dim=0)
        return torch.where(begun, self.at[edge] + 2, found)
