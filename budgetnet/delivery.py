"""From a session that has learned to what the user gets: the network, its files, its evidence."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from budgetnet import report
from budgetnet.architectures import named
from budgetnet.budgets import WITHOUT_GATES, BoundBudget, Cost, cost_name, parse_cost
from budgetnet.building import space_of_run
from budgetnet.by_input import Settled, settled
from budgetnet.conditional import (
    ConditionalNetwork,
    beside,
    conditional,
    one_by_one,
    polarised,
    still_deciding,
    tune_fastest,
)
from budgetnet.costs import Function, Latency, MACs, stopwatch
from budgetnet.costs.latency import LatencyElsewhere, LatencyModel
from budgetnet.costs.measured import LearningModel, MeasuredModel
from budgetnet.data import Batches, Dataset
from budgetnet.errors import ConfigError, FileError
from budgetnet.evaluation import evaluate, recalibrate
from budgetnet.export import difference, export_all, file_latency
from budgetnet.export import load as load_file
from budgetnet.extraction import count, extract, fold_batch_norm, state_bytes
from budgetnet.gated import contiguous
from budgetnet.inference import Inference, Observed, exit_table, observe
from budgetnet.measure import cost_of
from budgetnet.report.records import Record
from budgetnet.runs import RunFolder, load_tensors
from budgetnet.session import Session
from budgetnet.sites import Threshold
from budgetnet.supernet import SuperNetwork

CURVE = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Thresholds at which accuracy and cost are looked at on validation data (Herrmann et al., Figure 10)."""

TUNED, REPEATS = (1, 16, 64), 7
"""Validation images a batch at which it is measured where skipping pays, and how often."""

FILES = ("network.onnx", "network.pt2")
"""Of a network that is decided once."""


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

    Returns:
        What was found; its network and files are on the CPU.

    Raises:
        ConfigError: an exporter cannot write the network, or its file does not compute what it computes.
        UnreachableBudget: no architecture, or no threshold of gates that look at the input, keeps the budgets.
        DivergenceError: what is measured is not finite.
    """
    started = time.monotonic()
    outcome = _decided_by_input if session.network.heads and not session.fixed else _decided_once
    plain, kept, own = outcome(session)
    supernet = session.network.cpu().eval()
    x = torch.zeros(1, *supernet.input_shape)
    full = supernet.architecture("full")
    result = {
        "space": {"name": supernet.name, "options": supernet.options},
        "data": session.data.name,
        "seed": session.options.seed,
        "images_seen": session.images,
        "images_taught": session.taught,
        "seconds": session.seconds + time.monotonic() - started,
        "before": limits,
        "full": count(extract(supernet, full), x) if bool(supernet.connects(supernet.used(full))[0]) else {},
        "candidates": session.candidates,
        **own,
    }
    session.write_architecture(kept, own.get("inference", {}).get("rates"))
    session.run.write("result.json", result)
    report.write(session.run.path)
    return Found(plain, kept, supernet, result, session.run.path)


def _decided_once(session: Session) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """The extracted network of the chosen architecture, what it keeps, and what result.json says of it.

    It is looked at in float32, in which it is handed over, whatever it learned in.
    """
    if session.learner.chosen is None:
        session.choose()
    kept = session.learner.chosen
    assert kept is not None
    used = session.network.used(kept)
    batches = session.train.several(session.options.recalibration, session.epoch)
    with exactly():
        recalibrate(session.network, lambda x: session.network.run(x, used), batches)
        plain = extract(session.network, kept).eval()
        validation, test = (session.quality(plain, batches) for batches in (session.validation, session.test))
    session.save()
    supernet, plain = session.network.cpu().eval(), contiguous(plain.cpu())
    contiguous(supernet)
    x = next(iter(session.test.epoch(0)))[0].cpu()
    folded = fold_batch_norm(plain)
    files = {path.suffix[1:]: path for path in export_all(folded, [session.run.path / name for name in FILES], x[:1])}
    equivalence = {"extracted": difference(lambda x: supernet.run(x, used), plain, x)}
    equivalence |= {kind: difference(plain, load_file(path), x) for kind, path in files.items()}
    return (
        plain,
        kept,
        {
            "budgets": [entry(budget, kept, used) for budget in session.budgets],
            "network": {
                **count(plain, x[:1]),
                "memory:params": state_bytes(folded),
                "latency_ms": _milliseconds(files["onnx"], x[:1]),
            },
            "validation": validation,
            "test": test,
            "equivalence": equivalence,
        },
    )


def _decided_by_input(session: Session) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    """The network that skips what its gates close, the gates it opens mostly, and what result.json says of it.

    The threshold is the one nearest to 1/2 at which the cost expected on validation data keeps the budgets; of
    milliseconds, what the file takes. All is looked at in float32, in which the network is handed over, and the
    checkpoint holds it as it is then. How it runs, in torch and in its file, is chosen by what is faster on this
    machine.
    """
    network = session.network
    told = {"macs": MACs().bind(network)} | {budget.name: budget.model for budget in session.budgets}
    models = {WITHOUT_GATES: MACs(gates=False).bind(network)} | told

    def look(tau: float, batches: Batches = session.validation) -> Observed:
        examples, data = batches.epoch(0), session.data
        return observe(
            network, Inference(tau=tau), examples, classes=data.num_classes, ignore=data.ignore, models=models
        )

    def settle(tau: float) -> None:
        batches = session.train.several(session.options.recalibration, session.epoch)
        recalibrate(network, lambda x: network.masked(x, Threshold(tau))[0], batches)

    path = session.run.path / "network.onnx"
    examples = next(iter(session.validation.epoch(0)))[0].cpu()
    with exactly():
        found = settled(network, session.budgets, look, settle, examples, path)
        tau, seen, plain, written = found.tau, found.seen, found.plain, found.written
        assert written is not None
        curve = [(at, look(at)) for at in CURVE]
        test = look(tau, session.test)
        exits = exit_table(network, tau, session.test.epoch(0)) if network.exits else []
    session.save()
    network.cpu()
    x = next(iter(session.test.epoch(0)))[0].cpu()
    for size in TUNED:
        tune_fastest(plain, examples[:size], REPEATS)
    session.run.write("break-even.json", plain.table)
    full = fold_batch_norm(extract(network, network.architecture("full")))
    batch = x[:16]
    kept = (torch.tensor(seen.rates) > 0.5).float()[None]
    return (
        plain,
        kept,
        {
            "budgets": [entry_by_input(budget, found) for budget in session.budgets],
            "network": {
                "macs": seen.costs["macs"],
                WITHOUT_GATES: seen.costs[WITHOUT_GATES],
                "params": sum(value.numel() for value in plain.parameters()),
                "memory:params": state_bytes(plain),
                "latency_ms": _milliseconds(path, x[:1]),
                "onnx_ms": written["ms"],
            },
            "validation": seen.quality,
            "test": test.quality,
            "inference": {
                "policy": "threshold",
                "tau": tau,
                "rates": seen.rates,
                "test_costs": test.costs,
                "curve": [
                    {"tau": at, "accuracy": one.quality["accuracy"], "costs": {name: one.costs[name] for name in told}}
                    for at, one in curve
                ],
                "exits": exits,
                "onnx": written["groups"],
                "beside_full": beside(plain, path, full, examples, TUNED),
            },
            "equivalence": {
                "extracted": difference(lambda x: network.masked(x, Threshold(tau))[0], plain, batch),
                "onnx": difference(plain, partial(one_by_one, load_file(path)), batch),
            },
        },
    )


def exactly() -> AbstractContextManager[None]:
    """In which a GPU does not round float32 to fewer digits."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def _milliseconds(file: Path, x: Tensor) -> dict[str, Any]:
    """What a call of the .onnx file takes for one example, `(1, C, H, W)`, looked at as long as a candidate is."""
    timing = file_latency(file, x, seconds=stopwatch.LOOK, patience=stopwatch.PATIENCE / 6)
    return {**timing, "runtime": "onnxruntime", "threads": 1, "batch": 1}


def entry(budget: BoundBudget, kept: Tensor, used: Tensor) -> dict[str, Any]:
    """A budget beside what an architecture, `(1, G)` and `(1, U)`, costs: counted, predicted, or measured anew."""
    model = budget.model.decided()
    if isinstance(model, LatencyElsewhere):
        return {**reached(budget, float(model(used)[0])), "predicted_for": model.machine}
    if not isinstance(model, MeasuredModel):
        return reached(budget, float(model(used)[0]))
    found = model.report(kept)
    told: dict[str, Any] = {**found.told(), "noise": budget.unsure(found.low, found.high)}
    told |= {"notes": list(getattr(model, "notes", {}).values()), "predicted": float(model(used)[0])}
    if isinstance(model, LearningModel):
        told["error"] = model.error
    if isinstance(model, LatencyModel):
        told["machine"] = {**asdict(model.table.setting), **model.watch.took._asdict()}
        told["slowness"] = found.slowness
    return {**reached(budget, found.value), **told}


def entry_by_input(budget: BoundBudget, found: Settled) -> dict[str, Any]:
    """A budget beside what a mean image costs where gates look at it: as seen, or of milliseconds as measured."""
    seen = found.seen.costs[budget.name]
    if budget.name not in found.measured:
        return reached(budget, seen)
    one = found.measured[budget.name]
    return {**reached(budget, one.value), **one.told(), "noise": budget.unsure(one.low, one.high), "predicted": seen}


def reached(budget: BoundBudget, value: float) -> dict[str, Any]:
    """A budget beside what was reached."""
    met = bool(budget.met(torch.tensor(value, dtype=torch.float64)))
    limit = {"limit": budget.limit, "at_most": budget.upper}
    return {"cost": budget.name, "unit": budget.unit, **limit, "value": value, "met": met}


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


def load(run: str | Path, space: SuperNetwork | None = None) -> nn.Module:
    """The network that a finished run handed over, for another process: what `Found.network` gives.

    Where gates look at the input it skips as it did then: the run knows where that pays on its machine.

    Args:
        run: its folder.
        space: that it was learned in, where that is one of your own; a named one the run knows.

    Raises:
        ConfigError: the space is one of your own, and was not given.
        FileError: a file of the run is missing or damaged, or belongs to another space.
    """
    folder = RunFolder(run)
    network = restored(folder, space_of_run(folder) if space is None else copy.deepcopy(space)).eval()
    result = Record(folder.read("result.json"), str(folder.path / "result.json"))
    decided = result.maybe_record("inference")
    if decided is None:
        return extract(network, named(network, str(folder.path / "architecture.json"))).eval()
    plain = conditional(network, tau=decided.share("tau"))
    try:
        plain.table = folder.read("break-even.json")
    except ConfigError as error:
        raise FileError(f"{folder.path / 'break-even.json'}: {error}") from error
    return plain


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
        data: what it is looked at on; training images, augmented as in training, set its batch norms.
        inference: decides the gates.
        costs: as written in budgets.
        recalibration: batches that set the batch norms to what they are under these decisions; 0 for none.
        batch_size: images a batch.

    Returns:
        `{"policy", "tau", "quality", "costs", "units", "activation"}`, the last the mean share of open gates.

    Source: Herrmann et al., section 3.3 and Figures 11, 12.
    """
    asked = _asked(costs, data, batch_size)
    for cost in asked:
        if isinstance(cost, Latency) and network.heads:
            raise ConfigError(
                f"where gates look at the input the run's file is timed: measure RUN, got {cost_name(cost)}"
            )
    generator = torch.Generator().manual_seed(inference.seed)
    if recalibration:
        batches = Batches(
            data.train, batch_size=batch_size, augmentation=data.augmentation, seed=inference.seed
        ).several(recalibration)
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


def _asked(costs: Sequence[str], data: Dataset, batch_size: int) -> list[Cost]:
    """Costs as they are written in budgets; those that read examples are measured on the test images, in any order."""
    looked_at = Batches(data.test, batch_size=batch_size, drop_last=False)
    parsed = [parse_cost(text) for text in costs]
    return [
        cost.on(lambda: (x for x, _ in looked_at.epoch(0))) if isinstance(cost, Function) else cost for cost in parsed
    ]


@torch.no_grad()
def fold_gates(
    network: SuperNetwork, data: Dataset, tau: float, margin: float, *, batch_size: int = 128
) -> tuple[ConditionalNetwork, dict[str, Any]]:
    """The network that skips what its gates close, those that hardly look at the input decided once and for all.

    Args:
        network: with gates that look at the input, and its weights; its batch norms are left as they are.
        data: its validation images say how often each gate is open.
        tau: threshold of the gates.
        margin: gates that are open on no more than this share of the images are closed for all, and those that
            are closed on no more are open for all; in [0, 0.5).
        batch_size: images a batch.

    Returns:
        The network, and `{"gates", "constants", "validation": {"original", "folded"}}`: how many gates look at the
        input and how many of these are constants now; quality and expected "macs" on the validation images before
        and after.

    Raises:
        ConfigError: no gate looks at the input, or `margin` is outside its range.

    Source: Herrmann et al., section S4.2.
    """
    if not network.heads:
        raise ConfigError(f"gates to fold are those that look at the input, and {network.name} has no such gates")
    batches, network = Batches(data.validation, batch_size=batch_size, shuffle=False), network.eval()
    macs = MACs().bind(network)
    classes, ignore = data.num_classes, data.ignore
    seen = observe(network, Inference(tau=tau), batches.epoch(0), classes=classes, ignore=ignore, models={"macs": macs})
    constants = polarised(torch.tensor(seen.rates), margin)
    folded = conditional(network, tau=tau, constants=constants)
    left, costs = still_deciding(macs, network, folded), []

    def predict(x: Tensor) -> Tensor:
        output, kept = folded.decide(x)
        costs.append(left(network.used(kept)))
        return output

    quality = evaluate(predict, batches.epoch(0), classes=classes, ignore=ignore)
    return folded, {
        "gates": network.gate_count - network.independent,
        "constants": int((~constants[network.independent :].isnan()).sum()),
        "validation": {
            "original": {**seen.quality, **seen.costs},
            "folded": {**quality, "macs": float(torch.cat(costs).mean())},
        },
    }


@torch.no_grad()
def evaluate_architecture(
    run: RunFolder,
    network: SuperNetwork,
    data: Dataset,
    costs: Sequence[str],
    *,
    batch_size: int = 128,
) -> dict[str, Any]:
    """Quality of the network of a finished run on the test images, and what it costs.

    Args:
        run: its gates do not look at the input, or were told what to keep.
        network: its space.
        data: what it is looked at on.
        costs: as written in budgets.
        batch_size: images a batch.

    Returns:
        What `evaluate_gates` returns; the policy is "chosen", and there is no tau.

    Raises:
        FileError: a file of the run is missing or damaged.
    """
    kept = named(network, str(run.path / "architecture.json"))
    batches = Batches(data.test, batch_size=batch_size, shuffle=False)
    plain = load_file(run.path / "network.pt2")
    asked = _asked(costs, data, batch_size)
    return {
        "policy": "chosen",
        "tau": None,
        "quality": evaluate(plain, batches.epoch(0), classes=data.num_classes, ignore=data.ignore),
        "costs": {cost_name(cost): cost_of(cost, network, kept, decided=True).value for cost in asked},
        "units": {cost_name(cost): cost.unit for cost in asked},
        "activation": float(kept.mean()),
    }
