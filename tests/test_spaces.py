"""The named spaces have the edges, choices and shapes that the papers' tables follow from."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

from budgetnet.errors import ConfigError
from budgetnet.sites import AlwaysOn
from budgetnet.spaces import BY_NAME, conv_fabric, resnet_fabric


@pytest.mark.parametrize(("width", "choices"), [(1, 5), (2, 26), (4, 58), (8, 122)])
def test_choices_of_the_papers_conv_fabrics(width: int, choices: int):
    network = conv_fabric(width=width, channels=2)
    assert network.gate_count == choices
    assert len(network.graph.edges) == choices + 2  # the input and output modules are always there
    assert len(network.graph.nodes) == 6 * width + 2


@pytest.mark.parametrize(
    ("width", "depth", "task"),
    [*product((2, 3, 5), (1, 2, 3, 4), ("classification", "segmentation")), (1, 2, "classification")],
)
def test_choices_of_any_conv_fabric(width: int, depth: int, task: str):
    """Three to each layer but at the borders, and the two outer chains."""
    network = conv_fabric(width=width, depth=depth, channels=1, image_size=8, task=task)
    chains = (1 if width == 1 else 2) * (depth - 1)
    assert network.gate_count == (width - 1) * (3 * depth - 2) + chains


def test_layers_of_a_conv_fabric_hear_their_neighbours():
    network = conv_fabric(width=3, depth=3, channels=2, image_size=8)
    heard = {f"l{c}.s{s}": set() for c in range(3) for s in range(3)}
    for name, kind in zip(network.edge_names, network.kinds, strict=True):
        start, _, end = name.partition(">")
        if end:
            heard[end].add((start, kind))
    assert heard["l1.s1"] == {("l0.s0", "down"), ("l0.s1", "same"), ("l0.s2", "up")}
    assert heard["l1.s0"] == {("l0.s0", "same"), ("l0.s1", "up")}
    assert heard["l0.s2"] == {("l0.s1", "down")}
    assert heard["l2.s2"] == {("l1.s1", "down"), ("l1.s2", "same"), ("l2.s1", "down")}
    assert heard["l2.s0"] == {("l1.s0", "same"), ("l1.s1", "up")}


def test_the_last_column_of_a_segmenting_fabric_leads_up():
    network = conv_fabric(width=2, depth=3, channels=2, image_size=8, task="segmentation")
    assert {"l1.s2>l1.s1", "l1.s1>l1.s0", "l0.s0>l0.s1"} <= set(network.edge_names)
    assert "l1.s0>l1.s1" not in network.edge_names


@pytest.mark.parametrize(
    ("size", "depth", "resolutions"),
    [(32, None, 6), (256, None, 9), (8, None, 4), ((24, 40), None, 4), ((6, 10), None, 2), (7, 1, 1), (32, 3, 3)],
)
def test_depth_is_as_many_resolutions_as_halve_evenly_unless_told(size, depth, resolutions: int):
    network = conv_fabric(width=2, depth=depth, channels=1, image_size=size)
    assert len(network.graph.nodes) == 2 * resolutions + 2
    assert network.options["depth"] == resolutions


def test_each_scale_has_half_the_pixels():
    network = conv_fabric(width=2, depth=3, channels=5, image_size=(8, 12))
    shapes = dict(zip(network.graph.nodes, network.shapes, strict=True))
    assert [shapes[f"l1.s{s}"] for s in range(3)] == [(5, 8, 12), (5, 4, 6), (5, 2, 3)]


@pytest.mark.parametrize("size", [8, (8, 12), (12, 4)])
@pytest.mark.parametrize(("width", "task"), [(1, "classification"), (2, "classification"), (2, "segmentation")])
def test_conv_fabrics_predict_for_each_image_or_for_each_pixel(size, width: int, task: str):
    network = conv_fabric(width=width, depth=2, channels=2, classes=7, image_size=size, in_channels=1, task=task)
    height, breadth = (size, size) if isinstance(size, int) else size
    output, _ = network(torch.randn(3, 1, height, breadth), AlwaysOn())
    assert output.shape == ((3, 7, height, breadth) if task == "segmentation" else (3, 7))


def test_the_papers_channels_are_the_defaults():
    assert conv_fabric(width=1, depth=2).options["channels"] == 128
    assert conv_fabric(width=2, depth=2, task="segmentation").options["channels"] == 64


@pytest.mark.parametrize("width", [1, 2, 3])
def test_a_classifier_pools_only_where_the_coarsest_maps_are_larger_than_a_pixel(width: int):
    """At full depth they are 1x1, and the module is that of the paper alone."""
    for size, pools in ((8, 0), ((8, 16), 1)):
        network = conv_fabric(width=width, depth=4, channels=1, image_size=size)
        assert sum(isinstance(part, nn.AdaptiveAvgPool2d) for part in network.modules()) == pools


# width: blocks, projections, identities, sums; from the rules of the appendix, with two mirrored layers at each end
FABRICS = {3: (23, 16, 7, 9), 5: (41, 28, 13, 15), 7: (59, 40, 19, 21), 9: (77, 52, 25, 27), 18: (158, 106, 52, 54)}


@pytest.mark.parametrize(("width", "counts"), FABRICS.items())
def test_modules_of_the_papers_resnet_fabrics(width: int, counts: tuple[int, int, int, int]):
    network = resnet_fabric(width=width, channels=1)
    blocks, projections, identities = (network.kinds.count(kind) for kind in ("block", "projection", "identity"))
    sums = sum(len(entering) > 1 for entering in network.graph.incoming)
    assert (blocks, projections, identities, sums) == counts
    assert network.gate_count == blocks + projections + identities
    assert blocks == projections + identities  # each block has its shortcut beside it
    assert blocks - 3 * width == 2 * (3 * width - 2)  # extras: s, l and r, less one at each end of a group


def test_blocks_of_a_resnet_fabric_hear_the_group_before_mirrored():
    """Of width 3: s hears block 1 - d, l block 2 - d, r block -d; before the first stands that group's input."""
    network = resnet_fabric(width=3, channels=1)
    hears = {}
    for (start, end), name in zip(network.graph.edges, network.edge_names, strict=True):
        if name.endswith(".block"):
            hears.setdefault(network.graph.nodes[end], []).append(network.graph.nodes[start])
    assert hears["g0.0"] == ["stem"]
    assert hears["g1.0"] == ["g0.1", "g0.0", "g0.2"]  # s, r, and the block before
    assert hears["g1.1"] == ["g0.0", "g0.1", "stem", "g1.0"]  # s, l, r
    assert hears["g1.2"] == ["stem", "g0.0", "g1.1"]  # s, l
    assert hears["g2.1"] == ["g1.0", "g1.1", "g0.2", "g2.0"]
    assert hears["g2.2"] == ["g0.2", "g1.0", "g2.1"]


def test_modules_into_a_layer_are_listed_as_in_the_reference():
    """The extra blocks each before its shortcut, then the main shortcut before its block: step counts rest on it."""
    network = resnet_fabric(width=3, channels=1)
    names = [name for name in network.edge_names if name.startswith("g1.1.")]
    extra = [f"g1.1.{shift}.{part}" for shift in "slr" for part in ("block", "skip")]
    assert names == [*extra, "g1.1.skip", "g1.1.block"]


def test_a_layer_two_groups_back_is_met_with_stride_4():
    network = resnet_fabric(width=3, channels=2, image_size=8)
    module = dict(zip(network.edge_names, network.modules_on_edges, strict=True))
    assert module["g2.2.s.skip"][0].stride == (4, 4)
    assert (module["g2.2.s.skip"][0].in_channels, module["g2.2.s.skip"][0].out_channels) == (2, 8)


@pytest.mark.parametrize(("shifts", "choices"), [("", 12), ("s", 20), ("lr", 20), ("slr", 28)])
def test_shifts_say_which_extra_connections_there_are(shifts: str, choices: int):
    """Of width 2: 6 blocks with shortcuts, and s twice, l and r once for each of two later groups."""
    network = resnet_fabric(width=2, channels=1, shifts=shifts)
    assert network.gate_count == choices
    if not shifts:
        assert torch.equal(network.architecture("resnet"), network.architecture("full"))


@pytest.mark.parametrize("options", [{"width": 1}, {"groups": 1}, {"groups": 2, "shifts": "s"}, {"groups": 4}])
@pytest.mark.parametrize("size", [8, (16, 8)])
def test_resnet_fabrics_classify_images_of_any_divisible_size(options, size):
    network = resnet_fabric(channels=2, classes=3, in_channels=4, image_size=size, **({"width": 2} | options))
    output, _ = network(torch.randn(2, *network.input_shape), AlwaysOn())
    assert output.shape == (2, 3)
    assert network.used(network.architecture("resnet")).any()


@pytest.mark.parametrize("build", [resnet_fabric, conv_fabric])
def test_a_space_is_rebuilt_from_the_options_it_keeps(build):
    network = build(width=2, channels=2, image_size=(8, 16), classes=3)
    again = BY_NAME[network.name](**network.options)
    assert again.options == network.options
    assert (again.graph, again.edge_names, again.shapes) == (network.graph, network.edge_names, network.shapes)


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (conv_fabric, {"width": 0}, "width must be a whole number >= 1, got 0"),
        (conv_fabric, {"width": 2.0}, "width must be a whole number >= 1, got 2.0"),
        (conv_fabric, {"width": True}, "width must be a whole number >= 1, got True"),
        (conv_fabric, {"depth": 0}, "depth must be a whole number >= 1, got 0"),
        (conv_fabric, {"channels": 0}, "channels must be a whole number >= 1, got 0"),
        (conv_fabric, {"classes": 0}, "classes must be"),
        (conv_fabric, {"in_channels": -3}, "in_channels must be"),
        (conv_fabric, {"task": "detection"}, "task must be classification or segmentation, got 'detection'"),
        (conv_fabric, {"image_size": 12, "depth": 4}, "divisible by 8, got 12"),
        (conv_fabric, {"image_size": 0}, "image_size must be one side or"),
        (conv_fabric, {"image_size": (8, 8, 8)}, "image_size must be one side or"),
        (conv_fabric, {"width": 1, "depth": 1}, "one column and one resolution has no choice"),
        (conv_fabric, {"width": 1, "task": "segmentation"}, "segmentation needs width > 1"),
        (resnet_fabric, {"width": 0}, "width must be a whole number >= 1, got 0"),
        (resnet_fabric, {"groups": 0}, "groups must be a whole number >= 1, got 0"),
        (resnet_fabric, {"shifts": "sx"}, "shifts must be letters of 'slr', got 'sx'"),
        (resnet_fabric, {"task": "segmentation"}, "task must be classification, got 'segmentation'"),
        (resnet_fabric, {"image_size": 30}, "divisible by 4, got 30"),
        (resnet_fabric, {"image_size": (32, 30)}, "divisible by 4, got"),
    ],
)
def test_options_outside_their_range(build, options, message):
    with pytest.raises(ConfigError, match=message):
        build(**options)
