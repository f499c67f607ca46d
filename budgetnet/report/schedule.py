"""The schedule drawn: a row for each worker, what it computes when, and what goes from one to another."""

from __future__ import annotations

from html import escape

import plotly.graph_objects as go

from budgetnet.report.architecture import Architecture
from budgetnet.report.figures import INK, MUTED, ORANGE, dress
from budgetnet.report.network import colours
from budgetnet.report.plans import Plan, Task

NAMED = 60
"""Up to so many tasks carry their names in the figure."""


def gantt(plan: Plan, architecture: Architecture) -> go.Figure:
    """A row for each worker, a bar for each task, and what is sent from row to row.

    Source: BSN, Figures 5b and 8.
    """
    kinds = {edge.name: edge.kind for edge in architecture.edges}
    colour = colours(architecture.edges) | {"sum": MUTED}
    figure, unit = go.Figure(), escape(plan.unit)
    for kind in dict.fromkeys(kinds.get(task.name, "sum") for task in plan.tasks):
        own = [task for task in plan.tasks if kinds.get(task.name, "sum") == kind]
        figure.add_bar(
            x=[task.end - task.start for task in own], base=[task.start for task in own],
            y=[worker(task.worker) for task in own], orientation="h", name=escape(kind), marker={
                "color": colour[kind], "line": {"color": "#fff", "width": 1}},
            text=[escape(task.name) for task in own] if len(plan.tasks) <= NAMED else None,
            textposition="inside", insidetextanchor="middle", constraintext="inside", textfont={"color": "#fff"},
            customdata=[[escape(task.name), task.end] for task in own],
            hovertemplate=f"%{{customdata[0]}}<br>%{{base:.4g}} to %{{customdata[1]:.4g}} {unit}<extra></extra>",
        )  # fmt: skip
    ways = [(value, each) for value in plan.sent if value.target is not None for each in ends(value, value.target)]
    if ways:
        figure.add_scatter(
            x=[each[0] for _, each in ways], y=[each[1] for _, each in ways], mode="lines+markers", name="sent",
            line={"color": ORANGE, "width": 2}, marker={"size": 5, "color": ORANGE}, connectgaps=False,
            text=[escape(value.name) for value, _ in ways],
            hovertemplate=f"%{{text}} sent<br>%{{x:.4g}} {unit}<extra></extra>",
        )  # fmt: skip
    dress(figure, height=104 + 46 * plan.workers, right=130, top=20)
    figure.update_layout(barmode="overlay", bargap=0.3)
    rows = [worker(place) for place in range(plan.workers)]
    figure.update_yaxes(
        type="category", categoryorder="array", categoryarray=rows, range=[plan.workers - 0.5, -0.5], nticks=None,
        tickvals=rows, tickfont={"color": INK}, showgrid=False,
    )  # fmt: skip
    return figure.update_xaxes(title_text=unit, rangemode="tozero")


def ends(value: Task, target: int) -> list[tuple[float | None, str | None]]:
    """Where a value's way starts and ends, and a gap."""
    return [(value.start, worker(value.worker)), (value.end, worker(target)), (None, None)]


def worker(place: int) -> str:
    """What a worker is called."""
    return f"worker {place + 1}"
