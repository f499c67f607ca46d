"""One batch on its way through a conditional network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from budgetnet.conditional.bodies import rectified
from budgetnet.conditional.branches import Branch, Part, add_rows, clear_rows, take_rows


@dataclass
class Value:
    """What a node holds for the examples that are left.

    Attributes:
        tensor: `(B, ...)`.
        owned: nothing else shares its memory, so that it may be overwritten once nobody reads it any more.
        readers: edges that have yet to read it.
        reached: whether each example came here, None for all; the rows of the others mean nothing.
        positive: a ReLU would change nothing.
    """

    tensor: Tensor
    owned: bool
    readers: int
    reached: list[bool] | None = None
    positive: bool = False


@dataclass
class Term:
    """What an edge brings for all rows.

    Attributes:
        tensor: `(B, ...)`.
        owned: it may be overwritten.
        start: the value that it is, passed on as it stands; None where it was computed.
    """

    tensor: Tensor
    owned: bool
    start: Value | None = None


class Flow:
    """What is known of a batch while it is run.

    Args:
        x: `(B, C, H, W)`.
        source: node of the input.
        readers: for each node the edges that read it.
        kept: `(B, G)` to note decisions in, None where nobody asks for them.

    Attributes:
        batch: examples that have taken no exit yet.
        output: `(B, ...)` of those that have, None before the first.
    """

    def __init__(self, x: Tensor, source: int, readers: Mapping[int, int], kept: Tensor | None) -> None:
        self.batch = self.total = len(x)
        self.output: Tensor | None = None
        self._kept, self._readers = kept, readers
        self._places: list[int] | None = None  # of the examples that are left; None while all are
        self._values = {source: Value(x, False, readers[source])}
        self._said: dict[str, list[list[float]]] = {}  # what each edge's head said of those that are left

    def enter(self, node: int, entering: Sequence[Branch], activation: nn.Module, shape: Sequence[int]) -> None:
        """Computes the value of a node: the sum of what its edges bring, then its activation.

        Args:
            node: to be computed.
            entering: its edges.
            activation: of this node.
            shape: of one example at this node.
        """
        every: list[Term] = []
        some: list[tuple[Tensor, Tensor]] = []  # rows, and what is brought for them
        came: set[int] | None = set()  # None for all
        for edge in entering:
            start = self._values[edge.start]
            parts = self._parts(edge, start)
            self._read(edge.start)
            for part in parts:
                if part.whole:
                    every.append(whole_term(edge, part, start, self.batch))
                else:
                    rows = torch.tensor(part.rows, device=start.tensor.device)
                    some.append((rows, run(edge, part, take_rows(start.tensor, rows))[0]))
                if came is not None:
                    came = None if len(part.rows) == self.batch else came.union(part.rows)
        passed = every[0].start if len(every) == 1 and not some else None
        if passed is not None:
            total, owned = passed.tensor, take_over(passed)
        else:
            like = next(iter(self._values.values())).tensor
            total, owned = add_up(every, some, like, (self.batch, *shape))
        reached = None if came is None or len(came) == self.batch else [row in came for row in range(self.batch)]
        positive = type(activation) is nn.ReLU
        if not (positive and passed is not None and passed.positive):
            total, owned = rectified(activation, total, owned)
        self._values[node] = Value(total, owned, self._readers[node], reached, positive)

    def leave(self, edge: Branch, activation: nn.Module) -> None:
        """Writes the output of those who take an exit, and goes on without them.

        Args:
            edge: the exit.
            activation: of the output.
        """
        start = self._values[edge.start]
        gone = self._answer(edge, start, activation) if edge.answers else self._take(edge, start, activation)
        self._read(edge.start)
        if gone:
            self._go_on_with([row for row in range(self.batch) if row not in gone])

    def _take(self, edge: Branch, start: Value, activation: nn.Module) -> set[int]:
        """Answers for the rows that take an exit, and says which."""
        parts = self._parts(edge, start)
        for part in parts:
            rows = torch.tensor(part.rows, device=start.tensor.device)
            value = run(edge, part, start.tensor if part.whole else take_rows(start.tensor, rows))[0]
            if part.whole and len(part.rows) < self.batch:
                value = value.index_select(0, rows)
            self._write(activation(value), part.rows)
        return {row for part in parts for row in part.rows}

    def _answer(self, edge: Branch, start: Value, activation: nn.Module) -> set[int]:
        """Answers for all rows that come to an exit, and says which of them are content with that."""
        came = [row for row in range(self.batch) if start.reached is None or start.reached[row]]
        if not came:
            return set()
        value = start.tensor
        if len(came) < self.batch:
            value = take_rows(value, torch.tensor(came, device=value.device))
        value, _ = edge.body.run(value, edge.body.full)
        assert edge.head is not None
        decided = edge.head(value)
        self._note(edge, decided, came)
        content = [place for place, (logit,) in enumerate(decided.tolist()) if logit > 0]
        rows = [came[place] for place in content]
        if rows:
            chosen = value.index_select(0, torch.tensor(content, device=value.device))
            self._write(activation(chosen), rows)
        return set(rows)

    def _note(self, edge: Branch, values: Tensor, rows: Sequence[int]) -> None:
        """Notes the decisions `(n, gates)` of some rows, where somebody asks for them."""
        if self._kept is not None:
            places = torch.tensor(rows if self._places is None else [self._places[row] for row in rows])
            self._kept[places[:, None], torch.tensor(edge.columns)] = (values > 0).to(self._kept)

    def finished(self, sink: int) -> Tensor:
        """The output of all examples, those that are left being at the sink."""
        self._write(self._values[sink].tensor, range(self.batch))
        assert self.output is not None
        return self.output

    def _parts(self, edge: Branch, start: Value) -> list[Part]:
        """Who takes an edge, and how they are run."""
        decisions = None
        if not edge.gated and start.reached is None:
            return [Part(edge.body.full, range(self.batch), True, None)]
        if edge.head is not None:
            if self._kept is None and start.reached is not None and not any(start.reached):
                return []
            values = edge.head(start.tensor)
            decisions = self._said[edge.name] = values.tolist()
            self._note(edge, values, range(self.batch))
        elif edge.leader is not None:
            decisions = self._said[edge.leader]
        return edge.plan(edge.takers(decisions, start.reached, self.batch), self.batch)

    def _read(self, node: int) -> None:
        """An edge has read a value, which is let go after the last."""
        self._values[node].readers -= 1
        if not self._values[node].readers and len(self._values) > 1:
            del self._values[node]

    def _write(self, value: Tensor, rows: Sequence[int]) -> None:
        """Puts outputs where they belong in the whole batch."""
        if self.output is None and len(rows) == self.total:
            self.output = value
            return
        if self.output is None:
            self.output = value.new_zeros(self.total, *value.shape[1:])
        places = rows if self._places is None else [self._places[row] for row in rows]
        self.output.index_copy_(0, torch.tensor(places, device=value.device), value.to(self.output.dtype))

    def _go_on_with(self, rows: list[int]) -> None:
        """Drops all examples but these."""
        self._places = rows if self._places is None else [self._places[row] for row in rows]
        self.batch = len(rows)
        self._said = {name: [said[row] for row in rows] for name, said in self._said.items()}
        if not rows:
            return
        for value in self._values.values():
            if value.readers:
                value.tensor = take_rows(value.tensor, torch.tensor(rows, device=value.tensor.device))
                value.owned = True
                value.reached = None if value.reached is None else [value.reached[row] for row in rows]


def run(edge: Branch, part: Part, x: Tensor) -> tuple[Tensor, bool]:
    """What an edge makes of the rows of a part, and whether that may be overwritten."""
    table = None
    if part.patterns is not None:
        table = torch.tensor(part.patterns, dtype=x.dtype, device=x.device)
    return edge.body.run(x, part.pattern, table)


def whole_term(edge: Branch, part: Part, start: Value, batch: int) -> Term:
    """What an edge makes of all rows, zero in those that do not take it."""
    tensor, owned = run(edge, part, start.tensor)
    if len(part.rows) < batch:
        taken = set(part.rows)
        closed = [row for row in range(batch) if row not in taken]
        tensor, owned = (tensor if owned else tensor.clone()), True
        clear_rows(tensor, torch.tensor(closed, device=tensor.device))
    if tensor is start.tensor:
        return Term(tensor, False, start)
    if not owned:  # it may be a view of what it came from
        start.owned = False
    return Term(tensor, owned)


def take_over(value: Value) -> bool:
    """Whether the memory of a value that is passed on may be overwritten: nobody else reads it, now or later."""
    if value.owned and not value.readers:
        return True
    value.owned = False
    return False


def add_up(
    every: Sequence[Term], some: Sequence[tuple[Tensor, Tensor]], like: Tensor, shape: Sequence[int]
) -> tuple[Tensor, bool]:
    """The sum of what edges bring, in memory that is there already where it can be.

    Args:
        every: for all rows.
        some: rows, and what is brought for them.
        like: of the type and device.
        shape: `(B, ...)`.

    Returns:
        `(B, ...)`, and whether it may be overwritten.
    """
    shared = [id(term.start) for term in every if term.start is not None]
    base: Term | None = next((term for term in every if term.owned), None)
    for term in every:
        once = term.start is not None and shared.count(id(term.start)) == 1
        if base is None and once and term.start is not None and term.start.owned and not term.start.readers:
            base = term
    rest = [term.tensor for term in every if term is not base]
    if base is not None:
        total = base.tensor
    elif len(rest) > 1:
        total, rest = rest[0] + rest[1], rest[2:]
    elif rest:
        if not some:
            return rest[0], False
        total, rest = rest[0].clone(), []
    else:
        total = like.new_zeros(tuple(shape))
        if some and some[0][1].ndim == 4 and not some[0][1].is_contiguous():
            total = total.contiguous(memory_format=torch.channels_last)
    for tensor in rest:
        total.add_(tensor)
    for rows, part in some:
        add_rows(total, rows, part)
    return total, True


def run_one(
    x: Tensor,
    order: Sequence[int],
    entering: Mapping[int, Sequence[Branch]],
    exits: Mapping[int, Sequence[Branch]],
    activations: Sequence[nn.Module],
    shapes: Sequence[Sequence[int]],
) -> Tensor:
    """The output of a single example `(1, C, H, W)`: what `Flow` computes, without keeping track of rows.

    Args:
        x: the example.
        order: nodes, from the source to the sink.
        entering: edges into each node.
        exits: that leave each node.
        activations: of each node.
        shapes: of one example at each node.
    """
    source, sink = order[0], order[-1]
    values: dict[int, Tensor] = {source: x}  # of nodes that are reached
    positive: set[int] = set()
    said: dict[str, list[float]] = {}
    for node in order:
        if node != source:
            total, owned, passed = None, False, None
            for edge in entering[node]:
                if (start := values.get(edge.start)) is None or (how := edge.one(start, said)) is None:
                    continue
                value, mine = (start, False) if edge.passes else edge.run(start, *how)
                passed = edge.start if total is None and edge.passes else None
                if total is None:
                    total, owned = value, mine
                elif mine and not owned:
                    total, owned = value.add_(total), True
                else:
                    total, owned = (total.add_(value) if owned else total + value), True
            if total is None and node != sink:
                continue
            if total is None:
                total = x.new_zeros(1, *shapes[node])
            activation = activations[node]
            rectifies = type(activation) is nn.ReLU
            if rectifies:
                positive.add(node)
            if not (rectifies and passed in positive):
                total, _ = rectified(activation, total, owned)
            values[node] = total
        for edge in exits[node]:
            if (start := values.get(node)) is None:
                continue
            answer = edge.run(start, edge.body.full)[0] if edge.answers else None
            how = edge.one(start if answer is None else answer, said)
            if how is not None:
                output: Tensor = activations[sink](edge.run(start, *how)[0] if answer is None else answer)
                return output
    return values[sink]
