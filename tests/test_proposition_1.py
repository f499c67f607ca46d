"""Proposition 1 on spaces small enough to score every architecture: the search ends on the optimum of Eq. 2."""

import math

import pytest
import torch
from scored import ARCHITECTURES, BATCH, PRICE, scored, searched

import budgetnet as bn
from budgetnet.options import SearchOptions
from budgetnet.steering import seeded
from budgetnet.training import Learner, Sums

STEPS = 4500
SETTINGS = {"annealed": 0.5, "exploration": 0.05}


def ended(cost: str, limit: str, seed: int, steps: int = STEPS) -> tuple[bool, float, float]:
    """Whether the search's mode is the optimum of Eq. 2, its remaining entropy in nats, and its objective's excess."""
    known = scored(seed)
    budget = bn.Budget.parse(f"{cost}<={limit}").bind(known.space)
    loss = known.losses.double().mean(dim=1)
    objective = loss + PRICE * budget.penalty(budget.model(known.used), budget.limit)
    generator = torch.Generator().manual_seed(seed)
    found, undecided = searched(known, budget, generator, seed=seed, steps=steps, **SETTINGS)
    excess = float(objective[found] - objective.min())
    return excess == 0, undecided, excess


def test_the_search_ends_on_the_best_of_all_architectures():
    """One seed and a third of the steps; ten seeds, and a cost that does not add up, are under `slow`."""
    optimal, undecided, _ = ended("macs", "45%", seed=0, steps=STEPS // 3)
    assert optimal
    assert undecided < 0.2


def test_losses_that_are_looked_up_are_those_that_a_learner_sees():
    """Whose gates go the same way, its weights as they are."""
    known, steps, seed = scored(0), 20, 3
    budget = bn.Budget.parse("macs<=45%").bind(known.space)
    options = SearchOptions(
        learning_rate=0.0, gate_limit=0.0, price=PRICE, architectures=ARCHITECTURES, precision="float32", seed=seed,
        exploration=SETTINGS["exploration"],
    )  # fmt: skip
    learner = Learner(known.space, [budget], options, ignore=None, device=torch.device("cpu"), dtype=torch.float32)
    learner.begin_search()
    before = known.space.gates.logits.detach().clone()
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rows = torch.randint(len(known.x), (BATCH,), generator=generator)
        draws, progress = seeded(learner.device, seed, step), min(1.0, step / (SETTINGS["annealed"] * steps))
        x, y = known.x[rows], known.y[rows]
        learner.step(x, y, "search", generator=draws, rate=0.0, progress=progress, sums=Sums())
    learned = known.space.gates.logits.detach().clone()
    searched(known, budget, torch.Generator().manual_seed(seed), seed=seed, steps=steps, **SETTINGS)
    assert float((learned - before).abs().min()) > 1e-3
    torch.testing.assert_close(known.space.gates.logits.detach(), learned, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("cost", "limit"), [("macs", "45%"), ("steps:2", "9")])
def test_nine_of_ten_searches_end_on_the_optimum(cost, limit):
    """As Proposition 1 has it, for an additive cost and for one that is not."""
    results = [ended(cost, limit, seed) for seed in range(10)]
    assert sum(optimal for optimal, _, _ in results) >= 9, results
    entropies = [undecided for _, undecided, _ in results]
    assert sum(entropies) / len(entropies) < 0.1, results  # nats
    assert max(entropies) < math.log(2), results  # in no run is a whole gate undecided
