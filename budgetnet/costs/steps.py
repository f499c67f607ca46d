"""The distributed computation cost: cycles that n workers need for what is used."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor

from budgetnet.checks import at_least
from budgetnet.costs.model import CostModel
from budgetnet.errors import ConfigError
from budgetnet.graph import Graph, topological_order
from budgetnet.supernet import SuperNetwork

CHUNK = 4096  # architectures scheduled together: their tables fit in the processor's cache


@dataclass(frozen=True)
class Steps:
    """Cycles to run the used modules and sums on n workers, each taking one cycle.

    List scheduling: in each cycle the first n tasks of a fixed list start whose predecessors have
    all finished. The list is `topological_order` of the whole super network. Identities take no
    cycle and no worker; communication is free.

    Attributes:
        workers: n >= 1.

    Source: BSN, section 4.3 and appendix ("Distributed computation cost").
    """

    workers: int = 1
    key: ClassVar[str] = "steps"
    unit: ClassVar[str] = "step"

    def __post_init__(self) -> None:
        at_least(1, workers=self.workers)

    def bind(self, network: SuperNetwork) -> StepCost:
        """The cost of this network's architectures."""
        return StepCost(network.graph, network.edge_steps, network.node_steps, self.workers)


class StepCost(CostModel):
    """List scheduling of many architectures at once.

    A task is an edge's module or a node's sum. In a topological list every task's predecessors and
    rivals for a worker stand before it, so no later task can delay it: tasks are placed one after
    the other, each in the first cycle after its predecessors that has a free worker.

    Args:
        graph: E edges and N nodes.
        edge_steps, node_steps: 0 or 1 cycle for each.
        workers: tasks that run in one cycle.

    Raises:
        ConfigError: a task takes another number of cycles.
    """

    unit = "step"

    def __init__(self, graph: Graph, edge_steps: tuple[int, ...], node_steps: tuple[int, ...], workers: int) -> None:
        self.graph, self.edge_steps, self.node_steps, self.workers = graph, edge_steps, node_steps, workers
        for steps in (*edge_steps, *node_steps):
            if steps not in (0, 1):
                raise ConfigError(f"a module or a sum takes 0 or 1 steps, got {steps}")
        nodes = len(graph.nodes)
        successors = [[nodes + edge for edge in leaving] for leaving in graph.outgoing]
        successors += [[end] for _, end in graph.edges]
        self.tasks = topological_order(nodes + len(graph.edges), successors)

    def __call__(self, used: Tensor) -> Tensor:
        """Maps `(B, U)` used units to `(B,)` float64 cycles; 0 where nothing is used."""
        active = used[:, : len(self.edge_steps)].detach().to("cpu", torch.bool)
        return torch.cat([self._schedule(chunk) for chunk in torch.split(active, CHUNK)]).to(used.device)

    @property
    def along_path(self) -> list[float]:
        """Cycles each edge adds to a path of its own: its module's and those of the node it enters."""
        steps = zip(self.edge_steps, self.graph.edges, strict=True)
        return [float(own + self.node_steps[end]) for own, (_, end) in steps]

    def _schedule(self, active: Tensor) -> Tensor:
        nodes, count = len(self.graph.nodes), len(active)
        columns = active.t().contiguous()
        last = sum(self.edge_steps) + sum(self.node_steps)  # a cycle that no schedule reaches
        load = torch.zeros(last + 1, count, dtype=torch.int16)
        free = torch.arange(last + 2)[:, None].repeat(1, count)  # a hint for each cycle: none is free before
        finished: dict[int, Tensor] = {}
        latest = torch.zeros(count, dtype=torch.int64)
        for task in self.tasks:
            if task < nodes:
                entering = self.graph.incoming[task]
                before = [finished[nodes + edge] for edge in entering]
                ready = reduce(torch.maximum, before) if before else torch.zeros_like(latest)
                steps, works = self.node_steps[task], None
                if steps:  # the input has nothing that enters it
                    works = columns[list(entering or self.graph.outgoing[task])].any(dim=0)
            else:
                edge = task - nodes
                ready, steps, works = finished[self.graph.edges[edge][0]], self.edge_steps[edge], columns[edge]
            if steps:
                first = ready if works is None else torch.where(works, ready, last)
                cycle = first
                while True:
                    there = free.gather(0, cycle[None])[0]
                    if torch.equal(there, cycle):
                        break
                    cycle = there
                free.scatter_(0, first[None], cycle[None])
                load.scatter_add_(0, cycle[None], torch.ones(1, count, dtype=torch.int16))
                full = (load.gather(0, cycle[None]) >= self.workers) & (cycle < last)
                free.scatter_(0, cycle[None], cycle + full)
                ready = cycle + 1
            finished[task] = ready if works is None else ready * works
            latest = torch.maximum(latest, finished[task])
        return latest.to(torch.float64)
