"""One learner for all three phases: a step is a policy, a forward pass, an objective and its gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from budgetnet.budgets import BoundBudget
from budgetnet.errors import DivergenceError, FileError
from budgetnet.objectives import Price, annealed, example_losses, per_architecture, score_function_loss
from budgetnet.options import SearchOptions
from budgetnet.report.records import Record
from budgetnet.runs import load_tensors
from budgetnet.sites import AlwaysOn, Fixed, Policy, Sample, entropy, log_prob
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
        network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network = network
        self.budgets, self.options, self.ignore = tuple(budgets), options, ignore
        self.device, self.dtype = device, dtype
        weights = [value for name, value in network.named_parameters() if not name.startswith("gates.")]
        self.optimizer = torch.optim.SGD(
            weights,
            lr=options.learning_rate,
            momentum=options.momentum,
            nesterov=options.momentum > 0,
            weight_decay=options.weight_decay,
        )
        kinds = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
        self.gate_optimizer = kinds[options.gate_optimizer](network.gates.parameters(), lr=options.gate_rate)
        fixed = None if options.price == "dual" else options.price
        self.prices = [Price(options.proportional, options.integral, fixed) for _ in budgets]
        self.starts: list[float] = []  # expected costs when sampling began
        self.average: float | None = None  # of loss and penalty, over earlier batches of the search
        self.chosen: Tensor | None = None  # (1, G): the architecture that is fine-tuned

    def policy(self, phase: str, examples: int, generator: torch.Generator) -> Policy:
        """Who decides the gates in this phase."""
        if phase == "warmup":
            return AlwaysOn()
        if phase == "search":
            return Sample(self.options.sampled(examples), generator)
        assert self.chosen is not None
        return Fixed(self.chosen)

    def begin_search(self) -> None:
        """Sets the gates to their start, and notes where the costs begin to fall from."""
        with torch.no_grad():
            self.network.gates.logits.fill_(self.options.gate_start)
        probability = self.network.gates.logits.detach().sigmoid().cpu().expand(1024, -1)
        kept = torch.bernoulli(probability, generator=torch.Generator().manual_seed(self.options.seed))
        used = self.network.used(kept)
        self.starts = [float(budget.model(used).mean()) for budget in self.budgets]

    def limits(self, progress: float) -> list[float]:
        """The annealed limits, each in its cost's unit."""
        return [annealed(start, b.limit, progress) for start, b in zip(self.starts, self.budgets, strict=True)]

    def step(
        self, x: Tensor, y: Tensor, phase: str, *, generator: torch.Generator, rate: float, progress: float, sums: Sums
    ) -> None:
        """One step on a batch: the gradients of Eq. 7, or the plain loss where nothing is sampled.

        Args:
            x: `(B, C, H, W)` examples.
            y: `(B,)` classes or `(B, H, W)` masks.
            phase: of the run.
            generator: draws the architectures.
            rate: learning rate of the weights.
            progress: share of the annealing that is over.
            sums: what the step did is added here.

        Raises:
            DivergenceError: the objective is not finite; nothing was changed.
        """
        x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output, kept = self.network(x, self.policy(phase, len(x), generator))
        losses = example_losses(output, y, self.ignore)
        objective = losses.mean()
        if phase == "search":
            used = self.network.used(kept)
            costs = [budget.model(used) for budget in self.budgets]
            limits = self.limits(progress)
            penalty = torch.zeros_like(costs[0])
            for budget, price, cost, limit in zip(self.budgets, self.prices, costs, limits, strict=True):
                penalty = penalty + price.value * budget.penalty(cost, limit)
                distance = float(cost.mean()) / limit - 1
                price.update(distance if budget.upper else abs(distance))
            logits, relevant = self.network.gates.logits, self.network.relevant(kept)
            loss, penalty = per_architecture(losses, len(kept)), penalty.to(losses)
            baseline = self._baseline(float((loss.detach() + penalty).mean()))
            objective = score_function_loss(loss, penalty, log_prob(logits, kept, relevant), baseline=baseline)
            # while the limit still falls, undecided gates are worth something; at the end they are not
            undecided = (relevant @ entropy(logits)).mean()
            objective = objective - self.options.exploration * (1 - progress) * undecided
            sums.samples += len(kept)
            sums.connected += float(used.any(dim=1).sum())
            sums.costs = [a + float(b.sum()) for a, b in zip(sums.costs or [0.0] * len(costs), costs, strict=True)]
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
            group["lr"] = rate
        self.optimizer.step()
        if gates:
            self.gate_optimizer.step()
            bound = self.options.gate_limit
            if bound:
                with torch.no_grad():
                    self.network.gates.logits.clamp_(-bound, bound)

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
        prices = [{"value": price.value, "accumulated": price.accumulated} for price in self.prices]
        return tensors, {"prices": prices, "starts": self.starts, "average": self.average}

    def load_state(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Takes up what `state` gave.

        Raises:
            FileError: it is of another network, or incomplete.
        """
        network = {name: value for name, value in tensors.items() if name.startswith("network.")}
        weights = {name: value for name, value in tensors.items() if name.startswith("optimizer.weights.")}
        gates = {name: value for name, value in tensors.items() if name.startswith("optimizer.gates.")}
        other = sorted(set(tensors) - {*network, *weights, *gates, "chosen"})
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
        self.chosen = None
        if "chosen" in tensors:
            chosen = torch.empty(1, len(self.network.columns))
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
