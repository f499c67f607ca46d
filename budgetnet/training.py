"""One learner for all three phases: a step is a policy, a forward pass, an objective and its gradients."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from budgetnet.budgets import BoundBudget
from budgetnet.errors import DivergenceError, FileError
from budgetnet.objectives import Price, annealed, example_losses, per_architecture, score_function_loss
from budgetnet.options import SearchOptions
from budgetnet.runs import load_tensors
from budgetnet.sites import AlwaysOn, Fixed, Policy, Sample, log_prob
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
            decided = log_prob(self.network.gates.logits, kept, self.network.relevant(kept))
            objective = score_function_loss(
                per_architecture(losses, len(kept)), penalty.to(losses), decided, baseline=self.options.baseline
            )
            sums.samples += len(kept)
            sums.connected += float(used.any(dim=1).sum())
            sums.costs = [a + float(b.sum()) for a, b in zip(sums.costs or [0.0] * len(costs), costs, strict=True)]
        if not torch.isfinite(objective):
            raise DivergenceError(
                f"the loss must stay finite, got {float(objective)} at learning rate {rate:.3g}: lower learning_rate"
            )
        self._update(objective, rate, gates=phase == "search")
        sums.images += len(x)
        sums.loss += float(losses.detach().sum())
        right = output.detach().argmax(dim=1) == y
        if y.ndim > 1 and self.ignore is not None:
            right = right[y != self.ignore]
        sums.right += float(right.float().mean()) * len(x)

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
        return tensors, {"prices": [asdict(price) for price in self.prices], "starts": self.starts}

    def load_state(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Takes up what `state` gave.

        Raises:
            FileError: it is of another network, or incomplete.
        """
        prefix = "network."
        saved = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        load_tensors(self.network.state_dict(), saved)
        try:
            for kind, optimizer in (("weights", self.optimizer), ("gates", self.gate_optimizer)):
                content = optimizer.state_dict()
                content["state"] = {}
                for key, value in tensors.items():
                    if key.startswith(f"optimizer.{kind}."):
                        _, _, place, name = key.split(".")
                        content["state"].setdefault(int(place), {})[name] = value.clone()
                optimizer.load_state_dict(content)
            self.prices = [Price(**price) for price in state["prices"]]
            self.starts = [float(start) for start in state["starts"]]
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(f"the checkpoint lacks {error}: {json.dumps(sorted(state))}") from error
        if len(self.prices) != len(self.budgets) or len(self.starts) not in (0, len(self.budgets)):
            raise FileError(f"the checkpoint must have {len(self.budgets)} prices, got {len(self.prices)}")
        self.chosen = tensors.get("chosen")
        if self.chosen is not None and self.chosen.shape != (1, len(self.network.columns)):
            raise FileError(
                f"the checkpoint's 'chosen' must be (1, {len(self.network.columns)}), got {tuple(self.chosen.shape)}"
            )
