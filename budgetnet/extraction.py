"""From a network with choices and one architecture to a plain `torch.nn` network that needs no other package."""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Iterator
from math import prod
from operator import add
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import pad
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.flop_counter import FlopCounterMode

from budgetnet.errors import ConfigError
from budgetnet.gated import GatedSequential
from budgetnet.shapes import PLAIN, evaluating
from budgetnet.supernet import SuperNetwork

Plain = TypeVar("Plain", bound=nn.Module)


def extract(network: SuperNetwork, kept: Tensor) -> fx.GraphModule:
    """The plain network of one architecture: its used modules, copied, and the sums between them.

    Args:
        network: the network with choices; stays as it is.
        kept: `(1, G)` decisions in {0, 1}.

    Returns:
        A `torch.fx.GraphModule` of `torch.nn` layers that maps `(B, C, H, W)` to what `network` gives
        under `Fixed(kept)`.

    Raises:
        ConfigError: the architecture does not connect input and output.
    """
    whole = connected(network, kept)
    used = whole[0].bool().tolist()
    graph, modules = fx.Graph(), nn.Module()

    def free(name: str) -> str:
        place = re.sub(r"\W+", "_", name)
        while hasattr(modules, place):  # another edge's, or a name that every module has
            place += "_"
        return place

    def call(name: str, module: nn.Module, value: fx.Node) -> fx.Node:
        if isinstance(module, nn.Identity):
            return value
        place = free(name)
        modules.add_module(place, duplicate(module, {}))
        return graph.call_module(place, (value,))

    def select(name: str, value: fx.Node, channels: Tensor) -> fx.Node:
        place = free(name)
        modules.register_buffer(place, channels)
        return graph.call_function(torch.index_select, (value, 1, graph.get_attr(place)))

    def narrow(edge: int, value: fx.Node) -> fx.Node:
        """The edge with its open channels alone."""
        name, plain, reads, writes = network.edge_names[edge], *narrowed(network, edge, whole)
        if reads is not None:
            value = select(f"{name}_reads", value, reads)
        value = call(name, plain, value)
        if writes is not None:
            behind = network.shapes[network.graph.edges[edge][1]]
            value = graph.call_function(pad, (value, (*[0, 0] * (len(behind) - 1), 0, 1)))
            value = select(f"{name}_writes", value, writes)
        return value

    values = {network.graph.source: graph.placeholder("x")}
    for node in network.graph.order:
        total: fx.Node | None = None
        for edge in network.graph.incoming[node]:
            if used[edge]:
                start = values[network.graph.edges[edge][0]]
                value = narrow(edge, start)
                total = value if total is None else graph.call_function(add, (total, value))
        if total is not None:
            values[node] = call(f"{network.graph.nodes[node]}_activation", network.activations[node], total)
    graph.output(values[network.graph.sink])
    plain = fx.GraphModule(modules, graph, class_name="ExtractedNetwork")
    return plain.train(network.training)


def narrowed(network: SuperNetwork, edge: int, used: Tensor) -> tuple[nn.Module, Tensor | None, Tensor | None]:
    """The module of an edge with its open channels alone, gathered and scattered only where its nodes hold others, too.

    Args:
        network: the network with choices.
        edge: of it.
        used: `(1, U)` units.

    Returns:
        The module: that of the network if it has no gates on channels, else a copy; the places of the channels that it
        reads in the value that it is given, None for all; and for each channel of the value that it is added to its
        place in the output, where one more channel, of zeros, stands behind the last; None where they are the same.
    """
    module = network.modules_on_edges[edge]
    if not isinstance(module, GatedSequential):
        return module, None, None
    start, end = network.graph.edges[edge]
    plain, into, out = module.narrowed(network.groups_of(edge, used)[0].to(network.gates.values.device))
    before, behind = (_held(network, node, used, like) for node, like in ((start, into), (end, out)))
    if into is not None and before is not None:
        into = None if len(into) == len(before) else torch.searchsorted(before, into)
    if out is None or (behind is not None and len(out) == len(behind)):
        return plain, into, None
    behind = torch.arange(module.out_channels).to(out) if behind is None else behind
    place = torch.full_like(behind, len(out))
    place[torch.searchsorted(behind, out)] = torch.arange(len(out)).to(out)
    return plain, into, place


def _held(network: SuperNetwork, node: int, used: Tensor, like: Tensor | None) -> Tensor | None:
    """The numbers of the channels that a node holds in `(1, U)` used units, None for all; on the device of `like`."""
    stream = network.stream_of(node)
    if stream is None or like is None:  # what opens all its channels finds all of them held
        return None
    return stream.held(used)[0].nonzero().flatten().to(like.device)


def duplicate(module: nn.Module, known: dict[int, Any]) -> nn.Module:
    """What `copy.deepcopy` gives, of `PLAIN` layers in a fifth of the time: an architecture has dozens.

    Args:
        module: stays as it is.
        known: what was copied before, as the second argument of `copy.deepcopy`.
    """
    if type(module) not in PLAIN or id(module) in known:
        return copy.deepcopy(module, known)
    known[id(module)] = twin = type(module).__new__(type(module))
    for name, value in vars(module).items():
        if name == "_modules":
            new: Any = {key: part if part is None else duplicate(part, known) for key, part in value.items()}
        elif value is None or type(value) in (bool, int, float, str):
            new = value
        elif type(value) in (dict, OrderedDict, set) and not value:  # hooks, of which there mostly are none
            new = type(value)()
        else:
            new = copy.deepcopy(value, known)
        vars(twin)[name] = new
    return twin


def connected(network: SuperNetwork, kept: Tensor) -> Tensor:
    """The units that an architecture, `(1, G)`, uses, `(1, U)`.

    Raises:
        ConfigError: it does not connect input and output.
    """
    used = network.used(kept)
    if not bool(network.connects(used)[0]):
        raise ConfigError("an architecture to extract must connect input and output, got one that does not")
    return used


def fold_batch_norm(network: Plain) -> Plain:
    """A copy for inference in which each batch norm right behind a convolution has become part of it.

    That is where it is sure that layers are called one after the other: in an `nn.Sequential`, and in those that
    another one, or a traced graph, calls as a whole. A module with a forward of its own may call its layers in any way.
    """
    folded = copy.deepcopy(network).eval()
    for row in rows_of_layers(folded):
        layers: list[nn.Module] = []
        for layer in row:
            both = fused(layers[-1], layer) if layers else None
            if both is None:
                layers.append(layer)
            else:
                layers[-1] = both
        if len(layers) < len(row):
            for index in reversed(range(len(row))):
                del row[index]
            row.extend(layers)
    return folded


def rows_of_layers(module: nn.Module) -> Iterator[nn.Sequential]:
    """Those rows of layers of which it is sure that they are called one after the other."""
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        for layer in module:
            yield from rows_of_layers(layer)
        yield module
    elif isinstance(module, fx.GraphModule):
        called = {str(node.target) for node in module.graph.nodes if node.op in ("call_module", "get_attr")}
        parts = dict(module.named_modules())
        for name in called & set(parts):
            if not any(other.startswith(f"{name}.") for other in called):
                yield from rows_of_layers(parts[name])


def fused(before: nn.Module, layer: nn.Module) -> nn.Module | None:
    """One convolution in place of a convolution and a batch norm behind it, None where the two are something else.

    A batch norm without running statistics asks its batch and stays, and so do layers with hooks.
    """
    hooked = any(one._forward_hooks or one._forward_pre_hooks for one in (before, layer))
    if type(before) is not nn.Conv2d or type(layer) is not nn.BatchNorm2d or layer.running_mean is None or hooked:
        return None
    return fuse_conv_bn_eval(before, layer)


def count(network: fx.GraphModule, example: Tensor) -> dict[str, int]:
    """MACs and parameters of a plain network, counted on itself, beside and independent of the cost models.

    Args:
        network: what `extract` returns.
        example: `(1, C, H, W)`.

    Returns:
        `{"macs", "params"}`: multiply-adds of convolutions, linear layers and the sums between modules.
    """
    additions = 0

    class Additions(fx.Interpreter):
        def call_function(self, target, args, kwargs):  # type: ignore[no-untyped-def]
            nonlocal additions
            result = super().call_function(target, args, kwargs)
            additions += prod(result.shape[1:]) if target is add else 0
            return result

    with evaluating(network), torch.no_grad(), FlopCounterMode(display=False) as counter:
        Additions(network).run(example)
    return {
        "macs": int(counter.get_total_flops()) // 2 + additions,
        "params": sum(value.numel() for value in network.parameters()),
    }


def state_bytes(network: nn.Module) -> int:
    """Bytes of what a network holds: parameters and buffers."""
    return sum(value.numel() * value.element_size() for value in network.state_dict().values())
