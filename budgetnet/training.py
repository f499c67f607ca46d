"""One learner for all three phases: a step is a policy, a forward pass, an objective and its gradients."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from budgetnet.budgets import BoundBudget
from budgetnet.errors import ConfigError, DivergenceError, FileError
from budgetnet.gated import memory_format
from budgetnet.objectives import (
    MOVING,
    MovingTarget,
    Price,
    SteppedTarget,
    annealed,
    batch_activation,
    const_quad,
    distillation,
    example_losses,
    gate_weight_decay,
    per_architecture,
    per_gate,
    score_function_loss,
    squared,
)
from budgetnet.options import SearchOptions
from budgetnet.report.records import Record
from budgetnet.runs import load_tensors
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
    opened: list[float] = field(default_factory=list)  # of each gate, in how many samples


class Learner:
    """Weights, gates, prices and their optimisers: everything that a step changes and a checkpoint holds.

    Args:
        network: learned in place.
        budgets: of this network.
        options: of the search.
        ignore: class index without loss.
        device, dtype: where and in which precision the forward pass runs.
    """

    def __init__(
        self,
        network: SuperNetwork,
        budgets: Sequence[BoundBudget],
        options: SearchOptions,
        *,
        ignore: int | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.layout = memory_format(network)
        network.to(device=device, memory_format=self.layout)  # type: ignore[call-overload]
        self.network = network
        options = options.resolved(conditional=bool(network.heads), gated=bool(network.sites))
        self.budgets, self.options, self.ignore = tuple(budgets), options, ignore
        self.device, self.dtype = device, dtype
        decay = gate_weight_decay(network.gate_count) if options.gate_decay == "papers" else options.gate_decay
        named = list(network.named_parameters())
        weights = [value for name, value in named if not name.startswith(("gates.", "heads."))]
        groups: list[dict[str, Any]] = [{"params": weights}]
        for head in network.heads.values():
            # a logit that sums n features moves n times as fast as one of its own: its weights learn 1 / n as fast
            last = [value for name, value in head.named_parameters() if name == "decide.weight"]
            rest = [value for name, value in head.named_parameters() if name != "decide.weight"]
            groups.append({"params": rest, "weight_decay": decay, "share": 1.0})
            if last:
                groups.append({"params": last, "weight_decay": decay, "share": 1 / last[0][0].numel()})
        self.optimizer = torch.optim.SGD(
            groups,
            lr=options.learning_rate,
            momentum=options.momentum,
            nesterov=options.momentum > 0,
            weight_decay=options.weight_decay,
        )
        assert options.gate_rate is not None
        assert options.proportional is not None
        kinds = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
        self.gate_optimizer = kinds[options.gate_optimizer](
            network.gates.parameters(), lr=options.gate_rate, weight_decay=decay
        )
        fixed = None if options.price == "dual" else options.price
        self.prices = [Price(options.proportional, options.integral, fixed) for _ in budgets]
        moving = options.target in MOVING
        self.targets = [MovingTarget(b.limit / b.full, kind=options.target) for b in budgets if moving]
        self.teacher: SuperNetwork | None = None  # what the chosen network is drawn to
        self.starts: list[float] = []  # expected costs when sampling began
        self.average: float | None = None  # of loss and penalty, over earlier batches of the search
        self.chosen: Tensor | None = None  # (1, G): the architecture that is fine-tuned

    def policy(self, phase: str, examples: int, generator: torch.Generator) -> Policy:
        """Who decides the gates in this phase."""
        if phase == "warmup":
            # each way out serves its share of the batch, so that every classifier is worth something when gates decide
            return Fixed(self.network.ways()) if self.network.exits else AlwaysOn()
        if phase == "search":
            count = self.options.sampled(examples)
            if self.options.estimator == "score":
                return Sample(count, generator)
            return Gumbel(count, self.options.temperature, self.options.estimator == "gumbel", generator)
        assert self.chosen is not None
        return Fixed(self.chosen)

    def begin_search(self) -> None:
        """Sets the gates to their start, and notes where the costs begin to fall from."""
        start = self.options.gate_start
        assert start is not None
        self.network.gates.reset(start)
        for edge, head in self.network.heads.items():
            if int(edge) not in self.network.exits:  # an exit begins as it was made: mostly closed
                head.reset(start)  # type: ignore[operator]
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
        if self.options.target == "stepped":
            fall, every = self.options.target_fall, self.options.target_every
            shares = [SteppedTarget(min(1.0, b.limit / b.full), fall=fall, every=every) for b in self.budgets]
            return [share(epochs) * budget.full for share, budget in zip(shares, self.budgets, strict=True)]
        return [annealed(start, b.limit, progress) for start, b in zip(self.starts, self.budgets, strict=True)]

    def step(
        self,
        x: Tensor,
        y: Tensor,
        phase: str,
        *,
        generator: torch.Generator,
        rate: float,
        progress: float,
        sums: Sums,
        epochs: float = 0.0,
    ) -> None:
        """One step on a batch: the plain loss or, where architectures are sampled, that of `search_objective`.

        Args:
            x: `(B, C, H, W)` examples.
            y: `(B,)` classes or `(B, H, W)` masks.
            phase: of the run.
            generator: draws the architectures.
            rate: learning rate of the weights.
            progress: share of the annealing that is over.
            sums: what the step did is added here.
            epochs: since sampling began.

        Raises:
            DivergenceError: the objective is not finite; nothing was changed.
        """
        x = x.contiguous(memory_format=self.layout)
        output, kept = self.forward(self.network, x, self.policy(phase, len(x), generator))
        losses = example_losses(output, y, self.ignore)
        objective = losses.mean()
        if phase == "search":
            objective = self.search_objective(losses, kept, progress, epochs, sums)
        if self.options.distillation and phase != "warmup":
            objective = objective + self._distillation(x, y, output, phase)
        if not torch.isfinite(objective):
            raise DivergenceError(
                f"the loss must stay finite, got {objective.item()} at learning rate {rate:.3g}: lower learning_rate"
            )
        self._update(objective, rate, gates=phase == "search")
        sums.images += len(x)
        sums.loss += float(losses.detach().sum())
        right = output.detach().argmax(dim=1) == y
        if y.ndim > 1 and self.ignore is not None:
            right = right[y != self.ignore]
        sums.right += float(right.float().mean()) * len(x)

    def search_objective(self, losses: Tensor, kept: Tensor, progress: float, epochs: float, sums: Sums) -> Tensor:
        """The scalar whose gradient moves weights and gates; the prices follow the costs of this batch.

        What carries a gradient, the losses under Gumbel and a cost that is differentiable, enters as it
        is. All else enters through the score function of the decisions.

        Args:
            losses: `(B,)` of the examples.
            kept: `(K, G)` decisions, with a gradient under Gumbel.
            progress: share of the annealing that is over.
            epochs: since sampling began.
            sums: costs and samples are added here.
        """
        network, pathwise = self.network, kept.requires_grad
        used = network.pathwise(kept) if pathwise else network.used(kept)
        costs = [budget.model(used) for budget in self.budgets]
        direct = losses.mean()
        penalty = torch.zeros_like(costs[0].detach())
        sampled = not pathwise
        for place, (budget, price, cost, limit) in enumerate(
            zip(self.budgets, self.prices, costs, self.limits(progress, epochs), strict=True)
        ):
            if cost.requires_grad or (pathwise and self.options.penalty == "per-gate"):
                direct = direct + price.value * self._penalty(budget, cost, limit, kept)
            else:
                sampled = True
                penalty = penalty + price.value * budget.penalty(cost, limit)
            mean = float(cost.detach().mean())
            price.update(mean / limit - 1 if budget.upper else abs(mean / limit - 1))
            if self.targets:
                self.targets[place].update(mean / budget.full)
        hard = kept.detach()
        opened = hard.sum(dim=0).tolist()
        sums.opened = [a + b for a, b in zip(sums.opened or [0.0] * len(opened), opened, strict=True)]
        if sampled:
            if network.heads:
                raise ConfigError("a cost without a gradient needs gates that do not look at the input")
            hard = (hard > 0.5).to(hard)
            logits, relevant = network.gates.logits, network.relevant(hard)
            loss = torch.zeros_like(penalty) if pathwise else per_architecture(losses, len(kept))
            penalty = penalty.to(losses)
            baseline = self._baseline(float((loss.detach() + penalty).mean()))
            weighed = score_function_loss(loss, penalty, log_prob(logits, hard, relevant), baseline=baseline)
            direct = direct + weighed if pathwise else weighed
            # while the limit still falls, undecided gates are worth something; at the end they are not
            undecided = (relevant @ entropy(logits)).mean()
            direct = direct - float(self.options.exploration or 0.0) * (1 - progress) * undecided
        sums.samples += len(kept)
        sums.connected += float(network.connects(used.detach()).sum())
        sums.costs = [a + float(b.detach().sum()) for a, b in zip(sums.costs or [0.0] * len(costs), costs, strict=True)]
        return direct

    def forward(self, network: SuperNetwork, x: Tensor, policy: Policy) -> tuple[Tensor, Tensor]:
        """The forward pass in the precision of the run."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return network(x, policy)  # type: ignore[no-any-return]

    def _penalty(self, budget: BoundBudget, cost: Tensor, limit: float, kept: Tensor) -> Tensor:
        """What a differentiable cost adds per unit of price, of the batch as a whole."""
        share = min(1.0, limit / budget.full)
        if self.options.penalty == "batch-activation":
            return batch_activation(cost / budget.full, share)
        if self.options.penalty == "const-quad":
            return const_quad(cost / budget.full, share)
        if self.options.penalty == "per-gate":
            return per_gate(kept, share)
        excess = cost.mean() / limit - 1
        return excess if budget.upper else squared(excess)

    def _distillation(self, x: Tensor, y: Tensor, output: Tensor, phase: str) -> Tensor:
        """Draws the prediction to that of the full network, which learns beside its samples until one is chosen."""
        if phase == "search":
            full, _ = self.forward(self.network, x, AlwaysOn())
            beside = example_losses(full, y, self.ignore).mean()
        else:
            assert self.teacher is not None
            with torch.no_grad():
                full, _ = self.forward(self.teacher, x, AlwaysOn())
            beside = torch.zeros((), device=x.device)
        return beside + self.options.distillation * distillation(output.float(), full.float()).mean()

    def choose(self, kept: Tensor) -> None:
        """Goes on with one architecture, `(1, G)`; the full network as it is now becomes its teacher."""
        self.chosen = kept
        if self.options.distillation:
            self.teacher = copy.deepcopy(self.network).train().requires_grad_(False)

    def _baseline(self, total: float) -> str | float:
        """What this batch's samples are compared with; `total` is their mean loss and penalty."""
        if self.options.baseline != "moving-average":
            return self.options.baseline
        before = total if self.average is None else self.average
        self.average = 0.9 * before + 0.1 * total
        return before

    def _update(self, objective: Tensor, rate: float, *, gates: bool) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.gate_optimizer.zero_grad(set_to_none=True)
        objective.backward()  # type: ignore[no-untyped-call]
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("share", 1.0)
        self.optimizer.step()
        if gates:
            self.gate_optimizer.step()
            bound = self.options.gate_limit
            if bound:
                self.network.gates.clamp(bound)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that a step changes: tensors, and what goes to JSON."""
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        for kind, optimizer in (("weights", self.optimizer), ("gates", self.gate_optimizer)):
            for place, entries in optimizer.state_dict()["state"].items():
                for name, value in entries.items():
                    if isinstance(value, Tensor):
                        tensors[f"optimizer.{kind}.{place}.{name}"] = value
        if self.chosen is not None:
            tensors["chosen"] = self.chosen
        if self.teacher is not None:
            tensors |= {f"teacher.{name}": value for name, value in self.teacher.state_dict().items()}
        prices = [{"value": price.value, "accumulated": price.accumulated} for price in self.prices]
        targets = [{"value": target.value, "seen": target.seen} for target in self.targets]
        return tensors, {"prices": prices, "targets": targets, "starts": self.starts, "average": self.average}

    def load_state(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Takes up what `state` gave.

        Raises:
            FileError: it is of another network, or incomplete.
        """
        network = {name: value for name, value in tensors.items() if name.startswith("network.")}
        weights = {name: value for name, value in tensors.items() if name.startswith("optimizer.weights.")}
        gates = {name: value for name, value in tensors.items() if name.startswith("optimizer.gates.")}
        teacher = {name: value for name, value in tensors.items() if name.startswith("teacher.")}
        other = sorted(set(tensors) - {*network, *weights, *gates, *teacher, "chosen"})
        if other:
            raise FileError(f"the checkpoint is of another network: it has {other[0]!r}, which no run writes")
        load_tensors({f"network.{name}": value for name, value in self.network.state_dict().items()}, network)
        load_optimizer(self.optimizer, "optimizer.weights", weights)
        load_optimizer(self.gate_optimizer, "optimizer.gates", gates)
        record = Record(dict(state), "the checkpoint")
        self.starts = list(record.numbers("starts"))
        self.average = None if state.get("average") is None else record.number("average")
        values = [(price.number("value"), price.number("accumulated")) for price in record.records("prices")]
        if len(values) != len(self.budgets) or len(self.starts) not in (0, len(self.budgets)):
            raise FileError(f"the checkpoint must have {len(self.budgets)} prices, got {len(values)}")
        if any(number < 0 for pair in values for number in pair):
            raise FileError(f"the checkpoint's prices must be >= 0, got {min(map(min, values)):g}")
        for price, pair in zip(self.prices, values, strict=True):
            price.value, price.accumulated = pair
        followed = [(target.number("value"), target.whole("seen")) for target in record.records("targets")]
        if len(followed) != len(self.targets) or any(not 0 <= value <= 1 or seen < 0 for value, seen in followed):
            raise FileError(f"the checkpoint must have {len(self.targets)} targets in [0, 1], got {followed}")
        for target, (value, seen) in zip(self.targets, followed, strict=True):
            target.value, target.seen = value, seen
        self.teacher = None
        if teacher or (self.options.distillation and "chosen" in tensors):
            self.teacher = copy.deepcopy(self.network).train().requires_grad_(False)
            load_tensors({f"teacher.{name}": value for name, value in self.teacher.state_dict().items()}, teacher)
        self.chosen = None
        if "chosen" in tensors:
            chosen = torch.empty(1, self.network.gate_count)
            load_tensors({"chosen": chosen}, {"chosen": tensors["chosen"]})
            if not bool(((chosen == 0) | (chosen == 1)).all()):
                raise FileError("the checkpoint's 'chosen' must be bits, got other numbers")
            self.chosen = chosen


def load_optimizer(optimizer: torch.optim.Optimizer, prefix: str, tensors: Mapping[str, Tensor]) -> None:
    """Takes up what an optimiser knew of each parameter it has moved; `tensors` are named "PREFIX.PLACE.NAME".

    Raises:
        FileError: what it knew of a parameter is incomplete, or of another shape or type.
    """
    adam = isinstance(optimizer, torch.optim.Adam)
    names = ("step", "exp_avg", "exp_avg_sq") if adam else ("momentum_buffer",)
    moved = {name.removeprefix(f"{prefix}.").partition(".")[0] for name in tensors}
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    state = {
        place: {name: torch.empty(() if name == "step" else value.shape) for name in names}
        for place, value in enumerate(parameters)
        if str(place) in moved
    }
    targets = {f"{prefix}.{place}.{name}": value for place, entry in state.items() for name, value in entry.items()}
    load_tensors(targets, tensors)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
