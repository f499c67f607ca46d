"""Where skipping pays, on a machine whose clock follows the work alone."""

from __future__ import annotations

import time
from collections import Counter

import pytest
import torch

from budgetnet import spaces
from budgetnet.conditional import conditional
from budgetnet.conditional.bodies import Body
from budgetnet.conditional.branches import Limits

GATHERING, CUTTING = {2: 0.1, 4: 0.25, 8: 0.6}, {2: 0.3, 4: 0.05, 8: 0.45}
"""What each way takes beside its share of the work, in dense times, on bodies of so many groups."""


@pytest.mark.parametrize("batch", [1, 8])
def test_skipping_pays_up_to_the_share_at_which_it_takes_as_long(batch, monkeypatch):
    """`share + overhead = 1`; of a batch of one there are no rows to gather, so their guess stays."""
    now, calls, run = 0, Counter(), Body.run

    def timed(self, x, pattern, *more):
        nonlocal now
        share = self.share(pattern) * len(x) / batch
        share += GATHERING[self.groups] * (len(x) < batch) + CUTTING[self.groups] * (pattern != self.full)
        way = (self, len(x), pattern)
        now += round(1e6 * (share + 10 * (calls[way] < 2)))  # the first two warm up
        calls[way] += 1
        return run(self, x, pattern, *more)

    torch.manual_seed(0)
    options = {"depth": 8, "channels": 4, "image_size": 8, "in_channels": 1, "gates": "both", "granularity": 2}
    plain = conditional(spaces.resnet(**options, conditional=True).eval())
    with monkeypatch.context() as patch:
        patch.setattr(Body, "run", timed)
        for clock in ("thread_time_ns", "perf_counter_ns"):
            patch.setattr(time, clock, lambda: now)
        table = plain.tune(torch.randn(batch, 1, 8, 8), repeats=1)
    assert [edge.body.groups for edge in plain.conditional_branches] == [2, 4, 8]
    for edge in plain.conditional_branches:
        gather, cut = GATHERING[edge.body.groups], CUTTING[edge.body.groups]
        rows = (1 - gather, gather) if batch > 1 else Limits()[:2]
        assert edge.limits_at(batch) == pytest.approx(Limits(*rows, 1 - cut, cut), abs=1e-5)
        assert table[edge.name] == {str(batch): edge.limits_at(batch)._asdict()}
