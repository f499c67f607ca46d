"""Gates and the policies that decide them: a gate is a Bernoulli variable, a site is a place with n gates.

A policy maps a site's logits to its decisions. Independent sites own their logits, one for each
gate, shared by all architectures; a site that looks at its input would pass `(B, n)` logits instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from budgetnet.errors import ConfigError


class Gates(nn.Module):
    """A site of gates that do not look at the input: `P(kept) = sigmoid(logit)`.

    Args:
        count: number of gates n.
        start: logit of every gate at the start; 3 keeps an edge with probability 0.953 (BSN appendix).
    """

    def __init__(self, count: int, *, start: float = 3.0) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.full((count,), float(start)))


class Policy(Protocol):
    """Decides the gates of one site."""

    def __call__(self, logits: Tensor, columns: slice) -> Tensor:
        """Maps logits, `(n,)` shared or `(B, n)` one row an architecture, to `(B, n)` decisions in {0, 1}.

        `columns` are the site's places among all gates of the network.
        """


@dataclass(frozen=True)
class Sample:
    """Draws each gate from its Bernoulli distribution.

    Attributes:
        architectures: B architectures drawn where the logits are shared, >= 1.
        generator: source of randomness, on the device of the logits.
    """

    architectures: int = 1
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.architectures < 1:
            raise ConfigError(f"architectures must be >= 1, got {self.architectures}")

    def __call__(self, logits: Tensor, columns: slice) -> Tensor:
        """Draws `(B, n)` decisions."""
        probability = rows(logits, self.architectures).detach().sigmoid()
        return torch.bernoulli(probability, generator=self.generator)


@dataclass(frozen=True)
class Threshold:
    """Keeps the gates whose probability is greater than `tau`; at 0.5 this is the most probable architecture.

    Source: Herrmann et al., section 3.3.
    """

    tau: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 1:
            raise ConfigError(f"tau must lie in [0, 1], got {self.tau}")

    def __call__(self, logits: Tensor, columns: slice) -> Tensor:
        """Decides `(B, n)`, B = 1 where the logits are shared."""
        return (rows(logits, 1).detach().sigmoid() > self.tau).to(logits.dtype)


@dataclass(frozen=True)
class AlwaysOn:
    """Keeps every gate: the full network, as during warm-up."""

    def __call__(self, logits: Tensor, columns: slice) -> Tensor:
        """Keeps all, `(B, n)`."""
        return torch.ones_like(rows(logits, 1).detach())


@dataclass(frozen=True, eq=False)
class Fixed:
    """The given architectures, `(B, G)` bits over all gates of the network."""

    kept: Tensor

    def __call__(self, logits: Tensor, columns: slice) -> Tensor:
        """The given decisions at this site."""
        return self.kept[:, columns].to(logits)


def rows(logits: Tensor, architectures: int) -> Tensor:
    """`(B, n)` logits: as they come, or one shared row for each architecture."""
    return logits.expand(architectures, -1) if logits.ndim == 1 else logits


def log_prob(logits: Tensor, kept: Tensor, counted: Tensor) -> Tensor:
    """Log-probability of the decisions that count.

    Args:
        logits: `(G,)`, or `(B, G)` where they depend on the input.
        kept: `(B, G)` decisions in {0, 1}.
        counted: `(B, G)` 1 where the decision was taken and could matter, else 0.

    Returns:
        `(B,)`, differentiable in the logits.
    """
    # log sigmoid(z) for a kept gate, log sigmoid(-z) = log(1 - sigmoid(z)) for a dropped one
    return (F.logsigmoid(logits * (2 * kept - 1)) * counted).sum(dim=1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of each gate in nats: ln 2 where it is undecided, 0 once it is certain; shape of `logits`."""
    return -(logits.sigmoid() * F.logsigmoid(logits) + (-logits).sigmoid() * F.logsigmoid(-logits))
