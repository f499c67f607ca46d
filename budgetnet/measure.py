"""What something costs: a space, a sub-network of it, a finished run, or an exported file, each by its own graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from budgetnet.budgets import Cost, parse_cost
from budgetnet.costs import Function, Latency, stopwatch
from budgetnet.costs.measured import Measured, MeasuredModel
from budgetnet.costs.stopwatch import Rest
from budgetnet.errors import ConfigError, FileError
from budgetnet.export import file_latency, load, load_program
from budgetnet.extraction import state_bytes
from budgetnet.supernet import SuperNetwork

FILE_COSTS = {"macs": "MAC", "params": "parameter", "memory:params": "B", "memory:file": "B", "latency": "ms"}
"""What can be measured of an exported file: latency is a median at batch 1, 1 thread."""
OF_BRANCHES = ("memory:file", "latency")
"""What can be measured where it depends on the input what is computed."""
SETTINGS = ("Pad", "Clip", "Resize")
"""Operators of ONNX whose constants are no parameters."""
COUNTER = INDEX = 8
"""Bytes of a batch norm's number of batches, and of the number of a channel that is gathered."""


def measure_network(
    network: SuperNetwork, kept: Tensor, costs: Sequence[str], then: Mapping[Latency, Rest] | None = None
) -> dict[str, Any]:
    """Costs of one architecture of a space.

    Args:
        network: the space, whose weights do not matter to what is counted, but may to a function of one's own.
        kept: `(1, G)` decisions.
        costs: as written in budgets; those that a real network shows are measured.
        then: what the full network and the yardstick took on the machine as it was: milliseconds are of then.

    Returns:
        `{"costs": {"macs": 40899200, ...}, "units": {"macs": "MAC", ...}, "measured": {"latency": {"low", ...}, ...}}`,
        keys as asked; the last where something differs from call to call: "low" and "high", between which it is
        expected again, of a time "p10" and "p90", between which 8 of 10 calls took, and where that is of the machine as
        it was "slowness": how many times as slow it is now. What another machine takes is predicted:
        `"predicted": {text: {"processor", ..., "error"}}`.

    Raises:
        ConfigError: a cost is unknown or reads examples, or the architecture connects nothing.
    """
    if not bool(network.connects(network.used(kept))[0]):
        raise ConfigError("an architecture to measure must connect input and output, got one that does not")
    then = then or {}
    values: dict[str, float] = {}
    units: dict[str, str] = {}
    measured: dict[str, dict[str, float]] = {}
    predicted: dict[str, dict[str, Any]] = {}
    for text in costs:
        cost = parse_cost(text)
        if isinstance(cost, Function) and cost.of == "examples":
            raise ConfigError(f"{text} reads examples, and measure has none: evaluate measures it on test images")
        if isinstance(cost, Latency) and cost.elsewhere:
            model = cost.predicted(network)
            value = float(model(network.used(kept))[0])
            found, predicted[text] = Measured(value, value, value), model.machine
        elif isinstance(cost, Latency) and cost in then:
            found = cost.compared(network, kept, then[cost])
            measured[text] = {**found.told(), "slowness": found.slowness}
        elif (found := cost_of(cost, network, kept)).low < found.high:
            measured[text] = found.told()
        values[text], units[text] = int(found.value) if found.value.is_integer() else found.value, cost.unit
    told = {"measured": measured, "predicted": predicted}
    return {"costs": values, "units": units, **{name: each for name, each in told.items() if each}}


def cost_of(cost: Cost, network: SuperNetwork, kept: Tensor, *, decided: bool = False) -> Measured:
    """What one architecture, `(1, G)`, costs; of its file with weights that were trained.

    Args:
        cost: that a real network shows, or that is counted.
        network: the space.
        kept: connects input and output.
        decided: whether it is of what is extracted, which has nothing left to decide.
    """
    if isinstance(cost, Latency | Function):
        return cost.measured(network, kept)
    model = cost.bind(network).decided() if decided else cost.bind(network)
    if isinstance(model, MeasuredModel):
        return model.beforehand(kept)
    value = float(model(network.used(kept))[0])
    return Measured(value, value, value)


def measure_file(path: str | Path, costs: Sequence[str] = ()) -> dict[str, Any]:
    """Costs of an exported .onnx or .pt2 file, counted on its own graph.

    "memory:params" are the bytes of its parameters, of the batch norms that are left and of the numbers of gathered
    channels, as of the extracted network; an .onnx file has no biases of zeros, and none are counted.

    Args:
        path: of the file.
        costs: of `FILE_COSTS`; none for all that it has.

    Returns:
        As `measure_network`.

    Raises:
        ConfigError: a cost cannot be measured of a file, or of one that computes what its input needs.
        FileError: the file is missing or no such network.
    """
    path = Path(path)
    for text in costs:
        if text not in FILE_COSTS:
            raise ConfigError(f"of a file can be measured {', '.join(FILE_COSTS)}, got {text!r}")
    load(path)  # refuses what its runtime does not run
    counted: dict[str, float] = {"memory:file": path.stat().st_size}
    if path.suffix == ".onnx":
        model = onnx.load(str(path))
        shape = _onnx_shape(model)
        branches = any(node.op_type in ("If", "Loop", "Scan") for node in model.graph.node)
        lacking = [text for text in costs if branches and text not in OF_BRANCHES]
        if lacking:
            raise ConfigError(
                f"what {path} computes depends on its input: of it can be measured {', '.join(OF_BRANCHES)}, "
                f"got {lacking[0]!r}, whose expected value is in its run's result.json"
            )
        counted |= {} if branches else _count_onnx(path, model)
    else:
        shape, found = _count_pt2(path)
        counted |= found
    if not all(shape):
        raise FileError(f"{path} must say what size of images it takes, got {shape}")
    asked = list(costs) or [text for text in FILE_COSTS if text in counted or text == "latency"]
    measured: dict[str, dict[str, float]] = {}
    if "latency" in asked:
        timing = file_latency(path, torch.zeros(1, *shape), seconds=stopwatch.SECONDS, patience=stopwatch.PATIENCE)
        counted["latency"] = timing["median"]
        measured["latency"] = {name: timing[name] for name in ("p10", "p90")}
    return {
        "costs": {text: counted[text] for text in asked},
        "units": {text: FILE_COSTS[text] for text in asked},
        **({"measured": measured} if measured else {}),
    }


DEFAULT = ("macs", "params", "steps")
"""What is measured of a space or a run where nothing is asked."""


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


def _onnx_shape(model: onnx.ModelProto) -> tuple[int, ...]:
    """Channels, height and width of the examples that a model takes, 0 where it does not say."""
    weights = {tensor.name for tensor in model.graph.initializer}
    taken = next(value for value in model.graph.input if value.name not in weights)
    return tuple(dim.dim_value for dim in taken.type.tensor_type.shape.dim[1:])


def _count_onnx(path: Path, model: onnx.ModelProto) -> dict[str, float]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    shapes = {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
    macs = aside = 0
    settings, statistics = set[str](), set[str]()
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
        elif node.op_type == "Gather":
            aside += INDEX * prod(weights.get(node.input[1], (0,)))
        elif node.op_type == "BatchNormalization":
            aside += COUNTER
            statistics |= set(node.input[3:])
        elif node.op_type in SETTINGS:
            settings |= set(node.input)
    floats = {each.name for each in graph.initializer if each.data_type != onnx.TensorProto.INT64} - settings
    params, seen = (sum(prod(weights[name]) for name in names) for names in (floats - statistics, floats & statistics))
    return {"macs": macs, "params": params, "memory:params": 4 * (params + seen) + aside}
