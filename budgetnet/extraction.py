"""From a network with choices and one architecture to a plain `torch.nn` network that needs no other package."""

from __future__ import annotations

import copy
import re
from math import prod
from operator import add

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.flop_counter import FlopCounterMode

from budgetnet.errors import ConfigError
from budgetnet.supernet import SuperNetwork, evaluating


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
    used = network.used(kept)[0].bool().tolist()
    if not any(used):
        raise ConfigError("an architecture to extract must connect input and output, got one that does not")
    graph, modules = fx.Graph(), nn.Module()

    def call(name: str, module: nn.Module, value: fx.Node) -> fx.Node:
        if isinstance(module, nn.Identity):
            return value
        place = re.sub(r"\W+", "_", name)
        while hasattr(modules, place):  # another edge's, or a name that every module has
            place += "_"
        modules.add_module(place, copy.deepcopy(module))
        return graph.call_module(place, (value,))

    values = {network.graph.source: graph.placeholder("x")}
    for node in network.graph.order:
        total: fx.Node | None = None
        for edge in network.graph.incoming[node]:
            if used[edge]:
                start = values[network.graph.edges[edge][0]]
                value = call(network.edge_names[edge], network.modules_on_edges[edge], start)
                total = value if total is None else graph.call_function(add, (total, value))
        if total is not None:
            values[node] = call(f"{network.graph.nodes[node]}_activation", network.activations[node], total)
    graph.output(values[network.graph.sink])
    plain = fx.GraphModule(modules, graph, class_name="ExtractedNetwork")
    return plain.train(network.training)


def fold_batch_norm(network: fx.GraphModule) -> fx.GraphModule:
    """A copy for inference in which each batch norm right behind a convolution has become part of it."""
    folded = copy.deepcopy(network).eval()
    for parent in list(folded.modules()):
        if isinstance(parent, nn.Sequential):
            layers: list[nn.Module] = []
            for layer in parent:
                before = layers[-1] if layers else None
                if isinstance(layer, nn.BatchNorm2d) and isinstance(before, nn.Conv2d):
                    layers[-1] = fuse_conv_bn_eval(before, layer)
                else:
                    layers.append(layer)
            if len(layers) < len(parent):
                for index in reversed(range(len(parent))):
                    del parent[index]
                parent.extend(layers)
    return folded


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
            additions += prod(result.shape[1:])
            return result

    with evaluating(network), torch.no_grad(), FlopCounterMode(display=False) as counter:
        Additions(network).run(example)
    return {
        "macs": int(counter.get_total_flops()) // 2 + additions,
        "params": sum(value.numel() for value in network.parameters()),
    }
