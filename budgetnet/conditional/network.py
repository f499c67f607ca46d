"""A network that computes only what its gates open: rows are gathered, weights cut, exits shrink the batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from budgetnet.conditional.branches import Branch, Limits
from budgetnet.conditional.flow import Flow, run_one
from budgetnet.conditional.tuning import measured
from budgetnet.errors import ConfigError

Shape = tuple[int, ...]
Table = dict[str, dict[str, dict[str, float]]]
"""For each edge with gates, by batch size, the shares up to which skipping pays: `Limits`, as JSON has them."""


class ConditionalNetwork(nn.Module):
    """A network whose gates look at the input, which runs what they open and skips the rest.

    It comes from `conditional`. It predicts and does not learn: it stays in evaluation mode and gives no gradient.

    Args:
        branches: the edges that are left, in the order in which they are run.
        activations: of each of the N nodes.
        order: the nodes that are left, each after all that feed it, from the source to the sink.
        shapes: of one example at each of the N nodes.
        decided: `(G,)` the gates that are decided for all inputs; 0 for the others.
    """

    decided: Tensor

    def __init__(
        self,
        branches: Sequence[Branch],
        activations: Sequence[nn.Module],
        order: Sequence[int],
        shapes: Sequence[Shape],
        decided: Tensor,
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.activations = nn.ModuleList(activations)
        self.register_buffer("decided", decided)
        self.order, self.shapes = tuple(order), tuple(shapes)
        self.entering = {node: [edge for edge in branches if edge.end == node and not edge.exit] for node in order}
        self.exits = {node: [edge for edge in branches if edge.start == node and edge.exit] for node in order}
        self.readers = {node: sum(edge.start == node for edge in branches) for node in order}
        # a plain list: looking up a part of a module takes as long as a small operation
        self._acts = list(activations)
        self.requires_grad_(False)
        self.eval()

    @property
    def source(self) -> int:
        """The node of the input."""
        return self.order[0]

    @property
    def sink(self) -> int:
        """The node of the output."""
        return self.order[-1]

    @property
    def edges(self) -> list[Branch]:
        """The edges that are left, in the order in which they are run."""
        return [edge for edge in self.branches if isinstance(edge, Branch)]

    @property
    def conditional_branches(self) -> list[Branch]:
        """The edges on which something is left to decide."""
        return [edge for edge in self.edges if edge.gated]

    @property
    def skipped_branches(self) -> list[Branch]:
        """Those that are not run where they are not taken: all of them but exits that answer first."""
        return [edge for edge in self.conditional_branches if not edge.answers]

    def train(self, mode: bool = True) -> ConditionalNetwork:
        """Stays in evaluation mode."""
        super().train(False)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` to `(B, ...)`: what the network it came from gives under `Threshold`."""
        self._check(x)
        with torch.no_grad():
            if len(x) == 1:
                return run_one(x, self.order, self.entering, self.exits, self._acts, self.shapes)
            return self._run(x, None)

    def decide(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Predicts, and says what was decided.

        Args:
            x: `(B, C, H, W)`.

        Returns:
            The output, and `(B, G)` decisions in {0, 1}; 0 for gates that an example was never asked about: behind an
            exit it has taken, or on an edge that lies on no path once the constants are in.
        """
        self._check(x)
        with torch.no_grad():
            kept = self.decided.expand(len(x), -1).clone()
            return self._run(x, kept), kept

    def tune(self, example: Tensor, *, repeats: int = 15) -> Table:
        """Measures, for the batch size of the example, where skipping starts to pay on this machine.

        Each edge with gates is run in turn densely and masked, gathered, and with cut weights; the medians of the
        times are compared. Call it again for other batch sizes; the nearest one measured is used.

        Args:
            example: `(B, C, H, W)` in the memory format that is used later.
            repeats: times that each way is measured.

        Returns:
            `table`, with what was found.

        Raises:
            ConfigError: the example is none of this network's, or `repeats` is no number >= 1.
        """
        self._check(example)
        if repeats < 1 or not len(example):
            raise ConfigError(f"tuning takes an example and repeats >= 1, got {len(example)} and {repeats}")
        known: dict[str, Limits] = {}
        for edge in self.skipped_branches:
            body, shapes = edge.body, (self.shapes[edge.start], self.shapes[edge.end])
            alike = f"{shapes} {body} {body.owners} {body.gates} {body.ends}"
            if alike not in known:
                known[alike] = measured(edge.body, *shapes, example, repeats)
            edge.learn({len(example): known[alike]})
        return self.table

    @property
    def table(self) -> Table:
        """What was measured; assign what was read from JSON."""
        return {
            edge.name: {str(batch): limits._asdict() for batch, limits in edge.limits.items()}
            for edge in self.skipped_branches
        }

    @table.setter
    def table(self, table: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
        names = {edge.name: edge for edge in self.skipped_branches}
        for name, rows in table.items():
            if name not in names:
                raise ConfigError(f"edges with gates are {', '.join(names)}, got {name!r}")
            try:
                known = {
                    int(batch): Limits(*(float(row[field]) for field in Limits._fields)) for batch, row in rows.items()
                }
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                raise ConfigError(
                    f"{name!r} needs {', '.join(Limits._fields)} for each batch size, all numbers: {error}"
                ) from error
            names[name].learn(known)

    def _check(self, x: Tensor) -> None:
        if x.ndim == 0 or tuple(x.shape[1:]) != self.shapes[self.source]:
            expected = ", ".join(str(size) for size in self.shapes[self.source])
            raise ConfigError(f"expected examples (B, {expected}), got {tuple(x.shape)}")

    def _run(self, x: Tensor, kept: Tensor | None) -> Tensor:
        flow = Flow(x, self.source, self.readers, kept)
        for node in self.order:
            if node != self.source:
                flow.enter(node, self.entering[node], self.activations[node], self.shapes[node])
            for edge in self.exits[node]:
                if flow.batch:
                    flow.leave(edge, self.activations[self.sink])
            if not flow.batch and flow.output is not None:
                return flow.output
        return flow.finished(self.sink)
