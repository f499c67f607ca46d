"""The network of one architecture as a function in the runtime it will be used in, built in a moment to be timed."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import ClassVar, Literal

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, fx, nn

from budgetnet.apart import Apart, onnx_session
from budgetnet.errors import ConfigError
from budgetnet.extraction import connected, extract, fold_batch_norm, narrowed
from budgetnet.gated import GatedSequential, contiguous
from budgetnet.onnx_pieces import Piece, Pieces, Scope
from budgetnet.shapes import Shape
from budgetnet.supernet import SuperNetwork
from budgetnet.timing import Timing, interleaved

Runtime = Literal["onnxruntime", "torch", "compiled"]
Run = Callable[[], object]

YARDSTICK = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 16, 3, padding=1))
YARD = (16, 32, 32)
"""What it takes: channels, height and width."""


BASE = frozenset(vars(nn.Module()))
"""What every module has."""

HELD = 2**26
"""Bytes of pieces that a process keeps at most."""


class Assembler:
    """Builds what is timed: a module of a network by itself, or the whole network of an architecture.

    Batch norms are folded. For onnxruntime each kind of module goes through torch's exporter once, those of torch's own
    layers once in a process; what is left of it when channels are closed is the same graph with smaller weights.

    Args:
        network: the space; looked at as it is now.
        runtime: "onnxruntime", "torch" (eager) or "compiled" (`torch.compile`, default settings).
        threads: that the runtime may use.
        batch: examples in the input.
        device: where torch runs.
    """

    written: ClassVar[dict[str, Piece]] = {}
    """Pieces of torch's own layers, by kind."""

    def __init__(self, network: SuperNetwork, *, runtime: Runtime, threads: int, batch: int, device: str) -> None:
        self.network, self.runtime, self.threads, self.batch = network, runtime, threads, batch
        self.device = torch.device(device)
        modules = list(network.modules_on_edges)
        self.edges = [edge for edge, module in enumerate(modules) if not passes(module)]
        self.nodes = [node for node, module in enumerate(network.activations) if not passes(module)]
        self.folded = {edge: self._folded(modules[edge]) for edge in self.edges}
        self.pieces: dict[str, Piece] = {}
        self.process: Apart | None = None
        if runtime == "onnxruntime":
            self._export()

    @staticmethod
    def kind(module: nn.Module, shape: Shape) -> str:
        """What tells modules apart that compute something else, weights aside: their layers and their input's shape."""
        own = "".join(f" {told}" for part in module.modules() if (told := untold(part)))
        return f"{' '.join(repr(module).split())}{own} on {'x'.join(map(str, shape))}"

    def edge_kind(self, edge: int) -> str:
        """The kind of an edge's module with all its channels."""
        return self.kind(self.folded[edge], self.network.shapes[self.network.graph.edges[edge][0]])

    @staticmethod
    def _folded(module: nn.Module) -> nn.Module:
        if isinstance(module, GatedSequential):
            module = module.narrowed(torch.ones(module.groups))[0]
        return fold_batch_norm(module)

    def alone(self, edge: int, bits: Tensor) -> Run:
        """An edge by itself, with those of its `(groups,)` channel groups that are open."""
        start, module = self.network.graph.edges[edge][0], self.network.modules_on_edges[edge]
        shape = self.network.shapes[start]
        if isinstance(module, GatedSequential):
            plain, into, _ = module.narrowed(bits.to(self.network.gates.values.device))
            module, shape = fold_batch_norm(plain), shape if into is None else (len(into), *shape[1:])
        else:
            module = self.folded[edge]

        def write(scope: Scope, value: str) -> str:
            return self._call(scope, self.edge_kind(edge), module, value)

        return self._run(module, shape, write)

    def activation(self, node: int) -> Run:
        """A node's activation by itself."""
        module, shape = self.network.activations[node], self.network.shapes[node]
        return self._run(module, shape, lambda scope, value: self._call(scope, self.kind(module, shape), module, value))

    def addition(self, node: int) -> Run:
        """The sum of two values of a node by itself."""
        shape = self.network.shapes[node]
        return self._run(Doubled(), shape, lambda scope, value: scope.node("Add", [value, value]))

    def nothing(self) -> Run:
        """A call that computes next to nothing: what a runtime takes for being called."""
        return self._run(nn.ReLU(), (1, 1, 1), lambda scope, value: scope.node("Relu", [value]))

    def yardstick(self) -> Run:
        """A fixed network, the same for every space."""
        return self._run(
            YARDSTICK, YARD, lambda scope, value: self._call(scope, self.kind(YARDSTICK, YARD), YARDSTICK, value)
        )

    def whole(self, kept: Tensor) -> Run:
        """The extracted network of an architecture, `(1, G)`.

        Raises:
            ConfigError: it does not connect input and output.
        """
        shape, used = self.network.input_shape, connected(self.network, kept)
        if self.runtime == "onnxruntime":  # which is written from the modules as they were folded at first
            return self._session(shape, lambda scope, value: self._whole(scope, value, used))
        return self._module(fold_batch_norm(extract(self.network, kept)), shape)

    def onnx_model(self, kept: Tensor) -> onnx.ModelProto:
        """What `whole` runs in onnxruntime: the graph of a file by `export`, of the network as it was at first.

        Modules whose channels have gates have the weights that they have now.
        """
        shape = (self.batch, *self.network.input_shape)
        return self._model(shape, lambda scope, value: self._whole(scope, value, self.network.used(kept)))

    def times(self, ways: Sequence[Run], calls: int, seconds: float = 0.0) -> list[Timing]:
        """Times what was built, in turns, with the threads that were asked for, for so many seconds at least."""
        if self.process is not None:
            with self._told():
                return self.process.times(ways, calls, seconds)
        finish = partial(torch.cuda.synchronize, self.device) if self.device.type == "cuda" else None
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with self._told():
                return interleaved(ways, calls=calls, seconds=seconds, finish=finish)
        finally:
            torch.set_num_threads(before)

    @contextmanager
    def apart(self) -> Iterator[Assembler]:
        """The same, but all that it builds is built and timed in a new process, which ends with the `with`.

        Only for onnxruntime: layers of one's own may not be found by another process.
        """
        assert self.runtime == "onnxruntime"
        other = copy.copy(self)
        with self._told():
            process = Apart()
        with process:
            other.process = process
            yield other

    @contextmanager
    def _told(self) -> Iterator[None]:
        """What a runtime cannot do, for lack of memory, of a compiler or of an operator, in one line."""
        try:
            yield
        except Exception as error:  # runtimes name no one error
            own = "" if isinstance(error, ChildProcessError) else f"{type(error).__name__}: "
            said = f"{own}{' '.join(str(error).split())}"[:300]
            raise ConfigError(f"{self.runtime} cannot run {self.network.name}, batch {self.batch}: {said}") from error

    def _run(self, module: nn.Module, shape: Shape, write: Callable[[Scope, str], str]) -> Run:
        return self._session(shape, write) if self.runtime == "onnxruntime" else self._module(module, shape)

    def _session(self, shape: Shape, write: Callable[[Scope, str], str]) -> Run:
        if self.process is not None:
            model = self._model((self.batch, *shape), write).SerializeToString()
            with self._told():
                return self.process.build(model, (self.batch, *shape), self.threads)
        example = self._example(shape)
        session = onnx_session(self._model(example.shape, write).SerializeToString(), self.threads)
        feed = {"x": example.numpy()}
        return lambda: session.run(None, feed)

    def _module(self, module: nn.Module, shape: Shape) -> Run:
        example = self._example(shape).to(self.device)
        module = contiguous(copy.deepcopy(module)).to(self.device).eval()
        run = torch.compile(module) if self.runtime == "compiled" else module

        def call() -> object:
            with torch.inference_mode():
                return run(example)

        return call

    def _example(self, shape: Shape) -> Tensor:
        with self._told():
            return torch.randn(self.batch, *shape)

    def _model(self, shape: Sequence[int], write: Callable[[Scope, str], str]) -> onnx.ModelProto:
        scope = Scope(count())
        output = write(scope, "x")
        values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *shape[1:]])]
        values.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, None))
        graph = helper.make_graph(scope.nodes, "assembled", values[:1], values[1:], scope.weights)
        return self.model(graph)

    def model(self, graph: onnx.GraphProto) -> onnx.ModelProto:
        """A model of a graph in the version that the pieces are written in."""
        return next(iter(self.pieces.values())).model(graph)

    def _whole(self, scope: Scope, value: str, used: Tensor) -> str:
        """Writes the network that `extract` gives: the same modules, gathers, scatters and sums."""
        network = self.network
        values = {network.graph.source: value}
        for node in network.graph.order:
            total: str | None = None
            for edge in network.graph.incoming[node]:
                if used[0, edge]:
                    own = self._edge(scope, edge, used, values[network.graph.edges[edge][0]])
                    total = own if total is None else scope.node("Add", [total, own])
            if total is not None:
                if node in self.nodes:
                    module = network.activations[node]
                    total = self._call(scope, self.kind(module, network.shapes[node]), module, total)
                values[node] = total
        return values[network.graph.sink]

    def _edge(self, scope: Scope, edge: int, used: Tensor, value: str) -> str:
        if edge not in self.edges:
            return value
        module, reads, writes = self._narrowed(edge, used)
        if reads is not None:
            value = scope.node("Gather", [value, scope.constant(reads.cpu().numpy())], axis=1)
        value = self._call(scope, self.edge_kind(edge), module, value)
        if writes is not None:
            shape = self.network.shapes[self.network.graph.edges[edge][1]]
            ends = np.zeros(2 * (1 + len(shape)), np.int64)
            ends[1 + len(shape) + 1] = 1  # one channel of zeros behind the open ones, which closed channels read
            value = scope.node("Pad", [value, scope.constant(ends)])
            value = scope.node("Gather", [value, scope.constant(writes.cpu().numpy())], axis=1)
        return value

    def _call(self, scope: Scope, kind: str, module: nn.Module, value: str) -> str:
        return scope.call(self.pieces[kind], [value], module.state_dict())

    def _narrowed(self, edge: int, used: Tensor) -> tuple[nn.Module, Tensor | None, Tensor | None]:
        if not isinstance(self.network.modules_on_edges[edge], GatedSequential):
            return self.folded[edge], None, None
        plain, reads, writes = narrowed(self.network, edge, used)
        return fold_batch_norm(plain), reads, writes

    def _export(self) -> None:
        """Has each kind of module written once, with random weights: an exporter leaves out a bias of zeros."""
        parts, own = dict[str, int](), dict[str, bool]()  # numbers of kinds to export, and whether they are torch's
        modules, network = Pieces(free=True), self.network
        found = [(self.folded[edge], network.shapes[network.graph.edges[edge][0]]) for edge in self.edges]
        found += [(network.activations[node], network.shapes[node]) for node in self.nodes]
        found.append((YARDSTICK, YARD))
        for module, shape in found:
            kind = self.kind(module, shape)
            if kind in self.written:
                self.pieces[kind] = self.written[kind]
            elif kind not in parts:
                own[kind] = all(type(part).__module__.startswith("torch.nn.") for part in module.modules())
                module = copy.deepcopy(module).cpu().eval()
                for value in module.parameters():
                    nn.init.normal_(value.data, std=0.1)
                parts[kind] = modules.add(module, shape)
        done = modules.exported() if parts else []
        self.pieces |= {kind: done[place] for kind, place in parts.items()}
        kept = sum(piece.size for piece in self.written.values())
        for kind, place in parts.items():
            if own[kind] and (kept := kept + done[place].size) <= HELD:
                self.written[kind] = done[place]


class Doubled(nn.Module):
    """A value added to itself."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return x + x


def untold(module: nn.Module) -> str:
    """What the printed form of a module of one's own, or of a traced one, need not tell: its numbers, its code."""
    if type(module).__module__.startswith("torch.nn."):
        return ""
    if isinstance(module, fx.GraphModule):
        return hashlib.sha256(module.code.encode()).hexdigest()[:12]
    plain = (bool, int, float, str, tuple)
    own = {name: value for name, value in vars(module).items() if name not in BASE and isinstance(value, plain)}
    return repr(sorted(own.items())) if own else ""


def passes(module: nn.Module) -> bool:
    """Whether a module is an identity, which takes no time."""
    return isinstance(module, nn.Identity)
