"""Costs that a call tells: exact ones that are remembered, and random ones, of which training draws values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice, repeat

import torch
from torch import Tensor

from budgetnet.costs.latency import widely
from budgetnet.costs.linear_fit import LinearFit
from budgetnet.costs.measured import LearningModel, Measured
from budgetnet.costs.model import CostModel
from budgetnet.supernet import SuperNetwork

Value = Callable[[Tensor | None], Tensor]
"""The cost of one architecture: of `(b, C, H, W)` examples where it depends on them, `(n,)` float64 values."""
Examples = Callable[[], Iterable[Tensor]]
"""Goes once over batches of examples, `(b, C, H, W)`."""

FIRST, JUDGED = 128, 8
"""Architectures of all sizes that predictions are fitted to before a search, and those that judge them."""
CALLS = 32
"""Calls of which a measured cost is the mean, where calls differ."""
LOOKS = 3
"""Times that what is reported is measured, an odd number: the middle one counts."""
REMEMBERED = 2**16
"""Architectures whose exact cost is remembered."""


class ExactModel(CostModel):
    """A cost of the architecture alone, the same each time: each architecture is asked for once.

    Args:
        network: whose architectures are priced.
        at: the cost of an architecture, `(U,)` bits as `paid_for` gives them.
        unit: what the numbers count.
    """

    monotone = False

    def __init__(self, network: SuperNetwork, at: Callable[[Tensor], Value], unit: str) -> None:
        self.network, self.unit = network, unit
        self.value = remembered(at)

    def __call__(self, used: Tensor) -> Tensor:
        """Maps `(B, U)` used units to `(B,)` float64 costs; 0 where nothing is used."""
        values = [self.value(row) if bool(row.any()) else 0.0 for row in paid_for(self.network, used)]
        return torch.tensor(values, dtype=torch.float64, device=used.device)


class DrawnModel(LearningModel):
    """A cost that is a random variable, or takes its time to be seen.

    Training draws one value for each sampled architecture and step: the objective is the expectation over the
    architectures, over the cost and, where it depends on them, over the examples (BSN, appendix, "Stochastic costs").
    So an "at most" budget pays for `E[max(0, C / limit - 1)]`, which is more than `max(0, E[C] / limit - 1)` where C
    lies on both sides of the limit: costs that vary much are kept further below it.

    All else goes by what a linear fit to the values seen so far predicts, those of `begin` first, and what is handed
    over by `measure`.

    Args:
        network: whose architectures are priced.
        at: the cost of an architecture, `(U,)` bits as `paid_for` gives them.
        unit: what the numbers count.
        noisy: whether equal calls differ; where they do not, and no examples are read, values are remembered.
        examples: batches to measure on, where the cost depends on them.

    Attributes:
        full: of the full network, as it was measured.
        error: median error of predictions for networks they were not fitted to, a share of the networks' mean cost.
        each_epoch: architectures to measure after each epoch: none, each step has drawn some.
    """

    monotone, each_epoch = False, 0

    def __init__(
        self,
        network: SuperNetwork,
        at: Callable[[Tensor], Value],
        unit: str,
        *,
        noisy: bool,
        examples: Examples | None = None,
    ) -> None:
        self.network, self.at, self.unit, self.noisy, self.examples = network, at, unit, noisy, examples
        self.remembered = None if noisy or examples else remembered(at)
        self.fit = LinearFit(network.units)

    def begin(self) -> None:
        """Draws the costs of architectures of all sizes, which predictions are fitted to and judged by."""
        network, inputs = self.network, self._batches()
        kept = widely(network, FIRST + JUDGED, torch.Generator().manual_seed(0))
        self._take_up(paid_for(network, network.used(kept[:FIRST])), list(islice(inputs, FIRST)))
        self.full = self.measure(kept[:1])[0].value
        self.refit(kept[FIRST:])

    def __call__(self, used: Tensor) -> Tensor:
        """Maps `(B, U)` used units to `(B,)` float64 predictions; 0 where nothing is used."""
        bits = paid_for(self.network, used)
        return (self.fit(bits) * bits.any(dim=1)).to(used.device)

    def draw(self, used: Tensor, x: Tensor | None) -> Tensor:
        """One value of the cost of each of `(B, U)` architectures, `(B,)` float64.

        Args:
            used: in {0, 1}.
            x: `(examples, C, H, W)`, of which each architecture serves its slice as in `SuperNetwork.forward`.
        """
        bits = paid_for(self.network, used)
        slices = [None] * len(bits) if x is None else x.tensor_split(len(bits))
        return self._take_up(bits, slices).to(used.device)

    def measure(self, kept: Tensor) -> list[Measured]:
        """Mean costs of `(n, G)` architectures, with the means that two standard errors less and more would be.

        Over repeated calls where they differ, over the batches of examples where there are such, in turns.
        """
        bits = paid_for(self.network, self.network.used(kept))
        if self.remembered:
            return [Measured(value, value, value) for value in map(self.remembered, bits)]
        ways = [self.at(row) for row in bits]
        seen: list[list[Tensor]] = [[] for _ in ways]
        sizes = []
        for x in self._inputs():
            sizes.append(1.0 if x is None else float(len(x)))
            for way, values in zip(ways, seen, strict=True):
                values.append(way(x).mean())
        shares = torch.tensor(sizes, dtype=torch.float64) / sum(sizes)
        found = []
        for values in seen:
            means = torch.stack(values)
            value = float(shares @ means)
            apart = 2 * float(means.std()) / len(means) ** 0.5 if len(means) > 1 else 0.0
            found.append(Measured(value, value - apart, value + apart))
        return found

    def report(self, kept: Tensor) -> Measured:
        """The mean cost of an architecture, `(1, G)`, the middle one of several."""
        return Measured.middle([self.measure(kept)[0] for _ in range(LOOKS)])

    def refit(self, kept: Tensor) -> None:
        """Measures `(n, G)` architectures, which connect input and output; judges predictions by them, and learns."""
        bits = paid_for(self.network, self.network.used(kept))
        seen = torch.tensor([one.value for one in self.measure(kept)], dtype=torch.float64)
        apart, mean = (self.fit(bits) - seen).abs().median(), seen.mean()
        self.error = float(apart / mean) if mean > 0 else float(apart)
        self.fit.add(bits, seen, weight=1 if self.remembered else CALLS)

    @property
    def notes(self) -> dict[str, str]:
        """How good the predictions are."""
        return {"fit": f"predicted by a linear fit to {self.fit.count} values, R^2 {self.fit.r_squared:.3f}"}

    def save(self) -> None:
        """Does nothing: what was seen is in the checkpoint."""

    def _take_up(self, bits: Tensor, inputs: Sequence[Tensor | None]) -> Tensor:
        """Draws a value for each of `(B, U)` architectures, on its own examples, and learns from all that connect."""
        values, live = torch.zeros(len(bits), dtype=torch.float64), bits.any(dim=1)
        for place in live.nonzero().flatten().tolist():
            row, x = bits[place], inputs[place]
            values[place] = self.remembered(row) if self.remembered else mean(self.at(row)(x))
        self.fit.add(bits[live], values[live])
        return values

    def _inputs(self) -> Iterator[Tensor | None]:
        """What the calls of a measurement are made on."""
        if self.examples is not None and not self.noisy:
            return (self._moved(x) for x in islice(self.examples(), CALLS))
        return islice(self._batches(), CALLS if self.noisy else 1)

    def _batches(self) -> Iterator[Tensor | None]:
        """Batches of examples over and over, None where the cost does not depend on them."""
        if self.examples is None:
            yield from repeat(None)
        while self.examples is not None:
            yield from map(self._moved, self.examples())

    def _moved(self, x: Tensor) -> Tensor:
        return x.to(self.network.gates.values.device)


def mean(values: Tensor) -> float:
    """Of `(n,)` values, of which there mostly is one."""
    return float(values.mean() if len(values) > 1 else values)


def paid_for(network: SuperNetwork, used: Tensor) -> Tensor:
    """Used edges and the open groups inside them, `(B, U)` bool on the CPU, of `(B, U)` used units in {0, 1}."""
    bits = used.detach().to("cpu", torch.bool, copy=True)
    for site in network.sites:
        bits[:, slice(*site.units)] &= bits[:, [site.edge]]
    return bits


def remembered(at: Callable[[Tensor], Value]) -> Callable[[Tensor], float]:
    """The cost of an architecture, `(U,)` bits, that is asked for once."""

    @lru_cache(REMEMBERED)
    def known(bits: bytes) -> float:
        return float(at(torch.frombuffer(bytearray(bits), dtype=torch.bool))(None)[0])

    return lambda bits: known(bits.numpy().tobytes())
