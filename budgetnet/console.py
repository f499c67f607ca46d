"""What people see while they wait: the limits before, a bar while, quality and cost after each epoch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from budgetnet.options import SearchOptions
from budgetnet.report.quantities import SPACE, si
from budgetnet.steering import Sums

ALIKE = 0.9
"""Share of samples of one cost from which on the user is told that their costs teach little."""


class Bars:
    """Tells how a search goes; one of `session.Progress`."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress: Progress | None = None
        self.last = 0.0
        self.noted = set[str]()  # costs of which it was said that the machine disturbs them

    def say(self, text: str) -> None:
        """Prints what is being done."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def begin(self, limits: list[dict[str, Any]], options: SearchOptions) -> None:
        """Prints the table of what can be reached, and starts the bar."""
        print_limits(self.console, limits)
        for row in limits:
            if not row["bound"] and row["limit"] < row["smallest"]:
                self.say(f"{row['cost']}: no network was seen that keeps this limit, which may be out of reach")
        for row in limits if options.estimator == "score" else []:
            if row["alike"] > ALIKE and row["expected"] > row["limit"]:
                same = f"{row['cost']}: {100 * row['alike']:.0f} % of the sampled networks cost the same"
                self.say(f"{same}, so gates learn little: let them start lower than gate_start {options.gate_start:g}")
        self.epochs = options.epochs
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("batches"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self.task = self.progress.add_task("starting", total=None)
        self.progress.start()

    def step(self, epoch: int, done: int, batches: int, sums: Sums) -> None:
        """Moves the bar, ten times a second at most."""
        now = time.monotonic()
        if self.progress and (now - self.last > 0.1 or done == batches):
            self.last = now
            text = f"epoch {epoch + 1}/{self.epochs}  loss {sums.loss / sums.images:.3f}"
            total = batches * self.epochs
            self.progress.update(self.task, description=text, completed=epoch * batches + done, total=total)

    def epoch(self, line: dict[str, Any]) -> None:
        """Prints a line for the epoch."""
        parts = [f"{line['epoch'] + 1:4d} {line['phase']:8s} loss {line['train']['loss']:.3f}"]
        if line["validation"]:
            name = "mean_iou" if "mean_iou" in line["validation"] else "accuracy"
            parts.append(f"validation {name} {100 * line['validation'][name]:.2f} %")
        for budget in line["budgets"]:
            cost = budget["mode"] if budget["sampled"] is None else budget["sampled"]
            price = "" if budget["price"] is None else f" at price {budget['price']:.2g}"  # 0 of one that does not bind
            parts.append(f"{budget['cost']} {100 * cost / budget['limit']:.0f} % of the limit{price}")
        if line["entropy"] is not None:
            parts.append(f"entropy {line['entropy']:.2f}")
        self.say("  ".join(parts))
        for budget in line["budgets"]:
            if budget["notes"] and budget["cost"] not in self.noted:
                self.noted.add(budget["cost"])
                self.say(f"{budget['cost']}: {'; '.join(budget['notes'])}")

    def close(self) -> None:
        """Takes the bar away."""
        if self.progress:
            self.progress.stop()


def print_limits(console: Console, limits: Sequence[dict[str, Any]]) -> None:
    """Prints what `budgets.check_reachable` found as a table."""
    if not limits:
        return
    table = Table("cost", "smallest", "expected", "full", "limit", title="before training")
    for row in limits:
        least, *numbers = [quantity(row[key], row["unit"]) for key in ("smallest", "expected", "full", "limit")]
        table.add_row(escape(row["cost"]), least if row["bound"] else f"{least.rstrip()} seen", *numbers)
    console.print(table)


def quantity(value: float, unit: str) -> str:
    """A number with its unit, to four digits and in plain spaces: `40930000, "MAC"` as "40.93 M MAC"."""
    return f"{si(value, digits=4)} {unit}".replace(SPACE, " ")
