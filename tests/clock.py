"""A machine whose times are known: in place of real ones latency models see these."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor

from budgetnet.assembly import Assembler
from budgetnet.costs import MACs
from budgetnet.timing import Timing


class Clock:
    """In place of real times: each function takes what this says, and whole networks the sum of their modules."""

    def __init__(self, assembler: Assembler) -> None:
        self.assembler, self.macs = assembler, MACs(additions=False).bind(assembler.network)

    def alone(self, edge: int, bits: Tensor) -> float:
        used = torch.zeros(1, self.assembler.network.units)
        used[0, edge] = 1
        for site in self.assembler.network.sites:
            if site.edge == edge:
                used[0, self.macs.channels[edge].units[0] : self.macs.channels[edge].units[1]] = bits
        return 0.01 + float(self.macs(used)[0]) * 1e-6

    def addition(self, node: int) -> float:
        return 0.002

    def activation(self, node: int) -> float:
        return 0.001

    def whole(self, kept: Tensor) -> float:
        """Half as long again as the modules by themselves, and something that is always there."""
        network = self.assembler.network
        used = network.used(kept)
        total = 0.0
        for edge in self.assembler.edges:
            if used[0, edge]:
                total += self.alone(edge, network.groups_of(edge, used)[0])
        for node, entering in enumerate(network.graph.incoming):
            count = int(used[0, list(entering)].sum()) if entering else 0
            total += self.addition(node) * max(0, count - 1)
            total += self.activation(node) * (count > 0 and node in self.assembler.nodes)
        return 0.05 + 1.5 * total


def tick(patch: pytest.MonkeyPatch) -> None:
    """Latency models see the times of a `Clock`."""
    clocks: dict[Assembler, Clock] = {}

    def clock_of(assembler: Assembler) -> Clock:
        if assembler not in clocks:
            clocks[assembler] = Clock(assembler)
        return clocks[assembler]

    def times(self: Assembler, ways: Sequence[float], calls: int, seconds: float = 0.0) -> list[Timing]:
        return [Timing(np.full(calls, way), 0.0) for way in ways]

    for name in ("alone", "addition", "activation", "whole"):
        patch.setattr(Assembler, name, lambda self, *given, own=name: getattr(clock_of(self), own)(*given))
    patch.setattr(Assembler, "yardstick", lambda self: 1.0)
    patch.setattr(Assembler, "nothing", lambda self: 0.0)
    patch.setattr(Assembler, "times", times)
    patch.setattr(Assembler, "apart", lambda self: nullcontext(self))  # a new process would see other times
    patch.setattr(Assembler, "_export", lambda self: None)
