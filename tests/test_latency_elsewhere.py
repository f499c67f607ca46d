"""A table of times is carried to another machine: there it predicts, and nothing is timed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from clock import Clock, tick
from torch import Tensor
from torch.nn.functional import cross_entropy

import budgetnet as bn
from budgetnet import cli
from budgetnet.assembly import Assembler
from budgetnet.budgets import cost_name, parse_cost
from budgetnet.costs import Latency
from budgetnet.costs.latency import LatencyElsewhere, LatencyModel, widely
from budgetnet.costs.measured import MeasuredModel
from budgetnet.costs.stopwatch import Stopwatch
from budgetnet.costs.timetable import Setting
from budgetnet.errors import ConfigError, FileError

SPACES: dict[str, Callable[[], bn.SuperNetwork]] = {
    "fabric": lambda: bn.spaces.resnet_fabric(width=1, channels=4, image_size=8, in_channels=1),
    "channels": lambda: bn.spaces.resnet(depth=8, channels=8, image_size=8),
    "ends": lambda: bn.spaces.resnet(depth=8, channels=8, image_size=8, gates="both", granularity=4, where="ends"),
}
SMALL = [
    *("--data", "digits", "--train_images", "256", "--space.width", "1", "--space.channels", "4"),
    *("--epochs", "3", "--warmup", "0.34", "--finetune", "0.33", "--candidates", "4"),
]
THERE = "Abacus, 4 beads"


def refused(*_: object, **__: object) -> None:
    raise AssertionError("something was timed")


@pytest.fixture
def made(tmp_path: Path, monkeypatch) -> Callable[..., tuple[LatencyModel, Path]]:
    """Makes a space's table under a `Clock`, says that it is of another machine, and has nothing timed after that."""

    def make(space: bn.SuperNetwork, **options: Any) -> tuple[LatencyModel, Path]:
        file, built, before = tmp_path / "times.json", list[Tensor](), Clock.whole

        def whole(self: Clock, kept: Tensor) -> float:
            """What percents are of is looked at with more care, and faster than in the look that weights learn from."""
            built.append(kept)
            return before(self, kept) * (0.9 if len(built) <= 3 else 1.0)

        with pytest.MonkeyPatch.context() as patch:
            tick(patch)
            patch.setattr(Clock, "whole", whole)
            model = Latency(table=str(file), **options).bind(space)
        assert isinstance(model, LatencyModel)
        changed(file, lambda content: content.update(processor=THERE, version="0.1"))
        for name in ("start", "quickly", "briefly", "measure", "report", "compared", "_rested"):
            monkeypatch.setattr(Stopwatch, name, refused)
        for name in ("alone", "addition", "activation", "nothing", "whole", "yardstick", "times"):
            monkeypatch.setattr(Assembler, name, refused)
        return model, file

    return make


def changed(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize("name", list(SPACES))
def test_predictions_are_those_of_the_model_that_made_the_table(name: str, made):
    torch.manual_seed(0)
    space = SPACES[name]().eval()
    there, file = made(space)
    budget = bn.Budget.parse(f"latency[table={file},elsewhere=true]<=50%").bind(space)
    here = budget.model
    assert isinstance(here, LatencyElsewhere)
    assert not isinstance(here, MeasuredModel)
    kept = widely(space, 40, torch.Generator().manual_seed(7))
    used = [space.used(kept).requires_grad_() for _ in range(2)]
    found, expected = here(used[0]), there(used[1])
    assert torch.equal(found, expected)
    assert (here.error, here.along_path) == (there.error, there.along_path)
    slopes = [torch.autograd.grad(cost.sum(), own)[0] for cost, own in ((found, used[0]), (expected, used[1]))]
    assert torch.equal(*slopes)
    assert here.full == there.full == budget.full == 2 * budget.limit
    assert here.full < float(here(space.used(space.architecture("full")))[0])  # as it was seen, not as predicted
    cost = parse_cost(f"latency[table={file},elsewhere=true]")
    assert cost.measured(space, kept[3:4]).value == pytest.approx(float(expected.detach()[3]), rel=1e-12)


@pytest.mark.parametrize("field", ["processor", "version"])
def test_a_table_of_another_machine_is_refused_with_the_option_that_predicts_from_it(field: str, made):
    """Before anything is timed."""
    space = SPACES["fabric"]().eval()
    _, file = made(space)
    here = vars(Setting.here("onnxruntime", 1, 1, "cpu"))
    changed(file, lambda content: content.update(here, **{field: "another"}))
    with pytest.raises(FileError, match=rf"holds times for {field} another, but here it is .*: ") as caught:
        Latency(table=str(file)).bind(space)
    assert str(caught.value).endswith(
        f": latency[table={file},elsewhere=true] predicts what networks take there, and times nothing"
    )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "change", "line"),
    [
        ({"threads": 2}, None, "holds times for threads 1, but 2 was asked for$"),
        ({"batch": 8}, None, "holds times for batch 1, but 8 was asked for$"),
        ({"runtime": "torch"}, None, "holds times for runtime onnxruntime, but torch was asked for$"),
        (
            {"quantile": "p95"},
            None,
            r"must hold 48 whole networks of this resnet_fabric to predict from, p95 of the calls, has 0: `budgetnet "
            rf"measure SPACE --costs 'latency\.p95\[table=\S+\]'` makes them on {THERE}$",
        ),
        (
            {},
            lambda content: content["networks"].pop(),
            r"median of the calls, has 47: `budgetnet measure SPACE --costs 'latency\[table=\S+\]'` makes them on",
        ),
        (
            {},
            lambda content: content["times_ms"].pop(next(kind for kind in content["times_ms"] if "Linear" in kind)),
            r"lacks times of modules of resnet_fabric, such as .*Linear.*: `budgetnet measure SPACE --costs 'latency\[",
        ),
        (
            {},
            lambda content: [each["parts_ms"].popitem() for each in content["networks"]],
            "must have all parts of the networks it knows, lacks",
        ),
        ({"table": ""}, None, r"elsewhere=true needs the table of another machine: latency\[table=FILE,elsewhere=true"),
        ({"table": "none.json"}, None, "none.json must hold times of modules that budgetnet wrote, got .*No such file"),
    ],
)
def test_what_cannot_be_predicted_from_is_told_in_one_line(options, change, line: str, made):
    space = SPACES["fabric"]().eval()
    _, file = made(space)
    if change:
        changed(file, change)
    cost = Latency(**{"table": str(file), "elsewhere": True, **options})
    with pytest.raises((FileError, ConfigError), match=line) as caught:
        cost.bind(space)
    assert "\n" not in str(caught.value)
    assert line.startswith("elsewhere") == isinstance(caught.value, ConfigError)


def test_numbers_of_channels_that_a_table_lacks_are_told(made):
    space = SPACES["channels"]().eval()
    _, file = made(space)
    changed(file, lambda content: [times.pop("3", None) for times in content["times_ms"].values()])
    with pytest.raises(FileError, match=r"lacks times of modules of resnet, such as .*, 3 channels: `budgetnet"):
        Latency(table=str(file), elsewhere=True).bind(space)


def test_gates_that_look_at_the_input_have_no_latency_elsewhere(made):
    _, file = made(SPACES["channels"]().eval())
    space = bn.spaces.resnet(depth=8, channels=8, image_size=8, conditional=True)
    with pytest.raises(ConfigError, match="latency cannot be a cost where gates look at the input"):
        Latency(table=str(file), elsewhere=True).bind(space)


def test_the_option_is_read_and_written(monkeypatch):
    cost = parse_cost("latency.p95[threads=2,table=a.json,elsewhere=true]")
    assert cost == Latency(quantile="p95", threads=2, table="a.json", elsewhere=True)
    assert cost_name(cost) == "latency.p95[threads=2,elsewhere=true]"
    without = parse_cost(cost_name(cost))
    assert without == Latency(quantile="p95", threads=2, elsewhere=True)
    assert without.kept_in(Path("nowhere")) == without  # a run's folder holds no table of another machine
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert parse_cost("latency[runtime=torch,device=cuda,table=a.json,elsewhere=true]").device == "cuda"
    for given in ({"elsewhere": "true"}, {"elsewhere": 1}):
        with pytest.raises(ConfigError, match="elsewhere must be true or false, got"):
            Latency(**given)  # type: ignore[arg-type]


class Stopped:
    """Stops a search after some epochs."""

    def __init__(self, epochs: int) -> None:
        self.left, self.said = epochs, list[str]()

    def say(self, text: str) -> None:
        self.said.append(text)

    def begin(self, *_: object) -> None: ...

    def step(self, *_: object) -> None: ...

    def epoch(self, line: dict[str, Any]) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


def test_a_search_from_data_to_file_keeps_a_limit_that_is_predicted(tmp_path: Path, made, capsys):
    space = SPACES["fabric"]()
    there, file = made(space.eval())
    cost, run, content = f"latency[table={file},elsewhere=true]", tmp_path / "run", file.read_bytes()
    assert cli.main(["search", *SMALL, "--budget", f"{cost}<=60%", "--out", str(run)]) == 0
    out, err = capsys.readouterr()
    result = json.loads((run / "result.json").read_text())
    (entry,) = result["budgets"]
    assert entry["cost"] == "latency[elsewhere=true]"
    assert entry["limit"] == pytest.approx(0.6 * there.full, rel=1e-12)
    assert entry["value"] <= entry["limit"]
    assert entry["met"]
    kept = bn.architectures.named(space, str(run / "architecture.json"))
    assert entry["value"] == float(there(space.used(kept))[0])
    told = {name: entry["predicted_for"][name] for name in ("processor", "version", "runtime", "threads", "batch")}
    assert told == {"processor": THERE, "version": "0.1", "runtime": "onnxruntime", "threads": 1, "batch": 1}
    assert (entry["predicted_for"]["error"], entry["predicted_for"]["full"]) == (there.error, there.full)
    assert all(row["costs"]["latency[elsewhere=true]"] <= entry["limit"] for row in result["candidates"])
    sentence = f"latency[elsewhere=true]{{}}predicted for {THERE} (onnxruntime 0.1, 1 thread, batch of 1)"
    assert sentence.format(": ") in out
    assert sentence.format(": ") in err  # before the search, too
    assert "timing the modules" not in err
    page = (run / "report.html").read_text()
    assert sentence.format(" was ") in page
    assert "was measured" not in page
    assert not list(run.glob("latency-*.json"))
    assert file.read_bytes() == content
    assert cli.main(["measure", str(run), "--costs", f"macs,{cost}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["costs"][cost] == entry["value"]
    assert found["predicted"] == {cost: entry["predicted_for"]}
    assert "measured" not in found
    assert cli.main(["measure", str(run), "--costs", cost]) == 0
    assert f"{cost}: predicted for {THERE} (" in capsys.readouterr().out


def test_a_search_by_predictions_goes_on_with_the_same_weights_and_the_same_table_alone(tmp_path: Path, made):
    space = SPACES["fabric"]()
    _, file = made(space.eval())
    data, budgets = bn.data.load("digits").subset(256, seed=0), [f"latency[table={file},elsewhere=true]<=60%"]
    options = bn.SearchOptions(epochs=3, warmup=0.34, finetune=0.33, candidates=4, recalibration=2)
    whole = bn.search(space, data, budgets, options, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        bn.search(space, data, budgets, options, out=tmp_path / "run", progress=Stopped(2))
    content = file.read_text()
    changed(file, lambda content: content["networks"][5].update(ms=3.0))
    with pytest.raises(FileError, match=r"times\.json must hold the times that the run began with, got others"):
        bn.search(space, data, budgets, options, out=tmp_path / "run", resume=True)
    file.write_text(content)
    changed(file, lambda content: content["times_ms"].update(other={"": 1.0}))  # beside what is of this space
    again = bn.search(space, data, budgets, options, out=tmp_path / "run", resume=True)
    assert torch.equal(again.architecture, whole.architecture)
    assert again.result["budgets"] == whole.result["budgets"]
    for name, value in whole.supernet.state_dict().items():
        assert torch.equal(value, again.supernet.state_dict()[name]), name


def test_a_loop_of_ones_own_goes_by_predictions(made):
    torch.manual_seed(0)
    space = SPACES["fabric"]()
    _, file = made(space.eval())
    options, limit = bn.SearchOptions(candidates=4), [f"latency[table={file},elsewhere=true]<=60%"]
    controller = bn.Controller(space.train(), limit, options, total_steps=6)
    optimizer = torch.optim.SGD(controller.weights(), lr=0.01)
    x, y = torch.randn(16, 1, 8, 8), torch.randint(10, (16,))
    again = None
    while controller.steps < 6:
        if controller.phase == "choose":
            controller.choose(lambda network: 1.0)
        output, kept = space(x, controller.policy(len(x)))
        controller.loss(cross_entropy(output, y, reduction="none"), kept).backward()
        optimizer.step()
        controller.step()
        if again is None:
            again = bn.Controller(SPACES["fabric"](), limit, options, total_steps=6)
            again.load_state_dict(controller.state_dict())
    (outcome,) = controller.outcomes
    assert outcome["met"]
    assert outcome["predicted_for"]["processor"] == THERE
    changed(file, lambda content: content["networks"][5].update(ms=3.0))
    other = bn.Controller(SPACES["fabric"](), limit, options, total_steps=6)
    with pytest.raises(FileError, match="must hold the times that the run began with, got others"):
        other.load_state_dict(controller.state_dict())
