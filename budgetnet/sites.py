"""Gates and the policies that decide them: a gate is a Bernoulli variable, a site is a place with n gates.

A policy maps a site's logits to its decisions. Independent sites own their logits, one for each
gate, shared by all architectures; conditional sites compute `(B, n)` logits from their features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from budgetnet.errors import ConfigError


class Gates(nn.Module):
    """A site of gates that do not look at the input: `P(kept) = sigmoid(logit)`.

    Args:
        count: number of gates n.
        start: logit of every gate at the start; 3 keeps an edge with probability 0.953 (BSN appendix).
        pairs: learn two logits `w_0, w_1` for each gate, whose difference `w_1 - w_0` is its logit
            (Herrmann et al., section 3.2); weight decay on them pulls towards 0.5 (Eq. 2).
    """

    def __init__(self, count: int, *, start: float = 3.0, pairs: bool = False) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(2, count) if pairs else torch.zeros(count))
        self.reset(start)

    @property
    def logits(self) -> Tensor:
        """`(n,)` logits, differentiable in what is learned."""
        return self.values if self.values.ndim == 1 else self.values[1] - self.values[0]

    @torch.no_grad()
    def reset(self, start: float) -> None:
        """Gives every gate this logit."""
        self.values.copy_(torch.full_like(self.values, float(start)))
        if self.values.ndim == 2:
            self.values.copy_(self.values / 2 * torch.tensor([[-1.0], [1.0]], device=self.values.device))

    @torch.no_grad()
    def shift(self, by: float) -> None:
        """Adds to every logit."""
        if self.values.ndim == 1:
            self.values.add_(by)
        else:
            self.values.add_(by / 2 * torch.tensor([[-1.0], [1.0]], device=self.values.device))

    @torch.no_grad()
    def clamp(self, bound: float) -> None:
        """Keeps every logit in [-bound, bound], so that no gate is out of reach."""
        if self.values.ndim == 1:
            self.values.clamp_(-bound, bound)
        else:  # what is too much is taken from both, so that their mean stays
            middle, half = self.values.mean(dim=0), self.logits.clamp(-bound, bound) / 2
            self.values.copy_(torch.stack([middle - half, middle + half]))


class ConditionalGates(nn.Module):
    """A site of n gates that look at the input: average pool, then two small layers for each gate.

    Args:
        channels: of the features it looks at.
        count: number of gates n.
        hidden: features of each gate between its two layers.
        pairs: two logits a gate, as in the papers; the logit is their difference.
        memory: lets each gate see the tentative decisions of all others of this site: their logits pass
            another linear layer, batch norm, ReLU and linear layer (S1.3).
        start: bias of every gate's logit; 2 opens a gate with probability 0.88.

    Source: Herrmann et al., S1.4 and S1.3; the form of ConvNet-AIG.
    """

    def __init__(
        self,
        channels: int,
        count: int,
        *,
        hidden: int = 16,
        pairs: bool = True,
        memory: bool = False,
        start: float = 2.0,
    ) -> None:
        super().__init__()
        self.count, self.pairs = count, pairs
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, hidden * count, 1)
        self.norm = nn.BatchNorm2d(hidden * count)
        self.decide = nn.Conv2d(hidden * count, (1 + pairs) * count, 1, groups=count)
        recall = [nn.Linear(count, count), nn.BatchNorm1d(count), nn.ReLU(), nn.Linear(count, count)]
        self.recall = nn.Sequential(*recall) if memory else None
        nn.init.normal_(self.decide.weight, std=0.01)
        if self.recall is not None:  # it starts as nothing, so that `start` is where gates start
            for value in self.recall[-1].parameters():
                nn.init.zeros_(value)
        self.reset(start)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, channels, H, W)` features to `(B, n)` logits."""
        values: Tensor = self.decide(torch.relu(self.norm(self.reduce(self.pool(x))))).flatten(1)
        if self.pairs:
            values = values.reshape(-1, self.count, 2)
            values = values[..., 1] - values[..., 0]
        if self.recall is not None:
            values = values + self.recall(values)
        return values

    @property
    def average(self) -> Tensor:
        """`(n,)` logits by the biases alone: about those of an average input."""
        assert self.decide.bias is not None
        values = self.decide.bias.reshape(self.count, -1)
        return values[:, 1] - values[:, 0] if self.pairs else values[:, 0]

    @torch.no_grad()
    def reset(self, start: float) -> None:
        """Gives every gate this logit on the average input."""
        assert self.decide.bias is not None
        bias = torch.tensor([-start / 2, start / 2] if self.pairs else [start])
        self.decide.bias.copy_(bias.repeat(self.count))

    @torch.no_grad()
    def shift(self, by: float) -> None:
        """Adds to the logit of every gate, whatever the input."""
        last = self.decide if self.recall is None else self.recall[-1]
        step = torch.tensor([-by / 2, by / 2] if self.pairs and self.recall is None else [by])
        assert isinstance(last, nn.Conv2d | nn.Linear)
        assert last.bias is not None
        last.bias.add_(step.to(last.bias).repeat(self.count))


class ExitGate(nn.Module):
    """What decides on an exit, its one gate: features, then a linear layer to two logits.

    Args:
        features: `(B, ...)` to `(B, n)`.
        width: n.
        count: number of gates, 1.
        start: bias of the logit: negative values leave the exit closed at first.

    Raises:
        ConfigError: the edge has other gates, in its channels.
    """

    def __init__(self, features: nn.Module, width: int, count: int, start: float) -> None:
        super().__init__()
        if count != 1:
            raise ConfigError(f"the gate of an exit decides on the exit alone, got {count} gates")
        self.count, self.features, self.decide = count, features, nn.Linear(width, 2)
        self.reset(start)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, ...)` to `(B, 1)` logits."""
        values = self.decide(self.features(x))
        logits: Tensor = values[:, 1:] - values[:, :1]
        return logits

    @property
    def average(self) -> Tensor:
        """`(1,)` logit by the biases alone: about that of an average input."""
        return self.decide.bias[1:] - self.decide.bias[:1]

    @torch.no_grad()
    def reset(self, start: float) -> None:
        """Gives the gate this logit on the average input."""
        self.decide.bias.copy_(torch.tensor([-start / 2, start / 2]))

    @torch.no_grad()
    def shift(self, by: float) -> None:
        """Adds to the gate's logit, whatever the input."""
        self.decide.bias.add_(torch.tensor([-by / 2, by / 2]).to(self.decide.bias))


class FeatureGate(ExitGate):
    """The stronger gate of an exit, beside its classifier: two 3x3 convolutions, a 4x4 average pool, a linear layer.

    Args:
        channels: of the features it looks at.
        count: number of gates, 1.
        hidden: channels of both convolutions.
        pool: side of the squares over which the features are averaged before; 1 as in the paper, where the
            gate's MACs come near to those of the network it is to save.
        start: bias of the logit: negative values leave the exit closed at first.

    Source: Herrmann et al., S1.5. Differs: a ReLU behind each batch norm, where their list has none; their "4x4
        average pool" is read as one to 4 x 4 pixels, not of squares of that side.
    """

    def __init__(self, channels: int, count: int = 1, *, hidden: int = 128, pool: int = 1, start: float = -1.0) -> None:
        features = nn.Sequential(
            *([nn.AvgPool2d(pool)] if pool > 1 else []),
            nn.Conv2d(channels, hidden, 3, padding=1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
        )
        super().__init__(features, 16 * hidden, count, start)


class AnswerGate(ExitGate):
    """The gate of an exit that looks at its answer: how sure it is decides whether it is the last.

    Args:
        classes: of the answer.
        count: number of gates, 1.
        start: bias of the logit: negative values leave the exit closed at first.

    Raises:
        ConfigError: there is one class alone.

    Source: multi-scale dense networks leave where they are sure enough (Huang et al., arXiv:1703.09844, section 4);
        here what is enough is learned.
    """

    def __init__(self, classes: int, count: int = 1, *, start: float = -1.0) -> None:
        if classes < 2:
            raise ConfigError(f"how sure an answer is shows from 2 classes on, got {classes}")
        super().__init__(nn.Sequential(Certainty(), nn.BatchNorm1d(3)), 3, count, start)


class Certainty(nn.Module):
    """How sure an answer is: its largest probability, how far that is ahead of the second, and the entropy in nats."""

    def forward(self, x: Tensor) -> Tensor:
        """`(B, classes)` logits to `(B, 3)`, without a gradient to them: to be sure is no aim of its own.

        Computed in float32 or better, and given in the type of the logits; under autocast in float32.
        """
        logs = F.log_softmax(x.detach().to(torch.promote_types(x.dtype, torch.float32)), dim=1)
        best = logs.exp().topk(2, dim=1).values
        unsure = -(logs.exp() * logs).sum(dim=1, keepdim=True)
        found = torch.cat([best[:, :1], best[:, :1] - best[:, 1:], unsure], dim=1)
        device = x.device.type
        mixed = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        return found if mixed else found.to(x.dtype)


class Policy(Protocol):
    """Decides the gates of one site."""

    @property
    def blind(self) -> bool:
        """Whether it decides without the logits."""

    def __call__(self, logits: Tensor, columns: slice) -> Tensor:
        """Maps logits, `(n,)` shared or `(B, n)` one row an architecture, to `(B, n)` decisions in {0, 1}.

        `columns` are the site's places among all gates of the network. Decisions that carry a gradient
        make the network compute everything and multiply by them.
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
    blind: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.architectures < 1:
            raise ConfigError(f"architectures must be >= 1, got {self.architectures}")

    def __call__(self, logits: Tensor, columns: slice) -> Tensor:
        """Draws `(B, n)` decisions."""
        probability = rows(logits, self.architectures).detach().sigmoid()
        return torch.bernoulli(probability, generator=self.generator)


@dataclass(frozen=True)
class Gumbel:
    """Draws each gate from its Bernoulli distribution, with a gradient to the logits through what was drawn.

    `soft = sigmoid((logit + noise) / temperature)` with logistic noise, the difference of two Gumbel
    variables; the decision is 1 where `soft > 1/2`, which has probability `sigmoid(logit)`.

    Attributes:
        architectures: B architectures drawn where the logits are shared, >= 1.
        temperature: > 0; the papers' 1.0.
        hard: straight-through: decisions in {0, 1} forward, the gradient of `soft` backward; else `soft` itself.
        generator: source of randomness, on the device of the logits.
        noisy: where False the noise is 0: a gate is open if its probability is above 1/2, as it will be once it is
            learned, and keeps the gradient of `soft`.

    Source: Jang et al., arXiv:1611.01144; Herrmann et al., sections 1.1 and 3.2. Theirs is always noisy.
    """

    architectures: int = 1
    temperature: float = 1.0
    hard: bool = True
    generator: torch.Generator | None = None
    noisy: bool = True
    blind: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.architectures < 1:
            raise ConfigError(f"architectures must be >= 1, got {self.architectures}")
        if not self.temperature > 0:
            raise ConfigError(f"temperature must be > 0, got {self.temperature}")

    def __call__(self, logits: Tensor, columns: slice) -> Tensor:
        """Draws `(B, n)` decisions, in {0, 1} or, where not `hard`, in (0, 1)."""
        shared = rows(logits, self.architectures)
        if self.noisy:
            uniform = torch.rand(shared.shape, generator=self.generator, device=shared.device, dtype=torch.float32)
            shared = shared + torch.logit(uniform, eps=1e-7)
        soft = torch.sigmoid(shared / self.temperature)
        # soft - soft.detach() is exactly 0 and carries the gradient
        return (soft > 0.5).to(soft) + (soft - soft.detach()) if self.hard else soft


@dataclass(frozen=True)
class Threshold:
    """Keeps the gates whose probability is greater than `tau`; at 0.5 this is the most probable architecture.

    Source: Herrmann et al., section 3.3.
    """

    tau: float = 0.5
    blind: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 1:
            raise ConfigError(f"tau must lie in [0, 1], got {self.tau}")

    def __call__(self, logits: Tensor, columns: slice) -> Tensor:
        """Decides `(B, n)`, B = 1 where the logits are shared."""
        # compared as logits: probabilities near 0 and 1 are all alike
        return (rows(logits, 1).detach() > self.logit).to(logits.dtype)

    @property
    def logit(self) -> float:
        """The logit of tau, infinite where tau is 0 or 1."""
        return math.log(self.tau / (1 - self.tau)) if 0 < self.tau < 1 else math.copysign(math.inf, self.tau - 0.5)


@dataclass(frozen=True)
class AlwaysOn:
    """Keeps every gate: the full network, as during warm-up."""

    blind: ClassVar[bool] = True

    def __call__(self, logits: Tensor, columns: slice) -> Tensor:
        """Keeps all, `(B, n)`."""
        return torch.ones_like(rows(logits, 1).detach())


@dataclass(frozen=True, eq=False)
class Fixed:
    """The given architectures, `(B, G)` bits over all gates of the network."""

    kept: Tensor
    blind: ClassVar[bool] = True

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
