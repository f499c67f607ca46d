"""Schedules and cuts of architecture.json as frozen values: who computes what, when and where."""

from __future__ import annotations

from dataclasses import dataclass

from budgetnet.errors import FileError
from budgetnet.report.records import Record


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task of a schedule, or a value on its way; times in the schedule's unit.

    Attributes:
        name: of the edge, or of the node whose values are summed or sent.
        worker: that runs it, or sends it.
        target: worker that it is sent to, None for a task.
    """

    name: str
    worker: int
    start: float
    end: float
    target: int | None = None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A schedule as architecture.json has it."""

    cost: str
    unit: str
    workers: int
    tasks: tuple[Task, ...]
    sent: tuple[Task, ...]

    @classmethod
    def read(cls, record: Record) -> Plan:
        """Reads one.

        Raises:
            FileError: a worker is none of those that there are.
        """
        workers = record.whole("workers")

        def worker(each: Record, key: str) -> int:
            if not 0 <= (found := each.whole(key)) < workers:
                raise FileError(f'{each.file}: "{each.place}{key}" must be one of {workers} workers, got {found}')
            return found

        def task(each: Record, by: str, to: str | None) -> Task:
            target = None if to is None else worker(each, to)
            start, end = each.number("start"), each.number("end")
            return Task(name=each.text("name"), worker=worker(each, by), start=start, end=end, target=target)

        return cls(
            cost=record.text("cost"),
            unit=record.text("unit"),
            workers=workers,
            tasks=tuple(task(each, "worker", None) for each in record.records("tasks")),
            sent=tuple(task(each, "source", "target") for each in record.records("sent")),
        )


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Where the network is cut between device and cloud, as architecture.json has it.

    Attributes:
        cost: the budget's.
        size: bytes that are sent.
        macs: multiply-adds of the device.
        device: names of the edges that it runs.
        sent: names of the nodes whose values are sent.
    """

    cost: str
    size: float
    macs: float
    device: tuple[str, ...]
    sent: tuple[str, ...]

    @classmethod
    def read(cls, record: Record) -> Cut:
        """Reads one."""
        names = {key: tuple(record.texts(key)) for key in ("device", "sent")}
        return cls(cost=record.text("cost"), size=record.number("size"), macs=record.number("macs"), **names)


def read_plans(record: Record) -> tuple[Plan, ...]:
    """The schedules of an architecture.json."""
    return tuple(map(Plan.read, record.records("schedules")))


def read_cuts(record: Record) -> tuple[Cut, ...]:
    """The cuts of an architecture.json."""
    return tuple(map(Cut.read, record.records("cuts")))
