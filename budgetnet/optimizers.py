"""What an optimiser knows, as named tensors of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from budgetnet.runs import load_tensors


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
