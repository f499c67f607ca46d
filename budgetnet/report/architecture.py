"""architecture.json as frozen values: layers, modules, the channels in them, and what is kept of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from budgetnet.errors import FileError
from budgetnet.report.records import Record

FARTHEST = 1e5
"""Largest coordinate of a node."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A layer: where it is drawn and the shape of its value."""

    name: str
    position: tuple[float, ...]  # (column, row)
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Edge:
    """A module between two layers, by their indices."""

    name: str
    source: int
    target: int
    kind: str
    fixed: bool
    kept: bool
    used: bool  # kept and on a path from input to output
    probability: float | None
    costs: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Site:
    """A place in an edge's layers where groups of channels can be closed.

    Attributes:
        edge: index of the edge.
        name: of the site, unique in its edge.
        channels: in each group.
        kept: whether each group is kept.
        probability: of each group's gate, None where none closes it.
        used: whether the edge is in the network at all.
        lock: name of the gates that it shares with other sites, None for gates of its own.
    """

    edge: int
    name: str
    channels: tuple[int, ...]
    kept: tuple[bool, ...]
    probability: tuple[float | None, ...]
    used: bool
    lock: str | None

    @classmethod
    def read(cls, record: Record, edges: Mapping[str, tuple[int, bool]]) -> Site:
        """Reads one of architecture.json; `edges` are the indices of the edges by name, and whether they are used.

        Raises:
            FileError: there is no such edge, the lists do not fit each other, or a used edge has no channel left.
        """
        edge = record.text("edge")
        if edge not in edges:
            raise FileError(f'{record.file}: "{record.place}edge" must be the name of an edge, got {edge!r}')
        place, used = edges[edge]
        sizes = record.numbers("channels")
        if not sizes or any(size < 1 or size != int(size) for size in sizes):
            raise FileError(f'{record.file}: "{record.place}channels" must be whole numbers >= 1, got {list(sizes)}')
        kept = record.flags("kept", len(sizes))
        if used and not any(kept):
            raise FileError(f'{record.file}: "{record.place}kept" must keep a channel of {edge!r}, which is used')
        return cls(
            edge=place,
            name=record.text("name"),
            channels=tuple(int(size) for size in sizes),
            kept=kept,
            probability=record.maybe_shares("probability", len(sizes)),
            used=used,
            lock=None if record.values.get("lock") is None else record.text("lock"),
        )

    @property
    def all(self) -> int:
        """Channels of the super network here."""
        return sum(self.channels)

    @property
    def left(self) -> int:
        """Channels of the network here: none where the whole edge is dropped."""
        return sum(size for size, kept in zip(self.channels, self.kept, strict=True) if kept and self.used)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The super network and what was kept of it."""

    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]
    sites: tuple[Site, ...]

    @classmethod
    def read(cls, record: Record) -> Architecture:
        """Reads architecture.json.

        Raises:
            FileError: an edge ends at no node, a node lies too far out, or a site does not fit its edge.
        """
        nodes = []
        for node in record.records("nodes"):
            position = node.numbers("position", 2)
            if any(abs(value) > FARTHEST for value in position):
                raise FileError(f'{node.file}: "{node.place}position" must lie within {FARTHEST:g}, got {position}')
            shape = tuple(int(value) for value in node.numbers("shape"))
            nodes.append(Node(name=node.text("name"), position=position, shape=shape))
        edges = []
        for edge in record.records("edges"):
            for key in ("source", "target"):
                if not 0 <= edge.whole(key) < len(nodes):
                    raise FileError(
                        f'{edge.file}: "{edge.place}{key}" must be a node, 0..{len(nodes) - 1}, got {edge.whole(key)}'
                    )
            edges.append(
                Edge(
                    name=edge.text("name"),
                    source=edge.whole("source"),
                    target=edge.whole("target"),
                    kind=edge.text("kind"),
                    fixed=edge.flag("fixed"),
                    kept=edge.flag("kept"),
                    used=edge.flag("used"),
                    probability=edge.maybe_share("probability"),
                    costs=edge.costs("costs"),
                )
            )
        places = {edge.name: (place, edge.used) for place, edge in enumerate(edges)}
        sites: dict[tuple[int, str], Site] = {}
        for record_of_site in record.records("sites"):
            site = Site.read(record_of_site, places)
            if (site.edge, site.name) in sites:
                where = f'{record_of_site.file}: "{record_of_site.place}name"'
                raise FileError(f"{where} must be another one on {edges[site.edge].name!r}, got {site.name!r} again")
            sites[site.edge, site.name] = site
        return cls(nodes=tuple(nodes), edges=tuple(edges), sites=tuple(sites.values()))

    def sites_of(self, edge: int) -> list[Site]:
        """The sites of one edge, in the order of its layers."""
        return [site for site in self.sites if site.edge == edge]

    def gated(self) -> list[str]:
        """What can be open or closed, each edge before its sites: "EDGE" with a gate of its own, "EDGE.SITE"."""
        return [
            name
            for place, edge in enumerate(self.edges)
            for name in (
                *([] if edge.fixed else [edge.name]),
                *(f"{edge.name}.{site.name}" for site in self.sites_of(place)),
            )
        ]
