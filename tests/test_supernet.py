"""The forward pass runs just what is used, and gives what masking a full network would give."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import connected, every, exact, graphs, network_on, random_graph, stir
from torch import Tensor, nn

from budgetnet import Edge, Node, SuperNetwork
from budgetnet.errors import ConfigError, GraphError
from budgetnet.extraction import extract
from budgetnet.shapes import evaluating, output_shape
from budgetnet.sites import AlwaysOn, Fixed, Sample
from budgetnet.spaces import conv_fabric, resnet_fabric
from budgetnet.supernet import full


def masked(network: SuperNetwork, x: Tensor, used: Tensor) -> Tensor:
    """Eq. 1 as it is printed: every module runs on all examples, its output times the bit of the example's edge."""
    groups = torch.arange(len(x)).tensor_split(len(used))
    bits = torch.cat([row.expand(len(group), -1) for row, group in zip(used, groups, strict=True)])  # (B, E)
    values = {network.graph.source: x}
    for node in network.graph.order[1:]:
        total = 0
        for edge in network.graph.incoming[node]:
            output = network.modules_on_edges[edge](values[network.graph.edges[edge][0]])
            total = total + output * bits[:, edge].reshape(-1, *[1] * (output.ndim - 1))
        values[node] = network.activations[node](total)
    return values[network.graph.sink]


def images(network: SuperNetwork, count: int, seed: int = 0) -> Tensor:
    drawn = torch.randint(-9, 10, (count, *network.input_shape), generator=torch.Generator().manual_seed(seed))
    return drawn.to(network.gates.logits)


SMALL = [
    conv_fabric(width=3, depth=3, channels=4, classes=5, image_size=8),
    conv_fabric(width=2, depth=2, channels=3, classes=2, image_size=(4, 6), task="segmentation"),
    resnet_fabric(width=2, channels=4, classes=5, image_size=8),
    network_on(random_graph(3, nodes=6, extra=6), seed=3),
]
NAMES = ["conv fabric", "segmentation", "resnet fabric", "own"]


@pytest.fixture(params=SMALL, ids=NAMES)
def network(request) -> SuperNetwork:
    return exact(copy.deepcopy(request.param), 0).eval()


@settings(max_examples=20, deadline=None)
@given(graphs(nodes=6, extra=5), st.integers(0, 2**16), st.integers(1, 7), st.integers(0, 5))
def test_outputs_are_those_of_masking_by_what_is_used(graph, seed: int, architectures: int, more: int):
    """With parallel edges, fixed ones, architectures that do not connect, and batches that K does not divide."""
    network = network_on(graph, seed=seed, fixed=[0] if seed % 2 else []).double().eval()
    x = images(network, architectures + more, seed)
    output, kept = network(x, Sample(architectures, torch.Generator().manual_seed(seed)))
    assert kept.shape == (architectures, network.gate_count)
    torch.testing.assert_close(output, masked(network, x, network.used(kept)))


@pytest.mark.parametrize(("architectures", "examples"), [(1, 1), (1, 6), (3, 6), (3, 8), (5, 7), (6, 6)])
def test_a_sample_predicts_bit_for_bit_what_each_architecture_predicts_alone(network, architectures, examples):
    """In whole numbers, where the order and the size of a matrix product change no digit."""
    kept = connected(network, architectures, seed=architectures, probability=0.8)
    x = images(network, examples)
    output, _ = network(x, Fixed(kept))
    parts = zip(x.tensor_split(architectures), kept, strict=True)
    assert torch.equal(output, torch.cat([network(part, Fixed(bits[None]))[0] for part, bits in parts]))
    assert torch.equal(output, masked(network, x, network.used(kept)))
    assert output.abs().max() > 0
    assert output.abs().max() < 2**40  # far from where float64 would round


@settings(max_examples=15, deadline=None)
@given(graphs(nodes=5, extra=4), st.integers(0, 2**16))
def test_gradients_are_those_of_masking(graph, seed: int):
    network = network_on(graph, seed=seed).double().eval()
    x = images(network, 5, seed).double()
    kept = Sample(3, torch.Generator().manual_seed(seed))(network.gates.logits, slice(0, network.gate_count))
    used = network.used(kept)
    weights = [value for name, value in network.named_parameters() if name != "gates.values"]
    target = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if not used.any():
        return
    ours = torch.autograd.grad((network.run(x, used) * target).sum(), weights, allow_unused=True)
    theirs = torch.autograd.grad((masked(network, x, used) * target).sum(), weights, allow_unused=True)
    for mine, reference in zip(ours, theirs, strict=True):
        if reference is None:
            assert mine is None
        else:
            torch.testing.assert_close(torch.zeros_like(reference) if mine is None else mine, reference)


@settings(max_examples=15, deadline=None)
@given(graphs(nodes=6, extra=5), st.integers(0, 2**16))
def test_an_edge_runs_once_on_the_rows_of_those_who_use_it_and_else_not_at_all(graph, seed: int):
    network = network_on(graph, seed=seed).double().eval()
    calls: dict[int, list[int]] = {edge: [] for edge in range(len(network.graph.edges))}
    for edge, module in enumerate(network.modules_on_edges):
        module.register_forward_hook(lambda _, given, __, edge=edge: calls[edge].append(len(given[0])))
    output, kept = network(images(network, 7), Sample(3, torch.Generator().manual_seed(seed)))
    sizes = torch.tensor([3, 2, 2])  # of 7 examples
    for edge, users in enumerate(network.used(kept).T):
        assert calls[edge] == ([int(sizes[users.bool()].sum())] if users.any() else [])
    if output.requires_grad:
        output.sum().backward()
    for edge, users in enumerate(network.used(kept).T):
        got = [value.grad is not None for value in network.modules_on_edges[edge].parameters()]
        assert got == [bool(users.any())] * len(got)


def test_gates_get_no_gradient_through_the_prediction():
    network = network_on(random_graph(0, nodes=4, extra=2))
    network(images(network, 4), Sample(2, torch.Generator().manual_seed(0)))[0].sum().backward()
    assert network.gates.values.grad is None


def test_a_disconnected_architecture_predicts_zeros_and_uses_nothing(network):
    nothing, all_on = torch.zeros(1, network.gate_count), network.architecture("full")
    assert not network.used(nothing).any()
    x = images(network, 5)
    assert torch.equal(network(x, Fixed(nothing))[0], x.new_zeros(5, *network.shapes[network.graph.sink]))
    output, _ = network(x, Fixed(torch.cat([nothing, all_on, nothing])))
    assert torch.equal(output[:2], torch.zeros_like(output[:2]))
    assert torch.equal(output[2:4], network(x[2:4], Fixed(all_on))[0])
    assert torch.equal(output[4:], torch.zeros_like(output[4:]))


def test_a_disconnected_layer_adds_nothing_where_masking_would_leak_its_bias():
    """x to y directly, or by a, whose input is cut: what is left of a's branch must be 0 and not its bias."""
    leak, identity = nn.Conv2d(1, 1, 1), nn.Identity()
    edges = [
        Edge(start="x", end="a", module=nn.Identity(), name="cut"),
        Edge(start="a", end="y", module=leak, name="leak"),
        Edge(start="x", end="y", module=identity, name="direct"),
    ]
    network = SuperNetwork(edges, input_shape=(1, 2, 2))
    x = images(network, 3)
    assert torch.equal(network(x, Fixed(torch.tensor([[0.0, 1.0, 1.0]])))[0], x)


def test_parallel_edges_are_modules_of_their_own():
    doubled = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.constant_(doubled.weight, 2.0)
    edges = [
        Edge(start="x", end="y", module=nn.Identity(), name="one"),
        Edge(start="x", end="y", module=doubled, name="two"),
    ]
    network = SuperNetwork(edges, input_shape=(1, 1, 1))
    output, _ = network(torch.ones(4, 1, 1, 1), Fixed(every(2)))
    assert output.flatten().tolist() == [0, 2, 1, 3]


def test_one_row_at_a_single_pixel_has_no_batch_statistics_and_trains_on_the_running_ones():
    """Two architectures of one example each, which part at 1x1 maps: batch norm of one value a channel would fail."""
    network = conv_fabric(width=2, depth=3, channels=4, classes=3, image_size=4).double().train()
    down = {"l0.s0>l0.s1", "l0.s1>l0.s2", "l0.s2>l1.s2"}
    across = {"l0.s0>l1.s1", "l1.s1>l1.s2"}
    kept = [[float(network.edge_names[edge] in path) for edge in network.choices] for path in (down, across)]
    module = dict(zip(network.edge_names, network.modules_on_edges, strict=True))["l0.s1>l0.s2"]
    before = copy.deepcopy(module).eval()
    seen = []
    module.register_forward_hook(lambda _, given, output: seen.append((given[0], output)))
    output, _ = network(images(network, 2), Fixed(torch.tensor(kept)))
    [(given, there)] = seen
    assert given.shape[0] == 1
    assert torch.equal(there, before(given))
    output.square().sum().backward()
    assert all(value.grad is not None for value in module.parameters())
    assert all(part.training for part in network.modules())


def test_batch_norm_sees_the_rows_of_all_users_at_once():
    norm = nn.BatchNorm2d(1, momentum=1.0, affine=False)
    edges = [
        Edge(start="x", end="y", module=norm, name="norm"),
        Edge(start="x", end="y", module=nn.Identity(), name="id"),
    ]
    network = SuperNetwork(edges, input_shape=(1, 1, 1))
    x = torch.tensor([1.0, 5.0, 100.0, 9.0]).reshape(4, 1, 1, 1)
    network(x, Fixed(torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])))
    assert norm.running_mean.item() == pytest.approx((1 + 5 + 9) / 3)


def test_the_named_resnet_is_resnet_20():
    """Against one written for itself, as in the paper that introduced it, with the same weights."""
    network = stir(resnet_fabric(width=3, classes=10), 0).double().eval()
    module = dict(zip(network.edge_names, network.modules_on_edges, strict=True))
    plain = ResNet20().double().eval()
    with torch.no_grad():
        plain.stem.load_state_dict(module["input"][:2].state_dict())
        for place, block in enumerate(plain.blocks):
            name = f"g{place // 3}.{place % 3}"
            copy_into(block.first, module[f"{name}.block"][:2])
            copy_into(block.second, module[f"{name}.block"][3:])
            if block.shortcut is not None:
                copy_into(block.shortcut, module[f"{name}.skip"])
        plain.classifier.load_state_dict(module["output"][-1].state_dict())
    x = images(network, 2)
    ours, kept = network(x, Fixed(network.architecture("resnet")))
    torch.testing.assert_close(ours, plain(x))
    used = {network.edge_names[edge] for edge in network.used(kept)[0].nonzero().flatten().tolist()}
    assert len(used) == 2 + 2 * 9
    # and the whole fabric is another function
    assert not torch.allclose(network(x, full(network))[0], ours)


class ResNet20(nn.Module):
    """He et al., arXiv:1512.03385, section 4.2, with projections where the shape changes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16))
        sizes = [16] * 4 + [32] * 3 + [64] * 3
        self.blocks = nn.ModuleList(PlainBlock(*pair) for pair in pairwise(sizes))
        self.classifier = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for block in self.blocks:
            x = block(x)
        return self.classifier(x.mean(dim=(2, 3)))


class PlainBlock(nn.Module):
    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        stride = out // into
        self.first = nn.Sequential(nn.Conv2d(into, out, 3, stride, padding=1), nn.BatchNorm2d(out))
        self.second = nn.Sequential(nn.Conv2d(out, out, 3, padding=1), nn.BatchNorm2d(out))
        projection = nn.Sequential(nn.Conv2d(into, out, 1, stride), nn.BatchNorm2d(out))
        self.shortcut = projection if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        beside = x if self.shortcut is None else self.shortcut(x)
        return (self.second(self.first(x).relu()) + beside).relu()


def copy_into(target: nn.Module, source: nn.Module) -> None:
    for mine, other in zip(target.state_dict().values(), source.state_dict().values(), strict=True):
        mine.copy_(other)


def test_nodes_are_numbered_as_edges_name_them_and_fixed_edges_have_no_gate():
    edges = [
        Edge(start="x", end="b", module=nn.Identity(), fixed=True),
        Edge(start="b", end="a", module=nn.Identity()),
        Edge(start="a", end="y", module=nn.Identity(), fixed=True),
        Edge(start="b", end="y", module=nn.Identity()),
    ]
    network = SuperNetwork(edges, input_shape=(1, 1, 1), architectures={"short": ["b>y"]})
    assert network.graph.nodes == ("x", "b", "a", "y")
    assert network.edge_names == ("x>b", "b>a", "a>y", "b>y")
    assert network.choices == (1, 3)
    assert network.decisions(torch.tensor([[0.0, 1.0]])).tolist() == [[1, 0, 1, 1]]
    assert network.relevant(torch.tensor([[0.0, 1.0]])).tolist() == [[1, 1]]
    assert network.architecture("short").tolist() == [[0, 1]]
    assert network.architecture("full").tolist() == [[1, 1]]
    assert network.architecture_names == ("full", "short")


def test_steps_are_1_for_modules_and_sums_and_0_for_identities_unless_told():
    edges = [
        Edge(start="x", end="a", module=nn.Identity()),
        Edge(start="x", end="a", module=nn.Conv2d(1, 1, 1), name="conv"),
        Edge(start="a", end="b", module=nn.Conv2d(1, 1, 1), steps=0),
        Edge(start="b", end="y", module=nn.Identity(), steps=1),
    ]
    network = SuperNetwork(edges, input_shape=(1, 1, 1), nodes=[Node(name="b", steps=1)])
    assert network.edge_steps == (0, 1, 0, 1)
    assert dict(zip(network.graph.nodes, network.node_steps, strict=True)) == {"x": 0, "a": 1, "b": 1, "y": 0}


def test_nodes_are_placed_by_depth_unless_told():
    edges = [Edge(start=a, end=b, module=nn.Identity()) for a, b in ("xa", "xb", "ac", "cy", "by")]
    network = SuperNetwork(edges, input_shape=(1,), nodes=[Node(name="b", position=(5, 7))])
    placed = dict(zip(network.graph.nodes, network.positions, strict=True))
    assert placed == {"x": (0, 0), "a": (1, 0), "b": (5, 7), "c": (2, 0), "y": (3, 0)}


def conv(into: int, out: int, stride: int = 1) -> nn.Module:
    return nn.Conv2d(into, out, 1, stride=stride)


@pytest.mark.parametrize(
    ("edges", "nodes", "options", "message"),
    [
        (
            [Edge(start="x", end="y", module=conv(1, 2)), Edge(start="x", end="y", name="b", module=conv(1, 3))],
            [],
            {},
            r"what enters 'y' must be of one shape to be added: \(2, 4, 4\) came first, \(3, 4, 4\) from 'b'",
        ),
        (
            [Edge(start="x", end="y", module=nn.Identity()), Edge(start="x", end="y", name="b", module=conv(1, 1, 2))],
            [],
            {},
            r"\(1, 4, 4\) came first, \(1, 2, 2\) from 'b'",
        ),
        ([Edge(start="x", end="y", module=conv(2, 2))], [], {}, r"'x>y' cannot take an input of shape \(1, 4, 4\)"),
        ([Edge(start="x", end="y", module=nn.Identity())] * 2, [], {}, "edge names must differ, got 'x>y' twice"),
        (
            [Edge(start="x", end="y", module=nn.Identity())],
            [Node(name="y"), Node(name="y")],
            {},
            "node names must differ, got y, y",
        ),
        ([Edge(start="x", end="y", module=nn.Identity())], [Node(name="z")], {}, "'z' lies on no path from 'x' to 'y'"),
        ([Edge(start="x", end="z", module=nn.Identity())], [], {}, "'z' lies on no path from 'x' to 'y'"),
        (
            [Edge(start="x", end="y", module=nn.Identity())],
            [],
            {"architectures": {"best": ["x>z"]}},
            "architecture 'best' keeps 'x>z', which is no edge",
        ),
        (
            [Edge(start="x", end="y", module=nn.Identity())],
            [Node(name="x", activation=nn.ReLU())],
            {},
            "the input 'x' takes no activation",
        ),
        (
            [Edge(start="x", end="y", module=nn.Identity())],
            [Node(name="y", activation=nn.MaxPool2d(2))],
            {},
            r"the activation of 'y' must keep the shape \(1, 4, 4\), got \(1, 2, 2\)",
        ),
    ],
)
def test_what_is_no_super_network(edges, nodes, options, message):
    with pytest.raises(GraphError, match=message):
        SuperNetwork(edges, input_shape=(1, 4, 4), nodes=nodes, **options)


def test_requests_that_do_not_fit_the_network():
    network = network_on(random_graph(0, nodes=4, extra=2))
    gates = network.gate_count
    with pytest.raises(ConfigError, match="4 architectures need at least as many examples, got 3"):
        network(images(network, 3), Sample(4))
    with pytest.raises(ConfigError, match=rf"an architecture of own is \(K, {gates}\), got \(1, {gates + 1}\)"):
        network.used(torch.ones(1, gates + 1))
    with pytest.raises(ConfigError, match="architectures of own are full, got 'small'"):
        network.architecture("small")


def test_building_and_evaluating_leave_modules_in_their_mode():
    """Some layers in training mode and some not, as a user may have set them."""
    module = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1).eval(), nn.Dropout())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    network = SuperNetwork([Edge(start="x", end="y", module=module)], input_shape=(1, 2, 2))
    with evaluating(network):
        assert not any(part.training for part in network.modules())
    assert [part.training for part in module] == [True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_the_full_network_is_what_always_on_runs():
    network = network_on(random_graph(1, nodes=5, extra=3)).eval()
    x = images(network, 3)
    assert torch.equal(network(x, full(network))[0], network(x, AlwaysOn())[0])


@pytest.mark.parametrize("place", ["node", "edge"])
def test_layers_that_work_in_place_leave_what_others_read(place: str):
    """An identity hands on the very tensor that a convolution beside it reads."""

    def built(inplace: bool) -> SuperNetwork:
        torch.manual_seed(0)
        relu = nn.ReLU(inplace=inplace)
        edges = [
            Edge(start="x", end="s", module=nn.Conv2d(1, 4, 3, padding=1), fixed=True),
            Edge(start="s", end="t", module=nn.Identity() if place == "node" else relu, fixed=True),
            Edge(start="s", end="u", module=nn.Conv2d(4, 4, 1), fixed=True),
            Edge(start="t", end="u", module=nn.Identity()),
        ]
        nodes = [Node(name="t", activation=relu)] if place == "node" else []
        return SuperNetwork(edges, input_shape=(1, 8, 8), sink="u", nodes=nodes).eval()

    x = images(built(False), 2)
    outputs = [network(x, full(network))[0] for network in (built(False), built(True))]
    assert torch.equal(*outputs)
    assert torch.equal(extract(built(True), built(True).architecture("full"))(x), outputs[0])


@pytest.mark.parametrize("module", [nn.BatchNorm2d(4), nn.BatchNorm2d(4, track_running_stats=False)])
def test_a_batch_norm_keeps_the_shape_it_is_made_for_and_takes_no_other(module: nn.Module):
    """Though shapes are found without it."""
    assert output_shape(module, (4, 8, 8), "norm") == (4, 8, 8)
    with pytest.raises(GraphError, match="'norm' cannot take an input of shape"):
        output_shape(module, (3, 8, 8), "norm")
