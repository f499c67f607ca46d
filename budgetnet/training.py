"""One learner for all three phases: a step is a policy, a forward pass, an objective and its gradients."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from budgetnet.budgets import BoundBudget
from budgetnet.errors import DivergenceError
from budgetnet.gated import memory_format
from budgetnet.objectives import distillation, example_losses
from budgetnet.optimizers import layer_weights, load_optimizer, optimizer_state, weight_groups
from budgetnet.options import SearchOptions
from budgetnet.runs import load_tensors
from budgetnet.sites import AlwaysOn, Policy
from budgetnet.steering import Steering, Sums
from budgetnet.supernet import SuperNetwork


class Learner(Steering):
    """Weights beside what steers the gates: everything that a step changes and a checkpoint holds.

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
        super().__init__(network, budgets, options)
        options = self.options
        self.ignore, self.device, self.dtype = ignore, device, dtype
        self.optimizer = torch.optim.SGD(
            weight_groups(network, self.gate_decay),
            lr=options.learning_rate,
            momentum=options.momentum,
            nesterov=options.momentum > 0,
            weight_decay=options.weight_decay,
        )
        self.teacher: SuperNetwork | None = None  # the full network beside the chosen one, which is drawn to it

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
        policy = self.policy(phase, len(x), generator, epochs)
        if self.network.exits and phase != "finetune":
            output, losses, every, kept = self._of_all_ways(x, y, policy)
        else:
            output, kept = self.forward(self.network, x, policy)
            losses = every = example_losses(output, y, self.ignore)
        objective = every.mean()
        if phase == "search":
            objective = self.search_objective(losses, kept, progress, epochs, sums, x)
            if self.network.exits:
                objective = objective + self.options.exit_supervision * every.mean()
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
        if right.numel():  # not where nothing in the batch has a class
            sums.right += float(right.float().mean()) * len(x)

    def forward(self, network: SuperNetwork, x: Tensor, policy: Policy) -> tuple[Tensor, Tensor]:
        """The forward pass in the precision of the run."""
        with self.precision():
            return network(x, policy)  # type: ignore[no-any-return]

    def precision(self) -> torch.autocast:
        """The precision of the run, for what computes in it."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _of_all_ways(self, x: Tensor, y: Tensor, policy: Policy) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One forward pass along all ways out of a network with exits.

        The gates choose between the losses rather than between the outputs: a mixture of outputs shows a gate nothing
        of an image whose chosen answer is right for certain, which are those that could leave earlier.

        Returns:
            The output `(B, ...)` and the loss `(B,)` of the way that each example takes, with a gradient to the
            gates; the losses of all ways, `(B, W)`; `kept`.
        """
        with self.precision():
            outputs, taken, kept = self.network.ways_out(x, policy)
        ways, nothing = len(outputs), 1 - taken.sum(dim=1, keepdim=True)  # 1 where input and output are not connected
        outputs, taken = [*outputs, torch.zeros_like(outputs[0])], torch.cat([taken, nothing], dim=1)
        every = torch.stack([example_losses(output, y, self.ignore) for output in outputs], dim=1)
        chosen = taken.detach().argmax(dim=1)
        output = torch.stack(outputs, dim=1)[torch.arange(len(x), device=x.device), chosen]
        return output, (taken * every).sum(dim=1), every[:, :ways], kept

    def _distillation(self, x: Tensor, y: Tensor, output: Tensor, phase: str) -> Tensor:
        """What the full network loses beside, and how far the prediction is from its own.

        It shares its weights with its samples until one is chosen; from then on it has its own.
        """
        teacher = self.network if phase == "search" else self.teacher
        assert teacher is not None
        full, _ = self.forward(teacher, x, AlwaysOn())
        beside = example_losses(full, y, self.ignore).mean()
        apart = distillation(output.float(), full.float(), self.options.distillation_temperature)
        return beside + self.options.distillation * apart.mean()

    def choose(self, kept: Tensor) -> None:
        """Goes on with one architecture, `(1, G)`, and with a copy of the full network beside it where that teaches."""
        self.chosen = kept
        if self.options.distillation:
            self.teacher = self._learning_copy()

    def _learning_copy(self) -> SuperNetwork:
        """A copy that the optimiser learns on as the full network, with the momentum that its weights have."""
        teacher = copy.deepcopy(self.network).train()
        own, copies = self.optimizer.param_groups[0]["params"], layer_weights(teacher)
        self.optimizer.add_param_group({"params": copies})
        for mine, theirs in zip(own, copies, strict=True):
            if mine in self.optimizer.state:
                self.optimizer.state[theirs] = copy.deepcopy(self.optimizer.state[mine])
        return teacher

    def _update(self, objective: Tensor, rate: float, *, gates: bool) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.gate_optimizer.zero_grad(set_to_none=True)
        objective.backward()  # type: ignore[no-untyped-call]
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("share", 1.0)
        self.optimizer.step()
        if gates:
            self.step_gates()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that a step changes: tensors, and what goes to JSON."""
        tensors, state = super().state()
        tensors |= {f"network.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= optimizer_state(self.optimizer, "optimizer.weights")
        if self.teacher is not None:
            tensors |= {f"teacher.{name}": value for name, value in self.teacher.state_dict().items()}
        return tensors, state

    def load_state(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Takes up what `state` gave.

        Raises:
            FileError: it is of another network, or incomplete.
        """
        network, weights, teacher = (
            {name: value for name, value in tensors.items() if name.startswith(prefix)}
            for prefix in ("network.", "optimizer.weights.", "teacher.")
        )
        load_tensors({f"network.{name}": value for name, value in self.network.state_dict().items()}, network)
        own = {*network, *weights, *teacher}
        super().load_state({name: value for name, value in tensors.items() if name not in own}, state)
        if teacher or (self.options.distillation and self.chosen is not None):
            self.teacher = self._learning_copy()
            load_tensors({f"teacher.{name}": value for name, value in self.teacher.state_dict().items()}, teacher)
        load_optimizer(self.optimizer, "optimizer.weights", weights)
