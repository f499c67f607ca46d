"""From losses and costs to gradients: penalties, prices and estimators, on tensors alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from budgetnet.checks import at_least
from budgetnet.errors import ConfigError

BASELINES = ("leave-one-out", "batch-mean")
"""Those that compare the samples of a batch with each other."""

MOVING = ("moving", "exponential")
"""How a target follows the rates of the batches."""


def hinge(excess: Tensor) -> Tensor:
    """`max(0, C / limit - 1)` of `(B,)` excesses `C / limit - 1`: what is over the limit (BSN Eq. 2, normalised)."""
    return excess.clamp(min=0)


def squared(excess: Tensor) -> Tensor:
    """`(C / target - 1)^2`: the squared distance to a target, from either side (batch activation loss, Eq. 1)."""
    return excess**2


def batch_activation(rate: Tensor, target: float) -> Tensor:
    """`(t - mean(rate))^2`, a scalar: the distance of the whole batch to the target, however its gates share it.

    Its expectation over the gates is `(t - E[Q])^2 + Var(Q)`, `Q = mean(rate)`: the variance polarises them.

    Args:
        rate: `(B,)` cost of each sample as a share of the full network's: gates on over gates, or MACs over MACs.
        target: t, the share asked for, in [0, 1].

    Raises:
        ConfigError: rates of another shape or type, or a target outside its range.

    Source: batch activation gating, Eq. 1; with MACs `L_FLOPs` of section 3.4.
    """
    return squared(_excess(rate, target))


def const_quad(rate: Tensor, target: float) -> Tensor:
    """`max(0, mean(rate) - t)^2`, a scalar: `batch_activation` that lets a batch be cheaper than its target.

    Args:
        rate: `(B,)` cost of each sample as a share of the full network's.
        target: t, the largest share without a loss, in [0, 1].

    Raises:
        ConfigError: rates of another shape or type, or a target outside its range.

    Source: batch activation gating, Eq. 3. Differs: its Q is printed as a sum; here, as in Eq. 1, it is the mean.
    """
    return squared(hinge(_excess(rate, target)))


def per_gate(kept: Tensor, target: float | Tensor, *, at_least: Sequence[int] = ()) -> Tensor:
    """`mean_g (t_g - mean_b kept_bg)^2`, a scalar: asks each gate for its rate, whatever the others do.

    Args:
        kept: `(B, G)` gates in [0, 1].
        target: t in [0, 1] for all gates, or `(G,)` of them.
        at_least: columns of gates that may be on more often without a loss, `max(0, t_g - mean_b kept_bg)^2`: exits.

    Raises:
        ConfigError: gates or targets of another shape or type, or a target outside its range.

    Source: batch activation gating, section 3.1, L_G: the loss of ConvNet-AIG, arXiv:1711.11503; of exits section 5,
        whose target is one for all of them.
    """
    if kept.ndim != 2 or not kept.numel() or not kept.is_floating_point():
        raise ConfigError(f"kept must be (B, G) floats, B and G >= 1, got {tuple(kept.shape)} {kept.dtype}")
    if isinstance(target, Tensor):
        if target.shape != kept.shape[1:]:
            raise ConfigError(f"target must be a number or ({kept.shape[1]},) of them, got {tuple(target.shape)}")
        for extreme in target.aminmax():
            _check_share("target", float(extreme))
        target = target.to(kept)
    else:
        _check_share("target", target)
    excess = kept.mean(dim=0) - target
    bounded = torch.zeros_like(excess, dtype=torch.bool)
    bounded[list(at_least)] = True
    return squared(torch.where(bounded, excess.clamp(max=0), excess)).mean()


def score_function_loss(
    loss: Tensor, penalty: Tensor, log_prob: Tensor, *, baseline: str | float = "leave-one-out"
) -> Tensor:
    """Scalar whose gradient estimates that of `E[loss + penalty]`.

    The gradient with respect to the weights is that of the mean loss; with respect to the gates it
    is `mean_b (D_b - baseline_b) grad log_prob_b`, `D = loss + penalty`. The mean over the batch, not the sum:
    multiply the gates' learning rate by B to follow a reference that sums.

    Args:
        loss: `(B,)` task loss of each sampled architecture.
        penalty: `(B,)` cost penalty of the same samples; needs no gradient.
        log_prob: `(B,)` log-probability of the same samples' decisions.
        baseline: "leave-one-out", the mean of the other samples: unbiased, B >= 2; or "batch-mean", the
            mean of all, as printed: shrinks the gradient by (B - 1) / B, B >= 2; or a number that does
            not depend on these samples, such as the average over earlier batches: unbiased.

    Raises:
        ConfigError: the baseline is unknown, or has a single sample to compare with itself.

    Source: BSN, Eq. 7; the leave-one-out baseline is that of Kool et al., "Buy 4 REINFORCE samples".
    """
    total = (loss + penalty).detach()
    if isinstance(baseline, str):
        if baseline not in BASELINES:
            raise ConfigError(f"baseline must be {' or '.join(BASELINES)} or a number, got {baseline!r}")
        if len(total) < 2:
            raise ConfigError(f"a {baseline} baseline needs at least 2 architectures a batch, got 1")
        advantage = total - total.mean()
        if baseline == "leave-one-out":
            # D_b - mean of the others = (D_b - mean of all) B / (B - 1)
            advantage = advantage * len(total) / (len(total) - 1)
    else:
        advantage = total - baseline
    return (loss + advantage * log_prob).mean()


@dataclass
class Price:
    """Loss per unit of excess, found by dual ascent on the constraint, or held fixed.

    The dual variable rises while the mean cost is over its limit and falls while it is under it.
    A proportional term beside the integral one damps the swing of plain dual ascent.

    Attributes:
        proportional, integral: gains, in loss per unit of relative excess (and step); >= 0.
        fixed: the papers' constant lambda in place of all that, None to find the price.
        value: the price now.
        accumulated: the integral part of it.
        signed: whether both may fall below 0, as the multiplier of a target does while the cost is too low; else >= 0.

    Source: BSN, Eq. 2 for lambda; Stooke et al., arXiv:2007.03964, for the proportional-integral update.
    """

    proportional: float
    integral: float
    fixed: float | None = None
    value: float = 0.0
    accumulated: float = 0.0
    signed: bool = False

    def __post_init__(self) -> None:
        for name in ("proportional", "integral", "fixed"):
            gain = getattr(self, name)
            if gain is not None and not gain >= 0:
                raise ConfigError(f"{name} must be >= 0, got {gain}")
        if self.fixed is not None:
            self.value = self.fixed

    def update(self, excess: float) -> None:
        """Moves the price after a batch whose mean cost is `1 + excess` times the limit."""
        if self.fixed is None:
            least = -math.inf if self.signed else 0.0
            self.accumulated = max(least, self.accumulated + self.integral * excess)
            self.value = max(least, self.accumulated + self.proportional * excess)


def annealed(start: float, limit: float, progress: float) -> float:
    """The limit in force: from `start` down to `limit` in a straight line while `progress` goes from 0 to 1."""
    return max(limit, limit + (start - limit) * (1 - progress))


@dataclass(frozen=True)
class SteppedTarget:
    """A target that falls in steps: `max(target, start - fall * floor(epoch / every))`.

    Attributes:
        target: where it ends, a share of the full network's cost, in [0, 1].
        start: where it begins, in [target, 1].
        fall: the paper's a, how far each step falls, in (0, 1].
        every: the paper's k, epochs between two steps, >= 1.

    Raises:
        ConfigError: an attribute is outside its range.

    Source: batch activation gating, section S1.1, with its typical values.
    """

    target: float
    _: KW_ONLY
    start: float = 1.0
    fall: float = 0.05
    every: int = 5

    def __post_init__(self) -> None:
        _check_share("target", self.target)
        if not self.target <= self.start <= 1:
            raise ConfigError(f"start must lie between the target {self.target} and 1, got {self.start}")
        if not 0 < self.fall <= 1:
            raise ConfigError(f"fall must lie in (0, 1], got {self.fall}")
        at_least(1, every=self.every)

    def __call__(self, epoch: float) -> float:
        """The target at a position of `epoch` epochs, >= 0; a batch inside an epoch has a fraction."""
        _check_epoch(epoch)
        return max(self.target, self.start - self.fall * math.floor(epoch / self.every))


@dataclass
class MovingTarget:
    """A target that follows the batches of an epoch, and goes back to its start with the next.

    "moving": the mean of the start and of the epoch's rates; "exponential": `decay * before + (1 - decay) * rate`.

    Attributes:
        start: where each epoch begins, a share of the full network's cost, in [0, 1].
        kind: "moving" or "exponential".
        decay: of the exponential kind alone, in [0, 1).
        value: the target now; with `seen` what a checkpoint keeps.
        seen: batches of this epoch so far.

    Raises:
        ConfigError: an attribute is outside its range.

    Source: batch activation gating, section S1.2, which names both kinds; formulas and decay are ours.
    """

    start: float
    _: KW_ONLY
    kind: str = "moving"
    decay: float = 0.9
    value: float = field(init=False)
    seen: int = field(init=False)

    def __post_init__(self) -> None:
        _check_share("start", self.start)
        if self.kind not in MOVING:
            raise ConfigError(f"kind must be {' or '.join(MOVING)}, got {self.kind!r}")
        if not 0 <= self.decay < 1:
            raise ConfigError(f"decay must be >= 0 and < 1, got {self.decay}")
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Goes back to the start."""
        self.value, self.seen = self.start, 0

    def update(self, rate: float) -> None:
        """Follows a batch of this rate, >= 0; above 1, where gates themselves cost something, it counts as 1."""
        if not 0 <= rate < math.inf:
            raise ConfigError(f"a batch's rate must be a number >= 0, got {rate}")
        rate, self.seen = min(1.0, rate), self.seen + 1
        if self.kind == "moving":
            self.value += (rate - self.value) / (self.seen + 1)  # the start is one of the values
        else:
            self.value = self.decay * self.value + (1 - self.decay) * rate


def gate_weight_decay(gates: int) -> float:
    """Weight decay of the gates' logits, `20 / G * 1e-4`, so that it pulls as much on few gates as on many.

    Decay adds up over the gates, and draws each to p = 1/2 (Eq. 2); the variance that polarises them is an average.

    Args:
        gates: G, >= 1.

    Raises:
        ConfigError: there are no gates.

    Source: batch activation gating, section 4.1; the reason is in section 3.2.
    """
    at_least(1, gates=gates)
    return 20 / gates * 1e-4


def per_architecture(loss: Tensor, architectures: int) -> Tensor:
    """Means `(B,)` losses of examples over the contiguous slices that K architectures serve, `(K,)`.

    The slices are those of `SuperNetwork.forward`: the first B mod K are one example longer.
    """
    if architectures == len(loss):
        return loss
    return torch.stack([part.mean() for part in loss.tensor_split(architectures)])


def example_losses(output: Tensor, target: Tensor, ignore: int | None) -> Tensor:
    """Cross-entropy of each example, `(B,)`; of a mask, the mean over its pixels that are not `ignore`.

    Args:
        output: `(B, classes)` or `(B, classes, H, W)` logits.
        target: `(B,)` or `(B, H, W)` class indices.
        ignore: index left out, None for none.
    """
    absent = -100 if ignore is None else ignore  # -100: torch's "no class"
    losses = F.cross_entropy(output.float(), target, reduction="none", ignore_index=absent)
    if target.ndim == 1:
        return losses
    counted = (target != absent).flatten(1).sum(dim=1).clamp(min=1)
    return losses.flatten(1).sum(dim=1) / counted


def distillation(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """`T^2 KL(softmax(teacher / T) || softmax(student / T))` of each example, `(B,)` nats; of a mask, its pixels' mean.

    T^2 keeps the gradient's scale whatever T is.

    Args:
        student: `(B, classes)` or `(B, classes, H, W)` logits.
        teacher: logits of the same shape; they get no gradient.
        temperature: T, > 0; a higher one shows more of what the teacher takes for unlikely.

    Raises:
        ConfigError: the shapes differ or are others, or the temperature is outside its range.

    Source: Hinton et al., arXiv:1503.02531, section 2. Differs: the divergence, where they take the
        cross-entropy; the gradients agree.
    """
    if student.ndim not in (2, 4) or student.shape != teacher.shape:
        expected = "student and teacher must both be (B, classes) or (B, classes, H, W)"
        raise ConfigError(f"{expected}, got {tuple(student.shape)} and {tuple(teacher.shape)}")
    if not 0 < temperature < math.inf:
        raise ConfigError(f"temperature must be a number > 0, got {temperature}")
    ours = F.log_softmax(student.float() / temperature, dim=1)
    theirs = F.log_softmax(teacher.detach().float() / temperature, dim=1)
    divergence = temperature**2 * (theirs.exp() * (theirs - ours)).sum(dim=1)
    return divergence if divergence.ndim == 1 else divergence.mean(dim=(1, 2))


def _excess(rate: Tensor, target: float) -> Tensor:
    """The mean of `(B,)` rates less their target, a scalar."""
    if rate.ndim != 1 or not rate.numel() or not rate.is_floating_point():
        raise ConfigError(f"rate must be (B,) floats, B >= 1, got {tuple(rate.shape)} {rate.dtype}")
    _check_share("target", target)
    return rate.mean() - target


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} must lie in [0, 1], got {value}")


def _check_epoch(epoch: float) -> None:
    if not 0 <= epoch < math.inf:
        raise ConfigError(f"epoch must be a number >= 0, got {epoch}")
