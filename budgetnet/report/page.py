"""The page: what a run says in words, tables and figures, written as one file that needs no other."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from budgetnet.budgets import WITHOUT_GATES, plural
from budgetnet.errors import ConfigError, FileError
from budgetnet.files import replace
from budgetnet.report import figures, gate_figures, quantities
from budgetnet.report.architecture import Architecture, Edge
from budgetnet.report.network import Drawing, draw, shares
from budgetnet.report.quantities import MISSING, duration, exact, percent, share, si
from budgetnet.report.run import Quality, Run
from budgetnet.report.schedule import gantt
from budgetnet.report.words import foretold, headline, outcomes, quality, slowed, slower, times_beside, verdict


def write(run: str | Path | Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Writes the report of one run, or of several beside each other.

    Args:
        run: a run folder, finished or not, or several of them.
        out: the file to write; None for `report.html` in the folder of a single run.

    Returns:
        The file written.

    Raises:
        ConfigError: there is no run, or there are several and no `out`.
        FileError: a file of a run is missing or not of its layout, or `out` cannot be written.
    """
    folders = [Path(run)] if isinstance(run, (str, Path)) else [Path(folder) for folder in run]
    if not folders:
        raise ConfigError("a report needs at least one run folder, got none")
    if out is None and len(folders) > 1:
        raise ConfigError(
            f"the report of several runs needs a file to write to (out), got none for {len(folders)} runs"
        )
    path = folders[0] / "report.html" if out is None else Path(out)
    page = render([Run.read(folder) for folder in folders])
    try:
        replace(path, page.encode())
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error.strerror}") from None
    return path


def render(runs: Sequence[Run]) -> str:
    """The page as HTML: the comparison first where there are several runs, then a section for each."""
    template = _environment().get_template("template.html.j2")
    return template.render(
        runs=[section(run) for run in runs],
        comparison=compare(runs) if len(runs) > 1 else None,
        style=Markup(_part("style.css")),  # our own file
        plotly=Markup(get_plotlyjs()),
    )


def picture(drawing: Drawing, title: str) -> str:
    """A network as an SVG file of its own, its title above and its legend below."""
    alone: Callable[..., str] = _environment().get_template("network.svg.j2").module.alone  # type: ignore[attr-defined]
    return alone(drawing, title).strip() + "\n"


def section(run: Run) -> dict[str, Any]:
    """What the template shows of one run."""
    result, architecture = run.result, run.architecture
    rows = outcomes(run)
    first = rows[0] if rows else None
    candidates = result.candidates if result and first else ()
    inference = result.inference if result else None
    checked = result.validation.accuracy if result and result.validation else None
    learned = architecture if any(epoch.phase == "search" for epoch in run.epochs) else None
    return {
        "run": run,
        "headline": headline(run),
        "verdict": verdict(run),
        "budgets": rows,
        "measured": [each for each in result.budgets if each.low is not None] if result else [],
        "predicted": [(each.cost, foretold(each.predicted_for)) for each in result.budgets if each.predicted_for]
        if result
        else [],
        "drawing": draw(architecture, *_cut(run)) if architecture and architecture.nodes else None,
        "cuts": run.cuts,
        "plans": [(plan, gantt(plan, architecture)) for plan in run.plans if plan.tasks] if architecture else [],
        "choices": [sum(edge.used for edge in choices), len(choices)] if (choices := _choices(architecture)) else None,
        "channels": gate_figures.channel_table(architecture) if architecture else None,
        "dynamics": figures.dynamics(run.epochs) if run.epochs else None,
        "activation": gate_figures.activation(run.epochs, architecture.gated() if architecture else ()),
        "scale": ", ".join(colour for _, colour in gate_figures.SCALE),
        "probabilities": gate_figures.probabilities(learned) if learned else None,
        "polarised": gate_figures.polarised_words(learned) if learned else "",
        "choice": figures.choice(candidates, first.cost, first.unit, first.limit) if first and candidates else None,
        "inference": inference,
        "slower": slower(inference.beside_full) if inference else "",
        "thresholds": gate_figures.thresholds(inference, result.budgets, checked) if inference and result else None,
        "edges": edge_table(architecture) if architecture else None,
        "evidence": evidence(run),
        "provenance": provenance(run),
        "options": {
            "search": _shown(run.search),
            "space": _shown(run.options.record("space").record("options").values),
            "data": _shown(run.options.record("data").values),
        },
    }


def compare(runs: Sequence[Run]) -> dict[str, Any]:
    """The table and the scatter of several runs, by the first run's first cost where all returned networks have it."""
    finished = [run for run in runs if run.result is not None]
    cost, unit = "macs", "MAC"
    for outcome in outcomes(runs[0])[:1]:
        if all(figures.cost_of(run, outcome.cost) is not None for run in finished):
            cost, unit = outcome.cost, outcome.unit
    rows = [
        {
            "run": run,
            "verdict": verdict(run),
            "budgets": outcomes(run),
            "network": run.result.network if run.result else {},
            "latency": _milliseconds(run),
            "validation": _best(run.result.validation) if run.result else MISSING,
            "test": _best(run.result.test) if run.result else MISSING,
            "seed": run.result.seed if run.result else None,
        }
        for run in runs
    ]
    kept = sum(run.result is not None and verdict(run)[0] == "kept" for run in runs)
    return {
        "rows": rows,
        "kept": kept,
        "finished": len(finished),
        "figure": figures.comparison(runs, cost, unit) if finished else None,
    }


def edge_table(architecture: Architecture) -> dict[str, Any]:
    """The used edges, the most costly first, with all their costs and their share of the first."""
    parts, cost = shares(architecture.edges)
    used = [(part, edge) for part, edge in zip(parts, architecture.edges, strict=True) if edge.used]
    names = list(dict.fromkeys(name for _, edge in used for name in edge.costs))
    return {
        "names": names,
        "by": cost,
        "rows": sorted(used, key=lambda row: (-row[0], row[1].name)),
        "sums": {name: sum(edge.costs.get(name, 0.0) for _, edge in used) for name in names},
    }


def evidence(run: Run) -> list[tuple[str, str]]:
    """What was checked and measured on the returned network."""
    if run.result is None:
        return []
    compared = {
        "extracted": "Extracted network against the searched one",
        "onnx": "ONNX file against the extracted network",
        "pt2": "torch.export file against the extracted network",
    }
    rows = [
        (compared.get(name, name), f"outputs differ by at most {difference:.2g}")
        for name, difference in run.result.equivalence.items()
    ]
    if latency := run.result.latency:
        median, low, high = (latency.number(key) for key in ("median", "p10", "p90"))
        threads, batch = latency.whole("threads"), latency.whole("batch")
        spread = f"{median:.3g} ms (10th to 90th percentile {low:.3g} to {high:.3g} ms)"
        how = f"{latency.text('runtime')}, {threads} {'thread' if threads == 1 else 'threads'}, batch of {batch}"
        rows.append(("Latency, median", f"{spread} in {how}"))
    for cost, unit, name in (
        ("macs", "MAC", "MACs"),
        (WITHOUT_GATES, "MAC", "MACs, deciding by the input left out"),
        ("params", "parameter", "Parameters"),
        ("memory:params", "byte", "Bytes of weights"),
    ):
        if cost in run.result.network:
            value, full = run.result.network[cost], run.result.full.get(cost)
            part = f", {share(value, full)} of the full super network's {si(full)}" if full else ""
            rows.append((name, f"{exact(value)} {plural(unit)}{part}"))
    inference = run.result.inference
    units = {"macs": "MAC", WITHOUT_GATES: "MAC"} | {budget.cost: budget.unit for budget in run.result.budgets}
    for cost, value in (inference.test_costs if inference else {}).items():
        rows.append((f"{cost} on the test images, on average", f"{si(value)} {plural(units.get(cost, ''))}"))
    if inference:
        rows.append(("Time beside the full network without gates", times_beside(inference.beside_full)))
    for name, measured in (("Validation", run.result.validation), ("Test", run.result.test)):
        if (words := quality(measured)) is not None:
            rows.append((f"{name} data", words))
    return rows


def provenance(run: Run) -> list[tuple[str, str]]:
    """Where the run comes from and how long it took."""
    options, last = run.options, run.epochs[-1] if run.epochs else None
    images = run.result.images_seen if run.result else last.images_seen if last else None
    seconds = run.result.seconds if run.result else last.seconds if last else 0.0
    rows = [
        ("Command", options.text("command")),
        ("Versions", f"budgetnet {options.text('budgetnet')}, torch {options.text('torch')}"),
        ("Machine", f"{options.text('machine')}, {options.whole('threads')} threads"),
        ("Started", options.text("created")),
        ("Time", duration(seconds)),
    ]
    if images is not None:
        taught = run.result.images_taught if run.result else 0
        beside = f", {si(taught)} of them by the full network as well, which taught" if taught else ""
        rows.append(("Images seen", f"{si(images)} in {len(run.epochs)} epochs{beside}"))
    if run.result is not None:
        rows.append(("Seed", str(run.result.seed)))
    return rows


def plotted(figure: go.Figure) -> Markup:
    """A figure as JSON that stands inside a script element: nothing in it can end the element."""
    text = json.dumps(json.loads(figure.to_json()), separators=(",", ":"))
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_part), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"si": si, "exact": exact, "percent": percent, "duration": duration, "slowed": slowed}
    environment.filters["plotted"] = plotted
    return environment


def _part(name: str) -> str:
    return files(quantities.__package__).joinpath(name).read_text(encoding="utf-8")


def _choices(architecture: Architecture | None) -> list[Edge]:
    return [edge for edge in architecture.edges if not edge.fixed] if architecture else []


def _cut(run: Run) -> tuple[tuple[str, ...] | None, tuple[str, ...], float | None]:
    """The edges on the device, the nodes whose values are sent, and the bytes, of the first budget about a transfer."""
    return (run.cuts[0].device, run.cuts[0].sent, run.cuts[0].size) if run.cuts else (None, (), None)


def _best(measured: Quality | None) -> str:
    return MISSING if measured is None or measured.best is None else percent(measured.best)


def _milliseconds(run: Run) -> float | None:
    latency = run.result.latency if run.result else None
    return latency.number("median") if latency else None


def _shown(options: dict[str, Any]) -> dict[str, str]:
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in options.items()}
