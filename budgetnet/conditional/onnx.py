"""A conditional network as an ONNX file for one example, in which what is closed lies in a branch that is not run."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import count, pairwise, product
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn
from torch.nn import functional as F

from budgetnet.conditional.bodies import Body, Pattern, Step, Variant, run_steps, step_of
from budgetnet.conditional.branches import Branch
from budgetnet.conditional.network import ConditionalNetwork
from budgetnet.errors import ConfigError
from budgetnet.export import load
from budgetnet.files import aside
from budgetnet.filling import wider
from budgetnet.onnx_pieces import Pieces, Scope

BRANCHES, WIDE = 8, 32
"""Combinations of an edge's groups up to which each has a branch, and channels from which on each group has one."""

BLOCK = 8
"""Channels that onnxruntime computes together on a processor with AVX2; one with AVX-512 takes 16, and 8 do as well."""

TOLERANCE = 1e-3
"""Largest difference, relative to the largest output, of a file from its network."""

UNDECIDED = 1e-4
"""Distance of a logit from its threshold that rounding may bridge."""


def export_conditional(
    network: ConditionalNetwork,
    path: str | Path,
    example: Tensor,
    *,
    branches: int = BRANCHES,
    wide: int = WIDE,
    block: int = 0,
) -> Path:
    """Writes a network to an ONNX file that takes one example and runs what its gates open.

    Each edge that may be closed is a branch of an `If`, and so is all that lies behind an exit. The channel groups of
    an edge become a branch for each combination of open ones, where there are few; or a branch for each group, what
    the groups bring being added up, where they are wide and lie between two convolutions. Otherwise they are computed
    and multiplied by 0 or 1: many thin convolutions take longer than the one that they are cut from. A branch holds
    its own weights, as the runtime brings only those into the layout in which it is fast.

    Args:
        network: stays as it is.
        path: where to, ends in .onnx.
        example: `(B, C, H, W)` real examples, on each of which the file is compared with the network.
        branches: largest number of combinations of an edge's groups that are written as branches; n groups that are
            decided on take 2^n and hold the edge's weights up to 2^(n - 1) times. 1 for none.
        wide: channels from which on a group has a branch of its own.
        block: fills up the channels between two convolutions with zeros to a multiple of it, and writes masks as sums;
            0 for neither. onnxruntime is faster where the processor's own block (`BLOCK`) divides them.

    Raises:
        ConfigError: the path ends in something else, a layer cannot be written, or the file does not compute what
            the network computes; there is no file then.
    """
    path = onnx_path(path)
    if not len(example):
        raise ConfigError("exporting a conditional network takes an example or more, got none")
    example = example.detach().cpu().float()
    network = copy.deepcopy(network).cpu().float()
    with aside(path) as part:
        onnx.save(written(network, branches, wide, block), str(part))
        compare(network, load(part), example)
    return path


def onnx_path(path: str | Path) -> Path:
    """The path, if it ends as that of a conditional network does; else ConfigError."""
    path = Path(path)
    if path.suffix != ".onnx":
        raise ConfigError(f"a network whose gates look at the input is exported to a .onnx file, got {path.name!r}")
    return path


def compare(network: ConditionalNetwork, run: Callable[[Tensor], Tensor], examples: Tensor) -> None:
    """Checks that a file gives the network's outputs.

    An example on which a gate is undecided is left out: rounding may decide it one way here and another there.

    Raises:
        ConfigError: it does not.
    """
    for row in examples:
        example = row[None]
        expected, found = network(example), run(example)
        apart = float((found - expected).abs().max())
        if not apart <= TOLERANCE * max(1.0, float(expected.abs().max())) and margin(network, example) > UNDECIDED:
            raise ConfigError(f"the exported network must give the network's outputs, got {apart:.3g} apart")


def margin(network: ConditionalNetwork, x: Tensor) -> float:
    """The smallest distance of a gate's logit from where it is decided the other way."""
    seen = [math.inf]
    hooks = [
        edge.head.register_forward_hook(lambda module, given, values: seen.append(float(values.abs().min())))
        for edge in network.edges
        if edge.head is not None
    ]
    network.decide(x)
    for hook in hooks:
        hook.remove()
    return min(seen)


def written(network: ConditionalNetwork, branches: int, wide: int, block: int) -> onnx.ModelProto:
    """The model of a network on the CPU, in float32."""
    writer = Writer(network, branches, wide, block)
    scope = Scope(writer.names)
    output = writer.go_on(scope, place=0, exit=0, known={network.source: Known("x")})
    name = scope.node("Identity", [output], output="y")
    shape = [1, *network.shapes[network.sink]]
    graph = helper.make_graph(
        scope.nodes,
        "ConditionalNetwork",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, *network.shapes[network.source]])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)],
        scope.weights,
    )
    model = next(iter(writer.pieces.values())).model(graph)
    onnx.checker.check_model(model)
    return model


@dataclass(frozen=True)
class Known:
    """A node's value in the graph.

    Attributes:
        name: of the tensor.
        reached: name of the `(1, 1)` bool that says whether the example came here, None for always.
        positive: a ReLU would change nothing.
    """

    name: str
    reached: str | None = None
    positive: bool = False


class Frozen(nn.Module):
    """A body on some of its channels, its weights copied.

    Args:
        variant: of the body.
        channels: of its output.
        groups: decisions of the body.
        block: channels between two convolutions come in multiples of it, those beside the open ones being zero; 0 for
            those that are open and no more. With it a mask is a sum (`shut_before_relus`).
    """

    def __init__(self, variant: Variant, channels: int, groups: int, block: int) -> None:
        super().__init__()
        self.reads: Tensor | None
        self.writes: Tensor | None
        self.channels = channels
        steps = shut_before_relus(filled(variant.steps, groups, block)) if block else variant.steps
        self.kinds = [(step.kind, step.options) for step in steps]
        self.layers = nn.ModuleList(nn.Identity() if step.layer is None else step.layer for step in steps)
        for name, values in (("reads", variant.reads), ("writes", variant.writes)):
            self.register_buffer(name, values)
        for place, step in enumerate(steps):
            for name, values in (("weight", step.weight), ("bias", step.bias)):
                self.register_buffer(f"{name}{place}", None if values is None else values.detach().clone())

    def forward(self, x: Tensor, table: Tensor | None = None) -> Tensor:
        """`(1, ...)` and, where channels are masked, the `(1, n)` decisions."""
        steps = [
            Step(kind, layer, getattr(self, f"weight{place}"), getattr(self, f"bias{place}"), options)
            for place, ((kind, options), layer) in enumerate(zip(self.kinds, self.layers, strict=True))
        ]
        if self.reads is not None:
            x = x.index_select(1, self.reads)
        for step in steps:
            if step.kind == SHUT and table is not None:
                opened, _ = run_steps([step._replace(kind="mask")], x.new_ones(1, x.shape[1], 1, 1), False, table)
                x = x + shut(opened, x.shape[2])
            else:
                x, _ = run_steps([step], x, False, table)
        if self.writes is not None:
            x = x.new_zeros(len(x), self.channels, *x.shape[2:]).index_copy(1, self.writes, x)
        return x


def filled(steps: Sequence[Step], groups: int, block: int) -> list[Step]:
    """The steps with channels of zeros between two convolutions, so that there is a multiple of `block`.

    onnxruntime has a faster layout for such numbers of channels only.

    Args:
        steps: of a body.
        groups: its decisions; this number stands for channels that are always open.
        block: channels.
    """
    found, dense = (
        list(steps),
        [place for place, step in enumerate(steps) if step.kind == "conv" and step.options[-1] == 1],
    )
    for first, second in pairwise(dense):
        between = found[first + 1 : second]
        lacking = -len(found[first].weight) % block
        if not lacking or any(step.kind not in ("relu", "mask") for step in between):
            continue
        before, behind = found[first], found[second]
        weight, bias = wider(before.weight, before.bias, out=lacking)
        found[first] = before._replace(weight=weight, bias=bias)
        found[second] = behind._replace(weight=wider(behind.weight, None, into=lacking)[0])
        for place, step in enumerate(between, first + 1):
            if step.kind == "mask":
                found[place] = step._replace(weight=F.pad(step.weight, (0, lacking), value=groups), options=(True,))
    return found


SHUT, LOW = "shut", 1e30
"""A step that adds minus `LOW` to channels that are closed, of which the ReLU behind it makes 0."""


def shut_before_relus(steps: Sequence[Step]) -> tuple[Step, ...]:
    """The steps, masks right behind a convolution and its ReLU being sums between the two.

    onnxruntime adds to what a convolution gives while it computes it, in the layout in which it is fast. To multiply
    what comes out of it by a number for each channel it brings that into the ordinary layout, and back.
    """
    found = list(steps)
    for place in range(1, len(found) - 1):
        before, own, behind = found[place - 1 : place + 2]
        square = before.kind == "conv" and type(own.layer) is nn.ReLU
        if square and behind.kind == "mask":
            found[place : place + 2] = [behind._replace(kind=SHUT), own]
    return tuple(found)


def shut(opened: Tensor, size: int) -> Tensor:
    """`(1, C, 1, 1)` bits as `(1, C, size, size)`: 0 where a channel is open, minus `LOW` where it is closed.

    A convolution does so, as it brings the bits into the fast layout.
    """
    channels = opened.shape[1]
    low = opened.new_full((channels, 1, 1, 1), LOW)
    return F.interpolate(F.conv2d(opened, low, -low.flatten(), groups=channels), scale_factor=float(size))


def part_of(body: Body, owner: int) -> Variant:
    """The hidden channels that one decision opens, and what they bring to the output, without its bias."""
    kept = torch.tensor([place for place, own in enumerate(body.owners[0]) if own == owner])
    ends = [(None if before is None else kept, None if behind is None else kept) for before, behind in body.places]
    steps = [step_of(layer, *channels) for layer, channels in zip(body.layers, ends, strict=True)]
    return Variant(None, (*steps[:-1], steps[-1]._replace(bias=None)), None, ())


def kind_of(body: Body, branches: int = BRANCHES, wide: int = WIDE) -> str:
    """How channel groups are written: a "tree" of their combinations, a "sum" of branches, or a "mask"."""
    if 2**body.groups <= max(1, branches):
        return "tree"
    sizes = Counter(body.owners[0])
    between = [(None, 0), *[(0, 0)] * (len(body.layers) - 2), (0, None)]
    hidden = len(body.owners) == 1 and list(body.places) == between and body.reads is None and body.writes is None
    mixing = isinstance(body.layers[-1], nn.Conv2d)
    return "sum" if hidden and mixing and min(sizes.values()) >= wide else "mask"


def is_filled(body: Body, block: int, branches: int = BRANCHES, wide: int = WIDE) -> bool:
    """Whether to fill up channels to blocks would change nothing, and there are no masks."""
    sizes = [size for owner in body.owners for size in Counter(owner).values()]
    sizes += [layer.out_channels for layer in body.layers if isinstance(layer, nn.Conv2d) and layer.groups == 1]
    return kind_of(body, branches, wide) != "mask" and not any(size % block for size in sizes)


def as_it_is(value: str, scope: Scope) -> str:
    """A branch that passes on what was there before."""
    return value


@dataclass(frozen=True)
class Asked:
    """What an edge's gates say, as names of tensors.

    Attributes:
        condition: `(1, 1)` bool, whether the example takes the edge; None for always.
        bits: `(1, 1)` bool of each channel group, where they choose branches.
        table: `(1, n)` bool of all groups, where they mask.
    """

    condition: str | None
    bits: tuple[str, ...] = ()
    table: str | None = None


class Writer:
    """Writes a network's graph, edge by edge.

    Args:
        network: on the CPU, in float32.
        branches: as `export_conditional` has them.
        wide: likewise.
        block: likewise.
    """

    def __init__(self, network: ConditionalNetwork, branches: int, wide: int, block: int) -> None:
        self.network, self.branches, self.wide, self.names = network, branches, wide, count()
        self.said: dict[str, str] = {}  # by the edge's name the tensor of what its head says
        pieces, shapes = Pieces(), network.shapes
        places: dict[tuple[str, str, Pattern | int], int] = {}
        for edge in network.edges:
            body, start = edge.body, shapes[edge.start]
            if edge.head is not None:
                places["head", edge.name, ()] = pieces.add(edge.head, shapes[edge.end] if edge.answers else start)
            kind = "" if body.passes else kind_of(edge.body, self.branches, self.wide)
            for pattern in self._patterns(edge) if kind == "tree" else []:
                frozen = Frozen(body.variant(pattern), body.channels, body.groups, block)
                places["body", edge.name, pattern] = pieces.add(frozen, start)
            for owner in sorted(set(body.owners[0])) if kind == "sum" else []:
                places["body", edge.name, owner] = pieces.add(
                    Frozen(part_of(body, owner), body.channels, body.groups, block), start
                )
            if kind == "mask":
                frozen = Frozen(body.variant(body.full), body.channels, body.groups, block)
                places["body", edge.name, body.full] = pieces.add(frozen, start, (body.groups,))
        for node in network.order[1:]:
            if type(network.activations[node]) is not nn.Identity:
                places["activation", str(node), ()] = pieces.add(network.activations[node], shapes[node])
        done = pieces.exported()
        self.pieces = {key: done[place] for key, place in places.items()}

    def go_on(self, scope: Scope, place: int, exit: int, known: Mapping[int, Known]) -> str:
        """Writes what is left of the network.

        Args:
            scope: where to.
            place: of the next node in their order.
            exit: the next exit of that node.
            known: nodes that are written.

        Returns:
            The name of the output.
        """
        known = dict(known)
        for at in range(place, len(self.network.order)):
            node = self.network.order[at]
            if node not in known:
                known[node] = self._enter(scope, node, known)
            exits = self.network.exits[node]
            for number in range(exit if at == place else 0, len(exits)):
                edge, start = exits[number], known[node]
                answer = self._added(scope, edge, start, Asked(None), None) if edge.answers else None
                asked = self._asked(scope, edge, start if answer is None else replace(start, name=answer))
                leave = partial(self._leave, edge, start, asked, answer)
                if asked.condition is None:
                    return leave(scope)
                stay = partial(self.go_on, place=at, exit=number + 1, known=known)
                return scope.choose(asked.condition, leave, stay)
        return known[self.network.sink].name

    def _leave(self, edge: Branch, start: Known, asked: Asked, answer: str | None, scope: Scope) -> str:
        value = self._added(scope, edge, start, asked, None) if answer is None else answer
        return self._activated(scope, self.network.sink, value)

    def _enter(self, scope: Scope, node: int, known: Mapping[int, Known]) -> Known:
        """Writes the value of a node: the edges that are always taken, then an `If` for each of the others."""
        total: str | None = None
        settled = False  # whether the total is a value that a ReLU has passed and would not change
        choices: list[tuple[Branch, Asked]] = []
        entering = self.network.entering[node]
        for edge in entering:
            asked = self._asked(scope, edge, known[edge.start])
            if asked.condition is None:
                settled = total is None and edge.body.passes and known[edge.start].positive
                total = self._added(scope, edge, known[edge.start], asked, total)
            else:
                choices.append((edge, asked))
        rectifies = type(self.network.activations[node]) is nn.ReLU
        for number, (edge, asked) in enumerate(choices):
            last = node if number == len(choices) - 1 else None
            pass_by = partial(self._pass_by, node, total, None if settled and rectifies else last)
            take = partial(self._take, edge, known[edge.start], asked, total, last)
            assert asked.condition is not None
            total, settled = scope.choose(asked.condition, take, pass_by), False
        if not choices:
            total = self._pass_by(node, total, None if settled and rectifies else node, scope)
        assert total is not None
        reached = None
        if len(choices) == len(entering):
            conditions = [asked.condition for _, asked in choices if asked.condition is not None]
            never = [] if conditions else [scope.constant(np.zeros((1, 1), np.bool_))]
            reached = reduce(lambda one, other: scope.node("Or", [one, other]), conditions + never)
        return Known(total, reached, rectifies)

    def _take(self, edge: Branch, start: Known, asked: Asked, total: str | None, node: int | None, scope: Scope) -> str:
        """Adds what an edge brings, and activates the sum if this is the last into the node."""
        value = self._added(scope, edge, start, asked, total)
        return value if node is None else self._activated(scope, node, value)

    def _pass_by(self, node: int, total: str | None, activate: int | None, scope: Scope) -> str:
        """The sum as it is, zero where nothing was added, activated if nothing more comes into the node."""
        if total is None:
            total = scope.constant(np.zeros((1, *self.network.shapes[node]), np.float32))
        return total if activate is None else self._activated(scope, activate, total)

    def _activated(self, scope: Scope, node: int, value: str) -> str:
        piece = self.pieces.get(("activation", str(node), ()))
        return value if piece is None else scope.call(piece, [value])

    def _added(self, scope: Scope, edge: Branch, start: Known, asked: Asked, total: str | None) -> str:
        """Writes the sum of `total`, None for nothing, and of what is on an edge."""
        kind = "" if edge.body.passes else kind_of(edge.body, self.branches, self.wide)
        if kind == "sum":
            return self._groups(scope, edge, start, asked, total)
        if kind == "mask":
            assert asked.table is not None
            table = scope.node("Cast", [asked.table], to=TensorProto.FLOAT)
            value = scope.call(self.pieces["body", edge.name, edge.body.full], [start.name, table])
        else:
            value = self._tree(edge, start, asked, (), scope) if kind else start.name
        return value if total is None else scope.node("Add", [value, total])

    def _groups(self, scope: Scope, edge: Branch, start: Known, asked: Asked, total: str | None) -> str:
        """A branch for each channel group, which adds what the group brings."""
        bias = edge.body.layers[-1].bias
        if total is None:
            total = scope.constant(np.zeros((1, *self.network.shapes[edge.end]), np.float32))
        if isinstance(bias, Tensor):
            total = scope.node("Add", [total, scope.constant(bias.detach().numpy().reshape(1, -1, 1, 1))])

        def add(inner: Scope, owner: int, before: str) -> str:
            return inner.node("Add", [inner.call(self.pieces["body", edge.name, owner], [start.name]), before])

        for owner in sorted(set(edge.body.owners[0])):
            if owner == edge.body.groups:
                total = add(scope, owner, total)
            else:
                before = total
                then, otherwise = partial(add, owner=owner, before=before), partial(as_it_is, before)
                total = scope.choose(asked.bits[owner], then, otherwise)
        return total

    def _tree(self, edge: Branch, start: Known, asked: Asked, pattern: Pattern, scope: Scope) -> str:
        """A branch for each combination of groups that continues `pattern`; those that close a site do not occur."""
        if len(pattern) == edge.body.groups:
            return scope.call(self.pieces["body", edge.name, pattern], [start.name])
        patterns = self._patterns(edge)
        ways = [
            partial(self._tree, edge, start, asked, (*pattern, is_open))
            for is_open in (True, False)
            if any(known[: len(pattern) + 1] == (*pattern, is_open) for known in patterns)
        ]
        if len(ways) == 1:
            return ways[0](scope)
        return scope.choose(asked.bits[len(pattern)], *ways)

    @staticmethod
    def _patterns(edge: Branch) -> list[Pattern]:
        """Combinations of an edge's groups that leave no site without a channel."""
        return [pattern for pattern in product((True, False), repeat=edge.body.groups) if edge.body.alive(pattern)]

    def _asked(self, scope: Scope, edge: Branch, start: Known) -> Asked:
        """Writes what decides on an edge."""
        if not edge.gated:
            return Asked(start.reached)
        if edge.leader is None:
            self.said[edge.name] = scope.call(self.pieces["head", edge.name, ()], [start.name])
        values = self.said[edge.leader or edge.name]
        bits = scope.node("Greater", [values, scope.constant(np.zeros((), np.float32))])
        groups, conditions = edge.body.groups, [] if start.reached is None else [start.reached]
        if not groups:
            conditions.append(bits)
            return Asked(self._all(scope, conditions))
        masked = kind_of(edge.body, self.branches, self.wide) == "mask"
        sizes = [1] * edge.own + ([groups] if masked else [1] * groups)
        parts = scope.split(bits, sizes)
        if edge.own:
            conditions.append(parts.pop(0))
        for owners in edge.body.owners:
            if groups in owners:
                continue  # a channel is always open
            needed = sorted(set(owners))
            if masked:
                places = scope.constant(np.array([place + edge.own for place in needed], np.int64))
                largest = scope.node("ReduceMax", [scope.node("Gather", [values, places], axis=1)], keepdims=1)
                conditions.append(scope.node("Greater", [largest, scope.constant(np.zeros((), np.float32))]))
            else:
                conditions.append(reduce(lambda one, other: scope.node("Or", [one, other]), [parts[i] for i in needed]))
        condition = self._all(scope, conditions)
        return Asked(condition, table=parts[0]) if masked else Asked(condition, bits=tuple(parts))

    @staticmethod
    def _all(scope: Scope, conditions: Sequence[str]) -> str | None:
        return reduce(lambda one, other: scope.node("And", [one, other]), conditions) if conditions else None
