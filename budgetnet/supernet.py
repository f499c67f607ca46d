"""Networks with choices: a DAG of modules whose edges and channels a policy keeps or drops, run on what is used.

`output, kept = network(x, policy)`; no module remembers a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from budgetnet.choices import Choices, Site
from budgetnet.errors import ConfigError, GraphError
from budgetnet.gated import GatedSequential
from budgetnet.graph import Graph, positions
from budgetnet.rows import Rows, gated, spread
from budgetnet.shapes import Shape, evaluating, output_shape, without_overwriting
from budgetnet.sites import AlwaysOn, Fixed, Gates, Policy
from budgetnet.streams import Stream, streams


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
        module: maps the start's value to something of the end's shape. Layers of it that work in place are told not to:
            other edges read that value too.
        name: unique in the network, None for "start>end".
        kind: what a picture calls it: "block", "projection".
        fixed: always kept; not a choice.
        steps: computation cycles, None for 0 on an identity and 1 elsewhere.
        gate: builds what decides this edge's gates from the start's value: called with its channels and the
            number of gates (the edge's own unless fixed, and those of its channels), such as
            `ConditionalGates`; None for gates that do not look at the input. Where gates are locked, that of the first
            edge decides for all.
        exit: what takes this edge ends here: it passes along no other edge that leaves `start`.
        answers: of an exit with a gate: the gate looks at what the module makes of the start's value, and is built for
            those channels; what comes to the exit is answered there, taken or not.
    """

    start: str
    end: str
    module: nn.Module
    name: str | None = None
    kind: str = "module"
    fixed: bool = False
    steps: int | None = None
    gate: Callable[[int, int], nn.Module] | None = None
    exit: bool = False
    answers: bool = False


class SuperNetwork(Choices, nn.Module):
    """A super network (E, theta) with a gate on each edge that is a choice, and on channels inside edges.

    An edge whose module is a `GatedSequential` has a gate for each group of channels that may be
    closed. How units and gates are numbered: `Choices`.

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
        pairs: learn two logits for each gate that does not look at the input.

    Raises:
        GraphError: the edges form no DAG from `source` to `sink`, a name is used twice, what enters a
            node differs in shape, or an exit does not lead from a node that all paths pass.

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
        pairs: bool = False,
    ) -> None:
        super().__init__()
        given = {node.name: node for node in nodes}
        if len(given) < len(nodes):
            raise GraphError(f"node names must differ, got {', '.join(node.name for node in nodes)}")
        # nodes are numbered in the order in which edges and then `nodes` name them
        names = list(dict.fromkeys([source, *(end for edge in edges for end in (edge.start, edge.end)), sink, *given]))
        index = {node: place for place, node in enumerate(names)}
        ends = tuple((index[edge.start], index[edge.end]) for edge in edges)
        self.graph = Graph(tuple(names), ends, index[source], index[sink])
        self.name, self.options = name, dict(options or {})
        self.edge_names = tuple(edge.name or f"{edge.start}>{edge.end}" for edge in edges)
        if len(set(self.edge_names)) < len(edges):
            twice = next(edge for edge in self.edge_names if self.edge_names.count(edge) > 1)
            raise GraphError(f"edge names must differ, got {twice!r} twice: name parallel edges")
        self.kinds = tuple(edge.kind for edge in edges)
        self.modules_on_edges = nn.ModuleList(without_overwriting(edge.module) for edge in edges)
        known = [given.get(node, Node(name=node)) for node in names]
        if known[index[source]].activation is not None:
            raise GraphError(f"the input {source!r} takes no activation: put it on the edges that leave it")
        self.activations = nn.ModuleList(without_overwriting(node.activation or nn.Identity()) for node in known)
        self.edge_steps = tuple(
            (0 if isinstance(edge.module, nn.Identity) else 1) if edge.steps is None else edge.steps for edge in edges
        )
        self.node_steps = tuple(
            int(len(self.graph.incoming[place]) > 1) if node.steps is None else node.steps
            for place, node in enumerate(known)
        )
        self.positions = positions(self.graph, [node.position for node in known])
        self.input_shape = tuple(input_shape)
        self.shapes = self._shapes()
        self.fixed = tuple(edge.fixed for edge in edges)
        self.exits = tuple(place for place, edge in enumerate(edges) if edge.exit)
        self.answers = frozenset(place for place, edge in enumerate(edges) if edge.answers)
        for place in self.answers:
            if place not in self.exits or edges[place].gate is None or isinstance(edges[place].module, GatedSequential):
                raise GraphError(f"{self.edge_names[place]!r} must be an exit with a gate on it alone to answer first")
        self.visits = self._visits()
        self.sites = tuple(self._sites())
        conditional = [edge for edge in self.visits if edges[edge].gate is not None]
        self._arrange(conditional)
        self.streams = () if conditional else self._streams()
        self.gates = Gates(self.independent, start=start, pairs=pairs)
        self.heads = nn.ModuleDict()
        for edge in (edge for edge in conditional if edge not in self.leaders):
            gate, count = edges[edge].gate, len(self.own_columns(edge))
            if count == 0:
                raise GraphError(f"{self.edge_names[edge]!r} has a gate that decides nothing: it has no choice")
            assert gate is not None
            self.heads[str(edge)] = gate(self.gate_shape(edge)[0], count)
        self._named = {key: self._bits(key, keeps) for key, keeps in (architectures or {}).items()}

    def forward(self, x: Tensor, policy: Policy) -> tuple[Tensor, Tensor]:
        """Predicts with the architectures the policy decides on.

        Args:
            x: `(B, C, H, W)` examples.
            policy: decides K architectures, 1 <= K <= B; each serves a contiguous slice of the
                batch, the first B mod K slices one example longer. Where gates look at the input each
                example has its own, K = B.

        Returns:
            The output, `(B, ...)`, and `kept`, `(K, G)`.
        """
        if isinstance(policy, AlwaysOn):
            policy = full(self)  # which takes no exit
        if self.heads and not policy.blind:
            return self.masked(x, policy)
        logits = self.gates.logits
        if self.heads:
            logits = logits.new_zeros(self.gate_count)
        kept = policy(logits, slice(0, self.gate_count))
        if kept.requires_grad:
            return self.masked(x, Fixed(kept))
        return self.run(x, self.used(kept)), kept

    def gate_shape(self, edge: int) -> Shape:
        """Shape of what a gate by the input looks at, of one example: what its edge takes, or gives if it answers."""
        start, end = self.graph.edges[edge]
        return self.shapes[end if edge in self.answers else start]

    def sampled(self, count: int, generator: torch.Generator) -> Tensor:
        """`(count, G)` architectures drawn from the gates as they stand, on the CPU.

        Gates that look at the input are drawn as they are on the average one.
        """
        return torch.bernoulli(self.probabilities().expand(count, -1), generator=generator)

    def probabilities(self) -> Tensor:
        """`(G,)` probability of each gate on the CPU; of gates that look at the input on the average one."""
        return self.logits().sigmoid()

    @torch.no_grad()
    def logits(self) -> Tensor:
        """`(G,)` logits of the gates on the CPU.

        Of gates that look at the input those that their heads give as `average`, 0 where they give none.
        """
        given = [self.gates.logits]
        for edge, head in self.heads.items():
            average = getattr(head, "average", None)
            undecided = given[0].new_zeros(len(self.own_columns(int(edge))))
            given.append(average if isinstance(average, Tensor) else undecided)
        return torch.cat([logits.cpu() for logits in given])

    def run(self, x: Tensor, used: Tensor) -> Tensor:
        """The forward pass of Eq. 1 where work follows the sample: an unused edge costs nothing.

        Each node holds the rows of those architectures that reach it, in their order. An edge takes
        the rows of its users, runs once (batch norm sees them all), and is added to its end.

        Args:
            x: `(B, C, H, W)`.
            used: `(K, U)`, as `used` gives them.

        Returns:
            `(B, ...)`; zeros for architectures that do not connect.
        """
        architectures = len(used)
        if architectures > len(x):
            raise ConfigError(f"{architectures} architectures need at least as many examples, got {len(x)}")
        sizes = [len(x) // architectures + (k < len(x) % architectures) for k in range(architectures)]
        table = used.detach().to("cpu", torch.bool)
        users = [tuple(table[:, edge].nonzero().flatten().tolist()) for edge in range(len(self.graph.edges))]
        values: dict[int, Rows] = {self.graph.source: Rows(x, tuple(range(architectures)), sizes)}
        for node in self.graph.order:
            parts = []
            for edge in self.graph.incoming[node]:
                if users[edge]:
                    value = values[self.graph.edges[edge][0]].take(users[edge])
                    groups = self.groups_of(edge, table)[list(users[edge])]
                    lengths = [sizes[owner] for owner in users[edge]]
                    parts.append(Rows(self._module(edge, value, groups, lengths), users[edge], sizes))
            if parts:
                total = Rows.sum(parts, sizes)
                values[node] = Rows(self.activations[node](total.whole), total.owners, sizes)
        if self.graph.sink not in values:
            return x.new_zeros(len(x), *self.shapes[self.graph.sink])
        return values[self.graph.sink].spread(architectures)

    def masked(self, x: Tensor, policy: Policy) -> tuple[Tensor, Tensor]:
        """The forward pass in which everything is computed and multiplied by its gate, with a gradient to it.

        Gates that look at the input decide when their edge is run, for each example.

        Args:
            x: `(B, C, H, W)`.
            policy: decides; its decisions may carry a gradient.

        Returns:
            The output, `(B, ...)`, as `run` gives it for the same decisions, and `kept`, `(K, G)`.
        """
        outputs, taken, kept = self.ways_out(x, policy)
        return reduce(add, [gated(value, taken[:, place]) for place, value in enumerate(outputs)]), kept

    def ways_out(self, x: Tensor, policy: Policy) -> tuple[list[Tensor], Tensor, Tensor]:
        """What every way out would answer: each exit in order, then the end, where there are no exits the only way.

        Args:
            x: `(B, C, H, W)`.
            policy: decides; its decisions may carry a gradient.

        Returns:
            W outputs, `(B, ...)` each; `(B, W)` 1 at the way that the gates choose and 0 elsewhere, with their gradient
            (all 0 where input and output are not connected); `kept`, `(K, G)`.
        """
        alone = self.training and len(x) < 2  # as in `run`: one row has no batch statistics
        with evaluating(self) if alone else nullcontext():
            return self._ways_out(x, policy)

    def _ways_out(self, x: Tensor, policy: Policy) -> tuple[list[Tensor], Tensor, Tensor]:
        shared = policy(self.gates.logits, slice(0, self.independent))
        if self.heads:
            shared = spread(shared, len(x))
        undecided = shared.new_ones(len(shared), self.gate_count - self.independent)
        whole = self._placed(torch.cat([shared, undecided], dim=1))
        pieces, position = [shared], self.independent
        values: dict[int, Tensor] = {self.graph.source: x}
        reached: dict[int, Tensor] = {self.graph.source: whole.new_ones(len(whole))}
        through = whole.new_ones(len(whole))  # what no exit has taken yet
        outputs, taken = [], []
        by_input: dict[int, Tensor] = {}  # decisions, by the edge that takes them
        waiting = [len(entering) for entering in self.graph.incoming]
        for edge in self.visits:
            start, end = self.graph.edges[edge]
            own, groups = whole[:, edge], self.groups_of(edge, whole)
            module = self.modules_on_edges[edge]
            answer = module(values[start]) if edge in self.answers else None
            if str(edge) in self.heads:
                count = len(self.own_columns(edge))
                seen = values[start] if answer is None else answer
                logits = x.new_zeros(1, count) if policy.blind else self.heads[str(edge)](seen)
                by_input[edge] = spread(policy(logits, slice(position, position + count)), len(x))
                position += count
                pieces.append(by_input[edge])
            if (leader := self.leaders.get(edge, edge)) in by_input:
                own, groups = self._decided(edge, by_input[leader], own, groups)
            own = own * reached[start] * self._sites_alive(edge, groups.detach())
            if isinstance(module, GatedSequential):
                value = module.masked(values[start], spread(groups, len(x)))
            else:
                value = module(values[start]) if answer is None else answer
            waiting[end] -= 1
            if edge in self.exits:
                outputs.append(self.activations[end](value))
                taken.append(own * through)
                through = through * (1 - own)
            else:
                value = gated(value, own)
                values[end] = value if end not in values else values[end] + value
                reached[end] = torch.maximum(reached.get(end, torch.zeros_like(own)), (own.detach() > 0).to(own))
            if not waiting[end] and end in values:
                values[end] = self.activations[end](values[end])
        if self.graph.sink in values:
            outputs.append(values[self.graph.sink])
            taken.append(through * reached[self.graph.sink])  # an empty sum is 0, whatever an activation makes of it
        return outputs, spread(torch.stack(taken, dim=1), len(x)), torch.cat(pieces, dim=1)

    def _decided(self, edge: int, decided: Tensor, own: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Puts `(B, n)` conditional decisions of an edge's gates where they belong."""
        columns: dict[int | None, int] = {column: place for place, column in enumerate(self.own_columns(edge))}
        if (column := self.gate_of[edge]) is not None:
            own = decided[:, columns[column]]
        if groups.shape[1]:
            units = self.gate_of[slice(*self.span(edge))]
            open_always = torch.ones_like(decided[:, :1])
            table = torch.cat([decided, open_always], dim=1)
            groups = table[:, [columns.get(column, len(columns)) for column in units]]
        return own, groups

    def _sites_alive(self, edge: int, groups: Tensor) -> Tensor:
        """Whether each site of an edge has an open group, `(K, groups)` to `(K,)`, 1 where there is no site."""
        alive = groups.new_ones(len(groups))
        module = self.modules_on_edges[edge]
        if isinstance(module, GatedSequential):
            for bits in module.split(groups):
                alive = alive * (bits > 0).any(dim=1).to(alive)
        return alive

    def _sites(self) -> Iterator[Site]:
        first = len(self.graph.edges)
        for edge, module in enumerate(self.modules_on_edges):
            if isinstance(module, GatedSequential):
                for gate in module.sites:
                    yield Site(
                        edge, gate.name, (first, first + gate.groups), gate.always_open, tuple(gate.sizes), gate.lock
                    )
                    first += gate.groups

    def _streams(self) -> tuple[Stream, ...]:
        channels = [shape[0] for shape in self.shapes]
        units = [self.span(edge)[0] for edge in range(len(self.graph.edges))]
        return streams(self.graph, list(self.modules_on_edges), list(self.activations), channels, units)

    def _module(self, edge: int, value: Tensor, groups: Tensor, lengths: list[int]) -> Tensor:
        """Runs an edge's module on the rows of its users, whose `(K, groups)` channel groups are given."""
        module = self.modules_on_edges[edge]
        alone = module.training and len(value) < 2  # one row has no batch statistics: use the running ones
        with evaluating(module) if alone else nullcontext():
            if not isinstance(module, GatedSequential):
                output: Tensor = module(value)
            elif bool((groups == groups[:1]).all()):
                output = module.cut(value, groups[0].to(value.device, torch.float32))
            else:
                rows = groups.repeat_interleave(torch.tensor(lengths), dim=0)
                output = module.masked(value, rows.to(value.device, value.dtype))
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


def full(network: SuperNetwork) -> Fixed:
    """The policy of the whole super network."""
    return Fixed(network.architecture("full"))
