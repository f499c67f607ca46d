"""What decides the gates that look at the input, narrowed to those that are still to be decided."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from budgetnet.conditional.bodies import versions
from budgetnet.extraction import fold_batch_norm
from budgetnet.sites import ConditionalGates, ExitGate, Threshold

FEW = 8
"""Gates up to which a head's last layer is one product with a matrix that is mostly zeros: fewer calls."""
SMALL = 256
"""Hidden features up to which the last layer of a head is computed in Python for a single example."""


class Head(nn.Module):
    """Decides gates: maps features to values that are > 0 where a gate is open."""

    def one(self, x: Tensor) -> list[float]:
        """The n values of a single example `(1, ...)`."""
        values: list[float] = self(x)[0].tolist()
        return values


class PooledHead(Head):
    """Two layers on the mean of each channel: what `ConditionalGates` compute, for some of its gates.

    Args:
        gates: in evaluation mode.
        columns: of its gates that are decided.
    """

    def __init__(self, gates: ConditionalGates, columns: Sequence[int]) -> None:
        super().__init__()
        reduce = fuse_conv_bn_eval(gates.reduce, gates.norm)
        hidden = reduce.out_channels // gates.count
        weight = gates.decide.weight.detach().reshape(gates.count, 1 + gates.pairs, hidden)
        bias = cast(Tensor, gates.decide.bias).detach().reshape(gates.count, 1 + gates.pairs)
        if gates.pairs:
            weight, bias = weight[:, 1:] - weight[:, :1], bias[:, 1:] - bias[:, :1]
        rows = [row for column in columns for row in range(column * hidden, (column + 1) * hidden)]
        self.reduce = linear(reduce.weight.detach()[rows].flatten(1), cast(Tensor, reduce.bias).detach()[rows])
        self._held: Held | None = None
        self.decide = Apart(weight[list(columns), 0], bias[list(columns), 0])

    def forward(self, x: Tensor) -> Tensor:
        """`(B, channels, H, W)` features to `(B, n)` logits."""
        values: Tensor = self.decide(F.linear(x.mean(dim=(2, 3)), self.reduce.weight, self.reduce.bias).relu_())
        return values

    def one(self, x: Tensor) -> list[float]:
        """The n values of a single example `(1, channels, H, W)`.

        A second layer as small as this one mostly is takes longer to call than to compute in Python.
        """
        channels = x.shape[1]
        if torch.is_autocast_enabled(x.device.type):  # which casts some of what follows and leaves the rest
            return super().one(x)
        if x.is_contiguous():
            flat = x.view(channels, -1)
        elif x.is_contiguous(memory_format=torch.channels_last):
            flat = x.as_strided((channels, x.shape[2] * x.shape[3]), (1, channels))
        else:
            return super().one(x)
        held = self._held
        if held is None or held.versions != versions(held.second) or held.mean.dtype != x.dtype:
            held = self._held = self._hold(x, flat.shape[1])
        features = torch.addmv(held.bias, held.weight, torch.mv(flat, held.mean))
        values: list[float] = []
        if len(held.weight) > SMALL:
            values = self.decide(features.relu_()[None])[0].tolist()
            return values
        hidden, at = features.tolist(), 0
        for value, weights in held.gates:
            for weight in weights:
                if (feature := hidden[at]) > 0:
                    value += weight * feature
                at += 1
            values.append(value)
        return values

    def _hold(self, x: Tensor, pixels: int) -> Held:
        gates = list(zip(self.decide.bias.tolist(), self.decide.weight.tolist(), strict=True))
        second = (self.decide.weight, self.decide.bias)
        mean = x.new_full((pixels,), 1 / pixels)
        return Held(mean, self.reduce.weight, self.reduce.bias, gates, second, versions(second))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PooledHead:
        self._held = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


class Apart(nn.Module):
    """One value for each gate from hidden features of its own: `(B, n h)` to `(B, n)`.

    Args:
        weight: `(n, h)`.
        bias: `(n,)`.
    """

    whole: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())
        whole = torch.block_diag(*weight.detach()) if len(weight) <= FEW else None  # type: ignore[no-untyped-call]
        self.register_buffer("whole", whole, persistent=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """One product, or a sum of products: both take longer as that many convolutions of one pixel."""
        if self.whole is not None:
            return F.linear(hidden, self.whole, self.bias)
        apart = hidden.view(len(hidden), *self.weight.shape)
        return (apart * self.weight).sum(dim=2) + self.bias


class Held(NamedTuple):
    """What a head needs for a single example, looked up once.

    Attributes:
        mean: `(H W,)` weights of the average.
        weight, bias: of the first layer.
        gates: bias and weights of each gate's second layer.
        second: the parameters that these came from, and how often they had been written to.
    """

    mean: Tensor
    weight: Tensor
    bias: Tensor
    gates: list[tuple[float, list[float]]]
    second: tuple[Tensor, ...]
    versions: tuple[int, ...]


class RecallingHead(Head):
    """Gates that see each other's tentative decisions: all are computed, those asked for are corrected and returned.

    Args:
        gates: with a memory, in evaluation mode.
        columns: of its gates that are decided.
    """

    columns: Tensor

    def __init__(self, gates: ConditionalGates, columns: Sequence[int]) -> None:
        super().__init__()
        assert gates.recall is not None
        first, norm, _, last = gates.recall
        assert isinstance(last, nn.Linear)
        self.tentative = PooledHead(gates, range(gates.count))
        self.recall = fuse_linear_bn_eval(cast(nn.Linear, first), cast(nn.BatchNorm1d, norm))
        self.correct = linear(last.weight.detach()[list(columns)], last.bias.detach()[list(columns)])
        self.register_buffer("columns", torch.tensor(list(columns)))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, channels, H, W)` features to `(B, n)` logits."""
        values = self.tentative(x)
        corrected: Tensor = values.index_select(1, self.columns) + self.correct(torch.relu(self.recall(values)))
        return corrected


class ExitHead(Head):
    """What an `ExitGate` computes, as one logit.

    Args:
        gates: in evaluation mode.
        threshold: taken off the logit.
    """

    def __init__(self, gates: ExitGate, threshold: float) -> None:
        super().__init__()
        weight, bias = gates.decide.weight, gates.decide.bias
        self.features = fold_batch_norm(gates.features)
        self.decide = linear(weight[1:] - weight[:1], bias[1:] - bias[:1] - threshold)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, channels, H, W)` features to `(B, 1)` logits."""
        logits: Tensor = self.decide(self.features(x))
        return logits


class SelectedHead(Head):
    """Some of the logits that a head of another kind computes.

    Args:
        head: in evaluation mode.
        columns: of its gates that are decided, None for all.
        threshold: taken off each logit.
    """

    columns: Tensor | None

    def __init__(self, head: nn.Module, columns: Sequence[int] | None, threshold: float) -> None:
        super().__init__()
        self.head, self.threshold = head, threshold
        self.register_buffer("columns", None if columns is None else torch.tensor(list(columns)))

    def forward(self, x: Tensor) -> Tensor:
        """Features of the edge's start to `(B, n)` logits."""
        logits: Tensor = self.head(x) if self.columns is None else self.head(x).index_select(1, self.columns)
        return logits - self.threshold if self.threshold else logits


def narrowed_head(head: nn.Module, columns: Sequence[int], count: int, tau: float) -> Head:
    """A copy of what decides an edge's gates that computes some of them, batch norms folded.

    Args:
        head: maps features to a logit for each of its gates.
        columns: of its gates that are to be decided.
        count: of its gates.
        tau: probability above which a gate is open.

    Returns:
        Maps features to `(B, n)` values > 0 where a gate is open: logits less that of `tau`.
    """
    threshold = Threshold(tau).logit
    head = copy.deepcopy(head).eval()
    if type(head) is ConditionalGates:
        pooled = RecallingHead(head, columns) if head.recall is not None else PooledHead(head, columns)
        last = pooled.correct if isinstance(pooled, RecallingHead) else pooled.decide
        with torch.no_grad():
            last.bias.sub_(threshold)
        return pooled
    if isinstance(head, ExitGate):
        return ExitHead(head, threshold)
    return SelectedHead(fold_batch_norm(head), None if len(columns) == count else columns, threshold)


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """The linear layer of these `(out, in)` weights and `(out,)` biases."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight, layer.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())
    return layer
