"""The time that unlike workers need for what is used, when modules take their time and values have to be sent."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from math import inf, prod
from typing import ClassVar

import torch
from torch import Tensor

from budgetnet.checks import at_least
from budgetnet.costs.additive import EdgeCost, MACs
from budgetnet.costs.footprints import FLOAT
from budgetnet.costs.model import CostModel
from budgetnet.errors import ConfigError
from budgetnet.graph import topological_order
from budgetnet.supernet import SuperNetwork

CHUNK = 256  # architectures scheduled together: their tables fit in the processor's cache


@dataclass(frozen=True)
class Schedule:
    """How long n workers take for one example: the makespan of a list schedule.

    Tasks are the modules of used edges and the sums at nodes. One after the other, in a fixed order, each is put where
    it ends first: on any worker, between what is there already or behind it, when all that it reads has come; of equal
    ends the first worker's. A value is on the worker that made it, and on each other one when it has been sent
    there, as soon as it is made; sending occupies nobody, and values do not hinder each other. The input is on
    the first worker; the output may end on any. What takes no work (identities, pools, sums of one value) is done
    wherever its result is read.

    Attributes:
        workers: n >= 1.
        durations: "macs": a task takes its multiply-adds, of its open channels, over the worker's speed, in ms;
            "unit": steps as in `Steps`, over the worker's speed.
        speeds: of each worker, such as "1:4", in GMAC/s, or in steps per step; "" for 1 each.
        link: MB/s that a worker sends another, or MB per step; infinite where sending takes no time.
        order: "list": `topological_order` of the super network, as in `Steps`; "critical": by the longest way to the
            output in the full network, tasks at their mean duration and values sent, HEFT's upward rank.

    Raises:
        ConfigError: an option is outside its range.

    Source: BSN, section 4.3 and appendix, with unit durations, equal speeds and a free link (`Steps`); Topcuoglu et
    al., *Performance-effective and low-complexity task scheduling for heterogeneous computing*, 2002 (HEFT).
    """

    workers: int = 2
    durations: str = "macs"
    speeds: str = ""
    link: float = inf
    order: str = "list"
    key: ClassVar[str] = "schedule"

    def __post_init__(self) -> None:
        at_least(1, workers=self.workers)
        if self.durations not in ("macs", "unit"):
            raise ConfigError(f"durations must be macs or unit, got {self.durations!r}")
        if self.order not in ("list", "critical"):
            raise ConfigError(f"order must be list or critical, got {self.order!r}")
        if isinstance(self.link, bool) or not isinstance(self.link, int | float) or not self.link > 0:
            raise ConfigError(f"link must be > 0 MB/s, got {self.link!r}")
        _ = self.speed

    @property
    def unit(self) -> str:
        """What it counts."""
        return "ms" if self.durations == "macs" else "step"

    @property
    def speed(self) -> list[float]:
        """Speed of each worker.

        Raises:
            ConfigError: they are not as many numbers > 0 as there are workers.
        """
        try:
            speeds = [float(part) for part in self.speeds.split(":")] if self.speeds else [1.0] * self.workers
        except (ValueError, AttributeError):  # no text
            speeds = []
        if len(speeds) != self.workers or not all(0 < speed < inf for speed in speeds):
            raise ConfigError(f"speeds must be {self.workers} numbers > 0 with : between, got {self.speeds!r}")
        return speeds

    def bind(self, network: SuperNetwork) -> ScheduleCost:
        """The cost of this network's architectures."""
        return ScheduleCost(network, self)


@dataclass(frozen=True)
class Placement:
    """Where a task runs in B architectures: `(B,)` bool, workers and times, of which those count where it runs."""

    runs: Tensor
    worker: Tensor
    start: Tensor
    end: Tensor


class ScheduleCost(CostModel):
    """List scheduling of many architectures at once.

    Args:
        network: the space.
        cost: workers, durations and the link.
    """

    def __init__(self, network: SuperNetwork, cost: Schedule) -> None:
        self.network, self.graph, self.cost, self.unit = network, network.graph, cost, cost.unit
        self.macs: EdgeCost | None = MACs(gates=False).bind(network) if cost.durations == "macs" else None
        self.speeds = torch.tensor(cost.speed, dtype=torch.float64)
        graph, count = self.graph, len(self.graph.nodes)
        successors = [[count + edge for edge in leaving] for leaving in graph.outgoing]
        successors += [[end] for _, end in graph.edges]
        # a GMAC/s is 1e6 MAC/ms, a MB/s is 1e3 B/ms
        self.scale, per_time = (1e6, 1e3) if cost.durations == "macs" else (1.0, 1e6)
        sizes = [FLOAT * prod(shape) for shape in network.shapes]
        sent = [size / (cost.link * per_time) if cost.workers > 1 else 0.0 for size in sizes]
        self.sent = [*sent, *(sent[end] for _, end in graph.edges)]
        self.tasks = topological_order(len(successors), successors)
        if cost.order == "critical":
            self.tasks = self._by_rank()

    @property
    def monotone(self) -> bool:
        """Whether the smallest network is known: on a path of its own all is done by the fastest worker."""
        return self.cost.link == inf or len(set(self.cost.speed)) == 1

    @property
    def along_path(self) -> list[float]:
        """Least time that each edge and the node it enters take on a path of their own."""
        if self.macs is not None:
            work = self.macs.along_path
        else:
            steps = zip(self.network.edge_steps, self.graph.edges, strict=True)
            work = [float(own + self.network.node_steps[end]) for own, (_, end) in steps]
        return [each / (max(self.cost.speed) * self.scale) for each in work]

    def __call__(self, used: Tensor) -> Tensor:
        """Maps `(B, U)` used units to `(B,)` float64 times; 0 where nothing is used."""
        bits = used.detach().to("cpu", torch.float64)
        return torch.cat([self.place(chunk)[0] for chunk in torch.split(bits, CHUNK)]).to(used.device)

    def place(self, used: Tensor) -> tuple[Tensor, dict[int, Placement]]:
        """The makespans of `(B, U)` float64 used units, `(B,)`, and where each task that takes work runs."""
        count, workers = len(used), len(self.speeds)
        on = used[:, : len(self.graph.edges)].t() > 0
        idle = Idle.at_first(count, workers)
        there = torch.arange(workers)
        arrived: dict[int, Tensor] = {}  # when each task's result is on each worker, (B, W)
        placements: dict[int, Placement] = {}
        for task in self.tasks:
            ready = self._ready(task, on, arrived, count)
            work = self._work(task, used, on)
            runs = work > 0
            if not bool(runs.any()):
                arrived[task] = ready
                continue
            idle, placement = idle.taken(runs, ready, work[:, None] / (self.speeds * self.scale))
            sent = (placement.worker[:, None] != there).to(torch.float64) * self.sent[task]
            sent = sent if (share := self._share(task, used)) is None else sent * share[:, None]
            arrived[task] = torch.where(runs[:, None], placement.end[:, None] + sent, ready)
            placements[task] = placement
        return arrived[self.graph.sink].amin(dim=1), placements

    def before(self, task: int) -> list[int]:
        """The tasks whose results a task reads, were everything used."""
        nodes = len(self.graph.nodes)
        if task < nodes:
            return [nodes + edge for edge in self.graph.incoming[task]]
        return [self.graph.edges[task - nodes][0]]

    def _ready(self, task: int, on: Tensor, arrived: dict[int, Tensor], count: int) -> Tensor:
        """When all that a task reads is on each worker, `(B, W)`."""
        nodes = len(self.graph.nodes)
        if task == self.graph.source:
            sent = torch.full((count, len(self.speeds)), self.sent[task], dtype=torch.float64)
            sent[:, 0] = 0
            return sent
        if task < nodes:
            before = [torch.where(on[other - nodes][:, None], arrived[other], 0.0) for other in self.before(task)]
            return reduce(torch.maximum, before)
        return arrived[self.before(task)[0]]

    def _work(self, task: int, used: Tensor, on: Tensor) -> Tensor:
        """Multiply-adds or steps of a task, `(B,)`."""
        nodes, macs = len(self.graph.nodes), self.macs
        if task >= nodes:
            edge = task - nodes
            if macs is None:
                return on[edge].to(torch.float64) * self.network.edge_steps[edge]
            inside = macs.channels.get(edge)
            return on[edge].to(torch.float64) * (macs.per_edge[edge] if inside is None else inside(used))
        inputs = on[list(self.graph.incoming[task] or self.graph.outgoing[task])].to(torch.float64).sum(dim=0)
        entered = (inputs > 0).to(torch.float64)
        if macs is None:
            return entered * self.network.node_steps[task]
        if task == self.graph.source:
            return torch.zeros_like(inputs)
        work = (inputs - 1).clamp(min=0) * macs.per_addition[task] + entered * macs.per_node[task]
        return work if (share := self._share(task, used)) is None else work * share

    def _share(self, task: int, used: Tensor) -> Tensor | None:
        """`(B,)` share of the channels that a task's result has where it is part of a stream, None for all."""
        nodes = len(self.graph.nodes)
        stream = self.network.stream_of(task if task < nodes else self.graph.edges[task - nodes][1])
        return None if stream is None else stream.share(used)

    def _by_rank(self) -> tuple[int, ...]:
        """The tasks by the longest way from them to the output in the full network; equal ones in their order."""
        used = self.network.used(self.network.architecture("full")).to(torch.float64)
        on = used[:, : len(self.graph.edges)].t() > 0
        rank, behind = dict[int, float](), dict.fromkeys(self.tasks, 0.0)
        for task in reversed(self.tasks):
            rank[task] = behind[task] + float((self._work(task, used, on) / (self.speeds * self.scale)).mean())
            for other in self.before(task):
                sends = other == self.graph.source or float(self._work(other, used, on)) > 0
                behind[other] = max(behind[other], rank[task] + (self.sent[other] if sends else 0.0))
        return tuple(sorted(self.tasks, key=lambda task: -rank[task]))


@dataclass(frozen=True)
class Idle:
    """When workers have nothing to do, in B architectures: K stretches of time in no order, some of them empty.

    Attributes:
        worker: `(B, K)` whose stretch it is.
        start, end: `(B, K)` times, infinite at the end of each worker's last one.
    """

    worker: Tensor
    start: Tensor
    end: Tensor

    @classmethod
    def at_first(cls, count: int, workers: int) -> Idle:
        """Nobody has anything to do."""
        start = torch.zeros(count, workers, dtype=torch.float64)
        return cls(torch.arange(workers).expand(count, -1), start, torch.full_like(start, inf))

    def taken(self, runs: Tensor, ready: Tensor, duration: Tensor) -> tuple[Idle, Placement]:
        """Puts a task where it ends first, of equal ends on the first worker.

        Args:
            runs: `(B,)` whether there is such a task.
            ready: `(B, W)` when it may start on each worker.
            duration: `(B, W)` that it takes there.
        """
        starts = torch.maximum(self.start, ready.gather(1, self.worker))
        ends = starts + duration.gather(1, self.worker)
        ends = torch.where(ends <= self.end, ends, inf)
        first = ends == ends.amin(dim=1, keepdim=True)
        chosen = torch.where(first, self.worker, ready.shape[1]).argmin(dim=1, keepdim=True)
        worker, start, end = (table.gather(1, chosen) for table in (self.worker, starts, ends))
        left = torch.where(runs[:, None], end, inf)  # what is left behind the task, empty where there is none
        behind = torch.where(runs[:, None], self.end.gather(1, chosen), inf)
        cut = torch.where(runs[:, None], start, self.end.gather(1, chosen))
        idle = Idle(
            torch.cat([self.worker, worker], dim=1),
            torch.cat([self.start, left], dim=1),
            torch.cat([self.end.scatter(1, chosen, cut), behind], dim=1),
        )
        return idle, Placement(runs, worker[:, 0], start[:, 0], end[:, 0])
