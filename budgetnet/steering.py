"""What steers the gates: who decides them, limits, prices, the objective and the gates' own step; for every loop."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from budgetnet.budgets import BoundBudget, Budget, check_reachable, cost_name
from budgetnet.by_input import learn_latency
from budgetnet.costs import Latency
from budgetnet.costs.drawn import DrawnModel
from budgetnet.costs.latency import LatencyByInput, LatencyElsewhere, LatencyModel
from budgetnet.costs.measured import LearningModel
from budgetnet.costs.model import CostModel
from budgetnet.errors import ConfigError, FileError
from budgetnet.inference import Forward, expected_costs, matching_threshold
from budgetnet.objectives import (
    MOVING,
    MovingTarget,
    Price,
    SteppedTarget,
    annealed,
    batch_activation,
    const_quad,
    gate_weight_decay,
    per_architecture,
    per_gate,
    score_function_loss,
)
from budgetnet.optimizers import load_optimizer, optimizer_state
from budgetnet.options import DEFAULTS, SearchOptions
from budgetnet.report.records import Record
from budgetnet.report.words import foretold
from budgetnet.runs import load_tensors
from budgetnet.selection import check_together
from budgetnet.sites import AlwaysOn, Fixed, Gumbel, Policy, Sample, entropy, log_prob
from budgetnet.supernet import SuperNetwork


@dataclass
class Sums:
    """What an epoch's steps add up to; means are taken over images (loss, right) or samples (the rest)."""

    images: int = 0
    loss: float = 0.0
    right: float = 0.0
    samples: int = 0
    connected: float = 0.0
    costs: list[float] = field(default_factory=list)
    prices: list[float] = field(default_factory=list)  # of each budget, what a sample's excess was worth
    opened: list[float] = field(default_factory=list)  # of each gate, in how many samples


@dataclass(frozen=True)
class Prepared:
    """What a search begins with, once nothing speaks against it.

    Attributes:
        asked: the budgets as they were read.
        budgets: of the network.
        options: with nothing left open.
        limits: what `check_reachable` says of each budget.
    """

    asked: list[Budget]
    budgets: list[BoundBudget]
    options: SearchOptions
    limits: list[dict[str, Any]]


def prepare(
    network: SuperNetwork,
    budgets: Sequence[Budget | str],
    options: SearchOptions,
    *,
    placed: Callable[[Budget], Budget] = lambda budget: budget,
    say: Callable[[str], None] = lambda text: None,
    steered: bool = True,
    begun: bool = False,
) -> Prepared:
    """Sets the gates to their start, binds the budgets, and refuses what cannot be learned or kept.

    Args:
        network: its gates are set in place.
        budgets: texts are read by `Budget.parse`.
        options: of the search.
        placed: gives a budget what its cost needs: a file, examples.
        say: is told what takes its time, and how well costs are predicted that are drawn or timed.
        steered: whether gates are to be learned.
        begun: the budgets were in reach when the run began, and are not refused.

    Raises:
        ConfigError: an option or a budget does not fit the network.
        FileError: the file of a cost holds something else.
        UnreachableBudget: no architecture keeps the budgets.
    """
    asked = [placed(Budget.parse(budget) if isinstance(budget, str) else budget) for budget in budgets]
    options = options.resolved(
        conditional=bool(network.heads), gated=bool(network.sites), drawn=any(budget.drawn for budget in asked)
    )
    own_rates(network, options)  # which refuses names of no gate
    with torch.no_grad():
        network.gates.reset(float(options.gate_start or 0.0))
    if any(isinstance(budget.cost, Latency) and not budget.cost.elsewhere for budget in asked):
        say(f"timing the modules of {network.name} on this machine")
    for each in asked:
        if each.drawn:
            say(f"calling {cost_name(each.cost)} for networks of all sizes")
    bound = [budget.bind(network) for budget in asked]
    for budget in bound:
        if isinstance(budget.model, DrawnModel):
            say(f"{budget.name}: {budget.model.notes['fit']}")
        timed = budget.model.plain if isinstance(budget.model, LatencyByInput) else budget.model
        if isinstance(timed, LatencyModel):
            told = [f"predictions lie {100 * timed.error:.1f} % off in the middle", *timed.notes.values()]
            say(f"{budget.name}: {'; '.join(told)}")
        if isinstance(budget.model, LatencyByInput) and not begun:  # else a checkpoint knows
            say(f"timing what it takes to decide the gates of {network.name}")
            learn_latency(network, budget.model)
        if isinstance(budget.model, LatencyElsewhere):
            say(f"{budget.name}: {foretold(budget.model.machine)}")
    if steered:
        check_steerable(network, bound, options)
    limits = check_reachable(network, bound, refuse=not begun)
    if not begun:
        check_together(network, bound, limits)
    return Prepared(asked, bound, options, limits)


def check_steerable(network: SuperNetwork, budgets: Sequence[BoundBudget], options: SearchOptions) -> None:
    """Raises ConfigError where these gates cannot learn under these budgets as the options, resolved, ask.

    A cost without a gradient, and any cost under the score function, enters by its excess alone and moves only
    gates that do not look at the input.
    """
    names = [budget.name for budget in budgets]
    if (twice := next((name for name in names if names.count(name) > 1), None)) is not None:
        raise ConfigError(f"a cost has one budget, got {names.count(twice)} of {twice}")
    free = [budget.name for budget in budgets if budget.full == 0]
    shared = [f"target {options.target}"] * (options.target not in ("linear", "constant"))
    shared += [f"penalty {options.penalty}"] * (options.penalty != "price")
    if free and shared:
        raise ConfigError(f"the {shared[0]} is of shares of the full network's cost, whose {free[0]} is 0")
    for budget in budgets if options.target == "stepped" else []:
        share = stepped(budget, options)(options.search_epochs - 1)
        if share * budget.full > budget.limit * (1 + 1e-9):
            raise ConfigError(
                f"a stepped target must come down to {budget.name}'s limit, {100 * budget.limit / budget.full:.4g} % "
                f"of the full cost, in the search, got {100 * share:.4g} %: search for longer, or with a larger "
                f"target_fall than {options.target_fall} or a smaller target_every than {options.target_every}"
            )
    if not network.exits and options.exit_supervision != SearchOptions.exit_supervision:
        raise ConfigError(f"exit_supervision is of networks with exits, got {options.exit_supervision} without one")
    if options.estimator == "score":
        without = names
    else:
        used = network.used(network.architecture("full")).requires_grad_()
        without = [budget.name for budget in budgets if not (budget.exact and budget.model(used).requires_grad)]
    idle = {"gate_rate": DEFAULTS["conditional"]["gate_rate"]}
    idle |= {name: getattr(SearchOptions, name) for name in ("gate_optimizer", "gate_limit")}
    if network.heads:  # these learn with the weights, by the weights' optimiser
        idle = {"exploration": 0.0} | ({} if network.independent else idle)
        for name, default in idle.items():
            if getattr(options, name) != default:
                raise ConfigError(f"{name} is of gates that do not look at the input, got {getattr(options, name)}")
    if network.heads and without:
        raise ConfigError(f"gates that look at the input need a cost with a gradient, such as macs, got {without[0]}")
    if options.penalty != "price" and without and not (options.penalty == "per-gate" and options.estimator != "score"):
        raise ConfigError(
            f"penalty {options.penalty} needs the estimator gumbel and a cost with a gradient, such as macs, "
            f"got {without[0]} under {options.estimator}"
        )


def stepped(budget: BoundBudget, options: SearchOptions) -> SteppedTarget:
    """The target of a budget that falls in steps, a share of the full network's cost."""
    end = min(1.0, budget.limit / budget.full)
    start = 1.0 if options.target_start is None else max(options.target_start, end)
    return SteppedTarget(end, start=start, fall=options.target_fall, every=options.target_every)


def own_rates(network: SuperNetwork, options: SearchOptions) -> list[tuple[list[int], float]]:
    """The columns of gates that have a rate of their own, and that rate, as they were named.

    Raises:
        ConfigError: a name is of no gate, or gates are drawn to rates and an exit has none.
    """
    found = [(network.columns_named(name), float(rate)) for name, rate in options.target_rates.items()]
    for name, (columns, _) in zip(options.target_rates, found, strict=True):
        if not columns:
            gated = [edge for place, edge in enumerate(network.edge_names) if network.own_columns(place)]
            such = f", such as {gated[0]!r}" if gated else ""
            raise ConfigError(f"target_rates must name layers with gates{such}, got {name!r}")
    asked = {column for columns, _ in found for column in columns}
    for edge in network.exits:  # whose rate is no share of a cost
        if options.penalty == "per-gate" and network.gate_of[edge] not in asked:
            name = network.edge_names[edge]
            raise ConfigError(f"penalty per-gate needs the rate of each exit in target_rates, got none for {name!r}")
    return found


class Steering:
    """Gates, prices and targets: all of a search but the weights.

    Args:
        network: its gates are learned in place.
        budgets: of this network.
        options: of the search.

    Attributes:
        prices: of each budget.
        targets: of each budget, where they follow the batches.
        rates: columns of gates with a rate of their own, and that rate; of several of a gate the last counts.
        starts: expected costs when sampling began; empty before.
        average: of loss and penalty, over earlier batches of the search.
        chosen: `(1, G)` the architecture that is gone on with, None before one is chosen.
    """

    def __init__(self, network: SuperNetwork, budgets: Sequence[BoundBudget], options: SearchOptions) -> None:
        self.network, self.budgets = network, tuple(budgets)
        self.options = options = options.resolved(conditional=bool(network.heads), gated=bool(network.sites))
        assert options.gate_rate is not None
        assert options.proportional is not None
        kinds = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
        self.gate_optimizer = kinds[options.gate_optimizer](
            network.gates.parameters(), lr=options.gate_rate, weight_decay=self.gate_decay
        )
        fixed = None if options.price == "dual" else options.price
        signed = fixed is None and options.penalty == "price"  # then a target's price has the sign of what is wrong
        self.prices = [
            Price(options.proportional, options.integral, fixed, signed=signed and not budget.upper)
            for budget in budgets
        ]
        moving = options.target in MOVING
        begin = options.target_start
        shares = [min(1.0, b.limit / b.full) if begin is None else begin for b in budgets if moving]
        self.targets = [MovingTarget(share, kind=options.target, decay=options.target_decay) for share in shares]
        self.rates = own_rates(network, options)
        self.starts: list[float] = []
        self.average: float | None = None
        self.chosen: Tensor | None = None

    @property
    def gate_decay(self) -> float:
        """Weight decay of whatever decides the gates."""
        asked = self.options.gate_decay
        return gate_weight_decay(self.network.gate_count) if asked == "papers" else float(asked)

    @property
    def pressed(self) -> bool:
        """Whether a limit is worth something still: its price was found, and is not gone."""
        return any(price.fixed is None and price.accumulated > 0 for price in self.prices)

    def policy(self, phase: str, examples: int, generator: torch.Generator, epochs: float = 0.0) -> Policy:
        """Who decides the gates in this phase, `epochs` after sampling began."""
        if phase == "warmup":
            # each way out serves its share of the batch, so that every classifier is worth something when gates decide
            return Fixed(self.network.ways()) if self.network.exits else AlwaysOn()
        if phase == "search":
            options, count = self.options, self.options.sampled(examples)
            if options.estimator == "score":
                return Sample(count, generator)
            hard, noisy = options.estimator == "gumbel", options.noisy(epochs)
            return Gumbel(count, options.temperature, hard, generator, noisy)
        assert self.chosen is not None
        return Fixed(self.chosen)

    def begin_search(self) -> None:
        """Sets the gates to their start, and notes where the costs begin to fall from."""
        start = self.options.gate_start
        assert start is not None
        self.network.gates.reset(start)
        for edge, head in self.network.heads.items():
            if int(edge) not in self.network.exits and (reset := getattr(head, "reset", None)):
                reset(start)  # an exit, and what has no start, begins as it was made
        generator = torch.Generator().manual_seed(self.options.seed)
        used = self.network.used(self.network.sampled(1024, generator))
        self.starts = [float(budget.model(used).mean()) for budget in self.budgets]

    def begin_epoch(self) -> None:
        """Takes moving targets back to their start."""
        for target in self.targets:
            target.begin_epoch()

    def limits(self, progress: float, epochs: float = 0.0) -> list[float]:
        """The limits in force, each in its cost's unit, `epochs` after sampling began."""
        if self.targets:
            return [target.value * budget.full for target, budget in zip(self.targets, self.budgets, strict=True)]
        if self.options.target == "constant":
            return [budget.limit for budget in self.budgets]
        if self.options.target == "stepped":
            return [stepped(budget, self.options)(epochs) * budget.full for budget in self.budgets]
        return [annealed(start, b.limit, progress) for start, b in zip(self.starts, self.budgets, strict=True)]

    def search_objective(
        self, losses: Tensor, kept: Tensor, progress: float, epochs: float, sums: Sums, x: Tensor | None = None
    ) -> Tensor:
        """The scalar whose gradient moves weights and gates; the prices follow the costs of this batch.

        What carries a gradient, the losses under Gumbel and a cost that is differentiable, enters as it
        is. All else enters through the score function of the decisions.

        Args:
            losses: `(B,)` of the examples.
            kept: `(K, G)` decisions, with a gradient under Gumbel.
            progress: share of the annealing that is over.
            epochs: since sampling began.
            sums: costs, prices and samples are added here.
            x: `(B, C, H, W)` the examples, for costs that depend on them.
        """
        network, pathwise = self.network, kept.requires_grad
        asked = [len(kept) * price.value for price in self.prices]
        sums.prices = [a + b for a, b in zip(sums.prices or [0.0] * len(asked), asked, strict=True)]
        used = network.pathwise(kept) if pathwise else network.used(kept)
        costs = [self._cost(budget, used, kept, x) for budget in self.budgets]
        direct = losses.mean() if pathwise else losses.new_zeros(())
        penalty = torch.zeros_like(costs[0].detach())
        sampled = not pathwise
        for place, (budget, price, cost, limit) in enumerate(
            zip(self.budgets, self.prices, costs, self.limits(progress, epochs), strict=True)
        ):
            if cost.requires_grad or (pathwise and self.options.penalty == "per-gate"):
                direct = direct + price.value * self._penalty(budget, cost, limit, kept)
            else:
                sampled = True
                penalty = penalty + price.value * (cost / limit - 1 if price.signed else budget.penalty(cost, limit))
            mean = float(cost.detach().mean())
            price.update(mean / limit - 1 if budget.upper or price.signed else abs(mean / limit - 1))
            if self.targets:
                self.targets[place].update(mean / budget.full)
        hard = kept.detach()
        opened = hard.sum(dim=0).tolist()
        sums.opened = [a + b for a, b in zip(sums.opened or [0.0] * len(opened), opened, strict=True)]
        exploring = float(self.options.exploration or 0.0) * (1 - progress)
        if sampled or exploring:
            hard = (hard > 0.5).to(hard)
            logits, relevant = network.gates.logits, network.relevant(hard)
        if sampled:
            loss = torch.zeros_like(penalty) if pathwise else per_architecture(losses, len(kept))
            penalty = penalty.to(losses)
            baseline = self._baseline(float((loss.detach() + penalty).mean()))
            direct = direct + score_function_loss(loss, penalty, log_prob(logits, hard, relevant), baseline=baseline)
        if exploring:  # while the limit still falls, undecided gates are worth something; at the end they are not
            direct = direct - exploring * (relevant @ entropy(logits)).mean()
        sums.samples += len(kept)
        sums.connected += float(network.connects(used.detach()).sum())
        sums.costs = [a + float(b.detach().sum()) for a, b in zip(sums.costs or [0.0] * len(costs), costs, strict=True)]
        return direct

    def noise_ends(self, before: float, now: float) -> bool:
        """Whether gates by the input had noise at `before`, in epochs since sampling began, and have none `now`."""
        noisy = self.options.noisy
        return bool(self.network.heads) and before >= 0 and noisy(before) and not noisy(now)

    @torch.no_grad()
    def end_noise(
        self, batches: Iterable[Tensor], generator: torch.Generator, forward: Forward = SuperNetwork.forward
    ) -> None:
        """Moves gates that look at the input, all by the same, so that without noise they cost what they cost with it.

        Where most probabilities are near 1/2 still, all such gates would close, or open, at once.

        Args:
            batches: `(B, C, H, W)` examples to see it on.
            generator: draws the gates.
            forward: runs the network.
        """
        network, examples = copy.deepcopy(self.network), list(batches)  # whose batch norms may move
        models = {budget.name: budget.model for budget in self.budgets}

        def cost(policy: Policy) -> float:
            seen = expected_costs(network, policy, examples, models, forward)
            return max(seen[budget.name] / budget.limit for budget in self.budgets)

        logit = matching_threshold(cost, Sample(min(map(len, examples)), generator))
        for site in (self.network.gates, *self.network.heads.values()):
            if move := getattr(site, "shift", None):
                move(-logit)

    def step_gates(self) -> None:
        """Moves the gates by their gradient."""
        self.gate_optimizer.step()
        if self.options.gate_limit:
            self.network.gates.clamp(self.options.gate_limit)

    def correct(self, place: int) -> None:
        """Measures some architectures as they are sampled now, where costs are predicted, and learns from them.

        Args:
            place: in the search, the same for the same samples.
        """
        for model in self._models():
            if isinstance(model, LearningModel) and model.each_epoch:
                kept = self.network.sampled(4 * model.each_epoch, seeded(torch.device("cpu"), 1, place))
                kept = kept[self.network.connects(self.network.used(kept))]
                if len(kept):
                    model.refit(kept[: model.each_epoch])

    def _cost(self, budget: BoundBudget, used: Tensor, kept: Tensor, x: Tensor | None) -> Tensor:
        """Costs of the samples, `(K,)`: with a gradient where there is one, else of decisions that are 0 or 1."""
        if kept.requires_grad:
            cost = budget.cost(used, x) if budget.exact else None
            if cost is not None and cost.requires_grad:
                return cost
            used = self.network.used((kept.detach() > 0.5).to(kept))
        return budget.cost(used, x)

    def _penalty(self, budget: BoundBudget, cost: Tensor, limit: float, kept: Tensor) -> Tensor:
        """What a differentiable cost adds per unit of price, of the batch as a whole."""
        if self.options.penalty != "price":
            share = min(1.0, limit / budget.full)
            if self.options.penalty == "per-gate":
                exits = [column for edge in self.network.exits if (column := self.network.gate_of[edge]) is not None]
                return per_gate(kept, self._rates(share), at_least=exits)
            squares = batch_activation if self.options.penalty == "batch-activation" else const_quad
            return squares(cost / budget.full, share)
        if self.options.price != "dual":  # nothing takes a fixed price back once the budget is kept
            return budget.penalty(cost, limit).mean()
        return cost.mean() / limit - 1

    def _rates(self, share: float) -> Tensor:
        """`(G,)` rates that the gates are drawn to, a share for those without one of their own."""
        rates = torch.full((self.network.gate_count,), share)
        for columns, rate in self.rates:
            rates[columns] = rate
        return rates

    def _baseline(self, total: float) -> str | float:
        """What this batch's samples are compared with; `total` is their mean loss and penalty."""
        if self.options.baseline != "moving-average":
            return self.options.baseline
        before = total if self.average is None else self.average
        self.average = 0.9 * before + 0.1 * total
        return before

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that a step changes but the network itself: tensors, and what goes to JSON."""
        tensors = optimizer_state(self.gate_optimizer, "optimizer.gates")
        tensors |= {f"costs.{place}": model.fit.sums for place, model in self._fits().items()}
        if self.chosen is not None:
            tensors["chosen"] = self.chosen
        prices = [{"value": price.value, "accumulated": price.accumulated} for price in self.prices]
        targets = [{"value": target.value, "seen": target.seen} for target in self.targets]
        limits = [{"limit": budget.limit, "full": budget.full} for budget in self.budgets]
        timed = [_timed(model) for model in self._models()]
        state = {"limits": limits, "prices": prices, "targets": targets, "starts": self.starts, "average": self.average}
        state["timed"] = timed
        return tensors, state

    def load_state(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Takes up what `state` gave.

        Raises:
            FileError: it is of another network, or incomplete.
        """
        gates = {name: value for name, value in tensors.items() if name.startswith("optimizer.gates.")}
        costs = {name: value for name, value in tensors.items() if name.startswith("costs.")}
        other = sorted(set(tensors) - {*gates, *costs, "chosen"})
        if other:
            raise FileError(f"the checkpoint is of another network: it has {other[0]!r}, which no run writes")
        load_optimizer(self.gate_optimizer, "optimizer.gates", gates)
        sums = {f"costs.{place}": torch.empty_like(model.fit.sums) for place, model in self._fits().items()}
        load_tensors(sums, costs)
        for place, model in self._fits().items():
            model.fit.take(sums[f"costs.{place}"])
        record = Record(dict(state), "the checkpoint")
        limits = [(each.number("limit"), each.number("full")) for each in record.records("limits")]
        if len(limits) != len(self.budgets):
            raise FileError(f"the checkpoint must have {len(self.budgets)} limits, got {len(limits)}")
        pairs = zip(self.budgets, limits, strict=True)  # what was measured may be something else by now
        self.budgets = tuple(replace(budget, limit=limit, full=full) for budget, (limit, full) in pairs)
        timings = record.records("timed")
        if len(timings) != len(self.budgets):
            raise FileError(f"the checkpoint must have timings of {len(self.budgets)} budgets, got {len(timings)}")
        for cost, timed in zip(self._models(), timings, strict=True):
            if isinstance(cost, LatencyModel | LatencyByInput):
                baseline = {name: timed.number(name) for name in cost.baseline()}
                cost.go_by(baseline)
            if isinstance(cost, LatencyElsewhere) and timed.text("table") != cost.digest:
                raise FileError(f"{cost.file} must hold the times that the run began with, got others")
        self.starts = list(record.numbers("starts"))
        self.average = None if state.get("average") is None else record.number("average")
        values = [(price.number("value"), price.number("accumulated")) for price in record.records("prices")]
        if len(values) != len(self.budgets) or len(self.starts) not in (0, len(self.budgets)):
            raise FileError(f"the checkpoint must have {len(self.budgets)} prices, got {len(values)}")
        unsigned = [pair for price, pair in zip(self.prices, values, strict=True) if not price.signed]
        if any(number < 0 for pair in unsigned for number in pair):
            raise FileError(f"the checkpoint's prices must be >= 0, got {min(map(min, unsigned)):g}")
        for price, pair in zip(self.prices, values, strict=True):
            price.value, price.accumulated = pair
        followed = [(target.number("value"), target.whole("seen")) for target in record.records("targets")]
        if len(followed) != len(self.targets) or any(not 0 <= value <= 1 or seen < 0 for value, seen in followed):
            raise FileError(f"the checkpoint must have {len(self.targets)} targets in [0, 1], got {followed}")
        for target, (value, seen) in zip(self.targets, followed, strict=True):
            target.value, target.seen = value, seen
        self.chosen = None
        if "chosen" in tensors:
            chosen = torch.empty(1, self.network.gate_count)
            load_tensors({"chosen": chosen}, {"chosen": tensors["chosen"]})
            if not bool(((chosen == 0) | (chosen == 1)).all()):
                raise FileError("the checkpoint's 'chosen' must be bits, got other numbers")
            self.chosen = chosen

    def _fits(self) -> dict[int, DrawnModel]:
        """The costs that are predicted by what was drawn, by the budget's place."""
        return {place: model for place, model in enumerate(self._models()) if isinstance(model, DrawnModel)}

    def _models(self) -> list[CostModel]:
        """The cost of each budget."""
        return [budget.model for budget in self.budgets]


def _timed(model: CostModel) -> dict[str, Any]:
    """What milliseconds are of: a machine as it was, or a table of times."""
    if isinstance(model, LatencyModel | LatencyByInput):
        return model.baseline()
    return {"table": model.digest} if isinstance(model, LatencyElsewhere) else {}


def seeded(device: torch.device, seed: int, step: int) -> torch.Generator:
    """The randomness of one step: a function of the seed and the step, so that none needs to be saved."""
    return torch.Generator(device).manual_seed((seed << 40) + step)
