"""The run in plain words: the headline, the verdict and the numbers of each budget behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from budgetnet.budgets import plural
from budgetnet.report.quantities import MINUS, MISSING, apart, percent, share
from budgetnet.report.run import Quality, Run
from budgetnet.timing import AGREE


@dataclass(frozen=True, kw_only=True)
class Row:
    """One budget as the table shows it; costs in `unit`.

    Attributes:
        limit, value: what was asked and what the network takes, None where that is not known yet.
        full: cost of the full super network, None where the run does not say.
        at_most: False for a target from either side.
        kept: None while the run goes on.
    """

    cost: str
    unit: str
    limit: float
    value: float | None
    full: float | None
    at_most: bool
    kept: bool | None

    @property
    def shown(self) -> tuple[str, str]:
        """Value and limit, with digits enough to tell them apart."""
        value, limit = apart(self.limit if self.value is None else self.value, self.limit)
        return value if self.value is not None else MISSING, limit

    @property
    def share(self) -> str:
        """The value as a share of the full network's."""
        return MISSING if self.value is None else share(self.value, self.full) or MISSING

    @property
    def slack(self) -> str:
        """What is left of the limit, as a share of it; negative beyond."""
        if self.value is None or not self.limit:
            return MISSING
        return percent(1 - self.value / self.limit).replace("-", MINUS)

    @property
    def bar(self) -> dict[str, float] | None:
        """Where value, limit and the full network end on a bar, in percent of its length."""
        ends = {"value": self.value or 0.0, "limit": self.limit, "full": self.full or 0.0}
        longest = max(ends.values())
        return {name: round(100 * max(end, 0.0) / longest, 2) for name, end in ends.items()} if longest > 0 else None


def outcomes(run: Run) -> list[Row]:
    """The budgets of the returned network or, while the run goes on, of the latest most probable architecture."""
    if run.result is not None:
        return [
            Row(cost=each.cost, unit=each.unit, limit=each.limit, value=each.value, full=run.result.full.get(each.cost),
                at_most=each.at_most, kept=each.kept)
            for each in run.result.budgets
        ]  # fmt: skip
    if not run.epochs:
        return []
    return [
        Row(
            cost=each.cost,
            unit=each.unit,
            limit=each.limit,
            value=each.mode,
            full=None,
            at_most=each.at_most,
            kept=None,
        )
        for each in run.epochs[-1].budgets
    ]


def verdict(run: Run) -> tuple[str, str]:
    """A class for the badge and its words."""
    if run.result is None:
        return "open", "not finished"
    rows = outcomes(run)
    if not rows:
        return "open", "no budget"
    word = "budget" if len(rows) == 1 else "budgets"
    broken = sum(not row.kept for row in rows)
    if not broken:
        return "kept", f"{word} kept" if len(rows) < 3 else f"all {len(rows)} budgets kept"
    return "broken", f"{word} not kept" if broken == len(rows) else f"{broken} of {len(rows)} budgets not kept"


def headline(run: Run) -> str:
    """One or two sentences with the evidence: what the network costs, what it may, and how well it does."""
    spent = [_spent(row) for row in outcomes(run) if row.value is not None]
    if run.result is None:
        if not run.epochs:
            return "This run has not finished an epoch yet."
        last = run.epochs[-1]
        count = f"{len(run.epochs)} {'epoch' if len(run.epochs) == 1 else 'epochs'}"
        start = f"This run is not finished: {count} so far."
        clauses = [f"uses {_listed(spent)}"] if spent else []
        if words := _answers(last.validation, "validation"):
            clauses.append(words)
        return f"{start} The most probable architecture {_joined(clauses)}." if clauses else start
    uses = "uses" if run.result.inference is None else "uses on average"
    clauses = [f"{uses} {_listed(spent)}"] if spent else []
    measured = [(run.result.test, "test"), (run.result.validation, "validation")]
    clauses += [words for quality, name in measured if (words := _answers(quality, name))][:1]
    return f"This network {_joined(clauses)}." if clauses else "This network was returned without a measurement."


def times_beside(ratios: Mapping[str, float]) -> str:
    """Such as "0.93 in torch at batch 1, 1.12 in onnxruntime at batch 1", of a network beside the full one."""
    return ", ".join(f"{ratio:.2f} in {_setting(name)}" for name, ratio in ratios.items())


def slowed(slowness: float, seen: str) -> str:
    """What a machine showed that was not as fast as when the search began, empty where it was."""
    if slowness <= 1.005:
        return ""
    return f"{seen} was seen, on a machine {slowness:.2f} times as slow as when the search began"


def foretold(machine: Mapping[str, Any]) -> str:
    """For which processor a latency was predicted, and how well: `predicted_for` of result.json."""
    threads = f"{machine['threads']} {'thread' if machine['threads'] == 1 else 'threads'}"
    return (
        f"predicted for {machine['processor']} ({machine['runtime']} {machine['version']}, {threads}, "
        f"batch of {machine['batch']}) from its table of times, not measured; half of the predictions for networks "
        f"that were not known before lay within {percent(machine['error'])}"
    )


def slower(ratios: Mapping[str, float]) -> str:
    """What to do where the gates cost more time than they save, empty where they do not."""
    where = [_setting(name) for name, ratio in ratios.items() if ratio > 1 + AGREE]
    if not where:
        return ""
    return (
        f"slower than the full network without gates in {_listed(where)}: `budgetnet export --fold 0.05` makes "
        "constants of gates that hardly look at the input, and gates on layers save more time than gates on channels"
    )


def _setting(name: str) -> str:
    runtime, batch = name.split()
    return f"{runtime} at batch {batch}"


def quality(measured: Quality | None) -> str | None:
    """Such as "98.6 % right" or, for segmentation, "mean IoU 71.2 %, 93.1 % of the pixels right"."""
    if measured is None or (measured.accuracy is None and measured.mean_iou is None):
        return None
    pixels = "" if measured.mean_iou is None else " of the pixels"
    right = [] if measured.accuracy is None else [f"{percent(measured.accuracy)}{pixels} right"]
    return ", ".join(([] if measured.mean_iou is None else [f"mean IoU {percent(measured.mean_iou)}"]) + right)


def _spent(row: Row) -> str:
    value, limit = row.shown
    share = f" ({row.share} of the full super network)" if row.share != MISSING else ""
    if row.at_most and row.value is not None and row.value > row.limit:
        return f"{value} {plural(row.unit)}{share}, more than the {limit} allowed,"
    return f"{value} of {'at most' if row.at_most else 'about'} {limit} {plural(row.unit)}{share}"


def _answers(measured: Quality | None, name: str) -> str | None:
    if measured is None:
        return None
    if measured.mean_iou is not None:
        right = f", {percent(measured.accuracy)} of the pixels right" if measured.accuracy is not None else ""
        return f"labels the {name} images with a mean IoU of {percent(measured.mean_iou)}{right}"
    return None if measured.accuracy is None else f"answers {percent(measured.accuracy)} of the {name} images right"


def _joined(clauses: list[str]) -> str:
    return " and ".join(clauses).rstrip(",")


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
