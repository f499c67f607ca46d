"""Networks with choices: a DAG of modules whose edges a policy keeps or drops, run on just what is used.

`output, kept = network(x, policy)`; no module remembers a sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from itertools import groupby
from operator import add
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from budgetnet.errors import ConfigError, GraphError
from budgetnet.graph import Graph
from budgetnet.sites import Fixed, Gates, Policy

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Node:
    """A layer `l_i`: the sum of what enters it, then an activation.

    Attributes:
        name: unique in the network.
        activation: applied to the sum, None for none.
        steps: computation cycles the node takes, None for 1 where several edges enter and 0 elsewhere.
        position: `(column, row)` to draw it at, None to be placed by depth.
    """

    name: str
    activation: nn.Module | None = None
    steps: int | None = None
    position: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Edge:
    """A module `f_{i,j}` from one layer to another.

    Attributes:
        start, end: node names.
        module: maps the start's value to something of the end's shape.
        name: unique in the network, None for "start>end".
        kind: what a picture calls it: "block", "projection".
        fixed: always kept; not a choice.
        steps: computation cycles, None for 0 on an identity and 1 elsewhere.
    """

    start: str
    end: str
    module: nn.Module
    name: str | None = None
    kind: str = "module"
    fixed: bool = False
    steps: int | None = None


class SuperNetwork(nn.Module):
    """A super network (E, theta) with a gate on each edge that is a choice.

    Layers follow Eq. 1, `l_i = sum_k e_ki f_ki(l_k)`, over the edges on a live path; the value of a
    layer that no live path reaches is an empty sum, 0, so an architecture that does not connect
    input and output predicts zeros (for classes: all equally likely) and uses no edge.

    Args:
        edges: the modules; nodes come to be as edges name them.
        input_shape: `(C, H, W)` of one example.
        source, sink: names of the input and output node.
        nodes: those nodes that need an activation, steps or a position.
        name, options: what `spaces` built this from; kept in run folders.
        architectures: named sub-networks, each the names of the edges it keeps beside the fixed ones.
        start: logit every gate starts with.

    Raises:
        GraphError: the edges form no DAG from `source` to `sink`, a name is used twice, or what
            enters a node differs in shape.

    Source: BSN, sections 2 and 3.2, Algorithm 1.
    """

    def __init__(
        self,
        edges: Sequence[Edge],
        *,
        input_shape: Sequence[int],
        source: str = "x",
        sink: str = "y",
        nodes: Sequence[Node] = (),
        name: str = "own",
        options: Mapping[str, Any] | None = None,
        architectures: Mapping[str, Sequence[str]] | None = None,
        start: float = 3.0,
    ) -> None:
        super().__init__()
        given = {node.name: node for node in nodes}
        if len(given) < len(nodes):
            raise GraphError(f"node names must differ, got {', '.join(node.name for node in nodes)}")
        # nodes are numbered in the order in which edges and then `nodes` name them
        names = list(dict.fromkeys([source, *(end for edge in edges for end in (edge.start, edge.end)), sink, *given]))
        index = {node: place for place, node in enumerate(names)}
        pairs = tuple((index[edge.start], index[edge.end]) for edge in edges)
        self.graph = Graph(tuple(names), pairs, index[source], index[sink])
        self.name, self.options = name, dict(options or {})
        self.edge_names = tuple(edge.name or f"{edge.start}>{edge.end}" for edge in edges)
        if len(set(self.edge_names)) < len(edges):
            twice = next(edge for edge in self.edge_names if self.edge_names.count(edge) > 1)
            raise GraphError(f"edge names must differ, got {twice!r} twice: name parallel edges")
        self.kinds = tuple(edge.kind for edge in edges)
        self.modules_on_edges = nn.ModuleList(edge.module for edge in edges)
        known = [given.get(node, Node(name=node)) for node in names]
        if known[index[source]].activation is not None:
            raise GraphError(f"the input {source!r} takes no activation: put it on the edges that leave it")
        self.activations = nn.ModuleList(node.activation or nn.Identity() for node in known)
        self.edge_steps = tuple(
            (0 if isinstance(edge.module, nn.Identity) else 1) if edge.steps is None else edge.steps for edge in edges
        )
        self.node_steps = tuple(
            int(len(self.graph.incoming[place]) > 1) if node.steps is None else node.steps
            for place, node in enumerate(known)
        )
        self.positions = positions(self.graph, known)
        self.columns = tuple(place for place, edge in enumerate(edges) if not edge.fixed)
        """The G edges that are choices: column g of `kept` is edge `columns[g]`."""
        self.gates = Gates(len(self.columns), start=start)
        self.input_shape = tuple(input_shape)
        self.shapes = self._shapes()
        self._named = {key: self._bits(key, keeps) for key, keeps in (architectures or {}).items()}

    def forward(self, x: Tensor, policy: Policy) -> tuple[Tensor, Tensor]:
        """Predicts with the architectures the policy decides on.

        Args:
            x: `(B, C, H, W)` examples.
            policy: decides K architectures, 1 <= K <= B; each serves a contiguous slice of the
                batch, the first B mod K slices one example longer.

        Returns:
            The output, `(B, ...)`, and `kept`, `(K, G)`.
        """
        kept = policy(self.gates.logits, slice(0, len(self.columns)))
        return self.run(x, self.used(kept)), kept

    def edges(self, kept: Tensor) -> Tensor:
        """`(K, G)` decisions to `(K, E)` edges: the fixed ones are always kept."""
        if kept.ndim != 2 or kept.shape[1] != len(self.columns):
            raise ConfigError(f"an architecture of {self.name} is (K, {len(self.columns)}), got {tuple(kept.shape)}")
        whole = kept.new_ones(len(kept), len(self.graph.edges))
        whole[:, list(self.columns)] = kept
        return whole

    def used(self, kept: Tensor) -> Tensor:
        """Edges on a live path, `(K, G)` to `(K, E)`: what is computed, and what a cost is charged for."""
        return self.graph.used(self.edges(kept))

    def relevant(self, kept: Tensor) -> Tensor:
        """Gates whose decision was taken and could matter, `(K, G)` to `(K, G)`; see `Graph.relevant`."""
        return self.graph.relevant(self.edges(kept))[:, list(self.columns)]

    def architecture(self, name: str) -> Tensor:
        """The named sub-network as `(1, G)` bits: "full", or one of this space's own.

        Raises:
            ConfigError: there is no such name.
        """
        if name == "full":
            return torch.ones(1, len(self.columns))
        if name not in self._named:
            raise ConfigError(f"architectures of {self.name} are {', '.join(self.architecture_names)}, got {name!r}")
        return self._named[name].clone()

    @property
    def architecture_names(self) -> tuple[str, ...]:
        """What `architecture` knows."""
        return ("full", *self._named)

    def run(self, x: Tensor, used: Tensor) -> Tensor:
        """The forward pass of Eq. 1 where work follows the sample: an unused edge costs nothing.

        Each node holds the rows of those architectures that reach it, in their order. An edge takes
        the rows of its users, runs once (batch norm sees them all), and is added to its end.

        Args:
            x: `(B, C, H, W)`.
            used: `(K, E)` edges on live paths, as `used` gives them.

        Returns:
            `(B, ...)`; zeros for architectures that do not connect.
        """
        architectures = len(used)
        if architectures > len(x):
            raise ConfigError(f"{architectures} architectures need at least as many examples, got {len(x)}")
        sizes = [len(x) // architectures + (k < len(x) % architectures) for k in range(architectures)]
        table = used.detach().to("cpu", torch.bool)
        users = [tuple(table[:, edge].nonzero().flatten().tolist()) for edge in range(table.shape[1])]
        values: dict[int, Rows] = {self.graph.source: Rows(x, tuple(range(architectures)), sizes)}
        for node in self.graph.order:
            parts = []
            for edge in self.graph.incoming[node]:
                if users[edge]:
                    value = values[self.graph.edges[edge][0]].take(users[edge])
                    parts.append(Rows(self._module(edge, value), users[edge], sizes))
            if parts:
                total = Rows.sum(parts, sizes)
                values[node] = Rows(self.activations[node](total.whole), total.owners, sizes)
        if self.graph.sink not in values:
            return x.new_zeros(len(x), *self.shapes[self.graph.sink])
        return values[self.graph.sink].spread(architectures)

    def _module(self, edge: int, value: Tensor) -> Tensor:
        module = self.modules_on_edges[edge]
        if module.training and len(value) < 2:  # one row has no batch statistics: use the running ones
            with evaluating(module):
                output: Tensor = module(value)
        else:
            output = module(value)
        return output

    def _shapes(self) -> tuple[Shape, ...]:
        """The shape of one example at each node, found without computing it."""
        shapes: dict[int, Shape] = {self.graph.source: self.input_shape}
        for node in self.graph.order[1:]:
            name = self.graph.nodes[node]
            for edge in self.graph.incoming[node]:
                start = self.graph.edges[edge][0]
                shape = output_shape(self.modules_on_edges[edge], shapes[start], self.edge_names[edge])
                if shapes.setdefault(node, shape) != shape:
                    raise GraphError(
                        f"what enters {name!r} must be of one shape to be added: {shapes[node]} came first, "
                        f"{shape} from {self.edge_names[edge]!r}"
                    )
            behind = output_shape(self.activations[node], shapes[node], name)
            if behind != shapes[node]:
                raise GraphError(f"the activation of {name!r} must keep the shape {shapes[node]}, got {behind}")
        return tuple(shapes[node] for node in range(len(self.graph.nodes)))

    def _bits(self, name: str, keeps: Sequence[str]) -> Tensor:
        unknown = set(keeps) - set(self.edge_names)
        if unknown:
            raise GraphError(f"architecture {name!r} keeps {sorted(unknown)[0]!r}, which is no edge")
        return torch.tensor([[float(self.edge_names[edge] in keeps) for edge in self.columns]])


class Rows:
    """The value of a node for those architectures that compute it, the rows of each contiguous.

    Attributes:
        whole: `(rows, ...)`.
        owners: the architectures, ascending, whose rows these are.
        sizes: examples of each of all K architectures.
    """

    def __init__(self, whole: Tensor, owners: tuple[int, ...], sizes: list[int]) -> None:
        self.whole, self.owners, self.sizes = whole, owners, sizes
        self._pieces: dict[int, Tensor] = {}

    def take(self, owners: tuple[int, ...]) -> Tensor:
        """The rows of some of the owners."""
        if owners == self.owners:
            return self.whole
        pieces = self.pieces()
        return torch.cat([pieces[owner] for owner in owners])

    def pieces(self) -> dict[int, Tensor]:
        """The rows of each owner; cut once, so that the backward pass joins them once."""
        if not self._pieces:
            cut = torch.split(self.whole, [self.sizes[owner] for owner in self.owners])
            self._pieces = dict(zip(self.owners, cut, strict=True))
        return self._pieces

    @staticmethod
    def sum(parts: Sequence[Rows], sizes: list[int]) -> Rows:
        """Adds values row by row; an architecture that a part lacks gets nothing from it."""
        owners = tuple(sorted({owner for part in parts for owner in part.owners}))
        if all(part.owners == owners for part in parts):
            return Rows(reduce(add, (part.whole for part in parts)), owners, sizes)
        held = [set(part.owners) for part in parts]
        # neighbouring architectures served by the same parts are added in one piece
        runs = [
            (givers, sum(sizes[owner] for owner in run))
            for givers, run in groupby(owners, lambda owner: tuple(i for i, own in enumerate(held) if owner in own))
        ]
        cuts = [
            iter(torch.split(part.whole, [size for givers, size in runs if i in givers]))
            for i, part in enumerate(parts)
        ]
        return Rows(torch.cat([reduce(add, [next(cuts[i]) for i in givers]) for givers, _ in runs]), owners, sizes)

    def spread(self, architectures: int) -> Tensor:
        """The rows of all K architectures, zeros where one has no value."""
        if len(self.owners) == architectures:
            return self.whole
        pieces = self.pieces()
        return torch.cat(
            [
                pieces[k] if k in pieces else self.whole.new_zeros(self.sizes[k], *self.whole.shape[1:])
                for k in range(architectures)
            ]
        )


def full(network: SuperNetwork) -> Fixed:
    """The policy of the whole super network."""
    return Fixed(network.architecture("full"))


def output_shape(module: nn.Module, shape: Shape, name: str) -> Shape:
    """Shape of one example behind `module`, found on the meta device, without computing.

    Raises:
        GraphError: the module does not take that shape.
    """
    try:
        with evaluating(module), torch.no_grad():
            output = functional_call(module, on_meta(module), torch.empty(2, *shape, device="meta"))
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise GraphError(f"{name!r} cannot take an input of shape {shape}: {reason}") from error
    return tuple(output.shape[1:])


def on_meta(module: nn.Module) -> dict[str, Tensor]:
    """What a module holds, without its values, in float32: shapes and counts do not depend on the type."""
    held = {key: value.detach().to("meta") for key, value in (*module.named_parameters(), *module.named_buffers())}
    return {key: value.float() if value.is_floating_point() else value for key, value in held.items()}


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in evaluation mode, and as it was afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def positions(graph: Graph, nodes: Sequence[Node]) -> tuple[tuple[float, float], ...]:
    """Where each node is drawn: as given, else at its depth, one row below the node drawn there before."""
    depth = dict.fromkeys(range(len(nodes)), 0)
    for node in graph.order:
        for edge in graph.incoming[node]:
            depth[node] = max(depth[node], depth[graph.edges[edge][0]] + 1)
    rows: dict[int, int] = {}
    places = []
    for node, known in enumerate(nodes):
        if known.position is None:
            row = rows.setdefault(depth[node], 0)
            rows[depth[node]] += 1
            places.append((float(depth[node]), float(row)))
        else:
            places.append((float(known.position[0]), float(known.position[1])))
    return tuple(places)
