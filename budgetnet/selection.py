"""Choosing among architectures: the Pareto front, and the most probable ones that keep the budget."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from budgetnet.budgets import BoundBudget, fitting_path
from budgetnet.errors import UnreachableBudget
from budgetnet.sites import log_prob
from budgetnet.supernet import SuperNetwork


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
        samples: architectures drawn.

    Returns:
        `(n, G)` different architectures, 1 <= n <= count; gates that are not used are off.

    Raises:
        UnreachableBudget: none was found that keeps all budgets together.
    """
    logits = network.logits()
    mode = (logits > 0).float()[None]
    mended = mend(network, budgets, mode, logits)
    binding = not bool(keeps(network, budgets, mode)[0])
    wanted = torch.ones_like(mode[0], dtype=torch.bool) if binding else mode[0].bool()
    drawn = network.sampled(samples, generator)
    drawn = trimmed(network, drawn[keeps(network, budgets, drawn)])
    score = log_prob(logits, drawn, network.relevant(drawn))
    pool = torch.cat([mended, drawn[score.argsort(descending=True, stable=True)]])
    unique: dict[tuple[float, ...], None] = {}  # in order
    for row in dict.fromkeys(map(tuple, pool.tolist())):
        if len(unique) < count:
            whole = filled(network, budgets, torch.tensor([row]), logits, wanted.clone())
            unique[tuple(whole[0].tolist())] = None
    if not unique:
        tightest = min(budgets, key=lambda budget: budget.limit / budget.full)
        raise UnreachableBudget(
            f"no architecture of {network.name} was found that keeps all budgets; the tightest is "
            f"{tightest.name} at {tightest.limit:.6g} {tightest.unit}"
        )
    return torch.tensor(list(unique))


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
    starts = [kept, torch.maximum(kept, likely), likely, *([] if fitting is None else [fitting])]
    starts.append(network.architecture("full"))  # for a target that lies above all of these
    for start in starts:
        cut = _cut(network, budgets, trimmed(network, start), logits)
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

    Channels of a module that is dropped, or closed altogether, are not opened again, and no exit is taken,
    which would leave unused what is behind it.
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
        useful = trimmed(network, more).gather(1, absent[:, None])[:, 0].bool()
        fits = (useful & keeps(network, budgets, more)).nonzero()
        if not len(fits):
            return kept
        kept = more[int(fits[0])][None]
