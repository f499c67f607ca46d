"""What something costs: a space, a sub-network of it, a finished run, or an exported file, each by its own graph."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from budgetnet.budgets import parse_cost
from budgetnet.costs import Latency
from budgetnet.costs.measured import MeasuredModel
from budgetnet.errors import ConfigError, FileError
from budgetnet.export import file_latency, load, load_program
from budgetnet.extraction import state_bytes
from budgetnet.supernet import SuperNetwork

FILE_COSTS = {"macs": "MAC", "params": "parameter", "memory:params": "B", "latency": "ms"}
"""What can be measured of an exported file: latency is a median at batch 1, 1 thread."""


def measure_network(network: SuperNetwork, kept: Tensor, costs: Sequence[str]) -> dict[str, Any]:
    """Costs of one architecture of a space.

    Args:
        network: the space.
        kept: `(1, G)` decisions.
        costs: as written in budgets; those that a real network shows are measured.

    Returns:
        `{"costs": {"macs": 40899200, ...}, "units": {"macs": "MAC", ...}}`, keys as asked.

    Raises:
        ConfigError: a cost is unknown, or the architecture connects nothing.
    """
    used = network.used(kept)
    if not bool(network.connects(used)[0]):
        raise ConfigError("an architecture to measure must connect input and output, got one that does not")
    values: dict[str, float] = {}
    units: dict[str, str] = {}
    for text in costs:
        cost = parse_cost(text)
        if isinstance(cost, Latency):
            value = cost.measured(network, kept).value
        else:
            model = cost.bind(network)
            value = model.measure(kept)[0].value if isinstance(model, MeasuredModel) else float(model(used)[0])
        values[text], units[text] = int(value) if value.is_integer() else value, cost.unit
    return {"costs": values, "units": units}


def measure_file(path: str | Path, costs: Sequence[str]) -> dict[str, Any]:
    """Costs of an exported .onnx or .pt2 file, counted on its own graph.

    Raises:
        ConfigError: a cost cannot be measured of a file.
        FileError: the file is missing or no such network.
    """
    path = Path(path)
    for text in costs:
        if text not in FILE_COSTS:
            raise ConfigError(f"of a file can be measured {', '.join(FILE_COSTS)}, got {text!r}")
    load(path)  # refuses what its runtime does not run
    count = _count_onnx if path.suffix == ".onnx" else _count_pt2
    shape, counted = count(path)
    if not all(shape):
        raise FileError(f"{path} must say what size of images it takes, got {shape}")
    values = {
        text: file_latency(path, torch.zeros(1, *shape))["median"] if text == "latency" else counted[text]
        for text in costs
    }
    return {"costs": values, "units": {text: FILE_COSTS[text] for text in costs}}


def default_costs(target: str) -> list[str]:
    """What is measured where nothing is asked."""
    return list(FILE_COSTS) if target == "file" else ["macs", "params", "steps"]


def _count_pt2(path: Path) -> tuple[tuple[int, ...], dict[str, float]]:
    program = load_program(path)
    name = program.graph_signature.user_inputs[0]
    value = next(node.meta["val"] for node in program.graph.nodes if node.name == name)
    shape = tuple(int(size) for size in value.shape[1:])
    module = program.module()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(torch.zeros(1, *shape))
    additions = sum(
        prod(int(size) for size in node.meta["val"].shape[1:])
        for node in program.graph.nodes
        if node.op == "call_function" and node.target == torch.ops.aten.add.Tensor
    )
    params = sum(value.numel() for value in program.parameters())
    return shape, {
        "macs": int(counter.get_total_flops()) // 2 + additions,
        "params": params,
        "memory:params": state_bytes(module),
    }


def _count_onnx(path: Path) -> tuple[tuple[int, ...], dict[str, float]]:
    model = onnx.shape_inference.infer_shapes(onnx.load(str(path)))
    graph = model.graph
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    shapes = {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    macs = 0
    for node in graph.node:
        behind = shapes.get(node.output[0], ())
        if node.op_type == "Conv" and node.input[1] in weights:
            macs += prod(behind[1:]) * prod(weights[node.input[1]][1:])
        elif node.op_type in ("Gemm", "MatMul") and node.input[1] in weights:
            macs += prod(weights[node.input[1]])
        elif node.op_type == "Add" and not set(node.input) & set(weights):
            macs += prod(behind[1:])
        elif node.op_type in ("Conv", "Gemm", "MatMul", "ConvTranspose", "Attention"):
            raise FileError(f"{path} has a {node.op_type} whose MACs are not counted here")
    inputs = [value for value in graph.input if value.name not in weights]
    floats = [tensor for tensor in graph.initializer if tensor.data_type != onnx.TensorProto.INT64]
    params = sum(prod(tensor.dims) for tensor in floats)
    return shapes[inputs[0].name][1:], {"macs": macs, "params": params, "memory:params": 4 * params}
