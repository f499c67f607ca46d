"""`budgetnet evaluate`: the test images under one way to decide the gates of a run."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

from budgetnet.building import space_of_run
from budgetnet.cli.finished import as_learned, data_of_run, decided_by_input, shown
from budgetnet.cli.flags import costs_in, parser_of, positional, show_space, take
from budgetnet.console import quantity
from budgetnet.delivery import evaluate_architecture, evaluate_gates, restored
from budgetnet.inference import POLICIES, Inference
from budgetnet.runs import RunFolder


def evaluate_command(arguments: list[str]) -> None:
    """Prints how good a run's network is on the test images, its gates decided in one way, and what it costs."""
    target, rest = positional(arguments, "evaluate RUN")
    own, rest = take(rest, "--space", "")
    parser = parser_of("evaluate", "Looks at the test images with the gates of a run, decided in one way.", "", "RUN")
    parser.add_argument(
        "--policy",
        type=str | None,
        default=None,
        help=f"{', '.join(POLICIES)}; unless given, the network that was handed over",
    )
    parser.add_argument(
        "--tau", type=float | None, default=None, help="a gate is open above this probability; the run's own, else 0.5"
    )
    parser.add_argument("--runs", type=int, default=5, help="stochastic runs of an ensemble")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument(
        "--recalibration",
        type=int | None,
        default=None,
        help="training batches that set the batch norms first; 10, but none where gates are decided as in the run",
    )
    parser.add_argument("--batch_size", type=int, default=128, help="images a batch")
    parser.add_argument("--costs", type=str, default="macs", help="macs,params,steps:2")
    parser.add_argument("--data", type=str | None, default=None, help="the run's own unless given")
    parser.add_argument("--root", default="data", help="folder of the named datasets")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    show_space(parser)
    given = parser.parse_args(rest)
    run = RunFolder(target)
    result = run.read("result.json") if (run.path / "result.json").exists() else None
    decided = None if result is None else decided_by_input(result, run)
    own_tau = None if decided is None else decided.share("tau")
    tau = next(value for value in (given.tau, own_tau, 0.5) if value is not None)
    inference = Inference(given.policy or "threshold", tau, given.runs, given.seed)
    network = space_of_run(run, own)
    if result is not None and decided is None and given.policy is None and given.tau is None:
        network, data = as_learned(run, network), data_of_run(run, network, given)
        found = evaluate_architecture(run, network, data, costs_in(given.costs), batch_size=given.batch_size)
    else:
        network = restored(run, network)
        as_in_run = inference.policy == "threshold" and tau == own_tau
        found = evaluate_gates(
            network,
            data_of_run(run, network, given),
            inference,
            costs_in(given.costs),
            recalibration=(0 if as_in_run else 10) if given.recalibration is None else given.recalibration,
            batch_size=given.batch_size,
        )
    if given.json:
        print(json.dumps(found))
        return
    table = Table("", "value", title=f"{found['policy']}, test images")
    for name, value in found["quality"].items():
        table.add_row(name, shown(name, value))
    for name, value in found["costs"].items():
        table.add_row(name, quantity(value, found["units"][name]))
    Console().print(table)
