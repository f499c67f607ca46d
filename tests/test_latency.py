"""Latency as a cost: what is timed is the exported network, the table predicts it, and limits hold as measured."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from clock import Clock
from torch import Tensor, nn

import budgetnet as bn
from budgetnet import cli, timing
from budgetnet.apart import Apart, onnx_session
from budgetnet.assembly import Assembler
from budgetnet.budgets import _limit, check_reachable, cost_name, parse_cost
from budgetnet.cli.measure import then_of
from budgetnet.costs import Latency, MACs, stopwatch
from budgetnet.costs.channel_time import channel_time, counts_key, openings
from budgetnet.costs.latency import NETWORKS, LatencyModel, widely
from budgetnet.costs.measured import Measured, MeasuredModel
from budgetnet.costs.stopwatch import Stopwatch
from budgetnet.costs.timetable import Setting, Timetable, Whole, fitted
from budgetnet.errors import ConfigError, FileError, UnreachableBudget
from budgetnet.export import export
from budgetnet.extraction import extract, fold_batch_norm
from budgetnet.onnx_pieces import Piece, Pieces
from budgetnet.runs import RunFolder
from budgetnet.selection import Candidate, choose, confirmed, measured_to_fit
from budgetnet.steering import Steering
from budgetnet.timing import Timing

SPACES: dict[str, Callable[[], bn.SuperNetwork]] = {
    "fabric": lambda: bn.spaces.resnet_fabric(width=2, channels=4, image_size=8),
    "conv_fabric": lambda: bn.spaces.conv_fabric(width=2, channels=4, image_size=8),
    "channels": lambda: bn.spaces.resnet(depth=8, channels=8, image_size=8),
    "ends": lambda: bn.spaces.resnet(depth=8, channels=8, image_size=8, gates="both", granularity=4, where="ends"),
    "mobilenet": lambda: bn.spaces.mobilenet_v2(),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", list(SPACES))
def test_what_is_timed_computes_what_the_extracted_network_computes(name: str):
    torch.manual_seed(0)
    space = SPACES[name]().eval()
    assembler = Assembler(space, runtime="onnxruntime", threads=1, batch=2, device="cpu")
    x = torch.randn(2, *space.input_shape)
    for kept in widely(space, 5, generator()):
        session = onnx_session(assembler.onnx_model(kept[None]).SerializeToString(), 1)
        expected = extract(space, kept[None])(x)
        assert torch.allclose(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), expected, atol=1e-4)


@pytest.mark.parametrize("name", ["fabric", "ends"])
def test_what_is_timed_is_the_graph_of_the_exported_file(name: str, tmp_path: Path):
    """Of a network that was trained in channels last, too."""
    torch.manual_seed(0)
    space = SPACES[name]().eval()
    for module in space.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.bias)  # a bias of zeros is left out of a file
    kept = widely(space, 3, generator())[2:]
    assembler = Assembler(space, runtime="onnxruntime", threads=1, batch=1, device="cpu")
    plain = fold_batch_norm(extract(space, kept)).to(memory_format=torch.channels_last)
    file = onnx.load(str(export(plain, tmp_path / "network.onnx", torch.zeros(1, *space.input_shape))))
    count = [Counter(node.op_type for node in model.graph.node) for model in (assembler.onnx_model(kept), file)]
    assert count[0] == count[1]
    assert count[1]["Conv"] > 3


def test_layers_of_torch_are_exported_once_in_a_process_and_others_each_time(monkeypatch):
    """Another class of the same name may compute something else."""
    exported, before = [], Pieces.exported

    def counted(self: Pieces) -> list[Piece]:
        exported.append(len(self.parts))
        return before(self)

    monkeypatch.setattr(Pieces, "exported", counted)
    monkeypatch.setattr(Assembler, "written", {})
    x = torch.randn(1, 3, 4, 4)
    for factor in (2.0, 3.0):

        class Times(nn.Module):
            by = factor  # of the class: its printed form tells nothing of it

            def forward(self, x: Tensor) -> Tensor:
                return x * self.by

        parts = [("x", "a", nn.Conv2d(3, 3, 1)), ("a", "b", Times()), ("b", "y", nn.Conv2d(3, 3, 3, padding=1))]
        edges = [bn.Edge(start=start, end=end, module=module) for start, end, module in parts]
        space = bn.SuperNetwork(edges, input_shape=(3, 4, 4)).eval()
        kept = space.architecture("full")
        model = Assembler(space, runtime="onnxruntime", threads=1, batch=1, device="cpu").onnx_model(kept)
        (found,) = onnx_session(model.SerializeToString(), 1).run(None, {"x": x.numpy()})
        assert torch.allclose(torch.from_numpy(found), extract(space, kept)(x), atol=1e-5)
    assert exported == [4, 1]  # with the yardstick
    assert len(Assembler.written) == 3
    monkeypatch.setattr("budgetnet.assembly.HELD", 0)
    monkeypatch.setattr(Assembler, "written", {})
    Assembler(space, runtime="onnxruntime", threads=1, batch=1, device="cpu")
    assert not Assembler.written


@pytest.mark.parametrize("name", ["fabric", "channels", "ends"])
@pytest.mark.usefixtures("clocked")
def test_prediction_is_exact_where_times_add_up(name: str):
    torch.manual_seed(0)
    space = SPACES[name]().eval()
    budget = bn.Budget(Latency(), at_most="50%").bind(space)
    model = budget.model
    assert isinstance(model, LatencyModel)
    kept = widely(space, 40, generator(7))
    seen = torch.tensor([one.value for one in model.measure(kept)], dtype=torch.float64)
    assert torch.allclose(model(space.used(kept)), seen, rtol=2e-3)
    assert model.error < 2e-3
    assert model.full == pytest.approx(float(seen[0]))
    assert model.measure(budget.cheapest(space))[0].value <= float(seen.min())


@pytest.mark.usefixtures("clocked")
def test_what_is_measured_corrects_the_prediction():
    torch.manual_seed(0)
    space = SPACES["fabric"]().eval()
    model = Latency().bind(space)
    kept = widely(space, 60, generator(3))[1:]
    truth = Clock.whole
    before = float(model(space.used(kept[-1:]))[0])
    try:
        Clock.whole = lambda self, kept: 2 * truth(self, kept)  # type: ignore[method-assign]
        model.refit(kept[:50])
        assert model.error == pytest.approx(0.5, abs=0.01)  # judged before it knew them
        after = float(model(space.used(kept[-1:]))[0])
    finally:
        Clock.whole = truth  # type: ignore[method-assign]
    assert 1.15 * before < after < 2 * before  # half of what is known is as it was


@pytest.mark.usefixtures("clocked")
def test_the_gradient_is_the_trend_of_what_was_measured():
    space = SPACES["channels"]().eval()
    model = Latency().bind(space)
    used = space.used(space.architecture("full")).requires_grad_()
    (slope,) = torch.autograd.grad(model(used).sum(), used)
    macs = MACs(additions=False).bind(space)
    again = used.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(macs(again).sum() * 1.5e-6, again)
    groups = slice(len(space.graph.edges), None)
    assert torch.allclose(slope[0, groups], expected[0, groups].to(slope), rtol=0.02)
    assert (slope[0, groups] > 0).all()


def test_times_between_numbers_of_channels_are_interpolated():
    space = bn.spaces.resnet(depth=8, channels=8, image_size=8)
    edge, site = next(iter(MACs().bind(space).channels.items()))
    stairs = {"1": 1.0, "4": 1.0, "5": 3.0, "8": 3.0}
    inside = channel_time(site, stairs)
    used = torch.zeros(5, space.units)
    for row, count in enumerate((1, 2, 4, 5, 8)):
        used[row, site.units[0] : site.units[0] + count] = 1
    assert inside(used).tolist() == pytest.approx([1.0, 1.0, 1.0, 3.0, 3.0], rel=1e-12)
    assert inside.scaled(2.0)(used).tolist() == pytest.approx([2.0, 2.0, 2.0, 6.0, 6.0], rel=1e-12)
    openings_of = {counts_key(bits, site) for bits in openings(site)}
    assert openings_of == {str(n) for n in range(1, 9)}
    assert edge in range(len(space.graph.edges))


def test_the_fit_finds_the_weights_and_its_error_is_that_of_leaving_out():
    random = np.random.default_rng(0)
    parts, weights = random.random((60, 4)), np.array([0.3, 1.0, 1.4, 0.8, 1.1])
    seen = weights[0] + parts @ weights[1:]
    found, error = fitted(parts, seen)
    assert np.allclose(found, weights, rtol=1e-2)
    assert error < 2e-3
    noisy = seen * random.lognormal(sigma=0.05, size=60)
    _, error = fitted(parts, noisy)
    apart = []
    for row in range(60):
        rest = np.arange(60) != row
        guess, _ = fitted(parts[rest], noisy[rest])
        apart.append(abs((guess[0] + parts[row] @ guess[1:]) / noisy[row] - 1))
    assert error == pytest.approx(float(np.median(apart)), rel=0.25)


def test_a_table_is_kept_in_a_file(tmp_path: Path):
    setting = Setting.here("onnxruntime", 1, 1, "cpu")
    whole = Whole("fabric", {"conv": 0.25}, 0.7)
    table = Timetable(setting, 0.5, {"conv": {"": 0.25}, "block": {"3": 0.1}}, [whole])
    file = tmp_path / "times.json"
    table.save(file)
    again = Timetable.load(file, setting)
    assert (again.yardstick, again.times, again.networks) == (table.yardstick, table.times, table.networks)


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda content: content.update(threads=4), "holds times for threads 4, but here it is 1"),
        (lambda content: content.update(processor="Abacus"), "holds times for processor Abacus"),
        (lambda content: content.update(processor=7), "must hold times of modules .* a processor of 7"),
        (lambda content: content.update(format="other"), "must hold times of modules .* format 'other'"),
        (lambda content: content.pop("times_ms"), "must hold times of modules .* 'times_ms'"),
        (lambda content: content["times_ms"].update(conv={"": -1}), "a time of -1"),
        (lambda content: content["times_ms"].update(conv=3), "must hold times of modules"),
        (lambda content: content.update(networks=[{}]), "must hold times of modules"),
        (lambda content: content.update(yardstick_ms=0), "a yardstick of 0 ms"),
        (lambda content: content.update(yardstick_ms="x"), "a time of 'x'"),
        (lambda content: content["times_ms"].update(conv={"3,x": 1}), "'3,x' as numbers of open channels"),
        (lambda content: content.update(networks=[{"space": "", "parts_ms": {}, "ms": 0}]), "a network of 0 ms"),
    ],
)
def test_a_file_that_is_no_table_of_this_machine_is_refused(spoil, line: str, tmp_path: Path):
    setting = Setting.here("onnxruntime", 1, 1, "cpu")
    file = tmp_path / "times.json"
    Timetable(setting, 0.5, {"conv": {"": 0.25}}).save(file)
    content = json.loads(file.read_text())
    spoil(content)
    file.write_text(json.dumps(content))
    with pytest.raises(FileError, match=line):
        Timetable.load(file, setting)
    file.write_text("{")
    with pytest.raises(FileError, match="must hold times of modules"):
        Timetable.load(file, setting)


@pytest.mark.usefixtures("clocked")
def test_a_table_spares_measuring_again_and_scales_with_the_machine(tmp_path: Path, monkeypatch):
    space = SPACES["fabric"]().eval()
    cost = Latency(table=str(tmp_path / "times.json"))
    first = cost.bind(space)
    asked: list[int] = []
    before = Assembler.times

    def counted(self: Assembler, ways: Sequence[float], calls: int, seconds: float = 0.0) -> list[Timing]:
        asked.append(len(ways))
        return before(self, ways, calls)

    monkeypatch.setattr(Assembler, "times", counted)
    again = cost.bind(space)
    assert asked == [3, 6]  # the full network, looked at, then its three builds and the yardsticks
    used = space.used(widely(space, 8, generator()))
    assert torch.allclose(first(used), again(used))
    assert again.full == first.full
    monkeypatch.setattr(Assembler, "yardstick", lambda self: 2.0)
    monkeypatch.setattr(Assembler, "times", lambda *given: [Timing(2 * one.calls, 0.0) for one in before(*given)])
    monkeypatch.setattr(Assembler, "yardstick", lambda self: 1.0)
    slow = cost.bind(space)
    assert slow.full == pytest.approx(2 * first.full)  # percents are of today's full network, as candidates are
    assert torch.allclose(slow(used), 2 * first(used))
    assert "2.00 times as slow" in slow.notes["slower"]


@pytest.mark.usefixtures("clocked")
def test_a_run_that_goes_on_counts_in_the_milliseconds_it_began_with(monkeypatch):
    """Where the machine is twice as slow by then: predictions, candidates and what is reported."""
    torch.manual_seed(0)
    space, before = SPACES["fabric"](), Assembler.times
    options = bn.SearchOptions(epochs=3)
    first = Steering(space, [bn.Budget(Latency(), at_most="60%").bind(space)], options)
    monkeypatch.setattr(Assembler, "times", lambda *given: [Timing(2 * one.calls, 0.0) for one in before(*given)])
    again = Steering(space, [bn.Budget(Latency(), at_most="60%").bind(space)], options)
    models = [each.budgets[0].model for each in (first, again)]
    assert models[1].full == pytest.approx(2 * models[0].full)
    again.load_state(*first.state())
    kept = widely(space, 3, generator())
    seen = [found.value for found in models[1].measure(kept)]
    monkeypatch.setattr(Assembler, "times", before)
    assert seen == pytest.approx([found.value for found in models[0].measure(kept)])
    assert again.budgets[0].limit == first.budgets[0].limit
    assert models[1].watch.took == pytest.approx(models[0].watch.took)
    tensors, state = first.state()
    with pytest.raises(FileError, match="timings of 1 budgets, got 0"):
        again.load_state(tensors, {**state, "timed": []})
    with pytest.raises(FileError, match="milliseconds must be > 0, got -1"):
        again.load_state(tensors, {**state, "timed": [{**state["timed"][0], "rest": -1}]})


@pytest.mark.usefixtures("clocked")
def test_a_table_is_made_by_measuring_too(tmp_path: Path):
    space, file = SPACES["fabric"]().eval(), tmp_path / "times.json"
    cost = parse_cost(f"latency[table={file}]")
    kept = widely(space, 2, generator())[1:]
    assert cost.measured(space, kept).value == pytest.approx(Latency().measured(space, kept).value)
    assert len(Timetable.load(file, Setting.here("onnxruntime", 1, 1, "cpu")).networks) == 48
    content = json.loads(file.read_text())
    content["networks"][3]["parts_ms"].popitem()
    file.write_text(json.dumps(content))
    with pytest.raises(FileError, match="must have all parts of the networks it knows, lacks"):
        cost.bind(space)


@pytest.mark.parametrize("runtime", ["torch", "compiled"])
def test_networks_are_timed_as_they_are_handed_over_however_they_learned(runtime: str, monkeypatch):
    """While it learns a network's weights lie channels last; what is timed before and after has one layout."""
    seen: list[list[bool]] = []

    def looked(module: nn.Module, **_: object) -> nn.Module:
        seen.append([value.is_contiguous() for value in module.parameters() if value.ndim == 4])
        return module

    monkeypatch.setattr(torch, "compile", looked)
    monkeypatch.setattr(copy, "deepcopy", lambda value, *_, own=copy.deepcopy: own(value))
    space = bn.spaces.resnet_fabric(width=1, channels=16, image_size=8)
    space.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assembler = Assembler(space.eval(), runtime=runtime, threads=1, batch=1, device="cpu")
    if runtime == "torch":
        monkeypatch.setattr(nn.Module, "eval", lambda self: looked(self.train(False)))
    assembler.whole(space.architecture("full"))
    assert seen
    assert all(seen[-1])


def test_threads_and_batch_are_those_that_were_asked_for(monkeypatch):
    space = bn.spaces.resnet_fabric(width=1, channels=4, image_size=8).eval()
    given: list[tuple[int, tuple[int, ...]]] = []

    class Session:
        def __init__(self, threads: int) -> None:
            self.threads = threads

        def run(self, _: None, feed: dict[str, np.ndarray]) -> None:
            given.append((self.threads, feed["x"].shape))

    monkeypatch.setattr(Assembler, "_export", lambda self: None)
    monkeypatch.setattr(Assembler, "_model", lambda *_: SimpleNamespace(SerializeToString=bytes))
    monkeypatch.setattr("budgetnet.assembly.onnx_session", lambda model, threads: Session(threads))
    Assembler(space, runtime="onnxruntime", threads=3, batch=5, device="cpu").whole(space.architecture("full"))()
    assert given == [(3, (5, 3, 8, 8))]
    seen: list[tuple[int, tuple[int, ...]]] = []
    monkeypatch.setattr(
        "budgetnet.assembly.extract",
        lambda *_: Seen(lambda x: seen.append((torch.get_num_threads(), tuple(x.shape)))),
    )
    monkeypatch.setattr("budgetnet.assembly.interleaved", lambda ways, **_: [way() for way in ways])
    assembler = Assembler(space, runtime="torch", threads=2, batch=7, device="cpu")
    assembler.times([assembler.whole(space.architecture("full"))], 1)
    assert set(seen) == {(2, (7, 3, 8, 8))}
    assert torch.get_num_threads() == 1


class Seen(nn.Module):
    """Tells a function of what it is given."""

    def __init__(self, tell: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.tell = tell

    def forward(self, x: Tensor) -> Tensor:
        self.tell(x)
        return x


@pytest.mark.parametrize("cost", [Latency(runtime="compiled"), Latency(runtime="torch", batch=10**12)])
def test_what_a_runtime_cannot_do_is_told_in_one_line(cost: Latency, monkeypatch):
    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("no C++ compiler\nwas found")

    monkeypatch.setattr(torch, "compile", lambda module: refused)
    space = bn.spaces.resnet_fabric(width=1, channels=4, image_size=8).eval()
    line = f"{cost.runtime} cannot run resnet_fabric, batch {cost.batch}: RuntimeError: [^\n]*$"
    with pytest.raises(ConfigError, match=line):
        cost.measured(space, space.architecture("full"))


@pytest.mark.usefixtures("clocked")
@pytest.mark.parametrize("unrest", [0.0, 0.02, 0.3])
def test_a_machine_that_did_not_come_to_rest_widens_what_is_expected_again(unrest: float, monkeypatch):
    space = SPACES["fabric"]().eval()
    kept, model = widely(space, 2, generator()), Latency().bind(space)
    usual = [one.value for one in model.measure(kept)]

    def times(self: Assembler, ways: Sequence[float], calls: int, seconds: float = 0.0) -> list[Timing]:
        """The third of the five fastest bursts is as usual, and the fifth so much slower than the first."""
        by = 1 + unrest * np.array([-0.5, 0.0, 0.0, 0.0, 0.5 + 0.5 * unrest * (unrest < 1) * -1])
        return [Timing(np.repeat(way * by, 8), 0.0) for way in ways]

    monkeypatch.setattr(Assembler, "times", times)
    for one, value in zip(model.measure(kept), usual, strict=True):
        assert one.value == pytest.approx(value)
        wide = 1 + min(0.05, unrest)
        assert (one.low, one.high) == pytest.approx((value / wide, value * wide), rel=1e-6 + 0.005 * unrest)


@pytest.fixture
def looks(monkeypatch) -> list[float]:
    """How slow the machine of a `Clock` is in each look of a second, the last one first, and the last for good."""
    slow, before, now = [1.0], Assembler.times, [0.0]

    def times(self: Assembler, ways: Sequence[float], calls: int, seconds: float = 0.0) -> list[Timing]:
        now[0] += 1
        factor = slow.pop() if len(slow) > 1 else slow[0]
        return before(self, [factor * way for way in ways], calls)

    monkeypatch.setattr(Assembler, "times", times)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr("budgetnet.costs.stopwatch.PATIENCE", 60.0)
    return slow


@pytest.mark.usefixtures("clocked")
@pytest.mark.parametrize(
    ("speeds", "taken", "counts"),
    [
        ([1.04], 1, 1.0),
        ([1.06, 1.0], 2, 1.0),
        ([1.3, 1.5, 1.3, 1.4, 1.2, 1.0], 6, 1.0),
        ([1.3, 1.5, 1.2] + [1.4] * 7 + [1.0], 10, 1.0),  # never at rest
        ([0.96], 1, 1.0),
        ([0.5], 1, 0.5),  # it was not at rest at the start
    ],
)
def test_candidates_are_measured_until_the_machine_is_at_rest(looks: list[float], speeds, taken, counts):
    """And take as many times too long as the full network."""
    space = SPACES["fabric"]().eval()
    model, kept = Latency().bind(space), widely(space, 3, generator())[1:]
    usual = [one.value for one in model.measure(kept)]
    looks[:] = [7.0, *reversed(speeds)]
    assert [one.value for one in model.measure(kept)] == pytest.approx([counts * value for value in usual])
    assert len(looks) == 1 + len(speeds) - taken


@pytest.mark.usefixtures("clocked")
def test_a_network_takes_what_the_middle_one_of_three_that_were_built_does(monkeypatch):
    space = SPACES["fabric"]().eval()
    kept = widely(space, 2, generator())
    model, before, built = Latency().bind(space), Assembler.whole, []

    def whole(self: Assembler, row: Tensor) -> float:
        """The second of three is fast, the third slow."""
        built.append(row)
        return before(self, row) * (1.0, 0.9, 1.2)[(len(built) - 1) % 3]

    usual = [one.value for one in model.measure(kept)]
    monkeypatch.setattr(Assembler, "whole", whole)
    for one, value in zip(model.measure(kept), usual, strict=True):
        assert (one.low, one.value, one.high) == pytest.approx((0.9 * value, value, 1.2 * value))
    assert len(built) == 6


@pytest.mark.usefixtures("clocked")
def test_percents_are_of_the_middle_one_of_three_full_networks(monkeypatch):
    """As all that is compared with them, where the first that was built is slow."""
    space, before, built = SPACES["fabric"]().eval(), Assembler.whole, []

    def whole(self: Assembler, row: Tensor) -> float:
        """Those of the table are slow, after three that are built of one network."""
        built.append(row)
        return before(self, row) * (1.5 if len(built) > 3 else (1.0, 0.9, 1.2)[len(built) - 1])

    usual = Latency().bind(space).full
    monkeypatch.setattr(Assembler, "whole", whole)
    assert bn.Budget(Latency(), at_most="50%").bind(space).limit == pytest.approx(usual / 2)
    assert len(built) == 48 + 3


@pytest.mark.usefixtures("clocked")
def test_fast_networks_are_built_more_often_for_their_result(monkeypatch):
    """Two of nine builds are slow, the first two: the middle one does not see it, and it is not expected again."""
    space, before, built = SPACES["fabric"]().eval(), Assembler.whole, []

    def whole(self: Assembler, row: Tensor) -> float:
        built.append(row)
        return before(self, row) * (1.08 if len(built) % 9 in (1, 2) else 1.0)

    usual = Latency().bind(space)
    kept = widely(space, 2, generator())[1:]
    value = usual.report(kept).value
    monkeypatch.setattr(stopwatch, "FAST", 1e6)
    monkeypatch.setattr(Assembler, "whole", whole)
    watch = Stopwatch(Latency().assembler(space), "median")
    assert watch.start()[0].value == pytest.approx(usual.full)
    assert watch.took.full == pytest.approx(usual.full)
    assert len(built) == stopwatch.MANY
    found = watch.report(kept)
    assert (found.value, found.high) == (pytest.approx(value), pytest.approx(value))
    assert len(built) == 2 * stopwatch.MANY
    assert watch.compared(kept, watch.took).value == pytest.approx(value)
    assert len(built) == 4 * stopwatch.MANY
    watch.measure(kept)
    assert len(built) == 4 * stopwatch.MANY + watch.builds


@pytest.mark.usefixtures("clocked")
def test_a_fast_network_is_built_more_often_than_a_slow_full_one(monkeypatch):
    space = SPACES["fabric"]().eval()
    kept, model = widely(space, 2, generator())[1:], Latency().bind(space)
    before, built = Assembler.whole, []
    monkeypatch.setattr(Assembler, "whole", lambda self, row: built.append(row) or before(self, row))
    monkeypatch.setattr(stopwatch, "FAST", (model.report(kept).value + model.full) / 2)
    built.clear()
    found = model.watch.compared(kept, model.watch.took)
    assert [bool(row.bool().all()) for row in built] == [True] * 3 + [False] * stopwatch.MANY
    assert found.value < stopwatch.FAST < model.full


@pytest.mark.usefixtures("clocked")
def test_what_is_said_of_a_network_is_what_it_takes_while_the_machine_is_at_rest(looks: list[float]):
    """By a result and by `measure`; and so is what percents are of, and how fast the machine is."""
    space = SPACES["fabric"]().eval()
    kept, cost, usual = widely(space, 2, generator())[1:], Latency(), Latency().bind(space)
    value, full = usual.measure(kept)[0].value, usual.full
    looks[:] = [1.0, 1.4, 1.3, 1.6]
    model = cost.bind(space)
    assert model.table.yardstick == pytest.approx(1.0)
    assert model.full == pytest.approx(full)
    looks[:] = [1.0, 1.2, 1.0, 1.3, 1.5]
    assert model.report(kept).value == pytest.approx(value)
    looks[:] = [1.0, 1.2, 1.0, 1.3, 1.5]
    assert cost.measured(space, kept).value == pytest.approx(value)
    assert len(looks) == 1
    assert "restless" not in model.notes
    looks[:] = [1.4]  # all the time
    found = model.report(kept)
    assert (found.value, found.slowness) == pytest.approx((value, 1.4))  # of that full network that percents are of
    assert cost.measured(space, kept).value == pytest.approx(1.4 * value)
    assert not model.notes
    model.measure(kept)
    assert model.notes == {"slower": "the machine was 1.40 times as slow as when the modules were timed"}
    looks[:] = [1.0]
    model.measure(kept)
    assert not model.notes  # it is over
    looks[:] = [1.4]
    for times in (1.4, 0.8):  # also where it is faster than it was
        looks[:] = [times]
        found = cost.compared(space, kept, model.watch.took)
        assert (found.value, found.slowness) == pytest.approx((value, times))


@pytest.mark.usefixtures("clocked")
def test_a_machine_that_does_not_come_to_rest_is_told_of(monkeypatch):
    space = SPACES["fabric"]().eval()
    model = Latency().bind(space)
    monkeypatch.setattr(
        Assembler,
        "times",
        lambda self, ways, *_: [Timing(np.repeat(way * 1.1 ** np.arange(9), 8), 0.0) for way in ways],
    )
    model.report(space.architecture("full"))
    assert model.notes["restless"] == "the machine did not come to rest: the fastest calls lie 46 % apart"


@pytest.mark.parametrize(("quantile", "calls"), [("median", 67), ("p95", 80), ("p99", 400), ("p1", 400)])
@pytest.mark.usefixtures("clocked")
def test_a_quantile_far_out_takes_more_calls(quantile: str, calls: int, monkeypatch):
    """So that some of them lie beyond it: of 400 none is above p99 in 2 of 100 times."""
    space, before, asked = SPACES["fabric"]().eval(), Assembler.times, []
    model = Latency(quantile=quantile).bind(space)
    monkeypatch.setattr(
        Assembler, "times", lambda self, ways, calls, _: asked.append(calls) or before(self, ways, calls)
    )
    kept = widely(space, 2, generator())
    model.measure(kept)
    Latency(quantile=quantile).measured(space, kept[:1])
    assert asked == [calls, timing.BURST, calls]
    assert quantile != "p99" or model.watch.share**calls < 0.02


@pytest.mark.usefixtures("clocked")
def test_a_high_quantile_counts_bursts_that_are_slow_while_the_full_network_is_not(monkeypatch):
    space = SPACES["fabric"]().eval()
    kept, usual = widely(space, 2, generator())[1:], {}
    for quantile in ("median", "p95"):
        watch = Stopwatch(Latency().assembler(space), quantile)
        watch.start()
        usual[quantile] = watch.report(kept).value

        def times(self: Assembler, ways: Sequence[float], *_: object) -> list[Timing]:
            """Three bursts in ten of all but the full network, the last one, take twice as long."""
            slow = np.tile(np.repeat([1.0, 2.0], [56, 24]), 2)
            return [Timing(np.full(160, way) * (slow if way is not ways[-1] else 1.0), 0.0) for way in ways]

        with monkeypatch.context() as patch:
            patch.setattr(Assembler, "times", times)
            assert watch.report(kept).value == pytest.approx({"median": 1.0, "p95": 2.0}[quantile] * usual[quantile])


@pytest.mark.parametrize(
    ("quantile", "disturbed", "told"), [("median", 0.1, False), ("p95", 0.1, True), ("p80", 0.1, False)]
)
@pytest.mark.usefixtures("clocked")
def test_calls_that_are_left_out_are_told_where_they_may_have_been_the_slow_ones(
    quantile: str, disturbed: float, told: bool, monkeypatch
):
    space = SPACES["fabric"]().eval()
    monkeypatch.setattr(
        Assembler, "times", lambda self, ways, calls, _=0: [Timing(np.full(calls, way), disturbed) for way in ways]
    )
    model = Latency(quantile=quantile).bind(space)
    assert ("noisy" in model.notes) == told
    assert not told or "interrupted 10 % of the calls, which are left out" in model.notes["noisy"]


@pytest.mark.parametrize("first", ["layers", "channels", "both", "ends"])
@pytest.mark.usefixtures("clocked")
def test_spaces_with_other_gates_share_a_table(first: str, tmp_path: Path, monkeypatch):
    """Their modules are the same; the times of open channels are not."""
    monkeypatch.setitem(NETWORKS, "onnxruntime", 16)
    kinds: dict[str, dict[str, object]] = {
        "layers": {"gates": "layers"},
        "channels": {"gates": "channels"},
        "both": {"gates": "both", "granularity": 4},
        "ends": {"gates": "both", "granularity": 4, "where": "ends"},
    }
    spaces = {name: bn.spaces.resnet(depth=8, channels=8, image_size=8, **own).eval() for name, own in kinds.items()}
    cost = Latency(table=str(tmp_path / "times.json"))
    for name in (first, *spaces, first):
        space = spaces[name]
        used = space.used(widely(space, 8, generator()))
        torch.testing.assert_close(cost.bind(space)(used), Latency().bind(space)(used))


@pytest.mark.usefixtures("clocked")
def test_a_faster_or_slower_machine_is_no_error_of_the_prediction(monkeypatch):
    space = SPACES["fabric"]().eval()
    model = Latency().bind(space)
    before = Assembler.times
    for speed in (1.0, 1.3, 0.8):
        monkeypatch.setattr(
            Assembler, "times", lambda *given, by=speed: [Timing(one.calls * by, 0.0) for one in before(*given)]
        )
        for _ in range(20):
            model.refit(widely(space, 4, generator()))
        assert model.error == pytest.approx(0.0, abs=1e-6)


@pytest.mark.usefixtures("clocked")
def test_quantiles_and_spaces_share_a_table_but_no_whole_networks(tmp_path: Path, monkeypatch):
    table, before = str(tmp_path / "times.json"), Assembler.times

    def spread(self: Assembler, ways: Sequence[float], calls: int, seconds: float = 0.0) -> list[Timing]:
        """One call in ten takes twice as long."""
        return [Timing(np.repeat([way, 2 * way], [9 * calls // 10, calls - 9 * calls // 10]), 0.0) for way in ways]

    monkeypatch.setattr(Assembler, "times", spread)
    space, other = SPACES["fabric"]().eval(), bn.spaces.resnet_fabric(width=1, channels=4, image_size=8).eval()
    models = [Latency(table=table).bind(space), Latency(table=table, quantile="p95").bind(space)]
    models.append(Latency(table=table).bind(other))
    fulls = [model.full for model in models]
    assert fulls[1] == pytest.approx(2 * fulls[0])
    assert fulls[2] < fulls[0]
    for model in models:
        model.save()
    monkeypatch.setattr(Assembler, "times", before)
    again = [Latency(table=table).bind(space), Latency(table=table, quantile="p95").bind(space)]
    again.append(Latency(table=table).bind(other))
    assert [model.known[0].seen for model in again] == pytest.approx(fulls)
    assert [len(model.known) for model in again] == [48] * 3


class Off(MeasuredModel):
    """A measured cost whose truth lies a share above what it predicts."""

    unit = "ms"

    def __init__(self, space: bn.SuperNetwork, share: float) -> None:
        self.space, self.share, self.macs, self.measured = space, share, MACs().bind(space), 0

    def __call__(self, used: Tensor) -> Tensor:
        return self.macs(used)

    def measure(self, kept: Tensor) -> list[Measured]:
        self.measured += len(kept)
        values = (self.macs(self.space.used(kept)) * self.share).tolist()
        return [Measured(value, 0.99 * value, 1.005 * value) for value in values]

    def report(self, kept: Tensor) -> Measured:
        return self.measure(kept)[0]


@pytest.mark.parametrize("share", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("name", ["fabric", "channels"])
def test_limits_hold_as_measured_and_hardly_anything_is_left(share: float, name: str):
    torch.manual_seed(3)
    space = SPACES[name]()
    with torch.no_grad():
        space.gates.values.copy_(2 * torch.randn_like(space.gates.values).abs())  # the mode is the full network
    model = Off(space, share)
    budget = bn.Budget(MACs(), at_most="50%").bind(space)
    budget = dataclasses.replace(budget, model=model)
    pool, costs = measured_to_fit(space, [budget], count=6, generator=generator())
    truth = (model.macs(space.used(pool)) * share).tolist()
    assert [cost for (cost,) in costs] == pytest.approx(truth)
    assert all(1.005 * value <= budget.limit for value in truth)
    assert max(truth) > 0.93 * budget.limit
    assert model.measured <= 40


class Paths(Off):
    """One whose predictions for edges lie so many times above."""

    def __init__(self, space: bn.SuperNetwork, share: float, times: float) -> None:
        super().__init__(space, share)
        self.times = times

    @property
    def along_path(self) -> list[float]:
        return [self.times * cost for cost in self.macs.along_path]


class Stepped(Off):
    """What is predicted above a cost takes `share` of it, all else nearly what is predicted."""

    def __init__(self, space: bn.SuperNetwork, share: float, above: float) -> None:
        super().__init__(space, share)
        self.above = above

    def measure(self, kept: Tensor) -> list[Measured]:
        costs = self.macs(self.space.used(kept)).tolist()
        values = [cost * (self.share if cost > self.above else 0.95) for cost in costs]
        return [Measured(value, 0.99 * value, 1.005 * value) for value in values]


def measured(space: bn.SuperNetwork, limit: str, model: Off) -> tuple[bn.budgets.BoundBudget, Tensor]:
    """The candidates of a space whose most probable architecture is the full one, under a measured limit."""
    torch.manual_seed(3)
    with torch.no_grad():
        space.gates.values.copy_(2 * torch.randn_like(space.gates.values).abs())
    budget = dataclasses.replace(bn.Budget(MACs(), at_most=limit).bind(space), model=model)
    pool, _ = measured_to_fit(space, [budget], count=6, generator=generator())
    return budget, pool


class Careful(Off):
    """Measured as it is predicted; with more care, what a list says of one after the other, as shares of a limit."""

    def __init__(self, space: bn.SuperNetwork, limit: float, *shares: float) -> None:
        super().__init__(space, 1.0)
        self.values, self.asked = [share * limit for share in shares], list[float]()

    def report(self, kept: Tensor) -> Measured:
        self.asked.append(float(kept.sum()))
        value = self.values[len(self.asked) - 1]
        return Measured(value, 0.99 * value, 1.01 * value)


@pytest.mark.parametrize(
    ("shares", "upper", "taken"),
    [
        ([0.98], True, 0),
        ([1.02, 0.995, 0.98], True, 2),  # it has to keep the limit at the upper end too
        ([1.05, 1.02, 1.03, 1.04, 1.02], True, 1),  # none does: the one that breaks it least, the better one of two
        ([1.04], False, 0),
        ([0.94, 1.06, 1.05 - 1e-9], False, 2),
    ],
)
def test_the_best_candidate_that_keeps_its_limits_when_measured_with_more_care_is_chosen(
    shares, upper, taken, monkeypatch
):
    """Of one drawing of candidates, the likeliest of which is the sixth."""
    space = SPACES["channels"]()
    pool = torch.zeros(8, space.gate_count)
    for place in range(8):
        pool[place, : place + 1] = 1
    monkeypatch.setattr("budgetnet.selection.measured_to_fit", lambda _, own, **__: (pool, [[0.0] * len(own)] * 8))
    monkeypatch.setattr("budgetnet.selection.ROUNDS", 1)
    counted = bn.Budget(MACs(), at_most="50%").bind(space)
    model = Careful(space, counted.limit, *shares)
    budget = dataclasses.replace(counted, model=model, upper=upper)
    order = [3, 5, 1, 0, 7, 6, 2, 4]

    def best(some: Sequence[Candidate]) -> int:
        return min(range(len(some)), key=lambda one: some[one].quality["order"])

    def judge(kept: Tensor) -> dict[str, float]:
        return {"order": order.index(int(kept.sum()) - 1)}

    given = {"count": 8, "generator": generator()}
    found, chosen = choose(space, [counted, budget], judge, best, **given)
    assert len(found) == 8
    assert chosen.quality["order"] == taken
    assert model.asked == [order[place] + 1 for place in range(len(shares))]
    assert choose(space, [counted], judge, lambda some: 7, **given)[1] is not None  # what is counted is as it is
    one = dataclasses.replace(found[7], costs=[0.25 * counted.limit])
    assert confirmed([counted], [one], lambda some: 0) == {one: [0.25]}


class Understated(Off):
    """What is measured to fit takes so many times as much when it is measured with more care."""

    def __init__(self, space: bn.SuperNetwork, share: float) -> None:
        super().__init__(space, 1.0)
        self.really, self.reported = share, 0

    def report(self, kept: Tensor) -> Measured:
        self.reported += 1
        return self.measure(kept)[0].slower(1 / self.really)


@pytest.mark.parametrize(
    ("share", "upper", "kept"),
    [
        *[(1.1, True, True), (1.3, True, True), (2.0, True, False), (1.1, False, True)],
        *[(0.97, True, True), (0.85, True, True), (0.75, True, True)],
    ],
)
def test_where_candidates_cost_something_else_when_measured_with_more_care_others_are_looked_for(share, upper, kept):
    """Smaller ones, or larger ones; a bounded number of times: then it is the one that breaks a limit least."""
    space = SPACES["channels"]()
    torch.manual_seed(3)
    with torch.no_grad():
        space.gates.values.copy_(2 * torch.randn_like(space.gates.values).abs())
    model = Understated(space, share)
    budget = dataclasses.replace(bn.Budget(MACs(), at_most="50%").bind(space), model=model, upper=upper)
    given = {"count": 6, "generator": generator()}
    found, chosen = choose(space, [budget], lambda kept: {}, lambda some: 0, **given)
    assert model.reported <= 15
    assert len({tuple(one.kept[0].tolist()) for one in found}) == len(found)
    value = {one: model.report(one.kept) for one in found}
    if not kept:
        assert value[chosen].high == min(each.high for each in value.values()) > budget.limit
    elif upper:
        assert 0.95 < value[chosen].high / budget.limit <= 1
    else:
        assert abs(value[chosen].value / budget.limit - 1) <= 0.05


@pytest.mark.parametrize(
    ("shares", "counted", "upper", "limits"),
    [
        ([0.97], 0.5, True, [1.0]),
        ([0.9, 0.96], 0.5, True, [1.0, 1 / 0.909]),  # at the upper end, 1 % higher
        ([0.5, 0.6, 0.7], 0.5, True, [1.0, 1 / 0.85, 1 / 0.85**2]),
        ([0.9], 0.98, True, [1.0]),  # nothing is left of the other limit
        ([0.9, 1.03, 1.02], 0.5, True, [1.0, 1 / 0.909, 1 / 0.909 / 1.0403]),
        ([0.96], 0.5, False, [1.0]),  # a target is met
        ([], 0.5, True, [1.0]),  # what is counted is as it was measured
    ],
)
def test_where_much_of_every_limit_is_left_others_are_looked_for_below_wider_ones(
    shares, counted, upper, limits, monkeypatch
):
    """What leaves least is handed over, unless it breaks its limit. Then fewer are measured with more care."""
    space, asked = SPACES["channels"](), list[float]()
    plain = bn.Budget(MACs(), at_most="50%").bind(space)
    budgets = [plain]
    if shares:
        budgets.append(dataclasses.replace(plain, model=Careful(space, plain.limit, *shares), upper=upper))

    def fit(_: object, wanted: Sequence[bn.budgets.BoundBudget], **__: object) -> tuple[Tensor, list[list[float]]]:
        """Another architecture each time."""
        asked.append(wanted[-1].limit / plain.limit)
        pool = torch.zeros(1, space.gate_count)
        pool[0, : len(asked)] = 1
        return pool, [[counted * plain.limit] * len(wanted)]

    monkeypatch.setattr("budgetnet.selection.measured_to_fit", fit)
    most, real = list[int](), confirmed
    monkeypatch.setattr("budgetnet.selection.confirmed", lambda *given: most.append(given[-1]) or real(*given))
    found, chosen = choose(space, budgets, lambda kept: {}, lambda some: 0, count=1, generator=generator())
    assert most == [5, 2, 2][: len(limits)]
    assert asked == pytest.approx([limit * 0.99**place for place, limit in enumerate(limits)])
    assert len(found) == len(limits)
    kept = [share for share in shares if share <= 0.99]
    assert int(chosen.kept.sum()) == 1 + (kept.index(max(kept)) if kept else 0)
    seen = [one.costs[-1] / plain.limit for one in found]
    assert seen == pytest.approx(shares or [counted])  # as measured with more care


@pytest.mark.parametrize(("limit", "times"), [("150%", 1), ("99%", 2)])
def test_where_nothing_else_is_drawn_nothing_else_is_measured_with_more_care(limit: str, times: int, monkeypatch):
    """Others are not looked for where the limit does not bind, and no third time where there are none."""
    space, drawn = SPACES["channels"](), list[float]()
    plain = bn.Budget(MACs(), at_most=limit).bind(space)
    model = Careful(space, plain.limit, 0.6)
    budget = dataclasses.replace(plain, model=model)

    def fit(_: object, wanted: Sequence[bn.budgets.BoundBudget], **__: object) -> tuple[Tensor, list[list[float]]]:
        drawn.append(wanted[0].limit)
        return space.architecture("full"), [[plain.full]]

    monkeypatch.setattr("budgetnet.selection.measured_to_fit", fit)
    found, chosen = choose(space, [budget], lambda kept: {}, lambda some: 0, count=1, generator=generator())
    assert found == [chosen]
    assert (len(drawn), len(model.asked)) == (times, 1)


def test_where_few_networks_lie_below_a_limit_smaller_ones_are_measured():
    space = bn.spaces.resnet(depth=14, channels=8, image_size=8, gates="layers")
    budget, pool = measured(space, "90%", model := Off(space, 1.1))  # all that are predicted just below it break it
    assert all(one.high <= budget.limit for one in model.measure(pool))


@pytest.mark.parametrize(("share", "room"), [(1.35, 0.95), (1.2, 0.9), (1.35, 0.8)])
def test_what_was_measured_to_fit_is_taken_though_nothing_smaller_is_there(share: float, room: float):
    space = bn.spaces.resnet(depth=8, channels=8, image_size=8)
    macs = MACs().bind(space)
    smallest, full = macs(space.used(torch.stack([space.of_edges(())[0], space.architecture("full")[0]]))).tolist()
    limit = smallest / room
    budget, pool = measured(space, f"{100 * limit / full:.6f}%", model := Stepped(space, share, 0.97 * limit))
    assert all(one.high <= budget.limit for one in model.measure(pool))


def test_a_limit_that_no_measured_network_keeps_is_told_as_it_was_asked():
    space = bn.spaces.resnet(depth=8, channels=8, image_size=8)
    counted = bn.Budget(MACs(), at_most="20%").bind(space)
    slow = dataclasses.replace(counted, name="slow", model=Off(space, 9.0))
    path = 9 * 1.005 * float(counted.model(space.used(slow.cheapest(space)))[0])
    line = rf"^of \d+ networks of resnet that were measured none keeps slow at {slow.limit:.6g} ms: "
    with pytest.raises(UnreachableBudget, match=line + rf"the least may take {path:.6g}$"):
        measured_to_fit(space, [counted, slow], count=6, generator=generator())


def test_a_limit_is_refused_by_what_the_smallest_network_really_takes():
    space = bn.spaces.resnet(depth=8, channels=8, image_size=8)
    budget = bn.Budget(MACs(), at_most="12%").bind(space)
    assert check_reachable(space, [budget])[0]["smallest"] < budget.limit
    least = float(budget.model(space.used(budget.cheapest(space)))[0])
    slower = dataclasses.replace(budget, model=Off(space, 1.5))
    with pytest.raises(UnreachableBudget, match="smallest network of resnet takes"):
        check_reachable(space, [slower])
    # what is predicted is too much, then by so much that the prediction must be wrong
    check_reachable(space, [dataclasses.replace(budget, model=Paths(space, 0.5, 1.4))])
    wrong = dataclasses.replace(budget, model=Paths(space, 0.5, 9))
    assert check_reachable(space, [wrong])[0]["smallest"] < budget.limit
    with pytest.raises(UnreachableBudget, match="the smallest network of resnet takes") as caught:
        check_reachable(space, [wrong, slower])
    assert [row["smallest"] for row in caught.value.limits] == pytest.approx([0.5 * least, 1.5 * least], rel=1e-6)
    twice = dataclasses.replace(slower, limit=2 * slower.limit)
    [row] = check_reachable(space, [twice])
    assert row["smallest"] == pytest.approx(1.5 * least)


class Scale(nn.Module):
    """Nothing of what it does is in its printed form."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        return x * self.by


def test_modules_of_ones_own_are_told_apart():
    edges = [bn.Edge(start="x", end="a", module=nn.Conv2d(3, 3, 1), fixed=True)]
    edges += [bn.Edge(start="a", end="y", module=Scale(by), name=f"by{by:g}") for by in (2.0, 100.0)]
    space = bn.SuperNetwork(edges, input_shape=(3, 8, 8)).eval()
    assembler = Assembler(space, runtime="onnxruntime", threads=1, batch=1, device="cpu")
    x = torch.randn(1, 3, 8, 8)
    for kept in torch.eye(2):
        session = onnx_session(assembler.onnx_model(kept[None]).SerializeToString(), 1)
        torch.testing.assert_close(
            torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), extract(space, kept[None])(x).detach()
        )
    same = bn.spaces.resnet_fabric(width=2, channels=4, image_size=8)
    assembler = Assembler(same, runtime="torch", threads=1, batch=1, device="cpu")
    kinds = {assembler.edge_kind(edge) for edge in assembler.edges}
    assert (len(assembler.edges), len(kinds)) == (26, 11)  # those that are alike are timed once


@pytest.mark.parametrize(
    ("text", "cost"),
    [
        ("latency", Latency()),
        ("latency.p95", Latency(quantile="p95")),
        ("latency.p99.9", Latency(quantile="p99.9")),
        ("latency:torch", Latency(runtime="torch")),
        ("latency.p90[threads=2,batch=8]", Latency(quantile="p90", threads=2, batch=8)),
    ],
)
def test_costs_are_read_and_written(text: str, cost: Latency):
    assert parse_cost(text) == cost
    assert cost_name(cost) == text
    assert cost_name(dataclasses.replace(cost, table="times.json")) == text


@pytest.mark.parametrize(("limit", "number"), [("2ms", 2.0), ("2", 2.0), ("500us", 0.5), ("1.5s", 1500.0)])
def test_limits_are_times(limit: str, number: float):
    assert _limit(limit, "ms").number == number


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("latency<=2M", "a limit in ms must be a number > 0, with us, ms, s or % behind it, got '2M'"),
        ("macs<=2ms", "a limit in MAC must be a number > 0, with K, M, G or % behind it, got '2ms'"),
        ("latency.mean<=2ms", "a quantile is median or p1 to p99"),
        ("latency:jax<=2ms", "runtime must be onnxruntime, torch, compiled, got 'jax'"),
        ("latency[threads=0]<=2ms", "threads must be a whole number >= 1, got 0"),
        ("latency[batch=0]<=2ms", "batch must be a whole number >= 1, got 0"),
        ("latency[device=cuda]<=2ms", "measured on cpu, or of torch on cuda, got onnxruntime on 'cuda'"),
        ("latency[device=tpu]<=2ms", "measured on cpu, or of torch on cuda"),
        ("macs.p95<=2M", "macs has no parts"),
    ],
)
def test_wrong_limits_give_one_clear_line(text: str, line: str):
    with pytest.raises(ConfigError, match=line) as caught:
        bn.Budget.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"threads": "2"}, "threads must be a whole number >= 1, got '2'"),
        ({"threads": 1.5}, r"threads must be a whole number >= 1, got 1\.5"),
        ({"batch": True}, "batch must be a whole number >= 1, got True"),
        ({"table": 5}, "table must be the path of a file as a text, got 5"),
        ({"quantile": 95}, "a quantile is median or p1 to p99, such as latency.p95, got 95"),
    ],
)
def test_wrong_options_give_one_clear_line(given: dict[str, object], line: str):
    with pytest.raises(ConfigError, match=line):
        Latency(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"runtime": "torch"}, {"batch": 2}, {"quantile": "p95"}])
def test_where_gates_look_at_the_input_only_the_files_median_is_a_cost(options):
    space = bn.spaces.resnet(depth=8, channels=8, image_size=8, conditional=True)
    with pytest.raises(ConfigError, match="where gates look at the input, latency is the median of one image in onnxr"):
        Latency(**options).bind(space)


def test_a_result_is_measured_in_a_new_process_beside_the_full_network(monkeypatch):
    """Which gets the models of both; what it says is scaled to what the full network took at the start."""
    torch.manual_seed(0)
    space = SPACES["fabric"]().eval()
    kept, x = widely(space, 2, generator())[1:], torch.randn(1, *space.input_shape)
    watch, sent, real, processes = Stopwatch(Latency().assembler(space), "median"), list[bytes](), Apart.build, set()
    watch.took = stopwatch.Rest(1.0, 1.0)

    def build(self: Apart, model: bytes, shape: Sequence[int], threads: int) -> Callable[[], object]:
        processes.add(self.process)
        if tuple(shape) == (1, *space.input_shape):  # else the yardstick's
            sent.append(model)
        assert threads == 1
        return real(self, model, shape, threads)

    monkeypatch.setattr(Apart, "build", build)
    found = watch.anew(kept)
    assert 0 < found.low <= found.value <= found.high < 1.5 * watch.took.full
    (process,) = processes
    assert process.returncode is not None  # it is over
    builds = watch.builds
    assert len(sent) == 2 * builds
    for model, one in [(sent[0], space.architecture("full")), (sent[-1], kept)]:
        (answer,) = onnx_session(model, 1).run(None, {"x": x.numpy()})
        assert torch.allclose(torch.from_numpy(answer), extract(space, one)(x), atol=1e-4)
    assert sent[0] != sent[-1]


def test_small_networks_are_compared_by_the_yardstick_and_large_ones_by_the_full_one():
    """Where the full one takes 1.2 times as long as then, and the yardstick, a quarter of it, half as long again."""
    then, now = stopwatch.Rest(full=4.0, yardstick=0.8), stopwatch.Rest(full=4.8, yardstick=1.2)
    slower = [now.slower(then, milliseconds) for milliseconds in (0.5, 1.2, 3.0, 4.8, 6.0)]
    assert slower == pytest.approx([1.5, 1.5, 1.35, 1.2, 1.2])
    assert then.slower(then, 2.0) == 1.0
    small = stopwatch.Rest(full=0.5, yardstick=1.0)  # a full one that is no larger tells more of its own
    assert small.slower(stopwatch.Rest(full=0.4, yardstick=1.0), 0.3) == pytest.approx(1.25)


@pytest.mark.usefixtures("clocked")
@pytest.mark.parametrize(("speed", "by"), [(1.0, 1.0), (1.5, 1.0), (0.5, 1.0), (1.0, 0.93), (2.0, 0.93)])
def test_what_the_new_process_sees_counts_beside_its_own_full_network(speed: float, by: float, monkeypatch):
    """However fast all is there, and however a network that is built here compares with the full one."""
    space = SPACES["fabric"]().eval()
    model, kept = Latency().bind(space), widely(space, 2, generator())[1:]
    here, whole, full = model.measure(kept)[0].value, Assembler.whole, space.architecture("full")
    yardstick = Assembler.yardstick

    class There(Assembler):
        """Where all takes `speed` times as long, and the network beside the full one `by` times that."""

        def whole(self, row: Tensor) -> float:
            return speed * (1.0 if torch.equal(row, full) else by) * whole(self, row)

        def yardstick(self) -> float:
            return speed * yardstick(self)

    def apart(self: Assembler) -> nullcontext[Assembler]:
        there = copy.copy(self)
        there.__class__ = There
        return nullcontext(there)

    monkeypatch.setattr(Assembler, "apart", apart)
    for found in (model.report(kept), Latency().compared(space, kept, model.watch.took)):
        assert found.value == pytest.approx(by * here)
        assert found.slowness == pytest.approx(speed)
    budget = dataclasses.replace(bn.Budget(MACs(), at_most="50%").bind(space), model=model, limit=by * here * 1.001)
    one = Candidate(kept, [here], {})
    assert confirmed([budget], [one], lambda some: 0)[one] == pytest.approx([1 / 1.001])  # and where it is accepted
    torch_only = Stopwatch(Latency(runtime="torch").assembler(space), "median")
    torch_only.start()
    assert torch_only.anew(kept).value == pytest.approx(here)  # in this process


@pytest.mark.usefixtures("clocked")
def test_what_a_network_is_compared_with_is_timed_in_turns_with_it(monkeypatch):
    """On a machine where small networks take half as long again once this one was looked at, and large ones do not."""
    space, before, small = SPACES["fabric"]().eval(), Assembler.times, []
    kept, then = space.of_edges(space.graph.cheapest_path([1.0] * len(space.graph.edges))), stopwatch.Rest(2.0, 1.0)
    usual = Latency().bind(space).measure(kept)[0].value
    monkeypatch.setattr(Assembler, "whole", lambda self, row: usual if torch.equal(row, kept) else 2.0)
    assert usual < 1.0

    def times(self: Assembler, ways: Sequence[float], calls: int, seconds: float = 0.0) -> list[Timing]:
        small.extend(way for way in ways if way == usual)
        return before(self, [1.5 * way if small and way < 2.0 else way for way in ways], calls, seconds)

    monkeypatch.setattr(Assembler, "times", times)
    found = Stopwatch(Latency().assembler(space), "median").compared(kept, then)
    assert (found.value, found.slowness) == (pytest.approx(usual), pytest.approx(1.5))


@pytest.mark.parametrize(
    ("start", "line"),
    [
        ("raise ImportError('no onnxruntime\\nhere')", "the process that times it ended: here"),
        ("import os; os.kill(os.getpid(), 9)", "the process that times it ended: signal 9"),
        ("import sys; sys.exit(4)", "the process that times it ended: exit status 4"),
        ('input(); print(\'{"error": "Fail: no\\\\nmemory"}\')', "Fail: no memory"),
    ],
)
def test_a_process_that_fails_gives_one_clear_line(start: str, line: str, monkeypatch):
    monkeypatch.setattr("budgetnet.apart.START", start)
    space = SPACES["fabric"]().eval()
    with pytest.raises(ConfigError, match=f"^onnxruntime cannot run resnet_fabric, batch 1: {line}$"):
        Stopwatch(Latency().assembler(space), "median").compared(space.architecture("full"), stopwatch.Rest(1.0, 1.0))


def test_an_interruption_ends_the_new_process_too(monkeypatch, tmp_path: Path, capsys):
    processes: list[Apart] = []

    def interrupted(self: Apart, *_: object) -> None:
        processes.append(self)
        raise KeyboardInterrupt

    def command(_: list[str]) -> None:
        space = SPACES["fabric"]().eval()
        Stopwatch(Latency().assembler(space), "median").compared(space.architecture("full"), stopwatch.Rest(1.0, 1.0))

    monkeypatch.setattr(Apart, "_ask", interrupted)
    monkeypatch.setitem(cli.COMMANDS, "measure", command)
    assert cli.main(["measure"]) == cli.INTERRUPTED
    (one,) = processes
    assert one.process.returncode == -9
    assert one.said.closed
    assert capsys.readouterr().err == "budgetnet: interrupted\n"


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_real_times_of_real_networks_rise_with_what_is_kept(runtime: str):
    torch.manual_seed(0)
    space = bn.spaces.resnet_fabric(width=1, channels=16, image_size=16).eval()
    model = LatencyModel(space, Latency(runtime=runtime))
    path = space.of_edges(space.graph.cheapest_path(model.along_path))
    small, full = model.measure(torch.cat([path, space.architecture("full")]))
    assert 0 < small.low <= small.value <= small.high < full.value
    predicted = model(space.used(torch.cat([path, space.architecture("full")])))
    assert float(predicted[0]) < float(predicted[1])
    assert model.error < 0.5


@pytest.mark.usefixtures("no_files")
def test_a_search_keeps_a_limit_in_milliseconds_and_goes_on_where_it_was_stopped(tmp_path: Path, capsys):
    space = bn.spaces.resnet_fabric(width=2, channels=8, image_size=8, in_channels=1)
    data = bn.data.load("digits").subset(256, seed=0)
    options = bn.SearchOptions(epochs=4, candidates=4, recalibration=2)
    found = bn.search(space, data, ["latency<=60%", "macs<=90%"], options, out=tmp_path / "run")
    entry = found.result["budgets"][0]
    assert (entry["cost"], entry["unit"]) == ("latency", "ms")
    assert entry["low"] <= entry["value"] <= entry["high"]
    assert entry["met"] == (entry["value"] <= entry["limit"])
    assert entry["limit"] == pytest.approx(0.6 * found.result["before"][0]["full"])
    assert found.result["budgets"][1]["met"]
    candidates = found.result["candidates"]  # with more care, or below a wider limit, some may take more than the limit
    assert [row["chosen"] for row in candidates].count(True) == 1
    assert all(0 < row["costs"]["latency"] < 2 * entry["limit"] for row in candidates)
    table = json.loads((tmp_path / "run" / "latency-onnxruntime-1-1.json").read_text())
    assert len(table["networks"]) > 48  # some were measured during the search
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["budgets"][0]["error"] is not None for line in lines] == [True] * 4
    assert entry["slowness"] > 0
    assert all(isinstance(note, str) for line in lines for note in line["budgets"][0]["notes"])
    assert cli.main(["measure", str(tmp_path / "run"), "--costs", "latency", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)["measured"]
    assert measured["latency"]["slowness"] > 0  # beside the full network, as it was
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert then_of(RunFolder(tmp_path / "run")) == {
        Latency(): stopwatch.Rest(*(result["budgets"][0]["machine"][name] for name in ("full", "yardstick")))
    }
    result["budgets"][0]["machine"]["processor"] = "another"
    (tmp_path / "run" / "result.json").write_text(json.dumps(result))
    assert then_of(RunFolder(tmp_path / "run")) == {}
    again = bn.search(space, data, ["latency<=60%", "macs<=90%"], options, out=tmp_path / "run", resume=True)
    assert again.result["budgets"][0]["limit"] == entry["limit"]
    assert torch.equal(again.architecture, found.architecture)
