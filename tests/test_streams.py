"""Streams: nodes that hold only the channels that gated layers write and read, and what that saves."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import grad

from budgetnet import Edge, Node, SuperNetwork, export
from budgetnet.assembly import Assembler
from budgetnet.costs import MACs, Memory, Params, Schedule, Transfer
from budgetnet.costs.footprints import peak_activations
from budgetnet.errors import ConfigError
from budgetnet.export import onnx_session
from budgetnet.extraction import count, extract, fold_batch_norm, state_bytes
from budgetnet.gated import ChannelGate, GatedSequential
from budgetnet.sites import Fixed, log_prob
from budgetnet.spaces import mobilenet_v2, resnet
from budgetnet.weights import learned

SEEDS = st.integers(0, 10**6)


def gate(random: Random, channels: int, lock: str | None, name: str, even: bool) -> ChannelGate:
    """At the end of a layer; groups of one size, so that the first is among the smallest; of 2 where all are `even`."""
    size = 2 if lock or even else random.choice([size for size in (1, 2, 3) if channels % size == 0])
    return ChannelGate(channels, size, always_open=1 if lock else random.randint(0, 1), lock=lock, name=name)


def network_of(seed: int, *, even: bool = False) -> SuperNetwork:
    """A stem, two streams of one to three nodes with blocks beside identities, and a classifier, all with gates."""
    random = Random(seed)
    edges, nodes, start, width = [], [], "x", 2
    before: str | None = None  # what the gates of the stream before are locked to
    for stream in range(2):
        channels, lock = random.choice([4, 6]), random.choice([None, f"locked{stream}"])
        reads = [gate(random, width, before, "in", even)] if stream else []
        conv = nn.Conv2d(width, channels, random.choice([1, 3]), padding=0, bias=random.random() < 0.5)
        conv.padding = (conv.kernel_size[0] // 2,) * 2
        layers = [*reads, conv, nn.BatchNorm2d(channels), gate(random, channels, lock, "out", even)]
        node = f"s{stream}"
        edges.append(Edge(start=start, end=node, module=GatedSequential(*layers), name=f"to{stream}", fixed=True))
        nodes.append(Node(name=node, activation=random.choice([None, nn.ReLU()])))
        for block in range(random.randint(0, 2)):
            ends = {"start": node, "end": (node := f"s{stream}.{block}")}
            layers = [
                gate(random, channels, random.choice([None, lock]), "in", even),
                *(nn.Conv2d(channels, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3), nn.ReLU()),
                *([ChannelGate(3, name="hidden")] if random.random() < 0.5 else []),
                *(nn.Conv2d(3, channels, 1, bias=False), nn.BatchNorm2d(channels)),
                gate(random, channels, lock, "out", even),
            ]
            edges += [
                Edge(**ends, module=nn.Identity(), name=f"skip{stream}.{block}", fixed=random.random() < 0.7),
                Edge(**ends, module=GatedSequential(*layers), name=f"b{stream}.{block}", fixed=random.random() < 0.5),
            ]
            nodes.append(Node(name=node, activation=random.choice([None, nn.ReLU()])))
        start, width, before = node, channels, lock
    head = [gate(random, width, before, "in", even), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)]
    edges.append(Edge(start=start, end="y", module=GatedSequential(*head), name="head", fixed=True))
    network = SuperNetwork(edges, input_shape=(2, 4, 4), nodes=nodes, start=0.0)
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules_on_edges.modules():
        if isinstance(module, nn.BatchNorm2d):
            for value, low in ((module.weight, 0.5), (module.bias, -1), (module.running_mean, -1)):
                value.data.uniform_(low, 1, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return network.eval()


def sampled(network: SuperNetwork, number: int, seed: int) -> Tensor:
    """`(number, G)` architectures from nearly empty to full."""
    generator = torch.Generator().manual_seed(seed)
    chance = torch.linspace(0.3, 1.0, number)[:, None]
    return torch.bernoulli(chance.expand(-1, network.gate_count), generator=generator)


def images(seed: int) -> Tensor:
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=10, deadline=None)
@given(SEEDS)
def test_run_masked_and_extracted_are_one_function_and_cost_what_the_models_say(seed: int):
    """By torch's counter, by the bytes of the state, and by following the values of the network that is extracted."""
    network, x = network_of(seed), images(seed)
    models = [cost.bind(network) for cost in (MACs(), Params(), Memory("params"), Memory("activations"))]
    for kept in sampled(network, 3, seed).split(1):
        used = network.used(kept)
        output = network(x, Fixed(kept))[0]
        torch.testing.assert_close(network.masked(x, Fixed(kept))[0], output)
        if not network.connects(used)[0]:
            continue
        plain = extract(network, kept)
        torch.testing.assert_close(plain(x), output)
        folded, counted = fold_batch_norm(plain), count(plain, x[:1])
        found = [counted["macs"], counted["params"], state_bytes(folded), peak_activations(folded, x[:1].clone())]
        assert found == [float(model(used)[0]) for model in models]


def test_all_those_networks_have_streams():
    found = [network_of(seed).streams for seed in range(12)]
    assert all(found)
    assert {len(stream.nodes) for streams in found for stream in streams} == {1, 2, 3}
    assert {len({end.gates for end in (*each.writers, *each.readers)}) for one in found for each in one} >= {1, 2, 3}


@settings(max_examples=3, deadline=None)
@given(SEEDS)
def test_the_file_that_is_assembled_is_the_extracted_network(seed: int):
    """Its outputs, and the bytes of what is exported, which a cost counts without exporting."""
    network, x = network_of(seed), images(seed)
    kept = sampled(network, 3, seed)[1:2]
    if not network.connects(network.used(kept))[0]:
        return
    plain = extract(network, kept)
    assembler = Assembler(network, runtime="onnxruntime", threads=1, batch=3, device="cpu")
    (output,) = onnx_session(assembler.onnx_model(kept).SerializeToString(), 1).run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), plain(x).detach(), atol=1e-5, rtol=1e-4)
    with TemporaryDirectory() as folder:
        path = export(fold_batch_norm(plain), Path(folder) / "plain.onnx", x)
        assert Memory("file").bind(network).measure(kept)[0].value == path.stat().st_size


@settings(max_examples=6, deadline=None)
@given(SEEDS)
def test_pathwise_is_used_with_the_gradient_of_flipping_a_gate(seed: int):
    """Where everything is open: a cost is linear in each gate there, shared or not, but for a group that stays open."""
    network = network_of(seed, even=True)
    model = MACs().bind(network)
    for kept in sampled(network, 3, seed).split(1):
        assert torch.equal(network.pathwise(kept.clone().requires_grad_()).detach(), network.used(kept))
    whole = torch.ones(1, network.gate_count, dtype=torch.float64, requires_grad=True)
    (gradient,) = grad(model(network.pathwise(whole)).sum(), whole)
    for column in range(network.gate_count):
        units = [unit for unit, own in enumerate(network.gate_of) if own == column]
        sites = [site for site in network.sites if any(site.units[0] <= unit < site.units[1] for unit in units)]
        if not sites or any(site.groups < 2 for site in sites):
            continue
        less = torch.ones(1, network.gate_count, dtype=torch.float64)
        less[0, column] = 0
        once = len(units) == 1  # of a gate that layers share, both what it reads and what it writes ends
        saved = float(model(network.used(whole.detach()))[0] - model(network.used(less))[0])
        found = float(gradient[0, column])
        assert found == pytest.approx(saved) if once else found >= saved - 1e-6


def chain(*, reader: str | None = None) -> SuperNetwork:
    """Two 1x1 convolutions on 2x2 pixels, 3 to 4 to 5 channels, with gates on the 4 between on both sides."""
    first = GatedSequential(nn.Conv2d(3, 4, 1, bias=False), ChannelGate(4, always_open=1, lock=reader, name="out"))
    second = GatedSequential(ChannelGate(4, always_open=1, lock=reader, name="in"), nn.Conv2d(4, 5, 1, bias=False))
    edges = [Edge(start="x", end="a", module=first, fixed=True), Edge(start="a", end="y", module=second, fixed=True)]
    return SuperNetwork(edges, input_shape=(3, 2, 2))


def test_a_channel_that_one_side_closes_costs_the_other_nothing():
    network = chain()
    (stream,), model = network.streams, MACs().bind(network)
    assert (stream.nodes, stream.channels) == ({1}, 4)
    for bits in product((0.0, 1.0), repeat=6):
        kept = torch.tensor([bits])
        both = 1 + int((kept[0, :3] * kept[0, 3:]).sum())
        assert float(model(network.used(kept))[0]) == 4 * (3 * both + both * 5)
        plain = extract(network, kept)
        assert [tuple(value.shape[:2]) for value in plain.parameters()] == [(both, 3), (5, both)]
        assert not list(plain.buffers())


def test_gates_that_both_sides_share_cost_once():
    """The derivative of n (3 + 5) at 4 pixels is that of one channel, not of its square."""
    network = chain(reader="one")
    assert network.gate_count == 3
    kept = torch.ones(1, 3, requires_grad=True)
    (gradient,) = grad(MACs().bind(network)(network.pathwise(kept)).sum(), kept)
    assert gradient[0].tolist() == [32, 32, 32]


def test_what_a_device_sends_and_workers_exchange_are_the_channels_that_are_held():
    network = chain(reader="one")
    kept = torch.tensor([[1.0, 0, 0], [1, 1, 1], [0, 0, 0]])
    used, held = network.used(kept), torch.tensor([2.0, 4, 1])
    assert Transfer(4 * 3 * 4).bind(network)(used).tolist() == [min(48, 16 * n) for n in (2, 4, 1)]
    one = Schedule(workers=2, speeds="1:1000000", link=1e-3).bind(network)(used)
    assert one[2] < one[0] < one[1]
    assert torch.equal(network.streams[0].share(used) * 4, held.double())


@settings(max_examples=4, deadline=None)
@given(SEEDS)
def test_the_score_function_of_relevant_gates_is_unbiased(seed: int):
    """All 2^G architectures are summed, so that the two gradients are equal but for rounding."""
    network = next(found for found in map(network_of, range(seed, seed + 500)) if found.gate_count <= 11)
    every = torch.tensor(list(product((0.0, 1.0), repeat=network.gate_count)))
    value = MACs().bind(network)(network.used(every)) / 1000
    logits = torch.randn(network.gate_count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits.requires_grad_()
    each = log_prob(logits.expand(len(every), -1), every.double(), torch.ones_like(every).double())
    (exact,) = grad((each.exp() * value).sum(), logits, retain_graph=True)
    counted = log_prob(logits.expand(len(every), -1), every.double(), network.relevant(every).double())
    (estimate,) = grad((each.exp().detach() * value * counted).sum(), logits)
    torch.testing.assert_close(estimate, exact)


def test_what_makes_something_of_zeros_reads_all_channels():
    """A batch norm before the gate gives a channel of zeros a value, and so does a sigmoid at the node."""
    first = GatedSequential(nn.Conv2d(3, 4, 1), ChannelGate(4, name="out"))
    norm = GatedSequential(nn.BatchNorm2d(4), ChannelGate(4, name="in"), nn.Conv2d(4, 5, 1))
    plain = GatedSequential(ChannelGate(4, name="in"), nn.Conv2d(4, 5, 1))
    for second, activation, streams in ((norm, None, 0), (plain, nn.Sigmoid(), 0), (plain, nn.ReLU(), 1)):
        edges = [Edge(start="x", end="a", module=first), Edge(start="a", end="y", module=second)]
        network = SuperNetwork(edges, input_shape=(3, 2, 2), nodes=[Node(name="a", activation=activation)])
        assert len(network.streams) == streams


def test_nothing_in_common_is_left_as_it_is():
    """The second layer reads zeros, and says what it makes of them: it is no dead branch."""
    first = GatedSequential(nn.Conv2d(3, 2, 1), ChannelGate(2, name="out"))
    second = GatedSequential(ChannelGate(2, name="in"), nn.Conv2d(2, 5, 1))
    edges = [Edge(start="x", end="a", module=first, fixed=True), Edge(start="a", end="y", module=second, fixed=True)]
    network, x = SuperNetwork(edges, input_shape=(3, 2, 2)), torch.randn(2, 3, 2, 2)
    kept = torch.tensor([[1.0, 0, 0, 1]])
    expected = second[1].bias.reshape(1, 5, 1, 1).expand(2, 5, 2, 2)
    for output in (network(x, Fixed(kept))[0], network.masked(x, Fixed(kept))[0], extract(network, kept)(x)):
        torch.testing.assert_close(output, expected)
    assert count(extract(network, kept), x[:1])["macs"] == float(MACs().bind(network)(network.used(kept))[0])


@pytest.mark.parametrize("lock", [False, True])
def test_a_resnet_of_streams_is_a_narrower_resnet(lock: bool):
    """With all blocks and half of all channels it is the ResNet of half the width, in every count."""
    network = resnet(depth=14, channels=8, where="stream", lock=lock, granularity=2)
    half = resnet(depth=14, channels=4, gates="none")
    kept = torch.zeros(1, network.gate_count)
    for site in network.sites:
        for unit in range(site.units[0], site.units[0] + site.groups // 2):
            if (column := network.gate_of[unit]) is not None:
                kept[0, column] = 1
    x = torch.zeros(1, 3, 32, 32)
    assert count(extract(network, kept), x) == count(extract(half, torch.zeros(1, 0)), x)


def test_a_locked_mobilenet_is_dense_and_its_stages_narrower():
    network = mobilenet_v2(classes=10, image_size=32, where="ends", lock=True)
    kept = torch.bernoulli(torch.full((1, network.gate_count), 0.5), generator=torch.Generator().manual_seed(0))
    plain = extract(network.eval(), kept)
    assert torch.index_select not in {node.target for node in plain.graph.nodes}
    assert count(plain, torch.zeros(1, 3, 32, 32))["macs"] == float(MACs().bind(network)(network.used(kept))[0])
    assert len(network.streams) == 7


def test_torchvisions_names_do_not_depend_on_where_gates_are():
    with torch.device("meta"):
        for make in (lambda where: resnet(depth=50, where=where), lambda where: mobilenet_v2(where=where)):
            assert list(learned(make("stream"))) == list(learned(make("hidden")))


def test_streams_are_of_gates_that_do_not_look_at_the_input():
    with pytest.raises(ConfigError, match="where stream is of gates that do not look at the input"):
        resnet(depth=8, where="stream", conditional=True)
    assert not resnet(depth=8, where="ends", conditional=True).streams
