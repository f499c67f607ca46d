"""What the tests share: a cache of their own, and two runs of a few seconds, one finished and one stopped half-way."""

from __future__ import annotations

import functools
import io
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

SMALL = [
    *("--data", "digits", "--train_images", "256", "--space.width", "1", "--space.channels", "4"),
    *("--epochs", "3", "--warmup", "0.34", "--finetune", "0.33", "--candidates", "4", "--recalibration", "2"),
    *("--budget", "macs<=60%"),
]
"""Two batches in each of three epochs: one to warm up, one to search, one to fine-tune."""


class Runs(NamedTuple):
    """Run folders of `SMALL`; copy them, never change them."""

    finished: Path
    unfinished: Path  # stopped in its last epoch, between the two batches


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The same sums here and in the processes that tests start: results depend on the number of threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def one_look():
    """A measurement is one short look at the machine: what tests say of times holds however noisy they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("budgetnet.costs.stopwatch.LOOK", 0.05)
        patch.setattr("budgetnet.costs.stopwatch.PATIENCE", 0.0)
        patch.setattr("budgetnet.costs.stopwatch.FAST", 0.0)
        yield


@pytest.fixture(scope="session", autouse=True)
def one_registry():
    """The exporter reads its whole library of ONNX operators at each export: a second, for the same operators."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BUDGETNET_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def told(tmp_path_factory):
    """The finished run, and what its command ended with and printed."""
    from budgetnet import cli

    folder, out, err = tmp_path_factory.mktemp("finished") / "run", io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = cli.main(["search", *SMALL, "--out", str(folder), "--json"])
    return folder, subprocess.CompletedProcess("search", status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def runs(told, tmp_path_factory):
    from budgetnet import cli, session, training

    steps, step = [], training.Learner.step

    def stopped(*arguments, **options):
        steps.append(None)
        if len(steps) == 6:
            raise KeyboardInterrupt
        step(*arguments, **options)

    folder = tmp_path_factory.mktemp("unfinished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.Learner, "step", stopped)
        patch.setattr(session, "CHECKPOINT_SECONDS", -1)  # after every batch
        assert cli.main(["search", *SMALL, "--out", str(folder), "--json"]) == cli.INTERRUPTED
    assert told[1].returncode == 0, told[1].stderr
    return Runs(told[0], folder)


@pytest.fixture
def finished(runs, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(runs.finished, tmp_path / "run")


@pytest.fixture
def unfinished(runs, tmp_path):
    """A copy of the run that was stopped."""
    return shutil.copytree(runs.unfinished, tmp_path / "run")


@pytest.fixture
def no_exports(monkeypatch):
    """What is handed over is neither written nor timed: that takes seconds, and has tests of its own."""
    from budgetnet import by_input, delivery

    networks: dict[Path, torch.nn.Module] = {}

    def written(network, paths, _):
        networks.update(dict.fromkeys(paths, network))
        return paths

    def fastest(network, path, _):
        networks[path] = network
        return {"groups": "branches", "ms": {}}

    monkeypatch.setattr(delivery, "export_all", written)
    monkeypatch.setattr(by_input, "export_fastest", fastest)
    monkeypatch.setattr(delivery, "load_file", networks.__getitem__)
    monkeypatch.setattr(delivery, "file_latency", lambda *_, **__: dict.fromkeys(("median", "p10", "p90"), 1.0))
    monkeypatch.setattr(delivery, "beside", lambda *_: {"torch 1": 1.0, "onnxruntime 1": 1.0})
    monkeypatch.setattr(delivery, "tune_fastest", lambda *_: None)


@pytest.fixture
def no_files(no_exports, monkeypatch):
    """Nor is there a page."""
    from budgetnet import report

    monkeypatch.setattr(report, "write", lambda _: None)


def python(*arguments, **given):
    """Runs this Python on one thread, so that the bits it computes can be compared."""
    return subprocess.run(
        [sys.executable, *arguments], env=alone(), capture_output=True, text=True, check=False, **given
    )


def alone():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def clocked(monkeypatch) -> None:
    """Latency models see the times of a `Clock`."""
    from clock import tick

    tick(monkeypatch)
