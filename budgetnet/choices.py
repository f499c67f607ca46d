"""What can be kept in a network with choices, and what of it matters: tables of bits, without a module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import reduce

import torch
from torch import Tensor

from budgetnet.errors import ConfigError, GraphError
from budgetnet.graph import Graph, both, opposite
from budgetnet.streams import Stream


@dataclass(frozen=True)
class Site:
    """A channel gate's place among the units of a network.

    Attributes:
        edge: whose module it is in.
        name: of the gate.
        units: first unit and the one behind the last.
        always_open: groups, the first ones, that are always kept.
        sizes: channels of each group.
        lock: name of the gates it shares, None for its own.
    """

    edge: int
    name: str
    units: tuple[int, int]
    always_open: int
    sizes: tuple[int, ...]
    lock: str | None

    @property
    def groups(self) -> int:
        """Number of groups."""
        return self.units[1] - self.units[0]


class Choices:
    """The units of a network with choices, and the gates that decide on them.

    *Units* are its E edges, then the groups of its channels, edge by edge, site by site: U together. The G gates are
    *columns*: first those that do not look at the input (the edges' own, then the groups'), then the
    conditional ones in the order in which edges are run.

    Attributes:
        name: of the space.
        graph: its E edges.
        edge_names: of each edge.
        fixed: whether each edge is always kept.
        exits: edges whose taker passes along nothing behind their node.
        visits: the edges in the order in which they are run.
        sites: the channel gates.
        units: U.
        gate_of: for each of the U units the column of its gate, None where it is always kept.
        leaders: of edges whose gates look at the input and are locked to those of an earlier edge: that edge, which
            decides for them.
        independent: columns of gates that do not look at the input; they come first.
        gate_count: G.
        behind: for each exit the edges that what takes it does not pass along; a node's exits have an order.
        streams: nodes that hold only the channels that their edges open.
    """

    name: str
    graph: Graph
    edge_names: tuple[str, ...]
    fixed: tuple[bool, ...]
    exits: tuple[int, ...]
    visits: tuple[int, ...]
    sites: tuple[Site, ...]
    units: int
    gate_of: tuple[int | None, ...]
    leaders: dict[int, int]
    independent: int
    gate_count: int
    behind: dict[int, list[int]]
    streams: tuple[Stream, ...]
    _named: dict[str, Tensor]

    def _arrange(self, conditional: Collection[int]) -> None:
        """Numbers the units and their gates; `conditional` edges have gates that look at the input."""
        self.units = len(self.graph.edges) + sum(site.groups for site in self.sites)
        self.leaders = self._leaders(set(conditional))
        self.gate_of, self.independent = self._columns(set(conditional))
        self.gate_count = 1 + max((column for column in self.gate_of if column is not None), default=-1)
        self._gated = [unit for unit, column in enumerate(self.gate_of) if column is not None]
        self._owners = [column for column in self.gate_of if column is not None]
        self._by_input = sorted(conditional)
        self._shared = [column for column, count in Counter(self._owners).items() if count > 1]
        self._check_exits()
        self.behind = {edge: self._behind(edge) for edge in self.exits}

    def own_columns(self, edge: int) -> list[int]:
        """Columns of the gates on an edge and on its channels, each once."""
        places = [edge, *range(*self.span(edge))]
        return list(dict.fromkeys(column for unit in places if (column := self.gate_of[unit]) is not None))

    def columns_named(self, pattern: str) -> list[int]:
        """Columns of the gates of each edge, or site "edge.site", of that name or that the pattern ("g0.*") fits."""
        places = {name: [edge, *range(*self.span(edge))] for edge, name in enumerate(self.edge_names)}
        places |= {f"{self.edge_names[site.edge]}.{site.name}": list(range(*site.units)) for site in self.sites}
        units = {unit for name, own in places.items() if name == pattern or fnmatchcase(name, pattern) for unit in own}
        return sorted({column for unit in units if (column := self.gate_of[unit]) is not None})

    @property
    def choices(self) -> tuple[int, ...]:
        """The edges that have a gate of their own."""
        return tuple(edge for edge in range(len(self.graph.edges)) if self.gate_of[edge] is not None)

    def unit_names(self) -> list[str]:
        """A name for each of the U units: "edge", "edge.site[3]"."""
        groups = [f"{self.edge_names[site.edge]}.{site.name}[{i}]" for site in self.sites for i in range(site.groups)]
        return [*self.edge_names, *groups]

    def decisions(self, kept: Tensor) -> Tensor:
        """`(K, G)` decisions of the gates to `(K, U)` of the units: what has no gate is kept.

        Where an exit is taken no edge behind it is.
        """
        whole = self._placed(kept)
        if not self.exits:
            return whole
        edges = len(self.graph.edges)
        return torch.cat([both(whole[:, :edges], self._passed_by(whole)), whole[:, edges:]], dim=1)

    def gates_of(self, units: Tensor) -> Tensor:
        """`(K, U)` bits of the units to `(K, G)` of the gates: one of several units is on where any of them is."""
        on = units.new_zeros(len(units), self.gate_count)
        columns = torch.tensor(self._owners, dtype=torch.int64, device=units.device)
        return on.index_add_(1, columns, units[:, self._gated]).clamp_(max=1)

    def _placed(self, kept: Tensor) -> Tensor:
        """`(K, G)` decisions to the `(K, U)` units they are of, whatever exits are taken."""
        if kept.ndim != 2 or kept.shape[1] != self.gate_count:
            raise ConfigError(f"an architecture of {self.name} is (K, {self.gate_count}), got {tuple(kept.shape)}")
        whole = kept.new_ones(len(kept), self.units)
        in_order = self._owners == list(range(self.gate_count))  # as where edges alone have gates: nothing to gather
        whole[:, self._gated] = kept if in_order else kept[:, self._owners]
        return whole

    def _passed_by(self, whole: Tensor) -> Tensor:
        """Whether no exit before an edge is taken, `(K, U)` to `(K, E)`; one that is closed inside is not taken."""
        alive = self._alive(whole)
        passed = torch.ones_like(alive)
        for edge, behind in self.behind.items():
            passed[:, behind] = both(passed[:, behind], opposite(alive[:, [edge]]).expand(-1, len(behind)))
        return passed

    def used(self, kept: Tensor) -> Tensor:
        """What is computed, and what a cost is charged for, `(K, G)` to `(K, U)`.

        Edges: kept, on a live path, and no site of theirs closed altogether. Groups: as kept, but for channels of a
        `Stream` that only one side opens; they count where their edge is used. An edge is also used where nothing but
        gates that look at the input cut it from the output: these decide once it has been run.
        """
        whole = self.decisions(kept)
        alive = self._alive(whole)
        live = self.graph.used(alive, self._ahead(alive))
        return live if not self.sites else self._in_streams(torch.cat([live, whole[:, len(self.graph.edges) :]], dim=1))

    def connects(self, used: Tensor) -> Tensor:
        """Whether `(K, U)` used units connect input and output, `(K,)` bool."""
        return used[:, list(self.graph.incoming[self.graph.sink])].bool().any(dim=1)

    def relevant(self, kept: Tensor) -> Tensor:
        """Gates whose decision was taken and could matter, `(K, G)` to `(K, G)`; see `Graph.relevant`.

        None depends on its own gate's decision. A gate shared by several sites counts always.
        """
        placed = self._placed(kept)
        edges, groups = self._relevant(self.decisions(kept))
        if self.exits:
            edges = both(edges, self._passed_by(placed))
        units = torch.cat([edges, *groups], dim=1)
        counted = units.new_zeros(len(kept), self.gate_count)
        counted[:, self._owners] = units[:, self._gated]
        counted[:, self._shared] = 1
        return counted

    def pathwise(self, kept: Tensor) -> Tensor:
        """`used` of `(K, G)` decisions that carry a gradient, `(K, U)` with a gradient to them.

        The value is that of `used` where decisions are in {0, 1}; a dropped edge that could matter has a
        gradient too, so that it can come back. What is behind an exit pulls at its gate.
        """
        whole = self._placed(kept)
        bits = (whole.detach() > 0).to(whole)
        alive, (could, _) = self._alive(bits), self._relevant(bits)
        hard = self.graph.used(alive, self._ahead(alive))
        edges = len(self.graph.edges)
        own = whole[:, :edges]
        live = hard * own + (could - hard) * (own - own.detach())
        if self.exits:
            live = live * self._passed_by(whole)
        return self._in_streams(torch.cat([live, whole[:, edges:]], dim=1))

    def _in_streams(self, used: Tensor) -> Tensor:
        """Closes what streams make superfluous in `(K, U)`."""
        return reduce(lambda units, stream: stream.live(units), self.streams, used)

    def stream_of(self, node: int) -> Stream | None:
        """The stream that a node is part of, if its channels may be fewer than its shape says."""
        return next((stream for stream in self.streams if node in stream.nodes), None)

    def of_edges(self, edges: Collection[int]) -> Tensor:
        """The smallest architecture that keeps just these edges of those that can be dropped, `(1, G)`.

        On each of them the smallest group of each site that would be closed altogether is open. An edge without
        a gate of its own is dropped by closing a site of it, where one can be.
        """
        kept = torch.zeros(1, self.gate_count)
        for unit in edges:
            if (column := self.gate_of[unit]) is not None:
                kept[0, column] = 1
        for site in self.sites:
            columns = [column for unit in range(*site.units) if (column := self.gate_of[unit]) is not None]
            if site.edge in edges and not site.always_open and not bool(kept[0, columns].any()):
                kept[0, columns[site.sizes.index(min(site.sizes))]] = 1
        return kept

    def architecture(self, name: str) -> Tensor:
        """The named sub-network as `(1, G)` bits: "full", with all but exits, or one of this space's own.

        Raises:
            ConfigError: there is no such name.
        """
        if name == "full":
            kept = torch.ones(1, self.gate_count)
            kept[:, [column for edge in self.exits if (column := self.gate_of[edge]) is not None]] = 0
            return kept
        if name not in self._named:
            raise ConfigError(f"architectures of {self.name} are {', '.join(self.architecture_names)}, got {name!r}")
        return self._named[name].clone()

    def ways(self) -> Tensor:
        """Everything kept, once for each exit in order and once past all of them, `(exits + 1, G)`."""
        kept = self.architecture("full").repeat(len(self.exits) + 1, 1)
        for place, edge in enumerate(edge for edge in self.visits if edge in self.exits):
            column = self.gate_of[edge]
            assert column is not None
            kept[place, column] = 1
        return kept

    @property
    def architecture_names(self) -> tuple[str, ...]:
        """What `architecture` knows."""
        return ("full", *self._named)

    def span(self, edge: int) -> tuple[int, int]:
        """The first unit of an edge's channel groups and the one behind the last; of an edge without any (0, 0)."""
        units = [unit for site in self.sites if site.edge == edge for unit in site.units]
        return (units[0], units[-1]) if units else (0, 0)

    def groups_of(self, edge: int, whole: Tensor) -> Tensor:
        """The columns of an edge's channel groups in `(K, U)`, `(K, groups)`."""
        return whole[:, slice(*self.span(edge))]

    def _alive(self, whole: Tensor) -> Tensor:
        """Kept edges none of whose sites is closed altogether, `(K, U)` to `(K, E)`."""
        edges = whole[:, : len(self.graph.edges)]
        if not self.sites:
            return edges
        closed = self._closed(whole)
        alive = edges.clone()
        for place, site in enumerate(self.sites):
            alive[:, site.edge] = both(alive[:, site.edge], (~closed[:, place]).to(whole.dtype))
        return alive

    def _ahead(self, alive: Tensor) -> Tensor | None:
        """`(K, E)` alive edges and all whose gates look at the input, None where there are none of these."""
        if not self._by_input:
            return None
        ahead = alive.clone()
        ahead[:, self._by_input] = 1
        return ahead

    def _closed(self, whole: Tensor) -> Tensor:
        """Whether each site is closed altogether, `(K, U)` to `(K, sites)` bool."""
        return torch.stack([~(whole[:, slice(*site.units)] > 0).any(dim=1) for site in self.sites], dim=1)

    def _relevant(self, whole: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Whether each unit could matter, given all others: of the edges `(K, E)`, of each site `(K, groups)`."""
        alive = self._alive(whole)
        could = self.graph.relevant(alive, self._ahead(alive))
        if not self.sites:
            return could, []
        closed = self._closed(whole)
        dead = closed.new_zeros(len(whole), len(self.graph.edges), dtype=torch.int64)
        for place, site in enumerate(self.sites):
            dead[:, site.edge] += closed[:, place]
        groups = []
        for place, site in enumerate(self.sites):
            others = (dead[:, site.edge] - closed[:, place].long() == 0).to(whole.dtype)
            matters = both(both(could[:, site.edge], whole[:, site.edge]), others)
            groups.append(matters[:, None].expand(-1, site.groups))
        return both(could, (dead == 0).to(whole.dtype)), groups

    def _visits(self) -> tuple[int, ...]:
        place = {node: index for index, node in enumerate(self.graph.order)}

        def turn(edge: int) -> tuple[int, int]:
            """At the sink exits come in their order, each before what passes it."""
            return (place[self.graph.edges[edge][0]], edge not in self.exits) if self.exits else (0, 0)

        return tuple(edge for node in self.graph.order for edge in sorted(self.graph.incoming[node], key=turn))

    def _columns(self, conditional: set[int]) -> tuple[tuple[int | None, ...], int]:
        columns: list[int | None] = [None] * self.units
        locked: dict[tuple[str, int], int] = {}
        count = 0

        def number(edge: int, count: int) -> int:
            """Gives each group of an edge's channels its column."""
            for site in self.sites:
                for place in range(site.always_open, site.groups) if site.edge == edge else ():
                    column = count if site.lock is None else locked.setdefault((site.lock, place), count)
                    columns[site.units[0] + place], count = column, max(count, column + 1)
            return count

        edges = range(len(self.graph.edges))
        for edge in edges:
            if not self.fixed[edge] and edge not in conditional:
                columns[edge], count = count, count + 1
        for edge in edges:
            if edge not in conditional:
                count = number(edge, count)
        independent = count
        for edge in self.visits:
            if edge in conditional:
                if not self.fixed[edge]:
                    columns[edge], count = count, count + 1
                count = number(edge, count)
        return tuple(columns), independent

    def _leaders(self, conditional: set[int]) -> dict[int, int]:
        leaders: dict[int, int] = {}
        for edge in (edge for edge in self.visits if edge in conditional):
            sites = self._locks(edge)
            names = {lock for lock, *_ in sites if lock is not None}
            if not names:
                continue
            sharing = [other for other in self.visits if names & {lock for lock, *_ in self._locks(other)}]
            for other in sharing:
                whole = other in conditional and self.fixed[other] and all(lock is not None for lock, *_ in sites)
                if not whole or self._locks(other) != sites:
                    raise GraphError(
                        "edges with locked gates that look at the input must share all of them, and have none on the "
                        f"edge as a whole, got {self.edge_names[other]!r}"
                    )
            if not self._on_sure_path(sharing[0]):
                raise GraphError(
                    "the first edge with locked gates that look at the input decides for all, and must lie on a path "
                    f"that is always kept, got {self.edge_names[sharing[0]]!r}"
                )
            if sharing[0] != edge:
                leaders[edge] = sharing[0]
        return leaders

    def _locks(self, edge: int) -> list[tuple[str | None, int, int]]:
        """Of each site of an edge what must be the same where its gates are shared."""
        return [(site.lock, site.groups, site.always_open) for site in self.sites if site.edge == edge]

    def _on_sure_path(self, edge: int) -> bool:
        """Whether an edge is used wherever it is kept: nothing else on some path through it can be closed."""
        closable = {site.edge for site in self.sites if not site.always_open}
        kept = [float(self.fixed[e] and (e == edge or e not in closable)) for e in range(len(self.fixed))]
        return bool(self.graph.used(torch.tensor([kept], device="cpu"))[0, edge])

    def _behind(self, exit: int) -> list[int]:
        start = self.graph.edges[exit][0]
        before = {other for other in self.exits if self.graph.edges[other][0] == start and other <= exit}
        return self._passed(start, without=before)

    def _passed(self, start: int, without: Collection[int]) -> list[int]:
        """The edges on all paths from a node that avoid some edges."""
        reached, passed = {start}, []
        for node in self.graph.order:
            if node in reached:
                leaving = [edge for edge in self.graph.outgoing[node] if edge not in without]
                reached |= {self.graph.edges[edge][1] for edge in leaving}
                passed += leaving
        return passed

    def _check_exits(self) -> None:
        for edge in self.exits:
            name, (start, end) = self.edge_names[edge], self.graph.edges[edge]
            if end != self.graph.sink:
                raise GraphError(f"an exit must lead to the output, got {name!r}")
            if self.gate_of[edge] is None:
                raise GraphError(f"an exit must be a choice, got {name!r}, which is fixed")
            beside = self._passed(self.graph.source, without={*self.graph.outgoing[start], *self.exits})
            if any(self.graph.edges[other][1] == self.graph.sink for other in beside):
                raise GraphError(f"an exit must leave a node that every path passes, got {name!r}")

    def _bits(self, name: str, keeps: Sequence[str]) -> Tensor:
        unknown = set(keeps) - set(self.edge_names)
        if unknown:
            raise GraphError(f"architecture {name!r} keeps {sorted(unknown)[0]!r}, which is no edge")
        kept = torch.ones(1, self.gate_count, device="cpu")  # also where the network is built elsewhere
        for edge, column in enumerate(self.gate_of[: len(self.graph.edges)]):
            if column is not None:
                kept[0, column] = float(self.edge_names[edge] in keeps)
        return kept
