"""The schedule of one architecture, for drawing: who does what when, and what is sent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from budgetnet.costs.schedule import Schedule, ScheduleCost
from budgetnet.costs.steps import StepCost
from budgetnet.supernet import SuperNetwork


@dataclass(frozen=True)
class Task:
    """A task of a schedule.

    Attributes:
        name: of the edge whose module it is, or of the node whose sum it is.
        worker: 0 for the first.
        start, end: in the schedule's unit.
    """

    name: str
    worker: int
    start: float
    end: float


@dataclass(frozen=True)
class Sending:
    """A value that one worker sends another.

    Attributes:
        name: of what made it, or of the input.
        source, target: workers.
        start, end: in the schedule's unit.
    """

    name: str
    source: int
    target: int
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The schedule of one architecture.

    Attributes:
        unit: of its times.
        workers: how many there are.
        tasks: by their starts, those of one time by worker.
        sent: what one worker needs of another, each value once, by its start; none where sending takes no time.
    """

    unit: str
    workers: int
    tasks: list[Task]
    sent: list[Sending]


def timeline_of(model: object, network: SuperNetwork, used: Tensor) -> Timeline | None:
    """What a cost says of the order in which an architecture runs, None where it is neither steps nor a schedule.

    Args:
        model: the cost of the network's architectures.
        network: the space.
        used: `(1, U)`.
    """
    if isinstance(model, StepCost):
        model = Schedule(model.workers, durations="unit").bind(network)
    return timeline(model, used) if isinstance(model, ScheduleCost) else None


def timeline(model: ScheduleCost, used: Tensor) -> Timeline:
    """The schedule of an architecture, `(1, U)` used units."""
    _, placements = model.place(used.detach().to("cpu", torch.float64))
    graph, nodes = model.graph, len(model.graph.nodes)
    names = [*graph.nodes, *model.network.edge_names]
    on = (used[0] > 0).tolist()
    tasks = {graph.source: Task(graph.nodes[graph.source], 0, 0.0, 0.0)}
    made: dict[int, set[int]] = {}  # of each task the tasks that take work and made what its result is made of
    sent: dict[tuple[int, int], Sending] = {}
    for task in model.tasks:
        read = [other for other in model.before(task) if other < nodes or on[other - nodes]]
        origins = {origin for other in read for origin in made[other]}
        placed = placements.get(task)
        if placed is None or not bool(placed.runs):
            made[task] = origins if task != graph.source else {task}
            continue
        here = Task(names[task], int(placed.worker), float(placed.start), float(placed.end))
        for origin in origins:
            before = tasks[origin]
            if before.worker != here.worker and (took := model.sent[origin]) > 0:
                way = (origin, here.worker)
                sent[way] = Sending(before.name, before.worker, here.worker, before.end, before.end + took)
        tasks[task], made[task] = here, {task}
    if graph.source not in placements:
        del tasks[graph.source]
    return Timeline(
        model.unit,
        model.cost.workers,
        sorted(tasks.values(), key=lambda each: (each.start, each.worker)),
        sorted(sent.values(), key=lambda each: (each.start, each.source, each.target)),
    )
