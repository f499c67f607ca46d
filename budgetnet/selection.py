"""Choosing among architectures: the Pareto front, and the most probable ones that keep the budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from budgetnet.budgets import BoundBudget, fitting_path
from budgetnet.costs.measured import LearningModel, MeasuredModel
from budgetnet.errors import UnreachableBudget
from budgetnet.sites import log_prob
from budgetnet.supernet import SuperNetwork

NEAR = 6
"""Of the likeliest architectures so many are measured before the choice among all."""
ATTEMPTS = 5
TRIES = 4
ORDERS = 16
"""Random orders in which the full network is cut before budgets are said to contradict each other."""
SHIFTS = (0.0, -0.5, 0.5, -1.0, 1.0, -2.0, 2.0, -4.0, 4.0, -8.0, 8.0)
"""What is added to the logits, in turn, until enough of the samples keep the budgets."""
CLOSE = 0.02
"""Share of a limit that may be left."""
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


def check_together(network: SuperNetwork, budgets: Sequence[BoundBudget]) -> None:
    """Refuses targets that contradict the other budgets, by cutting the full network in several random orders.

    Limits alone are looked at by `budgets.check_reachable`, and costs that only a real network shows when they are
    measured. Where gates look at the input no architecture has to keep them.

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
        f"each budget can be kept alone, but no network of {network.name} was found that keeps them together: {asked}"
    )


def keeps(network: SuperNetwork, budgets: Sequence[BoundBudget], kept: Tensor) -> Tensor:
    """Whether `(B, G)` architectures connect input and output and keep every budget, `(B,)` bool."""
    used = network.used(kept)
    good = network.connects(used)
    for budget in budgets:
        good = good & budget.met(budget.model(used))
    return good


def probable(
    network: SuperNetwork,
    budgets: Sequence[BoundBudget],
    *,
    count: int,
    generator: torch.Generator,
    pressed: bool = False,
    samples: int = 4096,
) -> Tensor:
    """Candidates that keep every budget: the mode, mended where it does not, and the most probable samples.

    Each is filled up with the most probable gates that still fit: those that the mode keeps and, where
    the mode itself had to be cut, all others too. What a budget allows is used, and candidates of
    unlike size are not compared by weights that have hardly been trained.

    Args:
        network: its gates say what is probable.
        budgets: all must be kept.
        count: largest number of candidates, >= 1.
        generator: draws the samples, on the CPU.
        pressed: a limit is what closes gates: a mode that leaves some of every limit is one that it closed too much of,
            as when all gates passed 1/2 together, and the threshold is lowered until it has to be cut.
        samples: architectures drawn, more where few keep the budgets.

    Returns:
        `(n, G)` different architectures, 1 <= n <= count; gates that are not used are off.

    Raises:
        UnreachableBudget: none was found that keeps all budgets together.
    """
    logits = network.logits()
    if pressed and all(budget.upper for budget in budgets):
        logits = logits - _threshold(network, budgets, logits)
    mode = (logits > 0).float()[None]
    mended = mend(network, budgets, mode, logits)
    binding = not bool(keeps(network, budgets, mode)[0])
    wanted = torch.ones_like(mode[0], dtype=torch.bool) if binding else mode[0].bool()
    pool = torch.cat([mended, _samples(network, budgets, logits, least=count, count=samples, generator=generator)])
    unique: dict[tuple[float, ...], None] = {}  # in order
    for tried, row in enumerate(dict.fromkeys(map(tuple, pool.tolist()))):
        if len(unique) < count and tried < TRIES * count:  # many may become the same when they are filled up
            whole = filled(network, budgets, torch.tensor([row]), logits, wanted.clone())
            unique[tuple(whole[0].tolist())] = None
    if not unique:
        tightest = min(budgets, key=lambda budget: budget.limit / max(budget.full, 1e-12))
        raise UnreachableBudget(
            f"no architecture of {network.name} was found that keeps all budgets; the tightest is "
            f"{tightest.name} at {tightest.limit:.6g} {tightest.unit}"
        )
    return torch.tensor(list(unique))


def _threshold(network: SuperNetwork, budgets: Sequence[BoundBudget], logits: Tensor) -> float:
    """The highest threshold on `(G,)` logits, at most 0, above which too many gates lie; where none is, below all."""
    levels = [0.0, *(level for level in logits.unique(sorted=True).flip(0).tolist() if level <= 0)]
    low, high = 0, len(levels)  # a gate is open above its level, so that the next one opens it
    while low < high:
        middle = (low + high) // 2
        fits = bool(keeps(network, budgets, (logits > levels[middle]).float()[None])[0])
        low, high = (middle + 1, high) if fits else (low, middle)
    return levels[low] if low < len(levels) else levels[-1] - 1


def _samples(
    network: SuperNetwork,
    budgets: Sequence[BoundBudget],
    logits: Tensor,
    *,
    least: int,
    count: int,
    generator: torch.Generator,
) -> Tensor:
    """Architectures that keep the budgets, `(n, G)`, of `count` drawn; the most probable ones first.

    Where fewer than `least` do, all gates are moved by the same and drawn again.
    """
    found = logits.new_zeros(0, len(logits))
    for shift in SHIFTS:
        drawn = torch.bernoulli((logits + shift).sigmoid().expand(count, -1), generator=generator)
        drawn = trimmed(network, drawn[keeps(network, budgets, drawn)])
        if len(drawn) > len(found):
            score = log_prob(logits + shift, drawn, network.relevant(drawn))
            found = drawn[score.argsort(descending=True, stable=True)]
        if len(found) >= least:
            break
    return found


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
        limits = ", ".join(f"{budget.name} at {budget.limit:.6g} {budget.unit}" for budget in budgets)
        raise UnreachableBudget(
            f"of {len(seen.cost)} networks of {network.name} that were measured none keeps {limits}"
        )
    best = seen.good[:count]
    return torch.tensor(best), [seen.cost[row] for row in best]


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


def room(budgets: Sequence[BoundBudget], costs: Sequence[float]) -> float:
    """What is left of the tightest limit, as a share of it; 0 where there are targets alone."""
    return min((1 - cost / each.limit for each, cost in zip(budgets, costs, strict=True) if each.upper), default=0.0)


def _measured(network: SuperNetwork, budget: BoundBudget, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Costs of `(n, G)` architectures, and the most that each is expected to be when it is measured again, `(n,)`."""
    if not isinstance(budget.model, MeasuredModel):
        cost = budget.model(network.used(kept)).double()
        return cost, cost
    found = budget.model.measure(kept)
    seen = [(one.value, one.high if budget.upper else one.value) for one in found]
    cost, high = torch.tensor(seen, dtype=torch.float64).unbind(dim=1)
    return cost, high


def mend(network: SuperNetwork, budgets: Sequence[BoundBudget], kept: Tensor, logits: Tensor) -> Tensor:
    """An architecture near `(1, G)` `kept` that keeps the budgets, `(n, G)` with n = 0 where none was found.

    The least probable used gates go first. Where cutting cannot reach the budgets it starts from the
    most probable path, from one that fits, or from the full network.
    """
    columns = network.gate_of[: len(network.graph.edges)]
    unlikely = torch.nn.functional.softplus(-logits)  # - log p
    path = network.graph.cheapest_path([0.0 if column is None else float(unlikely[column]) for column in columns])
    likely = network.of_edges(path)
    fitting = fitting_path(network, budgets)
    starts: list[Callable[[], Tensor]] = [lambda: kept, lambda: torch.maximum(kept, likely), lambda: likely]
    starts += [] if fitting is None else [lambda: fitting]
    starts += [partial(budget.cheapest, network) for budget in budgets]
    starts.append(partial(network.architecture, "full"))  # for a target that lies above all of these
    for start in starts:
        cut = _cut(network, budgets, trimmed(network, start()), logits)
        if cut is not None:
            return cut
    return kept[:0]


def trimmed(network: SuperNetwork, kept: Tensor) -> Tensor:
    """The same architectures with every unused gate off."""
    used = network.used(kept)
    for site in network.sites:
        used[:, slice(*site.units)] *= used[:, [site.edge]]
    gated = [unit for unit, column in enumerate(network.gate_of) if column is not None]
    columns = torch.tensor([network.gate_of[unit] for unit in gated], dtype=torch.int64)
    # a gate of several sites is on where one of them uses it
    return torch.zeros_like(kept).index_add(1, columns, used[:, gated]).clamp(max=1)


def _cut(network: SuperNetwork, budgets: Sequence[BoundBudget], kept: Tensor, logits: Tensor) -> Tensor | None:
    while not bool(keeps(network, budgets, kept)[0]):
        used = kept[0].nonzero().flatten()
        used = used[logits[used].argsort(stable=True)]
        without = kept.repeat(len(used), 1)
        without[torch.arange(len(used)), used] = 0
        possible = network.connects(network.used(without)) & ~_short(network, budgets, without)
        if not bool(possible.any()):
            return None
        kept = trimmed(network, without[int(possible.nonzero()[0])][None])
    return kept


def _short(network: SuperNetwork, budgets: Sequence[BoundBudget], kept: Tensor) -> Tensor:
    """Whether `(B, G)` architectures lie under a target, which cutting cannot mend, `(B,)` bool."""
    used = network.used(kept)
    short = torch.zeros(len(kept), dtype=torch.bool)
    for budget in budgets:
        if not budget.upper:
            cost = budget.model(used)
            short |= ~budget.met(cost) & (cost < budget.limit)
    return short


def filled(
    network: SuperNetwork, budgets: Sequence[BoundBudget], kept: Tensor, logits: Tensor, wanted: Tensor
) -> Tensor:
    """`(1, G)` `kept` and the most probable of the `(G,)` wanted gates that it can use within all budgets.

    Where no gate is of use alone, gates are added that make a path together. Channels of a module that is dropped,
    or closed altogether, are not opened again, and no exit is taken, which would leave unused what is behind it.
    """
    wanted[[column for edge in network.exits if (column := network.gate_of[edge]) is not None]] = False
    while True:
        used = network.used(kept)[0]
        closed = [unit for site in network.sites if not used[site.edge] for unit in range(*site.units)]
        wanted[[column for unit in closed if (column := network.gate_of[unit]) is not None]] = False
        absent = ((kept[0] == 0) & wanted).nonzero().flatten()
        absent = absent[logits[absent].argsort(descending=True, stable=True)]
        more = kept.repeat(len(absent), 1)
        more[torch.arange(len(absent)), absent] = 1
        fits = _useful(network, kept, more) & keeps(network, budgets, more)
        if bool(fits.any()):
            # as many of them together as fit, from the most probable on; the first one does
            more = more[fits].cumsum(dim=0).clamp(max=1)
            fits = keeps(network, budgets, more)
        else:
            more = _with_paths(network, kept, logits, wanted)
            fits = _useful(network, kept, more) & keeps(network, budgets, more)
            more, fits = more[fits][:1], fits[fits][:1]
        if not bool(fits.any()):
            return kept
        kept = more[int(fits.nonzero()[-1])][None]


def _useful(network: SuperNetwork, kept: Tensor, more: Tensor) -> Tensor:
    """Whether `(B, G)` architectures use all that they have beside `(1, G)` `kept`, `(B,)` bool."""
    return ((trimmed(network, more) > 0) | (kept > 0) | (more == 0)).all(dim=1)


def _with_paths(network: SuperNetwork, kept: Tensor, logits: Tensor, wanted: Tensor) -> Tensor:
    """`kept` with what is missing of a path through each dropped edge, of wanted gates alone, likeliest first."""
    unlikely = torch.nn.functional.softplus(-logits) * (kept[0] == 0)
    columns = network.gate_of[: len(network.graph.edges)]
    weights = [0.0 if column is None else float(unlikely[column]) for column in columns]
    found: dict[tuple[int, ...], float] = {}
    for path in network.graph.cheapest_through(weights):
        gates = {column for edge in path if (column := columns[edge]) is not None}
        missing = tuple(sorted(column for column in gates if not kept[0, column]))
        if len(missing) > 1 and bool(wanted[list(missing)].all()):
            found[missing] = sum(float(unlikely[column]) for column in missing)
    more = kept.repeat(len(found), 1)
    for row, missing in enumerate(sorted(found, key=lambda gates: found[gates])):
        more[row, list(missing)] = 1
    return more
