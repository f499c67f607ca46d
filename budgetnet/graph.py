"""The DAG on integers: who feeds whom, in which order, and which kept edges lie on a path from input to output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from budgetnet.errors import GraphError


@dataclass(frozen=True)
class Graph:
    """A directed acyclic multigraph with one source and one sink, E edges between N nodes.

    Several edges may join the same two nodes: each is a module of its own.

    Attributes:
        nodes: N names, each once; an index into it is what `edges`, `source` and `sink` hold.
        edges: E pairs `(from, to)` of node indices.
        source: the node that holds the input.
        sink: the node that holds the output.

    Raises:
        GraphError: an index is out of range, there is a cycle, another source or sink, or a node
            that lies on no path from source to sink.

    Source: Véniat and Denoyer (Budgeted Super Networks), section 2.
    """

    nodes: tuple[str, ...]
    edges: tuple[tuple[int, int], ...]
    source: int
    sink: int

    def __post_init__(self) -> None:
        count = len(self.nodes)
        for index in (self.source, self.sink, *(end for edge in self.edges for end in edge)):
            if not 0 <= index < count:
                raise GraphError(f"a node index must lie in 0..{count - 1}, got {index}")
        name = self.nodes
        if self.source == self.sink:
            raise GraphError(f"input and output must be two nodes, got {name[self.source]!r} for both")
        if len(set(name)) < count:
            raise GraphError(f"node names must differ, got {', '.join(name)}")
        _ = self.order  # raises where there is a cycle
        for node in range(count):
            entered, left = bool(self.incoming[node]), bool(self.outgoing[node])
            if node == self.source and entered:
                raise GraphError(f"nothing may enter the input {name[node]!r}")
            if node == self.sink and left:
                raise GraphError(f"nothing may leave the output {name[node]!r}")
            if node not in (self.source, self.sink) and not (entered and left):
                lacks = "enters" if not entered else "leaves"
                raise GraphError(
                    f"{name[node]!r} lies on no path from {name[self.source]!r} to {name[self.sink]!r}: "
                    f"nothing {lacks} it, and a graph has one source and one sink"
                )
            if node == self.source and not left:
                raise GraphError(f"nothing leaves the input {name[node]!r}")
            if node == self.sink and not entered:
                raise GraphError(f"nothing enters the output {name[node]!r}")

    @cached_property
    def incoming(self) -> tuple[tuple[int, ...], ...]:
        """For each node the indices of the edges that enter it, in edge order."""
        return self._edges_by(1)

    @cached_property
    def outgoing(self) -> tuple[tuple[int, ...], ...]:
        """For each node the indices of the edges that leave it, in edge order."""
        return self._edges_by(0)

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The nodes, each after all that feed it; the source first, the sink last."""
        successors = [[self.edges[index][1] for index in leaving] for leaving in self.outgoing]
        return topological_order(len(self.nodes), successors, names=self.nodes)

    def fitting_path(self, weights: Sequence[Sequence[float]], limits: Sequence[float]) -> tuple[int, ...] | None:
        """Indices of the edges on a path from source to sink that keeps several limits at once.

        Every partial path that no other beats in all weights is followed on, so None means that there
        is no such path: the search is exact.

        Args:
            weights: for each of k costs what each edge adds to it, (k, E), >= 0.
            limits: k largest sums.
        """
        partial: dict[int, list[tuple[tuple[float, ...], tuple[int, ...]]]] = {
            self.source: [((0.0,) * len(limits), ())]
        }
        for node in self.order[1:]:
            found: list[tuple[tuple[float, ...], tuple[int, ...]]] = []
            for index in self.incoming[node]:
                for sums, path in partial.get(self.edges[index][0], ()):
                    total = tuple(a + costs[index] for a, costs in zip(sums, weights, strict=True))
                    if all(a <= limit for a, limit in zip(total, limits, strict=True)):
                        found.append((total, (*path, index)))
            kept: list[tuple[tuple[float, ...], tuple[int, ...]]] = []
            for total, path in sorted(found):  # in this order nothing later beats what is kept already
                if not any(all(a <= b for a, b in zip(other, total, strict=True)) for other, _ in kept):
                    kept.append((total, path))
            partial[node] = kept
        ends = partial[self.sink]
        return min(ends)[1] if ends else None

    def _edges_by(self, end: int) -> tuple[tuple[int, ...], ...]:
        lists: list[list[int]] = [[] for _ in self.nodes]
        for index, edge in enumerate(self.edges):
            lists[edge[end]].append(index)
        return tuple(map(tuple, lists))

    def relevant(self, kept: Tensor, ahead: Tensor | None = None) -> Tensor:
        """Edges whose decision could change the network that the other decisions leave.

        An edge is relevant when its start is reached from the source and the sink is reached from
        its end. Neither depends on the edge's own bit, so a score function may leave out every
        other decision and stay unbiased.

        Args:
            kept: `(B, E)` edges kept by B architectures, bool, or float in [0, 1]; with floats
                each "or" is `1 - (1 - a)(1 - b)`: exact on 0 and 1, multilinear in the inputs of
                each node, differentiable.
            ahead: `(B, E)` edges over which the sink is looked for, None for those kept.

        Returns:
            `(B, E)` of the same type.
        """
        columns = kept.t().contiguous()  # (E, B): an edge is one contiguous row
        onward = columns if ahead is None else ahead.t().contiguous()
        one, zero = torch.ones_like(columns[0]), torch.zeros_like(columns[0])
        forward = [zero] * len(self.nodes)
        backward = [zero] * len(self.nodes)
        forward[self.source], backward[self.sink] = one, one
        for node in self.order:
            for index in self.incoming[node]:
                forward[node] = either(forward[node], both(columns[index], forward[self.edges[index][0]]))
        for node in reversed(self.order):
            for index in self.outgoing[node]:
                backward[node] = either(backward[node], both(onward[index], backward[self.edges[index][1]]))
        return torch.stack([both(forward[start], backward[end]) for start, end in self.edges], dim=1)

    def used(self, kept: Tensor, ahead: Tensor | None = None) -> Tensor:
        """Kept edges that lie on a live path from source to sink, `(B, E)`: what the cost is charged for.

        Behind them the path may go over the edges `ahead`, as in `relevant`.
        """
        return both(kept, self.relevant(kept, ahead))

    def cheapest_to(self, weights: Sequence[float]) -> dict[int, tuple[float, tuple[int, ...]]]:
        """For each node the least sum of `weights` (E, >= 0) over a path from the source, and that path's edges."""
        best: dict[int, tuple[float, tuple[int, ...]]] = {self.source: (0.0, ())}
        for node in self.order:
            for index in self.incoming[node]:
                value, path = best[self.edges[index][0]]
                if node not in best or value + weights[index] < best[node][0]:
                    best[node] = (value + weights[index], (*path, index))
        return best

    def cheapest_path(self, weights: Sequence[float]) -> tuple[int, ...]:
        """Indices of the edges on a path from source to sink of the least sum of `weights` (E, >= 0)."""
        return self.cheapest_to(weights)[self.sink][1]

    def cheapest_through(self, weights: Sequence[float]) -> list[tuple[int, ...]]:
        """For each edge a path from source to sink that takes it, of the least sum of `weights` (E, >= 0)."""
        ahead = self.cheapest_to(weights)
        behind: dict[int, tuple[float, tuple[int, ...]]] = {self.sink: (0.0, ())}
        for node in reversed(self.order):
            for index in self.outgoing[node]:
                value, path = behind[self.edges[index][1]]
                if node not in behind or value + weights[index] < behind[node][0]:
                    behind[node] = (value + weights[index], (index, *path))
        return [(*ahead[start][1], index, *behind[end][1]) for index, (start, end) in enumerate(self.edges)]


def topological_order(count: int, successors: Sequence[Sequence[int]], names: Sequence[str] = ()) -> tuple[int, ...]:
    """Nodes 0..count-1 so that each comes before its successors: reversed post-order of a depth-first search.

    The search starts from the nodes in index order and visits the last successor first. The order
    is part of the method: the papers' step counts on several workers are those of list scheduling
    in just this order (docs/counting.md).

    Raises:
        GraphError: there is a cycle.
    """
    finished: list[int] = []
    state = ["new"] * count
    for root in range(count):
        stack = [root]
        while stack:
            node = stack[-1]
            if state[node] == "done":
                stack.pop()
                continue
            state[node] = "open"
            ahead = []
            for successor in successors[node]:
                if state[successor] == "open":
                    name = names[successor] if names else successor
                    raise GraphError(f"the graph must have no cycle, but {name!r} leads back to itself")
                if state[successor] == "new":
                    ahead.append(successor)
            if ahead:
                stack.extend(ahead)
            else:
                state[node] = "done"
                finished.append(node)
                stack.pop()
    return tuple(reversed(finished))


def both(a: Tensor, b: Tensor) -> Tensor:
    """Logical and of bits: a product."""
    return a & b if a.dtype == torch.bool else a * b


def opposite(a: Tensor) -> Tensor:
    """Logical not of bits: on floats `1 - a`."""
    return ~a if a.dtype == torch.bool else 1 - a


def either(a: Tensor, b: Tensor) -> Tensor:
    """Logical or of bits: on floats `a + b - ab`."""
    return a | b if a.dtype == torch.bool else a + b - a * b


def positions(graph: Graph, given: Sequence[tuple[float, float] | None]) -> tuple[tuple[float, float], ...]:
    """Where each node is drawn: as given, else at its depth, one row below the node drawn there before."""
    depth = dict.fromkeys(range(len(given)), 0)
    for node in graph.order:
        for edge in graph.incoming[node]:
            depth[node] = max(depth[node], depth[graph.edges[edge][0]] + 1)
    rows: dict[int, int] = {}
    places = []
    for node, place in enumerate(given):
        if place is None:
            row = rows.setdefault(depth[node], 0)
            rows[depth[node]] += 1
            places.append((float(depth[node]), float(row)))
        else:
            places.append((float(place[0]), float(place[1])))
    return tuple(places)
