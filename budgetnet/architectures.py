"""An architecture as data: what architecture.json holds, written from a network and read back against one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from budgetnet.budgets import BoundBudget
from budgetnet.errors import FileError
from budgetnet.runs import RunFolder
from budgetnet.supernet import SuperNetwork


def describe(network: SuperNetwork, kept: Tensor, budgets: Sequence[BoundBudget]) -> dict[str, Any]:
    """An architecture as data: what `architecture.json` holds and `read_architecture` reads."""
    bits, used = network.edges(kept)[0].bool().tolist(), network.used(kept)[0].bool().tolist()
    column = {edge: place for place, edge in enumerate(network.columns)}
    probability = network.gates.logits.detach().sigmoid().tolist()
    priced = [(budget.name, getattr(budget.model, "along_path", None)) for budget in budgets]
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
                "fixed": edge not in column,
                "kept": bits[edge],
                "used": used[edge],
                "probability": probability[column[edge]] if edge in column else None,
                "costs": {name: weights[edge] for name, weights in priced if weights is not None},
            }
            for edge, (start, end) in enumerate(network.graph.edges)
        ],
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
    return torch.tensor([[float(kept[network.edge_names[edge]]) for edge in network.columns]])
