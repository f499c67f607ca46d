"""Modules as networks need them: what they make of a shape, in evaluation mode for a while, nothing overwritten."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from budgetnet.errors import GraphError

Shape = tuple[int, ...]
Known = TypeVar("Known")

PLAIN = (
    *(nn.Sequential, nn.Identity, nn.Flatten, nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.ReLU, nn.ReLU6),
    *(nn.Upsample, nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d),
)
"""Layers whose attributes are all that there is to them; printed form and sizes tell what they do to a shape."""

KINDS = 4096
"""Kinds of modules that are remembered; a space has a few, however many modules."""

_shapes: dict[tuple[str, Shape], Shape] = {}


def once_a_kind(
    known: dict[tuple[str, Shape], Known], module: nn.Module, shape: Shape, find: Callable[[], Known]
) -> Known:
    """What `find` says of a module and its input's shape, asked for once of all modules that are alike.

    Args:
        known: what was found, by kind and shape.
        module: looked up where all its layers are `PLAIN` ones without hooks.
        shape: of one example.
        find: depends on nothing else; what it raises is not remembered.
    """
    for part in module.modules():
        if type(part) not in PLAIN or part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part):
            return find()
    sizes = [tuple(value.shape) for value in (*module.parameters(), *module.buffers())]
    kind = f"{module} {sizes}", tuple(shape)
    if kind not in known:
        found = find()
        if len(known) >= KINDS:
            known.clear()
        known[kind] = found
    return known[kind]


def output_shape(module: nn.Module, shape: Shape, name: str) -> Shape:
    """Shape of one example behind `module`, found on the meta device, without computing.

    Raises:
        GraphError: the module does not take that shape.
    """
    try:
        return once_a_kind(_shapes, module, shape, lambda: tuple(on_meta(module, (2, *shape)).shape[1:]))
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise GraphError(f"{name!r} cannot take an input of shape {shape}: {reason}") from error


def on_meta(module: nn.Module, shape: Shape) -> Tensor:
    """What a module makes of an input of `shape`, in evaluation mode, without any values.

    In float32: shapes and counts do not depend on the type.
    """
    held = {key: value.detach().to("meta") for key, value in (*module.named_parameters(), *module.named_buffers())}
    held = {key: value.float() if value.is_floating_point() else value for key, value in held.items()}
    with evaluating(module), torch.no_grad(), NormsAside():
        found: Tensor = functional_call(module, held, torch.empty(shape, device="meta"))
    return found


class NormsAside(TorchFunctionMode):
    """Hands on what batch norms are given: they keep the shape, and torch takes long to say so without values."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Calls `func`, or leaves it out."""
        if func is nn.functional.batch_norm and len(args) > 1 and args[1] is not None:
            x, mean = args[:2]
            if x.dim() > 1 and len(mean) == x.shape[1]:
                return x
        return func(*args, **(kwargs or {}))


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
