"""How good an architecture is: quality on held-out data, with batch norm set by its own activations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from budgetnet.objectives import example_losses

Predict = Callable[[Tensor], Tensor]
Examples = Iterable[tuple[Tensor, Tensor]]


@torch.no_grad()
def evaluate(predict: Predict, examples: Examples, *, classes: int, ignore: int | None = None) -> dict[str, float]:
    """Loss and quality over all examples.

    Args:
        predict: `(B, C, H, W)` to logits, `(B, classes)` or `(B, classes, H, W)`.
        examples: batches of inputs and class indices, `(B,)` or `(B, H, W)`.
        classes: number of classes.
        ignore: class index left out, None for none.

    Returns:
        `{"loss", "accuracy"}`: mean cross-entropy in nats, share of right examples or pixels; for masks
        also `"mean_iou"`, the mean over classes that occur of intersection over union.
    """
    confusion = torch.zeros(classes, classes, dtype=torch.int64)  # row: truth, column: prediction
    loss = count = 0.0
    dense = False
    for x, y in examples:
        output = predict(x)
        loss += float(example_losses(output, y, ignore).sum())
        count += len(x)
        dense = y.ndim > 1
        guess = output.argmax(dim=1)
        valid = torch.ones_like(y, dtype=torch.bool) if ignore is None else y != ignore
        pairs = (y[valid] * classes + guess[valid]).cpu()
        confusion += torch.bincount(pairs, minlength=classes * classes).reshape(classes, classes)
    right = confusion.diagonal()
    quality = {"loss": loss / count, "accuracy": float(right.sum() / confusion.sum())}
    if dense:
        union = confusion.sum(dim=0) + confusion.sum(dim=1) - right
        quality["mean_iou"] = float((right[union > 0] / union[union > 0]).mean())
    return quality


@torch.no_grad()
def recalibrate(network: nn.Module, predict: Predict, examples: Examples) -> None:
    """Sets the running statistics of the batch norms to the mean over `examples`, changing no weight.

    What an architecture needs after the statistics of many architectures were mixed. Where an error comes between they
    are as they were before.

    Args:
        network: its batch norms are set; left in evaluation mode.
        predict: runs the network; only batch norms that it passes through are set.
        examples: batches `(x, y)`; y is not looked at.

    Source: Herrmann et al., section 4.1 (200 large batches at learning rate 0).
    """
    norms = [part for part in network.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, copy.deepcopy(norm.state_dict())) for norm in norms]
    network.train()
    for norm in norms:
        norm.momentum = None  # a cumulative mean
        norm.reset_running_stats()
    whole = False
    try:
        for x, _ in examples:
            predict(x)
        whole = True
    finally:
        for norm, (momentum, state) in zip(norms, before, strict=True):
            norm.momentum = momentum
            if not whole or norm.num_batches_tracked == 0:  # not passed through
                norm.load_state_dict(state)
        network.eval()
