"""A run folder survives being stopped anywhere: old or new file, never half of one, and the same network at the end."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from conftest import SMALL, alone, python
from safetensors.torch import load_file

from budgetnet import Budget, SearchOptions, cli, data, load, search, session, spaces
from budgetnet.costs.timetable import Setting, Timetable
from budgetnet.errors import ConfigError, DivergenceError, FileError, UnreachableBudget
from budgetnet.export import export
from budgetnet.export import load as load_export
from budgetnet.files import aside, replace
from budgetnet.runs import RunFolder, load_tensors, next_folder
from budgetnet.session import Session
from budgetnet.training import Learner, Sums

EVERY_BATCH = """
import sys, budgetnet.session as session
from budgetnet import delivery
from budgetnet.cli import main

def take_up(self, mark=sys.argv.pop(1), before=session.Session.take_up):
    before(self)
    open(mark, "w").close()

def export_all(network, paths, x, export_all=delivery.export_all):
    return [*export_all(network, [path for path in paths if path.suffix == ".pt2"], x), *paths[:1]]

def load_file(path, load=delivery.load_file):
    return load(path.with_suffix(".pt2"))

session.CHECKPOINT_SECONDS, session.Session.take_up = -1, take_up
delivery.export_all, delivery.load_file = export_all, load_file
delivery.file_latency = lambda *_, **__: dict.fromkeys(("median", "p10", "p90"), 1.0)
sys.exit(main())
"""  # says when it begins to compute, and writes no .onnx file; where a checkpoint falls changes no result


class Crash(BaseException):
    """The power goes off: nothing of ours handles it."""


def crash(*_, **__):
    raise Crash


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_crash_while_writing_leaves_the_old_file_whole(moment, tmp_path, monkeypatch):
    """Before the new bytes are on disk, and between that and the renaming."""
    run = RunFolder(tmp_path)
    run.write("a.json", {"old": 1})
    (tmp_path / "checkpoint").mkdir()
    run.save_checkpoint({"w": torch.ones(3)}, {"epoch": 1})
    run.append_metrics({"epoch": 0})
    with monkeypatch.context() as patch:
        patch.setattr(*((os, "fsync") if moment == "fsync" else (Path, "replace")), crash)
        for write in (
            lambda: run.write("a.json", {"new": 2}),
            lambda: run.save_checkpoint({"w": torch.zeros(3)}, {"epoch": 2}),
            lambda: run.append_metrics({"epoch": 1}),
        ):
            with pytest.raises(Crash):
                write()
    assert run.read("a.json") == {"old": 1}
    assert run.metrics() == [{"epoch": 0}]
    tensors, state = run.load_checkpoint()
    assert torch.equal(tensors["w"], torch.ones(3))
    assert state == {"epoch": 1}
    run.write("a.json", {"new": 2})  # what was left half-written is in nobody's way
    run.save_checkpoint({"w": torch.zeros(3)}, {"epoch": 2})
    assert run.read("a.json") == {"new": 2}
    assert run.load_checkpoint()[1] == {"epoch": 2}


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a", lambda path: replace(path, b"new")),
        ("a.json", lambda path: Timetable(Setting.here("torch", 1, 1, "cpu"), 1.0).save(path)),
        ("a.onnx", lambda path: export(torch.nn.ReLU(), path, torch.zeros(1, 1, 2, 2))),
        ("a.pt2", lambda path: export(torch.nn.ReLU(), path, torch.zeros(1, 1, 2, 2))),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_a_write_that_fails_leaves_nothing_behind(name, write, tmp_path, monkeypatch):
    (tmp_path / name).write_bytes(b"old")

    def full(_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == b"old"


def test_an_epoch_that_runs_again_takes_the_place_of_its_line(tmp_path):
    run = RunFolder(tmp_path)
    for epoch, loss in ((0, 3.0), (1, 2.0), (2, 1.0), (1, 2.5)):
        run.append_metrics({"epoch": epoch, "loss": loss})
    assert run.metrics() == [{"epoch": 0, "loss": 3.0}, {"epoch": 1, "loss": 2.5}]


def test_numbers_that_are_not_finite_are_never_written(tmp_path):
    run = RunFolder(tmp_path)
    run.write("a.json", {"loss": 1.0})
    for write in (
        lambda: run.write("a.json", {"loss": float("nan")}),
        lambda: run.append_metrics({"epoch": 0, "loss": float("inf")}),
        lambda: run.save_checkpoint({}, {"price": float("inf")}),
    ):
        with pytest.raises(DivergenceError, match="finite"):
            write()
    assert run.read("a.json") == {"loss": 1.0}
    assert run.metrics() == []
    assert run.load_checkpoint() is None


def test_what_differs_is_named_down_to_the_option(tmp_path):
    asked = {"space": {"name": "a", "options": {"width": 3}}, "data": {}, "budgets": [], "architecture": None}
    run = RunFolder(tmp_path / "run")
    run.create({**asked, "search": {"seed": 0, "milestones": (0.5,)}}, resume=False)
    run.create({**asked, "search": {"seed": 0, "milestones": (0.5,)}}, resume=True)
    for changed, name in (
        ({"search": {"seed": 1, "milestones": (0.5,)}}, r"search\.seed 0.* got 1"),
        ({"search": {"seed": 0, "milestones": (0.6,)}}, r"search\.milestones \[0.5\].* got \[0.6\]"),
        ({"space": {"name": "a", "options": {"width": 4}}}, r"space\.options\.width 3.* got 4"),
        ({"space": {"name": "a", "options": {}}}, r"space\.options\.width 3.* got None"),
    ):
        with pytest.raises(ConfigError, match=name):
            run.create({**asked, "search": {"seed": 0, "milestones": (0.5,)}, **changed}, resume=True)


def test_two_writers_of_one_file_are_in_nobodys_way(tmp_path):
    """Each has a file of its own until it is done; the one that is done last counts."""
    file = tmp_path / "a.json"
    with aside(file) as first:
        first.write_text("first")
        with aside(file) as second:
            second.write_text("second")
        assert file.read_text() == "second"
        assert first.read_text() == "first"
    assert file.read_text() == "first"
    assert list(tmp_path.iterdir()) == [file]


def test_the_next_folder_is_the_first_that_is_free_and_no_other_run_takes_it(tmp_path):
    (tmp_path / "a-1").mkdir()
    (tmp_path / "a-3").mkdir()
    with next_folder(tmp_path, "a") as first, next_folder(tmp_path, "a") as second:
        assert [first, second] == [tmp_path / "a-2", tmp_path / "a-4"]
    assert second.is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="a run needs a folder to write to, got"), next_folder(tmp_path / "file", "a"):
        pass


def test_a_search_that_is_refused_leaves_no_folder(tmp_path, monkeypatch):
    """One that got as far as writing keeps what it wrote."""
    monkeypatch.chdir(tmp_path)
    space = spaces.resnet_fabric(width=1, channels=4, image_size=8, in_channels=1)
    digits, options = data.load("digits").subset(128, seed=0), SearchOptions(epochs=1, warmup=0, finetune=0)
    with pytest.raises(UnreachableBudget):
        search(space, digits, ["macs<=1"], options)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(Session, "run_epoch", crash)
    with pytest.raises(Crash):
        search(space, digits, ["macs<=50%"], options)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json")] == [
        "runs/digits-resnet_fabric-1/options.json"
    ]


def test_a_wrong_architecture_is_refused_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(Budget, "bind", crash)
    space = spaces.resnet_fabric(width=1, channels=4, image_size=8, in_channels=1)
    for wrong, message in (
        ("vgg", "architectures of resnet_fabric are"),
        (torch.zeros(1, space.gate_count), "connect"),
    ):
        with pytest.raises(ConfigError, match=message):
            search(space, data.load("digits"), ["latency<=50%"], architecture=wrong, out=tmp_path / "run")


@pytest.mark.parametrize(
    "wrong",
    [
        {"a": torch.ones(2), "b": torch.ones(4)},
        {"a": torch.ones(2), "b": torch.ones(3, dtype=torch.float64)},
        {"a": torch.ones(2), "b": torch.tensor([1.0, torch.nan, 1.0])},
        {"a": torch.ones(2)},
        {"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)},
    ],
    ids=["shape", "type", "nan", "missing", "extra"],
)
def test_nothing_is_copied_when_one_tensor_is_wrong(wrong):
    targets = {"a": torch.zeros(2), "b": torch.zeros(3)}
    with pytest.raises(FileError):
        load_tensors(targets, wrong)
    assert not targets["a"].any()
    assert not targets["b"].any()


def learner(options, *, seed):
    torch.manual_seed(seed)
    network = spaces.resnet_fabric(width=1, channels=4, image_size=8, in_channels=1)
    budgets = [Budget.parse(text).bind(network) for text in ("macs<=50%", "params~=60%")]
    return Learner(network, budgets, options, ignore=None, device=torch.device("cpu"), dtype=torch.float32)


def steps(learned, count, first):
    for step in range(first, first + count):
        data = torch.Generator().manual_seed(step)
        x, y = torch.randn(16, 1, 8, 8, generator=data), torch.randint(10, (16,), generator=data)
        generator = torch.Generator().manual_seed(100 + step)
        learned.step(x, y, "search", generator=generator, rate=0.05, progress=0.5, sums=Sums())


@pytest.mark.parametrize(
    "given",
    [{}, {"gate_optimizer": "sgd", "momentum": 0.0}, {"price": 2.0}, {"architectures": "example"}],
    ids=["default", "plain SGD", "fixed price", "one each"],
)
def test_a_checkpoint_brings_everything_back_bit_for_bit(given, tmp_path):
    """Weights, batch norms, momenta, Adam's moments, prices and starts; and the steps after it are the same."""
    options = SearchOptions(**given)
    first, second = learner(options, seed=0), learner(options, seed=1)
    first.begin_search()
    steps(first, 3, 0)
    first.chosen = first.network.architecture("resnet")
    tensors, state = first.state()
    RunFolder(tmp_path).save_checkpoint(tensors, state)
    second.load_state(*RunFolder(tmp_path).load_checkpoint())
    for again in range(2):
        (tensors, state), (others, other) = first.state(), second.state()
        assert tensors.keys() == others.keys()
        assert all(torch.equal(value, others[name]) for name, value in tensors.items()), again
        assert state == other
        steps(first, 2, 3)
        steps(second, 2, 3)
    kinds = {name.rpartition(".")[2] for name in tensors if name.startswith("optimizer.")}
    adam = {"step", "exp_avg", "exp_avg_sq"} if options.gate_optimizer == "adam" else set()
    assert kinds == adam | ({"momentum_buffer"} if options.momentum else set())
    assert state["starts"]
    assert all(price["value"] > 0 for price in state["prices"])


def test_a_run_is_taken_up_where_it_stood(unfinished, monkeypatch):
    """Epoch, batch, sums and candidates are those of the checkpoint when the next epoch begins."""
    state = RunFolder(unfinished).load_checkpoint()[1]
    stood = {}

    def look(self, progress):
        stood.update(epoch=self.epoch, batch=self.batch, images=self.images, seconds=self.seconds)
        stood.update(sums=asdict(self.sums), candidates=self.candidates)
        raise KeyboardInterrupt

    monkeypatch.setattr(Session, "run_epoch", look)
    assert cli.main(["search", *SMALL, "--out", str(unfinished), "--resume", "--json"]) == cli.INTERRUPTED
    assert stood == {key: state[key] for key in stood}
    assert (stood["epoch"], stood["batch"], stood["sums"]["images"]) == (2, 1, 128)
    assert sum(candidate["chosen"] for candidate in stood["candidates"]) == 1


def killed(folder: Path, delays: list[float], *more: str) -> set[tuple[int, int] | None]:
    """A search that is killed so many seconds after it began to compute, taken up again, and at last left to its end.

    Returns:
        The checkpoints it was killed at, as (epoch, batch), None for before the first.
    """
    mark, stood = folder.with_name("under way"), set()
    searching = ["search", *SMALL, *more, "--out", str(folder), "--resume", "--json"]
    command = [sys.executable, "-c", EVERY_BATCH, str(mark), *searching]
    for delay in delays:
        mark.unlink(missing_ok=True)
        process = subprocess.Popen(command, env=alone(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not mark.exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(delay)
        process.kill()
        process.wait()
        saved = RunFolder(folder).load_checkpoint()
        stood.add(saved and (saved[1]["epoch"], saved[1]["batch"]))
    ended = subprocess.run(command, env=alone(), capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    return stood


def same_end(folder: Path, expected: Path) -> None:
    runs = (folder, expected)
    ends = [[load_file(run / "checkpoint" / "latest.safetensors") for run in runs]]
    if (folder / "network.pt2").exists():
        ends.append([torch.export.load(run / "network.pt2").state_dict for run in runs])
    for ours, theirs in ends:
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    results = [RunFolder(run).read("result.json") for run in runs]
    for key in ("budgets", "candidates", "network", "validation", "test", "inference", "images_seen"):
        ours, theirs = (result.get(key) for result in results)
        if key == "inference" and ours:
            ours, theirs = ({**part, "onnx": None, "beside_full": None} for part in (ours, theirs))  # times tell
        if key == "network":
            ours, theirs = (
                {name: part[name] for name in ("macs", "params", "memory:params")} for part in (ours, theirs)
            )
        assert ours == theirs
    lines = [[{**line, "seconds": 0} for line in RunFolder(run).metrics()] for run in (folder, expected)]
    assert lines[0] == lines[1]
    shapes = [json.loads((run / "architecture.json").read_text()) for run in (folder, expected)]
    assert shapes[0] == shapes[1]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_run_that_is_killed_ends_in_the_same_bits(told, tmp_path):
    """As another process that was not."""
    killed(tmp_path / "run", [random.Random(0).uniform(0, 0.5)])
    same_end(tmp_path / "run", told[0])


def test_a_finished_run_gives_its_network_to_another_process(runs, tmp_path):
    network, exported = load(runs.finished), load_export(runs.finished / "network.pt2")
    x = torch.randn(8, 1, 8, 8)
    assert isinstance(network, torch.fx.GraphModule)
    assert not network.training
    with torch.no_grad():
        torch.testing.assert_close(network(x), exported(x), rtol=1e-5, atol=1e-5)
    options = RunFolder(runs.finished).read("options.json")
    options["space"]["name"] = "mine"
    shutil.copytree(runs.finished, tmp_path / "run")
    RunFolder(tmp_path / "run").write("options.json", options)
    with pytest.raises(ConfigError, match="learned in a space of its own"):
        load(tmp_path / "run")
    given = spaces.resnet_fabric(**{**options["space"]["options"], "shifts": "slr"})
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "run", given)(x), network(x))
    with pytest.raises(FileError):
        load(tmp_path / "run", spaces.resnet_fabric(width=2, image_size=8, in_channels=1))
    with pytest.raises(FileError, match=r"result\.json"):
        load(runs.unfinished)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_longer_run_that_is_killed_ten_times_ends_in_the_same_bits(tmp_path):
    more = ("--epochs", "12", "--train_images", "1257")
    moment = random.Random(1)
    stood = killed(tmp_path / "run", [moment.uniform(0, 1.5) for _ in range(10)], *more)
    assert len(stood) > 3  # not always at the same place
    whole = python("-m", "budgetnet", "search", *SMALL, *more, "--out", str(tmp_path / "whole"), "--json")
    assert whole.returncode == 0, whole.stderr
    same_end(tmp_path / "run", tmp_path / "whole")


@pytest.mark.usefixtures("no_files")
def test_a_search_with_gates_that_look_at_the_input_goes_on_in_the_same_bits(tmp_path, monkeypatch):
    """Stopped within each of its two epochs of search, and taken up with other weights to begin with."""
    digits, step = data.load("digits").subset(256, seed=0), Learner.step
    given = {"epochs": 3, "warmup": 0.34, "batch_size": 64, "precision": "float32"}
    options = SearchOptions(**given, target="exponential", distillation=0.5, gate_decay="papers")

    def searched(folder: str, *, seed: int, stop: int | None = None) -> None:
        torch.manual_seed(seed)
        space = spaces.resnet(
            depth=8, channels=4, image_size=8, in_channels=1, conditional=True, memory=True, gates="both"
        )
        steps = []

        def stopped(*arguments, **told):
            steps.append(told)
            if len(steps) == stop:
                raise KeyboardInterrupt
            step(*arguments, **told)

        monkeypatch.setattr(Learner, "step", stopped)
        with pytest.raises(KeyboardInterrupt) if stop else nullcontext():
            search(space, digits, ["macs<=80%"], options, out=tmp_path / folder, resume=True)

    searched("whole", seed=0)
    monkeypatch.setattr(session, "CHECKPOINT_SECONDS", -1)  # after every batch
    stood = []
    for seed, stop in enumerate((7, 5)):
        searched("run", seed=seed, stop=stop)
        state = RunFolder(tmp_path / "run").load_checkpoint()[1]
        stood.append((state["epoch"], state["batch"]))
    assert stood == [(1, 2), (2, 2)]
    searched("run", seed=2)
    same_end(tmp_path / "run", tmp_path / "whole")
