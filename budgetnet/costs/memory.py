"""Memory: the bytes that a network holds, those of activations that it holds at once at most, and those of its file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import inf
from typing import ClassVar

import torch
from torch import Tensor

from budgetnet.costs.additive import decided_once
from budgetnet.costs.file_size import FileSize
from budgetnet.costs.footprints import ChannelFootprint, least_open
from budgetnet.costs.held import held_bytes
from budgetnet.costs.liveness import Liveness
from budgetnet.costs.model import CostModel
from budgetnet.errors import ConfigError
from budgetnet.gated import GatedSequential
from budgetnet.supernet import SuperNetwork

CHUNK = 1024  # architectures whose tables of what is alive are made together


@dataclass(frozen=True)
class Memory:
    """Bytes that the extracted network takes in float32, its batch norms folded.

    "params" are the bytes that it holds: weights, biases, and the numbers of channels that it gathers. "activations"
    are the most bytes of activations alive at once while it runs one example, operator after operator in its own
    order: its input and every value live from when they are computed until their last reader has run, an operator's
    inputs and output are alive while it runs, and nothing is computed in place. Sequences are seen into; views take
    nothing new (`footprints`). "total" is the sum of both. "file" are the bytes of the .onnx file that `export` writes,
    which are predicted in training and counted on what is handed over (`FileSize`).

    The peak is the largest of linear functions of the open channels and has their gradient; for edges it has that of
    the operator at which it stands.

    Attributes:
        of: "params", "activations", "total" or "file".

    Raises:
        ConfigError: `of` is none of these.

    Source: BSN, section 4.1 ("memory consumption cost"), counts parameters; the peak is ours.
    """

    of: str = "total"
    key: ClassVar[str] = "memory"
    unit: ClassVar[str] = "B"

    def __post_init__(self) -> None:
        if self.of not in ("params", "activations", "total", "file"):
            raise ConfigError(f"memory is of params, activations, total or file, got {self.of!r}")

    def bind(self, network: SuperNetwork) -> MemoryCost | FileSize:
        """The cost of this network's architectures.

        Raises:
            ConfigError: gates look at the input: such a network holds everything, whatever an example uses; or its
                file is asked for and a layer cannot be written to ONNX.
        """
        decided_once("memory", network)
        return FileSize(network) if self.of == "file" else MemoryCost(network, self.of)


@dataclass(frozen=True)
class Option:
    """An edge on a path of its own, with few channels open.

    Attributes:
        held: bytes that it and the node it enters hold.
        peak: most bytes of activations alive at once while the two run.
        units: groups that are open.
    """

    held: float
    peak: float
    units: tuple[int, ...]


class MemoryCost(CostModel):
    """Memory of a network's architectures.

    Args:
        network: the space.
        of: "params", "activations" or "total".
    """

    unit = "B"

    def __init__(self, network: SuperNetwork, of: str) -> None:
        self.network = network
        self.held = None if of == "activations" else held_bytes(network)
        self.liveness = None if of == "params" else Liveness(network)

    def __call__(self, used: Tensor) -> Tensor:
        """Maps `(B, U)` used units to `(B,)` float64 bytes, differentiably; 0 where nothing is used."""
        cost = used.new_zeros(len(used), dtype=torch.float64) if self.held is None else self.held(used)
        return cost if self.liveness is None else cost + self.peak(used)

    def peak(self, used: Tensor) -> Tensor:
        """`(B,)` bytes of activations alive at once in `(B, U)` used units."""
        assert self.liveness is not None
        bits = used.to("cpu", torch.float64)
        return torch.cat([self.liveness(chunk).peak for chunk in torch.split(bits, CHUNK)]).to(used.device)

    @property
    def along_path(self) -> list[float] | None:
        """Least bytes that each edge and the node it enters hold; None where activations count, which do not add up."""
        if self.liveness is not None:
            return None
        return [min(option.held for option in self._options(edge)) for edge in range(len(self.network.graph.edges))]

    def of_edges(self, used: Tensor) -> list[float] | None:
        """What each edge and the node it enters hold in an architecture, `(1, U)`; None where activations count."""
        return None if self.held is None or self.liveness is not None else self.held.of_edges(used)

    def smallest(self) -> Tensor:
        """The architecture of the least memory that connects input and output, `(1, G)`.

        Of a path the held bytes add up and the peak is the largest of its edges', so for each bound on the peak the
        path that holds least is tried. A module more never takes less, and neither does a channel more, but that
        all channels at the end of a branch need not be gathered: each such site has its fewest open, or all. This is
        exact, but for a path that brings fixed edges beside it to life.
        """
        network, edges = self.network, range(len(self.network.graph.edges))
        none = network.of_edges(())
        alive = network.used(none)
        fixed = alive[0, : len(edges)].nonzero().flatten().tolist() if bool(network.connects(alive)[0]) else None
        options = [self._options(edge) for edge in edges]
        found = [] if fixed is None else [none]
        for bound in sorted({option.peak for own in options for option in own}):
            fitting = [[option for option in own if option.peak <= bound] for own in options]
            best = [min(own, key=lambda option: option.held, default=None) for own in fitting]
            weights = [inf if option is None else option.held for option in best]
            paths = [network.graph.cheapest_path(weights), *([] if fixed is None else [fixed])]
            found += [self._opened(path, best) for path in paths if all(weights[edge] < inf for edge in path)]
        kept = torch.cat(found)
        return kept[self(network.used(kept)).argmin()][None]

    def binding(self, used: Tensor) -> str:
        """What the memory of an architecture, `(1, U)`, consists of."""
        parts = [] if self.held is None else [f"{float(self.held(used)[0]):.6g} B of parameters"]
        parts += [] if self.liveness is None else [f"{float(self.peak(used)[0]):.6g} B of activations at once"]
        return " and ".join(parts)

    def _opened(self, path: Sequence[int], best: Sequence[Option | None]) -> Tensor:
        """The architecture of a path with the best option of each of its edges, `(1, G)`."""
        kept = self.network.of_edges(path)
        units = [unit for edge in path if (option := best[edge]) is not None for unit in option.units]
        kept[:, [column for unit in units if (column := self.network.gate_of[unit]) is not None]] = 1
        return kept

    def _options(self, edge: int) -> list[Option]:
        """An edge with its fewest channels open, and with all at its ends where gates stand there."""
        network = self.network
        start, end = network.graph.edges[edge]
        rows, units = torch.zeros(1, network.units, dtype=torch.float64), range(0)
        module = network.modules_on_edges[edge]
        if isinstance(module, GatedSequential) and module.sites:
            units = range(*network.span(edge))
            least = [least_open(site) for site in module.sites]
            ends = {site for site in module.end_sites if site is not None}
            choices = product(
                *[(bits, torch.ones_like(bits)) if site in ends else (bits,) for site, bits in enumerate(least)]
            )
            groups = torch.stack([torch.cat(choice) for choice in choices])
            rows = rows.repeat(len(groups), 1)
            rows[:, units] = groups
        rows[:, edge] = 1
        held = peak = torch.zeros(len(rows), dtype=torch.float64)
        if self.held is not None:
            inside = self.held.channels.get(edge)
            held = held + self.held.per_node[end] + (self.held.per_edge[edge] if inside is None else inside(rows))
        if self.liveness is not None:
            part, own = self.liveness.edges[edge], self.liveness.node(end, rows)
            part, before = part(rows) if isinstance(part, ChannelFootprint) else part, self.liveness.bytes(start, rows)
            behind = torch.where(torch.as_tensor(part.passes), before, torch.as_tensor(part.held))
            for each in (before + part.first, part.rest, behind + own.first, own.rest):
                peak = torch.maximum(peak, torch.as_tensor(each, dtype=torch.float64))
        opened = [tuple(unit for unit in units if row[unit]) for row in rows]
        return [Option(*each) for each in zip(held.tolist(), peak.tolist(), opened, strict=True)]
