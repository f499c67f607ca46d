"""What a search is told: one typed value, checked when it is made; the command line's flags are its fields."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from budgetnet.errors import ConfigError
from budgetnet.objectives import MOVING

DEFAULTS: dict[str, dict[str, Any]] = {
    "score": {"warmup": 0.2, "finetune": 0.4, "gate_rate": 0.1, "gate_start": 3.0, "architectures": 16}
    | {"proportional": 10.0, "exploration": 0.02, "anneal": 0.6, "noiseless": 0.0},
    "gumbel": {"warmup": 0.13, "finetune": 0.7, "gate_rate": 0.05, "gate_start": 2.0, "architectures": "example"}
    | {"proportional": 20.0, "exploration": 0.0, "anneal": 0.6, "noiseless": 0.0},
    "conditional": {"warmup": 0.13, "finetune": 0.0, "gate_rate": 0.05, "gate_start": 2.0, "architectures": "example"}
    | {"proportional": 20.0, "exploration": 0.0, "anneal": 0.3, "noiseless": 0.5},
}
"""What an option left at None becomes: for the score function, for Gumbel, and for gates that look at the input."""
DRAWN = 16
"""Architectures sampled for a batch, unless given, where each costs a call."""


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How architecture and weights are learned.

    The epochs are divided into warm-up (the full network), search (sampled architectures) and
    fine-tuning (the chosen one). One learning-rate curve runs over all of them. An option that is None
    takes the value that `DEFAULTS` has for the estimator.

    Attributes:
        estimator: "score": the score function, for any cost (BSN); "gumbel": straight-through Gumbel, and
            "soft-gumbel" without the straight-through (Herrmann et al.), the score function for costs
            without a gradient; "auto": "gumbel" where channels or inputs have gates, else "score".
        temperature: of Gumbel, > 0.
        noiseless: share of the search, at its end, in which Gumbel has no noise: gates open where their probability is
            above 1/2, as they do once they are learned, in [0, 1). Gates that look at the input are moved together
            when the noise ends, so that they cost as much without it.
        penalty: "price": the price times the relative excess; "batch-activation" (Eq. 1 of Herrmann et al.),
            "const-quad" (Eq. 3), each times the price; "per-gate": each gate's rate is drawn to
            the limit's share of the full cost, as in ConvNet-AIG. All but the first need the estimator gumbel.
        target_rates: of the penalty per-gate, rates of their own for layers: {"g0.*": 1, "g2.*.hidden0": 0.7} names
            edges, or channel gates inside them, by name or by pattern (`*`, `?`); of several that fit a gate the last
            counts. They are in force from the start. ConvNet-AIG sets them by hand (Herrmann et al., section 3.1).
            An exit needs one: the share of the images whose gate is to take it, which may be larger (section 5).
        target: how the limit in force comes down: "linear" while `anneal` lasts; "constant": it is in force from
            the start, as usual in Herrmann et al.; "stepped" by `target_fall` of the full cost every
            `target_every` epochs (S1.1), to the limit before the search ends; "moving" or "exponential": it follows
            the batches' own cost, from the limit at the start of each epoch (S1.2).
        target_fall, target_every: of the stepped target.
        target_decay: share of itself that an exponential target keeps with each batch, in [0, 1); the rest is the
            batch's cost. The paper has no number (S1.2).
        target_start: share of the full cost where a stepped target begins, and a moving one, for which it is > 0, in
            each epoch; None for 1, and for the limit's own share.
        gate_decay: weight decay of the gates; "papers" for 20 / G * 1e-4.
        distillation: weight of the loss that draws samples, and the chosen network, to what the full
            network predicts for the same images; 0 for none. The full network learns beside its samples,
            and, once one is chosen, with weights of its own beside that.
        distillation_temperature: of both predictions there, > 0; a higher one shows more of what the full network
            takes for unlikely.
        exit_supervision: weight of the mean loss of all ways out of a network with exits, on all images, beside that of
            the way that the gates choose; without it a classifier learns from those images alone that the exits
            before it leave, and what is easy there is never seen behind them. Huang et al., arXiv:1703.09844, train
            all classifiers on every image.
        epochs: passes over the training images in all, >= 1.
        warmup: share of the epochs before sampling starts, in [0, 1); BSN: 50 of 300.
        finetune: share of the epochs for the chosen architecture, in [0, 1).
        batch_size: images a batch.
        learning_rate: peak rate of the weights.
        schedule: "one-cycle" rises over the first 20 % and falls to 0 on a cosine; "steps" multiplies
            by 0.1 at each of `milestones`; "constant" stays.
        milestones: shares of the epochs at which "steps" falls; BSN: 150 and 225 of 300.
        momentum: of SGD on the weights, Nesterov's.
        weight_decay: of the weights; never of the gates.
        gate_optimizer: "adam" or "sgd" (the papers'; its gradient is of the mean over the batch). What decides
            gates that look at the input learns with the weights instead, and gate_rate and gate_limit are not of it.
        gate_rate: learning rate of the gates.
        gate_start: logit of every gate when sampling starts; 3 keeps an edge with probability 0.953.
        gate_limit: logits are kept in [-gate_limit, gate_limit] so that no gate is out of reach; 0 for no bound.
        architectures: architectures sampled for a batch, each serving a contiguous group of its
            examples; "example" for one each, 1 for the batch (with the moving average). Where a budget's
            cost is drawn for each of them (a function of the network, of examples, or noisy) 16, unless given.
        baseline: what a sample's loss is compared with: "leave-one-out", the batch's other samples;
            "batch-mean", all of them (the papers'); "moving-average", earlier batches.
        price: "dual" finds it by dual ascent; a number is the papers' lambda, in loss per unit of C / limit.
        proportional, integral: gains of the dual ascent.
        exploration: loss that a nat of entropy is worth when sampling starts; falls to 0 as the limit is reached.
            Without it the gates settle early on what looked best at first. 0 for gates that look at the input.
        anneal: share of the search during which the limit falls from the expected cost to its value.
        candidates: architectures compared on validation data when one is chosen.
        recalibration: batches that set an architecture's batch norms before it is judged, of as many epochs as they
            take; the papers' 200.
        validate_every: epochs between looks at the validation data.
        precision: "float32", "bfloat16" (autocast), or "auto": bfloat16 where the machine has it in hardware.
        device: "cpu", "cuda", or "auto": cuda where there is one.
        seed: of data order, augmentation and samples.

    Raises:
        ConfigError: an option is outside its range.
    """

    estimator: Literal["auto", "score", "gumbel", "soft-gumbel"] = "auto"
    temperature: float = 1.0
    noiseless: float | None = None
    penalty: Literal["price", "batch-activation", "const-quad", "per-gate"] = "price"
    target_rates: dict[str, float] = field(default_factory=dict)
    target: Literal["linear", "constant", "stepped", "moving", "exponential"] = "linear"
    target_fall: float = 0.05
    target_every: int = 5
    target_decay: float = 0.9
    target_start: float | None = None
    gate_decay: float | Literal["papers"] = 0.0
    distillation: float = 0.0
    distillation_temperature: float = 1.0
    exit_supervision: float = 1.0
    epochs: int = 30
    warmup: float | None = None
    finetune: float | None = None
    batch_size: int = 128
    learning_rate: float = 0.2
    schedule: Literal["one-cycle", "steps", "constant"] = "one-cycle"
    milestones: tuple[float, ...] = (0.5, 0.75)
    momentum: float = 0.9
    weight_decay: float = 5e-4
    gate_optimizer: Literal["adam", "sgd"] = "adam"
    gate_rate: float | None = None
    gate_start: float | None = None
    gate_limit: float = 5.0
    architectures: int | Literal["example"] | None = None
    baseline: Literal["leave-one-out", "batch-mean", "moving-average"] = "leave-one-out"
    price: float | Literal["dual"] = "dual"
    proportional: float | None = None
    integral: float = 0.02
    exploration: float | None = None
    anneal: float | None = None
    candidates: int = 16
    recalibration: int = 10
    validate_every: int = 1
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "candidates", "recalibration", "validate_every", "target_every"):
            _check(name, getattr(self, name), whole=True, least=1)
        _check("seed", self.seed, whole=True, least=0, below=2**24)  # the step has 40 bits beside it
        for name in (
            "learning_rate",
            "weight_decay",
            "gate_rate",
            "gate_limit",
            "proportional",
            "integral",
            "exploration",
            "target_fall",
            "distillation",
            "exit_supervision",
        ):
            _check(name, self._value(name), least=0)
        for name in ("warmup", "finetune", "noiseless", "anneal", "momentum", "target_decay"):
            _check(name, self._value(name), least=0, below=1 if name != "anneal" else None)
        _check("gate_start", self._value("gate_start"))
        if self.target != "exponential" and self.target_decay != SearchOptions.target_decay:
            raise ConfigError(f"target_decay is of an exponential target, got {self.target_decay} with {self.target}")
        if self.target_start is not None:
            _check("target_start", self.target_start, least=0)
            if self.target_start > 1 or self.target in ("linear", "constant"):
                whole = "a share of the full cost, of a stepped or moving target"
                raise ConfigError(f"target_start must be {whole}, got {self.target_start} with {self.target}")
            if self.target_start == 0 and self.target in MOVING:
                raise ConfigError(f"target_start of a moving target must be > 0, got {self.target_start}")
        if not isinstance(self.target_rates, dict):
            raise ConfigError(f"target_rates must map names of layers to rates, got {self.target_rates!r}")
        for name, rate in self.target_rates.items():
            if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate <= 1:
                raise ConfigError(f"target_rates must lie in [0, 1], got {rate!r} for {name!r}")
        if self.target_rates and self.penalty != "per-gate":
            raise ConfigError(f"target_rates are of the penalty per-gate, got them with {self.penalty}")
        if self.gate_decay != "papers":
            _check("gate_decay", self.gate_decay, least=0)
        for name in ("temperature", "distillation_temperature"):
            value = getattr(self, name)
            if isinstance(value, bool) or not (isinstance(value, int | float) and 0 < value < math.inf):
                raise ConfigError(f"{name} must be a number > 0, got {value!r}")
        if self.distillation_temperature != 1 and not self.distillation:
            raise ConfigError(
                f"distillation_temperature is of distillation, got {self.distillation_temperature} without it"
            )
        for share in self.milestones:
            _check("milestones", share, least=0, below=1)
        for name, words in WORDS.items():
            if getattr(self, name) not in words:
                raise ConfigError(f"{name} must be {' or '.join(words)}, got {getattr(self, name)!r}")
        if self.price != "dual":
            _check("price", self.price, least=0)
        if self.architectures not in (None, "example"):
            _check("architectures", self.architectures, whole=True, least=1)
            if isinstance(self.architectures, int) and self.architectures > self.batch_size:
                raise ConfigError(
                    f"architectures must be at most batch_size {self.batch_size}, got {self.architectures}"
                )
        compared = self.estimator == "score" and self.baseline != "moving-average"
        if compared and self.sampled(self.batch_size) < 2:
            raise ConfigError(f"a {self.baseline} baseline needs architectures >= 2, got 1")
        if self.estimator == "auto" and self.warmup is None:
            return  # how long the warm-up is, and so what it leaves, is known once they are resolved
        if self.warmup_epochs + self.finetune_epochs > self.epochs - 1:
            raise ConfigError(
                f"warmup and finetune must leave at least one of {self.epochs} epochs to search, "
                f"got {self.warmup_epochs} and {self.finetune_epochs} epochs"
            )

    @property
    def warmup_epochs(self) -> int:
        """Epochs before sampling starts."""
        return round(float(self._value("warmup")) * self.epochs)

    @property
    def finetune_epochs(self) -> int:
        """Epochs of the chosen architecture."""
        asked = round(float(self._value("finetune")) * self.epochs)
        return asked if self.finetune is not None else max(0, min(asked, self.epochs - 1 - self.warmup_epochs))

    @property
    def search_epochs(self) -> int:
        """Epochs in which architectures are sampled."""
        return self.epochs - self.warmup_epochs - self.finetune_epochs

    def phase(self, epoch: int) -> str:
        """What an epoch is for: "warmup", "search" or "finetune"."""
        if epoch < self.warmup_epochs:
            return "warmup"
        return "search" if epoch < self.epochs - self.finetune_epochs else "finetune"

    def noisy(self, epochs: float) -> bool:
        """Whether gates are drawn with noise `epochs` after sampling began."""
        return epochs < self.search_epochs * (1 - float(self._value("noiseless")))

    def search_progress(self, position: float) -> float:
        """Share of the annealing that is over at `position` epochs from the start, in [0, 1]."""
        anneal = float(self._value("anneal"))
        if anneal == 0:
            return 1.0
        return min(1.0, max(0.0, (position - self.warmup_epochs) / (self.search_epochs * anneal)))

    def rate(self, progress: float) -> float:
        """Learning rate of the weights when a share `progress` of all training is over."""
        if self.schedule == "constant":
            return self.learning_rate
        if self.schedule == "steps":
            return float(self.learning_rate * 0.1 ** sum(progress >= share for share in self.milestones))
        rising = 0.2
        if progress < rising:
            return self.learning_rate * (0.1 + 0.9 * progress / rising)
        return self.learning_rate * (1 + math.cos(math.pi * (progress - rising) / (1 - rising))) / 2

    def sampled(self, examples: int) -> int:
        """Architectures sampled for a batch of so many examples."""
        asked = self._value("architectures")
        return examples if asked == "example" else min(int(asked), examples)

    def resolved(self, *, conditional: bool = False, gated: bool = False, drawn: bool = False) -> SearchOptions:
        """These options with nothing left open.

        Args:
            conditional: whether gates look at the input.
            gated: whether channels have gates.
            drawn: whether a cost has to be drawn for each sampled architecture.

        Raises:
            ConfigError: the score function is asked for gates that look at the input, or an option is outside the
                range that the estimator gives it.
        """
        estimator = self.estimator
        if estimator == "auto":
            estimator = "gumbel" if conditional or gated else "score"
        if conditional and estimator == "score":
            raise ConfigError("gates that look at the input are learned by the estimator gumbel, got score")
        if self.noiseless and estimator == "score":
            raise ConfigError(f"the score function needs samples to the end, got noiseless {self.noiseless}")
        if conditional and self.architectures not in (None, "example"):
            raise ConfigError(f"gates that look at the input decide for each example, got {self.architectures}")
        if conditional and self.finetune:
            raise ConfigError(f"gates that look at the input leave nothing to fine-tune, got finetune {self.finetune}")
        defaults = DEFAULTS["score" if estimator == "score" else "conditional" if conditional else "gumbel"]
        if drawn:
            defaults = defaults | {"architectures": min(DRAWN, self.batch_size)}
        given = {name: value for name in defaults if (value := getattr(self, name)) is not None}
        left = self.epochs - 1 - round(given.get("warmup", defaults["warmup"]) * self.epochs)
        if self.finetune is None and round(defaults["finetune"] * self.epochs) > left:  # what a short run has room for
            given["finetune"] = max(0, left) / self.epochs
        return replace(self, estimator=estimator, **(defaults | given))

    def _value(self, name: str) -> Any:
        value = getattr(self, name)
        kind = "gumbel" if self.estimator in ("gumbel", "soft-gumbel") else "score"
        return DEFAULTS[kind][name] if value is None else value


WORDS: dict[str, tuple[str, ...]] = {
    name: get_args(hint) for name, hint in get_type_hints(SearchOptions).items() if get_origin(hint) is Literal
}
"""The words that an option takes, of options that take nothing else."""


def resolve_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ConfigError: there is no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device must be one that torch has here, got {name!r}") from error
    if device.type == "meta":
        raise ConfigError(f"device must be one that computes, got {name!r}")
    return device


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """The type of the forward pass; "auto" takes bfloat16 where the hardware computes in it."""
    if name == "auto":
        if device.type == "cuda":
            hardware = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            hardware = device.type == "cpu" and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        return torch.bfloat16 if hardware else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def _check(
    name: str, value: object, *, whole: bool = False, least: float | None = None, below: float | None = None
) -> None:
    kinds = (int,) if whole else (int, float)
    good = isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    if good and isinstance(value, int | float):
        good = (least is None or value >= least) and (below is None or value < below)
    if not good:
        bounds = [f">= {least}" if least is not None else "", f"< {below}" if below is not None else ""]
        kind = "a whole number" if whole else "a number"
        raise ConfigError(f"{name} must be {kind} {' and '.join(filter(None, bounds))}".rstrip() + f", got {value!r}")
