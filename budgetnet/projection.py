"""Projection onto the budgets: architectures that are likely, keep every budget, and use what it allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from budgetnet.budgets import BoundBudget, fitting_path
from budgetnet.errors import UnreachableBudget
from budgetnet.sites import log_prob
from budgetnet.supernet import SuperNetwork

TRIES = 4
SHIFTS = (0.0, -0.5, 0.5, -1.0, 1.0, -2.0, 2.0, -4.0, 4.0, -8.0, 8.0)
"""What is added to the logits, in turn, until enough of the samples keep the budgets."""
CLOSE = 0.02
"""Share of a limit that may be left."""


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
            as when all gates passed 1/2 together, and all are moved up again until it has to be cut.
        samples: architectures drawn, more where few keep the budgets.

    Returns:
        `(n, G)` different architectures, 1 <= n <= count; gates that are not used are off.

    Raises:
        UnreachableBudget: none was found that keeps all budgets together.
    """
    logits, mode, cut = _mode(network, budgets, pressed)
    mended = mend(network, budgets, mode, logits)
    wanted = torch.ones_like(mode[0], dtype=torch.bool) if cut else mode[0].bool()
    pool = torch.cat([mended, _samples(network, budgets, logits, least=count, count=samples, generator=generator)])
    unique: dict[tuple[float, ...], None] = {}  # in order
    for tried, row in enumerate(dict.fromkeys(map(tuple, pool.tolist()))):
        if len(unique) < count and tried < TRIES * count:  # many may become the same when they are filled up
            whole = filled(network, budgets, torch.tensor([row]), logits, wanted.clone())
            unique[tuple(whole[0].tolist())] = None
    if not unique:
        alone = [budget for budget in budgets if not len(mend(network, [budget], mode, logits))]
        told = " and ".join(f"{budget.name} at {budget.told}" for budget in alone or budgets)
        together = "" if alone else " together"
        raise UnreachableBudget(f"no architecture of {network.name} was found that keeps {told}{together}")
    return torch.tensor(list(unique))


def binding(network: SuperNetwork, budgets: Sequence[BoundBudget], *, pressed: bool = False) -> bool:
    """Whether the mode, as `probable` takes it, breaks the budgets: they are what closes gates."""
    return _mode(network, budgets, pressed)[2]


def _mode(network: SuperNetwork, budgets: Sequence[BoundBudget], pressed: bool) -> tuple[Tensor, Tensor, bool]:
    """`(G,)` logits, raised where a limit presses, the mode, `(1, G)`, and whether it breaks the budgets."""
    logits = network.logits()
    if pressed and all(budget.upper for budget in budgets):
        logits = _raised(network, budgets, logits)
    mode = (logits > 0).float()[None]
    return logits, mode, not bool(keeps(network, budgets, mode)[0])


def _raised(network: SuperNetwork, budgets: Sequence[BoundBudget], logits: Tensor) -> Tensor:
    """`(G,)` logits, all but those of exits raised alike: by the least with which too many gates for the limits are on.

    Where the budgets allow all gates it is what turns all on; 0 where those that are on are too many already.
    """
    free = torch.ones_like(logits, dtype=torch.bool)
    free[_exit_columns(network)] = False  # an exit that opens makes all the rest fit
    levels = [0.0, *sorted({level for level in logits[free].tolist() if level <= 0}, reverse=True)]
    low, high = 0, len(levels)
    while low < high:
        middle = (low + high) // 2
        mode = torch.where(free, logits > levels[middle], logits > 0).float()[None]
        fits = bool(keeps(network, budgets, mode)[0])
        low, high = (middle + 1, high) if fits else (low, middle)
    level = levels[low] if low < len(levels) else levels[-1] - 1
    return torch.where(free, logits - level, logits)


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


def room(budgets: Sequence[BoundBudget], costs: Sequence[float]) -> float:
    """What is left of the tightest limit, as a share of it; 0 where there are targets alone."""
    return min((1 - cost / each.limit for each, cost in zip(budgets, costs, strict=True) if each.upper), default=0.0)


def mend(network: SuperNetwork, budgets: Sequence[BoundBudget], kept: Tensor, logits: Tensor) -> Tensor:
    """An architecture near `(1, G)` `kept` that keeps the budgets, `(n, G)` with n = 0 where none was found.

    The least probable used gates go first. Where cutting cannot reach the budgets it starts from the
    most probable path, from one that fits, or from the full network.
    """
    columns = network.gate_of[: len(network.graph.edges)]
    unlikely = F.softplus(-logits)  # - log p
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
    return network.gates_of(used)


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

    Where no gate is of use alone, gates are added that make a path together, or, while more than `CLOSE` of every
    limit is left, that bring back a module whose channels have gates. No exit is taken, which would leave unused
    what is behind it.
    """
    wanted[_exit_columns(network)] = False
    while True:
        absent = ((kept[0] == 0) & wanted & ~_shut(network, kept)).nonzero().flatten()
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
            if room(budgets, [float(budget.model(network.used(kept))[0]) for budget in budgets]) > CLOSE:
                more = torch.cat([more, _with_modules(network, kept, logits, wanted)])
            fits = _useful(network, kept, more) & keeps(network, budgets, more)
            more, fits = more[fits][:1], fits[fits][:1]
        if not bool(fits.any()):
            return kept
        kept = more[int(fits.nonzero()[-1])][None]


def _useful(network: SuperNetwork, kept: Tensor, more: Tensor) -> Tensor:
    """Whether `(B, G)` architectures use all that they have beside `(1, G)` `kept`, `(B,)` bool."""
    return ((trimmed(network, more) > 0) | (kept > 0) | (more == 0)).all(dim=1)


def _exit_columns(network: SuperNetwork) -> list[int]:
    """The gates of exits."""
    return [column for edge in network.exits if (column := network.gate_of[edge]) is not None]


def _shut(network: SuperNetwork, kept: Tensor) -> Tensor:
    """Gates of channels all of whose modules `(1, G)` `kept` does not use, `(G,)` bool."""
    used, shut = network.used(kept)[0], torch.zeros(network.gate_count, dtype=torch.bool)
    for serves in (False, True):
        units = [unit for site in network.sites if bool(used[site.edge]) is serves for unit in range(*site.units)]
        shut[[column for unit in units if (column := network.gate_of[unit]) is not None]] = not serves
    return shut


def _with_modules(network: SuperNetwork, kept: Tensor, logits: Tensor, wanted: Tensor) -> Tensor:
    """`kept` with what is missing for each unused module of gated channels, of wanted gates alone, likeliest first.

    That is the module's own gate, and of each site that is closed altogether the likeliest group.
    """
    used, found = network.used(kept)[0], dict[tuple[int, ...], float]()
    for edge in {site.edge: None for site in network.sites if not used[site.edge]}:
        own = network.gate_of[edge]
        missing = set() if own is None or kept[0, own] else {own}
        for site in network.sites:
            columns = [network.gate_of[unit] for unit in range(*site.units)]
            groups = [column for column in columns if column is not None]
            if site.edge == edge and len(groups) == len(columns) and not kept[0, groups].any():
                missing.add(max(groups, key=lambda column: float(logits[column])))
        if missing and bool(wanted[list(missing)].all()):
            found[tuple(sorted(missing))] = float(F.softplus(-logits[list(missing)]).sum())
    return _each_with(kept, found)


def _each_with(kept: Tensor, found: dict[tuple[int, ...], float]) -> Tensor:
    """`(1, G)` `kept` once with each of some sets of gates, `(n, G)`, by how unlikely these are."""
    more = kept.repeat(len(found), 1)
    for row, missing in enumerate(sorted(found, key=lambda gates: found[gates])):
        more[row, list(missing)] = 1
    return more


def _with_paths(network: SuperNetwork, kept: Tensor, logits: Tensor, wanted: Tensor) -> Tensor:
    """`kept` with what is missing of a path through each dropped edge, of wanted gates alone, likeliest first."""
    unlikely = F.softplus(-logits) * (kept[0] == 0)
    columns = network.gate_of[: len(network.graph.edges)]
    weights = [0.0 if column is None else float(unlikely[column]) for column in columns]
    found: dict[tuple[int, ...], float] = {}
    for path in network.graph.cheapest_through(weights):
        gates = {column for edge in path if (column := columns[edge]) is not None}
        missing = tuple(sorted(column for column in gates if not kept[0, column]))
        if len(missing) > 1 and bool(wanted[list(missing)].all()):
            found[missing] = sum(float(unlikely[column]) for column in missing)
    return _each_with(kept, found)
