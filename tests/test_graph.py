"""Which kept edges are used, by the reachability of networkx; the order; what is no graph."""

from __future__ import annotations

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import every, graphs, reachable, slow_used

from budgetnet.errors import GraphError
from budgetnet.graph import Graph, topological_order

DIAMOND = Graph(("x", "a", "b", "y"), ((0, 1), (0, 2), (1, 3), (2, 3)), 0, 3)


@settings(max_examples=25, deadline=None)
@given(graphs(nodes=5, extra=3))
def test_used_edges_lie_between_what_the_input_reaches_and_what_reaches_the_output(graph: Graph):
    """For all 2**E architectures of graphs with parallel edges."""
    kept = every(len(graph.edges), torch.bool)
    expected = [slow_used(graph, bits) for bits in kept.tolist()]
    assert graph.used(kept).tolist() == expected


@settings(max_examples=25, deadline=None)
@given(graphs(nodes=5, extra=3))
def test_relevant_edges_start_where_the_input_reaches_whatever_their_own_bit(graph: Graph):
    kept = every(len(graph.edges), torch.bool)
    for bits, relevant in zip(kept.tolist(), graph.relevant(kept).tolist(), strict=True):
        ahead, behind = reachable(graph, bits)
        assert relevant == [start in ahead and end in behind for start, end in graph.edges]
    for edge in range(len(graph.edges)):
        flipped = kept.clone()
        flipped[:, edge] ^= True
        assert torch.equal(graph.relevant(kept)[:, edge], graph.relevant(flipped)[:, edge])


@settings(max_examples=25, deadline=None)
@given(graphs())
def test_dropping_an_irrelevant_edge_changes_no_used_edge(graph: Graph):
    kept = every(len(graph.edges), torch.bool)[-512:]
    relevant = graph.relevant(kept)
    assert torch.equal(graph.used(kept & relevant), graph.used(kept))


@settings(max_examples=25, deadline=None)
@given(graphs())
def test_floats_agree_with_bits_exactly(graph: Graph):
    kept = every(len(graph.edges), torch.bool)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(graph.used(kept.to(dtype)), graph.used(kept).to(dtype))
        assert torch.equal(graph.relevant(kept.to(dtype)), graph.relevant(kept).to(dtype))


@settings(max_examples=10, deadline=None)
@given(graphs(nodes=5, extra=2), st.integers(0, 1000))
def test_used_is_differentiable_in_kept(graph: Graph, seed: int):
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(2, len(graph.edges), dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(graph.used, kept)


def test_used_floats_multiply_along_a_path_and_combine_beside_each_other():
    """x to a by edges of 0.5 and 0.4, then one of 0.3: each reaches, or leads to, a by `1 - (1 - p)(1 - q)`."""
    graph = Graph(("x", "a", "y"), ((0, 1), (0, 1), (1, 2)), 0, 2)
    kept = torch.tensor([[0.5, 0.4, 0.3]], dtype=torch.float64)
    expected = torch.tensor([[0.5 * 0.3, 0.4 * 0.3, 0.3 * (1 - 0.5 * 0.6)]], dtype=torch.float64)
    torch.testing.assert_close(graph.used(kept), expected)


@settings(max_examples=50, deadline=None)
@given(graphs(nodes=8, extra=6), st.integers(0, 1000))
def test_cheapest_path_is_as_short_as_that_of_networkx(graph: Graph, seed: int):
    weights = torch.randint(0, 20, (len(graph.edges),), generator=torch.Generator().manual_seed(seed)).tolist()
    path = graph.cheapest_path(weights)
    drawn = nx.MultiDiGraph()
    drawn.add_weighted_edges_from((*edge, weight) for edge, weight in zip(graph.edges, weights, strict=True))
    assert sum(weights[edge] for edge in path) == nx.shortest_path_length(drawn, graph.source, graph.sink, "weight")
    places = [graph.source, *(graph.edges[edge][1] for edge in path)]
    assert [graph.edges[edge][0] for edge in path] == places[:-1]
    assert places[-1] == graph.sink


@settings(max_examples=50, deadline=None)
@given(graphs(nodes=8, extra=8))
def test_the_order_is_topological_and_runs_from_input_to_output(graph: Graph):
    place = {node: position for position, node in enumerate(graph.order)}
    assert sorted(graph.order) == list(range(len(graph.nodes)))
    assert all(place[start] < place[end] for start, end in graph.edges)
    assert (graph.order[0], graph.order[-1]) == (graph.source, graph.sink)


@settings(max_examples=50, deadline=None)
@given(graphs(nodes=8, extra=8))
def test_the_order_is_the_reversed_post_order_of_networkx_1_11(graph: Graph):
    """That search written as a recursion: it visits the successor it met last first."""
    successors = [[graph.edges[edge][1] for edge in leaving] for leaving in graph.outgoing]
    finished: list[int] = []

    def visit(node: int) -> None:
        for successor in reversed(successors[node]):
            if successor not in finished:
                visit(successor)
        finished.append(node)

    for node in range(len(graph.nodes)):
        if node not in finished:
            visit(node)
    assert graph.order == tuple(reversed(finished))


@pytest.mark.parametrize(
    ("successors", "order"),
    [
        ([[1, 2], [3], [3], []], (0, 1, 2, 3)),
        ([[2, 1], [3], [3], []], (0, 2, 1, 3)),
        # a search by generations would say 0 1 2 3 4 5: here the first successor's branch comes first, to its end
        ([[1, 2], [3], [4], [5], [5], []], (0, 1, 3, 2, 4, 5)),
        # a node whose search starts later stands before one whose search started earlier
        ([[2], [2], []], (1, 0, 2)),
    ],
)
def test_topological_order_of_small_graphs_by_hand(successors: list[list[int]], order: tuple[int, ...]):
    assert topological_order(len(successors), successors) == order


@pytest.mark.parametrize(
    ("nodes", "edges", "source", "sink", "message"),
    [
        ("xaby", [(0, 1), (1, 2), (2, 1), (2, 3)], 0, 3, "no cycle, but '[ab]' leads back to itself"),
        ("xay", [(0, 1), (1, 1), (1, 2)], 0, 2, "no cycle, but 'a' leads back to itself"),
        ("xay", [(0, 2), (1, 2)], 0, 2, "'a' lies on no path from 'x' to 'y': nothing enters it"),
        ("xay", [(0, 2), (0, 1)], 0, 2, "'a' lies on no path from 'x' to 'y': nothing leaves it"),
        ("xay", [(0, 2)], 0, 2, "'a' lies on no path"),
        ("xay", [(1, 0), (0, 2)], 0, 2, "nothing may enter the input 'x'"),
        ("xya", [(0, 1), (1, 2)], 0, 1, "nothing may leave the output 'y'"),
        ("xya", [(0, 2)], 0, 1, "nothing enters the output 'y'"),
        ("xy", [], 0, 1, "nothing leaves the input 'x'"),
        ("xx", [(0, 1)], 0, 1, "node names must differ, got x, x"),
        ("xy", [(0, 1)], 0, 0, "input and output must be two nodes, got 'x' for both"),
        ("xy", [(0, 2)], 0, 1, "must lie in 0..1, got 2"),
        ("xy", [(-1, 1)], 0, 1, "must lie in 0..1, got -1"),
        ("xy", [(0, 1)], 0, 5, "must lie in 0..1, got 5"),
    ],
)
def test_what_is_no_graph_from_one_input_to_one_output(nodes, edges, source, sink, message):
    with pytest.raises(GraphError, match=message):
        Graph(tuple(nodes), tuple(edges), source, sink)


def test_an_error_of_ours_is_also_built_in():
    with pytest.raises(ValueError, match="cycle"):
        topological_order(2, [[1], [0]])


def test_edges_are_listed_by_node_in_their_own_order():
    assert DIAMOND.incoming == ((), (0,), (1,), (2, 3))
    assert DIAMOND.outgoing == ((0, 1), (2,), (3,), ())
