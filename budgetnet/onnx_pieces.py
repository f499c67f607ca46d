"""Parts of ONNX graphs: written by torch's exporter once, put together as often as one likes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from operator import add
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx, nn

from budgetnet.errors import ConfigError
from budgetnet.export import exporting
from budgetnet.extraction import fold_batch_norm
from budgetnet.gated import GatedSequential
from budgetnet.shapes import Shape
from budgetnet.supernet import SuperNetwork

ORDINARY = (
    *(nn.Sequential, nn.Identity, nn.Flatten, nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.Dropout),
    *(nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d, nn.ZeroPad2d, nn.ZeroPad3d),
)
"""Layers that torch's exporters are known to write: those of the named spaces, and their like."""


@dataclass(frozen=True)
class Piece:
    """Part of an exported graph.

    Attributes:
        inputs, output: names of what it takes and gives.
        nodes: between these.
        weights: of the nodes.
        opset: of the nodes.
        ir: version of the format that they are written in.
    """

    inputs: tuple[str, ...]
    output: str
    nodes: list[onnx.NodeProto]
    weights: list[onnx.TensorProto]
    opset: int
    ir: int

    @property
    def size(self) -> int:
        """Bytes of its weights."""
        return sum(len(weight.raw_data) for weight in self.weights)

    def model(self, graph: onnx.GraphProto) -> onnx.ModelProto:
        """A model of a graph that such pieces are in."""
        opset = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, opset_imports=opset, producer_name="budgetnet", ir_version=self.ir)


class Scope:
    """A graph that is being written: the whole, or a branch.

    Args:
        names: numbers for names, none twice in the whole model.
    """

    def __init__(self, names: Iterator[int]) -> None:
        self.names = names
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def node(self, kind: str, inputs: Sequence[str], *, output: str | None = None, **attributes: Any) -> str:
        """Adds a node and names its output."""
        name = output or f"{kind.lower()}_{next(self.names)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def split(self, value: str, sizes: Sequence[int]) -> list[str]:
        """Cuts the columns of a `(1, n)` tensor into parts and names them."""
        if len(sizes) == 1:
            return [value]
        names = [f"part_{next(self.names)}" for _ in sizes]
        self.nodes.append(helper.make_node("Split", [value, self.constant(np.array(sizes, np.int64))], names, axis=1))
        return names

    def constant(self, values: np.ndarray[Any, Any]) -> str:
        """Adds an array and names it."""
        name = f"constant_{next(self.names)}"
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def call(self, piece: Piece, inputs: Sequence[str], weights: Mapping[str, Tensor] | None = None) -> str:
        """Adds a copy of a piece, with names of its own, and names its output.

        Args:
            piece: what to copy.
            inputs: names of what it takes.
            weights: in place of its own, by the names that they have in the exported module.
        """
        names, sizes = dict(zip(piece.inputs, inputs, strict=True)), dict[str, int]()
        flat = flattened(piece, weights or {})
        for weight in piece.weights:
            new, own = onnx.TensorProto(), flat.get(weight.name, (weights or {}).get(weight.name.split(".", 2)[-1]))
            if own is not None and len(own) != weight.dims[0]:
                sizes[weight.name] = len(own)
            new.CopyFrom(weight if own is None else numpy_helper.from_array(array_of(own)))
            new.name = names[weight.name] = f"weight_{next(self.names)}"
            self.weights.append(new)
        for node in piece.nodes:
            fresh = onnx.NodeProto()
            fresh.CopyFrom(node)
            del fresh.input[:], fresh.output[:]
            fresh.name = ""
            fresh.input.extend(names[name] if name else "" for name in node.input)
            for attribute in fresh.attribute:
                if attribute.name == "group" and attribute.i > 1 and node.input[1] in sizes:
                    attribute.i = sizes[node.input[1]]  # a depthwise convolution has a group for each channel
            for name in node.output:
                names[name] = f"{node.op_type.lower()}_{next(self.names)}" if name else ""
            fresh.output.extend(names[name] if name else "" for name in node.output)
            self.nodes.append(fresh)
        return names[piece.output]

    def choose(self, condition: str, then: Callable[[Scope], str], otherwise: Callable[[Scope], str]) -> str:
        """Adds an `If` whose branches are written by the two functions, which name their output."""
        graphs = []
        for write in (then, otherwise):
            scope = Scope(self.names)
            output = write(scope)
            if output not in {name for node in scope.nodes for name in node.output}:
                output = scope.node("Identity", [output])  # a branch has to make what it gives
            value = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
            graphs.append(helper.make_graph(scope.nodes, f"branch_{next(self.names)}", [], [value], scope.weights))
        return self.node("If", [condition], then_branch=graphs[0], else_branch=graphs[1])


def flattened(piece: Piece, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By their names the shapes to which values are flattened for a linear layer, where it reads fewer channels."""
    known = {weight.name: weight for weight in piece.weights}
    found: dict[str, Tensor] = {}
    reads: dict[str, int] = {}
    for node in reversed(piece.nodes):
        if node.op_type == "Gemm":
            own = weights.get(node.input[1].split(".", 2)[-1])
            if own is not None and own.shape[1] != known[node.input[1]].dims[1]:
                reads[node.input[0]] = own.shape[1]
        elif node.op_type == "Reshape" and node.output[0] in reads:
            shape = numpy_helper.to_array(known[node.input[1]])
            found[node.input[1]] = torch.tensor([*shape[:-1].tolist(), reads[node.output[0]]])
    return found


def array_of(value: Tensor) -> np.ndarray[Any, Any]:
    """The numbers of a tensor, in float32 where they are no whole ones."""
    value = value.detach().cpu()
    array: np.ndarray[Any, Any] = (value.float() if value.is_floating_point() else value).numpy()
    return array


class Pieces(nn.Module):
    """Modules side by side, each on an input of its own, to be exported together.

    Args:
        free: the pieces take any number of examples, as a file by `export` does; False for one.
    """

    def __init__(self, *, free: bool = False) -> None:
        super().__init__()
        self.free = free
        self.parts = nn.ModuleList()
        self.shapes: list[tuple[tuple[int, ...], ...]] = []

    def add(self, module: nn.Module, *shapes: Sequence[int]) -> int:
        """Notes a module and the shapes of what it takes; its number."""
        self.parts.append(module)
        self.shapes.append(tuple((1 + self.free, *shape) for shape in shapes))
        return len(self.parts) - 1

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Each part on its own inputs."""
        given = iter(values)
        return tuple(part(*[next(given) for _ in shapes]) for part, shapes in zip(self.parts, self.shapes, strict=True))

    def exported(self) -> list[Piece]:
        """Each part as a piece of a graph.

        Raises:
            ConfigError: the exporter cannot write a part.
        """
        model = self.model()
        given = (f"in_{place}" for place in count())
        taken = [tuple(next(given) for _ in shapes) for shapes in self.shapes]
        return [cut_out(model, own, f"out_{place}") for place, own in enumerate(taken)]

    def model(self) -> onnx.ModelProto:
        """All parts beside each other.

        Raises:
            ConfigError: the exporter cannot write a part.
        """
        examples = tuple(torch.randn(shape) for shapes in self.shapes for shape in shapes)
        names = [f"in_{place}" for place in range(len(examples))]
        ends = [f"out_{place}" for place in range(len(self.parts))]
        with exporting("a layer cannot be written to ONNX"), torch.no_grad():
            batch = torch.export.Dim("batch")
            sizes = (tuple({0: batch} for _ in examples),) if self.free else None
            program = torch.export.export(self.eval(), examples, dynamic_shapes=sizes)
            done = torch.onnx.export(program, (), input_names=names, output_names=ends, dynamo=True, verbose=False)
        assert done is not None
        return done.model_proto


def cut_out(model: onnx.ModelProto, inputs: tuple[str, ...], output: str) -> Piece:
    """The nodes that lead from some inputs to an output."""
    graph, opset = model.graph, next(each.version for each in model.opset_import if each.domain == "")
    weights = {weight.name: weight for weight in graph.initializer}
    needed, nodes, held = {output}, [], []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            if any(
                attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
                for attribute in node.attribute
            ):
                raise ConfigError(f"a layer with control flow of its own cannot be written, got {node.op_type}")
            nodes.append(node)
            needed.update(node.input)
    held = [weight for name, weight in weights.items() if name in needed]
    return Piece(inputs, output, nodes[::-1], held, opset, model.ir_version)


def check_writable(network: SuperNetwork, used: Tensor | None = None) -> None:
    """Has torch's exporters write the layers that they are not known to write, before anything is trained.

    Args:
        network: whose edges, activations and gates are looked at.
        used: `(1, U)` units of the one architecture that is trained, None where any may be handed over.

    Raises:
        ConfigError: an exporter cannot write a layer; the message says where it stands.
    """
    skips = bool(network.heads) and used is None  # a file for one example, put together of pieces
    parts: list[tuple[str, nn.Module, Shape]] = []
    for edge, (start, end) in enumerate(network.graph.edges):
        if used is None or bool(used[0, edge]):
            name, module = network.edge_names[edge], network.modules_on_edges[edge]
            if isinstance(module, GatedSequential):
                module = module.narrowed(torch.ones(module.groups))[0]
            parts.append((name, module, network.shapes[start]))
            parts.append((network.graph.nodes[end], network.activations[end], network.shapes[end]))
            if skips and str(edge) in network.heads:
                parts.append((f"{name}'s gate", network.heads[str(edge)], network.gate_shape(edge)))
    own = {id(module): (name, module, shape) for name, module, shape in parts if not ordinary(module)}
    if own:
        _write([(name, fold_batch_norm(module).cpu(), shape) for name, module, shape in own.values()], skips)


def ordinary(module: nn.Module) -> bool:
    """Whether all layers of a module are known to be written: torch's ordinary ones and this package's own."""
    for part in module.modules():
        if part._forward_hooks or part._forward_pre_hooks:
            return False
        if isinstance(part, fx.GraphModule):
            calls = {node.target for node in part.graph.nodes if node.op in ("call_function", "call_method")}
            known = calls <= {add, torch.cat}
        elif type(part) is nn.Upsample:
            known = part.mode in ("nearest", "bilinear")
        else:
            known = type(part) in ORDINARY or type(part).__module__.startswith("budgetnet.")
        if not known:
            return False
    return True


def _write(parts: Sequence[tuple[str, nn.Module, Shape]], skips: bool) -> None:
    """Writes modules as they will be, all at once, and where that fails by themselves, to say which it is."""
    pieces = Pieces(free=not skips)
    for _, module, shape in parts:
        pieces.add(module, shape)
    try:
        pieces.exported() if skips else pieces.model()
    except ConfigError as error:
        if len(parts) == 1:
            raise ConfigError(f"{parts[0][0]!r}: {error}") from error
        for part in parts:
            _write([part], skips)
        raise
