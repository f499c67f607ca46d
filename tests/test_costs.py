"""Costs count what an independent counter counts, and schedules are those of a simulation, step by step."""

from __future__ import annotations

import copy
from functools import cache
from itertools import combinations
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import connected, every, graphs, network_on, random_graph
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from budgetnet import Budget, Edge, Node, SuperNetwork
from budgetnet.costs import MACs, Params, Schedule, Steps
from budgetnet.costs.additive import EdgeCost
from budgetnet.costs.steps import StepCost
from budgetnet.errors import ConfigError
from budgetnet.extraction import count, extract
from budgetnet.graph import Graph
from budgetnet.shapes import once_a_kind
from budgetnet.spaces import conv_fabric, resnet_fabric

FABRICS = {
    "conv": conv_fabric(width=3, depth=3, channels=4, classes=5, image_size=8),
    "segmentation": conv_fabric(width=2, depth=3, channels=3, classes=2, image_size=(4, 12), task="segmentation"),
    "resnet": resnet_fabric(width=2, channels=4, classes=5, image_size=8),
    "own": network_on(random_graph(3, nodes=6, extra=6), seed=3),
}


def by_hand(network: SuperNetwork, used: Tensor, plain: nn.Module) -> int:
    """MACs from the sizes that the layers of the plain network see, and from the sums between its modules."""
    macs = 0

    def add(module: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
        nonlocal macs
        if isinstance(module, nn.Conv2d):
            macs += output.numel() * module.in_channels // module.groups * prod(module.kernel_size)
        elif isinstance(module, nn.Linear):
            macs += module.in_features * module.out_features

    for part in plain.modules():
        part.register_forward_hook(add)
    plain.eval()(torch.zeros(1, *network.input_shape))
    for shape, entering in zip(network.shapes, network.graph.incoming, strict=True):
        macs += max(0, int(used[0, list(entering)].sum()) - 1) * prod(shape)
    return macs


@settings(max_examples=8, deadline=None)
@pytest.mark.parametrize("network", FABRICS.values(), ids=FABRICS)
@given(st.integers(0, 2**16))
def test_macs_and_params_are_those_counted_on_the_extracted_network(network: SuperNetwork, seed: int):
    """By torch's counter and the sums that `count` finds, and by the sizes each layer sees."""
    kept = connected(network, 1, seed)
    macs, params = (float(cost.bind(network)(network.used(kept))[0]) for cost in (MACs(), Params()))
    plain = extract(network, kept)
    assert count(plain, torch.zeros(1, *network.input_shape)) == {"macs": macs, "params": params}
    assert by_hand(network, network.used(kept), plain) == macs


@settings(max_examples=8, deadline=None)
@given(graphs(nodes=5, extra=4), st.integers(0, 2**16))
def test_costs_of_many_architectures_are_the_costs_of_each(graph: Graph, seed: int):
    network = network_on(graph, seed=seed)
    used = network.used(every(network.gate_count)[:64])
    for cost in (MACs(), Params(), Steps(1), Steps(2)):
        model = cost.bind(network)
        assert model(used).tolist() == [float(model(row[None])) for row in used]
        assert torch.equal(model(used.bool()), model(used))


def test_a_cost_is_the_sum_of_its_edges_additions_and_activations():
    """Three edges of 1, 10 and 100 into y, 1000 for each addition there, 5 for its activation."""
    graph = Graph(("x", "y"), ((0, 1), (0, 1), (0, 1)), 0, 1)
    edge, addition, node = torch.tensor([1.0, 10, 100]), torch.tensor([0.0, 1000]), torch.tensor([0.0, 5])
    model = EdgeCost(graph, edge.double(), addition.double(), node.double(), "MAC")
    assert model(every(3)).tolist() == [0, 105, 15, 1115, 6, 1106, 1016, 2116]
    assert model.along_path == [6, 15, 105]


def test_a_cost_of_probabilities_is_the_expected_cost_of_independent_edges():
    """Where nothing reconverges, used probabilities are exact, and so is the cost between the bits."""
    graph = Graph(("x", "y"), ((0, 1), (0, 1), (0, 1)), 0, 1)
    model = EdgeCost(graph, torch.tensor([1.0, 10, 100]).double(), *torch.tensor([[0, 7.0], [0, 3.0]]).double(), "MAC")
    keep = torch.tensor([[0.2, 0.5, 0.9]], dtype=torch.float64, requires_grad=True)
    rows = every(3, torch.float64)
    probability = (rows * keep + (1 - rows) * (1 - keep)).prod(dim=1)
    torch.testing.assert_close(model(keep)[0], probability @ model(rows))
    assert torch.autograd.gradcheck(model, keep)


def test_activations_with_weights_are_paid_for():
    """A node may carry more than a ReLU: what stands there is in the extracted network too."""
    edges = [Edge(start="x", end="a", module=nn.Conv2d(2, 2, 1)), Edge(start="a", end="y", module=nn.Conv2d(2, 2, 1))]
    node = Node(name="a", activation=nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.PReLU(2)))
    network = SuperNetwork(edges, input_shape=(2, 4, 4), nodes=[node])
    used = network.used(network.architecture("full"))
    assert MACs().bind(network)(used).item() == (4 + 36 + 4) * 16
    assert Params().bind(network)(used).item() == 6 + 38 + 2 + 6
    plain = extract(network, network.architecture("full"))
    assert count(plain, torch.zeros(1, 2, 4, 4)) == {"macs": 704, "params": 52}
    assert Params().bind(network).along_path == [6 + 40, 6]


def test_what_is_not_used_costs_nothing():
    for network in FABRICS.values():
        used = network.used(torch.zeros(1, network.gate_count))
        for cost in (MACs(), MACs("paper"), Params(), Steps(1), Steps(3)):
            assert cost.bind(network)(used).item() == 0


def test_the_papers_reading_charges_an_upsampling_convolution_a_quarter():
    network = conv_fabric(width=2, depth=2, channels=4, classes=3, image_size=4)
    true, paper = (MACs(counting).bind(network) for counting in ("true", "paper"))
    for edge, kind in enumerate(network.kinds):
        assert true.per_edge[edge] == paper.per_edge[edge] * (4 if kind == "up" else 1)
    assert "up" in network.kinds
    assert torch.equal(true.per_addition, paper.per_addition)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_counts_do_not_depend_on_the_type_of_the_weights(dtype: torch.dtype):
    network = FABRICS["conv"]
    other = copy.deepcopy(network).to(dtype)
    used = network.used(network.architecture("full"))
    for cost in (MACs(), MACs("paper"), Params()):
        assert torch.equal(cost.bind(other)(used), cost.bind(network)(used))


def test_counting_leaves_the_network_as_it_was():
    network = FABRICS["conv"].train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    MACs().bind(network)
    assert all(part.training for part in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


# --- steps -------------------------------------------------------------------------------------------------------


def simulated(network: SuperNetwork, used: list[bool], workers: int) -> int:
    """Cycles of list scheduling, one cycle after the other over a list of what is left to do.

    In each cycle every worker takes the first task of the list whose predecessors were done before
    it; what takes no cycle is done as soon as they are.
    """
    nodes, edges = len(network.graph.nodes), network.graph.edges
    takes = [*network.node_steps, *network.edge_steps]
    before = [[nodes + edge for edge in entering if used[edge]] for entering in network.graph.incoming]
    before += [[start] for start, _ in edges]
    alive = [end for edge, pair in enumerate(edges) if used[edge] for end in pair]
    successors = [[nodes + edge for edge in leaving] for leaving in network.graph.outgoing]
    successors += [[end] for _, end in edges]
    finished: list[int] = []

    def visit(task: int) -> None:
        for successor in reversed(successors[task]):
            if successor not in finished:
                visit(successor)
        finished.append(task)

    for task in range(len(successors)):
        if task not in finished:
            visit(task)
    left = [task for task in reversed(finished) if (used[task - nodes] if task >= nodes else task in alive)]

    def ready(task: int) -> bool:
        return not any(other in left for other in before[task])

    cycles = 0
    while left:
        free = next((task for task in left if not takes[task] and ready(task)), None)
        if free is not None:
            left.remove(free)
            continue
        taken = [task for task in left if ready(task)][:workers]
        left = [task for task in left if task not in taken]
        cycles += 1
    return cycles


@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("network", FABRICS.values(), ids=FABRICS)
@given(st.integers(0, 2**16), st.integers(1, 5), st.floats(0.3, 1))
def test_steps_are_those_of_a_simulation(network: SuperNetwork, seed: int, workers: int, probability: float):
    generator = torch.Generator().manual_seed(seed)
    kept = torch.bernoulli(torch.full((3, network.gate_count), probability), generator=generator)
    used = network.used(torch.cat([kept, connected(network, 1, seed)]))
    expected = [simulated(network, row, workers) for row in used.bool().tolist()]
    assert Steps(workers).bind(network)(used).tolist() == expected


@settings(max_examples=25, deadline=None)
@given(graphs(nodes=5, extra=4), st.integers(0, 2**16), st.integers(1, 4))
def test_steps_are_those_of_a_simulation_whatever_takes_a_cycle(graph: Graph, seed: int, workers: int):
    """Modules and sums with and without a cycle of their own, the input among them, for all architectures."""
    generator = torch.Generator().manual_seed(seed)
    edge_steps = torch.randint(0, 2, (len(graph.edges),), generator=generator).tolist()
    node_steps = torch.randint(0, 2, (len(graph.nodes),), generator=generator).tolist()
    edges = [
        Edge(start=graph.nodes[a], end=graph.nodes[b], module=nn.Identity(), name=f"e{i}", steps=edge_steps[i])
        for i, (a, b) in enumerate(graph.edges)
    ]
    nodes = [Node(name=name, steps=steps) for name, steps in zip(graph.nodes, node_steps, strict=True)]
    ends = {"source": graph.nodes[graph.source], "sink": graph.nodes[graph.sink]}
    network = SuperNetwork(edges, input_shape=(1,), nodes=nodes, **ends)
    used = network.used(every(len(edges))[-64:])
    expected = [simulated(network, row, workers) for row in used.bool().tolist()]
    assert Steps(workers).bind(network)(used).tolist() == expected


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**16))
def test_steps_lie_between_the_longest_path_and_one_worker(seed: int):
    network = FABRICS["resnet"]
    used = network.used(connected(network, 8, seed))
    one = Steps(1).bind(network)(used)
    unlimited = Steps(1000).bind(network)(used)
    tasks = torch.tensor(network.edge_steps, dtype=used.dtype)
    inputs = torch.stack([used[:, list(e)].sum(1) if e else used.new_zeros(8) for e in network.graph.incoming], dim=1)
    assert one.tolist() == (used @ tasks + (inputs > 0).float() @ torch.tensor(network.node_steps).float()).tolist()
    assert unlimited.tolist() == [longest_path(network, row) for row in used.bool().tolist()]
    for workers in (2, 3, 4):
        steps = Steps(workers).bind(network)(used)
        assert (torch.maximum(unlimited, (one / workers).ceil()) <= steps).all()
        assert (steps <= one).all()


def longest_path(network: SuperNetwork, used: list[bool]) -> int:
    done = {network.graph.source: 0}
    for node in network.graph.order:
        reached = [
            done[network.graph.edges[edge][0]] + network.edge_steps[edge]
            for edge in network.graph.incoming[node]
            if used[edge]
        ]
        if reached:
            done[node] = max(reached) + network.node_steps[node]
    return done.get(network.graph.sink, 0)


def test_many_architectures_are_scheduled_in_chunks(monkeypatch):
    network = FABRICS["own"]
    used = network.used(connected(network, 11, seed=0))
    whole = Steps(2).bind(network)(used)
    monkeypatch.setattr("budgetnet.costs.steps.CHUNK", 4)
    assert torch.equal(Steps(2).bind(network)(used), whole)


# modules of two networks of the shapes that Figure 8 of the paper compares: a chain with skips, and two chains
BLUE = ["01", "12", "23", "34", "45", "56", "02", "24", "46"]
RED = ["0a", "ab", "bc", "cd", "dz", "0p", "pq", "qr", "rs", "sz"]


@pytest.mark.parametrize(("modules", "sink", "steps"), [(BLUE, "6", (9, 6, 6)), (RED, "z", (10, 5, 5))])
def test_more_modules_can_take_fewer_steps_on_two_workers(modules: list[str], sink: str, steps: tuple[int, ...]):
    """On 1, 2 and 4 workers; the sums are free, and no schedule of 2 workers is shorter."""
    edges = [Edge(start=a, end=b, module=nn.Conv2d(1, 1, 1)) for a, b in modules]
    names = sorted({end for module in modules for end in module})
    network = SuperNetwork(
        edges, input_shape=(1, 2, 2), source="0", sink=sink, nodes=[Node(name=name, steps=0) for name in names]
    )
    used = network.used(network.architecture("full"))
    assert tuple(int(Steps(workers).bind(network)(used)) for workers in (1, 2, 4)) == steps
    assert optimal(tuple(modules), 2) == steps[1]


def optimal(modules: tuple[str, ...], workers: int) -> int:
    """Cycles of the best schedule, over every choice of modules in every cycle."""

    @cache
    def best(left: frozenset[str]) -> int:
        if not left:
            return 0
        ready = [module for module in left if not any(other[1] == module[0] for other in left)]
        choices = combinations(ready, min(workers, len(ready)))  # a worker that could work gains nothing by waiting
        return 1 + min(best(left - set(choice)) for choice in choices)

    return best(frozenset(modules))


def test_schedules_of_the_parallel_chains_by_hand():
    """Two chains of two modules and the sum that joins them: 5 cycles for one worker, 3 for two."""
    graph = Graph(("x", "a", "b", "y"), ((0, 1), (1, 3), (0, 2), (2, 3)), 0, 3)
    for workers, cycles in ((1, 5), (2, 3), (3, 3)):
        model = StepCost(graph, (1, 1, 1, 1), (0, 0, 0, 1), workers)
        assert model(torch.ones(1, 4)).tolist() == [cycles]


# --- the smallest network ----------------------------------------------------------------------------------------

TINY = {
    "conv": conv_fabric(width=2, depth=3, channels=3, classes=2, image_size=8),
    "deeper": conv_fabric(width=3, depth=2, channels=4, classes=2, image_size=4),
    "segmentation": conv_fabric(width=2, depth=3, channels=3, classes=2, image_size=8, task="segmentation"),
    "resnet": resnet_fabric(width=1, channels=3, classes=2, image_size=8),
}


@pytest.mark.parametrize("network", TINY.values(), ids=TINY)
@pytest.mark.parametrize("cost", [MACs(), MACs("paper"), Params(), Steps(1), Steps(2)], ids=str)
def test_the_cheapest_path_is_the_cheapest_of_all_architectures(network: SuperNetwork, cost):
    bound = Budget(cost, at_most=1e12).bind(network)
    used = network.used(every(network.gate_count))
    costs = bound.model(used)
    cheapest = network.used(bound.cheapest(network))
    assert bool(cheapest.any())
    assert float(bound.model(cheapest)) == float(costs[used.any(dim=1)].min())
    assert bound.full == float(costs[-1])  # the row that keeps all


@settings(max_examples=25, deadline=None)
@given(graphs(nodes=5, extra=3), st.integers(0, 2**16))
def test_the_cheapest_path_of_own_networks_is_the_cheapest(graph: Graph, seed: int):
    network = network_on(graph, seed=seed)
    used = network.used(every(network.gate_count))
    for cost in (MACs(), Params(), Steps(2)):
        bound = Budget(cost, at_most=1).bind(network)
        found = float(bound.model(network.used(bound.cheapest(network))))
        assert found == float(bound.model(used[used.any(dim=1)]).min())


def test_where_fixed_edges_connect_the_cheapest_keeps_no_gate():
    """The path by a is cheaper than the fixed edge, but it comes on top of it."""
    edges = [
        Edge(start="x", end="y", module=nn.Conv2d(1, 1, 3, padding=1), fixed=True),
        Edge(start="x", end="a", module=nn.Conv2d(1, 1, 1)),
        Edge(start="a", end="y", module=nn.Identity()),
    ]
    network = SuperNetwork(edges, input_shape=(1, 2, 2))
    bound = Budget(MACs(), at_most=1).bind(network)
    assert bound.cheapest(network).tolist() == [[0, 0]]
    assert float(bound.model(network.used(bound.cheapest(network)))) == 36


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MACs("half"), "macs are counted true or paper, got 'half'"),
        (lambda: Steps(0), "workers must be a whole number >= 1, got 0"),
        (lambda: Steps(1.5), "workers must be a whole number >= 1, got 1.5"),
        (lambda: Steps("2"), "workers must be a whole number >= 1, got '2'"),
        (lambda: Schedule(workers=True), "workers must be a whole number >= 1, got True"),
        (lambda: Schedule(speeds=4), "speeds must be 2 numbers > 0 with : between, got 4"),
        (lambda: Schedule(link="fast"), "link must be > 0 MB/s, got 'fast'"),
        (lambda: StepCost(Graph(("x", "y"), ((0, 1),), 0, 1), (2,), (0, 0), 1), "takes 0 or 1 steps, got 2"),
        (lambda: StepCost(Graph(("x", "y"), ((0, 1),), 0, 1), (1,), (0, -1), 1), "takes 0 or 1 steps, got -1"),
    ],
)
def test_costs_outside_their_range(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_macs_of_one_layer_by_hand():
    """3x3, 2 to 6 maps in 2 groups, stride 2 on 8x8: 6 * 1 * 9 * 16; torch counts each multiply-add as two."""
    module = nn.Conv2d(2, 6, 3, stride=2, padding=1, groups=2)
    network = SuperNetwork([Edge(start="x", end="y", module=module)], input_shape=(2, 8, 8))
    assert MACs().bind(network)(torch.ones(1, 1)).item() == 864
    with FlopCounterMode(display=False) as counter:
        module(torch.zeros(1, 2, 8, 8))
    assert counter.get_total_flops() == 2 * 864


def test_modules_that_are_alike_are_looked_at_once_and_others_by_themselves():
    """Alike are layers of one printed form that hold values of the same sizes, whatever these are."""
    looked, known = [], {}

    def look(module: nn.Module, shape: tuple[int, ...] = (2, 8, 8)) -> None:
        once_a_kind(known, module, shape, lambda: looked.append(module))

    layer, other, strided, bare, narrow, own, hooked = (nn.Conv2d(2, 2, 3) for _ in range(7))
    strided.stride = (2, 2)
    bare.bias = None
    narrow.weight = nn.Parameter(torch.zeros(1, 2, 3, 3))
    own.forward = lambda x: x
    hooked.register_forward_hook(lambda module, given, output: output[:, :1])
    for module in (layer, other, strided, bare, narrow, own, own, hooked, hooked, layer):
        look(module)
    look(layer, (2, 4, 4))
    assert looked == [layer, strided, bare, narrow, own, own, hooked, hooked, layer]
