"""The network drawn: every edge of the super network, what was kept of it in strong colours, as lines of an SVG."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import hypot

import numpy as np
from numpy.typing import NDArray

from budgetnet.report.architecture import Architecture, Edge, Node, Site
from budgetnet.report.cuts import Field, Mark, fields, marks, sides
from budgetnet.report.quantities import SPACE, percent, shape, si

COLOURS = {
    "block": "#0072b2", "conv": "#0072b2", "same": "#0072b2", "projection": "#d55e00", "down": "#d55e00",
    "identity": "#009e73", "up": "#009e73", "input": "#3d4652", "output": "#3d4652", "module": "#3d4652",
}  # fmt: skip
OTHERS = ("#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c6d31")
"""Okabe and Ito's palette, which colour-blind readers can tell apart; `OTHERS` serve the kinds of other spaces."""

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 1060.0, 130.0, 44.0, 38.0, 18.0  # the sheet and its margins, pixels

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One edge as a curve."""

    path: str
    used: bool
    colour: str
    marker: int  # which arrow head
    width: float
    band: float  # width of the pale band around it that stands for all its channels, 0 for none
    title: str
    cloud: bool  # whether it runs behind the cut between device and cloud


@dataclass(frozen=True, kw_only=True)
class Dot:
    """One node."""

    x: float
    y: float
    used: bool
    title: str
    sent: bool  # whether its value goes from the device to the cloud


@dataclass(frozen=True, kw_only=True)
class Label:
    """A word on the sheet."""

    x: float
    y: float
    text: str
    anchor: str
    kind: str = ""  # "device" or "cloud" where it names a side of the cut


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One entry of the legend."""

    name: str
    colour: str
    used: int
    all: int


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What the template writes out as SVG, the dropped edges first."""

    width: float
    height: float
    radius: float
    arrow: float  # size of an arrow head, 0 for none
    lines: tuple[Line, ...]
    dots: tuple[Dot, ...]
    labels: tuple[Label, ...]
    kinds: tuple[Kind, ...]
    colours: tuple[str, ...]
    weighed_by: str | None  # the cost that the widths show
    gated: bool  # whether lines with gates on their channels show how many are left
    widest: str | None  # its largest share; None where widths show the channels left instead
    cut: bool  # whether there is a cut
    fields: tuple[Field, ...]  # which side each layer is on, where there is one
    marks: tuple[Mark, ...]  # what crosses it


def draw(
    architecture: Architecture,
    device: Collection[str] | None = None,
    sent: Collection[str] = (),
    size: float | None = None,
) -> Drawing:
    """Lays the network out on its grid: columns to the right, rows downwards, parallel edges side by side.

    Args:
        architecture: the network.
        device: edges that run on a device, all others in the cloud; None where there is no cut.
        sent: nodes whose values are sent.
        size: bytes of all that is sent, None where that is not known.
    """
    nodes, edges = architecture.nodes, architecture.edges
    places = grid(architecture)
    columns, rows = np.ptp(places, axis=0) if len(places) else (0.0, 0.0)
    step = float(np.clip((WIDTH - LEFT - RIGHT) / max(columns, 1e-9), 14, 110))
    drop = float(np.clip(max(step, 330 / max(rows, 1)), 34 if rows > 12 else 62, 130))
    points = (places - places.min(axis=0)) * (step, drop) + (LEFT, TOP) if len(places) else places
    gated, whole = bool(architecture.sites), float(np.clip(step / 6, 4, 10))
    gap = float(np.clip(step / 5, whole + 4 if gated else 3.5, 16))
    bent = bends(edges, points, radius := float(np.clip(step / 14, 2.5, 6)), gap)
    over, under = room(edges, points, bent)
    points[:, 1] += over
    arrow = 7.0 if step >= 60 else 5.0 if step >= 26 else 0.0

    colour = colours(edges)
    palette = tuple(dict.fromkeys(colour.values()))
    weights, weighed_by = shares(edges)
    largest = max(weights, default=0.0)
    thickest = float(np.clip(step / 13, 2.2, 6.5))
    lines = []
    for place, (edge, bend) in enumerate(zip(edges, bent, strict=True)):
        thin = 1.6 if step >= 26 else 1.1
        sites = architecture.sites_of(place)
        if gated:
            width = max(whole * left(sites), 0.8) if sites else thin
        else:
            width = thin + (thickest - thin) * weights[place] / largest if largest else thin
        lines.append(
            Line(
                path=curve(points[edge.source], points[edge.target], bend, radius, arrow if edge.used else 0.0),
                used=edge.used,
                colour=colour[edge.kind],
                marker=palette.index(colour[edge.kind]),
                width=width,
                band=whole if sites else 0.0,
                title=edge_title(edge, nodes, sites, device),
                cloud=edge.used and device is not None and edge.name not in device,
            )
        )
    cloud = [] if device is None else sides(architecture, device)
    words = labels(architecture, points, cloud)
    under += 14.0 if cloud else 0.0  # for what names the sides
    alive = {end for edge in edges if edge.used for end in (edge.source, edge.target)}
    width = max(WIDTH, LEFT + RIGHT + columns * step) if step <= 14 else LEFT + RIGHT + columns * step
    height = float(TOP + over + rows * drop + under + BOTTOM)

    def at(edge: int, share: float) -> NDArray[np.float64]:
        return on_curve(points[edges[edge].source], points[edges[edge].target], bent[edge], share)

    return Drawing(
        width=float(width),
        height=height,
        radius=radius,
        arrow=arrow,
        lines=tuple(sorted(lines, key=lambda line: (line.used, -line.width))),
        dots=tuple(
            Dot(
                x=float(x),
                y=float(y),
                used=place in alive,
                title=f"{node.name}\n{shape(node.shape)}",
                sent=node.name in sent,
            )
            for place, (node, (x, y)) in enumerate(zip(nodes, points, strict=True))
        ),
        labels=words,
        kinds=tuple(
            Kind(name=kind, colour=colour[kind], used=used, all=count)
            for kind, count in Counter(edge.kind for edge in edges).items()
            for used in [sum(edge.used for edge in edges if edge.kind == kind)]
        ),
        colours=palette,
        weighed_by=weighed_by,
        gated=gated,
        widest=percent(largest) if largest and not gated else None,
        cut=device is not None,
        fields=fields(cloud, points, step, drop, (float(width), height)) if cloud else (),
        marks=() if device is None else marks(architecture, device, sent, size, points, at),
    )


def grid(architecture: Architecture) -> NDArray[np.float64]:
    """`(N, 2)` columns and rows; an input or output that would lie on another node moves out to its own column."""
    places = np.array([node.position for node in architecture.nodes], dtype=float).reshape(-1, 2)
    entered = {edge.target for edge in architecture.edges}
    left = {edge.source for edge in architecture.edges}
    for node in range(len(places)):
        shared = (np.abs(places - places[node]).sum(axis=1) < 1e-9).sum() > 1
        if shared and node not in entered:
            places[node, 0] = places[:, 0].min() - 1
        elif shared and node not in left:
            places[node, 0] = places[:, 0].max() + 1
    return places


def colours(edges: Sequence[Edge]) -> dict[str, str]:
    """A colour for each kind, its own or the next free one."""
    unknown = [kind for kind in dict.fromkeys(edge.kind for edge in edges) if kind not in COLOURS]
    return COLOURS | {kind: OTHERS[place % len(OTHERS)] for place, kind in enumerate(unknown)}


def shares(edges: Sequence[Edge]) -> tuple[list[float], str | None]:
    """Each used edge's share of what all of them cost (0 for the others), and of which cost: MACs, if known."""
    known = list(dict.fromkeys(cost for edge in edges for cost in edge.costs))
    cost = "macs" if "macs" in known else next(iter(known), None)
    values = [max(edge.costs.get(cost, 0.0), 0.0) if edge.used and cost else 0.0 for edge in edges]
    total = sum(values)
    return ([value / total for value in values] if total else values), cost


def left(sites: Sequence[Site]) -> float:
    """Share of the channels at some sites that is in the network."""
    return sum(site.left for site in sites) / sum(site.all for site in sites)


def bends(edges: Sequence[Edge], points: NDArray[np.float64], radius: float, gap: float) -> list[float]:
    """How far each edge's middle lies beside the straight line, pixels.

    Parallel edges lie `gap` apart around it; a line that would run through another node goes round it.
    """
    lanes: dict[frozenset[int], list[int]] = defaultdict(list)
    for place, edge in enumerate(edges):
        lanes[frozenset((edge.source, edge.target))].append(place)
    bent = [0.0] * len(edges)
    for places in lanes.values():
        first = edges[places[0]]
        around = detour(points, first.source, first.target, radius)
        for lane, place in enumerate(sorted(places, key=lambda place: edges[place].kind)):
            side = 1 if edges[place].source == first.source else -1
            bent[place] = side * (around + gap * ((len(places) - 1) / 2 - lane))
    return bent


def detour(points: NDArray[np.float64], source: int, target: int, radius: float) -> float:
    """0 where the straight line is free of other nodes, else a bend that grows with its length."""
    start, along = points[source], points[target] - points[source]
    length = hypot(*along)
    if not length:
        return 0.0
    towards = (points - start) @ along / length
    aside = np.abs((points - start) @ (-along[1], along[0])) / length
    inside = (towards > 1e-6) & (towards < length - 1e-6) & (aside < radius + 1)
    return min(8 + 0.06 * length, 40.0) if inside.any() else 0.0


def room(edges: Sequence[Edge], points: NDArray[np.float64], bent: Sequence[float]) -> tuple[float, float]:
    """What the curves need above the first and below the last row, pixels."""
    if not edges:
        return 0.0, 0.0
    middles = [
        middle(points[edge.source], points[edge.target], bend)[1] for edge, bend in zip(edges, bent, strict=True)
    ]
    return max(points[:, 1].min() - min(middles), 0.0), max(max(middles) - points[:, 1].max(), 0.0)


def middle(start: NDArray[np.float64], end: NDArray[np.float64], bend: float) -> NDArray[np.float64]:
    """The point `bend` to the left of the way's middle: upwards, where it runs from left to right."""
    along = end - start
    return (start + end) / 2 + bend * np.array([along[1], -along[0]]) / (hypot(*along) or 1.0)


def on_curve(start: NDArray[np.float64], end: NDArray[np.float64], bend: float, share: float) -> NDArray[np.float64]:
    """The point at a share, in [0, 1], of the curve whose middle is `bend` beside the straight line."""
    control = middle(start, end, 2 * bend)
    return (1 - share) ** 2 * start + 2 * share * (1 - share) * control + share**2 * end


def curve(start: NDArray[np.float64], end: NDArray[np.float64], bend: float, radius: float, arrow: float) -> str:
    """An SVG path from rim to rim of two dots, its middle `bend` beside the straight line."""
    length = hypot(*(end - start))
    control = middle(start, end, 2 * bend)

    def rim(place: NDArray[np.float64], room: float) -> NDArray[np.float64]:
        towards = control - place
        return place + towards / (hypot(*towards) or 1.0) * min(room, length / 3)

    first, last = rim(start, radius + 1), rim(end, radius + 1 + arrow)
    return "M{:.1f} {:.1f}Q{:.1f} {:.1f} {:.1f} {:.1f}".format(*first, *control, *last)


def labels(
    architecture: Architecture, points: NDArray[np.float64], cloud: Sequence[bool | None] = ()
) -> tuple[Label, ...]:
    """The commonest shape of each row at its left; input and output, and on which side of a cut, by their nodes."""
    nodes, edges = architecture.nodes, architecture.edges
    entered, left = {edge.target for edge in edges}, {edge.source for edge in edges}
    ends = [place for place in range(len(nodes)) if (place in entered) != (place in left)]
    rows: dict[float, Counter[tuple[int, ...]]] = defaultdict(Counter)
    for place, node in enumerate(nodes):
        if place not in ends:
            rows[float(points[place, 1])][node.shape] += 1
    found = [
        Label(x=LEFT - 42, y=row + 4, text=shape(shapes.most_common(1)[0][0]), anchor="end")
        for row, shapes in sorted(rows.items())
    ]
    for place in ends:
        word = "output" if place in entered else "input"
        x, y = points[place]
        found.append(Label(x=float(x), y=float(y) - 24, text=word, anchor="middle"))
        found.append(Label(x=float(x), y=float(y) - 12, text=shape(nodes[place].shape), anchor="middle"))
        if cloud and (word == "input" or cloud[place]):
            side = "cloud" if cloud[place] else "device"
            found.append(Label(x=float(x), y=float(y) + 22, text=side, anchor="middle", kind=side))
    return tuple(found)


def edge_title(edge: Edge, nodes: Sequence[Node], sites: Sequence[Site], device: Collection[str] | None = None) -> str:
    """What a pointer resting on the edge is told; `device` are the edges on that side of a cut, None without one."""
    state = "kept" if edge.used else "kept, but on no path from input to output" if edge.kept else "dropped"
    if edge.used and device is not None:
        state += ", runs on the device" if edge.name in device else ", runs in the cloud"
    chance = "not a choice" if edge.fixed or edge.probability is None else f"probability {edge.probability:.3g}"
    costs = [f"{name}: {si(value)}" for name, value in edge.costs.items()]
    channels = [f"{site.name}: {site.left} of {site.all} channels" for site in sites]
    where = f"{nodes[edge.source].name} → {nodes[edge.target].name}"
    return "\n".join([f"{edge.name} ({edge.kind}), {state}", where, chance, *channels, *costs]).replace(" ", SPACE)
