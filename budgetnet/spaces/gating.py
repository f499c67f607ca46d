"""What the spaces of residual branches share: where gates stand in a branch, and what decides them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from torch import nn

from budgetnet.checks import at_least, one_of
from budgetnet.errors import ConfigError
from budgetnet.gated import ChannelGate, GatedSequential
from budgetnet.sites import ConditionalGates
from budgetnet.supernet import Edge

Granularity = int | tuple[int, ...] | str

ENDS: dict[str, tuple[str, ...]] = {
    "hidden": (),
    "output": ("output",),
    "ends": ("input", "output"),
    "stream": ("input", "output"),
}
"""Of each `where` the sites at a branch's ends: it reads from and writes to what its shortcut passes on unchanged."""


class Stream(NamedTuple):
    """What the branches and shortcuts of a group add to.

    Attributes:
        name: of its gates.
        granularity: channels that each controls.
    """

    name: str
    granularity: int


@dataclass(frozen=True, kw_only=True)
class Gating:
    """What can be closed in a residual branch, and what decides.

    Attributes:
        gates: "channels": groups of channels; "layers": the branch as a whole, `x + Z f(x)` (S4.1);
            "both", or "none".
        where: the channels that have gates, "hidden": those between the branch's convolutions;
            "output": also those it writes to its output; "ends": also those it reads from its
            input, while the shortcut keeps all of them (S1.3, Figure 2); "stream": also those that the branches and
            shortcuts of a group add to, one gate for all of them, so that what is left of the group is narrower.
        conditional: gates look at the input of their branch.
        logits: learned for each gate: 1, or 2 of which the difference counts (section 3.2).
        memory: the conditional gates of a branch see each other's tentative decisions (S1.3).
        lock: identical branches share the gates of corresponding channels, at every site (S1.3); those that look at
            the input look at that of the first branch. Independent ones at the "ends" are then those of a "stream".
        always_open: groups, the first ones, of each site that no gate closes where the branch has no shortcut (4.2).

    Raises:
        ConfigError: an option is outside its range, or asks something of gates that there are not.

    Source: Herrmann et al., sections 3.2, 3.4, S1.3 and S4.1. Differs: "ends" is our reading of the "matrix of gate
        values" on input and output connections, of which S1.3 says no more: gates on the channels read times gates
        on the channels written, a matrix of rank one.
    """

    gates: str
    where: str
    conditional: bool
    logits: int
    memory: bool
    lock: bool
    always_open: int = 1

    def __post_init__(self) -> None:
        at_least(1, always_open=self.always_open)
        one_of("gates", self.gates, ("channels", "layers", "both", "none"))
        one_of("where", self.where, tuple(ENDS))
        if self.logits not in (1, 2) or isinstance(self.logits, bool):
            raise ConfigError(f"logits must be 1 or 2 for each gate, got {self.logits!r}")
        if self.conditional and self.gates == "none":
            raise ConfigError("conditional needs gates: channels, layers or both, got none")
        if self.memory and not self.conditional:
            raise ConfigError("memory is of gates that look at the input: expected conditional, got gates that do not")
        if self.lock and self.conditional and self.layers:
            raise ConfigError(f"lock of gates that look at the input needs gates on channels alone, got {self.gates}")
        if self.lock and not self.channels:
            raise ConfigError(f"lock needs gates on channels: channels or both, got {self.gates}")
        if self.where == "stream" and self.conditional:
            raise ConfigError("where stream is of gates that do not look at the input, got conditional ones")
        if self.always_open > 1 and not self.channels:
            raise ConfigError(f"always_open is of gates on channels: channels or both, got {self.gates}")

    @property
    def channels(self) -> bool:
        """Whether channels have gates."""
        return self.gates in ("channels", "both")

    @property
    def layers(self) -> bool:
        """Whether whole branches have gates."""
        return self.gates in ("layers", "both")

    @property
    def streams(self) -> bool:
        """Whether the branches of a group read and write the same channels."""
        return self.channels and (
            self.where == "stream" or (self.where == "ends" and self.lock and not self.conditional)
        )

    def of_stream(self, name: str, channels: int, stream: Stream) -> ChannelGate:
        """The gate of that name on the channels of a stream, which all its gates share; some groups stay open."""
        return ChannelGate(
            channels, stream.granularity, always_open=self.always_open, lock=f"{stream.name}.stream", name=name
        )

    def site(
        self,
        name: str,
        channels: int,
        granularity: int,
        *,
        shortcut: bool = True,
        alike: str | None = None,
        stream: Stream | None = None,
    ) -> list[nn.Module]:
        """The gate of that name in a branch, or nothing where none is asked for.

        Args:
            name: of the site; those at the branch's ends exist where `ENDS` says.
            channels: that arrive there.
            granularity: channels a gate controls.
            shortcut: whether an edge beside the branch remains where it is closed; else some groups stay open.
            alike: name of the branches that share the gates of this site where they are locked, None for no other.
            stream: whose gates these are, None where the branch has its own.
        """
        if stream is not None:
            return [self.of_stream(name, channels, stream)]
        if not self.channels or (name in ENDS["ends"] and name not in ENDS[self.where]):
            return []
        lock = f"{alike}.{name}" if self.lock and alike is not None else None
        always_open = 0 if shortcut else self.always_open
        return [ChannelGate(channels, granularity, always_open=always_open, lock=lock, name=name)]

    def edge(self, start: str, end: str, layers: Sequence[nn.Module], *, shortcut: bool = True) -> Edge:
        """The edge of a residual branch.

        Args:
            start: node that the branch reads.
            end: node that it is added to.
            layers: of the branch, its gates among them.
            shortcut: whether an edge beside it remains where the branch is closed.
        """
        sites = [layer for layer in layers if isinstance(layer, ChannelGate)]
        choice = self.layers and shortcut
        decided = choice + sum(site.groups - site.always_open for site in sites)
        return Edge(
            start=start,
            end=end,
            module=GatedSequential(*layers) if sites else nn.Sequential(*layers),
            name=f"{end}.block",
            kind="block",
            fixed=not choice,
            gate=self._head() if self.conditional and decided else None,
        )

    def _head(self) -> Callable[[int, int], nn.Module]:
        return partial(ConditionalGates, pairs=self.logits == 2, memory=self.memory)


def granularities(given: Granularity, parts: int, part: str, *, paper: bool) -> tuple[int, ...]:
    """Channels a gate controls, one number for each part of a network.

    Args:
        given: one number for all parts, or one for each.
        parts: how many there are.
        part: what one is called.
        paper: whether "paper" is a setting, which the caller has looked up before.

    Raises:
        ConfigError: it is neither.
    """
    values = tuple(given) if isinstance(given, tuple | list) else (given,) * parts
    whole = [value for value in values if isinstance(value, int) and not isinstance(value, bool) and value >= 1]
    if len(values) != parts or len(whole) < parts:
        setting = ", 'paper'," if paper else ""
        raise ConfigError(
            f"granularity must be a whole number >= 1{setting} or {parts} of them, one for each {part}, got {given!r}"
        )
    return tuple(whole)
