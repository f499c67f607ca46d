"""The command line: what each command prints for programs, its exit status, and that a run can be taken up again."""

from __future__ import annotations

import json
import re
import runpy
import sys
from functools import partial
from itertools import product
from math import prod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SMALL
from PIL import Image
from wrong_files import branching

from budgetnet import __version__, cli, spaces, training
from budgetnet import data as datasets
from budgetnet.cli.finished import data_of_run
from budgetnet.cli.search import _tell
from budgetnet.delivery import restored
from budgetnet.export import difference, load
from budgetnet.options import DEFAULTS
from budgetnet.runs import RunFolder
from budgetnet.weights import learned

OWN = '''
"""A network of three modules, two of them choices."""
from torch import nn
from budgetnet import Edge, SuperNetwork

def build(classes: int, image_size: int, channels: int = 3) -> SuperNetwork:
    edges = [
        Edge(start="x", end="a", module=nn.Conv2d(1, channels, 3), fixed=True),
        Edge(start="a", end="b", module=nn.Conv2d(channels, channels, 3, padding=1)),
        Edge(start="a", end="b", module=nn.Identity(), name="skip"),
        Edge(start="b", end="y", module=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(),
             nn.Linear(channels, classes)), fixed=True),
    ]
    return SuperNetwork(edges, input_shape=(1, image_size, image_size), architectures={"plain": ["skip"]})
'''
QUICK = [
    *("--data", "digits", "--train_images", "128", "--epochs", "1", "--warmup", "0", "--finetune", "0"),
    *("--candidates", "2", "--recalibration", "2"),
]


@pytest.fixture
def say(capsys):
    """Runs a command that succeeds; gives the JSON object it prints with `--json`."""

    def run(*arguments):
        assert cli.main([*map(str, arguments), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_a_search_prints_its_result_and_writes_the_run(told):
    folder, process = told
    result = json.loads(process.stdout)
    assert process.stderr == ""
    assert result == json.loads((folder / "result.json").read_text())
    promised = {"space", "data", "seed", "images_seen", "images_taught", "seconds", "budgets", "full", "network"}
    assert promised | {"validation", "test", "equivalence"} <= set(result)
    assert set(result["budgets"][0]) >= {"cost", "unit", "limit", "value", "met"}
    assert {"macs", "params"} <= set(result["full"])
    assert {"macs", "params", "memory:params", "latency_ms"} <= set(result["network"])
    assert set(result["network"]["latency_ms"]) >= {"median", "p10", "p90", "runtime", "threads", "batch"}
    assert "accuracy" in result["validation"]
    assert "accuracy" in result["test"]
    assert {"extracted", "onnx", "pt2"} <= set(result["equivalence"])
    assert result["equivalence"]["extracted"] == 0
    assert max(result["equivalence"].values()) < 1e-4
    assert result["images_seen"] == 3 * 256
    files = ["options.json", "metrics.jsonl", "architecture.json", "network.pt2", "network.onnx", "report.html"]
    assert all((folder / name).is_file() for name in [*files, "checkpoint/latest.safetensors"])
    phases = [json.loads(line)["phase"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert phases == ["warmup", "search", "finetune"]


def test_a_run_says_how_images_are_seen_and_is_evaluated_in_the_same_way(tmp_path, say):
    flags = ["--pad", "2", "--flip", "false", "--mean", "0.3", "--std", "0.2"]
    result = say(
        "search",
        *QUICK,
        "--space",
        "resnet_fabric",
        "--space.width",
        "1",
        "--budget",
        "macs<=90%",
        *flags,
        "--out",
        tmp_path / "run",
    )
    seen = json.loads((tmp_path / "run" / "options.json").read_text())["data"]
    assert [seen[key] for key in ("pad", "flip", "mean", "std")] == [2, False, [0.3], [0.2]]
    assert say("evaluate", tmp_path / "run")["quality"] == pytest.approx(result["test"])
    (tmp_path / "run" / "options.json").write_text(
        (tmp_path / "run" / "options.json").read_text().replace("0.2", "2.0")
    )
    assert say("evaluate", tmp_path / "run")["quality"]["loss"] != pytest.approx(result["test"]["loss"])


@pytest.mark.parametrize(("flag", "value"), [("image_size", 16), ("ignore", 255)])
def test_a_run_is_evaluated_on_images_and_masks_as_it_learned_from_them(flag, value, tmp_path, say):
    data, space = QUICK, ["resnet_fabric", "--space.width", "1"]
    if flag == "ignore":
        data, space = ["--data", road_scenes(tmp_path / "scenes"), *QUICK[4:]], ["conv_fabric", "--space.width", "2"]
    run = tmp_path / "run"
    result = say("search", *data, f"--{flag}", value, "--space", *space, "--budget", "macs<=90%", "--out", run)
    assert say("evaluate", run, *data[:2])["quality"] == pytest.approx(result["test"])


def road_scenes(folder: Path) -> Path:
    """Images of 8 x 8 pixels whose masks are half 255, a value that is no class."""
    random = np.random.default_rng(0)
    for part, number in product(("train", "val", "test"), range(4)):
        for kind in ("images", "masks"):
            (folder / part / kind).mkdir(parents=True, exist_ok=True)
            shape = (8, 8, 3) if kind == "images" else (8, 8)
            values = random.integers(0, 255 if kind == "images" else 2, shape, np.uint8)
            if kind == "masks":
                values[:4] = 255
            Image.fromarray(values).save(folder / part / kind / f"{number}.png")
    return folder


def test_the_budget_is_kept_and_counted_alike(told):
    result = json.loads(told[1].stdout)
    (budget,) = result["budgets"]
    assert budget["met"]
    assert budget["value"] <= budget["limit"] == pytest.approx(0.6 * result["full"]["macs"])
    assert budget["value"] == result["network"]["macs"]  # the cost model, and a count on the extracted network


@pytest.mark.parametrize("name", ["network.onnx", "network.pt2"])
def test_a_file_costs_what_the_run_says(name, runs, say):
    result = json.loads((runs.finished / "result.json").read_text())["network"]
    measured = say("measure", runs.finished / name, "--costs", "macs,params,memory:params")
    assert measured["units"] == {"macs": "MAC", "params": "parameter", "memory:params": "B"}
    assert measured["costs"]["macs"] == result["macs"]
    assert measured["costs"]["params"] < result["params"]  # batch norms are folded into their convolutions
    assert measured["costs"]["memory:params"] == result["memory:params"] == 4 * measured["costs"]["params"]


def test_a_run_costs_what_it_says(runs, say):
    result = json.loads((runs.finished / "result.json").read_text())["network"]
    costs = say("measure", runs.finished, "--costs", "macs,params,memory:params")["costs"]
    assert costs == {"macs": result["macs"], "params": result["params"], "memory:params": result["memory:params"]}
    both = [
        say("measure", runs.finished, *more) for more in ([], ["--architecture", runs.finished / "architecture.json"])
    ]
    assert both[0] == both[1]


def test_latency_is_measured_in_milliseconds(runs, say):
    for target in (runs.finished, runs.finished / "network.onnx", runs.finished / "network.pt2"):
        measured = say("measure", target, "--costs", "latency")
        assert measured["units"] == {"latency": "ms"}
        assert 0 < measured["costs"]["latency"] < 1000
        spread = measured["measured"]["latency"]
        assert 0 < spread["p10"] <= measured["costs"]["latency"] <= spread["p90"]
        if target.is_file():
            assert list(spread) == ["p10", "p90"]


@pytest.mark.parametrize("name", ["network.onnx", "network.pt2"])
def test_a_file_says_all_that_it_costs(name, runs, say):
    file = runs.finished / name
    measured = say("measure", file)
    assert list(measured["costs"]) == ["macs", "params", "memory:params", "memory:file", "latency"]
    assert measured["costs"]["memory:file"] == file.stat().st_size


def test_a_file_that_looks_at_its_input_says_what_does_not_depend_on_it(tmp_path, say):
    branching(tmp_path, None)
    measured = say("measure", tmp_path / "network.onnx")
    assert list(measured["costs"]) == ["memory:file", "latency"]
    assert measured["costs"]["memory:file"] == (tmp_path / "network.onnx").stat().st_size


def test_the_size_of_a_runs_file_is_counted_on_its_architecture(runs, say):
    """Though the space as it is built has biases of zeros, which a file leaves out, and the run has none."""
    size = (runs.finished / "network.onnx").stat().st_size
    assert say("evaluate", runs.finished, "--costs", "memory:file")["costs"] == {"memory:file": size}
    found = say("measure", runs.finished, "--costs", "memory:file")
    assert found == {"costs": {"memory:file": size}, "units": {"memory:file": "B"}}


def test_costs_are_parted_by_commas_outside_of_brackets(finished, say):
    costs = "macs, schedule[workers=2,speeds=1:4],steps:2"
    found = say("evaluate", finished, "--costs", costs, "--recalibration", 0)["costs"]
    assert set(found) == {"macs", "schedule[speeds=1:4]", "steps:2"}  # two workers are the default


def test_a_space_is_measured_with_its_options_and_architectures(say):
    small = ("measure", "resnet_fabric", "--space.width", "1", "--space.channels=4")
    full, resnet = say(*small), say(*small, "--architecture", "resnet")
    assert set(full["costs"]) == {"macs", "params", "steps"}
    assert all(resnet["costs"][key] < full["costs"][key] for key in ("macs", "params"))
    assert list(say(*small, "--costs", "steps[workers=2],macs:paper")["costs"]) == ["steps[workers=2]", "macs:paper"]


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_export_copies_a_network_that_loads(kind, runs, tmp_path, say):
    out = tmp_path / f"mine.{kind}"
    told = say("export", runs.finished, "--format", kind, "--out", out)
    assert told == {"file": str(out), "bytes": out.stat().st_size}
    assert out.read_bytes() == (runs.finished / f"network.{kind}").read_bytes()
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert difference(load(out), load(runs.finished / "network.pt2"), x) < 1e-4


def test_export_fills_channels_up(runs, tmp_path, say, capsys):
    out = tmp_path / "mine.onnx"
    told = say("export", runs.finished, "--fill", "8", "--out", out)
    assert told["bytes"] == out.stat().st_size
    assert set(told["ms"]) == {"original", "filled"}
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert difference(load(out), load(runs.finished / "network.pt2"), x) < 1e-4
    for more, message in (
        (("--format", "pt2", "--out", str(tmp_path / "a.pt2")), "one in pt2 gains nothing"),
        (("--fill", "0"), "block must be a whole number >= 1, got 0"),
    ):
        capsys.readouterr()
        assert cli.main(["export", str(runs.finished), "--fill", "8", "--out", str(out), *more]) == cli.WRONG
        assert message in capsys.readouterr().err


def test_export_to_the_file_itself_leaves_it_whole(finished, say):
    before = (finished / "network.onnx").read_bytes()
    say("export", finished, "--out", finished / "network.onnx")
    assert (finished / "network.onnx").read_bytes() == before


def test_reports_are_written_again_and_of_several_runs(finished, runs, tmp_path, say):
    (finished / "report.html").unlink()
    assert say("report", finished) == {"report": str(finished / "report.html")}
    assert (finished / "report.html").stat().st_size > 1000
    both = tmp_path / "both.html"
    assert say("report", finished, runs.unfinished, "--out", both) == {"report": str(both)}
    assert both.is_file()


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_explains_every_option(command, capsys):
    assert cli.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "--json" in text
    assert text.count("\n  -") > 2
    if command == "search":
        for words in ("passes over the training images", "--space.width", "BSN: 50 of 300", "resume", "seed"):
            assert words in " ".join(text.split())


def test_help_comes_without_a_command_too(capsys):
    assert cli.main(["--help"]) == 0
    assert cli.main([]) == cli.WRONG
    assert capsys.readouterr().out.count("budgetnet search") == 2


def test_people_see_tables(finished, capsys):
    assert cli.main(["measure", str(finished)]) == 0
    assert "MAC" in capsys.readouterr().out
    assert cli.main(["export", str(finished), "--out", str(finished / "a.onnx")]) == 0
    assert capsys.readouterr().out == f"wrote {finished / 'a.onnx'}\n"


def test_a_space_of_ones_own_from_search_to_measure(tmp_path, say, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    space = f"{tmp_path / 'own.py'}:build"
    found = say("search", *QUICK, "--space", space, "--space.channels", 2, "--budget", "macs<=90%", "--out", "run")
    assert found["budgets"][0]["met"]
    assert found["space"]["name"] == "own"
    assert say("measure", space, "--space.classes", 10, "--space.image_size", 8, "--space.channels", 2)["costs"][
        "macs"
    ] == found["full"]["macs"]  # fmt: skip
    assert say("measure", "run/network.onnx", "--costs", "macs")["costs"]["macs"] == found["network"]["macs"]


def test_a_space_of_ones_own_may_hold_dataclasses_and_is_not_read_for_each_of_its_flags(tmp_path, say, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = "@dataclass\nclass Size:\n    side: int\n\nwith open('read', 'a') as file:\n    file.write('once ')\n"
    Path("own.py").write_text(f"from __future__ import annotations\nfrom dataclasses import dataclass\n{kept}{OWN}")
    assert say("measure", "own.py:build", "--space.classes", 10, "--space.image_size", 8)["costs"]["macs"] > 0
    assert Path("read").read_text() == "once once "  # for the flags, and for what they say


@pytest.mark.usefixtures("no_files")
def test_several_budgets_and_targets_are_all_met(tmp_path, say, capsys):
    budgets = ["--budget", "macs~=60%", "--budget", "params<=95%", "--budget", "steps[workers=2]<=12"]
    command = [
        "search",
        *QUICK,
        "--space.width",
        "1",
        "--space.channels",
        "4",
        *budgets,
        "--out",
        str(tmp_path / "run"),
    ]
    assert cli.main(command) == 0  # as people run it
    assert "yes" in capsys.readouterr().out
    found = json.loads((tmp_path / "run" / "result.json").read_text())
    assert [(row["cost"], row["at_most"]) for row in found["budgets"]] == [
        ("macs", False), ("params", True), ("steps:2", True)
    ]  # fmt: skip
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert [row["at_most"] for row in last["budgets"]] == [False, True, True]
    assert all(row["met"] for row in found["budgets"])
    assert abs(found["budgets"][0]["value"] / found["budgets"][0]["limit"] - 1) <= 0.05


@pytest.mark.usefixtures("no_files")
def test_a_named_architecture_is_trained_without_a_search(tmp_path, say):
    small = ["--space.width", "1", "--space.channels", "4", "--out", tmp_path / "run"]
    found = say("search", *QUICK, *small, "--architecture", "resnet")
    assert found["budgets"] == []
    assert found["network"]["macs"] < found["full"]["macs"]
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["phase"] == "finetune"


@pytest.mark.usefixtures("no_exports")
def test_a_search_from_python_without_a_command_is_reported(tmp_path):
    import budgetnet as bn

    options = bn.SearchOptions(epochs=1, warmup=0, finetune=0)
    space = bn.spaces.resnet_fabric(width=1, channels=4, image_size=8, in_channels=1)
    data = bn.data.load("digits").subset(128, seed=0)
    found = bn.search(space, data, [bn.Budget(bn.costs.MACs(), at_most="90%")], options, out=tmp_path / "run")
    assert (found.run / "report.html").is_file()
    assert found.network()(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
    assert found.supernet is not space


def test_a_diverging_loss_ends_with_one_line_and_the_run_kept(tmp_path, capsys):
    command = ["search", *SMALL, "--out", str(tmp_path / "run"), "--learning_rate", "1e30", "--json"]
    assert cli.main(command) == cli.WRONG
    (line,) = capsys.readouterr().err.splitlines()
    assert "finite" in line
    assert (tmp_path / "run" / "options.json").is_file()


@pytest.mark.usefixtures("no_files")
def test_an_interrupted_run_goes_on_to_the_same_network(runs, unfinished, monkeypatch, capsys):
    """The stopped run had one step to go; it ends where the run that was never stopped did."""
    steps, step = [], training.Learner.step
    monkeypatch.setattr(training.Learner, "step", lambda *a, **k: (steps.append(None), step(*a, **k)))
    assert cli.main(["search", *SMALL, "--out", str(unfinished), "--resume", "--json"]) == 0
    result, expected = (json.loads((run / "result.json").read_text()) for run in (unfinished, runs.finished))
    assert len(steps) == 1
    assert json.loads(capsys.readouterr().out) == result
    assert result["budgets"] == expected["budgets"]
    assert result["test"] == expected["test"]


def test_an_interruption_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(training.Learner, "step", interrupt)
    assert cli.main(["search", *SMALL, "--out", str(tmp_path / "run"), "--json"]) == 130
    how = f"the same command with --resume --out {tmp_path / 'run'} goes on from there"
    assert capsys.readouterr().err == f"budgetnet: interrupted; {how}\n"


def test_an_interruption_before_there_is_a_run_says_no_more(tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["budgetnet.steering"], "check_reachable", interrupt)
    assert cli.main(["search", *SMALL, "--out", str(tmp_path / "run"), "--json"]) == 130
    assert capsys.readouterr().err == "budgetnet: interrupted\n"
    assert not list(tmp_path.iterdir())


def test_the_version_is_told(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def test_the_exit_status_reaches_the_shell(tmp_path, monkeypatch, capsys):
    """3 where no network keeps the budgets; all limits are told beside what binds."""
    command = ["budgetnet", "search", *SMALL, "--budget", "params<=1", "--out", str(tmp_path / "run")]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("budgetnet", run_name="__main__")
    assert caught.value.code == cli.UNREACHABLE == 3
    *table, line = capsys.readouterr().err.splitlines()
    assert line.startswith("budgetnet: params must be at most 1 parameter, but the smallest network of resnet_fabric")
    (asked,) = [row.split() for row in table if "params" in row]
    (other,) = [row.split() for row in table if "macs" in row]
    assert "".join(asked).endswith("1parameter│")
    assert "".join(other).endswith("MAC│")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    """A run whose gates look at the input, and of which a threshold above 1/2 was asked."""
    from budgetnet.runs import RunFolder

    folder = tmp_path_factory.mktemp("conditional") / "run"
    space = ["--space", "resnet", "--space.depth", "8", "--space.channels", "4", "--space.conditional", "true"]
    search = ["search", *QUICK, *space, "--gate_start", "0.3", "--budget", "macs<=40%", "--out", str(folder)]
    assert cli.main([*search, "--json"]) == 0
    return RunFolder(folder)


def test_gates_that_look_at_the_input_are_evaluated_as_the_run_decides(conditional, capsys, say):
    capsys.readouterr()
    result = conditional.read("result.json")
    assert result["inference"]["tau"] != 0.5
    found = say("evaluate", conditional.path)
    assert (found["policy"], found["tau"]) == ("threshold", result["inference"]["tau"])
    assert found["quality"] == pytest.approx(result["test"], rel=1e-5)
    assert found["costs"]["macs"] == pytest.approx(result["inference"]["test_costs"]["macs"], rel=1e-5)
    same = say("evaluate", conditional.path, "--policy", "threshold")
    assert same == found
    again = say("evaluate", conditional.path, "--recalibration", "1")
    assert again["quality"] != found["quality"]


def test_policy_threshold_runs_and_seed_are_what_is_evaluated(conditional, capsys, say):
    """Each of them changes what is seen."""
    capsys.readouterr()
    look = partial(say, "evaluate", conditional.path, "--recalibration", "0")
    own, every, low = look(), look("--policy", "always-on"), look("--tau", "0.4")
    assert every["activation"] == 1 > low["activation"] > own["activation"]
    assert every["costs"]["macs"] > low["costs"]["macs"] > own["costs"]["macs"]
    assert low["tau"] == 0.4
    drawn = look("--policy", "stochastic")
    assert drawn["policy"] == "stochastic"
    assert drawn["costs"] == look("--policy", "stochastic")["costs"]
    assert drawn["costs"] != look("--policy", "stochastic", "--seed", "1")["costs"]
    two, three = (look("--policy", "ensemble", "--runs", count) for count in ("2", "3"))
    assert two["quality"]["loss"] != three["quality"]["loss"]
    assert three["costs"]["macs"] == pytest.approx(1.5 * two["costs"]["macs"], rel=0.05)


def test_a_network_that_was_chosen_is_evaluated_as_it_was_handed_over(runs, say):
    result = json.loads((runs.finished / "result.json").read_text())
    found = say("evaluate", runs.finished, "--costs", "macs,params")
    assert found["policy"] == "chosen"
    assert found["quality"] == pytest.approx(result["test"], abs=0.01)  # which is seen in the run's precision
    assert found["costs"] == {name: result["network"][name] for name in ("macs", "params")}
    asked = say("evaluate", runs.finished, "--tau", "0")
    assert (asked["policy"], asked["tau"]) == ("threshold", 0)
    assert asked["costs"]["macs"] == result["full"]["macs"]
    assert say("evaluate", runs.unfinished)["policy"] == "threshold"  # nothing is handed over yet


def test_a_run_of_gates_that_look_at_the_input_costs_what_is_expected(conditional, capsys, say):
    capsys.readouterr()
    network = conditional.read("result.json")["network"]
    found = say("measure", conditional.path)
    assert found["costs"] == pytest.approx(
        {name: network[name] for name in ("macs", "macs[gates=false]")}
        | {"params": network["params"], "memory:params": network["memory:params"]}
        | {"latency": network["latency_ms"]["median"]}
    )
    assert found["units"]["macs"] == "MAC"
    bare = say("measure", conditional.path, "--costs", "macs[gates=False],macs")
    assert list(bare["costs"]) == ["macs[gates=False]", "macs"]
    assert bare["costs"]["macs[gates=False]"] == found["costs"]["macs[gates=false]"]
    assert cli.main(["measure", str(conditional.path)]) == 0
    assert "macs[gates=false]" in capsys.readouterr().out
    assert cli.main(["measure", str(conditional.path), "--costs", "steps"]) == cli.WRONG
    assert (
        "can be measured macs, macs[gates=false], params, memory:params, latency, got 'steps'"
        in capsys.readouterr().err
    )
    mostly = say("measure", conditional.path, "--architecture", conditional.path / "architecture.json")
    assert set(mostly["costs"]) == {"macs", "steps"}
    space = say("measure", "resnet", "--space.depth", "8", "--space.conditional", "true")
    assert set(space["costs"]) == {"macs", "steps"}


def test_a_person_is_told_where_gates_cost_more_time_than_they_save(conditional, capsys):
    result = conditional.read("result.json")
    for ratio, slow in ((0.84, False), (1.21, True)):
        inference = result["inference"] | {"beside_full": {"torch 1": 0.9, "onnxruntime 1": ratio}}
        capsys.readouterr()
        _tell(SimpleNamespace(result=result | {"inference": inference}, run=conditional.path))
        told = " ".join(capsys.readouterr().out.split())
        assert f"without gates: 0.90 in torch at batch 1, {ratio:.2f} in onnxruntime at batch 1" in told
        assert ("slower than the full network without gates in onnxruntime at batch 1: `budgetnet" in told) == slow


def test_what_it_takes_to_decide_is_told_apart_from_what_is_decided_on(conditional, capsys, say):
    """By hand: a head pools what it looks at, and has its layers' MACs for each gate; all heads are reached."""
    result = conditional.read("result.json")
    network = spaces.resnet(depth=8, channels=4, in_channels=1, image_size=8, conditional=True)
    deciding = 0
    for edge, head in network.heads.items():
        shape = network.gate_shape(int(edge))
        deciding += prod(shape) + head.count * (shape[0] * 16 + 16)
    capsys.readouterr()
    for split in (result["network"], result["inference"]["test_costs"]):
        assert split["macs"] - split["macs[gates=false]"] == pytest.approx(deciding)
    assert all(list(point["costs"]) == ["macs"] for point in result["inference"]["curve"])
    kept = say("evaluate", conditional.path, "--costs", "macs[gates=false],macs")
    assert kept["costs"] == pytest.approx(result["inference"]["test_costs"], rel=1e-5)
    assert "MACs, deciding by the input left out" in (conditional.path / "report.html").read_text()
    asked = ["resnet", "--space.depth", "8", "--space.conditional", "true", "--costs", "macs,macs[gates=false]"]
    space = say("measure", *asked)["costs"]
    assert space["macs"] > space["macs[gates=false]"]


def test_gates_that_hardly_look_at_the_input_are_folded(conditional, tmp_path, capsys, say, monkeypatch):
    capsys.readouterr()
    result, out = conditional.read("result.json"), tmp_path / "folded.onnx"
    told = say("export", conditional.path, "--fold", "0.05", "--out", out)
    assert told["file"] == str(out)
    assert told["bytes"] == out.stat().st_size
    original, folded = told["validation"]["original"], told["validation"]["folded"]
    assert original["accuracy"] == pytest.approx(result["validation"]["accuracy"])
    assert original["macs"] == pytest.approx(result["network"]["macs"], rel=1e-5)
    x = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert load(out)(x).shape == (1, 10)
    monkeypatch.setattr("budgetnet.cli.export.export_fastest", lambda *_: {})  # takes seconds, and was seen
    all_of_them = say("export", conditional.path, "--fold", "0.49", "--out", out)
    assert 0 < told["constants"] <= all_of_them["constants"] <= told["gates"]
    assert folded["macs"] < original["macs"]  # what is constant is not decided any more
    assert set(folded) == set(original) == {"loss", "accuracy", "macs"}
    assert cli.main(["export", str(conditional.path), "--fold", "0.05", "--out", str(out)]) == 0  # for a person
    assert "gates are constants now" in capsys.readouterr().out


def test_the_data_of_a_run_are_augmented_as_in_the_run(conditional, tmp_path):
    options = conditional.read("options.json")
    again = RunFolder(tmp_path)
    again.write("options.json", options | {"data": options["data"] | {"pad": 3, "flip": True}})
    network = spaces.resnet(depth=8, channels=4, in_channels=1, image_size=8)
    augmentation = data_of_run(again, network, SimpleNamespace(data=None, root="data")).augmentation
    assert (augmentation.pad, augmentation.flip) == (3, True)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--fold", "0.5"), "margin must lie in [0, 0.5), got 0.5"),
        (
            ("--fold", "0.1", "--format", "pt2", "--out", "{tmp}/a.pt2"),
            "a network whose gates look at the input is exported to onnx, got 'pt2'",
        ),
    ],
)
def test_what_cannot_be_folded_is_said_in_one_line(conditional, runs, tmp_path, capsys, more, message):
    given = ["--out", str(tmp_path / "a.onnx"), *[word.format(tmp=tmp_path) for word in more]]
    capsys.readouterr()
    assert cli.main(["export", str(conditional.path), *given]) == cli.WRONG
    assert capsys.readouterr().err == f"budgetnet: {message}\n"
    assert cli.main(["export", str(runs.finished), "--fold", "0.1", "--out", str(tmp_path / "a.onnx")]) == cli.WRONG
    expected = f"budgetnet: --fold takes a run whose gates look at the input, got {runs.finished}\n"
    assert capsys.readouterr().err == expected
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_files")
def test_a_search_starts_from_weights_with_a_classifier_of_its_own(tmp_path, say):
    """Three classes where the weights have seven: all but the last layer is theirs, and how pixels are seen."""
    for part, kind, number in product(("train", "val", "test"), "abc", range(8)):
        file = tmp_path / "photos" / part / kind / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (32, 32, 3), np.uint8)).save(file)
    shape = {"depth": 18, "channels": 4, "image_size": 32}
    pretrained = learned(spaces.resnet(**shape, classes=7))
    torch.save({name: value.detach() for name, value in pretrained.items()}, tmp_path / "pretrained.pth")
    flags = ["--space", "resnet", "--space.depth", "18", "--space.channels", "4", "--budget", "macs<=90%"]
    flags += ["--data", tmp_path / "photos", "--epochs", 1, "--warmup", 0, "--finetune", 0, "--learning_rate", 0]
    flags += ["--candidates", 2, "--recalibration", 2]
    say("search", *flags, "--weights", tmp_path / "pretrained.pth", "--out", tmp_path / "run")
    network = spaces.resnet(**shape, classes=3)
    restored(RunFolder(tmp_path / "run"), network)
    for name, value in learned(network).items():
        if name.startswith("fc"):
            assert len(value) == 3
        elif name.endswith("weight"):
            assert torch.equal(value, pretrained[name]), name
    seen = json.loads((tmp_path / "run" / "options.json").read_text())["data"]
    assert (seen["mean"], seen["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@pytest.mark.usefixtures("no_files")
def test_what_a_resumed_run_lacks_and_how_data_are_divided_is_told(tmp_path, capsys):
    short = ["search", *SMALL, "--out", str(tmp_path / "run")]
    assert cli.main([*short, "--resume"]) == 0
    told = capsys.readouterr().err
    data = datasets.load("digits").subset(256, seed=0)
    parts = [len(part) for part in (data.train, data.validation, data.test)]
    assert "digits: {:,} images to train on, {:,} to choose by, {:,} to test on".format(*parts) in told
    assert f"{tmp_path / 'run'} held no run to resume: it begins anew" in told
    assert json.loads((tmp_path / "run" / "options.json").read_text())["data"]["classes"] == [str(n) for n in range(10)]


def test_help_tells_what_an_option_is_unless_given(capsys):
    assert cli.main(["search", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    for name, number in DEFAULTS["score"].items():
        conditional = DEFAULTS["conditional"][name]
        assert f"{number} (score), {DEFAULTS['gumbel'][name]} (gumbel), {conditional} (conditional)." in told
    assert cli.main(["search", "--epoch", "3", "--budget", "macs<=50%"]) == 2  # no flag is taken for another
    assert "--epoch" in capsys.readouterr().err


def test_an_architecture_is_not_asked_of_a_file(runs, capsys):
    assert cli.main(["measure", str(runs.finished / "network.onnx"), "--architecture", "full"]) == 2
    assert "--architecture is of a space or a run, got it beside" in capsys.readouterr().err
    assert cli.main(["measure", str(runs.finished / "network.onnx")]) == 0
    told = capsys.readouterr().out
    assert re.search(r"\nlatency: 8 of 10 calls \S+ ms to \S+ ms; onnxruntime, threads 1, batch 1\n", told)
