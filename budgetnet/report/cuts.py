"""The cut between device and cloud drawn: a field behind each layer's dot, and the bytes on every edge that crosses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from budgetnet.report.architecture import Architecture
from budgetnet.report.quantities import SPACE, si

FLOAT = 4  # bytes of a number that is sent
REACH = 36.0  # how far a field reaches beyond the outermost dots, pixels
LETTER, ROUND, HIGH = 6.6, 14.0, 17.0  # of a mark: width of a letter, of its two round ends, and its height, pixels
WAYS = (0.5, 0.36, 0.64, 0.25, 0.75)  # where on its edge a mark may stand, the best place first

At = Callable[[int, float], NDArray[np.float64]]
"""The point at a share of an edge's length."""


@dataclass(frozen=True, kw_only=True)
class Field:
    """What lies behind a dot: whether its value is made on the device or in the cloud."""

    x: float
    y: float
    width: float
    height: float
    cloud: bool


@dataclass(frozen=True, kw_only=True)
class Mark:
    """What crosses, written on its edge; x and y of its middle."""

    x: float
    y: float
    width: float
    height: float
    text: str


def sides(architecture: Architecture, device: Collection[str]) -> list[bool | None]:
    """Of each node whether its value is finished in the cloud, None where no edge of the network touches it."""
    found: list[bool | None] = [None] * len(architecture.nodes)
    for edge in architecture.edges:
        if edge.used:
            found[edge.source] = bool(found[edge.source])
            found[edge.target] = bool(found[edge.target]) or edge.name not in device
    return found


def crossing(architecture: Architecture, device: Collection[str]) -> dict[int, list[int]]:
    """The edges from the device's nodes to the cloud's, by the node whose value they carry over.

    An edge that the cloud runs carries the value it reads; edges that the device runs carry what it has added up
    for the node where they end, which is what the identity read where that is all.
    """
    edges, cloud = architecture.edges, sides(architecture, device)
    found: dict[int, list[int]] = defaultdict(list)
    for place, edge in enumerate(edges):
        if edge.used and cloud[edge.target] and not cloud[edge.source]:
            found[edge.target if edge.name in device else edge.source].append(place)
    for node, places in list(found.items()):
        if cloud[node] and [edges[place].kind for place in places] == ["identity"]:
            found[edges[places[0]].source] += found.pop(node)
    return dict(found)


def sizes(architecture: Architecture, sent: Collection[int], size: float | None) -> dict[int, float | None]:
    """Bytes of each value that is sent; None where they do not add up to `size`, as those of narrowed layers."""
    found: dict[int, float | None] = {node: float(FLOAT * prod(architecture.nodes[node].shape)) for node in sent}
    if size is None or sum(value or 0.0 for value in found.values()) == size:
        return found
    return dict.fromkeys(found, size if len(found) == 1 else None)


def fields(
    cloud: Sequence[bool | None], points: NDArray[np.float64], step: float, drop: float, sheet: tuple[float, float]
) -> tuple[Field, ...]:
    """A rectangle behind each dot of the network; those of neighbours touch.

    Args:
        cloud: side of each node.
        points: `(N, 2)`, pixels.
        step: between columns, pixels.
        drop: between rows, pixels.
        sheet: width and height of the drawing.
    """
    left, right = points[:, 0].min() - REACH, min(points[:, 0].max() + REACH, sheet[0])
    found = []
    for side, (x, y) in zip(cloud, points, strict=True):
        if side is not None:
            start, end = max(x - step / 2, left), min(x + step / 2, right)
            top, bottom = max(y - drop / 2, 0.0), min(y + drop / 2, sheet[1])
            found.append(Field(x=start, y=top, width=end - start, height=bottom - top, cloud=side))
    return tuple(sorted(found, key=lambda field: field.cloud))


def marks(
    architecture: Architecture,
    device: Collection[str],
    sent: Collection[str],
    size: float | None,
    points: NDArray[np.float64],
    at: At,
) -> tuple[Mark, ...]:
    """What crosses, once on each way: the bytes where a value first leaves, "same" where it leaves again.

    Args:
        architecture: the network.
        device: edges that the device runs.
        sent: nodes whose values are sent.
        size: bytes of all that is sent, None where that is not known.
        points: `(N, 2)` of the nodes, pixels.
        at: of the edges.
    """
    ways = crossing(architecture, device) or {
        node: [] for node, each in enumerate(architecture.nodes) if each.name in sent
    }
    found: list[Mark] = []
    for node, size_of_value in sizes(architecture, ways, size).items():
        text = "sent" if size_of_value is None else _bytes(size_of_value)
        pairs: dict[tuple[int, int], list[int]] = defaultdict(list)
        for place in ways[node]:
            pairs[architecture.edges[place].source, architecture.edges[place].target].append(place)
        for number, places in enumerate(pairs.values()):
            found.append(_beside("same" if number else text, places, found, points, at))
        if not pairs:  # all runs on the device, and what it sends is the output
            found.append(_mark(f"{text} sent", points[node] + (0.0, 1.4 * HIGH)))
    return tuple(found)


def _beside(text: str, places: Sequence[int], others: Sequence[Mark], points: NDArray[np.float64], at: At) -> Mark:
    """A mark on parallel edges, clear of all dots and of other marks if it can be."""
    tried = [_mark(text, np.mean([at(place, way) for place in places], axis=0)) for way in WAYS]
    clear = [
        mark
        for mark in tried
        if not any(
            abs(mark.x - x) < (mark.width + width) / 2 and abs(mark.y - y) < (mark.height + height) / 2
            for x, y, width, height in [
                *((other.x, other.y, other.width, other.height) for other in others),
                *((x, y, HIGH, HIGH) for x, y in points.tolist()),
            ]
        )
    ]
    return (clear or tried)[0]


def _mark(text: str, middle: NDArray[np.float64]) -> Mark:
    x, y = middle.tolist()
    return Mark(x=x, y=y, width=LETTER * len(text) + ROUND, height=HIGH, text=text)


def _bytes(size: float) -> str:
    """`128` as "128 B", `65536` as "66 KB": short, as it stands on a line."""
    text = si(size, 3 if size < 1000 else 2)
    return text + ("B" if text[-1].isalpha() else f"{SPACE}B")
