"""Channels that are masked, cut, narrowed and extracted give one network, and it costs what its cost model says."""

from __future__ import annotations

import copy
import re
from itertools import pairwise, product
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import every
from torch import Tensor, nn
from torch.autograd import grad

from budgetnet import Budget, Edge, Node, SuperNetwork
from budgetnet.architectures import describe, named
from budgetnet.costs import Activation, MACs, Params, Steps
from budgetnet.errors import FileError, GraphError
from budgetnet.extraction import count, extract
from budgetnet.gated import ChannelGate, GatedSequential
from budgetnet.projection import filled, keeps, probable, trimmed
from budgetnet.runs import RunFolder
from budgetnet.sites import Fixed, Gumbel, Sample, log_prob
from budgetnet.spaces import resnet

SEEDS = st.integers(0, 2**16)


def gate(random: Random, channels: int, name: str, **given) -> ChannelGate:
    """Of any granularity, so that the last group is often smaller, or the only one."""
    return ChannelGate(channels, random.randint(1, channels), name=name, **given)


def convolutions(random: Random, widths: list[int], chance: float = 0.7, **given) -> list[nn.Module]:
    """Convolutions with what stands between them in ResNets and MobileNets; a gate wherever one can be, by chance."""
    layers: list[nn.Module] = [gate(random, widths[0], "input", **given)] if random.random() < chance else []
    for place, (into, out) in enumerate(pairwise(widths)):
        kernel, mode = random.choice((1, 3)), random.choice(("zeros", "replicate"))
        conv = nn.Conv2d(into, out, kernel, padding=kernel // 2, bias=random.random() < 0.5, padding_mode=mode)
        layers += [conv, nn.BatchNorm2d(out), random.choice((nn.ReLU(), nn.ReLU6(), nn.Identity()))]
        if random.random() < 0.4:  # as in an inverted residual
            layers += [nn.Conv2d(out, out, 3, padding=1, groups=out), nn.BatchNorm2d(out), nn.ReLU6()]
        if random.random() < chance:
            behind = (nn.ReLU(), nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1), nn.Identity())
            layers += [gate(random, out, f"site{place}", **given), random.choice(behind)]
    return layers


def linears(random: Random, widths: list[int]) -> list[nn.Module]:
    layers: list[nn.Module] = [gate(random, widths[0], "input")] if random.random() < 0.7 else []
    for place, (into, out) in enumerate(pairwise(widths)):
        layers += [nn.Linear(into, out, bias=random.random() < 0.5), nn.ReLU()]
        layers += [gate(random, out, f"site{place}")] if random.random() < 0.7 else []
    return layers


def sequence(seed: int) -> tuple[GatedSequential, Tensor]:
    """One to three convolutions or linear layers, in float64, with weights and statistics that hide nothing."""
    random = Random(seed)
    widths = [random.randint(1, 7) for _ in range(random.randint(2, 4))]
    if random.random() < 0.25:
        layers, shape = linears(random, widths), (4, widths[0])
    else:
        layers, shape = convolutions(random, widths), (4, widths[0], 5, 5)
        if random.random() < 0.3:  # strides
            layers = [strided(layer) if isinstance(layer, nn.Conv2d) else layer for layer in layers]
    generator = torch.Generator().manual_seed(seed)
    module = stirred(GatedSequential(*layers), generator).double()
    return module, torch.randn(shape, generator=generator, dtype=torch.float64)


def strided(conv: nn.Conv2d) -> nn.Conv2d:
    conv.stride = (2, 2)
    return conv


def stirred(module: nn.Module, generator: torch.Generator) -> nn.Module:
    with torch.no_grad():
        for value in module.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) / max(1, value[0].numel()) ** 0.5)
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_mean.copy_(torch.randn(part.num_features, generator=generator))
                part.running_var.copy_(torch.rand(part.num_features, generator=generator) + 0.5)
    return module


def bits_of(module: GatedSequential, seed: int) -> Tensor:
    """`(groups,)` random bits, at least one open at each site."""
    random, bits = Random(seed), []
    for site in module.sites:
        own = [random.random() < 0.6 for _ in range(site.groups)]
        own[random.randrange(site.groups)] = True
        bits += own
    return torch.tensor(bits, dtype=torch.float64)


def weights(module: nn.Module) -> list[Tensor]:
    return list(module.parameters())


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_masked_cut_and_narrowed_are_one_function(seed: int):
    module, x = sequence(seed)
    module.eval()
    bits = bits_of(module, seed)
    masked = module.masked(x, bits[None])
    torch.testing.assert_close(module.cut(x, bits), masked)
    plain, into, out = module.narrowed(bits)
    part = plain(x if into is None else x[:, into])
    torch.testing.assert_close(part if out is None else torch.zeros_like(masked).index_copy(1, out, part), masked)
    assert not any(isinstance(layer, ChannelGate) for layer in plain)
    torch.testing.assert_close(module.masked(x, torch.ones_like(bits)[None]), module(x))
    torch.testing.assert_close(module.masked(x, bits.expand(len(x), -1)), masked)


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_gradients_of_what_is_cut_are_those_of_masking(seed: int):
    module, x = sequence(seed)
    module.eval()
    bits = bits_of(module, seed)
    target = torch.randn_like(module.masked(x, bits[None]))
    x.requires_grad_()
    ours = grad((module.cut(x, bits) * target).sum(), [x, *weights(module)], allow_unused=True)
    theirs = grad((module.masked(x, bits[None]) * target).sum(), [x, *weights(module)], allow_unused=True)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference)


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.sampled_from([0.1, None]))
def test_in_training_statistics_move_of_open_channels_alone_and_as_when_masked(seed: int, momentum: float | None):
    """What a batch norm sees of an open channel is the same; of a closed one `cut` sees nothing."""
    module, x = sequence(seed)
    bits = bits_of(module, seed)
    for part in module:
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = momentum
    other, before = copy.deepcopy(module), copy.deepcopy(module)
    for _ in range(2):
        torch.testing.assert_close(module.cut(x, bits), other.masked(x, bits[None]))
    kept = module.indices(bits)
    for layer in module.layout:
        part = module[layer.index]
        if isinstance(part, nn.BatchNorm2d):
            open_channels = torch.ones(part.num_features, dtype=torch.bool)
            if layer.behind is not None and kept[layer.behind] is not None:
                open_channels[:] = False
                open_channels[kept[layer.behind]] = True
            for name in ("running_mean", "running_var"):
                mine, masked, old = (getattr(each[layer.index], name) for each in (module, other, before))
                torch.testing.assert_close(mine[open_channels], masked[open_channels])
                assert torch.equal(mine[~open_channels], old[~open_channels])
                assert not torch.equal(mine[open_channels], old[open_channels])
            assert part.num_batches_tracked == 2


def test_a_site_without_layers_that_mix_selects_channels():
    """A gate in front of a pool: what it reads is what it writes."""
    module = GatedSequential(ChannelGate(3, 2), nn.AvgPool2d(2))
    x = torch.arange(12.0).reshape(1, 3, 2, 2)
    for bits, expected in (((0, 1), [0, 0, 9.5]), ((1, 0), [1.5, 5.5, 0])):
        assert module.cut(x, torch.tensor(bits)).flatten().tolist() == expected
        assert module.masked(x, torch.tensor([bits])).flatten().tolist() == expected


def test_a_part_of_a_sequence_is_a_sequence():
    module = GatedSequential(nn.Conv2d(2, 4, 1), ChannelGate(4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    assert isinstance(module[:3], GatedSequential)
    assert (module[:3].groups, module[3:].groups) == (2, 0)
    x = torch.randn(2, 4, 3, 3)
    assert torch.equal(module[3:].cut(x, torch.ones(0)), module[3](x))


def test_sizes_of_groups():
    assert [ChannelGate(*given).sizes for given in ((6, 2), (7, 3), (2, 5), (3,))] == [
        [2, 2, 2],
        [3, 3, 1],
        [2],
        [1, 1, 1],
    ]
    assert ChannelGate(7, 3).spread(torch.tensor([[1, 0, 1]])).tolist() == [[1, 1, 1, 0, 0, 0, 1]]
    assert ChannelGate(7, 3).spread(torch.tensor([0, 0, 5])).tolist() == [0, 0, 0, 0, 0, 0, 5]
    assert "hidden: 3 groups of 3, 1 always open" in repr(ChannelGate(7, 3, always_open=1))


def conv(into: int, out: int, **given) -> nn.Module:
    return nn.Conv2d(into, out, 1, **given)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ChannelGate(0), "a gate needs channels and granularity >= 1, got 0 and 1"),
        (lambda: ChannelGate(2, 0), "a gate needs channels and granularity >= 1, got 2 and 0"),
        (lambda: ChannelGate(4, 2, always_open=3), "always_open must lie in 0 to 2 groups, got 3"),
        (lambda: ChannelGate(4, 2, always_open=-1), "always_open must lie in 0 to 2 groups, got -1"),
        (
            lambda: GatedSequential(ChannelGate(2), conv(2, 2), ChannelGate(2)),
            "sites of one sequence need different names, got hidden, hidden",
        ),
        (
            lambda: GatedSequential(conv(1, 2), ChannelGate(2), nn.ReLU(), ChannelGate(2, name="b")),
            "one gate decides on a layer's channels, got a second one, 'b'",
        ),
        (
            lambda: GatedSequential(conv(1, 3), ChannelGate(2)),
            "'hidden' must gate the 3 channels there, got 2",
        ),
        (
            lambda: GatedSequential(nn.BatchNorm2d(3), ChannelGate(2)),
            "'hidden' must gate the 3 channels there, got 2",
        ),
        (
            lambda: GatedSequential(ChannelGate(2), conv(3, 2)),
            "Conv2d must read the 2 channels there, got 3",
        ),
        (
            lambda: GatedSequential(ChannelGate(2), nn.BatchNorm2d(2)),
            "BatchNorm2d behind a gate gives a closed channel a value: gate behind it",
        ),
        (
            lambda: GatedSequential(ChannelGate(2), conv(2, 2, groups=2)),
            "Conv2d behind a gate gives a closed channel a value: gate behind it",
        ),
        (
            lambda: GatedSequential(conv(2, 4), ChannelGate(4), conv(4, 4, groups=2)),
            r"a gated layer must be a convolution without groups or linear, got Conv2d\(4, 4, .*groups=2\)",
        ),
        (
            lambda: GatedSequential(conv(2, 4), ChannelGate(4), nn.Flatten()),
            r"a gated layer must be a convolution without groups or linear, got Flatten\(",
        ),
        (
            lambda: GatedSequential(nn.ConvTranspose2d(2, 4, 1), ChannelGate(4)),
            r"a gated layer must be a convolution without groups or linear, got ConvTranspose2d\(",
        ),
    ],
)
def test_gates_that_cannot_stand_there(make, message):
    with pytest.raises(GraphError, match=f"^{message}") as raised:
        make()
    assert "\n" not in str(raised.value)


def block(random: Random, channels: int, **given) -> GatedSequential:
    """A residual branch that has at least one site."""
    while True:
        widths = [channels, *(random.randint(1, 6) for _ in range(random.randint(0, 2))), channels]
        layers = convolutions(random, widths, **given)
        if any(isinstance(layer, ChannelGate) for layer in layers):
            return GatedSequential(*layers)


def gated_network(seed: int, *, blocks: int = 2, lock: bool = False, widest: int = 5) -> SuperNetwork:
    """Residual blocks whose branches, some with a gate of their own, have gates on their channels."""
    random = Random(seed)
    channels = random.randint(2, widest)
    stem = [nn.Conv2d(2, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
    edges = [
        Edge(
            start="x",
            end="b0",
            module=GatedSequential(*stem, ChannelGate(channels, 2, always_open=random.randint(0, 1))),
            fixed=random.random() < 0.7,
            name="stem",
        )
    ]
    for place in range(blocks):
        ends = {"start": f"b{place}", "end": f"b{place + 1}"}
        branch = block(random, channels, **({"lock": "twin"} if lock else {}))
        edges += [
            Edge(**ends, module=nn.Identity(), name=f"skip{place}", fixed=random.random() < 0.7),
            Edge(**ends, module=branch, name=f"block{place}", fixed=random.random() < 0.5),
        ]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3))
    edges.append(Edge(start=f"b{blocks}", end="y", module=head, name="head", fixed=True))
    nodes = [Node(name=f"b{place}", activation=random.choice((nn.ReLU(), nn.PReLU()))) for place in range(1, blocks)]
    network = SuperNetwork(edges, input_shape=(2, 4, 4), nodes=nodes, start=0.0)
    stirred(network.modules_on_edges, torch.Generator().manual_seed(seed))
    return network.double().eval()


def sampled(network: SuperNetwork, count: int, seed: int) -> Tensor:
    """`(count, G)` architectures from nearly empty to nearly full."""
    generator = torch.Generator().manual_seed(seed)
    chance = torch.linspace(0.2, 1.0, count)[torch.randperm(count, generator=generator)]
    return torch.bernoulli(chance[:, None].expand(-1, network.gate_count), generator=generator)


def computed(network: SuperNetwork, kept: Tensor) -> Tensor:
    """`(K, U)` used units, groups where their edge is used."""
    used = network.used(kept)
    for site in network.sites:
        used[:, slice(*site.units)] *= used[:, [site.edge]]
    return used


def images(count: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=12, deadline=None)
@given(SEEDS, st.booleans())
def test_run_masked_and_extracted_are_one_function_and_cost_what_the_model_says(seed: int, lock: bool):
    """MACs and parameters by torch's counter, on the network that is extracted."""
    network = gated_network(seed, lock=lock)
    models = {"macs": MACs().bind(network), "params": Params().bind(network)}
    x = images(seed=seed)
    for kept in sampled(network, 4, seed).split(1):
        used = network.used(kept)
        output = network(x, Fixed(kept))[0]
        torch.testing.assert_close(network.masked(x, Fixed(kept))[0], output)
        if network.connects(used)[0]:
            plain = extract(network, kept)
            torch.testing.assert_close(plain(x), output)
            assert count(plain, x[:1]) == {name: float(model(used)[0]) for name, model in models.items()}
        else:
            assert not output.any()
            assert all(float(model(used)[0]) == 0 for model in models.values())


@pytest.mark.parametrize("seed", range(6))
def test_costs_of_hundreds_of_architectures_are_counted_on_what_is_extracted(seed: int):
    network = gated_network(seed, blocks=3, lock=seed == 0, widest=7)
    kept = sampled(network, 64, seed)
    used = network.used(kept)
    costs = [cost.bind(network)(used).tolist() for cost in (MACs(), Params())]
    seen = set()
    for row, connected, macs, params in zip(kept, network.connects(used), *costs, strict=True):
        if connected:
            assert count(extract(network, row[None]), images(1)) == {"macs": macs, "params": params}
            seen.add((macs, params))
    assert len(seen) > 10


@settings(max_examples=8, deadline=None)
@given(SEEDS)
def test_architectures_of_a_batch_predict_what_each_predicts_alone(seed: int):
    network = gated_network(seed)
    kept, x = sampled(network, 3, seed), images(7, seed)
    output, _ = network(x, Fixed(kept))
    alone = [network(part, Fixed(row[None]))[0] for part, row in zip(x.tensor_split(3), kept, strict=True)]
    torch.testing.assert_close(output, torch.cat(alone))
    torch.testing.assert_close(network.masked(x, Fixed(kept))[0], output)
    assert torch.equal(network.used(kept.bool()), network.used(kept).bool())
    assert torch.equal(network.relevant(kept.bool()), network.relevant(kept).bool())
    for cost in (MACs(), Params(), Steps(2)):
        model = cost.bind(network)
        assert torch.equal(model(network.used(kept.bool())), model(network.used(kept)))


@settings(max_examples=6, deadline=None)
@given(SEEDS)
def test_open_channels_all_cost_what_the_whole_module_counts(seed: int):
    network = gated_network(seed)
    used = network.used(network.architecture("full"))
    for cost in (MACs(), MACs("paper"), Params()):
        model = cost.bind(network)
        for edge, inside in model.channels.items():
            assert float(inside(used)[0]) == float(model.per_edge[edge])


def test_the_papers_count_of_an_upsampling_convolution_holds_for_its_channels():
    layers = [nn.Upsample(scale_factor=2), nn.Conv2d(2, 4, 3, padding=1), ChannelGate(4)]
    network = SuperNetwork([Edge(start="x", end="y", module=GatedSequential(*layers))], input_shape=(2, 4, 4))
    half = network.used(torch.tensor([[1.0, 1, 0, 1, 0]]))
    assert float(MACs().bind(network)(half)[0]) == 2 * 2 * 9 * 64
    assert float(MACs("paper").bind(network)(half)[0]) == 2 * 2 * 9 * 16


def test_channels_of_vectors_and_gates_alone_are_extracted_too():
    """A linear branch between vectors, whose output channels are scattered, and a branch of nothing but a gate."""
    edges = [
        Edge(start="x", end="v", module=nn.Flatten(), fixed=True),
        Edge(start="v", end="w", module=GatedSequential(ChannelGate(6, 2)), name="gate"),
        Edge(start="v", end="w", module=GatedSequential(nn.Linear(6, 6), ChannelGate(6, 4)), name="linear"),
        Edge(start="w", end="y", module=nn.Linear(6, 3), fixed=True),
    ]
    network = SuperNetwork(edges, input_shape=(6, 1, 1)).double()
    macs, x = MACs().bind(network), torch.randn(3, 6, 1, 1, dtype=torch.float64)
    for kept in every(network.gate_count).split(1):
        used = network.used(kept)
        if network.connects(used)[0]:
            plain = extract(network, kept)
            torch.testing.assert_close(plain(x), network(x, Fixed(kept))[0])
            torch.testing.assert_close(plain(x), network.masked(x, Fixed(kept))[0])
            assert count(plain, x[:1])["macs"] == float(macs(used)[0])


def residual(*sites: ChannelGate, fixed: bool = False) -> SuperNetwork:
    """One branch beside a shortcut; each site behind a convolution of 4 channels."""
    layers = [layer for site in sites for layer in (nn.Conv2d(4, 4, 1), site)]
    edges = [
        Edge(start="x", end="y", module=nn.Identity(), name="skip", fixed=True),
        Edge(start="x", end="y", module=GatedSequential(*layers, nn.Conv2d(4, 4, 1)), name="branch", fixed=fixed),
    ]
    return SuperNetwork(edges, input_shape=(4, 3, 3))


def test_an_edge_with_a_site_closed_altogether_is_dropped():
    """Gates: the branch, then two of each site."""
    network = residual(ChannelGate(4, 2, name="a"), ChannelGate(4, 3, name="b"))
    network.eval()
    assert network.unit_names() == ["skip", "branch", "branch.a[0]", "branch.a[1]", "branch.b[0]", "branch.b[1]"]
    assert network.gate_of == (None, 0, 1, 2, 3, 4)
    x = torch.randn(2, 4, 3, 3)
    closed = torch.tensor([[1.0, 0, 0, 1, 1]])
    assert torch.equal(network(x, Fixed(closed))[0], x)
    assert torch.equal(network.masked(x, Fixed(closed))[0], x)
    assert torch.equal(extract(network, closed)(x), x)
    assert network.used(closed)[0, :2].tolist() == [1, 0]
    # the sum of one input costs nothing but a step
    assert [cost.bind(network)(network.used(closed)).item() for cost in (MACs(), Params(), Steps(1))] == [0, 0, 1]
    assert trimmed(network, closed).tolist() == [[0, 0, 0, 0, 0]]
    # opening "a" would bring the branch back; its own gate and those of "b" cannot matter
    assert network.relevant(closed).tolist() == [[0, 1, 1, 0, 0]]
    assert network.relevant(torch.tensor([[1.0, 0, 0, 0, 0]])).tolist() == [[0, 0, 0, 0, 0]]
    assert network.relevant(torch.tensor([[0.0, 1, 0, 0, 1]])).tolist() == [[1, 0, 0, 0, 0]]
    assert network.relevant(torch.tensor([[1.0, 1, 0, 0, 1]])).tolist() == [[1, 1, 1, 1, 1]]


def test_groups_that_are_always_open_have_no_gate():
    network = residual(ChannelGate(4, 1, always_open=2), fixed=True)
    assert network.gate_of == (None, None, None, None, 0, 1)
    assert network.decisions(torch.tensor([[0.0, 1.0]])).tolist() == [[1, 1, 1, 1, 0, 1]]
    assert network.of_edges(()).tolist() == [[0, 0]]


@settings(max_examples=12, deadline=None)
@given(SEEDS)
def test_a_gate_is_relevant_just_where_it_changes_what_is_computed(seed: int):
    network = gated_network(seed, blocks=1, widest=3)
    kept = sampled(network, 64, seed)
    for gate in range(network.gate_count):
        flipped = kept.clone()
        flipped[:, gate] = 1 - flipped[:, gate]
        changes = (computed(network, kept) != computed(network, flipped)).any(dim=1)
        assert torch.equal(network.relevant(kept)[:, gate].bool(), changes)


def score_gradients(network: SuperNetwork, seed: int) -> tuple[Tensor, Tensor]:
    """Gradients of `E[cost + f(what is computed)]`: exact, and of the score function over the relevant gates."""
    generator = torch.Generator().manual_seed(seed)
    kept = every(network.gate_count, torch.float64)
    used = computed(network, kept)
    _, which = used.unique(dim=0, return_inverse=True)
    anything = torch.randn(int(which.max()) + 1, generator=generator, dtype=torch.float64)
    total = anything[which] + MACs().bind(network)(used) / 1000
    logits = torch.randn(network.gate_count, generator=generator, dtype=torch.float64).requires_grad_()
    probability = log_prob(logits, kept, torch.ones_like(kept)).exp()
    torch.testing.assert_close(probability.sum().item(), 1.0)
    (exact,) = grad(probability @ total, logits)
    score = log_prob(logits, kept, network.relevant(kept))
    (estimate,) = grad((probability.detach() * total) @ score, logits)
    return exact, estimate


@settings(max_examples=12, deadline=None)
@given(SEEDS, st.booleans())
def test_the_score_function_of_relevant_gates_is_unbiased(seed: int, lock: bool):
    """All 2^G architectures are summed, so that the two gradients are equal but for rounding."""
    network = gated_network(seed, blocks=1, widest=3, lock=lock)
    if network.gate_count > 11:
        return
    exact, estimate = score_gradients(network, seed)
    torch.testing.assert_close(estimate, exact)


def locked() -> SuperNetwork:
    """Two blocks whose hidden channels, 3 in 2 groups, share their gates; the second block has a gate of its own."""
    edges = []
    for place in range(2):
        ends = {"start": "xab"[place], "end": "ab"[place]}
        layers = [nn.Conv2d(2, 3, 1), ChannelGate(3, 2, lock="twin"), nn.Conv2d(3, 2, 1), ChannelGate(2, name="out")]
        edges += [
            Edge(**ends, module=nn.Identity(), name=f"skip{place}", fixed=True),
            Edge(**ends, module=GatedSequential(*layers), name=f"block{place}", fixed=place == 0),
        ]
    edges.append(Edge(start="b", end="y", module=nn.Flatten(), name="head", fixed=True))
    return SuperNetwork(edges, input_shape=(2, 2, 2))


@pytest.mark.parametrize(
    ("where", "lock", "gathers"),
    [("hidden", True, False), ("ends", False, True), ("ends", True, False), ("stream", False, False)],
)
def test_locked_channels_leave_a_dense_network(where: str, lock: bool, gathers: bool):
    """One that gathers no channels, unlike gates of each branch on what its shortcut passes on."""
    network = resnet(depth=14, channels=8, in_channels=1, image_size=8, granularity=4, where=where, lock=lock)
    plain = extract(network, torch.arange(network.gate_count).remainder(2).float()[None])
    assert (torch.index_select in {node.target for node in plain.graph.nodes}) == gathers


def test_locked_sites_share_their_gates():
    network = locked()
    # edges, then hidden and out of block0, then those of block1
    assert network.gate_of == (None, None, None, 0, None, *(1, 2), *(3, 4), *(1, 2), *(5, 6))
    kept = torch.tensor([[0.0, 0, 1, 1, 0, 0, 1]])
    assert network.decisions(kept)[0, 5:].tolist() == [0, 1, 1, 0, 0, 1, 0, 1]
    assert trimmed(network, kept).tolist() == [[0, 0, 1, 1, 0, 0, 0]]
    units = torch.zeros(1, network.units)
    units[0, [3, 10]] = 1  # the edge of block1, and the second group of its hidden channels alone
    assert network.gates_of(units).tolist() == [[1, 0, 1, 0, 0, 0, 0]]
    assert network.relevant(kept).tolist() == [[1, 1, 1, 1, 1, 0, 0]]
    exact, estimate = score_gradients(network, 0)
    torch.testing.assert_close(estimate, exact)


def test_open_gates_are_counted_once_where_sites_share_them():
    """A shared gate counts in the part of its sites whose edge is used."""
    network = locked()
    model = Activation().bind(network)
    kept = torch.tensor([[1.0, 1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1, 1], [1, 1, 0, 1, 0, 1, 0], [0, 1, 0, 1, 1, 1, 1]])
    assert model(network.used(kept)).tolist() == [7, 6, 4, 2.5]
    first = kept[:1].clone().requires_grad_()
    (gradient,) = grad(model(network.pathwise(first)).sum(), first)
    assert gradient[0].tolist()[1:] == [1] * 6
    assert Budget.parse("activation<=50%").bind(resnet(depth=20, lock=True)).full == 208


@settings(max_examples=10, deadline=None)
@given(SEEDS)
def test_pathwise_is_used_with_a_gradient(seed: int):
    network = gated_network(seed)
    kept = sampled(network, 5, seed).requires_grad_()
    used = network.pathwise(kept)
    assert torch.equal(used.detach(), network.used(kept.detach()))
    model = MACs().bind(network)
    torch.testing.assert_close(model(used).detach(), model(network.used(kept.detach())))


def test_a_dropped_edge_that_could_matter_has_a_gradient():
    network = residual(ChannelGate(4, 2))
    for bits, expected in (((0, 1, 1), 1.0), ((1, 1, 1), 1.0), ((0, 0, 0), 0.0)):
        kept = torch.tensor([bits], dtype=torch.float64, requires_grad=True)
        (gradient,) = grad(network.pathwise(kept)[0, 1], kept)
        assert gradient.tolist() == [[expected, 0, 0]]


def test_the_gradient_of_a_cost_at_bits_is_what_flipping_a_gate_costs():
    """Where all else is used a cost is linear in each gate; the sites have two groups, so that one stays open."""
    layers = [
        *(ChannelGate(4, 2, name="in"), nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU()),
        *(ChannelGate(5, 3), nn.Conv2d(5, 4, 1), ChannelGate(4, 3, name="out")),
    ]
    edges = [
        Edge(start="x", end="a", module=nn.Identity(), name="skip", fixed=True),
        Edge(start="x", end="a", module=GatedSequential(*layers), name="branch"),
        Edge(start="x", end="a", module=nn.Conv2d(4, 4, 1), name="other"),
        Edge(start="a", end="y", module=nn.Flatten(), fixed=True),
    ]
    network = SuperNetwork(edges, input_shape=(4, 3, 3))
    full = network.architecture("full").double()
    for cost, gate in product((MACs(), Params()), range(network.gate_count)):
        model = cost.bind(network)
        without = full.clone()
        without[0, gate] = 0
        difference = float(model(network.used(full)) - model(network.used(without)))
        for point in (full, without):
            kept = point.clone().requires_grad_()
            (gradient,) = grad(model(network.pathwise(kept)).sum(), kept)
            assert gradient[0, gate].item() == pytest.approx(difference)
        assert difference > 0


def test_gumbel_samples_give_channels_a_gradient_through_prediction_and_cost():
    network = residual(ChannelGate(4, 2, name="a"), ChannelGate(4, 3, name="b"))
    network.gates.reset(0.5)
    x = torch.randn(16, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    output, kept = network(x, Gumbel(8, generator=torch.Generator().manual_seed(0)))
    assert kept.shape == (8, 5)
    assert kept.unique().tolist() == [0, 1]
    torch.testing.assert_close(output, network(x, Fixed(kept.detach()))[0])
    for value in (output.square().sum(), MACs().bind(network)(network.pathwise(kept)).sum()):
        (gradient,) = grad(value, network.gates.values, retain_graph=True)
        assert (gradient != 0).all()


def test_one_row_has_no_batch_statistics_masked_or_not():
    network = gated_network(0).train()
    x, kept = images(1), network.architecture("full").double()
    before = copy.deepcopy(network.state_dict())
    output = network(x, Fixed(kept))[0]
    torch.testing.assert_close(network(x, Fixed(kept.requires_grad_()))[0], output)
    torch.testing.assert_close(output, network.eval()(x, Fixed(kept.detach()))[0])
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_what_reaches_no_output_predicts_zeros_whatever_its_activation_makes_of_them():
    edges = [Edge(start="x", end="y", module=GatedSequential(nn.Conv2d(1, 2, 1), ChannelGate(2)))]
    network = SuperNetwork(edges, input_shape=(1, 2, 2), nodes=[Node(name="y", activation=nn.Softmax(dim=1))])
    kept = torch.tensor([[1.0, 0, 1], [1.0, 0, 0], [0.0, 1, 1]])
    x = torch.randn(6, 1, 2, 2)
    output = network(x, Fixed(kept))[0]
    assert output[:2].all()
    assert not output[2:].any()
    torch.testing.assert_close(network.masked(x, Fixed(kept))[0], output)


@settings(max_examples=10, deadline=None)
@given(SEEDS, st.booleans())
def test_the_cheapest_architecture_is_the_cheapest_of_all(seed: int, lock: bool):
    """By enumeration, also where some groups are always open and where an edge of fewer groups is cheaper."""
    network = gated_network(seed, blocks=1, widest=3)
    if network.gate_count > 11:
        return
    used = network.used(every(network.gate_count))
    for cost in (MACs(), Params()):
        budget = Budget(cost, at_most="50%").bind(network)
        costs = budget.model(used)[network.connects(used)]
        cheapest = network.used(budget.cheapest(network))
        assert network.connects(cheapest)[0]
        assert float(budget.model(cheapest)[0]) == float(costs.min())


def test_groups_that_are_always_open_are_part_of_the_cheapest_path():
    """A narrow path all of whose channels stay open, and a wide one that can be slimmed to less."""

    def path(channels: int, always_open: int) -> GatedSequential:
        return GatedSequential(
            nn.Conv2d(2, channels, 1), ChannelGate(channels, 1, always_open=always_open), nn.Conv2d(channels, 2, 1)
        )

    edges = [
        Edge(start="x", end="y", module=path(4, 4), name="narrow"),
        Edge(start="x", end="y", module=path(5, 2), name="wide"),
    ]
    network = SuperNetwork(edges, input_shape=(2, 1, 1))
    budget = Budget(MACs(), at_most=8).bind(network)
    assert budget.model.along_path == [16, 8]
    assert network.decisions(budget.cheapest(network)).tolist() == [[0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]]
    assert float(budget.model(network.used(budget.cheapest(network)))[0]) == 8


@settings(max_examples=8, deadline=None)
@given(SEEDS, st.sampled_from(["macs<=45%", "params<=60%", "macs<=80%"]))
def test_candidates_with_gates_on_channels_keep_the_budget_and_are_full(seed: int, text: str):
    network = gated_network(seed)
    with torch.no_grad():
        network.gates.values.normal_(generator=torch.Generator().manual_seed(seed))
    budgets = [Budget.parse(text).bind(network)]
    if float(budgets[0].model(network.used(budgets[0].cheapest(network)))[0]) > budgets[0].limit:
        return
    found = probable(network, budgets, count=4, samples=256, generator=torch.Generator().manual_seed(seed))
    assert 1 <= len(found) <= 4
    assert keeps(network, budgets, found).all()
    assert torch.equal(trimmed(network, found), found)
    assert len(found.unique(dim=0)) == len(found)


def test_filling_opens_channels_that_fit():
    network = residual(ChannelGate(4, 1))
    budgets = [Budget(Params(), at_most=19).bind(network)]  # 4 + 9 for each open channel
    kept = torch.tensor([[1.0, 1, 0, 0, 0]])
    assert float(budgets[0].model(network.used(kept))[0]) == 4 + 9
    full = filled(network, budgets, kept, torch.tensor([0.0, 1, 2, 3, 4]), torch.ones(5, dtype=torch.bool))
    assert full.tolist() == kept.tolist()
    budgets = [Budget(Params(), at_most=4 + 27).bind(network)]
    full = filled(network, budgets, kept, torch.tensor([0.0, 1, 2, 3, 4]), torch.ones(5, dtype=torch.bool))
    assert full.tolist() == [[1, 1, 0, 1, 1]]
    dropped = filled(network, budgets, 0 * kept, torch.arange(5.0), torch.ones(5, dtype=torch.bool))
    assert dropped.tolist() == [[1, 0, 1, 1, 1]]
    dropped = filled(network, budgets, 0 * kept, torch.arange(5.0), torch.tensor([False, True, True, True, True]))
    assert not dropped.any()


def test_an_architecture_is_read_as_it_was_written(tmp_path):
    network = gated_network(5)
    budgets = [Budget.parse(text).bind(network) for text in ("macs<=90%", "params<=90%", "steps<=90%")]
    run = RunFolder(tmp_path)
    for kept in sampled(network, 8, 5).split(1):
        run.write("architecture.json", describe(network, kept, budgets))
        assert torch.equal(named(network, str(tmp_path / "architecture.json")), kept)
    content = run.read("architecture.json")
    assert [(site["edge"], site["name"], site["channels"]) for site in content["sites"]] == [
        (network.edge_names[site.edge], site.name, list(site.sizes)) for site in network.sites
    ]
    assert set(content["edges"][0]["costs"]) == {"macs", "params", "steps"}


def test_what_is_no_architecture_of_a_network_with_sites(tmp_path):
    network = residual(ChannelGate(4, 2))
    path, run = str(tmp_path / "a.json"), RunFolder(tmp_path)
    whole = describe(network, network.architecture("full"), [])

    def refused(sites: object, line: str) -> None:
        run.write("a.json", {**whole, "sites": sites})
        with pytest.raises(FileError, match=rf"^{re.escape(path)} {line}"):
            named(network, path)

    (site,) = whole["sites"]
    run.write("a.json", {key: value for key, value in whole.items() if key != "sites"})
    with pytest.raises(FileError, match="must list sites, each with edge, name and kept: 'sites'"):
        named(network, path)
    refused(3, "must list sites, each with edge, name and kept: ")
    refused([{"edge": "branch"}], "must list sites, each with edge, name and kept: 'name'")
    refused([], "is no architecture of own: site 'hidden' of 'branch' must have 2 bits")
    refused([{**site, "kept": [True]}], "is no architecture of own: site 'hidden' of 'branch' must have 2 bits")
    refused([{**site, "kept": [1, 0]}], "is no architecture of own: site 'hidden' of 'branch' must have 2 bits")
    refused([site, {**site, "name": "b"}], r"is no architecture of own: it has the site \('branch', 'b'\)")


def test_sampling_architectures_of_channels():
    network = residual(ChannelGate(4, 2))
    with torch.no_grad():
        network.gates.values.copy_(torch.tensor([40.0, -40.0, 40.0]))
    assert network.sampled(3, torch.Generator().manual_seed(0)).tolist() == [[1, 0, 1]] * 3
    assert network.logits().tolist() == [40, -40, 40]
    kept = network(torch.randn(3, 4, 3, 3), Sample(3, torch.Generator().manual_seed(0)))[1]
    assert kept.tolist() == [[1, 0, 1]] * 3
