"""A space small enough to score every architecture, and a search of it that looks losses up."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from small import every
from torch import Tensor

import budgetnet as bn
from budgetnet.budgets import BoundBudget
from budgetnet.objectives import example_losses
from budgetnet.options import SearchOptions
from budgetnet.sites import entropy
from budgetnet.steering import Steering, Sums, seeded

BATCH = 512
ARCHITECTURES = 64
PRICE = 1.0  # lambda of Eq. 2, in nats per unit of C / limit


class Scored(NamedTuple):
    """A trained space whose weights stay as they are, and what all its architectures come to."""

    space: bn.SuperNetwork
    x: Tensor  # (N, 1, 8, 8)
    y: Tensor  # (N,)
    used: Tensor  # (U, M) each set of used units once
    losses: Tensor  # (U, N)
    rows: dict[tuple[float, ...], int]  # of `used`

    def row(self, used: Tensor) -> Tensor:
        """Which row of `used` each of the given is."""
        return torch.tensor([self.rows[tuple(row)] for row in used.tolist()])


def small_space() -> bn.SuperNetwork:
    """A convolutional neural fabric of 2 columns and 3 resolutions: 11 choices, 2,048 architectures."""
    return bn.spaces.conv_fabric(width=2, depth=3, channels=4, image_size=8, in_channels=1)


@lru_cache(maxsize=1)
def scored(seed: int) -> Scored:
    """The small space, its weights trained for all its architectures and left so."""
    torch.manual_seed(seed)
    data = bn.data.load("digits")
    x, y = torch.from_numpy(data.train.images).float() / 127.5 - 1, torch.from_numpy(data.train.targets)
    space = small_space()
    trained_on_all(space, x, y, seed)
    used = space.used(every(space.gate_count)).unique(dim=0)
    with torch.no_grad():
        losses = torch.stack([example_losses(space.run(x, row[None]), y, None) for row in used])
    return Scored(space, x, y, used, losses, {tuple(row): index for index, row in enumerate(used.tolist())})


def trained_on_all(space: bn.SuperNetwork, x: Tensor, y: Tensor, seed: int) -> None:
    """Trains the shared weights so that every architecture predicts as well as its modules let it."""
    space.train()
    optimizer = torch.optim.Adam(space.modules_on_edges.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(300):
        rows = torch.randint(len(x), (128,), generator=generator)
        kept = torch.bernoulli(torch.full((8, space.gate_count), 0.6), generator=generator)
        loss = example_losses(space.run(x[rows], space.used(kept)), y[rows], None).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    space.eval()


def searched(
    known: Scored,
    budget: BoundBudget,
    generator: torch.Generator,
    *,
    seed: int,
    steps: int,
    annealed: float,
    **options: float,
) -> tuple[int, float]:
    """Learns the gates, the weights as they are, with the losses that the architectures are known to have.

    Args:
        known: the space and its losses.
        budget: of the space.
        generator: of the batches.
        seed: of the architectures that are drawn.
        steps: of the search.
        annealed: share of the steps in which exploration falls.
        options: of the search.

    Returns:
        The row of `known.used` that the most probable architecture is, and the entropy in nats of gates that matter.
    """
    space = known.space
    given = SearchOptions(gate_limit=0.0, price=PRICE, architectures=ARCHITECTURES, seed=seed, **options)
    one = Steering(space, [budget], given)
    one.begin_search()
    for step in range(steps):
        chosen = torch.randint(len(known.x), (BATCH,), generator=generator)
        policy = one.policy("search", BATCH, seeded(torch.device("cpu"), seed, step))
        kept = policy(space.gates.logits, slice(0, space.gate_count))
        seen = known.losses[known.row(space.used(kept)).repeat_interleave(BATCH // ARCHITECTURES), chosen]
        progress = min(1.0, step / (annealed * steps))
        one.gate_optimizer.zero_grad()
        one.search_objective(seen, kept, progress, 0.0, Sums(), known.x[chosen]).backward()
        one.step_gates()
    logits = space.gates.logits.detach()
    mode = (logits > 0).float()[None]
    undecided = float((space.relevant(mode) @ entropy(logits))[0])
    return int(known.row(space.used(mode))[0]), undecided
