"""Budgets: a cost with a limit, what it means for a network, and whether it can be kept at all."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, fields, is_dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from budgetnet.costs import Activation, Latency, Layers, MACs, Memory, Params, Schedule, Steps, Transfer
from budgetnet.costs.drawn import DrawnModel, Examples
from budgetnet.costs.function import Function, function_in
from budgetnet.costs.measured import MeasuredModel
from budgetnet.costs.model import CostModel
from budgetnet.errors import ConfigError, UnreachableBudget
from budgetnet.objectives import hinge, squared
from budgetnet.supernet import SuperNetwork

COSTS: dict[str, Callable[..., Any]] = {
    "macs": MACs,
    "params": Params,
    "memory": Memory,
    "steps": Steps,
    "schedule": Schedule,
    "transfer": Transfer,
    "activation": Activation,
    "layers": Layers,
    "latency": Latency,
}
SCALES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9}
OWN_SCALES = {
    "B": SCALES | {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9},
    "ms": {"": 1.0, "us": 1e-3, "ms": 1.0, "s": 1e3},
}
"""What may stand behind a limit in these units, in place of `SCALES`."""
PLURALS = {"B": "bytes"} | {unit: f"{unit}s" for unit in ("MAC", "parameter", "step", "layer", "gate", "byte")}
TOLERANCE = 0.05
"""A target counts as met within this share of it."""
SURELY = 1.5
"""A limit on what is only predicted is refused where no network is predicted to come within so many times of it."""


class Cost(Protocol):
    """A kind of cost, before a network is known."""

    @property
    def unit(self) -> str:
        """What it counts."""

    @property
    def key(self) -> str:
        """What it is called in budgets and results."""

    def bind(self, network: SuperNetwork) -> CostModel:
        """The cost of this network's architectures."""


@dataclass(frozen=True, kw_only=True)
class _Limit:
    number: float
    percent: bool


@dataclass(frozen=True)
class Budget:
    """A cost and its limit: "at most", or a target from either side.

    Attributes:
        cost: what is limited.
        at_most: largest allowed cost in its unit, or a text such as "25%" (of the full network) or "40.9M".
        target: the cost to come to, likewise.

    Raises:
        ConfigError: not exactly one of the two is given, or the number is not > 0.
    """

    cost: Cost
    at_most: float | str | None = None
    target: float | str | None = None

    def __post_init__(self) -> None:
        if (self.at_most is None) == (self.target is None):
            raise ConfigError("a budget needs one limit: at_most or target")
        _limit(self._given, self.cost.unit)

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Reads `COST<=LIMIT` (at most) or `COST~=LIMIT` (target): `macs<=25%`, `steps[workers=2]<=20`.

        Raises:
            ConfigError: the text is not of that form, or names an unknown cost.
        """
        match = re.fullmatch(r"\s*(?P<cost>.+?)\s*(?P<sign><=|~=)\s*(?P<limit>\S+)\s*", text)
        if match is None:
            raise ConfigError(f"a budget reads COST<=LIMIT or COST~=LIMIT, such as macs<=25%, got {text!r}")
        cost = parse_cost(match["cost"])
        return cls(cost, **{"at_most" if match["sign"] == "<=" else "target": match["limit"]})

    @property
    def drawn(self) -> bool:
        """Whether training draws the cost's values, a call for each sampled architecture."""
        return isinstance(self.cost, Function) and self.cost.drawn

    def on(self, examples: Examples) -> Budget:
        """The same, its cost measured on these batches of examples where it reads any."""
        return replace(self, cost=self.cost.on(examples)) if isinstance(self.cost, Function) else self

    @property
    def _given(self) -> float | str:
        given = self.target if self.at_most is None else self.at_most
        assert given is not None
        return given

    def bind(self, network: SuperNetwork) -> BoundBudget:
        """What it means for this network."""
        model = self.cost.bind(network)
        limit = _limit(self._given, self.cost.unit)
        full = float(model(network.used(network.architecture("full")))[0]) if model.full is None else model.full
        number = limit.number / 100 * full if limit.percent else limit.number
        if not number > 0:
            raise ConfigError(f"{cost_name(self.cost)} of the full network is 0, of which {self._given} is no limit")
        return BoundBudget(cost_name(self.cost), model, number, full, self.at_most is not None)

    def __str__(self) -> str:
        return f"{cost_name(self.cost)}{'<=' if self.at_most is not None else '~='}{self._given}"


@dataclass(frozen=True, eq=False)
class BoundBudget:
    """A budget of one network.

    Attributes:
        name: of the cost, as it is written in budgets.
        model: `(B, U)` used units to `(B,)` costs.
        limit: in the cost's unit.
        full: cost of the full network.
        upper: True for "at most", False for a target.
    """

    name: str
    model: CostModel
    limit: float
    full: float
    upper: bool

    @property
    def unit(self) -> str:
        """The cost's unit."""
        return self.model.unit

    @property
    def told(self) -> str:
        """The limit with its unit, in a sentence."""
        return amount(self.limit, self.unit)

    @property
    def exact(self) -> bool:
        """Whether the model gives the cost itself; else training draws its values."""
        return not isinstance(self.model, DrawnModel)

    def cost(self, used: Tensor, x: Tensor | None = None) -> Tensor:
        """The costs that training goes by, `(B,)`, of `(B, U)` architectures that serve examples `x` by slices.

        A value that is drawn for each, where the cost is random or depends on the examples; else the model's own.
        """
        return self.model.draw(used, x) if isinstance(self.model, DrawnModel) else self.model(used)

    def penalty(self, cost: Tensor, limit: float) -> Tensor:
        """Penalty per unit of price of `(B,)` costs: hinge for "at most", squared distance for a target."""
        excess = cost / limit - 1
        return hinge(excess) if self.upper else squared(excess)

    def unsure(self, low: float, high: float) -> bool:
        """Whether a cost that is measured anew, expected in [low, high], may turn out kept or not."""
        edges = [self.limit] if self.upper else [self.limit * (1 - TOLERANCE), self.limit * (1 + TOLERANCE)]
        return low < high and any(low <= edge <= high for edge in edges)

    def met(self, cost: Tensor) -> Tensor:
        """Whether `(B,)` costs keep the budget, bool."""
        if self.upper:
            return cost <= self.limit
        return (cost / self.limit - 1).abs() <= TOLERANCE

    def cheapest(self, network: SuperNetwork) -> Tensor:
        """The architecture of least cost that connects input and output, `(1, G)`.

        Costs never fall when a module is added, so it is a single path, and none where the fixed edges
        connect by themselves and no exit spares some of them. Where the cost can say what an edge costs
        on a path of its own this is exact, but for a path that brings fixed edges beside it to life. A cost
        that does not add up may know its own smallest architecture.
        """
        if (smallest := self.model.smallest()) is not None:
            return smallest
        none = network.of_edges(())
        connected = bool(network.connects(network.used(none))[0])
        if connected and not network.exits:
            return none
        weights = self.model.along_path or [1.0] * len(network.graph.edges)
        path = network.of_edges(network.graph.cheapest_path(weights))
        costs = self.model(network.used(torch.cat([path, none])))
        return none if connected and bool(costs[1] < costs[0]) else path


def parse_cost(text: str) -> Cost:
    """Reads a cost: `macs`, `steps:2`, `steps[workers=2]`, `latency.p95[threads=2]`, `costs.py:energy`.

    Raises:
        ConfigError: the cost or one of its options is unknown.
    """
    if (own := function_in(text, taken=COSTS)) is not None:
        return own
    match = re.fullmatch(
        r"(?P<name>\w+)(?:\.(?P<part>\w+(?:\.\d+)?))?(?::(?P<short>[^\[\]:]+)|\[(?P<options>[^\[\]]*)\])?", text.strip()
    )
    if match is None or match["name"] not in COSTS:
        raise ConfigError(
            f"costs are {', '.join(COSTS)} (steps:2, steps[workers=2]), or FILE.py:FUNCTION, got {text!r}"
        )
    kind = COSTS[match["name"]]
    kinds = {field.name: str(field.type) for field in fields(kind)}  # type: ignore[arg-type]
    if match["short"] is not None:
        if not kinds:
            raise ConfigError(f"{match['name']} takes no option, got {text!r}")
        given = {next(iter(kinds)): match["short"]}
    else:
        pairs = [part.partition("=") for part in (match["options"] or "").split(",") if part.strip()]
        given = {name.strip(): value.strip() for name, _, value in pairs}
    if match["part"] is not None:
        dotted = [field.name for field in fields(kind) if field.metadata.get("dotted")]  # type: ignore[arg-type]
        if not dotted:
            raise ConfigError(f"{match['name']} has no parts, got {text!r}")
        given |= {dotted[0]: match["part"]}
    for name in given:
        if name not in kinds:
            raise ConfigError(f"{match['name']} has the options {', '.join(kinds) or 'none'}, got {name!r}")
    return kind(**{name: _value(value, kinds[name], name) for name, value in given.items()})  # type: ignore[no-any-return]


def amount(number: float, unit: str) -> str:
    """A number with its unit, in a sentence."""
    return f"{number:.6g} {unit if number == 1 else plural(unit)}".rstrip()


def plural(unit: str) -> str:
    """The unit as a word in a sentence."""
    return PLURALS.get(unit, unit)


def cost_name(cost: Cost) -> str:
    """How a cost is written: `macs`, `steps:2`, `latency.p95`; its default options, and files, are left out."""
    known: tuple[Field[Any], ...] = fields(cost) if is_dataclass(cost) else ()
    changed = [
        field for field in known if getattr(cost, field.name) != field.default and not field.metadata.get("file")
    ]
    name = "".join([cost.key, *(f".{getattr(cost, field.name)}" for field in changed if field.metadata.get("dotted"))])
    changed = [field for field in changed if not field.metadata.get("dotted")]
    if not changed:
        return name
    if changed == [known[0]]:
        return f"{name}:{getattr(cost, known[0].name)}"
    values = [(field.name, getattr(cost, field.name)) for field in changed]
    told = [f"{option}={str(value).lower() if isinstance(value, bool) else value}" for option, value in values]
    return f"{name}[{','.join(told)}]"


WITHOUT_GATES = cost_name(MACs(gates=False))
"""MACs without those that it takes to decide by the input, as it is written."""


def check_reachable(
    network: SuperNetwork, budgets: Sequence[BoundBudget], *, refuse: bool = True
) -> list[dict[str, Any]]:
    """The cost of the smallest, the expected and the full network beside each limit, as measured where it can be.

    Args:
        network: the space.
        budgets: of it.
        refuse: whether an error is raised; a run that is gone on with was in reach when it began.

    Returns:
        For each budget `{"cost", "unit", "limit", "smallest", "bound", "expected", "alike", "full"}`; the expected cost
        is the mean over 1,024 samples of the gates as they start, of which the share "alike" cost the same, so
        that the score function learns nothing from them. Of a cost that may fall where modules are
        added, "smallest" is the smallest of these, a path and the full network, "bound" is False, and
        no limit is refused.

    Raises:
        UnreachableBudget: a limit lies below the smallest network, or a target above the full one;
            the message says what binds.
    """
    sampled = network.used(network.sampled(1024, torch.Generator().manual_seed(0)))
    rows, refusals = [], []
    for budget in budgets:
        row, refusal = _beside(network, budget, sampled)
        rows.append(row)
        refusals.append(refusal)
    if refuse and (refusal := next(filter(None, refusals), "") or _refusal_together(network, budgets)):
        raise UnreachableBudget(refusal, rows)
    return rows


def _beside(network: SuperNetwork, budget: BoundBudget, sampled: Tensor) -> tuple[dict[str, Any], str]:
    """What `check_reachable` says of one budget, and why it is refused, empty where it is not."""
    cheapest = budget.cheapest(network)
    path = network.used(cheapest)
    smallest = least = float(budget.model(path)[0])
    costs, monotone = budget.model(sampled), budget.model.monotone
    if not monotone:
        smallest = min([smallest, budget.full, *costs[network.connects(sampled)].tolist()])
    elif isinstance(budget.model, MeasuredModel):
        found = budget.model.beforehand(cheapest)
        smallest, least = found.value, found.low
    refusal = ""
    if monotone and least > budget.limit * (1 if budget.upper else 1 + TOLERANCE):
        refusal = (
            f"{budget.name} must be {'at most' if budget.upper else 'near'} {budget.told}, but "
            f"the smallest network of {network.name} takes {smallest:.6g}: {_binding(network, budget, path)}"
        )
    elif monotone and not budget.upper and budget.full < budget.limit * (1 - TOLERANCE):
        refusal = (
            f"{budget.name} must come to {budget.told}, but the full network of {network.name} "
            f"takes only {budget.full:.6g}"
        )
    row = {
        "cost": budget.name,
        "unit": budget.unit,
        "limit": budget.limit,
        "smallest": smallest,
        "bound": monotone,
        "expected": float(costs.mean()),
        "alike": max(Counter(costs.tolist()).values()) / len(costs),
        "full": budget.full,
    }
    return row, refusal


def _refusal_together(network: SuperNetwork, budgets: Sequence[BoundBudget]) -> str:
    """Why no path keeps all limits, each of which the smallest network keeps; empty where one does.

    Of what is only predicted a limit of so much more is asked, and nothing where even then no path is predicted to
    keep it: the smallest network does, so it is the prediction that is wrong.
    """
    asked = []
    for budget in budgets:
        if isinstance(budget.model, MeasuredModel):
            budget = replace(budget, limit=SURELY * budget.limit)
            if fitting_path(network, [budget]) is None:
                continue
        elif fitting_path(network, [budget]) is None:
            path = network.used(budget.cheapest(network))
            return (
                f"{budget.name} must be at most {budget.told}, but no network of "
                f"{network.name} takes so little: {_binding(network, budget, path)}"
            )
        asked.append(budget)
    if fitting_path(network, asked) is not None:
        return ""
    together = ", ".join(f"{budget.name}<={budget.limit:.6g}" for budget in budgets if budget.upper)
    return f"each limit can be kept alone, but no network of {network.name} keeps them together: {together}"


def fitting_path(network: SuperNetwork, budgets: Sequence[BoundBudget]) -> Tensor | None:
    """A single path that keeps all "at most" limits, `(1, G)`, None where there is none.

    Costs never fall when a module is added, so where no path fits, nothing does. Costs that cannot
    say what an edge costs on a path of its own are left out.
    """
    known = [(b.model.along_path, b.limit) for b in budgets if b.upper]
    weights = [(costs, limit) for costs, limit in known if costs is not None]
    path = network.graph.fitting_path([costs for costs, _ in weights], [limit for _, limit in weights])
    return None if path is None else network.of_edges(path)


def _binding(network: SuperNetwork, budget: BoundBudget, path: Tensor) -> str:
    if (words := budget.model.binding(path)) is not None:
        return words
    weights = budget.model.along_path
    edges = path[0, : len(network.graph.edges)].nonzero().flatten().tolist()
    if weights is None:
        return f"its {len(edges)} modules are the shortest path"
    largest = sorted(edges, key=lambda edge: -weights[edge])[:3]
    return ", ".join(f"{network.edge_names[edge]} {weights[edge]:.6g}" for edge in largest) + " weigh most"


def _limit(given: float | str, unit: str) -> _Limit:
    scales = OWN_SCALES.get(unit, SCALES)
    match = re.fullmatch(r"(?P<number>[0-9.]+(?:[eE][+-]?[0-9]+)?)(?P<scale>%|[A-Za-z]*)", str(given).strip())
    try:
        number = float(match["number"]) if match else 0.0
    except ValueError:
        number = 0.0
    if match is None or not 0 < number < float("inf") or match["scale"] not in (*scales, "%"):
        known = ", ".join(scale for scale in scales if scale)
        raise ConfigError(
            f"a limit{f' in {unit}' if unit else ''} must be a number > 0, with {known} or % behind it, got {given!r}"
        )
    return _Limit(number=number * scales.get(match["scale"], 1.0), percent=match["scale"] == "%")


def _value(text: str, kind: str, name: str) -> int | float | str | bool:
    if kind == "bool":
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"{name} must be true or false, got {text!r}")
        return text.lower() == "true"
    if kind not in ("int", "float"):
        return text
    try:
        return int(text) if kind == "int" else float(text)
    except ValueError:
        raise ConfigError(f"{name} must be a {'whole ' if kind == 'int' else ''}number, got {text!r}") from None
