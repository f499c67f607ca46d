"""How a network with gates is run once it is learned, and what that costs on real data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from budgetnet.budgets import TOLERANCE, BoundBudget
from budgetnet.checks import at_least
from budgetnet.costs.model import CostModel
from budgetnet.errors import ConfigError, UnreachableBudget
from budgetnet.evaluation import Examples, evaluate
from budgetnet.sites import AlwaysOn, Policy, Sample, Threshold
from budgetnet.supernet import SuperNetwork

POLICIES = ("threshold", "stochastic", "always-on", "ensemble")

LARGEST = 30.0
"""Logit beyond which a threshold is not looked for."""

SETTLED = 3
"""Times that batch norms are set again at a threshold that was found."""

ALIKE = 0.01
"""Share of a cost by which two are taken for the same."""

Forward = Callable[[SuperNetwork, Tensor, Policy], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Inference:
    """A way to decide the gates when predicting.

    Attributes:
        policy: "threshold": open where the probability is greater than tau; "stochastic": drawn for each
            example; "always-on": all open; "ensemble": the mean prediction of `runs` stochastic ones.
        tau: of the threshold, in [0, 1].
        runs: of the ensemble, >= 1.
        seed: of what is drawn.

    Raises:
        ConfigError: the policy is unknown, or a number outside its range.

    Source: Herrmann et al., sections 3.3 and S2.2.
    """

    policy: str = "threshold"
    tau: float = 0.5
    runs: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ConfigError(f"policy must be {' or '.join(POLICIES)}, got {self.policy!r}")
        at_least(1, runs=self.runs)
        Threshold(self.tau)

    def deciders(self, examples: int, generator: torch.Generator) -> list[Policy]:
        """The policy of each run on a batch."""
        if self.policy == "threshold":
            return [Threshold(self.tau)]
        if self.policy == "always-on":
            return [AlwaysOn()]
        return [Sample(examples, generator)] * (self.runs if self.policy == "ensemble" else 1)


@dataclass(frozen=True)
class Observed:
    """What was seen on a set of examples.

    Attributes:
        quality: as `evaluate` gives it.
        costs: mean cost of an example by name; an ensemble's runs add up.
        rates: share of examples on which each of the G gates was open.
    """

    quality: dict[str, float]
    costs: dict[str, float]
    rates: list[float]


@torch.no_grad()
def observe(
    network: SuperNetwork,
    inference: Inference,
    examples: Examples,
    *,
    classes: int,
    ignore: int | None = None,
    models: Mapping[str, CostModel] | None = None,
    forward: Forward | None = None,
) -> Observed:
    """Runs a network over examples, and sees how good it is and what it computes.

    Args:
        network: in evaluation mode.
        inference: decides the gates.
        examples: batches of inputs and class indices.
        classes: number of classes.
        ignore: class index left out, None for none.
        models: costs of this network, by name.
        forward: runs the network, None for in float32.
    """
    generator = torch.Generator(network.gates.values.device).manual_seed(inference.seed)
    totals = dict.fromkeys(models or {}, 0.0)
    opened = torch.zeros(network.gate_count, dtype=torch.float64)
    seen = runs = 0

    def predict(x: Tensor) -> Tensor:
        nonlocal seen, runs
        deciders = inference.deciders(len(x), generator)
        predictions = []
        for policy in deciders:
            output, kept = forward(network, x, policy) if forward else network(x, policy)
            used = network.used(kept)
            for name, model in (models or {}).items():
                totals[name] += float(model(used).mean()) * len(x)
            opened.add_(kept.double().mean(dim=0).cpu() * len(x))
            predictions.append(output.float())
        seen, runs = seen + len(x), len(deciders)
        if runs == 1:
            return predictions[0]
        return torch.stack([output.softmax(dim=1) for output in predictions]).mean(dim=0).log()

    quality = evaluate(predict, examples, classes=classes, ignore=ignore)
    costs = {name: total / seen for name, total in totals.items()}
    return Observed(quality, costs, (opened / (seen * max(runs, 1))).tolist())


@torch.no_grad()
def expected_costs(
    network: SuperNetwork,
    policy: Policy,
    examples: Iterable[Tensor],
    models: Mapping[str, CostModel],
    forward: Forward = SuperNetwork.forward,
) -> dict[str, float]:
    """Mean cost of an example by name, where a policy decides the gates; of batches `(B, C, H, W)`, at least one."""
    totals, seen = dict.fromkeys(models, 0.0), 0
    for x in examples:
        used = network.used(forward(network, x, policy)[1])
        for name, model in models.items():
            totals[name] += float(model(used).mean()) * len(x)
        seen += len(x)
    return {name: total / seen for name, total in totals.items()}


def fitting_threshold(
    budgets: Sequence[BoundBudget], look: Callable[[float], Observed], *, steps: int = 12
) -> tuple[float, Observed]:
    """The threshold nearest to 1/2 at which the expected costs keep every budget, and come to every target.

    A higher one closes gates, which costs less; of exits a lower one takes more of them, which costs less too. Both
    sides are halved towards 1/2, as logits, for where what is too much or too little at 1/2 is so no more, and only
    what was seen to fit is returned.

    Args:
        budgets: limits and targets.
        look: what is seen at a threshold; its costs have the budgets' names.
        steps: halvings of each side.

    Raises:
        UnreachableBudget: on neither side a threshold was found that keeps them.
    """
    middle = look(0.5)
    if all_kept(budgets, middle):
        return 0.5, middle
    wrong = [(budget, middle.costs[budget.name] > budget.limit) for budget in budgets if not all_kept([budget], middle)]

    def righted(observed: Observed) -> bool:
        """Whether nothing is too much that is so at 1/2, nor too little; it may be the other by now."""
        return all(
            all_kept([budget], observed) or (observed.costs[budget.name] > budget.limit) != over
            for budget, over in wrong
        )

    found: list[tuple[float, float, Observed]] = []
    tried = [middle]
    for end in (LARGEST, -LARGEST):
        outside, inside, best = 0.0, end, look(probability(end))
        if righted(best):
            for _ in range(steps):
                between = (outside + inside) / 2
                now = look(probability(between))
                if righted(now):
                    inside, best = between, now
                else:
                    outside = between
        tried.append(best)
        if all_kept(budgets, best):
            found.append((abs(inside), probability(inside), best))
    if not found:
        nearest = min(tried, key=lambda seen: max(missed(budget, seen) for budget in budgets))
        worst = max(budgets, key=lambda budget: missed(budget, nearest))
        raise UnreachableBudget(
            f"{worst.name} must be {'at most' if worst.upper else 'near'} {worst.told}, but at the "
            f"threshold of the gates that comes nearest the network takes {nearest.costs[worst.name]:.6g}"
        )
    _, tau, best = min(found, key=lambda one: one[0])
    return tau, best


def probability(logit: float) -> float:
    """The probability of a logit."""
    return 1 / (1 + math.exp(-logit))


def all_kept(budgets: Sequence[BoundBudget], observed: Observed) -> bool:
    """Whether the costs that were seen keep all limits, and come to all targets."""
    return all(bool(each.met(torch.tensor(observed.costs[each.name], dtype=torch.float64))) for each in budgets)


def missed(budget: BoundBudget, observed: Observed) -> float:
    """How far the cost that was seen is from a budget, as a share of it: 0 where it is kept."""
    excess = observed.costs[budget.name] / budget.limit - 1
    return max(0.0, excess if budget.upper else abs(excess) - TOLERANCE)


def matching_threshold(cost: Callable[[Policy], float], noisy: Policy, *, steps: int = 12) -> float:
    """The logit nearest to 0 of a threshold under which gates cost what they cost where they are drawn.

    Args:
        cost: the expected cost under a policy; rises or falls with the threshold (exits cost less where they open).
        noisy: draws the gates.
        steps: halvings of the interval between 0 and what is too much.

    Returns:
        The logit, 0 where no threshold does: gates of both kinds may hold each other up.
    """

    def at(logit: float) -> float:
        return cost(Threshold(probability(logit)))

    wanted, before = cost(noisy), at(0.0)
    if math.isclose(before, wanted, rel_tol=ALIKE):
        return 0.0
    sign = 1.0 if before < wanted else -1.0  # 1 where gates have to open

    def reaches(logit: float) -> bool:
        return sign * at(logit) >= sign * wanted * (1 - sign * ALIKE)

    enough, short = max((LARGEST, -LARGEST), key=lambda end: sign * at(end)), 0.0
    if not reaches(enough):
        return 0.0
    for _ in range(steps):
        middle = (short + enough) / 2
        enough, short = (middle, short) if reaches(middle) else (enough, middle)
    return enough


def settled_threshold(
    budgets: Sequence[BoundBudget], look: Callable[[float], Observed], settle: Callable[[float], None]
) -> tuple[float, Observed]:
    """The threshold that `fitting_threshold` finds, with the batch norms as they are under it.

    They change what the gates see, and with it the costs. So it is looked for again where the budgets are then not
    kept, and once more where they are still not; what is found the last time keeps them with the batch norms of the
    threshold before it.

    Args:
        budgets: as `fitting_threshold` has them.
        look: likewise.
        settle: sets the batch norms to what they are at a threshold.

    Raises:
        UnreachableBudget: no threshold keeps them.
    """
    settle(0.5)
    before, (tau, seen) = 0.5, fitting_threshold(budgets, look)
    for _ in range(SETTLED):
        if tau == before:
            break
        settle(tau)
        before, seen = tau, look(tau)
        if all_kept(budgets, seen):
            break
        tau, seen = fitting_threshold(budgets, look)
    return tau, seen


@torch.no_grad()
def exit_table(network: SuperNetwork, tau: float, examples: Examples) -> list[dict[str, str | float | None]]:
    """How good each exit is, and on which examples it is taken.

    Args:
        network: with exits, in evaluation mode; the last row is for what takes none.
        tau: threshold of the gates.
        examples: batches of inputs and `(B,)` class indices.

    Returns:
        For each exit, in order, and for the end `{"name", "share", "accuracy_all", "accuracy_chosen"}`: the
        share of examples it classifies, the accuracy had it classified all, and that on its own (None
        where it has none).

    Source: Herrmann et al., Figure 7.
    """
    names = [network.edge_names[edge] for edge in network.visits if edge in network.exits] + ["end"]
    seen = 0
    right, chosen, chosen_right = torch.zeros(3, len(names), dtype=torch.float64)
    for x, y in examples:
        outputs, taken, _ = network.ways_out(x, Threshold(tau))
        hits = torch.stack([output.argmax(dim=1) == y for output in outputs], dim=1).double()
        seen += len(x)
        right += hits.sum(dim=0).cpu()
        chosen += taken.double().sum(dim=0).cpu()
        chosen_right += (hits * taken).sum(dim=0).cpu()
    return [
        {
            "name": name,
            "share": float(chosen[place]) / seen,
            "accuracy_all": float(right[place]) / seen,
            "accuracy_chosen": float(chosen_right[place] / chosen[place]) if chosen[place] else None,
        }
        for place, name in enumerate(names)
    ]
