"""The interactive figures: learning dynamics, the final choice among candidates, several runs beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from budgetnet.report.run import Candidate, Epoch, Run
from budgetnet.selection import pareto_front

INK, MUTED, GRID = "#1c2430", "#5b6573", "#e3e7ec"
BLUE, RED, GREEN, ORANGE, PURPLE = "#0072b2", "#d55e00", "#009e73", "#e69f00", "#cc79a7"
PHASES = {"warmup": ("warm-up", "#f4f0e4"), "search": ("search", "#e9f1f8"), "finetune": ("fine-tune", "#eaf4ef")}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

Values = list[float | None]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One quantity over the epochs."""

    name: str
    values: Values
    colour: str
    dash: str = "solid"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One of the small multiples."""

    title: str
    curves: tuple[Curve, ...]
    ticks: str = ""
    from_zero: bool = False
    least: float | None = None  # the axis ends here and just above 1, for shares that may not move at all


def dynamics(epochs: Sequence[Epoch]) -> go.Figure:
    """Loss, quality, cost, entropy and price over the epochs, one above the other, the phases shaded.

    Source: BSN, Figure 4.
    """
    shown = [
        panel for panel in panels(epochs) if any(value is not None for line in panel.curves for value in line.values)
    ]
    # plotly reads `<` in a text as markup, so what a file may name is escaped here and once more in the page
    figure = make_subplots(
        rows=max(len(shown), 1),
        shared_xaxes=True,
        vertical_spacing=0.052 * 6 / max(len(shown), 1),
        subplot_titles=[f"<b>{escape(panel.title)}</b>" for panel in shown] or None,
    )
    figure.update_annotations(x=0, xanchor="left", font={"size": 12.5, "color": INK})
    x = [epoch.epoch for epoch in epochs]
    for row, panel in enumerate(shown, 1):
        legend = "legend" if row == 1 else f"legend{row}"
        for line in panel.curves:
            if all(value is None for value in line.values):
                continue
            figure.add_scatter(
                x=x, y=line.values, name=escape(line.name), row=row, col=1, legend=legend,
                connectgaps=line.dash == "solid",
                mode="lines+markers" if len(x) <= 40 and line.dash == "solid" else "lines",
                line={"color": line.colour, "dash": line.dash, "width": 2 if line.dash == "solid" else 1.6},
                marker={"size": 4.5},
            )  # fmt: skip
        figure.update_yaxes(row=row, col=1, tickformat=panel.ticks, rangemode="tozero" if panel.from_zero else "normal")
        if panel.least is not None:
            figure.update_yaxes(row=row, col=1, range=[panel.least, 1.02])
        top = figure.layout["yaxis" if row == 1 else f"yaxis{row}"].domain[1]
        figure.update_layout({legend: {"x": 1.01, "y": top, "yanchor": "top", "bgcolor": "rgba(0,0,0,0)"}})
    for phase, start, end in phases(epochs):
        name, shade = PHASES.get(phase, (phase, "#f1f1f1"))
        figure.add_shape(type="rect", xref="x", yref="paper", x0=start, x1=end, y0=0, y1=1, fillcolor=shade,
                         line_width=0, layer="below")  # fmt: skip
        figure.add_annotation(x=(start + end) / 2, y=1, xref="x", yref="paper", yshift=34, showarrow=False,
                              text=escape(name), font={"size": 12, "color": MUTED})  # fmt: skip
    dress(figure, height=88 + 138 * len(shown), right=170, top=54)
    figure.update_xaxes(range=[min(x, default=0) - 0.5, max(x, default=0) + 0.5])
    figure.update_xaxes(title_text="epoch", row=max(len(shown), 1), col=1)
    return figure


def panels(epochs: Sequence[Epoch]) -> list[Panel]:
    """What is drawn, top to bottom; a panel without any value is left out later."""
    train, checked = [epoch.train for epoch in epochs], [epoch.validation for epoch in epochs]
    found = [
        Panel(
            title="Loss",
            curves=(
                Curve(name="training", values=each(train, "loss"), colour=BLUE),
                Curve(name="validation", values=each(checked, "loss"), colour=RED),
            ),
        ),
        Panel(
            title="Quality",
            ticks=".1~%",
            curves=(
                Curve(name="training accuracy", values=each(train, "accuracy"), colour=BLUE),
                Curve(name="validation accuracy", values=each(checked, "accuracy"), colour=RED),
                Curve(name="validation mean IoU", values=each(checked, "mean_iou"), colour=GREEN),
            ),
        ),
    ]  # fmt: skip
    names = list(dict.fromkeys((budget.cost, budget.unit) for epoch in epochs for budget in epoch.budgets))
    prices = []
    for (cost, unit), colour in zip(names, (BLUE, RED, GREEN, ORANGE, PURPLE) * len(names), strict=False):
        lines = [next((budget for budget in epoch.budgets if budget.cost == cost), None) for epoch in epochs]
        found.append(
            Panel(
                title=f"Cost: {cost} ({unit})",
                from_zero=True,
                curves=(
                    Curve(name="sampled, mean", values=each(lines, "sampled"), colour=BLUE),
                    Curve(name="most probable", values=each(lines, "mode"), colour=RED),
                    Curve(name="target now", values=each(lines, "target"), colour=MUTED, dash="dot"),
                    Curve(name="limit", values=each(lines, "limit"), colour=INK, dash="dash"),
                ),
            )
        )
        prices.append(Curve(name=cost, values=each(lines, "price"), colour=colour))
    entropy = Curve(name="of the architecture", values=each(epochs, "entropy"), colour=BLUE)
    found.append(Panel(title="Entropy (nats)", from_zero=True, curves=(entropy,)))
    found.append(Panel(title="Price of the budget", from_zero=True, curves=tuple(prices)))
    connected = Curve(name="of the samples", values=each(epochs, "connected"), colour=BLUE)
    least = min((value for value in connected.values if value is not None), default=1.0)
    found.append(
        Panel(title="Input and output connected", ticks=".1~%", curves=(connected,), least=min(least - 0.02, 0.9))
    )
    return found


def each(records: Sequence[object], name: str) -> Values:
    """One number of each record, None where there is no record."""
    return [None if record is None else getattr(record, name) for record in records]


def phases(epochs: Sequence[Epoch]) -> list[tuple[str, float, float]]:
    """Each phase in a row with where its shade starts and ends."""
    found = []
    for phase, group in groupby(epochs, key=lambda epoch: epoch.phase):
        numbers = [epoch.epoch for epoch in group]
        found.append((phase, numbers[0] - 0.5, numbers[-1] + 0.5))
    return found


def choice(candidates: Sequence[Candidate], cost: str, unit: str, limit: float) -> go.Figure:
    """The candidates by cost and quality on validation data, the limit, and the one that was chosen."""
    figure = go.Figure()
    for chosen, name, marker in (
        (False, "candidate", {"color": BLUE, "size": 7, "opacity": 0.55}),
        (True, "chosen", {"color": RED, "size": 13, "symbol": "star"}),
    ):
        some = [candidate for candidate in candidates if candidate.chosen == chosen and cost in candidate.costs]
        figure.add_scatter(x=[candidate.costs[cost] for candidate in some], y=[each.validation for each in some],
                           mode="markers", name=name, marker=marker)  # fmt: skip
    figure.add_vline(x=limit, line={"color": INK, "dash": "dash", "width": 1.5}, annotation_text="limit")
    dress(figure, height=300, right=120, top=30)
    figure.update_xaxes(title_text=escape(f"{cost} ({unit})"))
    return figure.update_yaxes(title_text="validation", title_standoff=8, tickformat=".2~%")


def comparison(runs: Sequence[Run], cost: str, unit: str) -> go.Figure:
    """Runs by the cost and quality of what they returned, and the front: those that no other run betters in both."""
    points = sorted(
        (value, -quality, run.name)
        for run in runs
        if (value := cost_of(run, cost)) is not None and (quality := quality_of(run)) is not None
    )
    costs, qualities = (torch.tensor([point[i] for point in points], dtype=torch.float64) for i in (0, 1))
    front = [point for point, best in zip(points, pareto_front(costs, -qualities).tolist(), strict=True) if best]
    figure = go.Figure()
    figure.add_scatter(x=[value for value, *_ in front], y=[-worse for _, worse, _ in front], mode="lines",
                       name="Pareto front", line={"color": MUTED, "dash": "dot", "shape": "hv"},
                       hoverinfo="skip")  # fmt: skip
    figure.add_scatter(
        x=[value for value, _, _ in points], y=[-worse for _, worse, _ in points],
        text=[escape(name) for *_, name in points],
        mode="markers+text" if len(points) <= 25 else "markers", textposition="top center", name="run",
        marker={"color": BLUE, "size": 9}, cliponaxis=False,
    )  # fmt: skip
    dress(figure, height=380, right=120, top=30)
    figure.update_xaxes(title_text=escape(f"{cost} ({unit})"))
    return figure.update_yaxes(title_text="quality", title_standoff=8, tickformat=".2~%")


def cost_of(run: Run, cost: str) -> float | None:
    """What the returned network takes of a cost, where the run says."""
    if run.result is None:
        return None
    limited = {outcome.cost: outcome.value for outcome in run.result.budgets}
    return (run.result.network | limited).get(cost)


def quality_of(run: Run) -> float | None:
    """How good the returned network is: on test data, else on validation data."""
    measured = run.result and (run.result.test or run.result.validation)
    return measured.best if measured else None


def dress(figure: go.Figure, *, height: int, right: int, top: int) -> None:
    """The look that all figures share."""
    figure.update_layout(
        template="none", height=height, autosize=True, margin={"l": 68, "r": right, "t": top, "b": 46},
        font={"family": FONT, "size": 12, "color": INK}, plot_bgcolor="rgba(0,0,0,0)", paper_bgcolor="rgba(0,0,0,0)",
        hovermode="closest",
    )  # fmt: skip
    figure.update_xaxes(
        showgrid=False,
        zeroline=False,
        showline=True,
        linecolor="#aab2bd",
        ticks="outside",
        ticklen=4,
        tickcolor="#aab2bd",
        exponentformat="SI",
    )
    figure.update_yaxes(gridcolor=GRID, zeroline=False, nticks=5, exponentformat="SI")
