"""A run folder as frozen values: its options, epochs, architecture and, once there is one, its result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budgetnet.errors import FileError
from budgetnet.report.architecture import Architecture
from budgetnet.report.inference import Inference
from budgetnet.report.plans import Cut, Plan, read_cuts, read_plans
from budgetnet.report.records import Record, read_json, read_lines


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How well a network does on some examples; None for what was not measured."""

    loss: float | None
    accuracy: float | None
    mean_iou: float | None

    @classmethod
    def read(cls, record: Record | None) -> Quality | None:
        """None where nothing was measured."""
        if record is None:
            return None
        return cls(**{key: record.maybe_number(key) for key in ("loss", "accuracy", "mean_iou")})

    @property
    def best(self) -> float | None:
        """What networks are compared by: mean IoU where there is one, else accuracy."""
        return self.accuracy if self.mean_iou is None else self.mean_iou


@dataclass(frozen=True, kw_only=True)
class Price:
    """One budget during one epoch; costs in `unit`."""

    cost: str
    unit: str
    limit: float
    at_most: bool  # False for a target from either side
    target: float | None  # the annealed limit of this epoch
    sampled: float | None  # mean over the sampled architectures
    mode: float | None  # of the most probable architecture
    price: float | None


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One line of metrics.jsonl."""

    epoch: int
    phase: str
    images_seen: float
    seconds: float  # since the run began
    train: Quality
    validation: Quality | None
    entropy: float | None  # nats, of the sampled architecture
    connected: float | None  # share of samples that reach the output
    activation: dict[str, float] | None  # how often each gated edge, and the mean channel of a site, was open
    budgets: tuple[Price, ...]

    @classmethod
    def read(cls, record: Record) -> Epoch:
        """Reads one line."""
        train = Quality.read(record.record("train"))
        assert train is not None
        return cls(
            epoch=record.whole("epoch"),
            phase=record.text("phase"),
            images_seen=record.number("images_seen"),
            seconds=record.number("seconds"),
            train=train,
            validation=Quality.read(record.maybe_record("validation")),
            entropy=record.maybe_number("entropy"),
            connected=record.maybe_number("connected"),
            activation=_activation(record),
            budgets=tuple(
                Price(
                    cost=budget.text("cost"),
                    unit=budget.text("unit"),
                    limit=budget.number("limit"),
                    at_most=budget.flag("at_most"),
                    **{key: budget.maybe_number(key) for key in ("target", "sampled", "mode", "price")},
                )
                for budget in record.records("budgets")
            ),
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One budget of the returned network."""

    cost: str
    unit: str
    limit: float
    value: float
    at_most: bool  # False for a target from either side
    met: bool
    low: float | None = None  # of one that was measured: between which it is expected when it is measured again
    high: float | None = None
    predicted: float | None = None
    slowness: float | None = None  # of the machine as it was seen; `value` is of the machine as it was at the start
    error: float | None = None  # median relative error of predictions for networks they were not fitted to
    unsure: bool = False  # whether the limit lies within the noise of the measurement
    notes: tuple[str, ...] = ()  # what was noticed while it was measured
    predicted_for: dict[str, Any] | None = None  # of one that was predicted: the other machine

    @property
    def kept(self) -> bool:
        """Whether the file says so and, for an upper limit, its own numbers agree."""
        return self.met and not (self.at_most and self.value > self.limit)


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One of the architectures that were compared at the end."""

    costs: dict[str, float]
    validation: float | None
    chosen: bool


@dataclass(frozen=True, kw_only=True)
class Result:
    """What the run returned."""

    seed: int
    images_seen: float
    images_taught: float  # of these, those that the full network saw as well, to teach
    seconds: float
    budgets: tuple[Outcome, ...]
    full: dict[str, float]  # of the super network; of what can only be measured, as measured before the search
    network: dict[str, float]
    latency: Record | None
    validation: Quality | None
    test: Quality | None
    equivalence: dict[str, float]
    candidates: tuple[Candidate, ...]
    inference: Inference | None  # None where no gate looks at the input

    @classmethod
    def read(cls, record: Record) -> Result:
        """Reads result.json."""
        return cls(
            seed=record.whole("seed"),
            images_seen=record.number("images_seen"),
            images_taught=record.number("images_taught"),
            seconds=record.number("seconds"),
            budgets=tuple(
                Outcome(
                    cost=budget.text("cost"),
                    unit=budget.text("unit"),
                    limit=budget.number("limit"),
                    value=budget.number("value"),
                    at_most=budget.flag("at_most"),
                    met=budget.flag("met"),
                    **{key: budget.maybe_number(key) for key in ("low", "high", "predicted", "slowness", "error")},
                    unsure="noise" in budget.values and budget.flag("noise"),
                    notes=tuple(budget.texts("notes")) if "notes" in budget.values else (),
                    predicted_for=_machine(budget),
                )
                for budget in record.records("budgets")
            ),
            full={each.text("cost"): each.number("full") for each in record.records("before")} | record.costs("full"),
            network=record.costs("network"),
            latency=record.record("network").maybe_record("latency_ms"),
            validation=Quality.read(record.maybe_record("validation")),
            test=Quality.read(record.maybe_record("test")),
            equivalence=record.costs("equivalence"),
            candidates=tuple(
                Candidate(
                    costs=candidate.costs("costs"),
                    validation=_validation(candidate),
                    chosen=candidate.flag("chosen"),
                )
                for candidate in record.records("candidates")
            ),
            inference=Inference.read(record.maybe_record("inference")),
        )


@dataclass(frozen=True, kw_only=True)
class Run:
    """All a report shows.

    Attributes:
        folder: the run folder.
        options: what was asked, where and with which versions.
        epochs: one value an epoch; empty before the first is over.
        architecture: None before it is written.
        plans: the architecture's schedules, one for each budget that is about steps or a schedule.
        cuts: where it is cut between device and cloud, for each budget that is about a transfer.
        result: None while the run goes on.
    """

    folder: Path
    options: Record
    epochs: tuple[Epoch, ...]
    architecture: Architecture | None
    plans: tuple[Plan, ...]
    cuts: tuple[Cut, ...]
    result: Result | None

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Reads a run folder; only options.json has to be there.

        Raises:
            FileError: a file is missing or not of its layout; the line names the file and the key.
        """
        if not folder.is_dir():
            raise FileError(f"{folder} must be a run folder, and there is none")
        options = read_json(folder / "options.json")
        for key in ("command", "budgetnet", "torch", "created", "machine"):
            options.text(key)
        options.whole("threads")
        for key in ("space", "data"):
            options.record(key).text("name")
        options.record("space").record("options")
        options.record("search")
        metrics, shape, end = (folder / name for name in ("metrics.jsonl", "architecture.json", "result.json"))
        lines = map(Epoch.read, read_lines(metrics) if metrics.exists() else [])
        epochs = {(line.phase, line.epoch): line for line in lines}  # a resumed run writes an epoch again
        drawn = read_json(shape) if shape.exists() else None
        architecture = None if drawn is None else Architecture.read(drawn)
        if architecture is not None:
            _check_activation(metrics, tuple(epochs.values()), architecture)
        return cls(
            folder=folder,
            options=options,
            epochs=tuple(epochs.values()),
            architecture=architecture,
            plans=() if drawn is None else read_plans(drawn),
            cuts=() if drawn is None else read_cuts(drawn),
            result=Result.read(read_json(end)) if end.exists() else None,
        )

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def space(self) -> str:
        """The search space's name."""
        return self.options.record("space").text("name")

    @property
    def data(self) -> str:
        """The dataset's name."""
        return self.options.record("data").text("name")

    @property
    def search(self) -> dict[str, Any]:
        """The options of the search."""
        return self.options.record("search").values


def _activation(record: Record) -> dict[str, float] | None:
    if "activation" in record.values and record.values["activation"] is None:
        return None
    rates = record.record("activation")
    return {name: rates.share(name) for name in rates.values}


def _check_activation(file: Path, epochs: tuple[Epoch, ...], architecture: Architecture) -> None:
    expected = set(architecture.gated())
    for epoch in epochs:
        if epoch.activation is not None and (differing := sorted(expected ^ set(epoch.activation))):
            raise FileError(
                f'{file}, epoch {epoch.epoch}: "activation" must name the gated edges and sites of '
                f"architecture.json, {differing[0]!r} is in one and not in the other"
            )


def _machine(budget: Record) -> dict[str, Any] | None:
    if (record := budget.maybe_record("predicted_for")) is None:
        return None
    texts = {key: record.text(key) for key in ("processor", "runtime", "version")}
    return texts | {key: record.whole(key) for key in ("threads", "batch")} | {"error": record.number("error")}


def _validation(candidate: Record) -> float | None:
    quality = Quality.read(candidate.record("validation"))
    return None if quality is None else quality.best
