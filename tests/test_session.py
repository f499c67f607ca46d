"""A run's epochs: what each step is told, what a line of metrics says, and which batch norms are judged."""

from __future__ import annotations

import copy
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from small import stir, unsettled

import budgetnet as bn
from budgetnet.extraction import extract
from budgetnet.report.architecture import Architecture
from budgetnet.report.gate_figures import chances
from budgetnet.report.records import read_json
from budgetnet.runs import RunFolder
from budgetnet.selection import Candidate
from budgetnet.session import Session
from budgetnet.steering import Sums
from budgetnet.training import Learner

resnet = partial(bn.spaces.resnet, depth=8, channels=4, image_size=8, in_channels=1)
fabric = partial(bn.spaces.resnet_fabric, width=1, channels=4, image_size=8, in_channels=1)


def session(folder: Path, network: bn.SuperNetwork, images: int, **options: Any) -> Session:
    """A run on some of the digits, in batches of 64, under half of the network's MACs."""
    digits = bn.data.load("digits").subset(images, seed=0)
    bound = [bn.Budget.parse("macs<=50%").bind(network)]
    chosen = bn.SearchOptions(**{"precision": "float32", "batch_size": 64} | options)
    learner = Learner(network, bound, chosen, ignore=None, device=torch.device("cpu"), dtype=torch.float32)
    return Session(RunFolder(folder), digits, learner)


def lines(one: Session) -> list[dict[str, Any]]:
    """The one budget's part of each epoch's line, once all epochs are run."""
    while one.epoch < one.options.epochs:
        one.run_epoch(None)
    return [line["budgets"][0] for line in one.run.metrics()]


def test_a_moving_target_goes_back_to_its_start_with_each_epoch(tmp_path):
    """At its end it is the mean of the limit and of the costs of that epoch's three batches."""
    torch.manual_seed(0)
    one = session(tmp_path, resnet(), 192, target="moving", epochs=3, warmup=0, finetune=0, validate_every=3)
    for line in lines(one):
        assert line["target"] == pytest.approx((line["limit"] + 3 * line["sampled"]) / 4)
        assert line["sampled"] > 1.1 * line["limit"]


def test_a_stepped_target_falls_with_the_epochs_of_the_search(tmp_path):
    """Each epoch is one step, whose price rises by the excess over the target of that epoch."""
    torch.manual_seed(0)
    stepped = {"target": "stepped", "target_fall": 0.2, "target_every": 2, "proportional": 0.0, "integral": 1.0}
    one = session(tmp_path, resnet(), 64, epochs=9, warmup=0.1, finetune=0, validate_every=9, **stepped)
    full, limit, price = one.budgets[0].full, one.budgets[0].limit, 0.0
    for epoch, line in enumerate(lines(one)[1:]):
        shares = [max(0.5, 1 - 0.2 * (at // 2)) for at in (epoch, epoch + 1)]
        assert line["price"] == pytest.approx(price)
        assert line["target"] == pytest.approx(shares[1] * full)
        price = max(0.0, price + line["sampled"] / (shares[0] * full) - 1)
    assert price > 0
    assert shares[0] * full == limit


def test_seconds_within_an_epoch_are_in_its_checkpoints(tmp_path, monkeypatch):
    """The clock moves by 100 s a batch; a checkpoint is due after each."""
    one, seconds = session(tmp_path, fabric(), 192, epochs=1, warmup=0, finetune=0), [0.0]
    step, saved = one.learner.step, []

    def slow(*given, **told):
        step(*given, **told)
        seconds[0] += 100

    monkeypatch.setattr(one.learner, "step", slow)
    monkeypatch.setattr("budgetnet.session.time.monotonic", lambda: seconds[0])
    monkeypatch.setattr(RunFolder, "save_checkpoint", lambda self, tensors, state: saved.append(state["seconds"]))
    one.run_epoch(None)
    assert saved == [100, 200, 300, 300]


def test_activation_is_the_share_of_samples_in_which_a_gate_was_open(tmp_path):
    """Gates 0, 1, 2 are of edges; the sites have 2, 3 and 6 gates, three channels each but the last."""
    one = session(tmp_path, resnet(gates="both", granularity=3), 64)
    one.sums = Sums(samples=20, opened=[float(gate) for gate in range(14)])
    blocks = {f"g{gate}.0.block": gate / 20 for gate in range(3)}
    means = [(3 * 3 + 4) / 4, (3 * 5 + 3 * 6 + 2 * 7) / 8, (3 * (8 + 9 + 10 + 11 + 12) + 13) / 16]
    sites = {f"g{site}.0.block.hidden0": mean / 20 for site, mean in enumerate(means)}
    assert one.activation() == pytest.approx(blocks | sites)


def test_a_run_writes_which_gates_are_shared(tmp_path):
    network = resnet(depth=14, lock=True)
    one = session(tmp_path, network, 64)
    one.write_architecture(network.architecture("full"))
    written = Architecture.read(read_json(tmp_path / "architecture.json"))
    assert sum(map(len, chances(written).values())) == network.gate_count < sum(len(s.kept) for s in written.sites)


def test_as_many_batches_set_batch_norms_as_are_asked_for(tmp_path):
    """Three batches an epoch: eight are two epochs and two batches of a third."""
    network = stir(fabric(), 0)
    one = session(tmp_path, network, 192, recalibration=8)
    used = network.used(network.architecture("full"))
    one.settle(used)
    batches = [x for epoch in range(3) for x, _ in one.train.epoch(epoch)]
    assert unsettled(network, lambda network, x: network.run(x, used), batches[:8]) < 1e-4
    for other in (batches[:3], batches):
        assert unsettled(network, lambda network, x: network.run(x, used), other) > 1e-4


def test_what_is_chosen_was_judged_with_batch_norms_of_its_own_and_goes_on_with_them(tmp_path):
    network = stir(fabric(), 0)
    one = session(tmp_path, network, 256, recalibration=3, candidates=4)
    one.learner.begin_search()
    before = copy.deepcopy(network)
    one.choose()
    chosen = one.learner.chosen
    (candidate,) = (candidate for candidate in one.candidates if candidate["chosen"])
    stale = one.quality(one.predict(extract(before, chosen).eval()), one.validation)
    assert candidate["validation"] == pytest.approx(one.judge(chosen, afresh=False), rel=1e-4)
    assert candidate["validation"]["loss"] != pytest.approx(stale["loss"], rel=0.01)
    used, batches = network.used(chosen), [x for x, _ in islice(one.train.epoch(0), 3)]
    assert unsettled(network, lambda network, x: network.run(x, used), batches) < 1e-4
    assert unsettled(network, lambda network, x: network.run(x, used), batches[:2]) > 1e-4


def test_a_candidate_that_breaks_a_limit_when_measured_with_more_care_is_not_chosen(tmp_path, monkeypatch):
    """Then it is the best of the others."""
    asked: list[Candidate] = []

    def second(budgets, candidates, best, most):
        asked.append(candidates[best(candidates)])
        others = [one for one in candidates if one is not asked[0]]
        asked.append(others[best(others)])
        return {asked[0]: [1.1], asked[1]: [0.9]}

    monkeypatch.setattr("budgetnet.selection.confirmed", second)
    one = session(tmp_path, stir(fabric(), 0), 256, candidates=4)
    one.learner.begin_search()
    one.choose()
    assert torch.equal(one.learner.chosen, asked[1].kept)
    (chosen,) = (candidate for candidate in one.candidates if candidate["chosen"])
    assert chosen["validation"] == asked[1].quality
    assert chosen["validation"] != asked[0].quality


def test_during_the_search_the_most_probable_is_judged_with_batch_norms_of_its_own(tmp_path):
    one = session(tmp_path, stir(fabric(), 0), 128, epochs=1, warmup=0, finetune=0)
    one.run_epoch(None)
    (line,), one.epoch = one.run.metrics(), 0
    fresh, stale = (one.judge(one.current("search"), afresh=afresh) for afresh in (True, False))
    assert line["validation"] == pytest.approx(fresh)
    assert line["validation"]["loss"] != pytest.approx(stale["loss"], rel=0.01)
