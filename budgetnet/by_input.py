"""Milliseconds where gates look at the input: learned before a search, kept by the threshold at its end."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from budgetnet.budgets import TOLERANCE, BoundBudget
from budgetnet.conditional import ConditionalNetwork, conditional, export_fastest, times_full
from budgetnet.conditional.variants import Written
from budgetnet.costs.latency import LatencyByInput
from budgetnet.costs.measured import Measured
from budgetnet.errors import UnreachableBudget
from budgetnet.export import export
from budgetnet.extraction import extract, fold_batch_norm
from budgetnet.inference import LARGEST, Observed, probability, settled_threshold
from budgetnet.supernet import SuperNetwork

TIMED, MEAN = 8, 32
"""Examples on which the ways to write a file are timed, and on which it is timed for its milliseconds."""
SECONDS, PATIENCE = 3.0, 20.0
"""Seconds that a file is run beside the full one, and at most, while the machine is not at rest."""
ROUNDS = 4
"""Thresholds that are looked for until a file keeps the limits on its milliseconds."""
CLOSE = 0.03
"""Share of a limit that a file may leave."""


@dataclass(frozen=True, eq=False)
class Settled:
    """A network whose threshold is settled.

    Attributes:
        tau: the threshold.
        seen: what was seen of it.
        plain: the network, on the CPU.
        written: how its file is, None where there is none.
        measured: by the names of budgets in milliseconds, what the file takes.
    """

    tau: float
    seen: Observed
    plain: ConditionalNetwork
    written: Written | None
    measured: dict[str, Measured]

    def worst(self, budgets: Sequence[BoundBudget]) -> float:
        """The largest share of a limit on milliseconds by which the file may break it; negative where it keeps all."""
        found = [(budget, self.measured[budget.name]) for budget in budgets if budget.name in self.measured]
        return max(
            one.high / budget.limit - 1 if budget.upper else abs(one.value / budget.limit - 1) - TOLERANCE
            for budget, one in found
        )


@torch.no_grad()
def learn_latency(network: SuperNetwork, model: LatencyByInput) -> None:
    """Times files of all gates open, and of all closed, so that predictions know what deciding takes.

    Which weights a network has does not change that.

    Args:
        network: the space, its gates as they start.
        model: of it.
    """
    x = torch.randn(4, *network.input_shape, generator=torch.Generator().manual_seed(0))
    alone = torch.full((network.gate_count,), torch.nan)
    alone[: network.independent] = 1.0
    extracted, seen = [], []
    with tempfile.TemporaryDirectory() as name:
        full = _full(network, Path(name))
        for logit in (-LARGEST, LARGEST):
            ends = conditional(network, tau=probability(logit), constants=alone)
            export_fastest(ends, Path(name) / "network.onnx", x)
            extracted.append(float(model.plain(network.used(ends.decide(x)[1])).mean()))
            seen.append(_milliseconds(model, Path(name) / "network.onnx", full, x).value)
    model.learn((extracted[0], extracted[1]), (seen[0], seen[1]))


@torch.no_grad()
def settled(
    network: SuperNetwork,
    budgets: Sequence[BoundBudget],
    look: Callable[[float], Observed],
    settle: Callable[[float], None],
    examples: Tensor,
    path: Path | None = None,
) -> Settled:
    """The threshold nearest to 1/2 at which the network keeps the budgets, and the network with its file.

    Milliseconds are measured of the file, and predicted anew where it does not take what it was predicted to.

    Args:
        network: with gates that look at the input, and its weights.
        budgets: limits and targets.
        look: as `settled_threshold` has it.
        settle: likewise.
        examples: `(B, C, H, W)` real ones, some of which the file is timed on.
        path: of the file; None for one that is not kept, and written only where milliseconds are to be seen.

    Returns:
        What keeps the budgets; if none does, what comes nearest, of milliseconds alone.

    Raises:
        UnreachableBudget: no threshold was predicted to keep the budgets.
    """
    timed = [(budget, budget.model) for budget in budgets if isinstance(budget.model, LatencyByInput)]
    examples = examples[:MEAN].cpu()

    def written(tau: float, seen: Observed, file: Path | None, full: Path | None) -> Settled:
        here = copy.deepcopy(network).cpu()
        plain, measured = conditional(here, tau=tau), dict[str, Measured]()
        done = None if file is None else export_fastest(plain, file, examples[:TIMED])
        if file is not None and full is not None:
            used = here.used(plain.decide(examples)[1])
            for budget, model in timed:
                share = seen.costs[budget.name] / float(model(used).mean())  # these may open more than a mean image
                measured[budget.name] = _milliseconds(model, file, full, examples, share)
        return Settled(tau, seen, plain, done, measured)

    if not timed:
        return written(*settled_threshold(budgets, look, settle), path, None)
    found: list[Settled] = []
    with tempfile.TemporaryDirectory() as name:
        full, file = _full(network, Path(name)), path or Path(name) / "network.onnx"
        for _ in range(ROUNDS):
            try:
                tau, seen = settled_threshold(budgets, look, settle)
            except UnreachableBudget:
                if not found:
                    raise
                break
            found.append(written(tau, seen, file, full))
            excess = found[-1].worst(budgets)
            if excess <= 0 and (excess >= -CLOSE or tau == 0.5 or not any(budget.upper for budget, _ in timed)):
                break
            for budget, model in timed:
                one = found[-1].measured[budget.name]
                model.correct((one.high if budget.upper else one.value) / seen.costs[budget.name])
        best = min(found, key=lambda one: (one.worst(budgets) > 0, abs(one.worst(budgets))))
        if best is not found[-1]:
            settle(best.tau)
            best = written(best.tau, look(best.tau), file, full)
    return best


def _milliseconds(model: LatencyByInput, file: Path, full: Path, examples: Tensor, share: float = 1.0) -> Measured:
    """What a file takes for a mean image, on the machine as it was when the full network was timed.

    The examples are so much less work, as a `share`, than a mean image.
    """
    threads, times = model.plain.cost.threads, model.plain.watch.took.full * share
    found = times_full(file, full, examples, threads=threads, seconds=SECONDS, patience=PATIENCE)
    return Measured(found.value * times, found.low * times, found.high * times)


def _full(network: SuperNetwork, folder: Path) -> Path:
    """The file of the full network without gates."""
    plain = fold_batch_norm(extract(network, network.architecture("full"))).cpu()
    return export(plain, folder / "full.onnx", torch.zeros(1, *network.input_shape))
