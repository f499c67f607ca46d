"""The method for those who keep their own training loop: who decides the gates, what to minimise, what to hand over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from budgetnet.budgets import Budget
from budgetnet.by_input import settled
from budgetnet.conditional import conditional
from budgetnet.costs import Latency
from budgetnet.costs.drawn import DrawnModel, Examples
from budgetnet.delivery import entry, entry_by_input
from budgetnet.errors import ConfigError, FileError
from budgetnet.evaluation import recalibrate
from budgetnet.extraction import extract
from budgetnet.inference import Observed, expected_costs
from budgetnet.objectives import MOVING
from budgetnet.optimizers import weight_groups
from budgetnet.options import SearchOptions
from budgetnet.report.records import Record
from budgetnet.selection import Candidate, choose
from budgetnet.sites import Policy, Threshold
from budgetnet.steering import Steering, Sums, prepare, seeded
from budgetnet.supernet import SuperNetwork

CORRECTIONS = 10
"""So many times in a search predicted costs are corrected by what is measured."""


class Controller:
    """Learns the gates of a network whose weights are learned in a loop of one's own.

    A step of that loop, with an optimiser of `weights()`, or of `groups(learning_rate)` where gates look at the input:

        output, kept = network(x, controller.policy(len(x)))
        loss = controller.loss(losses_of_the_examples, kept)
        loss.backward()
        optimizer.step()
        controller.step()

    Once `phase` is "choose", `choose` comes before the next step; the steps behind it train what was chosen. Gates that
    look at the input are searched to the end, and `settle` comes then.

    Args:
        network: its gates are learned in place, wherever it is moved.
        budgets: at least one; texts are read by `Budget.parse`.
        options: of the gates, prices and phases; None for the defaults. What they count in epochs is counted in
            steps here; those of data, of the weights' optimiser, of devices and of distillation are the loop's own.
        total_steps: of the loop.
        examples: batches `(b, C, H, W)`, on the network's device, to see costs on that depend on them: of gates that
            look at the input, and your own.

    Attributes:
        limits: what `check_reachable` says of each budget.
        costs: of each budget, by its name, the mean cost of the architectures that were sampled last, and of the one
            that is chosen once there is one.
        outcomes: of each budget what the chosen architecture costs, or what gates that look at the input are expected
            to, as in result.json; empty before that is known.
        tau: the probability above which gates that look at the input are open; None before `settle`.
        steps: that are over.

    Raises:
        ConfigError: an option cannot be kept by a loop of one's own, or gates that look at the input get no examples.
        FileError: the file of a cost holds something else.
        UnreachableBudget: no architecture keeps the budgets.
    """

    def __init__(
        self,
        network: SuperNetwork,
        budgets: Sequence[Budget | str],
        options: SearchOptions | None = None,
        *,
        total_steps: int,
        examples: Examples | None = None,
    ) -> None:
        if network.heads and examples is None:
            raise ConfigError(
                f"gates that look at the input need examples to see what they cost on, got none for {network.name}"
            )
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise ConfigError(f"total_steps must be a whole number >= 1, got {total_steps!r}")
        if not budgets:
            raise ConfigError("a controller needs at least one budget, such as macs<=25%, got none")
        options = options or SearchOptions()
        if options.distillation:
            raise ConfigError(f"distillation is up to your own loop, got {options.distillation}")
        if options.target in MOVING:
            raise ConfigError(f"a {options.target} target starts again each epoch; a loop of one's own has steps")

        def placed(budget: Budget) -> Budget:
            if isinstance(budget.cost, Latency) and budget.cost.table:
                budget.cost.kept_in(Path())  # which refuses a file that could not be written
            return budget if examples is None else budget.on(examples)

        ready = prepare(network, budgets, replace(options, epochs=total_steps), placed=placed)
        self.limits = ready.limits
        self.steering = Steering(network, ready.budgets, ready.options)
        self.steps = self._asked = 0
        self.outcomes: list[dict[str, Any]] = []
        self.costs: dict[str, float] = {}
        self.tau: float | None = None
        self._seen = examples
        self._examples: int | None = None  # of the batch whose loss is to come
        self._lost = False  # whether a loss was given since the last step
        self._ended = False  # whether the noise ended since then

    @property
    def phase(self) -> str:
        """What the next step is for: "warmup", "search" or "finetune"; "choose" or "settle" where that is due first."""
        phase = self.steering.options.phase(self.steps)
        if phase != "finetune" or self.steering.chosen is not None:
            return phase
        return "settle" if self.steering.network.heads else "choose"

    @property
    def chosen(self) -> Tensor | None:
        """The decisions of the architecture that was chosen, `(1, G)`."""
        return self.steering.chosen

    @property
    def _begun(self) -> int:
        """Steps since sampling began."""
        return self.steps - self.steering.options.warmup_epochs

    def weights(self) -> list[nn.Parameter]:
        """What the loop's own optimiser learns: all parameters but the gates'."""
        return [value for name, value in self.steering.network.named_parameters() if not name.startswith("gates.")]

    def groups(self, learning_rate: float) -> list[dict[str, Any]]:
        """`weights()` in groups for an optimiser: what decides gates by the input has a rate and decay of its own."""
        groups = weight_groups(self.steering.network, self.steering.gate_decay)
        rates = [learning_rate * group.pop("share", 1.0) for group in groups]
        return [{**group, "lr": rate} for group, rate in zip(groups, rates, strict=True)]

    def policy(self, examples: int) -> Policy:
        """Who decides the gates for a batch of so many examples.

        Raises:
            ConfigError: an architecture has to be chosen first.
        """
        phase, steering = self.phase, self.steering
        if phase in ("choose", "settle"):
            raise ConfigError(f"the search is over at step {self.steps}: {phase} comes before the next policy")
        if phase == "search" and not steering.starts:
            steering.begin_search()
        generator = seeded(steering.network.gates.values.device, steering.options.seed, self._asked)
        if phase == "search" and not self._ended and steering.noise_ends(self._begun - 1, self._begun):
            steering.end_noise(self._batches(), generator)
            self._ended = True  # a step may take several batches
        self._asked, self._examples = self._asked + 1, examples
        return steering.policy(phase, examples, generator, self._begun)

    def loss(self, losses: Tensor, kept: Tensor, x: Tensor | None = None) -> Tensor:
        """The scalar whose gradient moves weights and gates; the prices follow what the architectures cost.

        Args:
            losses: `(B,)` of the examples, in their order, with a gradient.
            kept: `(K, G)` as the network gave them.
            x: `(B, C, H, W)` the examples, for costs that read them.

        Raises:
            ConfigError: no policy was asked for, or a shape is another.
        """
        if self._examples is None:
            raise ConfigError("loss comes after policy: output, kept = network(x, controller.policy(len(x)))")
        if losses.shape != (self._examples,):
            raise ConfigError(
                f"losses must be one for each of the {self._examples} examples that policy was asked for, "
                f"({self._examples},), got {tuple(losses.shape)}"
            )
        steering, gates = self.steering, self.steering.network.gate_count
        if kept.ndim != 2 or kept.shape[1] != gates:
            raise ConfigError(f"kept must be what the network gave, (K, {gates}), got {tuple(kept.shape)}")
        self._examples, self._lost = None, True
        if self.phase != "search":
            return losses.mean()
        for budget in steering.budgets:
            if x is None and isinstance(budget.model, DrawnModel) and budget.model.examples is not None:
                raise ConfigError(f"{budget.name} reads examples: loss(losses, kept, x)")
        sums, options = Sums(), steering.options
        progress = options.search_progress(self.steps)
        objective = steering.search_objective(losses, kept, progress, self._begun, sums, x)
        self.costs = {
            budget.name: total / sums.samples for budget, total in zip(steering.budgets, sums.costs, strict=True)
        }
        return objective

    def step(self) -> None:
        """Moves the gates and counts the step; comes after the weights' own.

        Raises:
            ConfigError: there was no loss, or no backward pass from it.
        """
        if not self._lost:
            raise ConfigError("step comes after loss, got no loss since the last step")
        if self.phase == "search":
            network = self.steering.network
            if all(value.grad is None for site in (network.gates, network.heads) for value in site.parameters()):
                raise ConfigError("step comes after loss.backward(), got gates without a gradient")
            self.steering.step_gates()
            searched, every = self._begun + 1, self.steering.options.search_epochs / CORRECTIONS
            if searched // every > (searched - 1) // every:
                self.steering.correct(searched)
        self.steering.gate_optimizer.zero_grad(set_to_none=True)
        self.steps, self._lost, self._ended = self.steps + 1, False, False

    def choose(self, judge: Callable[[nn.Module], float], batches: Sequence[tuple[Tensor, Any]] = ()) -> Tensor:
        """Projects onto the budgets: of the probable architectures that keep them all, the one that is judged best.

        Args:
            judge: how good a plain network in evaluation mode is on validation data; more is better.
            batches: of training data, `(x, y)`, on the network's device: they set the batch norms of each
                candidate before it is judged, and of the network for the one that is chosen. None: nothing does.

        Returns:
            Its decisions, `(1, G)`.

        Raises:
            ConfigError: the search is not over, there is a choice already, or a judgement is no number.
            UnreachableBudget: no architecture was found that keeps all budgets together.
        """
        steering, options = self.steering, self.steering.options
        network, training = steering.network, steering.network.training
        if network.heads:
            raise ConfigError("gates that look at the input leave nothing to choose: settle comes after the search")
        if self.phase != "choose":
            over = options.epochs - options.finetune_epochs
            what = "an architecture is chosen once" if steering.chosen is not None else "choose comes after the search"
            raise ConfigError(f"{what}, at step {over}, got step {self.steps}")

        def best(some: Sequence[Candidate]) -> int:
            return max(range(len(some)), key=lambda place: some[place].quality["score"])

        _, chosen = choose(
            network,
            steering.budgets,
            lambda kept: {"score": self._judged(judge, extract(network, kept), batches)},
            best,
            count=options.candidates,
            generator=torch.Generator().manual_seed(options.seed),
            pressed=steering.pressed,
        )
        steering.chosen = chosen.kept
        used = network.used(steering.chosen)
        self.outcomes = [entry(budget, steering.chosen, used) for budget in steering.budgets]
        self.costs = {outcome["cost"]: outcome["value"] for outcome in self.outcomes}
        if batches:
            recalibrate(network, lambda x: network.run(x, used), batches)
        network.train(training)
        return steering.chosen

    def settle(self, batches: Sequence[tuple[Tensor, Any]] = ()) -> float:
        """Finds the threshold nearest to 1/2 at which gates that look at the input keep the budgets on the examples.

        Args:
            batches: of training data, `(x, y)`, on the network's device: they set the batch norms. None: nothing does.

        Returns:
            `tau`.

        Raises:
            ConfigError: the search is not over, or no gate looks at the input.
            UnreachableBudget: no threshold keeps the budgets.
        """
        network, budgets, training = self.steering.network, self.steering.budgets, self.steering.network.training
        if self.phase != "settle":
            raise ConfigError(f"settle comes after a search of gates that look at the input, got {self.phase}")
        models, examples = {budget.name: budget.model for budget in budgets}, self._batches()

        def look(tau: float) -> Observed:
            return Observed({}, expected_costs(network, Threshold(tau), examples, models), [])

        def set_norms(tau: float) -> None:
            if batches:
                recalibrate(network, lambda x: network.masked(x, Threshold(tau))[0], batches)

        network.eval()  # as recalibration leaves it
        found = settled(network, budgets, look, set_norms, examples[0])
        self.tau, self.outcomes = found.tau, [entry_by_input(budget, found) for budget in budgets]
        network.train(training)
        return self.tau

    def network(self) -> nn.Module:
        """The plain network of the architecture that was chosen, as its weights are now, in evaluation mode.

        Of gates that look at the input the network that skips what they close.

        Raises:
            ConfigError: there is none yet.
        """
        if self.tau is not None:
            return conditional(self.steering.network, tau=self.tau)
        if self.steering.chosen is None:
            due = "settle" if self.steering.network.heads else "choose"
            raise ConfigError(f"network comes after {due}, got step {self.steps} of the {self.phase}")
        return extract(self.steering.network, self.steering.chosen).eval()

    def state_dict(self) -> dict[str, Any]:
        """All that `step` changes but the network's own state: to be saved beside it, between two steps."""
        tensors, state = self.steering.state()
        tensors = {name: value.detach().clone() for name, value in tensors.items()}
        own = {
            "steps": self.steps,
            "asked": self._asked,
            "outcomes": self.outcomes,
            "tau": self.tau,
        }
        return {**own, **state, "tensors": tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a `state_dict` of the same network, budgets and options.

        Raises:
            FileError: it is of something else, or incomplete.
        """
        record = Record(dict(state), "the controller's state")
        steps, asked, tensors = record.whole("steps"), record.whole("asked"), record.record("tensors").values
        if steps < 0 or not all(isinstance(value, Tensor) for value in tensors.values()):
            raise FileError(f"{record.file} must hold tensors and steps >= 0, got step {steps}")
        outcomes, tau = [dict(each.values) for each in record.records("outcomes")], record.maybe_share("tau")
        self.steering.load_state({name: value.cpu() for name, value in tensors.items()}, state)
        pairs = zip(self.limits, self.steering.budgets, strict=True)
        self.limits = [{**row, "limit": budget.limit, "full": budget.full} for row, budget in pairs]
        self.outcomes, self.tau = outcomes, tau
        self.steps, self._asked, self._examples, self._lost, self._ended = steps, asked, None, False, False

    def _batches(self) -> list[Tensor]:
        """The examples."""
        assert self._seen is not None
        if not (found := list(self._seen())):
            raise ConfigError("examples must give at least one batch, got none")
        return found

    @torch.no_grad()
    def _judged(
        self, judge: Callable[[nn.Module], float], plain: nn.Module, batches: Sequence[tuple[Tensor, Any]]
    ) -> float:
        if batches:
            recalibrate(plain, plain, batches)
        score = float(judge(plain.eval()))
        if not isfinite(score):
            raise ConfigError(f"judge must return a finite number, more for a better network, got {score}")
        return score
