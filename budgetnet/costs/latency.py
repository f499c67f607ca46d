"""Milliseconds of the extracted network: predicted from a table of its modules' times, measured where it counts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, get_args

import numpy as np
import torch
from torch import Tensor

from budgetnet.assembly import Assembler, Runtime
from budgetnet.costs.additive import ChannelCost, EdgeCost, MACs, decided_once
from budgetnet.costs.channel_time import ChannelTime, channel_time, counts_key, openings
from budgetnet.costs.measured import Measured
from budgetnet.costs.stopwatch import Stopwatch
from budgetnet.costs.timetable import Setting, Timetable, Whole, fitted
from budgetnet.errors import ConfigError, FileError
from budgetnet.gated import ChannelGate, GatedSequential
from budgetnet.supernet import SuperNetwork
from budgetnet.timing import quantile_share

ALONE_CALLS = 24
"""Timed calls of a module by itself."""
NETWORKS = {"compiled": 6}
"""Whole networks that are measured before a search: so few where each takes long to build, else 48."""
EACH_EPOCH = {"compiled": 0}
"""Whole networks that are measured after an epoch of a search, else 4."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call of the extracted network, batch norms folded.

    Attributes:
        runtime: "onnxruntime", "torch" (eager) or "compiled" (`torch.compile`).
        threads: that the runtime may use.
        batch: examples in a call.
        quantile: "median", or "p95": what 95 % of the calls stay within.
        device: "cpu", or "cuda" for torch.
        table: file of the modules' times: read where it is there, and written; "" for none.

    Raises:
        ConfigError: an option is outside its range.
    """

    runtime: str = "onnxruntime"
    threads: int = 1
    batch: int = 1
    quantile: str = field(default="median", metadata={"dotted": True})
    device: str = "cpu"
    table: str = field(default="", metadata={"file": True})
    key: ClassVar[str] = "latency"
    unit: ClassVar[str] = "ms"

    def __post_init__(self) -> None:
        if self.runtime not in get_args(Runtime):
            raise ConfigError(f"runtime must be {', '.join(get_args(Runtime))}, got {self.runtime!r}")
        if self.device not in ("cpu", "cuda") or (self.device == "cuda" and self.runtime == "onnxruntime"):
            raise ConfigError(f"latency is measured on cpu, or of torch on cuda, got {self.runtime} on {self.device!r}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("latency on cuda needs a CUDA device, found none")
        for name in ("threads", "batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number >= 1, got {value!r}")
        if not isinstance(self.table, str):
            raise ConfigError(f"table must be the path of a file as a text, got {self.table!r}")
        quantile_share(self.quantile)

    def kept_in(self, folder: Path) -> Latency:
        """The same with its table in a folder, where no other file was asked for.

        Raises:
            ConfigError: the file that was asked for has no folder to be in.
        """
        if not self.table:
            where = "" if self.device == "cpu" else f"-{self.device}"
            return replace(self, table=str(folder / f"latency-{self.runtime}-{self.threads}-{self.batch}{where}.json"))
        if not Path(self.table).parent.is_dir() or Path(self.table).is_dir():
            raise ConfigError(f"a table of times is a file in a folder that is there, got {self.table!r}")
        return self

    def assembler(self, network: SuperNetwork) -> Assembler:
        """What builds this network's architectures to be timed."""
        runtime: Runtime = self.runtime  # type: ignore[assignment]
        return Assembler(network, runtime=runtime, threads=self.threads, batch=self.batch, device=self.device)

    def measured(self, network: SuperNetwork, kept: Tensor) -> Measured:
        """What the extracted network of an architecture, `(1, G)`, takes, as a result says it.

        Nothing is predicted, but a table that was asked for is made, or added to.

        Raises:
            ConfigError: it does not connect input and output.
        """
        if self.table:
            model = self.kept_in(Path()).bind(network)
            model.save()
            return model.report(kept)
        return Stopwatch(self.assembler(network), self.quantile).report(kept)

    def compared(self, network: SuperNetwork, kept: Tensor, full: float) -> Measured:
        """As `measured`, but on the machine as it was when the full network took so many milliseconds."""
        return Stopwatch(self.assembler(network), self.quantile).compared(kept, full)

    def bind(self, network: SuperNetwork) -> LatencyModel:
        """The latency of this network's architectures; times its modules, and some whole networks, on this machine.

        Raises:
            ConfigError: the network has gates that look at the input: its latency is no function of what is kept.
            FileError: the table is no such file, or holds for another machine or setting.
        """
        decided_once("latency", network)
        return LatencyModel(network, self)


class LatencyModel:
    """Latency of a network's architectures: `T(H) = w_0 + sum_g w_g S_g(H)` over kinds g of modules and sums.

    `S_g` is what the table has for all used modules of that kind. The weights are fitted to whole networks that
    were measured, before the search and during it.

    Args:
        network: the space.
        cost: how latency is measured.

    Attributes:
        watch: measures whole networks.
        full: milliseconds of the full network on the machine as it is when the model is made: what percents are of.
        error: median relative error of predictions for networks that they were not fitted to.
    """

    unit = "ms"

    def __init__(self, network: SuperNetwork, cost: Latency) -> None:
        self.network, self.cost, self.each_epoch = network, cost, EACH_EPOCH.get(cost.runtime, 4)
        self.watch = Stopwatch(cost.assembler(network), cost.quantile)
        # modules by themselves are not compiled: that takes seconds each
        eager = cost.runtime == "compiled"
        self.modules = replace(cost, runtime="torch").assembler(network) if eager else self.watch.assembler
        channels = MACs().bind(network).channels
        self.sites = {edge: inside for edge, inside in channels.items() if isinstance(inside, ChannelCost)}
        self.space = self._space()
        whole = self._read()
        self.full = whole.value
        self._time_modules()
        self.parts = self._parts()
        known = len(self.known)
        missing = NETWORKS.get(cost.runtime, 48) - known
        if missing > 0:
            self.refit(widely(network, missing, torch.Generator().manual_seed(0)), first=True)
        else:
            self._fit()
        if not known:
            place = self.table.networks.index(self.known[0])
            self.table.networks[place] = replace(self.known[0], seen=whole.value / self.watch.slowness)
            self.save()

    def __call__(self, used: Tensor) -> Tensor:
        """Maps `(B, U)` used units to `(B,)` float64 milliseconds, with a gradient where `used` has one."""
        return self.base + self.times(used)

    @property
    def along_path(self) -> list[float]:
        """What each edge and the node it enters add at least on a path of their own."""
        source = self.network.graph.source
        starts = [start for start, _ in self.network.graph.edges]
        return [own + self.base * (start == source) for own, start in zip(self.times.along_path, starts, strict=True)]

    @property
    def notes(self) -> dict[str, str]:
        """What was noticed about the machine, by kind."""
        return self.watch.notes

    def measure(self, kept: Tensor) -> list[Measured]:
        """What the extracted networks of `(n, G)` architectures take, in turns on this machine."""
        return self.watch.measure(kept)

    def report(self, kept: Tensor) -> Measured:
        """What the extracted network of an architecture, `(1, G)`, takes on the machine at rest."""
        return self.watch.report(kept)

    def refit(self, kept: Tensor, *, first: bool = False) -> None:
        """Measures the networks of `(n, G)` architectures and fits the weights to all measured so far.

        Args:
            kept: connects input and output.
            first: before the search, with more patience; else the prediction's error is taken from these, before it
                knows them.
        """
        used, judge = self.network.used(kept), not first
        seen = [milliseconds / self.watch.slowness for milliseconds in self.watch.briefly(kept, first=first)]
        before = [time / self.fitted_at for time in self(used).tolist()] if judge else []
        parts = torch.stack([part(used) for part in self.parts.values()], dim=1).tolist()
        self.table.networks += [
            Whole(self.space, dict(zip(self.parts, row, strict=True)), value)
            for row, value in zip(parts, seen, strict=True)
        ]
        self._fit()
        if judge:
            self.error = float(np.median([abs(a / b - 1) for a, b in zip(before, seen, strict=True)]))
        self.save()

    def go_by(self, baseline: Mapping[str, float]) -> None:
        """From now on all milliseconds are of the machine as it was at a `Stopwatch.baseline`, predicted ones too."""
        self.watch.go_by(baseline)
        self._fit()

    def save(self) -> None:
        """Writes the table to its file, once there is a folder for it, beside what others have written there."""
        path = Path(self.cost.table)
        if self.cost.table and path.parent.is_dir():
            if path.is_file():
                self.table.take_up(Timetable.load(path, self.table.setting), but=self.space)
            self.table.save(path)

    @property
    def known(self) -> list[Whole]:
        """The whole networks in the table that are of this space and quantile."""
        return [whole for whole in self.table.networks if whole.space == self.space]

    def _space(self) -> str:
        """What tells spaces apart whose whole networks differ, and the quantile that is told of them."""
        network, modules = self.network, self.modules
        edges = [[*ends, modules.edge_kind(edge) if edge in modules.folded else ""]
                 for edge, ends in enumerate(network.graph.edges)]  # fmt: skip
        nodes = [modules.kind(network.activations[node], shape) for node, shape in enumerate(network.shapes)]
        sites = [[site.edge, site.name, *site.sizes] for site in network.sites]
        content = json.dumps([self.cost.quantile, edges, nodes, sites])
        return f"{self.cost.quantile} of {network.name} {hashlib.sha256(content.encode()).hexdigest()[:16]}"

    def _read(self) -> Measured:
        """Takes up the table's file where there is one, and looks how fast the machine is now.

        Returns:
            What the full network takes.
        """
        setting = Setting.here(self.cost.runtime, self.cost.threads, self.cost.batch, self.cost.device)
        path, (full, yard) = Path(self.cost.table), self.watch.start()
        known = self.cost.table and path.is_file()
        self.table = Timetable.load(path, setting) if known else Timetable(setting, yard)
        self.watch.slowness = yard / self.table.yardstick
        self.watch.note(self.watch.slowness)
        return full

    def _edge_kind(self, edge: int) -> str:
        """What the table calls an edge: a module, and between which of its layers channels can be closed."""
        kind, module = self.modules.edge_kind(edge), self.network.modules_on_edges[edge]
        if not isinstance(module, GatedSequential):
            return kind
        places = [place for place, layer in enumerate(module) if isinstance(layer, ChannelGate)]
        return f"{kind} gated at {','.join(map(str, places))}"

    def _time_modules(self) -> None:
        """Times each kind of module that the table does not have yet."""
        network, modules = self.network, self.modules
        ways = {}
        for edge in modules.edges:
            kind, site = self._edge_kind(edge), self.sites.get(edge)
            for bits in [torch.zeros(0)] if site is None else openings(site):
                key = "" if site is None else counts_key(bits, site)
                if key not in self.table.times.get(kind, {}):
                    ways[kind, key] = modules.alone(edge, bits)
        for node in modules.nodes:
            kind = modules.kind(network.activations[node], network.shapes[node])
            if kind not in self.table.times:
                ways[kind, ""] = modules.activation(node)
        for node, entering in enumerate(network.graph.incoming):
            kind = addition_kind(network, node)
            if len(entering) > 1 and kind not in self.table.times:
                ways[kind, ""] = modules.addition(node)
        if ways:
            watch = self.watch
            if modules is not watch.assembler:
                watch = Stopwatch(modules, "median")
                watch.start()
            (*found, nothing), slowness = watch.quickly([*ways.values(), modules.nothing()], ALONE_CALLS, first=True)
            for (kind, key), timing in zip(ways, found, strict=True):
                spent = max(timing.quantile(0.5) - nothing.quantile(0.5), 1e-6)
                self.table.times.setdefault(kind, {})[key] = spent / slowness / self.watch.slowness

    def _parts(self) -> dict[str, EdgeCost]:
        """The table's milliseconds of what is used, for each kind."""
        network, modules, times = self.network, self.modules, self.table.times
        edges, nodes = len(network.graph.edges), len(network.graph.nodes)
        found: dict[str, EdgeCost] = {}

        def part(kind: str) -> EdgeCost:
            none, still = torch.zeros(edges, dtype=torch.float64), torch.zeros(nodes, dtype=torch.float64)
            empty = EdgeCost(network.graph, none, still, still.clone(), "ms", dict[int, ChannelTime]())
            return found.setdefault(kind, empty)

        for edge in modules.edges:
            kind, site = self._edge_kind(edge), self.sites.get(edge)
            cost = part(kind)
            if site is None:
                cost.per_edge[edge] = times[kind][""]
            else:
                inside = channel_time(site, times[kind])
                cost.channels[edge] = inside  # type: ignore[index]
                cost.per_edge[edge] = float(inside(torch.ones(1, network.units))[0])
        for node in modules.nodes:
            kind = modules.kind(network.activations[node], network.shapes[node])
            part(kind).per_node[node] = times[kind][""]
        for node, entering in enumerate(network.graph.incoming):
            if len(entering) > 1:
                part(addition_kind(network, node)).per_addition[node] = times[addition_kind(network, node)][""]
        return found

    def _fit(self) -> None:
        """Weighs the kinds by the whole networks that were measured."""
        names, self.fitted_at = list(self.parts), self.watch.slowness
        try:
            parts = np.array([[whole.parts[name] for name in names] for whole in self.known])
        except KeyError as error:
            raise FileError(f"{self.cost.table} must have all parts of the networks it knows, lacks {error}") from error
        weights, self.error = fitted(parts, np.array([whole.seen for whole in self.known]))
        weights = weights * self.fitted_at
        self.base = float(weights[0])
        pairs = list(zip(self.parts.values(), weights[1:], strict=True))

        def total(name: str) -> Tensor:
            return torch.stack([getattr(part, name) * float(weight) for part, weight in pairs]).sum(dim=0)

        channels = {
            edge: inside.scaled(float(weight))
            for part, weight in pairs
            for edge, inside in part.channels.items()
            if isinstance(inside, ChannelTime)
        }
        self.times = EdgeCost(
            self.network.graph, total("per_edge"), total("per_addition"), total("per_node"), "ms", channels
        )


def addition_kind(network: SuperNetwork, node: int) -> str:
    """What the table calls the sum of two values of a node's shape."""
    return f"sum on {'x'.join(map(str, network.shapes[node]))}"


def widely(network: SuperNetwork, count: int, generator: torch.Generator) -> Tensor:
    """Architectures of all sizes that connect input and output, `(count, G)`, the full one first.

    Each keeps another share of its edges, and each site another share of its channels.
    """
    found = [network.architecture("full")]
    while len(found) < count:
        share = torch.full((network.units,), float(torch.rand((), generator=generator)) ** 0.5)
        for site in network.sites:
            share[slice(*site.units)] = torch.rand((), generator=generator)
        columns = torch.zeros(network.gate_count)
        gated = [(unit, column) for unit, column in enumerate(network.gate_of) if column is not None]
        columns[[column for _, column in gated]] = share[[unit for unit, _ in gated]]
        kept = torch.bernoulli(columns, generator=generator)[None]
        if bool(network.connects(network.used(kept))[0]):
            found.append(kept)
    return torch.cat(found)
