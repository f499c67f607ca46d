"""From a session that has learned to what the user gets: the network, its files, its evidence."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from budgetnet import report
from budgetnet.budgets import BoundBudget, cost_name, parse_cost
from budgetnet.conditional import conditional, export_conditional
from budgetnet.costs import MACs, Params
from budgetnet.costs.measured import MeasuredModel
from budgetnet.data import Batches, Dataset
from budgetnet.errors import FileError
from budgetnet.evaluation import recalibrate
from budgetnet.export import difference, export, file_latency, load
from budgetnet.extraction import count, extract, fold_batch_norm, state_bytes
from budgetnet.inference import Inference, exit_table, fitting_threshold, observe
from budgetnet.runs import RunFolder, load_tensors
from budgetnet.session import Session
from budgetnet.sites import Threshold
from budgetnet.supernet import SuperNetwork

CURVE = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Thresholds at which accuracy and cost are looked at on validation data (Herrmann et al., Figure 10)."""


@dataclass(frozen=True, eq=False)
class Found:
    """What a search returns.

    Attributes:
        plain: the network that was found, plain `torch.nn`, in evaluation mode, on the CPU.
        architecture: `(1, G)` its decisions; of gates that look at the input, those they take mostly.
        supernet: the network with choices that it came from.
        result: what `result.json` holds.
        run: the run folder.
    """

    plain: nn.Module
    architecture: Tensor
    supernet: SuperNetwork
    result: dict[str, Any]
    run: Path

    def network(self) -> nn.Module:
        """A copy of the plain network."""
        return copy.deepcopy(self.plain)


def deliver(session: Session, limits: list[dict[str, Any]]) -> Found:
    """Makes the network that was learned plain, proves it equal, looks at the test images once, writes every file.

    Args:
        session: all its epochs are over.
        limits: what `check_reachable` said before.
    """
    started = time.monotonic()
    outcome = _decided_by_input if session.network.heads else _decided_once
    plain, kept, own = outcome(session)
    supernet = session.network.cpu().eval()
    x = next(iter(session.test_batches().epoch(0)))[0][:1].cpu()
    full = supernet.architecture("full")
    result = {
        "space": {"name": supernet.name, "options": supernet.options},
        "data": session.data.name,
        "seed": session.options.seed,
        "images_seen": session.images,
        "seconds": session.seconds + time.monotonic() - started,
        "before": limits,
        "full": count(extract(supernet, full), x) if bool(supernet.connects(supernet.used(full))[0]) else {},
        "candidates": session.candidates,
        **own,
    }
    session.write_architecture(kept)
    session.run.write("result.json", result)
    report.write(session.run.path)
    return Found(plain, kept, supernet, result, session.run.path)


def _decided_once(session: Session) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """The extracted network of the chosen architecture, what it keeps, and what result.json says of it."""
    if session.learner.chosen is None:
        session.choose()
    kept = session.learner.chosen
    assert kept is not None
    used = session.network.used(kept)
    session.settle(used)
    plain = extract(session.network, kept).eval()
    validation = session.quality(session.predict(plain), session.validation)
    test = session.quality(session.predict(plain), session.test_batches())
    supernet, plain = session.network.cpu().eval(), plain.cpu()
    x = next(iter(session.test_batches().epoch(0)))[0].cpu()
    folded = fold_batch_norm(plain)
    files = {kind: export(folded, session.run.path / f"network.{kind}", x[:1]) for kind in ("onnx", "pt2")}
    equivalence = {"extracted": difference(lambda x: supernet.run(x, used), plain, x)}
    equivalence |= {kind: difference(plain, load(path), x) for kind, path in files.items()}
    timing = file_latency(files["onnx"], x[:1])
    return (
        plain,
        kept,
        {
            "budgets": [entry(budget, kept, used) for budget in session.budgets],
            "network": {
                **count(plain, x[:1]),
                "memory:params": state_bytes(folded),
                "latency_ms": {**timing, "runtime": "onnxruntime", "threads": 1, "batch": 1},
            },
            "validation": validation,
            "test": test,
            "equivalence": equivalence,
        },
    )


def _decided_by_input(session: Session) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """The network that skips what its gates close, the gates it opens mostly, and what result.json says of it.

    The threshold is the one nearest to 1/2 at which the cost expected on validation data keeps the budgets.
    """
    network = session.network
    batches = islice(session.train.epoch(session.epoch), session.options.recalibration)
    recalibrate(network, session.predict(lambda x: network.masked(x, Threshold())[0]), batches)
    network.eval()
    tau, seen = fitting_threshold(session.budgets, lambda tau: session.observe(Inference(tau=tau), session.validation))
    expected = observe(
        network,
        Inference(tau=tau),
        session.validation.epoch(0),
        classes=session.data.num_classes,
        ignore=session.data.ignore,
        models={"macs": MACs().bind(network)},
        forward=session.learner.forward,
    ).costs
    curve = [(at, session.observe(Inference(tau=at), session.validation)) for at in CURVE]
    test = session.observe(Inference(tau=tau), session.test_batches())
    exits = exit_table(network, tau, session.test_batches().epoch(0), session.learner.forward) if network.exits else []
    network.cpu()
    x = next(iter(session.test_batches().epoch(0)))[0].cpu()
    plain = conditional(network, None, tau=tau)
    path = export_conditional(plain, session.run.path / "network.onnx", x[:1])
    run = load(path, threads=1)
    batch = x[:16]

    def one_by_one(inputs: Tensor) -> Tensor:
        return torch.cat([run(row[None]) for row in inputs])

    kept = (torch.tensor(seen.rates) > 0.5).float()[None]
    whole = network.used(network.architecture("full"))
    return (
        plain,
        kept,
        {
            "budgets": [reached(budget, seen.costs[budget.name]) for budget in session.budgets],
            "network": {
                "macs": expected["macs"],
                "params": int(Params().bind(network)(whole)[0]),
                "memory:params": state_bytes(plain),
                "latency_ms": {**file_latency(path, x[:1]), "runtime": "onnxruntime", "threads": 1, "batch": 1},
            },
            "validation": seen.quality,
            "test": test.quality,
            "inference": {
                "policy": "threshold",
                "tau": tau,
                "test_costs": test.costs,
                "curve": [{"tau": at, "accuracy": look.quality["accuracy"], "costs": look.costs} for at, look in curve],
                "exits": exits,
            },
            "equivalence": {
                "extracted": difference(lambda x: network.masked(x, Threshold(tau))[0], plain, batch),
                "onnx": difference(plain, one_by_one, batch),
            },
        },
    )


def entry(budget: BoundBudget, kept: Tensor, used: Tensor) -> dict[str, Any]:
    """A budget beside what an architecture, `(1, G)` and `(1, U)`, costs: counted, or measured anew."""
    model = budget.model
    if not isinstance(model, MeasuredModel):
        return reached(budget, float(model(used)[0]))
    times = sorted((model.measure(kept)[0] for _ in range(3)), key=lambda one: one.value)
    middle, notes = times[1], list(getattr(model, "notes", {}).values())
    noise = {"low": middle.low, "high": middle.high, "noise": middle.low <= budget.limit <= middle.high}
    return {**reached(budget, middle.value), **noise, "predicted": float(model(used)[0]), "notes": notes}


def reached(budget: BoundBudget, value: float) -> dict[str, Any]:
    """A budget beside what was reached."""
    met = bool(budget.met(torch.tensor(value, dtype=torch.float64)))
    return {"cost": budget.name, "unit": budget.unit, "limit": budget.limit, "value": value, "met": met}


def restored(run: RunFolder, network: SuperNetwork) -> SuperNetwork:
    """A network with the weights and gates of a run's last checkpoint.

    Raises:
        FileError: there is no checkpoint, or it is of another network.
    """
    saved = run.load_checkpoint()
    if saved is None:
        raise FileError(f"{run.path} must hold a checkpoint, found none")
    found = {name: value for name, value in saved[0].items() if name.startswith("network.")}
    load_tensors({f"network.{name}": value for name, value in network.state_dict().items()}, found)
    return network


def evaluate_gates(
    network: SuperNetwork,
    data: Dataset,
    inference: Inference,
    costs: Sequence[str],
    *,
    recalibration: int = 10,
    batch_size: int = 128,
) -> dict[str, Any]:
    """Quality and expected costs of a learned network with its gates, on the test images.

    Args:
        network: with choices, and its weights; its batch norms are set.
        data: what it is looked at on; training images set its batch norms.
        inference: decides the gates.
        costs: as written in budgets.
        recalibration: batches that set the batch norms to what they are under these decisions; 0 for none.
        batch_size: images a batch.

    Returns:
        `{"policy", "tau", "quality", "costs", "units", "activation"}`, the last the mean share of open gates.

    Source: Herrmann et al., section 3.3 and Figures 11, 12.
    """
    asked = [parse_cost(text) for text in costs]
    generator = torch.Generator().manual_seed(inference.seed)
    if recalibration:
        batches = islice(Batches(data.train, batch_size=batch_size, seed=inference.seed).epoch(0), recalibration)
        recalibrate(network, lambda x: network(x, inference.deciders(len(x), generator)[0])[0], batches)
    network.eval()
    seen = observe(
        network,
        inference,
        Batches(data.test, batch_size=batch_size, shuffle=False).epoch(0),
        classes=data.num_classes,
        ignore=data.ignore,
        models={cost_name(cost): cost.bind(network) for cost in asked},
    )
    return {
        "policy": inference.policy,
        "tau": inference.tau,
        "quality": seen.quality,
        "costs": seen.costs,
        "units": {cost_name(cost): cost.unit for cost in asked},
        "activation": sum(seen.rates) / max(1, len(seen.rates)),
    }
