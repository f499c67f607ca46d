"""What is shown of gates: channels left, probabilities, activation over the epochs, accuracy and cost by threshold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from budgetnet.report.architecture import Architecture
from budgetnet.report.figures import BLUE, INK, MUTED, ORANGE, RED, dress, each
from budgetnet.report.inference import Inference, Point
from budgetnet.report.quantities import percent
from budgetnet.report.run import Epoch, Outcome

CLOSED, OPEN = 0.05, 0.95
"""A gate is polarised below the one and above the other (Herrmann et al., section 4.5.3)."""

BINS = 20
SCALE = ((0.0, "#f3eee2"), (0.25, "#c9d9e6"), (0.5, "#7fb0d3"), (0.75, "#2f7fb5"), (1.0, "#0a3a63"))
"""Sand for closed to dark blue for open, rising in darkness alone, so that it also prints."""

COLUMNS = 4  # most sites of an edge that are columns of the table


@dataclass(frozen=True, kw_only=True)
class Bar:
    """Channels left of all at one site, and how long its bars are, in percent of the room."""

    left: int
    all: int
    whole: float
    part: float  # of `whole`


def channel_table(architecture: Architecture) -> dict[str, Any] | None:
    """Channels left at each site, in the network's order; None without sites.

    A row is an edge and a column a site, such as "hidden0", of all edges; where edges have many sites a row is a site.
    """
    if not architecture.sites:
        return None
    places: dict[str, int] = {}
    for index in range(len(architecture.edges)):
        for order, site in enumerate(architecture.sites_of(index)):
            places[site.name] = max(order, places.get(site.name, 0))
    names = sorted(places, key=lambda name: places[name])
    wide = len(names) <= COLUMNS
    longest = {name: max(site.all for site in architecture.sites if not wide or site.name == name) for name in names}
    rows: list[dict[str, Any]] = []
    for index, edge in enumerate(architecture.edges):
        bars = {
            site.name: Bar(
                left=site.left,
                all=site.all,
                whole=round(100 * site.all / longest[site.name], 2),
                part=round(100 * site.left / site.all, 2),
            )
            for site in architecture.sites_of(index)
        }
        if wide and bars:
            rows.append({"name": edge.name, "used": edge.used, "bars": [bars.get(name) for name in names]})
        else:
            rows += [{"name": f"{edge.name}.{name}", "used": edge.used, "bars": [bar]} for name, bar in bars.items()]
    halves = 2 if len(rows[0]["bars"]) == 1 and len(rows) > 8 else 1
    most = -(-len(rows) // halves)
    return {
        "names": names if wide else ["channels"],
        "parts": [rows[first : first + most] for first in range(0, len(rows), most)],
        "left": sum(site.left for site in architecture.sites),
        "all": sum(site.all for site in architecture.sites),
        "count": len(architecture.sites),
        "dropped": any(not row["used"] for row in rows),
    }


def chances(architecture: Architecture) -> dict[str, list[float]]:
    """Probabilities of all gates, of edges and of groups of channels; one that several sites share counts once."""
    edges = [edge.probability for edge in architecture.edges if not edge.fixed]
    groups = {
        ((site.edge, site.name) if site.lock is None else site.lock, place): probability
        for site in architecture.sites
        for place, probability in enumerate(site.probability)
    }
    return {
        "edges": [chance for chance in edges if chance is not None],
        "groups of channels": [chance for chance in groups.values() if chance is not None],
    }


def polarised(architecture: Architecture) -> tuple[int, int]:
    """How many gates are nearly always closed or nearly always open, and how many gates there are."""
    found = [chance for some in chances(architecture).values() for chance in some]
    return sum(chance < CLOSED or chance > OPEN for chance in found), len(found)


def probabilities(architecture: Architecture) -> go.Figure | None:
    """How many gates have which probability; None where no gate has one.

    Source: Herrmann et al., Figures 9 and 16.
    """
    shown = {name: some for name, some in chances(architecture).items() if some}
    if not shown:
        return None
    figure = go.Figure()
    middles = [(place + 0.5) / BINS for place in range(BINS)]
    labels = [f"{place / BINS:.2f} to {(place + 1) / BINS:.2f}" for place in range(BINS)]
    for (name, some), colour in zip(shown.items(), (ORANGE, BLUE)[-len(shown) :], strict=True):
        bins = [bin_of(chance) for chance in some]
        figure.add_bar(
            x=middles, y=[bins.count(place) for place in range(BINS)], width=0.92 / BINS, name=name,
            marker_color=colour, customdata=labels,
            hovertemplate=f"%{{y}} {name}, probability %{{customdata}}<extra></extra>",
        )  # fmt: skip
    dress(figure, height=250, right=30, top=34 if len(shown) > 1 else 14)
    for limit in (CLOSED, OPEN):
        figure.add_vline(x=limit, line={"color": MUTED, "dash": "dot", "width": 1.2})
    figure.update_layout(
        barmode="stack",
        showlegend=len(shown) > 1,
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom", "traceorder": "normal"},
    )
    figure.update_xaxes(title_text="probability that the gate is open", range=[-0.005, 1.005], dtick=0.1)
    return figure.update_yaxes(title_text="gates", title_standoff=8, rangemode="tozero")


def bin_of(chance: float) -> int:
    """The bar a probability counts in; the first and the last hold just the polarised gates."""
    if chance < CLOSED:
        return 0
    return BINS - 1 if chance > OPEN else min(max(int(chance * BINS), 1), BINS - 2)


def activation(epochs: Sequence[Epoch], names: Sequence[str]) -> go.Figure | None:
    """How often each gated edge and site was open, a column for each epoch; None where there are not two of them.

    Source: Herrmann et al., Figures 24 to 27, which draw lines.
    """
    shown = [(epoch.epoch, epoch.activation) for epoch in epochs if epoch.activation]
    if len(shown) < 2:
        return None
    names = list(names or dict.fromkeys(name for _, rates in shown for name in rates))
    texts = [escape(name) for name in names]
    cell = min(max(960 / len(names), 1.5), 26 if len(names) <= 8 else 17)
    every = ceil(11.5 / cell)
    longest = max(len(name) for name in names[::every])
    figure = go.Figure(
        go.Heatmap(
            x=[epoch for epoch, _ in shown],
            y=texts,
            z=[[rates.get(name) for _, rates in shown] for name in names],
            zmin=0, zmax=1, colorscale=SCALE, showscale=False,
            xgap=1 if len(shown) <= 40 else 0, ygap=1 if cell >= 8 else 0,
            hovertemplate="%{y}<br>epoch %{x}: open %{z:.1%}<extra></extra>",
        )
    )  # fmt: skip
    dress(figure, height=round(cell * len(names)) + 46 + 4, right=14, top=4)
    figure.update_layout(margin_l=min(24 + 6.4 * longest, 300))
    figure.update_xaxes(title_text="epoch", ticks="", showline=False, tickformat="d", nticks=min(len(shown) + 1, 20))
    return figure.update_yaxes(
        type="category", autorange="reversed", showgrid=False, tickfont={"size": 11},
        ticklen=4, tickcolor="rgba(0,0,0,0)", tickvals=texts[::every], ticktext=texts[::every],
    )  # fmt: skip


def thresholds(inference: Inference, budgets: Sequence[Outcome], accuracy: float | None) -> go.Figure | None:
    """Accuracy and each cost by the threshold of the gates; None where no others were tried.

    The one in use, with the run's own `accuracy` and values of its budgets, is a point of the lines and a star.

    Source: Herrmann et al., Figure 10, which draws accuracy by cost.
    """
    if len(inference.curve) < 2:
        return None
    limits = {budget.cost: budget for budget in budgets}
    points = [*inference.curve]
    if accuracy is not None and inference.policy == "threshold":
        own = Point(tau=inference.tau, accuracy=accuracy, costs={name: each.value for name, each in limits.items()})
        points = sorted([*(point for point in points if point.tau != own.tau), own], key=lambda point: point.tau)
    costs = list(dict.fromkeys(name for point in points for name in point.costs))
    units = [f" ({limits[name].unit})" if name in limits else "" for name in costs]
    titles = ["Accuracy", *(f"{name}{unit}" for name, unit in zip(costs, units, strict=True))]
    figure = make_subplots(
        rows=1,
        cols=len(titles),
        horizontal_spacing=min(0.09, 0.5 / len(titles)),
        subplot_titles=[f"<b>{escape(title)}</b>" for title in titles],
    )
    for place, title in enumerate(figure.layout.annotations):
        axis = figure.layout["xaxis" if place == 0 else f"xaxis{place + 1}"]
        title.update(x=axis.domain[0], xanchor="left", yshift=8, font={"size": 12.5, "color": INK})
    taus = [point.tau for point in points]
    values = [each(points, "accuracy"), *([point.costs.get(name) for point in points] for name in costs)]
    for column, (title, line) in enumerate(zip(titles, values, strict=True), 1):
        figure.add_scatter(x=taus, y=line, name=escape(title), mode="lines+markers", row=1, col=column,
                           line={"color": BLUE, "width": 2}, marker={"size": 6})  # fmt: skip
        used = [(tau, value) for tau, value in zip(taus, line, strict=True) if tau == inference.tau]
        figure.add_scatter(x=[tau for tau, _ in used], y=[value for _, value in used], name="in use", mode="markers",
                           row=1, col=column, marker={"color": RED, "size": 12, "symbol": "star"})  # fmt: skip
        figure.add_vline(x=inference.tau, line={"color": MUTED, "dash": "dot", "width": 1.4}, row=1, col=column)
    dress(figure, height=260, right=20, top=44)
    figure.update_layout(showlegend=False)
    figure.update_xaxes(title_text="threshold τ", range=[-0.02, 1.02], dtick=0.2)
    least, most = (bound(point.accuracy for point in points) for bound in (min, max))
    room = max(0.1 * (most - least), 0.02)
    figure.update_yaxes(tickformat=".2~%", range=[least - room, min(most + room, 1.005)], col=1)
    for column, name in enumerate(costs, 2):
        figure.update_yaxes(rangemode="tozero", col=column)
        if name in limits:
            figure.add_hline(y=limits[name].limit, line={"color": INK, "dash": "dash", "width": 1.4}, row=1, col=column,
                             annotation={"text": "limit" if limits[name].at_most else "target",
                                         "font": {"size": 11}})  # fmt: skip
    return figure


def polarised_words(architecture: Architecture) -> str:
    """The caption of the probabilities, with the share of gates that are polarised."""
    some, count = polarised(architecture)
    are = f"{some:,} of {count:,} gates ({percent(some / max(count, 1))}) are polarised"
    return f"{are}: open with a probability below {CLOSED:g} or above {OPEN:g} (dotted lines)."
