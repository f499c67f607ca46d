"""What costs that were seen say about others: a ridge regression on what is used."""

from __future__ import annotations

import torch
from torch import Tensor

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Of these the one that predicts best what it was not fitted to is taken."""


class LinearFit:
    """`C(H) = w_0 + sum_u w_u used_u(H)`, fitted to all values seen so far.

    No value is kept, only sums of products, in two halves: what is fitted to one is judged by the other. The weights
    in use are fitted to both.

    Args:
        units: U.

    Attributes:
        sums: `(2, U + 2, U + 2)` float64: of each half the sum over values v of `z z^T`, `z = (1, used, v)`.
    """

    def __init__(self, units: int) -> None:
        self.sums = torch.zeros(2, units + 2, units + 2, dtype=torch.float64)
        self._known: tuple[Tensor, float] | None = None

    def add(self, used: Tensor, values: Tensor, *, weight: float = 1.0) -> None:
        """Takes up `(n,)` values of `(n, U)` used units; a mean of m values has the weight m."""
        rows = torch.cat([torch.ones(len(used), 1), used, values[:, None]], dim=1).to(torch.float64)
        for half in (0, 1):
            part = rows[half::2]
            self.sums[half] += weight * part.t() @ part
        self._known = None

    def __call__(self, used: Tensor) -> Tensor:
        """Maps `(n, U)` used units to `(n,)` float64 predictions, >= 0."""
        weights, _ = self._fitted()
        return (weights[0] + used.to(torch.float64) @ weights[1:]).clamp(min=0)

    @property
    def count(self) -> int:
        """Values seen so far."""
        return round(float(self.sums[:, 0, 0].sum()))

    @property
    def r_squared(self) -> float:
        """Share of the values' variance that is predicted, each half by what is fitted to the other; 1 is all."""
        return self._fitted()[1]

    def take(self, sums: Tensor) -> None:
        """Goes on from the `sums` of another."""
        self.sums.copy_(sums)
        self._known = None

    def _fitted(self) -> tuple[Tensor, float]:
        if self._known is None:
            left_out = {
                ridge: _squares(self.sums[1], _weights(self.sums[0], ridge))
                + _squares(self.sums[0], _weights(self.sums[1], ridge))
                for ridge in RIDGES
            }
            best = min(left_out, key=lambda ridge: left_out[ridge])
            both = self.sums.sum(dim=0)
            number, total, squares = (float(both[place]) for place in ((0, 0), (0, -1), (-1, -1)))
            varied = squares - total**2 / number
            share = 1 - left_out[best] / varied if varied > 1e-12 * squares else 1.0  # else nothing varies
            self._known = _weights(both, best), share
        return self._known


def _weights(sums: Tensor, ridge: float) -> Tensor:
    """`(1 + U,)` weights by one half's sums; the constant is not drawn to 0."""
    drawn = torch.full((len(sums) - 1,), ridge * float(sums[0, 0]), dtype=sums.dtype)
    drawn[0] = 0
    weights: Tensor = torch.linalg.solve(sums[:-1, :-1] + drawn.diag(), sums[:-1, -1])
    return weights


def _squares(sums: Tensor, weights: Tensor) -> float:
    """Sum of squared errors of the values in `sums`: `z (w, -1)` is an error."""
    error = torch.cat([weights, -weights.new_ones(1)])
    return max(0.0, float(error @ sums @ error))
