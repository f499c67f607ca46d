"""An architecture as data: what architecture.json holds, written from a network and read back against one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from budgetnet.budgets import BoundBudget
from budgetnet.costs.timeline import timeline_of
from budgetnet.costs.transfer import cut_of
from budgetnet.errors import FileError
from budgetnet.runs import RunFolder
from budgetnet.supernet import SuperNetwork


def describe(
    network: SuperNetwork, kept: Tensor, budgets: Sequence[BoundBudget], rates: Sequence[float] | None = None
) -> dict[str, Any]:
    """An architecture as data: what `architecture.json` holds and `named` reads.

    Args:
        network: whose architecture it is.
        kept: `(1, G)` decisions.
        budgets: of the network, by which its modules are priced.
        rates: `(G,)` shares of examples for which gates are open that look at them, where that was seen; else
            their probability on the average one.
    """
    bits, used = network.decisions(kept)[0].bool().tolist(), network.used(kept)[0].bool().tolist()
    gates = network.probabilities().tolist() if rates is None else rates
    probability = [None if column is None else gates[column] for column in network.gate_of]
    priced = [(budget.name, weights) for budget in budgets if (weights := budget.model.of_edges(network.used(kept)))]
    connected = budgets if bool(network.connects(network.used(kept))[0]) else ()
    plans = [(budget.name, timeline_of(budget.model, network, network.used(kept))) for budget in connected]
    cuts = [(budget.name, cut_of(budget.model, network.used(kept))) for budget in connected]
    return {
        "space": {"name": network.name, "options": network.options},
        "nodes": [
            {"name": name, "position": list(position), "shape": list(shape)}
            for name, position, shape in zip(network.graph.nodes, network.positions, network.shapes, strict=True)
        ],
        "edges": [
            {
                "name": network.edge_names[edge],
                "source": start,
                "target": end,
                "kind": network.kinds[edge],
                "fixed": network.gate_of[edge] is None,
                "kept": bits[edge],
                "used": used[edge],
                "probability": probability[edge],
                "costs": {name: weights[edge] for name, weights in priced},
            }
            for edge, (start, end) in enumerate(network.graph.edges)
        ],
        "sites": [
            {
                "edge": network.edge_names[site.edge],
                "name": site.name,
                "lock": site.lock,
                "channels": list(site.sizes),
                "kept": bits[slice(*site.units)],
                "probability": probability[slice(*site.units)],
            }
            for site in network.sites
        ],
        "schedules": [{"cost": name, **asdict(plan)} for name, plan in plans if plan is not None],
        "cuts": [{"cost": name, **asdict(cut)} for name, cut in cuts if cut is not None],
    }


def named(network: SuperNetwork, name: str) -> Tensor:
    """The sub-network of that name, or the one that an architecture.json describes, `(1, G)`.

    Raises:
        ConfigError: the space has no architecture of that name.
        FileError: the file describes no architecture of this network.
    """
    path = Path(name)
    if path.suffix != ".json":
        return network.architecture(name)
    content = RunFolder(path.parent).read(path.name)
    try:
        kept = {edge["name"]: edge["kept"] for edge in content["edges"]}
    except (KeyError, TypeError) as error:
        raise FileError(f"{path} must list edges, each with name and kept: {error}") from error
    differing = sorted(set(network.edge_names) ^ set(kept), key=str)
    if differing or not all(isinstance(bit, bool) for bit in kept.values()):
        what = f"{differing[0]!r} is in one and not in the other" if differing else "kept must be true or false"
        raise FileError(f"{path} is no architecture of {network.name}: {what}")
    try:
        groups = {(site["edge"], site["name"]): list(site["kept"]) for site in content["sites"]}
    except (KeyError, TypeError) as error:
        raise FileError(f"{path} must list sites, each with edge, name and kept: {error}") from error
    units: list[bool] = [kept[name] for name in network.edge_names]
    for site in network.sites:
        given = groups.pop((network.edge_names[site.edge], site.name), [])
        if len(given) != site.groups or not all(isinstance(bit, bool) for bit in given):
            where = f"site {site.name!r} of {network.edge_names[site.edge]!r}"
            raise FileError(f"{path} is no architecture of {network.name}: {where} must have {site.groups} bits")
        units += given
    if groups:
        raise FileError(f"{path} is no architecture of {network.name}: it has the site {next(iter(groups))!r}")
    return network.gates_of(torch.tensor([units], dtype=torch.float32))
