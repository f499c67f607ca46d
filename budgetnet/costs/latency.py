"""Milliseconds of the extracted network: predicted from a table of its modules' times, measured where it counts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import ClassVar, get_args

import numpy as np
import torch
from torch import Tensor

from budgetnet.assembly import Assembler, Runtime
from budgetnet.costs.additive import decided_once
from budgetnet.costs.latency_fit import LatencyFit
from budgetnet.costs.measured import LearningModel, Measured
from budgetnet.costs.model import CostModel
from budgetnet.costs.stopwatch import Rest, Stopwatch
from budgetnet.costs.timetable import Setting, Timetable, Whole
from budgetnet.errors import ConfigError, FileError
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
        elsewhere: the table is of another machine, whose milliseconds are predicted from it: nothing is timed here.

    Raises:
        ConfigError: an option is outside its range.
    """

    runtime: str = "onnxruntime"
    threads: int = 1
    batch: int = 1
    quantile: str = field(default="median", metadata={"dotted": True})
    device: str = "cpu"
    table: str = field(default="", metadata={"file": True})
    elsewhere: bool = False
    key: ClassVar[str] = "latency"
    unit: ClassVar[str] = "ms"

    def __post_init__(self) -> None:
        if self.runtime not in get_args(Runtime):
            raise ConfigError(f"runtime must be {', '.join(get_args(Runtime))}, got {self.runtime!r}")
        if self.device not in ("cpu", "cuda") or (self.device == "cuda" and self.runtime == "onnxruntime"):
            raise ConfigError(f"latency is measured on cpu, or of torch on cuda, got {self.runtime} on {self.device!r}")
        if self.device == "cuda" and not self.elsewhere and not torch.cuda.is_available():
            raise ConfigError("latency on cuda needs a CUDA device, found none")
        for name in ("threads", "batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be a whole number >= 1, got {value!r}")
        if not isinstance(self.table, str):
            raise ConfigError(f"table must be the path of a file as a text, got {self.table!r}")
        if not isinstance(self.elsewhere, bool):
            raise ConfigError(f"elsewhere must be true or false, got {self.elsewhere!r}")
        quantile_share(self.quantile)

    def kept_in(self, folder: Path) -> Latency:
        """The same with its table in a folder, where no other file was asked for.

        Raises:
            ConfigError: the file that was asked for has no folder to be in.
        """
        if self.elsewhere:  # which is read only
            return self
        if not self.table:
            where = "" if self.device == "cpu" else f"-{self.device}"
            return replace(self, table=str(folder / f"latency-{self.runtime}-{self.threads}-{self.batch}{where}.json"))
        if not Path(self.table).parent.is_dir() or Path(self.table).is_dir():
            raise ConfigError(f"a table of times is a file in a folder that is there, got {self.table!r}")
        return self

    @property
    def making(self) -> str:
        """The command that makes its table."""
        own = [each for each in fields(self) if each.name not in ("quantile", "elsewhere")]
        told = ",".join(f"{each.name}={value}" for each in own if (value := getattr(self, each.name)) != each.default)
        part = "" if self.quantile == "median" else f".{self.quantile}"
        return f"budgetnet measure SPACE --costs 'latency{part}[{told}]'"

    def assembler(self, network: SuperNetwork) -> Assembler:
        """What builds this network's architectures to be timed."""
        runtime: Runtime = self.runtime  # type: ignore[assignment]
        return Assembler(network, runtime=runtime, threads=self.threads, batch=self.batch, device=self.device)

    def measured(self, network: SuperNetwork, kept: Tensor) -> Measured:
        """What the extracted network of an architecture, `(1, G)`, takes, as a result says it.

        Nothing is predicted, but a table that was asked for is made, or added to. Of another machine all is predicted.

        Raises:
            ConfigError: it does not connect input and output.
        """
        if self.elsewhere:
            value = float(self.predicted(network)(network.used(kept))[0])
            return Measured(value, value, value)
        if self.table:
            model = self.kept_in(Path())._timed(network)
            model.save()
            return model.report(kept)
        return Stopwatch(self.assembler(network), self.quantile).report(kept)

    def compared(self, network: SuperNetwork, kept: Tensor, then: Rest) -> Measured:
        """As `measured`, but on the machine as it was then."""
        return Stopwatch(self.assembler(network), self.quantile).compared(kept, then)

    def bind(self, network: SuperNetwork) -> LatencyModel | LatencyByInput | LatencyElsewhere:
        """The latency of this network's architectures; times its modules, and some whole networks, on this machine.

        Of another machine what its table predicts. Where gates look at the input it is the mean over images.

        Raises:
            ConfigError: gates look at the input, and it is not the median of one image in a file of onnxruntime.
            FileError: the table is no such file, holds for another machine or setting, or lacks what predictions need.
        """
        if self.elsewhere:
            return self.predicted(network)
        if not network.heads:
            return self._timed(network)
        if self.runtime != "onnxruntime" or self.batch != 1 or self.quantile != "median":
            raise ConfigError(
                "where gates look at the input, latency is the median of one image in onnxruntime, "
                f"got runtime {self.runtime}, batch {self.batch} and {self.quantile}"
            )
        return LatencyByInput(LatencyModel(network, self))

    def predicted(self, network: SuperNetwork) -> LatencyElsewhere:
        """As `bind`, of another machine."""
        decided_once("latency", network)
        return LatencyElsewhere(network, self)

    def _timed(self, network: SuperNetwork) -> LatencyModel:
        """As `bind`, of this machine."""
        decided_once("latency", network)
        return LatencyModel(network, self)


class LatencyModel(LatencyFit, LearningModel):
    """Latency of a network's architectures, measured on this machine where it counts, else predicted.

    What the table lacks is timed. The weights are fitted to whole networks that are measured before the search and
    during it.

    Args:
        network: the space.
        cost: how latency is measured.

    Attributes:
        watch: measures whole networks.
        full: milliseconds of the full network on the machine as it is when the model is made: what percents are of.
    """

    def __init__(self, network: SuperNetwork, cost: Latency) -> None:
        self.cost, self.each_epoch = cost, EACH_EPOCH.get(cost.runtime, 4)
        self.watch = Stopwatch(cost.assembler(network), cost.quantile)
        # modules by themselves are not compiled: that takes seconds each
        eager = cost.runtime == "compiled"
        modules = replace(cost, runtime="torch").assembler(network) if eager else self.watch.assembler
        table, whole = self._read()
        super().__init__(network, cost.quantile, modules, table, cost.table)
        self.full = whole.value
        self._time_modules()
        self.parts = self._parts()
        known = len(self.known)
        missing = NETWORKS.get(cost.runtime, 48) - known
        if missing > 0:
            self.refit(widely(network, missing, torch.Generator().manual_seed(0)), first=True)
        if not known:
            place = self.table.networks.index(self.known[0])
            self.table.networks[place] = replace(self.known[0], seen=whole.value / self.watch.slowness)
            self.save()
        self.fit(self.watch.slowness)

    @property
    def notes(self) -> dict[str, str]:
        """What was noticed about the machine, by kind."""
        return self.watch.notes

    def measure(self, kept: Tensor) -> list[Measured]:
        """What the extracted networks of `(n, G)` architectures take, in turns on this machine."""
        return self.watch.measure(kept)

    def report(self, kept: Tensor) -> Measured:
        """What the extracted network of an architecture, `(1, G)`, takes on the machine at rest, in a new process.

        In this one where its runtime is torch.
        """
        return self.watch.anew(kept)

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
        self.fit(self.watch.slowness)
        if judge:
            self.error = float(np.median([abs(a / b - 1) for a, b in zip(before, seen, strict=True)]))
        self.save()

    def baseline(self) -> dict[str, float]:
        """What milliseconds are of, all numbers > 0, for a run to go on with."""
        return self.watch.baseline()

    def go_by(self, baseline: Mapping[str, float]) -> None:
        """From now on all milliseconds are of the machine as it was at a `baseline`, predicted ones too."""
        self.watch.go_by(baseline)
        self.fit(self.watch.slowness)

    def save(self) -> None:
        """Writes the table to its file, once there is a folder for it, beside what others have written there."""
        path = Path(self.cost.table)
        if self.cost.table and path.parent.is_dir():
            if path.is_file():
                self.table.take_up(Timetable.load(path, self.table.setting), but=self.space)
            self.table.save(path)

    def _read(self) -> tuple[Timetable, Measured]:
        """Takes up the table's file where there is one, and looks how fast the machine is now.

        Returns:
            The table, and what the full network takes.
        """
        setting = Setting.here(self.cost.runtime, self.cost.threads, self.cost.batch, self.cost.device)
        path = Path(self.cost.table)
        table = Timetable.load(path, setting) if self.cost.table and path.is_file() else None
        full, yard = self.watch.start()
        table = table or Timetable(setting, yard)
        self.watch.slowness = yard / table.yardstick
        self.watch.note(self.watch.slowness)
        return table, full

    def _time_modules(self) -> None:
        """Times each kind of module that the table does not have yet."""
        ways = {named: build() for named, build in self.missing().items()}
        if ways:
            watch = self.watch
            if self.modules is not watch.assembler:
                watch = Stopwatch(self.modules, "median")
                watch.start()
            alone = [*ways.values(), self.modules.nothing()]
            (*found, nothing), slowness = watch.quickly(alone, ALONE_CALLS, first=True)
            for (kind, key), timing in zip(ways, found, strict=True):
                spent = max(timing.quantile(0.5) - nothing.quantile(0.5), 1e-6)
                self.table.times.setdefault(kind, {})[key] = spent / slowness / self.watch.slowness


class LatencyByInput(CostModel):
    """Latency where gates look at the input: of one image, in a file that does not run what the image closes.

    Predicted as `a + b T(H)`, `T` what the extracted network of what the image opens would take: deciding takes its
    time, too, and masked channels save none. What is handed over is timed on real images.

    Args:
        plain: predicts `T`.

    Attributes:
        deciding: `a`, in milliseconds; >= 0.
        saving: `b`, the share of the extracted network's saving that is one in the file; >= 0.
        full: milliseconds of the full network without gates: what percents are of.
    """

    unit = "ms"

    def __init__(self, plain: LatencyModel) -> None:
        self.plain, self.full = plain, plain.full
        self.deciding, self.saving = 0.0, 1.0

    def __call__(self, used: Tensor) -> Tensor:
        """Maps `(B, U)` used units to `(B,)` float64 milliseconds, with a gradient where `used` has one."""
        return self.deciding + self.saving * self.plain(used)

    @property
    def along_path(self) -> list[float]:
        """What each edge and the node it enters add at least on a path of their own; all deciding at the input."""
        graph = self.plain.network.graph
        own = zip(self.plain.along_path, graph.edges, strict=True)
        return [self.saving * cost + self.deciding * (start == graph.source) for cost, (start, _) in own]

    def save(self) -> None:
        """As `LatencyModel.save`."""
        self.plain.save()

    def learn(self, extracted: tuple[float, float], seen: tuple[float, float]) -> None:
        """Goes by two networks of gates that were timed, one all open, one all closed.

        Args:
            extracted: what `T` predicts for each, in milliseconds.
            seen: what each took, in milliseconds.
        """
        (a, b), (c, d) = extracted, seen
        self.saving = max(0.0, (d - c) / (b - a)) if a != b else 0.0
        self.deciding = (c + d - self.saving * (a + b)) / 2
        if self.deciding < 0:  # then it is the extracted network that is predicted too large
            self.saving, self.deciding = (a * c + b * d) / (a**2 + b**2), 0.0

    def correct(self, times: float) -> None:
        """From now on all takes so many times as long as it did."""
        self.deciding, self.saving = self.deciding * times, self.saving * times

    def baseline(self) -> dict[str, float]:
        """What milliseconds are of, and how they are predicted, for a run to go on with."""
        return {**self.plain.baseline(), "deciding": self.deciding, "saving": self.saving}

    def go_by(self, baseline: Mapping[str, float]) -> None:
        """As `LatencyModel.go_by`; predictions are as they were then."""
        self.plain.go_by(baseline)
        self.deciding, self.saving = baseline["deciding"], baseline["saving"]


class LatencyElsewhere(LatencyFit):
    """Latency of a network's architectures on another machine, as its table predicts it: nothing is timed here.

    A cost that is counted, then: what is predicted is what there is, and limits hold for it.

    Args:
        network: the space.
        cost: with the table.

    Attributes:
        full: milliseconds of the full network on that machine as its table was made: what percents are of.

    Raises:
        ConfigError: there is no table.
        FileError: the table is no such file, is of another runtime, of other threads or another batch, or lacks whole
            networks of the space or times of its modules.
    """

    def __init__(self, network: SuperNetwork, cost: Latency) -> None:
        if not cost.table:
            raise ConfigError("elsewhere=true needs the table of another machine: latency[table=FILE,elsewhere=true]")
        setting = Setting.anywhere(cost.runtime, cost.threads, cost.batch)
        table = Timetable.load(Path(cost.table), setting, elsewhere=True)
        modules = Assembler(network, runtime="torch", threads=1, batch=1, device="cpu")  # to name them: none is built
        super().__init__(network, cost.quantile, modules, table, cost.table)
        needed, where = NETWORKS.get(cost.runtime, 48), f"`{cost.making}` makes them on {table.setting.processor}"
        if len(self.known) < needed:
            raise FileError(
                f"{cost.table} must hold {needed} whole networks of this {network.name} to predict from, "
                f"{cost.quantile} of the calls, has {len(self.known)}: {where}"
            )
        if missing := self.missing():
            kind, key = next(iter(missing))
            told = f"{kind}, {key} channels" if key else kind
            raise FileError(f"{cost.table} lacks times of modules of {network.name}, such as {told}: {where}")
        self.parts = self._parts()
        self.fit()
        self.full = self.known[0].seen

    @property
    def machine(self) -> dict[str, str | int | float]:
        """What is predicted, as in result.json: processor, runtime and setting, with "full" and "error"."""
        return {**asdict(self.table.setting), "full": self.full, "error": self.error}

    @property
    def digest(self) -> str:
        """What predictions come from, for a run to know it again."""
        own = {kind: self.table.times[kind] for kind in self.parts}
        content = json.dumps([own, [[whole.parts, whole.seen] for whole in self.known]], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


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
