"""An edge of a conditional network: which examples take it, and the cheapest way to run it for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from budgetnet.conditional.bodies import MEMORY, Body, Pattern
from budgetnet.conditional.heads import Head

Takers = dict[Pattern, list[int]]
"""The rows, ascending, that open each pattern of channel groups."""


class Limits(NamedTuple):
    """Where skipping starts to pay, as shares of the work and the time of the whole batch, everything computed.

    Attributes:
        rows: share of open rows below which it is faster to gather them, run them and add them back.
        row_cost: time of doing so with a vanishing share.
        channels: share of the open channels' MACs below which it is faster to cut the weights to them.
        channel_cost: time with a vanishing share.
    """

    rows: float = 0.75
    row_cost: float = 0.1
    channels: float = 0.75
    channel_cost: float = 0.1

    def time(self, rows: float | None, channels: float) -> float:
        """Expected time, linear in both shares; `rows` None where nothing is gathered."""
        if channels <= self.channels:
            channels = self.channel_cost + (1 - self.channel_cost) * channels / max(self.channels, 1e-9)
        else:
            channels = 1.0
        if rows is None:
            return channels
        return self.row_cost + (1 - self.row_cost) * channels * rows / max(self.rows, 1e-9)


WHOLE = Limits(0.0, 0.0, 0.0, 0.0)
"""Skipping never pays: a batch is computed whole and masked. A single example skips the edges that it leaves."""


class Part(NamedTuple):
    """Examples that are run together.

    Attributes:
        pattern: channel groups that are computed.
        rows: that take the edge, ascending if they are all that do.
        whole: run the batch as it is, and clear the rows that do not take the edge; else gather those that do.
        patterns: what each row that is run opens, where that is not `pattern`; None where it is.
    """

    pattern: Pattern
    rows: Sequence[int]
    whole: bool
    patterns: list[Pattern] | None


class Branch(nn.Module):
    """An edge that examples take or leave.

    Args:
        name: of the edge.
        ends: nodes from which and to which it leads.
        body: what is on it.
        head: decides, None where nothing is left to decide; its values are > 0 where a gate is open.
        columns: of its decisions among all gates of the network.
        leader: name of an earlier edge whose decisions are those on this one too, in place of a head.
        own: whether the first decision is on the edge as a whole; the others are on its channel groups.
        exit: what takes it ends here.
        answers: the head looks at what the body makes of the start's value.
    """

    def __init__(
        self,
        name: str,
        ends: tuple[int, int],
        body: Body,
        head: Head | None,
        columns: Sequence[int],
        *,
        leader: str | None,
        own: bool,
        exit: bool,
        answers: bool,
    ) -> None:
        super().__init__()
        self.name, self.body, self.head, self.own, self.exit = name, body, head, own, exit
        self.answers, self.leader = answers, leader
        self.start, self.end = ends
        self.columns = tuple(columns)
        self.limits: dict[int, Limits] = {}
        """What was measured, by batch size."""
        self.gated = head is not None or leader is not None
        """Whether something is left to decide on it."""
        self.passes = body.passes and not self.gated
        """Whether every value passes unchanged."""
        # bound once: looking up a part of a module takes as long as a small operation
        self.run, self._ask = body.run, None if head is None else head.one
        self._always = (body.full, None)
        self._ways: dict[Pattern, str] = {}

    def one(self, x: Tensor, said: dict[str, list[float]]) -> tuple[Pattern, Tensor | None] | None:
        """How to run the edge on a single example, None where it does not take it.

        Args:
            x: `(1, ...)`.
            said: by its name what each edge's head said; this one's is added.

        Returns:
            The channel groups to compute, and the `(1, n)` decisions where those are not what is open.
        """
        if self._ask is not None:
            values = said[self.name] = self._ask(x)
        elif self.leader is not None:
            values = said[self.leader]
        else:
            return self._always
        if self.own:
            if not values[0] > 0:
                return None
            if len(values) == 1:
                return self._always
            del values[0]
        pattern = tuple([value > 0 for value in values])
        way = self._ways.get(pattern)
        if way is None:
            if len(self._ways) >= MEMORY:
                self._ways.clear()
            way = self._ways[pattern] = self._way(pattern)
        if way == "closed":
            return None
        if way == "cut":
            return pattern, None
        return self.body.full, torch.tensor([pattern], dtype=x.dtype, device=x.device)

    def _way(self, pattern: Pattern) -> str:
        """How a single example that opens these groups is run: "closed", "cut" to them, or "masked"."""
        if not self.body.alive(pattern):
            return "closed"
        cut = pattern == self.body.full or self.body.share(pattern) <= self.limits_at(1).channels
        return "cut" if cut else "masked"

    def learn(self, limits: Mapping[int, Limits]) -> None:
        """Takes over what was measured, by batch size."""
        self.limits.update(limits)
        self._ways.clear()

    def limits_at(self, batch: int) -> Limits:
        """What was measured at the nearest batch size, a cautious guess where nothing was."""
        if batch in self.limits or not self.limits:
            return self.limits.get(batch, Limits())
        return self.limits[min(self.limits, key=lambda known: max(known / batch, batch / known))]

    def takers(self, decisions: Sequence[Sequence[float]] | None, reached: Sequence[bool] | None, batch: int) -> Takers:
        """The rows that take this edge.

        Args:
            decisions: `(B, n)` values > 0 where a gate is open, None where there is nothing to decide.
            reached: whether each row has a value at the start, None for all.
            batch: rows B.
        """
        taken: Takers = {}
        own = self.own
        for row in range(batch):
            if reached is not None and not reached[row]:
                continue
            pattern: Pattern = ()
            if decisions is not None:
                values = decisions[row]
                if own and not values[0] > 0:
                    continue
                pattern = tuple([value > 0 for value in (values[1:] if own else values)])
            taken.setdefault(pattern, []).append(row)
        return {pattern: rows for pattern, rows in taken.items() if self.body.alive(pattern)}

    def plan(self, taken: Takers, batch: int) -> list[Part]:
        """The cheapest way, as far as was measured, to run the rows that take this edge.

        Either the whole batch as it is, with weights cut to the channels that any row opens; or in parts, the rows
        of each gathered and with weights of its own.
        """
        if not taken:
            return []
        limits, body = self.limits_at(batch), self.body

        def cost(part: Part) -> float:
            share = body.share(part.pattern) if body.groups else 1.0
            return limits.time(None if part.whole else len(part.rows) / batch, share)

        together = Part(union(taken), sorted(row for rows in taken.values() for row in rows), True, None)
        chosen = [together]
        if len(together.rows) < batch or len(taken) > 1:
            parts: list[Part] = []
            for pattern in sorted(taken):
                part = Part(pattern, taken[pattern], False, None)
                while parts:  # neighbours that are cheaper to run as one
                    joined = Part(union((parts[-1].pattern, pattern)), [*parts[-1].rows, *part.rows], False, None)
                    if cost(joined) > cost(parts[-1]) + cost(part):
                        break
                    parts.pop()
                    part, pattern = joined, joined.pattern
                parts.append(part)
            if sum(map(cost, parts)) < cost(together):
                chosen = parts
        of_row = {row: pattern for pattern, rows in taken.items() for row in rows}
        return [self._cut(part, of_row, batch, limits) for part in chosen]

    def _cut(self, part: Part, of_row: dict[int, Pattern], batch: int, limits: Limits) -> Part:
        """The part with the channels that are worth cutting to, and what each row opens where that differs."""
        if not self.body.groups:
            return part
        pattern = part.pattern if self.body.share(part.pattern) <= limits.channels else self.body.full
        if all(of_row[row] == pattern for row in part.rows):
            return part._replace(pattern=pattern)
        run = range(batch) if part.whole else part.rows
        return part._replace(pattern=pattern, patterns=[of_row.get(row, pattern) for row in run])


def union(patterns: Sequence[Pattern] | Takers) -> Pattern:
    """The groups that any pattern opens."""
    return tuple([any(groups) for groups in zip(*patterns, strict=True)])


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """The rows of a batch, in the memory format of `x`."""
    flat = flattened(x)
    if flat is None:
        return x.index_select(0, rows)
    taken = flat.index_select(0, rows)
    if x.is_contiguous():
        return taken.view(len(rows), *x.shape[1:])
    return taken.view(len(rows), *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)


def add_rows(total: Tensor, rows: Tensor, part: Tensor) -> None:
    """Adds `part` to the rows of `total`, in place."""
    part = part.to(total.dtype)
    flat, other = flattened(total), flattened(part)
    if flat is None or other is None or total.is_contiguous() != part.is_contiguous():
        total.index_add_(0, rows, part)
    else:
        flat.index_add_(0, rows, other)


def clear_rows(x: Tensor, rows: Tensor) -> None:
    """Sets the rows of `x` to zero, in place."""
    flat = flattened(x)
    (x if flat is None else flat).index_fill_(0, rows, 0.0)


def flattened(x: Tensor) -> Tensor | None:
    """`(B, -1)` view in the order of memory, in which rows are moved fast; None where there is none."""
    if x.is_contiguous():
        return x.view(len(x), -1) if x.numel() else None
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).view(len(x), -1) if x.numel() else None
    return None
