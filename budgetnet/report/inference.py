"""What result.json says of gates that look at the input: how they decide, and what other thresholds would give."""

from __future__ import annotations

from dataclasses import dataclass

from budgetnet.report.records import Record


@dataclass(frozen=True, kw_only=True)
class Point:
    """What was seen at one threshold."""

    tau: float
    accuracy: float
    costs: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Exit:
    """A place where examples are classified."""

    name: str
    share: float  # of the examples, that are classified here
    accuracy_all: float  # had all been classified here
    accuracy_chosen: float | None  # of those that were; None where there are none


@dataclass(frozen=True, kw_only=True)
class Inference:
    """How gates that look at the input decide, and what other thresholds would give."""

    policy: str
    tau: float
    curve: tuple[Point, ...]
    exits: tuple[Exit, ...]
    test_costs: dict[str, float]
    beside_full: dict[str, float]  # times by runtime and batch, relative to the full network's without gates

    @classmethod
    def read(cls, record: Record | None) -> Inference | None:
        """None where no gate looks at the input."""
        if record is None:
            return None
        points = [
            Point(tau=point.share("tau"), accuracy=point.share("accuracy"), costs=point.costs("costs"))
            for point in record.records("curve")
        ]
        return cls(
            policy=record.text("policy"),
            tau=record.share("tau"),
            curve=tuple(sorted(points, key=lambda point: point.tau)),
            exits=tuple(
                Exit(
                    name=row.text("name"),
                    share=row.share("share"),
                    accuracy_all=row.share("accuracy_all"),
                    accuracy_chosen=row.maybe_share("accuracy_chosen"),
                )
                for row in record.records("exits")
            ),
            test_costs=record.costs("test_costs"),
            beside_full=record.costs("beside_full"),
        )
