"""Schedules are those of a slow simulation, can be carried out, and are never shorter than the best there is."""

from __future__ import annotations

import json
from html import escape
from itertools import pairwise, permutations, product
from math import inf
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import connected, every, graphs, random_graph
from torch import Tensor, nn

from budgetnet import Budget, Edge, Node, SuperNetwork
from budgetnet.architectures import describe
from budgetnet.budgets import BoundBudget, check_reachable, cost_name, parse_cost
from budgetnet.costs import MACs, Params, Schedule, Steps
from budgetnet.costs.timeline import Timeline, timeline, timeline_of
from budgetnet.errors import ConfigError, FileError, UnreachableBudget
from budgetnet.graph import Graph
from budgetnet.report.architecture import Architecture
from budgetnet.report.plans import read_plans
from budgetnet.report.records import Record
from budgetnet.report.schedule import gantt
from budgetnet.spaces import conv_fabric, resnet, resnet_fabric

FABRICS = {
    "conv": conv_fabric(width=3, depth=3, channels=4, classes=5, image_size=8),
    "resnet": resnet_fabric(width=2, channels=4, classes=5, image_size=8),
    "gated": resnet(depth=8, channels=4, image_size=8, gates="both"),
}
SEEDS = st.integers(0, 2**16)
SPEEDS = {1: ("", "3"), 2: ("", "1:4", "3:2"), 3: ("", "1:2:4", "2:2:3")}


def timed(graph: Graph, seed: int, *, longest: int = 4, size: int = 1000) -> SuperNetwork:
    """Modules and sums that take 0 to `longest` steps, on a graph; a value has `size` numbers."""
    random = Random(seed)
    edges = [
        Edge(
            start=graph.nodes[a],
            end=graph.nodes[b],
            module=nn.Identity(),
            name=f"e{i}",
            steps=random.randint(0, longest),
        )
        for i, (a, b) in enumerate(graph.edges)
    ]
    nodes = [
        Node(name=name, steps=random.randint(0, longest) * (place != graph.source))
        for place, name in enumerate(graph.nodes)
    ]
    ends = {"source": graph.nodes[graph.source], "sink": graph.nodes[graph.sink]}
    return SuperNetwork(edges, input_shape=(size,), nodes=nodes, **ends)


def costs(seed: int, workers: int) -> Schedule:
    """Any options; with links whose times are whole numbers of quarter steps, so that sums are exact."""
    random = Random(seed)
    link = random.choice((inf, 0.004, 0.016, 0.001))  # a value of 4,000 bytes takes 1, 1/4 or 4 steps
    order = random.choice(("list", "critical"))
    return Schedule(workers, "unit", random.choice(SPEEDS[workers]), link, order)


# --- the simulation ----------------------------------------------------------------------------------------------


def in_order(network: SuperNetwork) -> list[tuple[str, int]]:
    """The list: reversed post-order of a depth-first search that takes the last successor first."""
    graph, finished = network.graph, list[tuple[str, int]]()

    def visit(task: tuple[str, int]) -> None:
        kind, place = task
        ahead = (
            [("edge", edge) for edge in graph.outgoing[place]] if kind == "node" else [("node", graph.edges[place][1])]
        )
        for successor in reversed(ahead):
            if successor not in finished:
                visit(successor)
        finished.append(task)

    for root in [*(("node", node) for node in range(len(graph.nodes)))]:
        if root not in finished:
            visit(root)
    return finished[::-1]


def simulated(network: SuperNetwork, used: list[bool], cost: Schedule) -> float:
    """The makespan, task after task on calendars of who is busy when; see `Schedule`."""
    graph = network.graph
    steps = {("edge", e): network.edge_steps[e] for e in range(len(graph.edges))}
    steps |= {("node", n): network.node_steps[n] for n in range(len(graph.nodes))}
    speeds = [float(part) for part in cost.speeds.split(":")] if cost.speeds else [1.0] * cost.workers
    sending = 4 * network.input_shape[0] / (cost.link * 1e6) if cost.workers > 1 else 0.0
    alive = {end for edge, pair in enumerate(graph.edges) if used[edge] for end in pair}

    def reads(task: tuple[str, int], everything: bool = False) -> list[tuple[str, int]]:
        kind, place = task
        if kind == "edge":
            return [("node", graph.edges[place][0])]
        return [("edge", edge) for edge in graph.incoming[place] if everything or used[edge]]

    order = in_order(network)
    if cost.order == "critical":
        rank: dict[tuple[str, int], float] = {}
        for task in reversed(order):
            readers = [other for other in order if task in reads(other, everything=True)]
            away = sending if steps[task] or task == ("node", graph.source) else 0.0
            mean = sum(steps[task] / speed for speed in speeds) / len(speeds)
            rank[task] = mean + max((away + rank[other] for other in readers), default=0.0)
        order = sorted(order, key=lambda task: (-rank[task], order.index(task)))
    calendar: list[list[tuple[float, float]]] = [[] for _ in speeds]
    there = {("node", graph.source): [0.0] + [sending] * (len(speeds) - 1)}
    for task in order:
        kind, place = task
        if task in there or not (used[place] if kind == "edge" else place in alive):
            continue
        ready = [max(there[other][worker] for other in reads(task)) for worker in range(len(speeds))]
        if not steps[task]:
            there[task] = ready
            continue
        choices = []
        for worker, speed in enumerate(speeds):
            takes = steps[task] / speed
            for start in sorted({ready[worker], *(end for _, end in calendar[worker] if end > ready[worker])}):
                if all(start + takes <= busy or start >= until for busy, until in calendar[worker]):
                    choices.append((start + takes, worker, start))
                    break
        end, worker, start = min(choices)
        calendar[worker].append((start, end))
        there[task] = [end + sending * (other != worker) for other in range(len(speeds))]
    return min(there.get(("node", graph.sink), [0.0]))


@settings(max_examples=60, deadline=None)
@given(graphs(nodes=6, extra=5), SEEDS, st.integers(1, 3))
def test_schedules_are_those_of_a_simulation(graph: Graph, seed: int, workers: int):
    network, cost = timed(graph, seed), costs(seed, workers)
    used = network.used(every(len(graph.edges))[-24:])
    expected = [simulated(network, row, cost) for row in used.bool().tolist()]
    assert cost.bind(network)(used).tolist() == expected


@settings(max_examples=40, deadline=None)
@given(graphs(nodes=6, extra=5), SEEDS, st.integers(1, 4))
def test_unit_durations_on_equal_workers_are_steps(graph: Graph, seed: int, workers: int):
    network = timed(graph, seed, longest=1)
    used = network.used(every(len(graph.edges))[-24:])
    assert torch.equal(Schedule(workers, "unit").bind(network)(used), Steps(workers).bind(network)(used))


@settings(max_examples=8, deadline=None)
@pytest.mark.parametrize("network", FABRICS.values(), ids=FABRICS)
@given(SEEDS, st.integers(1, 5))
def test_unit_durations_in_the_spaces_are_steps(network: SuperNetwork, seed: int, workers: int):
    used = network.used(connected(network, 6, seed, 0.8))
    assert torch.equal(Schedule(workers, "unit").bind(network)(used), Steps(workers).bind(network)(used))


@settings(max_examples=8, deadline=None)
@pytest.mark.parametrize("network", FABRICS.values(), ids=FABRICS)
@given(SEEDS, st.sampled_from(["list", "critical"]))
def test_one_worker_takes_the_sum_of_all_durations(network: SuperNetwork, seed: int, order: str):
    """At 2 GMAC/s, whatever the link."""
    used = network.used(connected(network, 6, seed, 0.8))
    expected = MACs().bind(network)(used) / 2e6
    torch.testing.assert_close(Schedule(1, "macs", "2", 1.0, order).bind(network)(used), expected)


# --- what can be carried out -------------------------------------------------------------------------------------


def carried_out(network: SuperNetwork, used: list[bool], cost: Schedule, plan: Timeline) -> None:
    """Runs a plan event by event: a worker does one thing at a time, and starts with what it has."""
    graph, speeds = network.graph, cost.speed
    takes = dict(zip(graph.nodes, network.node_steps, strict=True))
    takes |= dict(zip(network.edge_names, network.edge_steps, strict=True))
    for worker in range(cost.workers):
        own = [task for task in plan.tasks if task.worker == worker]
        assert all(before.end <= after.start for before, after in pairwise(own))
    for task in plan.tasks:
        assert task.end - task.start == pytest.approx(takes[task.name] / speeds[task.worker])
    has: dict[tuple[str, int], float] = {(graph.nodes[graph.source], 0): 0.0}
    has |= {(task.name, task.worker): task.end for task in plan.tasks}
    for sent in plan.sent:
        assert sent.start == has[sent.name, sent.source]
        assert sent.end - sent.start == pytest.approx(4 * network.input_shape[0] / (cost.link * 1e6))
        assert (sent.name, sent.target) not in has
        has[sent.name, sent.target] = sent.end
    if cost.link == inf:
        has |= {(name, worker): end for (name, _), end in tuple(has.items()) for worker in range(cost.workers)}

    def needed(name: str) -> set[str]:
        """What takes time and is read by a task, also through what takes none."""
        if name in graph.nodes:
            before = [network.edge_names[edge] for edge in graph.incoming[graph.nodes.index(name)] if used[edge]]
        else:
            before = [graph.nodes[graph.edges[network.edge_names.index(name)][0]]]
        done = {name for name in before if takes[name] or name == graph.nodes[graph.source]}
        return done.union(*(needed(name) for name in before if name not in done))

    for task in plan.tasks:
        assert all(has[name, task.worker] <= task.start for name in needed(task.name))
    done = {task.name for task in plan.tasks}
    live = {name for edge, name in enumerate(network.edge_names) if used[edge] and takes[name]}
    ends = {graph.nodes[end] for edge, (_, end) in enumerate(graph.edges) if used[edge]}
    assert done == live | {name for name in ends if takes[name]}


@settings(max_examples=40, deadline=None)
@given(graphs(nodes=6, extra=4), SEEDS, st.integers(1, 3))
def test_a_timeline_can_be_carried_out_and_ends_with_its_cost(graph: Graph, seed: int, workers: int):
    network, cost = timed(graph, seed), costs(seed, workers)
    model = cost.bind(network)
    used = network.used(torch.ones(1, len(graph.edges)))
    plan = timeline(model, used)
    carried_out(network, used[0].bool().tolist(), cost, plan)
    assert (plan.unit, plan.workers) == ("step", workers)
    last = max((task.end for task in plan.tasks), default=0.0)
    assert last <= float(model(used)) <= last + max(model.sent)  # where the output's parts meet it is read by nobody


def best(network: SuperNetwork, cost: Schedule) -> float:
    """The shortest of all schedules of the full network: any order, any worker for each task."""
    graph, speeds = network.graph, cost.speed
    sending = 4 * network.input_shape[0] / (cost.link * 1e6)
    tasks = in_order(network)
    steps = {task: (network.edge_steps if task[0] == "edge" else network.node_steps)[task[1]] for task in tasks}
    heavy = [task for task in tasks if steps[task]]
    reads = {task: [("node", graph.edges[task[1]][0])] for task in tasks if task[0] == "edge"}
    reads |= {task: [("edge", edge) for edge in graph.incoming[task[1]]] for task in tasks if task[0] == "node"}
    shortest = inf
    for order in permutations(heavy):
        for workers in product(range(len(speeds)), repeat=len(heavy)):
            there = {("node", graph.source): [0.0] + [sending] * (len(speeds) - 1)}

            def arrival(task: tuple[str, int], worker: int, there=there) -> float:
                if task in there:
                    return there[task][worker]
                if steps[task]:
                    return inf  # not done yet: no order to run them in
                return max(arrival(other, worker) for other in reads[task])

            free = [0.0] * len(speeds)
            for task, worker in zip(order, workers, strict=True):
                start = max(free[worker], *(arrival(other, worker) for other in reads[task]))
                free[worker] = start + steps[task] / speeds[worker]
                there[task] = [free[worker] + sending * (other != worker) for other in range(len(speeds))]
            end = min(arrival(("node", graph.sink), worker) for worker in range(len(speeds)))
            shortest = min(shortest, end)
    return shortest


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.integers(3, 4), st.integers(0, 2))
def test_no_schedule_is_shorter_than_the_best_one(seed: int, nodes: int, extra: int):
    network, cost = timed(random_graph(seed, nodes, extra), seed, longest=3), costs(seed, 2)
    if sum(steps > 0 for steps in (*network.edge_steps, *network.node_steps)) <= 5:
        used = network.used(torch.ones(1, network.gate_count))
        assert best(network, cost) <= float(cost.bind(network)(used)) + 1e-9  # its sums may round otherwise


# --- by hand -----------------------------------------------------------------------------------------------------


def two_ways(first: int, second: int) -> SuperNetwork:
    """x to y by a and by b, modules of so many steps, a sum of one; values of 4 MB."""
    ways = {"a": first, "b": second}
    edges = [Edge(start="x", end=name, module=nn.Identity(), name=name, steps=steps) for name, steps in ways.items()]
    edges += [Edge(start=name, end="y", module=nn.Identity(), name=f"{name}y") for name in ways]
    return SuperNetwork(edges, input_shape=(10**6,), nodes=[Node(name="y", steps=1)])


FIRST = [("x", 0, 1)]


@pytest.mark.parametrize(
    ("cost", "makespan", "tasks", "sent"),
    [
        # a on the first worker, b on the second as soon as x is there, and there the sum, for a is done before b
        (Schedule(2, "unit", "", 4.0), 8, [("a", 0, 0, 6), ("b", 1, 1, 7), ("y", 1, 7, 8)], [("x", 0, 1), ("a", 6, 7)]),
        # sending takes longer than working
        (Schedule(2, "unit", "", 0.5), 13, [("a", 0, 0, 6), ("b", 0, 6, 12), ("y", 0, 12, 13)], []),
        # the second is so fast that it does all
        (Schedule(2, "unit", "1:8", 4.0), 2.625, [("a", 1, 1, 1.75), ("b", 1, 1.75, 2.5), ("y", 1, 2.5, 2.625)], FIRST),
        # a free link
        (Schedule(2, "unit", "1:2"), 6.5, [("b", 0, 0, 6), ("a", 1, 0, 3), ("y", 1, 6, 6.5)], []),
    ],
)  # fmt: skip
def test_two_ways_by_hand(cost: Schedule, makespan: float, tasks: list, sent: list):
    network = two_ways(6, 6)
    model, used = cost.bind(network), torch.ones(1, 4)
    plan = timeline(model, used)
    assert float(model(used)) == pytest.approx(makespan)
    assert [(task.name, task.worker) for task in plan.tasks] == [task[:2] for task in tasks]
    assert [(each.start, each.end) for each in plan.tasks] == [pytest.approx(task[2:]) for task in tasks]
    assert [(each.name, each.start, each.end) for each in plan.sent] == sent


def test_the_critical_way_goes_first():
    """A chain of 2 and 5, and two tasks of 3 beside it that stand before it in the list."""
    edges = [
        Edge(start="x", end="y", module=nn.Identity(), name="short", steps=3),
        Edge(start="x", end="y", module=nn.Identity(), name="other", steps=3),
        Edge(start="x", end="a", module=nn.Identity(), name="long", steps=2),
        Edge(start="a", end="y", module=nn.Identity(), name="longer", steps=5),
    ]
    network = SuperNetwork(edges, input_shape=(1,), nodes=[Node(name="y", steps=0)])
    used = torch.ones(1, 4)
    spans = {order: float(Schedule(2, "unit", order=order).bind(network)(used)) for order in ("list", "critical")}
    assert spans == {"list": 10, "critical": 7}


def test_durations_are_multiply_adds_over_speed_and_bytes_over_the_link():
    """A convolution of 8 x 8 x 16 x 16 MACs at 0.5 GMAC/s, a value of 4 x 8 x 16 x 16 bytes at 2 MB/s, in ms."""
    edges = [Edge(start="x", end="y", module=nn.Conv2d(8, 8, 1), name=name) for name in "ab"]
    network = SuperNetwork(edges, input_shape=(8, 16, 16))
    work, addition, value = 8 * 8 * 256, 8 * 256, 4 * 8 * 256
    one = Schedule(1, speeds="0.5").bind(network)(torch.ones(1, 2))
    assert float(one) == pytest.approx((2 * work + addition) / 0.5e9 * 1e3)
    free = Schedule(2, speeds="0.5:0.5").bind(network)(torch.ones(1, 2))
    assert float(free) == pytest.approx((work + addition) / 0.5e9 * 1e3)
    model = Schedule(2, speeds="0.001:0.001", link=2.0).bind(network)
    sent = value / 2e6 * 1e3
    assert model.sent[0] == pytest.approx(sent)
    assert float(model(torch.ones(1, 2))) == pytest.approx(sent + (work + addition) / 1e6 * 1e3, rel=1e-12)
    assert (model.unit, Schedule().unit, Schedule(durations="unit").unit) == ("ms", "ms", "step")


def test_open_channels_alone_take_time():
    network = FABRICS["gated"]
    kept = connected(network, 5, seed=3, probability=0.7)
    used = network.used(kept)
    torch.testing.assert_close(Schedule(1).bind(network)(used), MACs().bind(network)(used) / 1e6)
    assert len(set(Schedule(2).bind(network)(used).tolist())) > 1


def test_many_architectures_are_scheduled_in_chunks(monkeypatch):
    network = FABRICS["conv"]
    used = network.used(connected(network, 11, seed=0))
    model = Schedule(2, "macs", "1:3", 5.0).bind(network)
    whole = model(used)
    assert whole.dtype == torch.float64
    assert [float(model(row[None])) for row in used] == whole.tolist()
    assert torch.equal(model(used.bool()), whole)
    monkeypatch.setattr("budgetnet.costs.schedule.CHUNK", 4)
    assert torch.equal(model(used), whole)
    assert model(torch.zeros(1, network.units)).tolist() == [0]


def test_steps_have_a_timeline_too():
    """The number of cycles is that of `Steps`, and no more workers are busy at a time than there are."""
    network = FABRICS["conv"]
    used = network.used(network.architecture("full"))
    model = Steps(2).bind(network)
    plan = timeline_of(model, network, used)
    assert plan is not None
    assert max(task.end for task in plan.tasks) == float(model(used))
    assert {(task.worker, task.start) for task in plan.tasks} <= {
        (w, c) for w in range(2) for c in range(int(model(used)))
    }
    assert len(plan.tasks) == len({(task.worker, task.start) for task in plan.tasks})
    assert timeline_of(Params().bind(network), network, used) is None


# --- limits ------------------------------------------------------------------------------------------------------

TINY = {
    "conv": conv_fabric(width=2, depth=3, channels=3, classes=2, image_size=8),
    "resnet": resnet_fabric(width=1, channels=3, classes=2, image_size=8),
}


@pytest.mark.parametrize("cost", [Schedule(), Schedule(2, "macs", "1:3"), Schedule(2, link=0.1), Schedule(3, "unit")])
@pytest.mark.parametrize("network", TINY.values(), ids=TINY)
def test_the_smallest_is_the_smallest_where_the_fastest_can_do_all(network: SuperNetwork, cost: Schedule):
    bound = Budget(cost, at_most=1e9).bind(network)
    used = network.used(every(network.gate_count))
    assert bound.model.monotone
    found = float(bound.model(network.used(bound.cheapest(network))))
    assert found == float(bound.model(used)[network.connects(used)].min())


@settings(max_examples=25, deadline=None)
@given(SEEDS, st.integers(2, 5), st.integers(0, 3))
def test_no_architecture_is_faster_than_the_fastest_path(seed: int, nodes: int, extra: int):
    """What a path takes on the fastest worker bounds all, also where values have to be sent to it."""
    network, cost = timed(random_graph(seed, nodes, extra), seed), costs(seed, 3)
    model = cost.bind(network)
    used = network.used(every(network.gate_count))
    path = network.graph.cheapest_path(model.along_path)
    bound = sum(model.along_path[edge] for edge in path)
    assert bound <= float(model(used)[network.connects(used)].min()) + 1e-9


def test_a_limit_is_refused_only_where_the_smallest_is_known():
    network = TINY["conv"]
    tight = Budget(Schedule(2), at_most=1e-6)
    with pytest.raises(UnreachableBudget, match=r"schedule must be at most 1e-06 ms, but the smallest network of conv"):
        check_reachable(network, [tight.bind(network)])
    unsure = Budget(Schedule(2, speeds="1:9", link=0.01), at_most="90%").bind(network)
    assert not unsure.model.monotone
    assert check_reachable(network, [unsure])[0]["unit"] == "ms"
    none = Budget(Schedule(2, speeds="1:9", link=0.01), at_most=1e-6).bind(network)
    with pytest.raises(
        UnreachableBudget, match=r"must be at most 1e-06 ms, but no network of conv\w* takes so little: "
    ):
        check_reachable(network, [none])


# --- the pictures ------------------------------------------------------------------------------------------------


def drawn(texts: list[str]) -> tuple[SuperNetwork, Record, list[BoundBudget], Tensor]:
    """What architecture.json holds of an architecture under some budgets."""
    network = FABRICS["conv"]
    budgets = [Budget.parse(text).bind(network) for text in texts]
    kept = connected(network, 1, seed=5, probability=0.8)
    content = json.loads(json.dumps(describe(network, kept, budgets)))
    return network, Record(content, "architecture.json"), budgets, network.used(kept)


def test_the_picture_shows_every_task_and_all_that_is_sent():
    """From the file alone: bars that start and end with the tasks, on a row for each worker, and lines between rows."""
    texts = ["schedule[workers=3,speeds=1:2:4,link=20]<=9ms", "macs<=50%", "steps:2<=99"]
    _, record, budgets, used = drawn(texts)
    plans = read_plans(record)
    assert [(plan.cost, plan.unit, plan.workers) for plan in plans] == [
        (budgets[0].name, "ms", 3),
        ("steps:2", "step", 2),
    ]
    for plan, budget in zip(plans, (budgets[0], budgets[2]), strict=True):
        assert max(task.end for task in plan.tasks) == float(budget.model(used))
        figure = json.loads(gantt(plan, Architecture.read(record)).to_json())
        bars = [trace for trace in figure["data"] if trace["type"] == "bar"]
        shown = {
            (row, start, start + length, name)
            for trace in bars
            for row, start, length, (name, _) in zip(
                trace["y"], trace["base"], trace["x"], trace["customdata"], strict=True
            )
        }
        assert shown == {
            (f"worker {task.worker + 1}", task.start, task.start + (task.end - task.start), escape(task.name))
            for task in plan.tasks
        }
        lines = [trace for trace in figure["data"] if trace["type"] == "scatter"]
        assert len(lines) == bool(plan.sent) == (plan.workers == 3)
        for line in lines:
            ways = list(zip(line["x"], line["y"], strict=True))
            assert ways[2::3] == [(None, None)] * len(plan.sent)
            assert ways[0::3] == [(each.start, f"worker {each.worker + 1}") for each in plan.sent]
            assert ways[1::3] == [(each.end, f"worker {each.target + 1}") for each in plan.sent]
        assert figure["layout"]["yaxis"]["tickvals"] == [f"worker {place + 1}" for place in range(plan.workers)]


def test_what_connects_nothing_has_no_schedule():
    network = FABRICS["conv"]
    budgets = [Budget(Schedule(), at_most=1).bind(network)]
    content = describe(network, torch.zeros(1, network.gate_count), budgets)
    assert (content["schedules"], content["cuts"]) == ([], [])
    assert read_plans(Record(content, "architecture.json")) == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"worker": 3}, 'architecture.json: "schedules.0..tasks.0..worker" must be one of 3 workers, got 3'),
        ({"start": "soon"}, "architecture.json: \"schedules.0..tasks.0..start\" must be a finite number, got 'soon'"),
        ({"name": None}, 'architecture.json: "schedules.0..tasks.0..name" must be a text, got None'),
    ],
)
def test_schedules_of_a_file_that_are_none(change: dict, message: str):
    _, record, _, _ = drawn(["schedule:3<=9ms"])
    record.values["schedules"][0]["tasks"][0] |= change
    with pytest.raises(FileError, match=message):
        read_plans(record)


# --- how it is asked for -----------------------------------------------------------------------------------------


def test_a_schedule_is_asked_for_by_name():
    text = "schedule[workers=2,durations=unit,speeds=1:4,link=12.5,order=critical]"
    assert parse_cost(text) == Schedule(2, "unit", "1:4", 12.5, "critical")
    for cost in (Schedule(), Schedule(3), Schedule(2, speeds="1:4", link=0.5), Schedule(4, "unit", order="critical")):
        assert parse_cost(cost_name(cost)) == cost
    assert Budget.parse("schedule:2<=4ms").at_most == "4ms"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schedule:0", "workers must be a whole number >= 1, got 0"),
        ("schedule[durations=ms]", "durations must be macs or unit, got 'ms'"),
        ("schedule[order=random]", "order must be list or critical, got 'random'"),
        ("schedule[speeds=1:2:3]", "speeds must be 2 numbers > 0 with : between, got '1:2:3'"),
        ("schedule[speeds=1:fast]", "speeds must be 2 numbers > 0 with : between, got '1:fast'"),
        ("schedule[speeds=0:1]", "speeds must be 2 numbers > 0 with : between, got '0:1'"),
        ("schedule[link=0]", r"link must be > 0 MB/s, got 0.0"),
        ("schedule[link=nan]", r"link must be > 0 MB/s, got nan"),
        ("schedule[link=wide]", "link must be a number, got 'wide'"),
        ("schedule[cores=2]", "schedule has the options workers, durations, speeds, link, order, got 'cores'"),
    ],
)
def test_schedules_that_are_none(text: str, message: str):
    with pytest.raises(ConfigError, match=message):
        parse_cost(text)
