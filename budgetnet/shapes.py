"""Modules as networks need them: what they make of a shape, in evaluation mode for a while, nothing overwritten."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call

from budgetnet.errors import GraphError

Shape = tuple[int, ...]


def output_shape(module: nn.Module, shape: Shape, name: str) -> Shape:
    """Shape of one example behind `module`, found on the meta device, without computing.

    Raises:
        GraphError: the module does not take that shape.
    """
    try:
        with evaluating(module), torch.no_grad():
            output = functional_call(module, on_meta(module), torch.empty(2, *shape, device="meta"))
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise GraphError(f"{name!r} cannot take an input of shape {shape}: {reason}") from error
    return tuple(output.shape[1:])


def on_meta(module: nn.Module) -> dict[str, Tensor]:
    """What a module holds, without its values, in float32: shapes and counts do not depend on the type."""
    held = {key: value.detach().to("meta") for key, value in (*module.named_parameters(), *module.named_buffers())}
    return {key: value.float() if value.is_floating_point() else value for key, value in held.items()}


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in evaluation mode, and as it was afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def without_overwriting(module: nn.Module) -> nn.Module:
    """The module whose layers, in place, have been told to leave what they are given as it is."""
    for part in module.modules():
        if getattr(part, "inplace", False) is True:
            part.inplace = False  # type: ignore[assignment]
    return module
