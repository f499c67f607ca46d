"""`budgetnet measure`: what a space, a run or a file costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from budgetnet import spaces
from budgetnet.architectures import named
from budgetnet.budgets import WITHOUT_GATES, cost_name, parse_cost
from budgetnet.building import space_of_run
from budgetnet.cli.finished import as_learned
from budgetnet.cli.flags import build, costs_in, parser_of, positional, show_space, take
from budgetnet.console import quantity
from budgetnet.costs import Latency
from budgetnet.costs.stopwatch import Rest
from budgetnet.costs.timetable import Setting
from budgetnet.errors import ConfigError
from budgetnet.export import FORMATS
from budgetnet.measure import DEFAULT, measure_file, measure_network
from budgetnet.report.records import Record
from budgetnet.report.words import foretold
from budgetnet.runs import RunFolder
from budgetnet.supernet import SuperNetwork


def measure_command(arguments: list[str]) -> None:
    """Prints what a space, a run or an exported file costs."""
    target, rest = positional(arguments, "measure RUN|FILE.onnx|FILE.pt2|SPACE")
    space = target if target in spaces.BY_NAME or ":" in target else ""
    own, rest = take(rest, "--space", "")
    parser = parser_of("measure", "Prints what a space, a run or a file costs.", space, "RUN|FILE.onnx|FILE.pt2|SPACE")
    parser.add_argument(
        "--costs", type=str | None, default=None, help="macs,macs:paper,params,steps:2,memory:file,latency"
    )
    parser.add_argument(
        "--architecture", type=str | None, default=None, help="a sub-network: a name or an architecture.json"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    if not space:  # whose own options are --space.NAME
        show_space(parser)
    given = parser.parse_args(rest)
    if own and not Path(target).is_dir():
        raise ConfigError(f"--space says what space of your own a run folder is of, got {own!r} beside {target!r}")
    asked = costs_in(given.costs) if given.costs else []
    if space:
        network = build(space, given, rest, {})
        kept = named(network, given.architecture or "full")
        found = measure_network(network, kept, asked or _defaults(network))
    elif Path(target).is_dir():
        run = RunFolder(target)
        network = as_learned(run, space_of_run(run, own))
        if network.heads and given.architecture is None:
            found = _measured_by_run(run, asked)
        else:
            kept = named(network, given.architecture or str(run.path / "architecture.json"))
            found = measure_network(network, kept, asked or _defaults(network), then_of(run))
    elif Path(target).suffix.removeprefix(".") in FORMATS:
        if given.architecture is not None:
            raise ConfigError(f"--architecture is of a space or a run, got it beside {target!r}")
        found = measure_file(target, asked)
    else:
        known = ", ".join(spaces.BY_NAME)
        raise ConfigError(f"measure takes a run folder, a .onnx or .pt2 file, or a space ({known}), got {target!r}")
    if given.json:
        print(json.dumps(found))
        return
    table = Table("cost", "value", "exactly")
    for name, value in found["costs"].items():
        exactly = f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
        table.add_row(escape(name), quantity(value, found["units"][name]), exactly)
    Console().print(table)
    for name, spread in found.get("measured", {}).items():
        print(f"{name}: {_spread(spread, found['units'][name])}{_setting(name, Path(target))}{_then(spread)}")
    for name, machine in found.get("predicted", {}).items():
        print(f"{name}: {foretold(machine)}")


def _spread(measured: dict[str, float], unit: str) -> str:
    """Between which a cost was, and is expected again."""
    told = {"8 of 10 calls": ("p10", "p90"), "expected again": ("low", "high")}
    known = {what: [measured[name] for name in names] for what, names in told.items() if names[0] in measured}
    return ", ".join(f"{what} {quantity(low, unit)} to {quantity(high, unit)}" for what, (low, high) in known.items())


def _then(measured: dict[str, float]) -> str:
    """How the machine compares with what it was, where the milliseconds are of then."""
    if "slowness" not in measured:
        return ""
    return f"; on the machine as it was in the search, beside which it is {measured['slowness']:.2f} times as slow now"


def _setting(name: str, target: Path) -> str:
    """How a latency was taken, where a name or a file leave it open."""
    cost = parse_cost(name)
    if not isinstance(cost, Latency):
        return ""
    runtime = "torch" if target.suffix == ".pt2" else cost.runtime
    return f"; {runtime}, threads {cost.threads}, batch {cost.batch}"


def _defaults(network: SuperNetwork) -> list[str]:
    """What is measured of a space or a run where nothing is asked: what its gates allow."""
    return [cost for cost in DEFAULT if cost != "params" or not network.heads]


def then_of(run: RunFolder) -> dict[Latency, Rest]:
    """What the full network of a finished run took on this machine at rest, by how it was measured."""
    if not (run.path / "result.json").is_file():
        return {}
    found: dict[Latency, Rest] = {}
    record = Record(run.read("result.json"), str(run.path / "result.json"))
    for budget in record.records("budgets"):
        if "machine" not in budget.values:
            continue
        cost, machine = parse_cost(budget.text("cost")), budget.record("machine")
        assert isinstance(cost, Latency)
        here = Setting.here(cost.runtime, cost.threads, cost.batch, cost.device)
        if all(machine.values.get(name) == value for name, value in asdict(here).items()):
            found[replace(cost, table="")] = Rest(machine.number("full"), machine.number("yardstick"))
    return found


def _measured_by_run(run: RunFolder, costs: Sequence[str]) -> dict[str, Any]:
    """What a finished run says its network costs: of gates that look at the input, as expected on validation images."""
    record = Record(run.read("result.json"), str(run.path / "result.json"))
    network = record.record("network")
    units = {"macs": "MAC", WITHOUT_GATES: "MAC", "params": "parameter", "memory:params": "B", "latency": "ms"}
    values = {name: network.number(name) for name in units if name != "latency"}
    values["latency"] = network.record("latency_ms").number("median")
    for budget in record.records("budgets"):
        values[budget.text("cost")], units[budget.text("cost")] = budget.number("value"), budget.text("unit")
    names = {text: text if text in values else cost_name(parse_cost(text)) for text in costs or values}
    for text, name in names.items():
        if name not in values:
            raise ConfigError(
                f"of a run whose gates look at the input can be measured {', '.join(values)}, got {text!r}: "
                "name an --architecture for others"
            )
    found = {text: values[name] for text, name in names.items()}
    return {
        "costs": {text: int(value) if value.is_integer() else value for text, value in found.items()},
        "units": {text: units[name] for text, name in names.items()},
    }
