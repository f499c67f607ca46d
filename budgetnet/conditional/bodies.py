"""What stands on an edge when it is run: layers in a row, on all their channels or on those a pattern opens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from budgetnet.extraction import fused
from budgetnet.gated import cuttable, narrowed_weight, selected

Pattern = tuple[bool, ...]
"""Which of a body's n channel groups are open, of those that the input decides on."""

CACHE = 8
"""How many times its own weights a body may hold in weights that it has narrowed before."""

MEMORY = 4096
"""Patterns of which something is remembered."""

RELUS = (nn.ReLU, nn.ReLU6)
"""Activations that can overwrite a value that nobody else reads."""


class Step(NamedTuple):
    """One thing to do to a value.

    Attributes:
        kind: "conv", "padded" (a convolution that pads otherwise than with zeros), "linear", "norm", "relu", "mask",
            or "layer" for what is called as it is.
        layer: that is run, None for a mask.
        weight, bias: of the channels that are read and written; of a mask `weight` is the owner of each channel.
        options: what else its function takes.
    """

    kind: str
    layer: Any
    weight: Any = None
    bias: Tensor | None = None
    options: tuple[Any, ...] = ()


class Variant(NamedTuple):
    """A body on some of its channels.

    Attributes:
        reads, writes: channels of the input and output, None for all; those not written are zero.
        steps: what is done between.
        versions: of the weights that it was cut from.
    """

    reads: Tensor | None
    steps: tuple[Step, ...]
    writes: Tensor | None
    versions: tuple[int, ...]


class Place(NamedTuple):
    """A layer and the sites, of those decided at run time, on the channels that it reads and writes."""

    layer: nn.Module
    before: int | None
    behind: int | None


class Body(nn.Module):
    """Layers in a row, run on the channels that are open.

    Args:
        places: the layers, in evaluation mode.
        owners: for each site decided at run time and each of its channels the number of the decision that opens
            it, `groups` for channels that are always open.
        gates: sites that stand before the layer of this index.
        ends: site of the channels that come in, and of those that go out.
        reads, writes: channels of the input that come in, and of the output that go out; None for all.
        channels: of the output.
        groups: decisions n.
        work: MACs of each layer, for what a pattern costs.
    """

    reads: Tensor | None
    writes: Tensor | None

    def __init__(
        self,
        places: Sequence[Place],
        *,
        owners: Sequence[Sequence[int]] = (),
        gates: Mapping[int, int] | None = None,
        ends: tuple[int | None, int | None] = (None, None),
        reads: Tensor | None = None,
        writes: Tensor | None = None,
        channels: int = 0,
        groups: int = 0,
        work: Sequence[float] = (),
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(place.layer for place in places)
        self.places = tuple((place.before, place.behind) for place in places)
        self.owners = tuple(tuple(owner) for owner in owners)
        self.gates, self.ends, self.channels, self.groups = dict(gates or {}), ends, channels, groups
        self.work = tuple(work) if sum(work) > 0 else (1.0,) * len(places)
        self.register_buffer("reads", reads)
        self.register_buffer("writes", writes)
        self.full: Pattern = (True,) * groups
        self.passes = not self.layers and not self.owners and reads is None and writes is None
        """Whether the value passes unchanged."""
        self._weights: list[Tensor] = []
        self._variants: dict[Pattern, Variant] = {}
        self._held = 0
        self._known: dict[Pattern, tuple[bool, float]] = {}

    def run(self, x: Tensor, pattern: Pattern, table: Tensor | None = None) -> tuple[Tensor, bool]:
        """Computes the channels that a pattern opens.

        Args:
            x: `(B, ...)`, left as it is.
            pattern: what any of these examples opens.
            table: `(B, n)` or `(1, n)` decisions in {0, 1} of each example, None where all are as the pattern says.

        Returns:
            `(B, ...)`, and whether it may be overwritten: it shares no memory with anything else.
        """
        reads, steps, writes, _ = self.variant(pattern)
        owned = reads is not None
        if reads is not None:
            x = x.index_select(1, reads)
        x, owned = run_steps(steps, x, owned, table)
        if writes is not None:
            x, owned = x.new_zeros(len(x), self.channels, *x.shape[2:]).index_copy_(1, writes, x), True
        return x, owned

    def alive(self, pattern: Pattern) -> bool:
        """Whether each site has an open channel."""
        return self._about(pattern)[0]

    def share(self, pattern: Pattern) -> float:
        """Share of the MACs that a pattern leaves."""
        return self._about(pattern)[1]

    def variant(self, pattern: Pattern) -> Variant:
        """The body narrowed to a pattern, cut now or held from before."""
        found = self._variants.get(pattern)
        if found is None or (self.groups and found.versions != self._versions()):
            if self._held > CACHE * self._size():
                self.forget()
            found = self._variants[pattern] = self._narrowed(pattern)
            if pattern != self.full:
                self._held += sum(step.weight.numel() for step in found.steps if step.weight is not None)
        return found

    def forget(self) -> None:
        """Drops what was narrowed."""
        self._variants.clear()
        self._weights = []
        self._held = 0

    def _narrowed(self, pattern: Pattern) -> Variant:
        device = next((value.device for value in self.parameters()), torch.device("cpu"))
        kept: list[Tensor | None] = []
        owners: list[Tensor | None] = []
        for owner in self.owners:
            is_open = [place for place, gate in enumerate(owner) if gate == self.groups or pattern[gate]]
            kept.append(None if len(is_open) == len(owner) else torch.tensor(is_open, device=device))
            left = [owner[place] for place in is_open]
            decided = any(number < self.groups for number in left)
            owners.append(torch.tensor(left, device=device) if decided else None)
        steps: list[Step] = []
        for index in range(len(self.layers) + 1):
            gate = owners[self.gates[index]] if index in self.gates else None
            if gate is not None:
                steps.append(Step("mask", None, gate, None, (bool((gate == self.groups).any()),)))
            if index < len(self.layers):
                before, behind = self.places[index]
                steps.append(
                    step_of(
                        self.layers[index],
                        None if before is None else kept[before],
                        None if behind is None else kept[behind],
                    )
                )
        first, last = self.ends
        return Variant(
            within(self.reads, None if first is None else kept[first]),
            tuple(steps),
            within(self.writes, None if last is None else kept[last]),
            self._versions(),
        )

    def _about(self, pattern: Pattern) -> tuple[bool, float]:
        found = self._known.get(pattern)
        if found is None:
            if len(self._known) >= MEMORY:
                self._known.clear()
            counts = [sum(gate == self.groups or pattern[gate] for gate in owner) for owner in self.owners]
            shares = [count / len(owner) for count, owner in zip(counts, self.owners, strict=True)]
            done = 0.0
            for work, (before, behind), layer in zip(self.work, self.places, self.layers, strict=True):
                read = shares[before] if before is not None and cuttable(layer) else 1.0
                done += work * read * (1.0 if behind is None else shares[behind])
            found = self._known[pattern] = (all(counts), done / max(sum(self.work), 1e-30))
        return found

    def _versions(self) -> tuple[int, ...]:
        if not self._weights:
            self._weights = list(self.parameters())
        return versions(self._weights)

    def _size(self) -> int:
        return sum(value.numel() for value in self.parameters())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Body:
        self.forget()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_variants": {}, "_weights": [], "_held": 0}


def run_steps(steps: Sequence[Step], x: Tensor, owned: bool, table: Tensor | None) -> tuple[Tensor, bool]:
    """What the steps make of `x`, and whether that may be overwritten; `owned` says so of `x`."""
    for kind, layer, weight, bias, options in steps:
        if kind == "conv":
            x, owned = torch.conv2d(x, weight, bias, *options), True
        elif kind == "padded":
            padded = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
            x, owned = torch.conv2d(padded, weight, bias, *options), True
        elif kind == "relu":
            x, owned = rectified(layer, x, owned)
        elif kind == "mask":
            if table is not None:
                with_open = torch.cat([table, table.new_ones(len(table), 1)], dim=1) if options[0] else table
                mask = with_open.index_select(1, weight)
                mask = mask.reshape(*mask.shape, *[1] * (x.ndim - 2))
                x, owned = (x.mul_(mask) if owned else x * mask), True
        elif kind == "linear":
            x, owned = F.linear(x, weight, bias), True
        elif kind == "norm":
            mean, var, eps = options
            x, owned = F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps), True
        else:
            x, owned = layer(x), False
    return x, owned


def rectified(layer: nn.Module, x: Tensor, owned: bool) -> tuple[Tensor, bool]:
    """An activation of `x`, in place where that is `owned`, and whether the outcome may be overwritten."""
    if type(layer) is nn.ReLU:
        return (x.relu_() if owned else x.relu()), True
    if type(layer) is nn.ReLU6:
        return F.relu6(x, inplace=owned), True
    if type(layer) is nn.Identity:
        return x, owned
    return layer(x), False


def step_of(layer: nn.Module, before: Tensor | None, behind: Tensor | None) -> Step:
    """A layer that reads and writes these channels, None for all."""
    if before is None and behind is None and not is_plain(layer):
        return Step("layer", layer)
    if isinstance(layer, nn.Conv2d):
        weight = narrowed_weight(layer.weight, None if layer.groups > 1 else before, behind)
        groups = len(weight) if layer.groups > 1 and behind is not None else layer.groups
        zeros = layer.padding_mode == "zeros"
        options = (layer.stride, layer.padding if zeros else 0, layer.dilation, groups)
        return Step("conv" if zeros else "padded", layer, weight, selected(layer.bias, behind), options)
    if isinstance(layer, nn.Linear):
        return Step("linear", layer, narrowed_weight(layer.weight, before, behind), selected(layer.bias, behind))
    if isinstance(layer, nn.BatchNorm2d) and behind is not None:
        stats = (selected(layer.running_mean, behind), selected(layer.running_var, behind))
        return Step("norm", layer, selected(layer.weight, behind), selected(layer.bias, behind), (*stats, layer.eps))
    return Step("relu" if type(layer) in RELUS else "layer", layer)


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer does what its kind does, and nothing else."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    return type(layer) in (nn.Conv2d, nn.Linear, *RELUS) and not hooks


def versions(values: Sequence[Tensor]) -> tuple[int, ...]:
    """How often each was written to: what was made of it before is out of date when that rises."""
    return tuple([0 if value.is_inference() else value._version for value in values])


def within(whole: Tensor | None, kept: Tensor | None) -> Tensor | None:
    """The places in `whole`, None for all, that are `kept` of it, None for all."""
    if whole is None or kept is None:
        return whole if kept is None else kept
    return whole.index_select(0, kept)


def folded(places: Sequence[Place], gates: Mapping[int, int]) -> tuple[list[Place], dict[int, int]]:
    """Makes each batch norm right behind a convolution part of it.

    Args:
        places: layers in evaluation mode.
        gates: sites that stand before the layer of this index.

    Returns:
        Both as they are afterwards.
    """
    found: list[Place] = []
    moved: dict[int, int] = {}
    for index in range(len(places) + 1):
        if index in gates:
            moved[len(found)] = gates[index]
        if index == len(places):
            break
        layer = places[index].layer
        before = found[-1].layer if found and index not in gates else None
        both = None if before is None else fused(before, layer)
        if both is not None:
            found[-1] = found[-1]._replace(layer=both)
        elif not isinstance(layer, nn.Identity):
            found.append(places[index])
    return found, moved
