"""From losses and costs to gradients: penalties, prices and estimators, on tensors alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from budgetnet.errors import ConfigError

BASELINES = ("leave-one-out", "batch-mean")
"""Those that compare the samples of a batch with each other."""


def hinge(excess: Tensor) -> Tensor:
    """`max(0, C / limit - 1)` of `(B,)` excesses `C / limit - 1`: what is over the limit (BSN Eq. 2, normalised)."""
    return excess.clamp(min=0)


def squared(excess: Tensor) -> Tensor:
    """`(C / target - 1)^2`: the squared distance to a target, from either side (batch activation loss, Eq. 1)."""
    return excess**2


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
        accumulated: the integral part of it, >= 0.

    Source: BSN, Eq. 2 for lambda; Stooke et al., arXiv:2007.03964, for the proportional-integral update.
    """

    proportional: float = 10.0
    integral: float = 0.05
    fixed: float | None = None
    value: float = 0.0
    accumulated: float = 0.0

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
            self.accumulated = max(0.0, self.accumulated + self.integral * excess)
            self.value = max(0.0, self.accumulated + self.proportional * excess)


def annealed(start: float, limit: float, progress: float) -> float:
    """The limit in force: from `start` down to `limit` in a straight line while `progress` goes from 0 to 1."""
    return max(limit, limit + (start - limit) * (1 - progress))


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
