"""What is extracted is the architecture that was searched, bit for bit, in plain torch."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import connected, graphs, network_on, random_graph, stir
from torch import nn

from budgetnet import Edge, Node, SuperNetwork
from budgetnet.errors import ConfigError
from budgetnet.extraction import count, duplicate, extract, fold_batch_norm
from budgetnet.sites import Fixed
from budgetnet.spaces import conv_fabric, resnet_fabric

SPACES = {
    "conv": conv_fabric(width=3, depth=3, channels=4, classes=5, image_size=8),
    "segmentation": conv_fabric(width=3, depth=2, channels=3, classes=2, image_size=(4, 6), task="segmentation"),
    "resnet": resnet_fabric(width=2, channels=4, classes=5, image_size=8),
    "own": network_on(random_graph(3, nodes=6, extra=6), seed=3),
}


@pytest.fixture(params=SPACES.values(), ids=SPACES)
def network(request) -> SuperNetwork:
    return stir(copy.deepcopy(request.param), 0).eval()


def assert_same(one: object, other: object) -> None:
    """Two objects have the same values, tensors of their own, and nothing that changes in common."""
    assert type(one) is type(other)
    if isinstance(one, nn.Module):
        assert one is not other
        assert_same(vars(one), vars(other))
    elif isinstance(one, dict):
        assert one is not other
        assert list(one) == list(other)
        for name, value in one.items():
            assert_same(value, other[name])
    elif isinstance(one, torch.Tensor):
        assert one.data_ptr() != other.data_ptr()
        assert one.requires_grad == other.requires_grad
        assert torch.equal(one, other)
    else:
        assert one == other
        assert one is not other or not isinstance(one, set | list)


def test_a_copy_of_a_module_is_as_a_deep_copy_is(network: SuperNetwork):
    for module in network.modules_on_edges:
        module.note = ["of one's own"]
        module.register_forward_hook(print)
        for twin in (duplicate(module, {}), copy.deepcopy(module)):
            assert_same(twin, module)


def test_a_copy_has_in_common_what_the_module_has():
    layer = nn.Linear(2, 2)
    twin = duplicate(nn.Sequential(layer, nn.Sequential(nn.ReLU(), layer)), {})
    assert twin[0] is twin[1][1]
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    twin = duplicate(tied, {})
    assert twin[0].weight is twin[1].weight is not tied[0].weight


def images(network: SuperNetwork, count: int = 3) -> torch.Tensor:
    return torch.randn(count, *network.input_shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("seed", range(5))
def test_extracted_equals_searched_bit_for_bit(network: SuperNetwork, seed: int):
    kept = connected(network, 1, seed)
    x = images(network)
    expected, _ = network(x, Fixed(kept))
    assert torch.equal(extract(network, kept)(x), expected)


@settings(max_examples=20, deadline=None)
@given(graphs(nodes=6, extra=6), st.integers(0, 2**16))
def test_any_graph_is_extracted(graph, seed: int):
    """Depthwise and pointwise convolutions, learned activations, parallel edges, and identities all the way."""
    network = network_on(graph, seed=seed, fixed=[0] if seed % 2 else []).eval()
    kept = connected(network, 1, seed)
    assert torch.equal(extract(network, kept)(images(network)), network(images(network), Fixed(kept))[0])


def test_only_what_is_used_is_extracted(network: SuperNetwork):
    kept = connected(network, 1, seed=1)
    used = network.used(kept)[0].bool().tolist()
    modules = [module for module, bit in zip(network.modules_on_edges, used, strict=True) if bit]
    alive = {end for (_, end), bit in zip(network.graph.edges, used, strict=True) if bit}
    modules += [network.activations[node] for node in alive]
    expected = sum(value.numel() for module in modules for value in module.parameters())
    assert sum(value.numel() for value in extract(network, kept).parameters()) == expected


def test_the_source_stays_as_it_was_and_shares_nothing(network: SuperNetwork):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    plain = extract(network, network.architecture("full"))
    with torch.no_grad():
        for value in (*plain.parameters(), *plain.buffers()):
            value.zero_()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    folded = extract(network, network.architecture("full"))
    again = copy.deepcopy(folded.state_dict())
    fold_batch_norm(folded)
    assert all(torch.equal(value, again[name]) for name, value in folded.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_the_extracted_network_is_in_the_mode_of_its_source(network: SuperNetwork, training: bool):
    plain = extract(network.train(training), network.architecture("full"))
    assert {part.training for part in plain.modules()} == {training}


def test_the_extracted_network_knows_torch_alone(network: SuperNetwork):
    """Every part of it is torch's, and so is all that pickling it refers to."""
    for plain in (extract(network, connected(network, 1, seed=2)), extract(network, network.architecture("full"))):
        for made in (plain, fold_batch_norm(plain)):
            assert all(type(part).__module__.startswith("torch.") for part in made.modules())
            assert b"budgetnet" not in pickle.dumps(made)


@torch.no_grad()
def test_folding_batch_norm_changes_rounding_alone(network: SuperNetwork):
    """Sums round otherwise; 1e-5 of the largest output is some tens of float32's steps."""
    plain = extract(network, connected(network, 1, seed=3, probability=0.9))
    folded = fold_batch_norm(plain)
    x = images(network)
    expected = plain(x)
    torch.testing.assert_close(folded(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert any(isinstance(part, nn.BatchNorm2d) for part in plain.modules())
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())
    assert not folded.training


def test_a_batch_norm_that_follows_no_convolution_stays():
    edges = [Edge(start="x", end="y", module=nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 1)))]
    network = stir(SuperNetwork(edges, input_shape=(2, 3, 3)), 0).eval()
    plain = extract(network, network.architecture("full"))
    assert torch.equal(fold_batch_norm(plain)(images(network)), plain(images(network)))


def test_a_batch_norm_that_asks_its_own_batch_stays():
    layers = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, track_running_stats=False))
    network = SuperNetwork([Edge(start="x", end="y", module=layers)], input_shape=(2, 3, 3)).eval()
    plain = extract(network, network.architecture("full"))
    assert torch.equal(fold_batch_norm(plain)(images(network)), plain(images(network)))


class Between(nn.Module):
    """A module that does something between the layers of a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        conv, norm = self.layers
        return norm(conv(x).relu())


class Named(nn.Sequential):
    """A sequence with a name, as torchvision has them."""


@pytest.mark.parametrize("hooked", [False, True])
def test_batch_norms_are_folded_where_layers_are_surely_called_in_a_row(hooked: bool):
    inner = Named(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    if hooked:
        inner[0].register_forward_hook(lambda layer, given, value: value.relu())
    network = SuperNetwork([Edge(start="x", end="y", module=nn.Sequential(inner, Between()))], input_shape=(2, 3, 3))
    plain = extract(stir(network, 0).eval(), network.architecture("full"))
    folded = fold_batch_norm(plain)
    torch.testing.assert_close(folded(images(network)), plain(images(network)), rtol=0, atol=1e-5)
    assert sum(isinstance(part, nn.BatchNorm2d) for part in folded.modules()) == 1 + hooked


@pytest.mark.parametrize("kept", ["nothing", "cut"])
def test_what_connects_nothing_cannot_be_extracted(kept: str):
    network = SPACES["conv"]
    bits = torch.zeros(1, network.gate_count)
    if kept == "cut":  # all but the last column's entries
        bits = torch.tensor(
            [[float(not network.edge_names[edge].endswith(("l2.s0", "l2.s1", "l2.s2"))) for edge in network.choices]]
        )
    with pytest.raises(ConfigError, match="must connect input and output, got one that does not"):
        extract(network, bits)


def test_names_that_come_to_the_same_identifier_stay_two_modules():
    """`a_b>c` and `a>b_c` are both `a_b_c`; and a name may be one that every module has."""
    module = iter([nn.Conv2d(1, 1, 1) for _ in range(6)])
    pairs = [("x", "a"), ("x", "a_b"), ("a", "b_c"), ("a_b", "c"), ("b_c", "y"), ("c", "y")]
    edges = [Edge(start=a, end=b, module=next(module), name="train" if b == "a" else None) for a, b in pairs]
    network = stir(SuperNetwork(edges, input_shape=(1, 2, 2)), 0).eval()
    plain = extract(network, network.architecture("full"))
    assert torch.equal(plain(images(network)), network(images(network), Fixed(network.architecture("full")))[0])
    assert len(list(plain.parameters())) == 12


def test_counting_counts_sums_and_restores_the_mode():
    edges = [Edge(start="x", end="y", module=nn.Identity(), name=name) for name in "abc"]
    network = SuperNetwork(edges, input_shape=(2, 3, 3), nodes=[Node(name="y", activation=nn.Dropout())])
    plain = extract(network, network.architecture("full"))
    assert count(plain, torch.zeros(1, 2, 3, 3)) == {"macs": 2 * 18, "params": 0}
    assert plain.training
