"""Bytes of the .onnx file: predicted from what is held and run, counted on the graph that an export would write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxscript.optimizer import optimize
from torch import Tensor, fx

from budgetnet.assembly import Assembler
from budgetnet.costs.held import HeldChannels, held_bytes
from budgetnet.costs.measured import Measured, MeasuredModel
from budgetnet.export import compacted
from budgetnet.extraction import extract, fold_batch_norm
from budgetnet.onnx_pieces import Piece
from budgetnet.shapes import Shape
from budgetnet.supernet import SuperNetwork

ADDITION = [helper.make_node("Add", ["/conv_10", "/conv_11"], ["/add_12"])]
GATHER: list[onnx.NodeProto | onnx.TensorProto] = [
    helper.make_node("Gather", ["/conv_10", "/constant_11"], ["/gather_12"], axis=1),
    onnx.TensorProto(name="/constant_11", dims=[16], data_type=TensorProto.INT64),
]
SCATTER: list[onnx.NodeProto | onnx.TensorProto] = [
    helper.make_node("Pad", ["/conv_10", "/constant_11"], ["/pad_12"], mode="constant"),
    *GATHER,
]
"""What a file has for a sum, for channels that are gathered, and for those that are put back in their places."""


@dataclass(frozen=True, eq=False)
class FileChannels(HeldChannels):
    """Bytes in a file of an edge whose channels have gates.

    Attributes:
        beside: those beside its numbers, but for what gathers and scatters.
    """

    beside: int

    def __call__(self, used: Tensor) -> Tensor:
        """Maps `(B, U)` used units to the `(B,)` bytes of this edge, where it is used; differentiable."""
        cost = super().__call__(used) + self.beside
        for _, count, held, writes in self.moved(used.detach()):
            cost = cost + field_bytes(*(SCATTER if writes else GATHER)) * (count < held)
        return cost


class FileSize(MeasuredModel):
    """Bytes of the .onnx files that `export` writes of a network's architectures.

    Calling it predicts: the bytes that the extracted network holds, and for each used module and sum what a file has
    beside them, operators and names. `measure` counts every byte without an export: it puts the graph together, as
    latency does, and has the exporter's own optimiser look through it.

    Args:
        network: the space; each kind of its modules is exported once.

    Attributes:
        full: of the full network, trained.
    """

    unit = "B"
    full: float

    def __init__(self, network: SuperNetwork) -> None:
        self.network = network
        self.assembler = Assembler(network, runtime="onnxruntime", threads=1, batch=1, device="cpu")
        graph = helper.make_graph([], "", [self._value("x", network.input_shape)], [self._output()])
        none = self.assembler.model(graph)
        self.base = float(compacted(none, ()).ByteSize())
        held = held_bytes(network)
        additions = torch.full_like(held.per_addition, field_bytes(*ADDITION))
        self.sizes = replace(held, per_addition=additions, channels=dict(held.channels))
        for edge in self.assembler.edges:
            beside = beside_weights(self._piece_of_edge(edge))
            self.sizes.per_edge[edge] += beside
            if isinstance(inside := held.channels.get(edge), HeldChannels):
                self.sizes.channels[edge] = FileChannels(**vars(inside), beside=beside)  # type: ignore[index]
        for node in self.assembler.nodes:
            self.sizes.per_node[node] += beside_weights(self._piece_of_node(node))
        self.full = self.beforehand(network.architecture("full")).value

    def __call__(self, used: Tensor) -> Tensor:
        """Maps `(B, U)` used units to `(B,)` float64 bytes, differentiably; 0 where nothing is used."""
        return self.sizes(used) + self.base * used.detach().any(dim=1)

    @property
    def along_path(self) -> list[float]:
        """What each edge and the node it enters add at least on a path of their own."""
        first = [start == self.network.graph.source for start, _ in self.network.graph.edges]
        return [own + self.base * at for own, at in zip(self.sizes.along_path, first, strict=True)]

    def of_edges(self, used: Tensor) -> list[float]:
        """What each edge and the node it enters add in an architecture, `(1, U)`."""
        return self.sizes.of_edges(used)

    def measure(self, kept: Tensor) -> list[Measured]:
        """The bytes of the files of `(n, G)` architectures, with the weights that they have now."""
        plain = [fold_batch_norm(extract(self.network, row)) for row in kept[:, None]]
        sizes = [float(self._file(row, own).ByteSize()) for row, own in zip(kept[:, None], plain, strict=True)]
        return [Measured(size, size, size) for size in sizes]

    def report(self, kept: Tensor) -> Measured:
        """The bytes of the file of an architecture, `(1, G)`."""
        return self.measure(kept)[0]

    def beforehand(self, kept: Tensor) -> Measured:
        """The bytes of the file of an architecture, `(1, G)`, with all its biases: one of zeros a file leaves out."""
        plain, generator = fold_batch_norm(extract(self.network, kept)).cpu(), torch.Generator().manual_seed(0)
        for value in plain.parameters():
            value.data.uniform_(generator=generator)
        size = float(self._file(kept, plain).ByteSize())
        return Measured(size, size, size)

    def _file(self, kept: Tensor, plain: fx.GraphModule) -> onnx.ModelProto:
        """What `export` writes of the plain network of an architecture, `(1, G)`."""
        model, state = self.assembler.onnx_model(kept), plain.state_dict()
        self._name_weights(model, kept, plain, state)
        model = optimize(model)
        end = model.graph.output[0].name
        for node in model.graph.node:
            node.output[:] = ["y" if name == end else name for name in node.output]
        model.graph.output[0].CopyFrom(self._output())
        return compacted(model, state)

    def _output(self) -> onnx.ValueInfoProto:
        return self._value("y", self.network.shapes[self.network.graph.sink])

    @staticmethod
    def _value(name: str, shape: Shape) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])

    def _name_weights(
        self, model: onnx.ModelProto, kept: Tensor, plain: fx.GraphModule, state: Mapping[str, Tensor]
    ) -> None:
        """Gives the weights of an assembled model the names and numbers of the plain network's."""
        weights = (weight for weight in model.graph.initializer if weight.name.startswith("weight_"))
        called = [str(node.target) for node in plain.graph.nodes if node.op == "call_module"]
        new = {}
        for place, piece in zip(called, self._pieces(kept), strict=True):
            for own, weight in zip(piece.weights, islice(weights, len(piece.weights)), strict=True):
                name = ".".join([place, *own.name.split(".", 2)[2:]])
                if name in state and tuple(state[name].shape) == tuple(weight.dims):
                    new[weight.name] = name
                    weight.CopyFrom(numpy_helper.from_array(state[name].detach().cpu().numpy(), name))
        for node in model.graph.node:
            node.input[:] = [new.get(name, name) for name in node.input]
            if node.op_type == "Pad" and not node.attribute:  # behind open channels: an exporter says what is meant
                node.attribute.append(helper.make_attribute("mode", "constant"))

    def _pieces(self, kept: Tensor) -> list[Piece]:
        """The pieces that an architecture, `(1, G)`, is put together from, in their order."""
        network, used, found = self.network, self.network.used(kept)[0], []
        for node in network.graph.order:
            edges = [edge for edge in network.graph.incoming[node] if used[edge]]
            found += [self._piece_of_edge(edge) for edge in edges if edge in self.assembler.edges]
            found += [self._piece_of_node(node)] if edges and node in self.assembler.nodes else []
        return found

    def _piece_of_edge(self, edge: int) -> Piece:
        return self.assembler.pieces[self.assembler.edge_kind(edge)]

    def _piece_of_node(self, node: int) -> Piece:
        return self.assembler.pieces[self.assembler.kind(self.network.activations[node], self.network.shapes[node])]


def beside_weights(piece: Piece) -> int:
    """Bytes of a piece in a file, less those of its numbers."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in (*piece.inputs, piece.output)]
    model = helper.make_model(helper.make_graph(piece.nodes, "", ends[:-1], ends[-1:], piece.weights))
    graph = compacted(model, [weight.name for weight in piece.weights]).graph
    numbers = sum(len(weight.raw_data) for weight in graph.initializer)
    return field_bytes(*graph.node, *graph.initializer) - numbers


def field_bytes(*messages: onnx.NodeProto | onnx.TensorProto) -> int:
    """Bytes of messages inside another: their own, their kinds and their lengths, of which a byte says 7 bits."""
    sizes = [int(message.ByteSize()) for message in messages]
    return sum(size + 1 + -(-max(1, size.bit_length()) // 7) for size in sizes)
