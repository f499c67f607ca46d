"""What an optimiser of the weights learns, and what it knows, as named tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from budgetnet.runs import load_tensors
from budgetnet.supernet import SuperNetwork


def weight_groups(network: SuperNetwork, gate_decay: float) -> list[dict[str, Any]]:
    """What an optimiser of the weights learns, in groups: first the layers, then what decides gates by the input.

    A group learns at a "share" of the rate. A logit that sums n features moves n times as fast as one of its own: the
    weights that it is made by learn 1 / n as fast.

    Args:
        network: whose own gates are left out.
        gate_decay: weight decay of what decides gates.
    """
    groups: list[dict[str, Any]] = [{"params": layer_weights(network)}]
    for head in network.heads.values():
        last = [value for name, value in head.named_parameters() if name == "decide.weight"]
        rest = [value for name, value in head.named_parameters() if name != "decide.weight"]
        groups.append({"params": rest, "weight_decay": gate_decay, "share": 1.0})
        if last:
            groups.append({"params": last, "weight_decay": gate_decay, "share": 1 / last[0][0].numel()})
    return groups


def layer_weights(network: SuperNetwork) -> list[nn.Parameter]:
    """All that learns but what decides the gates."""
    return [value for name, value in network.named_parameters() if not name.startswith(("gates.", "heads."))]


def optimizer_state(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """What an optimiser knows of each parameter it has moved, named "PREFIX.PLACE.NAME"."""
    known = optimizer.state_dict()["state"]
    return {
        f"{prefix}.{place}.{name}": value
        for place, entries in known.items()
        for name, value in entries.items()
        if isinstance(value, Tensor)
    }


def load_optimizer(optimizer: torch.optim.Optimizer, prefix: str, tensors: Mapping[str, Tensor]) -> None:
    """Takes up what an optimiser knew of each parameter it has moved; `tensors` are named "PREFIX.PLACE.NAME".

    Raises:
        FileError: what it knew of a parameter is incomplete, or of another shape or type.
    """
    adam = isinstance(optimizer, torch.optim.Adam)
    names = ("step", "exp_avg", "exp_avg_sq") if adam else ("momentum_buffer",)
    moved = {name.removeprefix(f"{prefix}.").partition(".")[0] for name in tensors}
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    state = {
        place: {name: torch.empty(() if name == "step" else value.shape) for name in names}
        for place, value in enumerate(parameters)
        if str(place) in moved
    }
    targets = {f"{prefix}.{place}.{name}": value for place, entry in state.items() for name, value in entry.items()}
    load_tensors(targets, tensors)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
