"""The spaces with gates inside: their networks are the published ones, and every option does what it says."""

from __future__ import annotations

import json
from functools import cache, partial
from itertools import product
from math import prod
from typing import Any

import pytest
import torch
from small import stir
from torch import Tensor, nn

from budgetnet import SuperNetwork
from budgetnet.architectures import named
from budgetnet.blocks import dense_block, exit_classifier, padded_identity
from budgetnet.cli import main
from budgetnet.costs import Layers, MACs, Steps
from budgetnet.errors import ConfigError, FileError, GraphError
from budgetnet.extraction import count, extract
from budgetnet.sites import AnswerGate, ConditionalGates, FeatureGate, Fixed
from budgetnet.spaces import BY_NAME, densenet_exits, mobilenet_v2, resnet
from budgetnet.weights import learned, load_torchvision


@cache
def on_meta(name: str, options: str) -> SuperNetwork:
    """A network of a space without values: shapes and counts need none."""
    with torch.device("meta"):
        return BY_NAME[name](**json.loads(options))


def built(name: str, **options: Any) -> SuperNetwork:
    return on_meta(name, json.dumps(options, sort_keys=True))


def full_cost(network: SuperNetwork, cost: MACs | Steps) -> float:
    return float(cost.bind(network)(network.used(network.architecture("full")))[0])


def edge_of(network: SuperNetwork, name: str) -> int:
    return network.edge_names.index(name)


def sites(network: SuperNetwork, edge: str) -> dict[str, int]:
    """Names of the sites on an edge, and the groups of each."""
    return {site.name: site.groups for site in network.sites if site.edge == edge_of(network, edge)}


def columns(network: SuperNetwork, unit: str) -> int | None:
    return network.gate_of[network.unit_names().index(unit)]


# ---------------------------------------------------------------------------------------------- published numbers


@torch.no_grad()
def test_a_resnet_fabric_has_gates_on_channels_beside_those_on_edges():
    """All open it costs, under each name, what it costs without; what is extracted computes what is sampled."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"width": 2, "channels": 8, "image_size": 8}
    plain, gated = (BY_NAME["resnet_fabric"](**options, granularity=own) for own in (0, 4))
    macs = MACs().bind(gated)
    for name in ("full", "resnet"):
        kept = named(gated, name)
        assert float(macs(gated.used(kept))[0]) == float(MACs().bind(plain)(plain.used(named(plain, name)))[0])
    blocks = [name for name in gated.edge_names if name.endswith(".block")]
    assert {name: sites(gated, name) for name in blocks} == {name: {"hidden": 2 * 2 ** int(name[1])} for name in blocks}
    stir(gated, 0).eval()
    x = torch.randn(4, 3, 8, 8)
    for kept in gated.sampled(12, torch.Generator().manual_seed(0)).split(1):
        used = gated.used(kept)
        if bool(gated.connects(used)[0]):
            small = extract(gated, kept).eval()
            torch.testing.assert_close(small(x), gated.run(x, used), rtol=1e-4, atol=1e-4)
            assert count(small, x[:1])["macs"] == float(macs(used)[0])


@pytest.mark.parametrize(("name", "options"), [("resnet", {"depth": 50}), ("mobilenet_v2", {"image_size": 96})])
@pytest.mark.parametrize("where", ["hidden", "output", "ends"])
def test_gates_that_are_all_open_cost_nothing(name: str, options: dict[str, Any], where: str):
    """The cost by open channels adds up to that of the network without gates."""
    gated = built(name, granularity="paper", where=where, **options)
    assert full_cost(gated, MACs()) == full_cost(built(name, gates="none", **options), MACs())


@pytest.mark.parametrize("depth", [20, 56, 110])
def test_a_resnet_costs_what_it_costs_inside_its_fabric(depth: int):
    fabric = built("resnet_fabric", width=depth // 6)
    inside = fabric.used(fabric.architecture("resnet"))
    for cost in (MACs(), MACs(additions=False), Steps(1), Steps(2)):
        assert full_cost(built("resnet", depth=depth, gates="none"), cost) == float(cost.bind(fabric)(inside)[0])


def test_a_shortcut_without_parameters_takes_no_step():
    assert full_cost(built("resnet", depth=56, gates="none", shortcut="identity"), Steps(1)) == 56


def test_cost_of_the_exits_of_a_densenet():
    """The numbers of docs/counting.md: a gate takes `9 H W (C + 128) 128` and a linear layer."""
    network = densenet_exits(depth=100, exit_gates="features")
    macs, places = MACs().bind(network), ((32, 216), (16, 300))
    gates = [9 * side**2 * (channels + 128) * 128 + 16 * 128 * 2 for side, channels in places]
    assert [int(macs.per_head[edge]) for edge in network.exits] == gates == [405_803_008, 126_226_432]
    classifiers = [9 * (side // 2) ** 2 * (channels + 128 // 4) * 128 + 128 * 10 for side, channels in places]
    assert [int(macs.per_edge[edge]) for edge in network.exits] == classifiers == [73_139_456, 24_478_976]
    for (side, _), gate in zip(places, gates, strict=True):  # the gate's average pool, which is not counted
        assert f"{100 * 128 * side**2 / gate:.2f}" == "0.03"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet", {"depth": 50, "granularity": "paper", "where": "output"}),
        ("resnet", {"depth": 20, "gates": "layers"}),
        ("resnet", {"depth": 20, "gates": "both", "granularity": 4, "memory": True}),
        ("mobilenet_v2", {"image_size": 96}),
    ],
)
@pytest.mark.parametrize("logits", [1, 2])
def test_cost_of_deciding(name: str, options: dict[str, Any], logits: int):
    """By hand: 16 for each channel read and each logit, behind one pool of H W C_in; memory reads all gates, twice."""
    network = built(name, conditional=True, logits=logits, **options)
    by_hand = 0
    for edge in map(int, network.heads):
        shape, gates = network.shapes[network.graph.edges[edge][0]], len(network.own_columns(edge))
        by_hand += prod(shape) + (16 * shape[0] + 16 * logits) * gates + 2 * gates**2 * options.get("memory", False)
    assert full_cost(network, MACs()) - full_cost(network, MACs(gates=False)) == by_hand > 0


@pytest.mark.parametrize("stride", [1, 2])
def test_an_inverted_residual_costs_what_the_formula_says(stride: int):
    """`H W C_exp (C_in + 9 / s^2 + C_out / s^2)` (section 3.4), at the block's input size, by open channels."""
    network = built("mobilenet_v2", width=0.1, image_size=32, granularity=1)
    name = "s2.1.block" if stride == 1 else "s2.0.block"
    edge = edge_of(network, name)
    channels, height, width = network.shapes[network.graph.edges[edge][0]]
    inside = MACs().bind(network).channels[edge]
    for draw in range(8):
        bits = torch.bernoulli(torch.full((1, network.gate_count), 0.6), generator=torch.manual_seed(draw))
        used = network.used(bits)
        into, expanded, out = (float(used[0, slice(*site.units)].sum()) for site in network.sites if site.edge == edge)
        formula = height * width * expanded * (into + (9 + out) / stride**2)
        assert float(inside(used)[0]) == formula
    assert channels == 8


def test_printed_for_every_block_the_formula_expands_the_first_too():
    """Which has no expansion (docs/counting.md)."""
    network = built("mobilenet_v2", gates="none")
    edge = edge_of(network, "s0.0.block")
    (channels, height, width), (out, *_) = (network.shapes[node] for node in network.graph.edges[edge])
    formula = height * width * channels * (channels + 9 + out)
    assert formula - int(MACs().bind(network).per_edge[edge]) == 12_845_056


# ----------------------------------------------------------------------------------------------------- sub-networks

SMALL: dict[str, dict[str, Any]] = {
    "resnet": {"depth": 8, "channels": 4, "image_size": 16},
    "resnet-ends": {"depth": 8, "channels": 4, "image_size": (12, 16), "where": "ends", "granularity": 3},
    "resnet-output": {"depth": 8, "channels": 4, "image_size": 15, "where": "output", "gates": "both"},
    "resnet-layers": {"depth": 20, "channels": 2, "image_size": 16, "gates": "layers"},
    "resnet-lock": {"depth": 14, "channels": 4, "image_size": 15, "gates": "both", "lock": True}
    | {"granularity": (1, 2, 4), "shortcut": "identity"},
    "resnet-conditional": {"depth": 8, "channels": 4, "image_size": 16, "gates": "both", "granularity": 2}
    | {"conditional": True, "memory": True, "logits": 2},
    "resnet-conditional-lock": {"depth": 14, "channels": 4, "image_size": 16, "granularity": 2, "where": "ends"}
    | {"conditional": True, "lock": True},
    "resnet-bottlenecks": {"depth": 50, "channels": 8, "classes": 3, "image_size": 33, "where": "ends"}
    | {"granularity": "paper"},
    "mobilenet_v2": {"width": 0.1, "classes": 3, "image_size": 16, "strides": "cifar", "gates": "both"},
    "mobilenet_v2-output": {"width": 0.1, "classes": 3, "image_size": 32, "where": "output", "granularity": 3},
    "mobilenet_v2-conditional": {"width": 0.1, "classes": 3, "image_size": 32, "granularity": 4}
    | {"where": "hidden", "conditional": True},
    "densenet_exits": {"depth": 10, "growth": 4, "image_size": 16, "exit_channels": 8},
    "densenet_exits-fixed": {"depth": 7, "growth": 4, "image_size": (8, 16), "exit_channels": 8}
    | {"conditional": False, "bottleneck": False},
}


@cache
def small(key: str) -> SuperNetwork:
    return stir(BY_NAME[key.partition("-")[0]](**SMALL[key]), 0).eval()


@pytest.mark.parametrize("key", SMALL)
@pytest.mark.parametrize("probability", [0.3, 0.8])
def test_masked_run_and_extracted_sub_networks_agree(key: str, probability: float):
    """On inputs of that space's shape, and the extracted one has as many MACs as the model says."""
    network = small(key)
    generator = torch.Generator().manual_seed(int(10 * probability))
    kept = torch.bernoulli(torch.full((1, network.gate_count), probability), generator=generator)
    x = torch.randn(2, *network.input_shape, generator=generator)
    with torch.no_grad():
        masked, _ = network.masked(x, Fixed(kept.expand(2, -1)))
        run, _ = network(x, Fixed(kept))
        plain = extract(network, kept)
        torch.testing.assert_close(run, masked, rtol=1e-4, atol=1e-5)  # sums over channels in another order
        torch.testing.assert_close(plain(x), masked, rtol=1e-4, atol=1e-5)
    assert masked.std() > 0.1
    assert count(plain, x[:1])["macs"] == int(MACs(gates=False).bind(network)(network.used(kept))[0])


@pytest.mark.parametrize("key", SMALL)
def test_with_every_gate_closed_something_remains(key: str):
    """Of a block its shortcut, or one group of each site where there is none; of exits the last."""
    network = small(key)
    none = torch.zeros(1, network.gate_count)
    used = network.used(none)
    assert bool(network.connects(used)[0])
    for edge, kind in enumerate(network.kinds):
        beside = [other for other, ends in enumerate(network.graph.edges) if ends == network.graph.edges[edge]]
        if kind == "block" and network.sites:
            assert bool(used[0, edge]) == (len(beside) == 1)
    with torch.no_grad():
        assert network(torch.randn(2, *network.input_shape), Fixed(none))[0].std() > 0.01


def test_examples_leave_where_their_own_gate_says():
    network = small("densenet_exits")
    kept = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    x = torch.randn(4, *network.input_shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        mixed, _ = network.masked(x, Fixed(kept))
        for row, name in enumerate(("exit1", "exit2", "full", "exit1")):
            alone, _ = network(x[[row]], Fixed(network.architecture(name)))
            torch.testing.assert_close(mixed[[row]], alone, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------- blocks


@pytest.mark.parametrize(("size", "stride"), list(product((4, 5), (1, 2))))
def test_the_padded_identity_moves_pixels_and_adds_zeros(size: int, stride: int):
    x = torch.randn(2, 3, size, size + 1)
    y = padded_identity(3, 5, stride=stride)(x)
    assert torch.equal(y[:, :3], x[:, :, ::stride, ::stride])
    assert y.shape[1] == 5
    assert not y[:, 3:].any()


@pytest.mark.parametrize("bottleneck", [True, False])
def test_each_layer_of_a_dense_block_reads_all_before_it(bottleneck: bool):
    block = stir(dense_block(3, 2, 4, bottleneck=bottleneck), 0).eval()
    x = torch.randn(2, 3, 5, 5)
    first = torch.cat([x, block.layer0(x)], 1)
    torch.testing.assert_close(block(x), torch.cat([first, block.layer1(first)], 1))


def test_on_maps_of_8x8_an_exit_classifies_as_in_msdnet():
    """Whose average pool is 2x2."""
    layers = list(stir(exit_classifier(6, 3, hidden=5), 0).eval())
    assert [layer.stride for layer in layers if isinstance(layer, nn.Conv2d)] == [(2, 2), (2, 2)]
    x = torch.randn(2, 6, 8, 8)
    theirs = nn.Sequential(*[nn.AvgPool2d(2) if isinstance(layer, nn.AdaptiveAvgPool2d) else layer for layer in layers])
    torch.testing.assert_close(nn.Sequential(*layers)(x), theirs(x))


# ---------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(("depth", "blocks"), [(8, (1, 1, 1)), (20, (3, 3, 3)), (32, (5, 5, 5)), (44, (7, 7, 7)),
                                               (110, (18, 18, 18)), (18, (2, 2, 2, 2)), (34, (3, 4, 6, 3)),
                                               (50, (3, 4, 6, 3)), (101, (3, 4, 23, 3))])  # fmt: skip
def test_depth_counts_the_blocks_of_each_group(depth: int, blocks: tuple[int, ...]):
    network = built("resnet", depth=depth, channels=1, gates="layers", classes=2)
    found = [name for name in network.edge_names if name.endswith(".block")]
    assert tuple(sum(name.startswith(f"g{group}.") for name in found) for group in range(len(blocks))) == blocks
    convs = sum(isinstance(part, nn.Conv2d | nn.Linear) for part in network.modules())
    assert convs - network.kinds.count("projection") == depth


@pytest.mark.parametrize("depth", [8, 18])
def test_shapes_of_a_resnet_follow_its_depth_unless_told(depth: int):
    network = built("resnet", depth=depth, gates="none")
    channels, classes, side = (16, 10, 32) if depth == 8 else (64, 1000, 224)
    assert network.input_shape == (3, side, side)
    shapes = dict(zip(network.graph.nodes, network.shapes, strict=True))
    assert shapes["stem"] == (channels, side, side) if depth == 8 else (channels, side // 4, side // 4)
    assert shapes["y"] == (classes,)
    told = built("resnet", depth=depth, gates="none", channels=3, classes=4, image_size=[64, 32], in_channels=2)
    assert (told.input_shape, told.shapes[told.graph.sink]) == ((2, 64, 32), (4,))
    assert dict(zip(told.graph.nodes, told.shapes, strict=True))["stem"][0] == 3


def test_the_stride_of_a_bottleneck_is_in_its_3x3_convolution():
    network = built("resnet", depth=50, channels=4, gates="none")
    block = network.modules_on_edges[edge_of(network, "g1.0.block")]
    assert [(conv.kernel_size, conv.stride) for conv in block if isinstance(conv, nn.Conv2d)] == [
        ((1, 1), (1, 1)),
        ((3, 3), (2, 2)),
        ((1, 1), (1, 1)),
    ]


@pytest.mark.parametrize(
    ("gates", "choices", "groups"), [("channels", 0, 12 + 24 + 48), ("layers", 9, 0), ("both", 9, 84), ("none", 0, 0)]
)
def test_what_has_gates(gates: str, choices: int, groups: int):
    network = built("resnet", depth=20, channels=4, gates=gates)
    assert (len(network.choices), network.units - len(network.graph.edges)) == (choices, groups)
    assert network.gate_count == choices + groups
    assert all(network.kinds[edge] == "block" for edge in network.choices)


@pytest.mark.parametrize(
    ("granularity", "gates"), [(1, 12 + 24 + 48), (4, 3 * (1 + 2 + 4)), (5, 3 * (1 + 2 + 4)), ([1, 2, 8], 12 + 12 + 6)]
)
def test_granularity_is_channels_a_gate(granularity: int | list[int], gates: int):
    assert built("resnet", depth=20, channels=4, granularity=granularity).gate_count == gates


@pytest.mark.parametrize(("expansion", "hidden"), [(2, (8, 16, 32)), (0.6, (2, 5, 10)), (0.01, (1, 1, 1))])
def test_expansion_widens_a_branch_inside(expansion: float, hidden: tuple[int, ...]):
    network = built("resnet", depth=8, channels=4, expansion=expansion)
    for group, (inside, usual) in enumerate(zip(hidden, (4, 8, 16), strict=True)):
        assert sites(network, f"g{group}.0.block") == {"hidden0": inside}
        assert network.shapes[network.graph.nodes.index(f"g{group}.0")][0] == usual


def test_the_papers_granularity_of_a_resnet_50():
    """16, 32, 64, 128 channels where a branch ends and half that inside: 16 gates there and twice 8 in each block."""
    network = built("resnet", depth=50, granularity="paper", where="ends")
    for group in range(4):
        assert sites(network, f"g{group}.1.block") == {"input": 16, "hidden0": 8, "hidden1": 8, "output": 16}
    assert sites(network, "g0.0.block")["input"] == 4  # 64 channels of the stem
    assert sites(network, "g1.0.block")["input"] == 8  # 256 channels of the group before
    assert built("resnet", depth=50, granularity="paper").gate_count == 16 * 16


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ("hidden", {"hidden0": 8}),
        ("output", {"hidden0": 8, "output": 8}),
        ("ends", {"input": 4, "hidden0": 8, "output": 8}),
    ],
)
def test_where_says_which_channels_have_gates(where: str, found: dict[str, int]):
    assert sites(built("resnet", depth=8, channels=4, where=where), "g1.0.block") == found


def test_locked_gates_are_those_of_identical_blocks():
    """At every site; the first block of the later groups has another shape."""
    network = built("resnet", depth=20, channels=4, lock=True, where="ends")
    for channel in range(4):
        first, second, third = (columns(network, f"g0.{block}.block.hidden0[{channel}]") for block in range(3))
        assert first == second == third
    unlike, one, other = (columns(network, f"g2.{block}.block.hidden0[3]") for block in range(3))
    assert one == other != unlike
    # a group reads and writes one stream, but for its first block, which reads that of the group before
    reads, writes = ([columns(network, f"{name}[3]") for name in names] for names in (
        ("g2.1.block.input", "g2.2.block.input", "output.input"), (f"g2.{block}.block.output" for block in range(3)),
    ))  # fmt: skip
    assert len({*reads, *writes, columns(network, "g2.0.skip.output[3]")}) == 1
    before = {columns(network, f"g2.0.{name}.input[3]") for name in ("block", "skip")}
    assert before == {columns(network, "g1.2.block.output[3]")} != set(writes)
    free = built("resnet", depth=20, channels=4, where="ends")
    assert free.gate_count == 3 * 3 * 4 + (4 + 8 + 8) + 2 * 3 * 8 + (8 + 16 + 16) + 2 * 3 * 16
    assert network.gate_count == (4 - 1) + (8 - 1) + (16 - 1) + 4 + 2 * 8 + 2 * 16
    layers = built("resnet", depth=20, channels=4, gates="both", lock=True)
    assert len(layers.choices) == 9  # of which each has its own


@pytest.mark.parametrize("gates", ["channels", "layers", "both"])
def test_conditional_gates_look_at_their_blocks_input(gates: str):
    network = built("resnet", depth=8, channels=4, gates=gates, conditional=True)
    assert network.independent == 0
    assert {network.kinds[int(edge)] for edge in network.heads} == {"block"}
    counts = {
        network.edge_names[int(edge)]: (head.reduce.in_channels, head.count) for edge, head in network.heads.items()
    }
    own = int(gates != "channels")
    channels = [0 if gates == "layers" else size for size in (4, 8, 16)]
    assert counts == {f"g{group}.0.block": (into, own + channels[group]) for group, into in enumerate((4, 4, 8))}
    assert not built("resnet", depth=8, channels=4, gates=gates).heads


def test_locked_conditional_gates_look_at_the_first_of_identical_blocks():
    network = built("resnet", depth=20, channels=4, conditional=True, lock=True)
    deciding = {network.edge_names[int(edge)] for edge in network.heads}
    assert deciding == {f"g{group}.{block}.block" for group, block in ((0, 0), (1, 0), (1, 1), (2, 0), (2, 1))}
    led = {network.edge_names[edge]: network.edge_names[leader] for edge, leader in network.leaders.items()}
    leaders = {"g0.1": "g0.0", "g0.2": "g0.0", "g1.2": "g1.1", "g2.2": "g2.1"}
    assert led == {f"{edge}.block": f"{leader}.block" for edge, leader in leaders.items()}
    mobile = built("mobilenet_v2", conditional=True, lock=True, image_size=96)
    assert mobile.leaders == {edge_of(mobile, "s2.2.block"): edge_of(mobile, "s2.1.block")} | {
        edge_of(mobile, f"s{stage}.{block}.block"): edge_of(mobile, f"s{stage}.1.block")
        for stage, blocks in ((3, 4), (4, 3), (5, 3))
        for block in range(2, blocks)
    }


@pytest.mark.parametrize("name", ["resnet", "mobilenet_v2"])
def test_logits_and_memory_of_gates(name: str):
    options: dict[str, Any] = {"depth": 8, "channels": 2} if name == "resnet" else {"image_size": 32, "gates": "layers"}
    for logits in (1, 2):
        assert built(name, logits=logits, **options).gates.values.ndim == logits
        for memory in (False, True):
            network = built(name, logits=logits, memory=memory, conditional=True, **options)
            for head in network.heads.values():
                assert isinstance(head, ConditionalGates)
                assert (head.pairs, head.recall is not None) == (logits == 2, memory)


@pytest.mark.parametrize(("shortcut", "kinds"), [("projection", (7, 2)), ("identity", (9, 0))])
def test_shortcuts_where_the_shape_changes(shortcut: str, kinds: tuple[int, int]):
    network = built("resnet", depth=20, channels=4, shortcut=shortcut)
    assert (network.kinds.count("identity"), network.kinds.count("projection")) == kinds
    assert all(network.fixed[edge] for edge, kind in enumerate(network.kinds) if kind != "block")


def test_convolutions_before_a_batch_norm_have_no_bias():
    for network in (built("resnet", depth=8), built("mobilenet_v2"), densenet_exits(conditional=False)):
        assert all(part.bias is None for part in network.modules() if isinstance(part, nn.Conv2d))


@pytest.mark.parametrize(
    ("strides", "size", "sides"),
    [("imagenet", 224, (112, 112, 56, 28, 14, 14, 7, 7)), ("cifar", 32, (32, 32, 32, 16, 8, 8, 4, 4))],
)
def test_strides_of_a_mobilenet(strides: str, size: int, sides: tuple[int, ...]):
    network = built("mobilenet_v2", strides=strides, gates="none")
    shapes = dict(zip(network.graph.nodes, network.shapes, strict=True))
    assert network.input_shape == (3, size, size)
    assert tuple(shapes[name][1] for name in ("stem", *(f"s{stage}.0" for stage in range(7)))) == sides
    assert built("mobilenet_v2", image_size=[64, 96], in_channels=1, gates="none").input_shape == (1, 64, 96)


@pytest.mark.parametrize(
    ("width", "channels"),
    [
        (1.0, (32, 16, 24, 32, 64, 96, 160, 320, 1280)),
        (0.75, (24, 16, 24, 24, 48, 72, 120, 240, 1280)),
        (0.5, (16, 8, 16, 16, 32, 48, 80, 160, 1280)),
        (1.4, (48, 24, 32, 48, 88, 136, 224, 448, 1792)),
    ],
)
def test_widths_of_a_mobilenet_are_multiples_of_8(width: float, channels: tuple[int, ...]):
    """As in the published models of these widths."""
    network = built("mobilenet_v2", width=width, gates="none")
    shapes = dict(zip(network.graph.nodes, network.shapes, strict=True))
    names = ("stem", *(f"s{stage}.0" for stage in range(7)), "last")
    assert tuple(shapes[name][0] for name in names) == channels


def test_the_papers_sites_of_a_mobilenet():
    """Groups of each site by the table of section 4.2; the first block expands nothing and has no input site."""
    network = built("mobilenet_v2", image_size=96, granularity="paper", where="ends")
    assert sites(network, "s0.0.block") == {"expanded": 2, "output": 2}
    assert sites(network, "s1.0.block") == {"input": 2, "expanded": 4, "output": 3}
    assert sites(network, "s3.1.block") == {"input": 8, "expanded": 12, "output": 4}
    assert sites(network, "s6.0.block") == {"input": 5, "expanded": 15, "output": 5}
    assert sites(built("mobilenet_v2", where="hidden"), "s3.1.block") == {"expanded": 12}
    by_stage = built("mobilenet_v2", where="hidden", granularity=[1, 2, 3, 4, 5, 6, 7])
    assert [sites(by_stage, f"s{stage}.0.block")["expanded"] for stage in (0, 1, 6)] == [32, 48, 138]
    assert sites(built("mobilenet_v2", where="hidden", granularity=96), "s3.1.block") == {"expanded": 4}


@pytest.mark.parametrize("options", [{}, {"always_open": 2}])
def test_a_mobilenet_block_without_a_shortcut_keeps_groups_open_at_each_site(options):
    network = built("mobilenet_v2", gates="both", **options)
    ends = list(network.graph.edges)
    for site in network.sites:
        assert site.always_open == (0 if ends.count(ends[site.edge]) > 1 else options.get("always_open", 1))
    assert len(network.choices) == 10  # the blocks beside an identity
    shared = 320 // 64 - options.get("always_open", 1)  # what the last convolution reads is what the last block writes
    decided = network.units - len(ends) - sum(site.always_open for site in network.sites)
    assert network.gate_count == decided - shared + 10
    assert built("mobilenet_v2", gates="layers").gate_count == 10


def test_no_more_groups_stay_open_than_there_are():
    with pytest.raises(GraphError, match="always_open must lie in 0 to 2 groups, got 3"):
        mobilenet_v2(always_open=3)


def test_a_site_without_a_gate_needs_nothing_that_decides():
    """Where one group is all there is, and always open."""
    network = built("mobilenet_v2", width=0.1, image_size=32, granularity=10_000, conditional=True)
    beside = [name.removesuffix(".skip") for name in network.edge_names if name.endswith(".skip")]
    assert {network.edge_names[int(edge)].removesuffix(".block") for edge in network.heads} == set(beside)
    assert network.gate_count == 3 * len(beside) - 1  # the first block has two sites


def test_locked_gates_of_a_mobilenet():
    network = built("mobilenet_v2", lock=True, image_size=96)
    first, one, other = (columns(network, f"s5.{block}.block.expanded[7]") for block in range(3))
    assert one == other != first
    assert columns(network, "s5.1.block.input[0]") == columns(network, "s5.2.block.input[0]")


@pytest.mark.parametrize(
    ("options", "channels"),
    [
        ({}, (24, 96, 48, 120, 60, 132)),
        ({"depth": 22}, (24, 60, 30, 66, 33, 69)),
        ({"growth": 8}, (16, 64, 32, 80, 40, 88)),
        ({"reduction": 0.75}, (24, 96, 72, 144, 108, 180)),
        ({"bottleneck": False}, (16, 160, 80, 224, 112, 256)),
    ],
)
def test_channels_of_a_densenet(options: dict[str, Any], channels: tuple[int, ...]):
    network = densenet_exits(**options)
    shapes = dict(zip(network.graph.nodes, network.shapes, strict=True))
    assert tuple(shapes[name][0] for name in ("stem", "d0", "t0", "d1", "t1", "d2")) == channels
    assert [shapes[name][1] for name in ("stem", "d0", "d1", "d2")] == [32, 32, 16, 8]


def test_gates_of_exits_that_look_at_less_take_fewer_macs():
    looking = partial(densenet_exits, depth=10, exit_channels=4, exit_gates="features")

    def of_gates(pool: int) -> float:
        spaces = [looking(exit_pool=pool, conditional=each) for each in (True, False)]
        with_gates, without = (MACs().bind(space)(space.used(space.architecture("full"))) for space in spaces)
        return float(with_gates - without)

    def convolutions(pool: int, channels: list[int]) -> int:
        return sum(9 * 4 * (c + 4) * (side // pool) ** 2 for c, side in zip(channels, (32, 16), strict=True))

    space = looking()
    channels = [space.shapes[space.graph.nodes.index(name)][0] for name in ("d0", "d1")]
    linear = 2 * 2 * 4 * 16
    assert of_gates(1) == convolutions(1, channels) + linear
    assert of_gates(4) == convolutions(4, channels) + linear


def test_classifiers_of_exits_look_at_averages_of_squares():
    torch.manual_seed(0)
    whole, pooled = (exit_classifier(3, 5, hidden=4, pool=pool).eval() for pool in (1, 2))
    pooled.load_state_dict({f"{int(key[0]) + 1}{key[1:]}": value for key, value in whole.state_dict().items()})
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(pooled(x), whole(x.unflatten(3, (8, 2)).mean(4).unflatten(2, (8, 2)).mean(3)))
    macs = [MACs(gates=False).bind(densenet_exits(depth=10, exit_pool=pool)) for pool in (1, 2)]
    edge = densenet_exits(depth=10).exits[0]
    assert float(macs[1].per_edge[edge]) < 0.26 * float(macs[0].per_edge[edge])


def test_an_exit_that_answers_first_costs_its_classifier_whether_it_is_taken_or_not():
    network = densenet_exits(depth=10, exit_channels=4)
    macs, bare = MACs().bind(network), MACs(gates=False).bind(network)
    classifiers = [float(bare.per_edge[edge]) for edge in network.exits]
    linear = 2 * 3
    first, second, none = (network.used(row[None]) for row in network.ways())
    for used, beside in ((first, 0.0), (second, classifiers[0]), (none, sum(classifiers))):
        asked = 1 if used is first else 2
        assert float(macs(used) - bare(used)) == beside + asked * linear


@pytest.mark.parametrize(("gates", "beside"), [("answer", (0, 3, 6)), ("features", (0, 0, 0))])
def test_the_layers_of_an_exit_that_answers_first_count_whether_it_is_taken_or_not(gates: str, beside: tuple[int, ...]):
    network = densenet_exits(depth=10, exit_channels=4, exit_gates=gates)
    # a stem, three blocks of 2, a transition between two and a linear layer; an exit has 3
    passed = torch.tensor([1 + 2 + 3, 1 + 2 + 1 + 2 + 3, 10], dtype=torch.float64)
    expected = passed + torch.tensor(beside)
    layers, used = Layers().bind(network), network.used(network.ways())
    torch.testing.assert_close(layers(used), expected, rtol=0, atol=0)
    torch.testing.assert_close(layers(used.double().requires_grad_()).detach(), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("gates", "kind"), [("features", FeatureGate), ("answer", AnswerGate)])
def test_exits_of_a_densenet(gates: str, kind: type):
    network = densenet_exits(depth=10, exit_channels=16, classes=7, image_size=(8, 16), in_channels=1, exit_gates=gates)
    assert [network.edge_names[edge] for edge in network.exits] == ["d0.exit", "d1.exit"]
    assert (network.gate_count, network.independent, len(network.heads)) == (2, 0, 2)
    for edge, head in network.heads.items():
        classifier = network.modules_on_edges[int(edge)]
        assert type(head) is kind
        assert head.decide.in_features == (16 * 16 if gates == "features" else 3)
        assert (int(edge) in network.answers) is (gates == "answer")
        assert (classifier[0].out_channels, classifier[-1].in_features, classifier[-1].out_features) == (16, 16, 7)
    assert network.input_shape == (1, 8, 16)
    still = densenet_exits(depth=10, conditional=False)
    assert (still.gate_count, still.independent, len(still.heads)) == (2, 2, 0)
    used = {name: still.used(still.architecture(name))[0].bool().tolist() for name in ("exit1", "exit2", "full")}
    through = {name: {e for e, on in zip(still.edge_names, bits, strict=True) if on} for name, bits in used.items()}
    assert through["exit1"] == {"input", "d0.block", "d0.exit"}
    assert through["exit2"] == {"input", "d0.block", "t0.transition", "d1.block", "d1.exit"}
    assert through["full"] == set(still.edge_names) - {"d0.exit", "d1.exit"}


@pytest.mark.parametrize("key", SMALL)
def test_a_space_is_rebuilt_from_the_options_it_keeps(key: str):
    """Through JSON, which makes a tuple a list, as a run folder does."""
    network = small(key)
    read = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in json.loads(json.dumps(network.options)).items()
    }
    again = BY_NAME[network.name](**read)
    assert again.options == network.options
    assert (again.graph, again.unit_names(), again.shapes) == (network.graph, network.unit_names(), network.shapes)
    assert again.gate_of == network.gate_of


@pytest.mark.parametrize(
    ("arguments", "macs"),
    [
        (
            ["resnet", "--space.depth", "8", "--space.granularity", "[16,8,4]", "--space.shortcut", "identity"],
            12_268_160,
        ),
        (["resnet", "--space.depth", "8", "--space.gates", "layers", "--space.shortcut", "identity"], 12_268_160),
        (
            ["mobilenet_v2", "--space.strides", "cifar", "--space.granularity", "paper", "--space.classes", "10"],
            88_047_104,
        ),
        (["densenet_exits", "--space.conditional", "false"], 72_365_352),
    ],
)
def test_measured_through_the_command_line(arguments: list[str], macs: int, capsys: pytest.CaptureFixture[str]):
    assert main(["measure", *arguments, "--costs", "macs", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["costs"] == {"macs": macs}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet", {"depth": 21}, r"depth must be 6n \+ 2 \(8, 14, 20, ...\) or one of 18, 34, 50, 101, got 21"),
        ("resnet", {"depth": 2}, "depth must be .* got 2"),
        ("resnet", {"depth": 20.0}, "depth must be .* got 20.0"),
        ("resnet", {"depth": True}, "depth must be .* got True"),
        ("resnet", {"channels": 0}, "channels must be a whole number >= 1, got 0"),
        ("resnet", {"expansion": 0}, "expansion must be a number > 0, got 0"),
        ("resnet", {"expansion": "2"}, "expansion must be a number > 0, got '2'"),
        ("resnet", {"classes": 0}, "classes must be a whole number >= 1, got 0"),
        ("resnet", {"image_size": 0}, "image_size must be one side or"),
        ("resnet", {"gates": "filters"}, "gates must be channels or layers or both or none, got 'filters'"),
        ("resnet", {"where": "inside"}, "where must be hidden or output or ends or stream, got 'inside'"),
        ("resnet", {"shortcut": "none"}, "shortcut must be projection or identity, got 'none'"),
        ("resnet", {"task": "segmentation"}, "task must be classification, got 'segmentation'"),
        ("resnet", {"logits": 3}, "logits must be 1 or 2 for each gate, got 3"),
        ("resnet", {"granularity": 0}, "granularity must be a whole number >= 1 or 3 of them, .* group, got 0"),
        ("resnet", {"granularity": (1, 2)}, r"or 3 of them, one for each group, got \(1, 2\)"),
        ("resnet", {"granularity": "paper"}, "granularity must be a whole number >= 1 or 3 of them, .* got 'paper'"),
        ("resnet", {"granularity": 1.5}, "granularity must be a whole number >= 1 or 3 of them, .* got 1.5"),
        ("resnet", {"depth": 50, "granularity": "coarse"}, "whole number >= 1, 'paper', or 4 of them, .* got 'coarse'"),
        ("resnet", {"memory": True}, "memory is of gates that look at the input: expected conditional, got"),
        (
            "resnet",
            {"lock": True, "conditional": True, "gates": "both"},
            "lock of gates that look at the input needs gates on channels alone, got both",
        ),
        ("resnet", {"lock": True, "gates": "layers"}, "lock needs gates on channels: channels or both, got layers"),
        ("resnet", {"conditional": True, "gates": "none"}, "conditional needs gates: .*, got none"),
        ("mobilenet_v2", {"width": 0}, "width must be a number > 0, got 0"),
        ("mobilenet_v2", {"width": float("inf")}, "width must be a number > 0, got inf"),
        ("mobilenet_v2", {"width": True}, "width must be a number > 0, got True"),
        ("mobilenet_v2", {"strides": "mnist"}, "strides must be imagenet or cifar, got 'mnist'"),
        ("mobilenet_v2", {"always_open": 0}, "always_open must be a whole number >= 1, got 0"),
        ("mobilenet_v2", {"always_open": 2, "gates": "layers"}, "always_open is of gates on channels: .*, got layers"),
        ("mobilenet_v2", {"granularity": (1,) * 6}, "or 7 of them, one for each stage, got"),
        ("mobilenet_v2", {"where": "all"}, "where must be hidden or output or ends or stream, got 'all'"),
        ("mobilenet_v2", {"task": "segmentation"}, "task must be classification, got 'segmentation'"),
        ("densenet_exits", {"depth": 41}, r"depth must be 6n \+ 4 with bottlenecks, n >= 1, got 41"),
        ("densenet_exits", {"depth": 4}, r"depth must be 6n \+ 4 with bottlenecks, n >= 1, got 4"),
        ("densenet_exits", {"depth": 41, "bottleneck": False}, r"depth must be 3n \+ 4 without bottlenecks"),
        ("densenet_exits", {"growth": 0}, "growth must be a whole number >= 1, got 0"),
        ("densenet_exits", {"exit_pool": 17}, "exit_pool must be at most half of the image's side 32, got 17"),
        ("densenet_exits", {"exit_channels": 0}, "exit_channels must be a whole number >= 1, got 0"),
        ("densenet_exits", {"reduction": 0}, r"reduction must be a number in \(0, 1\], got 0"),
        ("densenet_exits", {"reduction": 1.5}, r"reduction must be a number in \(0, 1\], got 1.5"),
        ("densenet_exits", {"reduction": 1e-6}, "reduction must leave channels of 96, got 1e-06"),
        ("densenet_exits", {"image_size": 30}, "divisible by 4, got 30"),
        ("densenet_exits", {"task": "segmentation"}, "task must be classification, got 'segmentation'"),
    ],
)
def test_options_outside_their_range(name: str, options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message) as raised:
        BY_NAME[name](**options)
    assert "\n" not in str(raised.value)


# ---------------------------------------------------------------------------------------------------------- weights


class ReferenceBlock(nn.Module):
    """A ResNet's block under torchvision's names; a bottleneck where it is four times as wide as inside."""

    def __init__(self, into: int, hidden: int, out: int, stride: int) -> None:
        super().__init__()
        if out == 4 * hidden:
            convs = [(into, hidden, 1, 1), (hidden, hidden, 3, stride), (hidden, out, 1, 1)]
        else:
            convs = [(into, hidden, 3, stride), (hidden, out, 3, 1)]
        self.depth = len(convs)
        for place, (a, b, kernel, step) in enumerate(convs, start=1):
            self.add_module(f"conv{place}", nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False))
            self.add_module(f"bn{place}", nn.BatchNorm2d(b))
        self.downsample = None
        if stride > 1 or into != out:
            self.downsample = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        value = x
        for place in range(1, self.depth + 1):
            value = getattr(self, f"bn{place}")(getattr(self, f"conv{place}")(value))
            value = value.relu() if place < self.depth else value
        return (value + (x if self.downsample is None else self.downsample(x))).relu()


class ReferenceResNet(nn.Module):
    """torchvision's ResNet by its names, `width` channels in the first group."""

    def __init__(self, depth: int, width: int = 64, classes: int = 1000) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        blocks = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}[depth]
        into = width
        for group, number in enumerate(blocks):
            hidden = width << group
            out = hidden * (4 if depth >= 50 else 1)
            widths = [into, *[out] * (number - 1)]
            rows = [ReferenceBlock(a, hidden, out, 2 if group and not i else 1) for i, a in enumerate(widths)]
            self.add_module(f"layer{group + 1}", nn.Sequential(*rows))
            into = out
        self.fc = nn.Linear(into, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.bn1(self.conv1(x)).relu())
        return self.fc(self.layer4(self.layer3(self.layer2(self.layer1(x)))).mean((2, 3)))


def conv_norm_relu6(into: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
    conv = nn.Conv2d(into, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU6())


class ReferenceInvertedResidual(nn.Module):
    def __init__(self, into: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = into * expansion
        self.adds = stride == 1 and into == out
        expand = [conv_norm_relu6(into, hidden, 1)] if expansion > 1 else []
        filters = conv_norm_relu6(hidden, hidden, 3, stride, hidden)
        self.conv = nn.Sequential(*expand, filters, nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


class ReferenceMobileNet(nn.Module):
    """torchvision's MobileNetV2 by its names, of width 1 or, for a fast test, 8 channels throughout."""

    def __init__(self, classes: int = 1000, channels: int | None = None) -> None:
        super().__init__()
        into = channels or 32
        features = [conv_norm_relu6(3, into, 3, 2)]
        table = "1,16,1,1 6,24,2,2 6,32,3,2 6,64,4,2 6,96,3,1 6,160,3,2 6,320,1,1"
        for row in table.split():
            expansion, c, n, stride = map(int, row.split(","))
            for block in range(n):
                features.append(ReferenceInvertedResidual(into, channels or c, 1 if block else stride, expansion))
                into = channels or c
        self.features = nn.Sequential(*features, conv_norm_relu6(into, 1280, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


@pytest.mark.parametrize(
    ("name", "options"), [*(("resnet", {"depth": depth}) for depth in (18, 34, 50, 101)), ("mobilenet_v2", {})]
)
def test_names_and_shapes_are_torchvisions(name: str, options: dict[str, Any]):
    """At full size, without values."""
    with torch.device("meta"):
        reference = ReferenceResNet(**options) if options else ReferenceMobileNet()
    shapes = {key: value.shape for key, value in reference.state_dict().items()}
    gates = "both" if name == "mobilenet_v2" else "layers"
    assert {key: value.shape for key, value in learned(built(name, gates=gates, **options)).items()} == shapes


FORMS = {
    "resnet18": lambda gates: (
        resnet(depth=18, channels=8, classes=7, image_size=64, gates=gates),
        ReferenceResNet(18, 8, 7),
    ),
    "resnet50": lambda gates: (
        resnet(depth=50, channels=8, classes=7, image_size=64, gates=gates, granularity="paper", where="ends"),
        ReferenceResNet(50, 8, 7),
    ),
    "mobilenet_v2": lambda gates: (
        mobilenet_v2(width=0.025, classes=7, image_size=64, gates=gates),
        ReferenceMobileNet(7, 8),
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gates", ["both", "none"])
def test_loaded_weights_give_torchvisions_outputs(form: str, gates: str):
    """With all gates open, of random weights and running statistics; gates stay as they are."""
    network, reference = FORMS[form](gates)
    stir(reference, 5).eval()
    before = network.gates.values.clone()
    load_torchvision(network, reference.state_dict())
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output, _ = network.eval()(x, Fixed(network.architecture("full")))
        expected = reference(x)
    assert expected.std() > 0.1
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(network.gates.values, before)


def test_weights_of_before_the_counter_are_loaded():
    network, reference = FORMS["resnet18"]("none")
    old = {name: value for name, value in reference.state_dict().items() if "num_batches" not in name}
    load_torchvision(network, old)
    assert torch.equal(learned(network)["layer4.1.bn2.weight"], old["layer4.1.bn2.weight"])


def test_weights_that_do_not_fit_change_nothing():
    network, reference = FORMS["resnet18"]("channels")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = reference.state_dict()
    for changed, message in (
        ({"fc.bias": torch.zeros(1000)}, r"resnet takes torchvision's fc.bias of shape \(7,\), got \(1000,\)"),
        ({"conv1.weight": None}, r"conv1.weight of shape \(8, 3, 7, 7\), got NoneType"),
        ({"layer1.0.conv3.weight": torch.zeros(3)}, r"has no layer1.0.conv3.weight, got it of shape \(3,\)"),
    ):
        with pytest.raises(FileError, match=message):
            load_torchvision(network, {**state, **changed})
    del state["layer4.1.bn2.running_var"]
    with pytest.raises(FileError, match=r"layer4.1.bn2.running_var of shape \(64,\), got none"):
        load_torchvision(network, state)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("key", "form"), [("resnet", "resnet of depth 8"), ("densenet_exits", "densenet_exits of depth 10")]
)
def test_networks_that_torchvision_does_not_have(key: str, form: str):
    with pytest.raises(ConfigError, match=f"mobilenet_v2 and resnet of depth 18, 34, 50, 101, got {form}"):
        load_torchvision(small(key), {})
