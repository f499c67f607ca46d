"""Choosing among architectures: candidates that keep the budgets when they are measured; a report's Pareto front."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf
from statistics import median
from typing import Any

import torch
from torch import Tensor

from budgetnet.budgets import TOLERANCE, BoundBudget
from budgetnet.costs.measured import LearningModel, MeasuredModel
from budgetnet.errors import UnreachableBudget
from budgetnet.projection import CLOSE, binding, mend, probable, room, trimmed
from budgetnet.supernet import SuperNetwork

NEAR = 6
"""Of the likeliest architectures so many are measured before the choice among all."""
ATTEMPTS = 5
ORDERS = 16
"""Random orders in which the full network is cut before budgets are said to contradict each other."""
CONFIRMED, AGAIN, ROUNDS = 5, 2, 3
"""Candidates that are measured with more care before others are looked for, at most, and how often these are.

Fewer of those that are looked for because one leaves much: where none of them keeps the limits, there is that one.
"""
LEFT = 0.04
"""Share of a limit that may be left when it is measured with more care; else others are looked for above it."""
TIGHTER = 0.85
"""A limit on predictions becomes so many times as large where no other architectures are found below it."""


def pareto_front(cost: Tensor, quality: Tensor) -> Tensor:
    """Which of n points no other beats: lower or equal cost and higher or equal quality, one of them strictly.

    Args:
        cost: `(n,)`, lower is better.
        quality: `(n,)`, higher is better.

    Returns:
        `(n,)` bool.

    Source: BSN, section 4.2 and appendix ("Model Selection Protocol").
    """
    better = (cost[:, None] <= cost) & (quality[:, None] >= quality)
    strictly = (cost[:, None] < cost) | (quality[:, None] > quality)
    return ~(better & strictly).any(dim=0)


def check_together(
    network: SuperNetwork, budgets: Sequence[BoundBudget], limits: Sequence[dict[str, Any]] = ()
) -> None:
    """Refuses targets that contradict the other budgets, by cutting the full network in several random orders.

    Limits alone are looked at by `budgets.check_reachable`, and costs that only a real network shows when they are
    measured. Where gates look at the input no architecture has to keep them.

    Args:
        network: the space.
        budgets: of it.
        limits: what `check_reachable` found of them, told with the error.

    Raises:
        UnreachableBudget: no order led to an architecture that keeps all counted budgets.
    """
    counted = [budget for budget in budgets if not isinstance(budget.model, MeasuredModel)]
    if network.heads or len(counted) < 2 or all(budget.upper for budget in counted):
        return
    generator, whole = torch.Generator().manual_seed(0), network.architecture("full")
    for _ in range(ORDERS):
        order = torch.randn(network.gate_count, generator=generator)
        if len(mend(network, counted, whole, order)):
            return
    asked = ", ".join(f"{b.name}{'<=' if b.upper else '~='}{b.limit:.6g}" for b in counted)
    raise UnreachableBudget(
        f"each budget can be kept alone, but no network of {network.name} was found that keeps them together: {asked}",
        limits,
    )


def measured_to_fit(
    network: SuperNetwork,
    budgets: Sequence[BoundBudget],
    *,
    count: int,
    generator: torch.Generator,
    pressed: bool = False,
) -> tuple[Tensor, list[list[float]]]:
    """Candidates that keep every budget, by what was measured where a cost can be: those that leave least first.

    Where predictions were too high or too low, the limit that they go by is moved and candidates are drawn again.
    Where none of these keeps the budgets, the architecture of least cost may. The arguments are those of `probable`.

    Returns:
        `(n, G)` architectures as `probable` gives them, 1 <= n <= count, and of each what it costs, in the budgets'
        order.

    Raises:
        UnreachableBudget: none was found that keeps all budgets together.
    """
    models = [budget.model for budget in budgets]
    if not any(isinstance(model, MeasuredModel) for model in models):
        pool = probable(network, budgets, count=count, generator=generator, pressed=pressed)
        used = network.used(pool)
        costs = [budget.model(used).tolist() for budget in budgets]
        return pool, [list(own) for own in zip(*costs, strict=True)] or [[] for _ in pool]
    for model in models:
        if isinstance(model, LearningModel):  # predictions are best where they were learned
            near = _drawn(network, budgets, count=min(count, NEAR), generator=generator, pressed=pressed)
            if len(near):
                model.refit(near)
    seen, wanted = Seen(network, budgets), list(budgets)
    ratios, tighter = [1.0] * len(budgets), 1.0
    for _ in range(ATTEMPTS):
        new = seen.new(_drawn(network, wanted, count=count, generator=generator, pressed=pressed))
        if len(new):
            predicted = [budget.model(network.used(new)) for budget in budgets]
            ratios = [_ratio(high, low) for high, low in zip(seen.add(new), predicted, strict=True)]
        if (seen.good and (room(budgets, seen.high[seen.good[0]]) < CLOSE or not len(new))) or not seen.high:
            break
        if not len(new):  # few architectures lie just below the limit: look for smaller ones
            tighter *= TIGHTER
        wanted = [_moved(budget, ratio, tighter) for budget, ratio in zip(budgets, ratios, strict=True)]
    if not seen.good:
        smallest = torch.cat([budget.cheapest(network) for budget in budgets])
        seen.add(seen.new(trimmed(network, smallest)))
    if not seen.good:
        count = len(seen.high)
        raise UnreachableBudget(f"of {count} networks of {network.name} that were measured none keeps {seen.broken()}")
    best = seen.good[:count]
    return torch.tensor(best), [seen.cost[row] for row in best]


@dataclass(eq=False)
class Candidate:
    """An architecture that keeps the budgets as it was measured.

    Attributes:
        kept: `(1, G)`.
        costs: in the budgets' order; as measured with more care once that was done.
        quality: on validation data.
    """

    kept: Tensor
    costs: list[float]
    quality: dict[str, float]


def choose(
    network: SuperNetwork,
    budgets: Sequence[BoundBudget],
    judge: Callable[[Tensor], dict[str, float]],
    best: Callable[[Sequence[Candidate]], int],
    *,
    count: int,
    generator: torch.Generator,
    pressed: bool = False,
) -> tuple[list[Candidate], Candidate]:
    """Of candidates the best that keeps the budgets also when it is measured with more care.

    Where the best ones all break a budget, others are looked for below tighter limits; where the one that keeps them
    leaves more than `LEFT` of every limit, below wider ones, as on a noisy machine candidates are measured too high:
    `ROUNDS` times in all.

    Args:
        network: the space.
        budgets: of it.
        judge: the quality of an architecture, `(1, G)`, on validation data.
        best: which one is of some.
        count: as in `probable`, like the two others.
        generator: likewise.
        pressed: likewise.

    Returns:
        All candidates, and the one that is chosen: of those that keep the budgets with more care, one a round, what
        leaves least; where none does, what breaks one least.

    Raises:
        UnreachableBudget: none was found that keeps all budgets together.
    """
    found, careful, wanted = dict[tuple[float, ...], Candidate](), dict[Candidate, list[float]](), list(budgets)
    for _ in range(ROUNDS):
        try:
            pool, costs = measured_to_fit(network, wanted, count=count, generator=generator, pressed=pressed)
        except UnreachableBudget:
            if not found:
                raise
            break
        rows = [tuple(row) for row in pool.tolist()]
        for row, bits, own in zip(rows, pool, costs, strict=True):
            if row not in found:
                found[row] = Candidate(bits[None], own, judge(bits[None]))
        kept = any(_excess(budgets, shares) <= 0 for shares in careful.values())
        most = AGAIN if kept else CONFIRMED
        seen = confirmed(budgets, [found[row] for row in rows if found[row] not in careful], best, most)
        careful |= seen
        if any(_close(budgets, shares) for shares in careful.values()) or (kept and not seen):
            break
        if any(_excess(budgets, shares) <= 0 for shares in seen.values()) and not binding(
            network, wanted, pressed=pressed
        ):
            break  # wider limits would open nothing
        wanted = _corrected(budgets, wanted, list(seen.values()))

    def off(one: Candidate) -> tuple[bool, float]:
        excess = _excess(budgets, careful[one])
        return excess > 0, abs(excess)

    return list(found.values()), min(careful, key=off)


def confirmed(
    budgets: Sequence[BoundBudget],
    candidates: Sequence[Candidate],
    best: Callable[[Sequence[Candidate]], int],
    most: int = CONFIRMED,
) -> dict[Candidate, list[float]]:
    """Measures candidates with more care, the best ones first, until one keeps the budgets: so many at most.

    Of many that were measured the one that leaves least of a limit is mostly one that was measured too low. What these
    cost is then known better.

    Returns:
        Of each that was measured what it may cost, as shares of the budgets' limits.
    """
    left, seen = list(candidates), dict[Candidate, list[float]]()
    while left and len(seen) < most:
        one = left.pop(best(left))
        looked = [_looked(budget, one.kept, cost) for budget, cost in zip(budgets, one.costs, strict=True)]
        one.costs, seen[one] = [cost for cost, _ in looked], [share for _, share in looked]
        if _excess(budgets, seen[one]) <= 0:
            break
    return seen


class Seen:
    """Architectures whose costs were measured where they can be.

    Attributes:
        cost: of each, in the budgets' order.
        high: the most that each of these is expected to be when it is measured again.
        good: those that keep the budgets also then; what leaves least of its tightest limit comes first.
    """

    def __init__(self, network: SuperNetwork, budgets: Sequence[BoundBudget]) -> None:
        self.network, self.budgets = network, budgets
        self.cost, self.high = dict[tuple[float, ...], list[float]](), dict[tuple[float, ...], list[float]]()
        self.good: list[tuple[float, ...]] = []

    def new(self, kept: Tensor) -> Tensor:
        """Those of `(n, G)` architectures that were not measured yet."""
        return kept[[tuple(row) not in self.cost for row in kept.tolist()]]

    def add(self, kept: Tensor) -> list[Tensor]:
        """Measures `(n, G)` architectures; what their costs may be when they are measured again, `(n,)` a budget."""
        if not len(kept):
            return []
        costs, highs = zip(*(_measured(self.network, budget, kept) for budget in self.budgets), strict=True)
        keep = torch.stack([budget.met(high) for budget, high in zip(self.budgets, highs, strict=True)]).all(dim=0)
        rows = [tuple(row) for row in kept.tolist()]
        self.cost |= dict(zip(rows, torch.stack(costs, dim=1).tolist(), strict=True))
        self.high |= dict(zip(rows, torch.stack(highs, dim=1).tolist(), strict=True))
        self.good += [row for row, fits in zip(rows, keep.tolist(), strict=True) if fits]
        self.good.sort(key=lambda row: room(self.budgets, self.high[row]))
        return list(highs)

    def broken(self) -> str:
        """The budgets that all break, with what comes nearest to each; all budgets where each is kept by some."""
        told = []
        for budget, costs in zip(self.budgets, zip(*self.high.values(), strict=True), strict=True):
            if not bool(budget.met(torch.tensor(costs, dtype=torch.float64)).any()):
                nearest = min(costs) if budget.upper else min(costs, key=lambda cost: abs(cost - budget.limit))
                takes = f"the {'least may take' if budget.upper else 'nearest takes'} {nearest:.6g}"
                told.append(f"{budget.name} at {budget.told}: {takes}")
        return "; ".join(told) or f"{' and '.join(f'{each.name} at {each.told}' for each in self.budgets)} together"


def _drawn(
    network: SuperNetwork, budgets: Sequence[BoundBudget], *, count: int, generator: torch.Generator, pressed: bool
) -> Tensor:
    """As `probable`, `(n, G)`, with n = 0 where no architecture is predicted to keep the budgets."""
    try:
        return probable(network, budgets, count=count, generator=generator, pressed=pressed)
    except UnreachableBudget:
        return network.architecture("full")[:0]


def _ratio(high: Tensor, predicted: Tensor) -> float:
    """How many times as high as was predicted costs are, `(n,)` each, in [0.5, 2]."""
    middle = float(predicted.median())
    return min(2.0, max(0.5, float(high.median()) / middle)) if middle > 0 else 1.0


def _moved(budget: BoundBudget, ratio: float, tighter: float) -> BoundBudget:
    """The same budget for predictions that are too low by `ratio`."""
    if not isinstance(budget.model, MeasuredModel):
        return budget
    return replace(budget, limit=budget.limit / ratio * (tighter * (1 - CLOSE / 2) if budget.upper else 1))


def _corrected(
    budgets: Sequence[BoundBudget], wanted: Sequence[BoundBudget], seen: Sequence[Sequence[float]]
) -> list[BoundBudget]:
    """Budgets for architectures that cost more, or less, than was measured: `seen` shares of the limits in its place.

    Limits become wider only where one of these keeps them all.
    """
    kept = [shares for shares in seen if _excess(budgets, shares) <= 0]
    moved = []
    for place, budget in enumerate(wanted):
        shares = [own[place] for own in kept or seen] or [1 / TIGHTER if budget.upper else 1.0]
        ratio = max(0.0 if kept else 1.0, *shares) if budget.upper else median(shares)
        moved.append(_moved(budget, min(1 / TIGHTER, max(TIGHTER, ratio)), 1.0))
    return moved


def _looked(budget: BoundBudget, kept: Tensor, cost: float) -> tuple[float, float]:
    """What an architecture, `(1, G)`, costs, measured with more care, and which share of its limit it may take."""
    if not isinstance(budget.model, MeasuredModel):
        return cost, min(1.0, cost / budget.limit) if budget.upper else 1.0
    found = budget.model.report(kept)
    return found.value, (found.high if budget.upper else found.value) / budget.limit


def _close(budgets: Sequence[BoundBudget], shares: Sequence[float]) -> bool:
    """Whether an architecture keeps the budgets, and leaves no more than `LEFT` where that could be mended."""
    mendable = all(each.upper for each in budgets) and any(isinstance(each.model, MeasuredModel) for each in budgets)
    return (-LEFT if mendable else -inf) <= _excess(budgets, shares) <= 0


def _excess(budgets: Sequence[BoundBudget], shares: Sequence[float]) -> float:
    """By which share of a limit an architecture that takes such shares breaks it, <= 0 where it keeps all."""
    pairs = zip(budgets, shares, strict=True)
    return max((share - 1 if each.upper else abs(share - 1) - TOLERANCE for each, share in pairs), default=0.0)


def _measured(network: SuperNetwork, budget: BoundBudget, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Costs of `(n, G)` architectures, and the most that each is expected to be when it is measured again, `(n,)`."""
    if not isinstance(budget.model, MeasuredModel):
        cost = budget.model(network.used(kept)).double()
        return cost, cost
    found = budget.model.measure(kept)
    seen = [(one.value, one.high if budget.upper else one.value) for one in found]
    cost, high = torch.tensor(seen, dtype=torch.float64).unbind(dim=1)
    return cost, high
