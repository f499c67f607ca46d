"""The examples of a batch, shared out among the architectures that serve them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import groupby
from operator import add

import torch
from torch import Tensor

from budgetnet.errors import ConfigError


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


def spread(values: Tensor, examples: int) -> Tensor:
    """`(K, ...)` of architectures to `(B, ...)` of the examples they serve, in contiguous slices."""
    if len(values) == examples:
        return values
    if len(values) == 1:
        return values.expand(examples, *values.shape[1:])
    if len(values) > examples:
        raise ConfigError(f"{len(values)} architectures need at least as many examples, got {examples}")
    sizes = [examples // len(values) + (k < examples % len(values)) for k in range(len(values))]
    return values.repeat_interleave(torch.tensor(sizes, device=values.device), dim=0)


def gated(value: Tensor, own: Tensor) -> Tensor:
    """`(B, ...)` values times `(K,)` gates, each of the examples that it decides for, with a gradient to them."""
    if not own.requires_grad and bool((own == 1).all()):
        return value
    mask = spread(own[:, None], len(value))
    return value * mask.reshape(len(value), *[1] * (value.ndim - 1)).to(value.dtype)
