"""Gates that look at the input, and exits: each example takes its own way, and nothing behind an exit is computed."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small import every
from torch import Tensor, nn
from torch.autograd import grad

from budgetnet import Budget, Edge, Node, SuperNetwork
from budgetnet.costs import MACs, Params
from budgetnet.errors import ConfigError, GraphError
from budgetnet.extraction import count, extract
from budgetnet.gated import ChannelGate, GatedSequential
from budgetnet.projection import probable, trimmed
from budgetnet.sites import (
    AlwaysOn,
    AnswerGate,
    ConditionalGates,
    FeatureGate,
    Fixed,
    Gumbel,
    Sample,
    Threshold,
    log_prob,
)
from budgetnet.supernet import full

SEEDS = st.integers(0, 2**16)
SHAPE = (2, 4, 4)


def branch(lock: str | None = None, granularity: int = 2) -> GatedSequential:
    """Two convolutions of 2 channels with 3 hidden ones, in groups of 2 and 1."""
    gate = ChannelGate(3, granularity, lock=lock)
    return GatedSequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), gate, nn.Conv2d(3, 2, 1))


def classifier() -> nn.Module:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 3))


def gated_classifier() -> GatedSequential:
    """Without a pool, which would mix channels: 3 classes at 4x4 places."""
    return GatedSequential(nn.Conv2d(2, 3, 1), ChannelGate(3, 2), nn.Conv2d(3, 3, 1))


def stirred(network: SuperNetwork, seed: int) -> SuperNetwork:
    """In evaluation mode and float64, with random weights and statistics: heads decide either way."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        network.gates.values.normal_(generator=generator)
        for value in (*network.modules_on_edges.parameters(), *network.heads.parameters()):
            value.copy_(torch.randn(value.shape, generator=generator) / max(1, value[0].numel()) ** 0.5)
        for head in network.heads.values():
            head.decide.bias.zero_()
            head.decide.weight.mul_(4)
        for part in network.modules():
            if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
                part.running_mean.copy_(torch.randn(part.num_features, generator=generator))
    return network.double().eval()


def blocks(seed: int = 0, **options) -> SuperNetwork:
    """Two residual blocks that heads decide on, the first with a gate of its own, behind a stem with plain gates."""
    head = partial(ConditionalGates, hidden=4, **options)
    edges = [
        Edge(start="x", end="a", module=GatedSequential(nn.Conv2d(2, 2, 1), ChannelGate(2)), name="stem", fixed=True),
        Edge(start="a", end="b", module=nn.Identity(), name="skip1", fixed=True),
        Edge(start="a", end="b", module=branch(), name="block1", gate=head),
        Edge(start="b", end="c", module=nn.Identity(), name="skip2", fixed=True),
        Edge(start="b", end="c", module=branch(), name="block2", gate=head, fixed=True),
        Edge(start="c", end="y", module=classifier(), name="head", fixed=True),
    ]
    return stirred(SuperNetwork(edges, input_shape=SHAPE, nodes=[Node(name="b", activation=nn.ReLU())]), seed)


def twins(seed: int = 0, **options) -> SuperNetwork:
    """Two residual blocks that share their gates."""
    gates = {"gate": partial(ConditionalGates, hidden=4, **options), "fixed": True}
    edges = [
        Edge(start="x", end="a", module=nn.Conv2d(2, 2, 1), name="stem", fixed=True),
        Edge(start="a", end="b", module=nn.Identity(), name="skip1", fixed=True),
        Edge(start="a", end="b", module=branch(lock="twin"), name="block1", **gates),
        Edge(start="b", end="c", module=nn.Identity(), name="skip2", fixed=True),
        Edge(start="b", end="c", module=branch(lock="twin"), name="block2", **gates),
        Edge(start="c", end="y", module=classifier(), name="head", fixed=True),
    ]
    return stirred(SuperNetwork(edges, input_shape=SHAPE), seed)


def two_exits(
    seed: int = 0, *, conditional: bool = True, channels: bool = False, answers: bool = False
) -> SuperNetwork:
    """An exit behind the stem and one behind a residual block, that has gates, before the last classifier."""
    gates = {"gate": AnswerGate if answers else partial(FeatureGate, hidden=4), "answers": answers}
    gates = gates if conditional else {}
    end = gated_classifier if channels else classifier
    block = {"gate": partial(ConditionalGates, hidden=4)} if conditional else {}
    edges = [
        Edge(start="x", end="a", module=nn.Conv2d(2, 2, 3, padding=1), name="stem", fixed=True),
        Edge(start="a", end="y", module=end(), name="exit1", exit=True, **gates),
        Edge(start="a", end="b", module=nn.Identity(), name="skip", fixed=True),
        Edge(start="a", end="b", module=branch(), name="block", **block),
        Edge(start="b", end="y", module=end(), name="exit2", exit=True, **gates),
        Edge(start="b", end="c", module=nn.Conv2d(2, 2, 1), name="more", fixed=True),
        Edge(start="c", end="y", module=end(), name="last", fixed=True),
    ]
    return stirred(SuperNetwork(edges, input_shape=SHAPE, nodes=[Node(name="b", activation=nn.ReLU())]), seed)


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bits(network: SuperNetwork, count: int, seed: int) -> Tensor:
    return torch.bernoulli(torch.full((count, network.gate_count), 0.6), generator=torch.Generator().manual_seed(seed))


def part(network: SuperNetwork, name: str) -> nn.Module:
    return network.modules_on_edges[network.edge_names.index(name)]


def gate_of(network: SuperNetwork, unit: str) -> int:
    """The column of a unit's gate."""
    column = network.gate_of[network.unit_names().index(unit)]
    assert column is not None
    return column


def slim(network: SuperNetwork, name: str, x: Tensor, kept: Tensor) -> Tensor:
    """A branch of one example by its bits; zeros where its site is closed."""
    module = part(network, name)
    own = torch.stack([kept[gate_of(network, f"{name}.hidden[{group}]")] for group in range(2)])
    return module.masked(x, own[None].double()) if own.any() else torch.zeros_like(module(x))


def blocks_by_hand(network: SuperNetwork, x: Tensor, kept: Tensor) -> Tensor:
    """One example after the other, a line for each edge."""
    outputs = []
    for image, row in zip(x.split(1), kept, strict=True):
        stem = torch.stack([row[gate_of(network, f"stem.hidden[{group}]")] for group in range(2)]).double()
        if not stem.any():
            outputs.append(torch.zeros(1, 3).double())
            continue
        value = part(network, "stem")(image) * stem.reshape(1, 2, 1, 1)
        if row[gate_of(network, "block1")]:
            value = value + slim(network, "block1", value, row)
        value = value.relu()
        value = value + slim(network, "block2", value, row)
        outputs.append(part(network, "head")(value))
    return torch.cat(outputs)


def exits_by_hand(network: SuperNetwork, x: Tensor, kept: Tensor) -> Tensor:
    outputs = []
    for image, row in zip(x.split(1), kept, strict=True):
        value = part(network, "stem")(image)
        if row[gate_of(network, "exit1")]:
            outputs.append(part(network, "exit1")(value))
            continue
        if row[gate_of(network, "block")]:
            value = value + slim(network, "block", value, row)
        value = value.relu()
        if row[gate_of(network, "exit2")]:
            outputs.append(part(network, "exit2")(value))
            continue
        outputs.append(part(network, "last")(part(network, "more")(value)))
    return torch.cat(outputs)


OPTIONS = [{"pairs": pairs, "memory": memory} for pairs in (True, False) for memory in (True, False)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gates_that_look_at_the_input_decide_for_each_example(options):
    """Columns: the stem's two, then those of each block in turn, its own before those of its channels."""
    network = blocks(**options)
    assert network.unit_names()[6:] == [f"{edge}.hidden[{i}]" for edge in ("stem", "block1", "block2") for i in (0, 1)]
    assert network.gate_of == (None, None, 2, None, None, None, 0, 1, 3, 4, 5, 6)
    assert (network.independent, network.gate_count) == (2, 7)
    assert [network.own_columns(edge) for edge in (0, 2, 4)] == [[0, 1], [2, 3, 4], [5, 6]]
    x = images(8)
    for policy in (Sample(8, torch.Generator().manual_seed(0)), Threshold(), Gumbel(8)):
        output, kept = network(x, policy)
        assert kept.shape == (8, 7)
        assert network.decisions(kept).shape == network.used(kept).shape == network.pathwise(kept).shape == (8, 12)
        torch.testing.assert_close(output, blocks_by_hand(network, x, kept.detach()))
        torch.testing.assert_close(network.run(x, network.used(kept.detach())), output)


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.sampled_from(OPTIONS))
def test_given_decisions_are_carried_out_for_each_example(seed: int, options):
    network = blocks(seed, **options)
    x, kept = images(6, seed), bits(network, 6, seed)
    expected = blocks_by_hand(network, x, kept)
    torch.testing.assert_close(network.masked(x, Fixed(kept))[0], expected)
    torch.testing.assert_close(network(x, Fixed(kept))[0], expected)
    # one architecture for all, or for a slice each, as without heads
    for few in (1, 2):
        output, same = network.masked(x, Fixed(kept[:few]))
        torch.testing.assert_close(output, network(x, Fixed(kept[:few]))[0])
        assert torch.equal(same, kept[:few].repeat_interleave(6 // few, dim=0))


def test_heads_see_what_their_edge_reads_and_keep_what_is_probable():
    network = blocks()
    network.gates.reset(1.0)
    x = images(16)
    _, kept = network(x, Threshold())
    value = part(network, "stem")(x)
    logits = network.heads[str(network.edge_names.index("block1"))](value)
    assert torch.equal(kept[:, 2:5], (logits > 0).double())
    assert 0 < kept[:, 2:].mean() < 1
    assert torch.equal(kept[:, :2], torch.ones(16, 2, dtype=torch.float64))


@pytest.mark.parametrize("build", [blocks, two_exits])
def test_gumbel_decisions_teach_heads_by_prediction_and_cost(build):
    network = build().train()
    network.gates.reset(2.0)
    for head in network.heads.values():
        torch.nn.init.normal_(head.decide.weight, std=0.1)  # undecided, so that some examples pass all exits
    output, kept = network(images(12), Gumbel(12, generator=torch.Generator().manual_seed(0)))
    cost = MACs().bind(network)(network.pathwise(kept)).mean()
    for value in (output.square().sum(), cost):
        for head in network.heads.values():
            gradients = grad(value, list(head.parameters()), retain_graph=True)
            assert all(torch.isfinite(gradient).all() for gradient in gradients)
            assert any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_locked_gates_that_look_at_the_input_are_decided_by_the_first_edge(options):
    network = twins(4, **options)
    first, second = (network.edge_names.index(name) for name in ("block1", "block2"))
    assert list(network.heads) == [str(first)]
    assert network.own_columns(first) == network.own_columns(second) == [0, 1]
    x = images(12)
    for policy in (Sample(12, torch.Generator().manual_seed(0)), Threshold(), Gumbel(12)):
        output, kept = network(x, policy)
        assert kept.shape == (12, 2)
        torch.testing.assert_close(network.run(x, network.used(kept.detach())), output)
    _, kept = network(x, Threshold())
    assert torch.equal(kept, (network.heads[str(first)](part(network, "stem")(x)) > 0).double())
    assert 0 < kept.mean() < 1
    assert list(MACs().bind(network).per_head) == [first]  # who decides for two decides once


@pytest.mark.parametrize(("silent", "learns"), [(["block1"], True), (["block2"], True), (["block1", "block2"], False)])
def test_a_head_learns_from_each_edge_that_it_decides_for(silent, learns):
    """Nothing comes of what is open on a silent edge."""
    network = twins()
    with torch.no_grad():
        for name in silent:
            for value in part(network, name)[-1].parameters():
                value.zero_()
    output, _ = network(images(12), Gumbel(12, generator=torch.Generator().manual_seed(0)))
    (gradient,) = grad(output.square().sum(), network.heads["2"].decide.weight)
    assert bool(gradient.any()) == learns


def test_one_example_decides_without_batch_statistics():
    network = blocks().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    output, kept = network(images(1), Threshold())
    torch.testing.assert_close(output, blocks_by_hand(network.eval(), images(1), kept))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_gates_as_they_are_on_the_average_input():
    """Those of heads by their bias; an own kind of head that does not tell is taken for undecided."""
    network = blocks(pairs=True)
    for place, head in enumerate(network.heads.values()):
        head.reset(1.0 + place)
    network.gates.reset(-3.0)
    assert network.logits().tolist() == [-3, -3, 1, 1, 1, 2, 2]
    torch.testing.assert_close(network.probabilities(), network.logits().sigmoid())
    assert network.sampled(5, torch.Generator().manual_seed(0)).shape == (5, 7)

    class Own(nn.Module):
        def __init__(self, channels: int, count: int) -> None:
            super().__init__()
            self.decide = nn.Linear(channels, count)

        def forward(self, x: Tensor) -> Tensor:
            return self.decide(x.mean(dim=(2, 3)))

    edges = [
        Edge(start="x", end="y", module=nn.Identity(), fixed=True, name="skip"),
        Edge(start="x", end="y", module=branch(), gate=Own),
    ]
    network = SuperNetwork(edges, input_shape=SHAPE, start=1.0)
    assert network.logits().tolist() == [0, 0, 0]
    assert network(torch.randn(4, *SHAPE), Threshold())[1].shape == (4, 3)


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("memory", [True, False])
def test_deciding_costs_something_where_it_is_counted(pairs: bool, memory: bool):
    """The pool, two layers for each gate and, with a memory, two more between them (Herrmann et al., S1.4)."""
    network = blocks(pairs=pairs, memory=memory)
    used = network.used(network.architecture("full"))
    deciding = [
        2 * 16 + 2 * 4 * gates + 4 * (1 + pairs) * gates + 2 * gates * gates * memory for gates in (3, 2)
    ]  # of block1 and block2
    with_gates, without = (MACs(gates=counted).bind(network) for counted in (True, False))
    assert float(with_gates(used) - without(used)) == sum(deciding)
    assert list(with_gates.per_head.values()) == deciding
    assert not without.per_head
    # the plain network of one architecture has no heads
    plain = count(extract(network, network.architecture("full")), images(1))
    assert plain["macs"] == float(without(used))


@pytest.mark.parametrize("build", [blocks, two_exits])
def test_parameters_are_held_whatever_an_example_uses(build):
    with pytest.raises(
        ConfigError, match=r"^params cannot be a cost where gates look at the input, as those of own do$"
    ):
        Budget(Params(), at_most="75%").bind(build())
    assert Budget(Params(), at_most="75%").bind(two_exits(conditional=False)).full > 0


def test_an_exit_decides_before_what_it_spares():
    """The exit of the stem is paid for by all; what is behind it, gates too, by those alone that go on."""
    network = two_exits()
    macs = MACs().bind(network)
    heads = {network.edge_names[edge]: cost for edge, cost in macs.per_head.items()}
    assert set(heads) == {"exit1", "block", "exit2"}
    stem, block, more, end = 2 * 2 * 9 * 16, (2 * 3 * 9 + 3 * 2) * 16, 2 * 2 * 16, 2 * 3
    ways = {
        "exit1": stem + heads["exit1"] + end,
        "exit2": stem + heads["exit1"] + heads["block"] + block + 2 * 16 + heads["exit2"] + end,
        "skip": stem + heads["exit1"] + heads["block"] + heads["exit2"] + end,
        "last": stem + heads["exit1"] + heads["block"] + block + 2 * 16 + heads["exit2"] + more + end,
    }
    kept = torch.ones(4, network.gate_count)
    exit1, exit2, own = (gate_of(network, name) for name in ("exit1", "exit2", "block"))
    kept[1:, exit1] = 0
    kept[3, exit2] = 0
    kept[2, own] = 0
    assert macs(network.used(kept)).tolist() == [ways[name] for name in ("exit1", "exit2", "skip", "last")]
    names = [
        {network.edge_names[edge] for edge in row[: len(network.graph.edges)].nonzero().flatten().tolist()}
        for row in network.used(kept)
    ]
    assert names == [
        {"stem", "exit1"},
        {"stem", "skip", "block", "exit2"},
        {"stem", "skip", "exit2"},
        {"stem", "skip", "block", "more", "last"},
    ]


@settings(max_examples=15, deadline=None)
@given(SEEDS, st.booleans())
def test_each_example_leaves_at_its_own_exit(seed: int, conditional: bool):
    network = two_exits(seed, conditional=conditional)
    x, kept = images(8, seed), bits(network, 8, seed)
    expected = exits_by_hand(network, x, kept)
    torch.testing.assert_close(network.masked(x, Fixed(kept))[0], expected)
    torch.testing.assert_close(network(x, Fixed(kept))[0], expected)
    for policy in (Threshold(), Gumbel(8, generator=torch.Generator().manual_seed(seed))):
        output, decided = network(x, policy)
        torch.testing.assert_close(output, exits_by_hand(network, x, decided.detach().expand(8, -1)))


@settings(max_examples=10, deadline=None)
@given(SEEDS)
def test_exits_with_channels_are_dropped_where_all_are_closed(seed: int):
    """All architectures: masked, run and extracted are one function, and cost what is extracted."""
    network = two_exits(seed, conditional=False, channels=True)
    macs, x = MACs().bind(network), images(3, seed)
    kept = every(network.gate_count)[torch.randperm(2**network.gate_count)[:12]]
    for row in kept.split(1):
        used = network.used(row)
        output = network(x, Fixed(row))[0]
        torch.testing.assert_close(network.masked(x, Fixed(row))[0], output)
        if network.connects(used)[0]:
            plain = extract(network, row)
            torch.testing.assert_close(plain(x), output)
            assert count(plain, x[:1])["macs"] == float(macs(used)[0])
        else:
            assert not output.any()


def test_an_exit_that_is_closed_inside_is_not_taken():
    network = two_exits(conditional=False, channels=True)
    kept = torch.ones(1, network.gate_count)
    for group in range(2):
        kept[0, gate_of(network, f"exit1.hidden[{group}]")] = 0
    used = {network.edge_names[edge] for edge in network.used(kept)[0, :7].nonzero().flatten().tolist()}
    assert used == {"stem", "skip", "block", "exit2"}
    # the gate of the exit cannot matter, its channels can
    relevant = network.relevant(kept)[0]
    assert relevant[gate_of(network, "exit1")] == 0
    assert relevant[gate_of(network, "exit1.hidden[1]")] == 1


def computed(network: SuperNetwork, kept: Tensor) -> Tensor:
    used = network.used(kept)
    for site in network.sites:
        used[:, slice(*site.units)] *= used[:, [site.edge]]
    return used


@pytest.mark.parametrize("build", [blocks, two_exits, partial(two_exits, conditional=False, channels=True)])
def test_a_gate_is_relevant_just_where_it_changes_what_is_computed(build):
    network = build()
    kept = every(network.gate_count)
    relevant = network.relevant(kept)
    for gate in range(network.gate_count):
        flipped = kept.clone()
        flipped[:, gate] = 1 - flipped[:, gate]
        changes = (computed(network, kept) != computed(network, flipped)).any(dim=1)
        assert torch.equal(relevant[:, gate].bool(), changes)
    assert torch.equal(network.relevant(kept.bool()), relevant.bool())
    assert torch.equal(network.used(kept.bool()), network.used(kept).bool())
    for cost in (MACs(), MACs(gates=False)):
        model = cost.bind(network)
        assert torch.equal(model(network.used(kept.bool())), model(network.used(kept)))


@pytest.mark.parametrize("build", [blocks, two_exits, partial(two_exits, conditional=False, channels=True)])
def test_the_score_function_of_relevant_gates_is_unbiased(build):
    """All architectures are summed, with the cost and a random number for whatever is computed."""
    network = build()
    kept = every(network.gate_count, torch.float64)
    used = computed(network, kept)
    _, which = used.unique(dim=0, return_inverse=True)
    generator = torch.Generator().manual_seed(0)
    anything = torch.randn(int(which.max()) + 1, generator=generator, dtype=torch.float64)
    total = anything[which] + MACs().bind(network)(used) / 1000
    logits = torch.randn(network.gate_count, generator=generator, dtype=torch.float64).requires_grad_()
    probability = log_prob(logits, kept, torch.ones_like(kept)).exp()
    (exact,) = grad(probability @ total, logits)
    (estimate,) = grad((probability.detach() * total) @ log_prob(logits, kept, network.relevant(kept)), logits)
    torch.testing.assert_close(estimate, exact)


@pytest.mark.parametrize("build", [two_exits, partial(two_exits, conditional=False, channels=True), twins])
def test_pathwise_is_used_whatever_exits_are_taken(build):
    network = build()
    kept = every(network.gate_count).requires_grad_()
    used = network.pathwise(kept)
    assert torch.equal(used.detach(), network.used(kept.detach()))
    for cost in (MACs(), MACs(gates=False)):
        model = cost.bind(network)
        torch.testing.assert_close(model(used).detach(), model(network.used(kept.detach())))


@pytest.mark.parametrize("options", [{}, {"answers": True}, {"conditional": False}])
def test_the_gradient_of_a_cost_says_what_an_exit_spares(options):
    """Taken or not: what is behind an exit pulls at its gate, with the gates there that would have to decide."""
    network = two_exits(**options)
    exits = [gate_of(network, name) for name in ("exit1", "exit2")]
    for cost in (MACs(), MACs(gates=False)):
        model = cost.bind(network)
        none = network.architecture("full")
        for gate, other in (exits, exits[::-1]):
            for kept in (none, none.index_fill(1, torch.tensor([other]), 1.0)):
                taken = kept.index_fill(1, torch.tensor([gate]), 1.0)
                difference = float(model(network.used(taken)) - model(network.used(kept)))
                for point in (kept, taken):
                    decisions = point.double().requires_grad_()
                    (gradient,) = grad(model(network.pathwise(decisions)).sum(), decisions)
                    assert gradient[0, gate].item() == pytest.approx(difference)


def test_the_gradient_of_the_prediction_at_an_exit_is_what_it_changes():
    network = two_exits(conditional=False)
    x, gate = images(3), gate_of(network, "exit1")
    for bit in (0.0, 1.0):
        kept = network.architecture("full").double()
        kept[0, gate] = bit
        gradient = torch.autograd.functional.jacobian(lambda kept: network.masked(x, Fixed(kept))[0], kept)[:, :, 0]
        ends = [kept.index_fill(1, torch.tensor([gate]), value) for value in (1.0, 0.0)]
        taken, passed = (network(x, Fixed(end))[0] for end in ends)
        torch.testing.assert_close(gradient[..., gate], taken - passed)


def test_soft_decisions_mix_what_exits_and_the_end_predict():
    """With probabilities q1, then q2: `q1 exit1 + (1 - q1) (q2 exit2 + (1 - q2) last)`."""
    network = two_exits(conditional=False)
    x, full_kept = images(4), network.architecture("full").double()
    exit1, exit2 = (gate_of(network, name) for name in ("exit1", "exit2"))
    ways = []
    for taken in ((exit1,), (exit2,), ()):
        kept = full_kept.clone()
        kept[0, list(taken)] = 1
        ways.append(network(x, Fixed(kept))[0])
    kept = full_kept.clone()
    kept[0, exit1], kept[0, exit2] = 0.3, 0.6
    output, _ = network.masked(x, Fixed(kept))
    torch.testing.assert_close(output, 0.3 * ways[0] + 0.7 * (0.6 * ways[1] + 0.4 * ways[2]))


def test_two_exits_of_one_node_are_taken_in_their_order():
    edges = [
        Edge(start="x", end="y", module=nn.Conv2d(2, 2, 1), name="first", exit=True),
        Edge(start="x", end="y", module=nn.Conv2d(2, 2, 1), name="second", exit=True),
        Edge(start="x", end="y", module=nn.Conv2d(2, 2, 1), name="last", fixed=True),
    ]
    network = SuperNetwork(edges, input_shape=SHAPE)
    kept, x = every(2), torch.randn(4, *SHAPE)
    assert network.used(kept).tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 0], [1, 0, 0]]
    assert network.relevant(kept).tolist() == [[1, 1], [1, 1], [1, 0], [1, 0]]
    torch.testing.assert_close(network.masked(x, Fixed(kept))[0], network(x, Fixed(kept))[0])
    assert torch.equal(network.pathwise(kept), network.used(kept))


def test_the_full_network_takes_no_exit():
    network = two_exits()
    everything = network.architecture("full")
    assert [int(everything[0, gate_of(network, name)]) for name in ("exit1", "exit2", "block")] == [0, 0, 1]
    x = images(3)
    output, kept = network(x, AlwaysOn())
    assert torch.equal(kept, everything.double())
    assert torch.equal(output, network(x, full(network))[0])
    torch.testing.assert_close(output, exits_by_hand(network, x, everything.expand(3, -1)))
    budget = Budget(MACs(), at_most="50%").bind(network)
    assert budget.full == max(float(cost) for cost in budget.model(network.used(every(network.gate_count))))


@pytest.mark.parametrize(
    "build",
    [blocks, twins, two_exits, partial(two_exits, answers=True), partial(two_exits, conditional=False, channels=True)],
)
@pytest.mark.parametrize("cost", [MACs(), MACs(gates=False)], ids=["gates count", "gates are free"])
def test_the_cheapest_architecture_is_the_cheapest_of_all(build, cost):
    """Of a network with exits it takes the first; where gates cost, those on its way are paid for."""
    network = build()
    used = network.used(every(network.gate_count))
    budget = Budget(cost, at_most="50%").bind(network)
    cheapest = network.used(budget.cheapest(network))
    assert network.connects(cheapest)[0]
    assert float(budget.model(cheapest)[0]) == float(budget.model(used)[network.connects(used)].min())


def test_along_path_knows_which_gates_decide_on_the_way():
    network = two_exits()
    macs = MACs().bind(network)
    along = dict(zip(network.edge_names, macs.along_path, strict=True))
    heads = {network.edge_names[edge]: cost for edge, cost in macs.per_head.items()}
    assert along["exit1"] == heads["exit1"] + 6
    assert along["skip"] == heads["exit1"] + heads["block"]
    assert along["more"] == heads["exit2"] + 2 * 2 * 16
    assert along["last"] == 6


def test_candidates_of_a_network_with_exits_take_one_where_the_budget_asks_for_it():
    network = two_exits(conditional=False)
    network.gates.reset(-1.0)  # no exit is probable
    low = [Budget(MACs(), at_most=2 * 2 * 9 * 16 + 6).bind(network)]
    found = probable(network, low, count=3, generator=torch.Generator().manual_seed(0))
    assert (found[:, gate_of(network, "exit1")] + found[:, gate_of(network, "exit2")] == 1).all()
    assert torch.equal(trimmed(network, found), found)
    high = [Budget(MACs(), at_most="100%").bind(network)]
    network.gates.reset(2.0)
    with torch.no_grad():
        network.gates.values[[gate_of(network, "exit1"), gate_of(network, "exit2")]] = -3.0
    found = probable(network, high, count=1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found, network.architecture("full"))


LOCKED = "edges with locked gates that look at the input must share all of them, and have none on the edge as a whole"


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        (
            [Edge(start="x", end="y", module=nn.Identity(), fixed=True, gate=ConditionalGates)],
            "'x>y' has a gate that decides nothing: it has no choice",
        ),
        (
            [Edge(start="x", end="y", module=branch(lock="twin"), gate=ConditionalGates)],
            f"{LOCKED}, got 'x>y'",
        ),
        (
            [
                Edge(start="x", end="a", module=branch(lock="twin"), gate=ConditionalGates, fixed=True),
                Edge(start="a", end="y", module=branch(lock="twin"), fixed=True),
            ],
            f"{LOCKED}, got 'a>y'",
        ),
        (
            [
                Edge(start="x", end="a", module=branch(lock="twin"), gate=ConditionalGates, fixed=True),
                Edge(start="a", end="y", module=branch(lock="twin", granularity=1), gate=ConditionalGates, fixed=True),
            ],
            f"{LOCKED}, got 'a>y'",
        ),
        (
            [
                Edge(
                    start="x",
                    end="y",
                    module=GatedSequential(ChannelGate(2, name="first"), *branch(lock="twin")),
                    gate=ConditionalGates,
                    fixed=True,
                ),
            ],
            f"{LOCKED}, got 'x>y'",
        ),
        (
            [
                Edge(start="x", end="a", module=branch(), fixed=True),
                Edge(start="a", end="y", module=branch(lock="twin"), gate=ConditionalGates, fixed=True),
            ],
            "the first edge with locked gates that look at the input decides for all, and must lie on a path that is "
            "always kept, got 'a>y'",
        ),
        (
            [
                Edge(start="x", end="a", module=nn.Identity(), exit=True),
                Edge(start="a", end="y", module=nn.Identity()),
            ],
            "an exit must lead to the output, got 'x>a'",
        ),
        (
            [
                Edge(start="x", end="y", module=nn.Identity(), exit=True, fixed=True),
                Edge(start="x", end="y", module=nn.Identity(), name="other"),
            ],
            "an exit must be a choice, got 'x>y', which is fixed",
        ),
        (
            [
                Edge(start="x", end="a", module=nn.Identity()),
                Edge(start="x", end="b", module=nn.Identity()),
                Edge(start="a", end="y", module=nn.Identity(), exit=True),
                Edge(start="a", end="b", module=nn.Identity()),
                Edge(start="b", end="y", module=nn.Identity()),
            ],
            "an exit must leave a node that every path passes, got 'a>y'",
        ),
        (
            [
                Edge(start="x", end="y", module=nn.Identity(), name="first", exit=True, answers=True),
                Edge(start="x", end="y", module=nn.Identity(), fixed=True),
            ],
            "'first' must be an exit with a gate on it alone to answer first",
        ),
        (
            [Edge(start="x", end="y", module=nn.Identity(), answers=True, gate=ConditionalGates)],
            "'x>y' must be an exit with a gate on it alone to answer first",
        ),
    ],
)
def test_what_is_no_network_with_heads_and_exits(edges, message):
    with pytest.raises(GraphError, match=f"^{message}$"):
        SuperNetwork(edges, input_shape=SHAPE)
