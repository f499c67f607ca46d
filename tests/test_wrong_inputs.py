"""A wrong input is one clear line, before anything is trained or written; docs/errors.md says which line."""

from __future__ import annotations

import pickle
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from conftest import SMALL
from safetensors.torch import save_file
from torch import nn
from wrong_files import (
    Prepare,
    Trap,
    archive,
    branching,
    checkpoint,
    images,
    onnx_file,
    run,
    saved,
    state,
    swapped,
    tensor,
    trapped,
    values,
    written,
)

from budgetnet import Budget, ConditionalGates, Edge, Node, SearchOptions, SuperNetwork, cli, costs, export, spaces
from budgetnet.conditional import ConditionalNetwork, conditional
from budgetnet.data.dataset import Split
from budgetnet.errors import BudgetnetError
from budgetnet.graph import Graph
from budgetnet.options import resolve_device
from budgetnet.training import Learner

DOCUMENT = Path(__file__).parent.parent / "docs" / "errors.md"


class Wrong(NamedTuple):
    """A command that is refused; `{tmp}` in it is the test's folder."""

    what: str
    command: str
    prepare: Prepare | None = None
    status: int = 2


class Refused(NamedTuple):
    """A call that is refused."""

    what: str
    call: Callable[[], object]


def search(extra: str = "", budget: str | None = "macs<=60%", out: str = "{tmp}/run") -> str:
    """A search of a few seconds, were it not for what is `extra`."""
    told = shlex.join(SMALL[:-2] if budget is None else [*SMALL[:-1], budget])
    return f"search {told} --out {out} {extra}".rstrip()


RESUME = search("--resume")
CATS = tuple(f"train/{kind}/{number}.png" for kind in ("cat", "dog") for number in range(4))
FACES = tuple(f"{part}/{kind}/0.png" for part in ("train", "val", "test") for kind in ("images", "masks"))
ENERGY = """
def energy(network):
    return "much"

def loss(output, target):
    return 0.0

def broken(network):
    return 1 / 0

def leaves(network):
    raise SystemExit(0)
"""
CYCLE = """
from budgetnet import Edge, SuperNetwork
from torch import nn

def build():
    edges = [Edge(start=start, end=end, module=nn.Identity()) for start, end in ("xa", "ab", "ba", "by")]
    return SuperNetwork(edges, input_shape=(1, 8, 8))
"""
RIGID = """
from budgetnet import Edge, SuperNetwork
from torch import nn

class Rigid(nn.Module):
    def forward(self, x):
        return x.reshape(2, *x.shape[1:])

def build():
    layers = {"still": nn.Identity(), "rigid": Rigid(), "last": nn.Sequential(nn.Flatten(), nn.Linear(64, 10))}
    edges = [Edge(start="y" if name == "last" else "x", end="z" if name == "last" else "y", module=layer, name=name)
             for name, layer in layers.items()]
    return SuperNetwork(edges, input_shape=(1, 8, 8), sink="z")
"""
FEW = "search --epochs 3 --warmup 0.34 --finetune 0.33 --budget macs<=60% --out {tmp}/run"
OWN = f"{FEW} --space {{tmp}}/own.py:build"
FOLDER = f"{FEW} --data {{tmp}}/data"

REQUESTS = [
    Wrong("a command that does not exist", "train"),
    Wrong("an option without its value", "search --seed"),
    Wrong("an option that does not exist", search("--speed 3")),
    Wrong("a word where none belongs", search("now")),
    Wrong("`--resume` without a run", "search --resume"),
    Wrong("no epochs", search("--epochs 0")),
    Wrong("epochs that are no number", search("--epochs many")),
    Wrong("half an epoch", search("--epochs 1.5")),
    Wrong("warm-up alone", search("--warmup 1")),
    Wrong("no epoch left to search", search("--warmup 0.5 --finetune 0.5")),
    Wrong("a negative learning rate", search("--learning_rate -0.1")),
    Wrong("an infinite learning rate", search("--learning_rate inf")),
    Wrong("empty batches", search("--batch_size 0")),
    Wrong("more architectures than examples", search("--batch_size 8 --architectures 9")),
    Wrong("no architecture", search("--architectures 0")),
    Wrong("leave-one-out with nothing left", search("--architectures 1")),
    Wrong("a price in words", search("--price cheap")),
    Wrong("a negative price", search("--price -1")),
    Wrong("a moving target that starts at nothing", search("--target moving --target_start 0")),
    Wrong("a rate of a layer that does not exist", search("--penalty per-gate --target_rates '{{\"g9.*\": 1}}'")),
    Wrong("a rate above 1", search("--penalty per-gate --target_rates.stem 2")),
    Wrong("rates for another penalty", search("--target_rates.stem 1")),
    Wrong("a schedule that does not exist", search("--schedule linear")),
    Wrong("a milestone past the end", search("--milestones [0.5,2]")),
    Wrong("a device that does not exist", search("--device warp9")),
    Wrong("a device that does not compute", search("--device meta")),
    Wrong("a precision that does not exist", search("--precision int8")),
    Wrong("a negative seed", search("--seed -1")),
    Wrong("a seed beyond 24 bits", search("--seed 99999999")),
    Wrong("no candidates", search("--candidates 0")),
    Wrong("an architecture that does not exist", search("--architecture vgg")),
    Wrong("an architecture from no file", search("--architecture {tmp}/none.json")),
    Wrong(
        "an architecture of another space",
        search("--architecture {tmp}/a.json"),
        written("a.json", '{"edges": [{"name": "a", "kept": true}]}'),
    ),
    Wrong("an architecture that is no list", search("--architecture {tmp}/a.json"), written("a.json", '{"edges": 3}')),
    Wrong(
        "an architecture whose edges have no name",
        search("--architecture {tmp}/a.json"),
        written("a.json", '{"edges": [{"name": 3, "kept": true}]}'),
    ),
]
BUDGETS = [
    Wrong("no budget", search(budget=None)),
    Wrong("a budget without a limit", search(budget="macs")),
    Wrong("a budget with another sign", search(budget="macs<25%")),
    Wrong("a cost that does not exist", search(budget="watts<=3")),
    Wrong("an option the cost does not have", search(budget="steps[cores=2]<=9")),
    Wrong("no workers", search(budget="steps[workers=0]<=9")),
    Wrong("an option where the cost has none", search(budget="layers:3<=9K")),
    Wrong("MACs counted in another way", search(budget="macs:half<=9K")),
    Wrong("memory of something else", search(budget="memory:gpu<=9K")),
    Wrong("workers in words", search(budget="steps:two<=9")),
    Wrong("a limit of 0", search(budget="macs<=0")),
    Wrong("a negative limit", search(budget="macs<=-5")),
    Wrong("a limit that is no number", search(budget="macs<=nan")),
    Wrong("a scale that does not exist", search(budget="macs<=5T")),
    Wrong("fewer MACs than the smallest network", search(budget="macs<=1K"), status=3),
    Wrong("fewer parameters than the smallest network", search(budget="params<=10"), status=3),
    Wrong("fewer steps than the shortest path", search(budget="steps:2<=3"), status=3),
    Wrong("a target above the full network", search(budget="macs~=150%"), status=3),
    Wrong("a target below the smallest network", search(budget="macs~=1%"), status=3),
    Wrong("budgets that contradict each other", search("--budget params~=95%", budget="macs<=40%"), status=3),
    Wrong("a file of costs that is not there", search(budget="{tmp}/costs.py:energy<=5")),
    Wrong("a function its file does not have", search(budget="{tmp}/costs.py:power<=5"), written("costs.py", ENERGY)),
    Wrong("a function of something else", search(budget="{tmp}/costs.py:loss<=5"), written("costs.py", ENERGY)),
    Wrong("a function that returns a text", search(budget="{tmp}/costs.py:energy<=5"), written("costs.py", ENERGY)),
    Wrong("a function that leaves Python", search(budget="{tmp}/costs.py:leaves<=5"), written("costs.py", ENERGY)),
    Wrong("a function that raises an error", search(budget="{tmp}/costs.py:broken<=5"), written("costs.py", ENERGY)),
]
SPACES = [
    Wrong("a space that does not exist", search("--space vgg")),
    Wrong("gates of exits that do not exist", f"{FEW} --space densenet_exits --space.exit_gates all"),
    Wrong("`--space` without a name", search("--space")),
    Wrong("an option the space does not have", search("--space.layers 3")),
    Wrong("a space of no width", search("--space.width 0")),
    Wrong("a width in words", search("--space.width wide")),
    Wrong("images that cannot be halved", search("--image_size 10")),
    Wrong("connections that do not exist", search("--space.shifts xyz")),
    Wrong("a fabric without a choice", search("--space conv_fabric --space.depth 1")),
    Wrong("other classes than the data's", search("--space.classes 7")),
    Wrong("other images than the data's", search("--space.image_size 16")),
    Wrong("a space from no file", search("--space {tmp}/none.py:build")),
    Wrong("a space from a file that is no Python", OWN, written("own.py", "def build(:")),
    Wrong("a space from a file that leaves Python", OWN, written("own.py", "raise SystemExit(0)\n")),
    Wrong("a space from a missing function", OWN, written("own.py", "")),
    Wrong("a space that raises", OWN, written("own.py", "def build():\n    return 1 / 0\n")),
    Wrong("a space that leaves Python", OWN, written("own.py", "def build():\n    raise SystemExit(0)\n")),
    Wrong("a space that is something else", OWN, written("own.py", "def build():\n    return 3\n")),
    Wrong("a space that needs an option", OWN, written("own.py", "def build(blocks: int):\n    return 3\n")),
    Wrong(
        "a space with a cycle",
        OWN,
        written("own.py", CYCLE),
    ),
    Wrong("a space with a layer that no exporter writes", OWN, written("own.py", RIGID)),
    Wrong("weights from no file", search("--weights {tmp}/none.pth")),
    Wrong("weights that are a text", search("--weights {tmp}/w.pth"), written("w.pth", "Dear all")),
    Wrong("weights that are a trap", search("--weights {tmp}/w.pth"), written("w.pth", trapped())),
    Wrong("weights that are a number", search("--weights {tmp}/w.pth"), saved("w.pth", 3)),
    Wrong("weights for a space that torchvision does not have", search("--weights {tmp}/w.pth"), saved("w.pth", {})),
    Wrong(
        "weights of another network",
        f"{FEW} --data digits --space resnet --space.depth 18 --weights {{tmp}}/w.pth",
        saved("w.pth", {"conv1.weight": torch.zeros(3)}),
    ),
]
DATA = [
    Wrong("a dataset that does not exist", search("--data mnist")),
    Wrong("a folder that does not exist", FOLDER),
    Wrong("an empty folder", FOLDER, lambda tmp, runs: (tmp / "data").mkdir()),
    Wrong("a single class", FOLDER, images(CATS[0])),
    Wrong("an image that is cut short", FOLDER, images(*CATS, broken=CATS[1])),
    Wrong(
        "an image that is none",
        FOLDER,
        lambda tmp, runs: (images(*CATS)(tmp, runs), written("data/" + CATS[0], "cat")(tmp, runs)),
    ),
    Wrong("images of two sizes", FOLDER, images(*CATS, sizes={CATS[1]: 9})),
    Wrong("an image without a mask", FOLDER, images(*FACES, "train/images/1.png")),
    Wrong("a mask of another size", FOLDER, images(*FACES, sizes={FACES[1]: 4})),
    Wrong("a mask with an unnamed class", FOLDER, images(*FACES, names="skin\nhair\n")),
    Wrong("masks for a space that classifies", FOLDER, images(*FACES)),
    Wrong("a published dataset that is not there", search("--data cifar10 --root {tmp}")),
    Wrong("a mask value to ignore where there are no masks", search("--ignore 255")),
    Wrong("images of no size", search("--image_size 0")),
    Wrong("no training images", search("--train_images 0")),
    Wrong("more training images than there are", search("--train_images 9999")),
    Wrong("a shift by a whole image", search("--pad 8")),
    Wrong("a negative shift", search("--pad -1")),
    Wrong("a mean without a deviation", search("--mean 0.5")),
    Wrong("a mean in words", search("--mean dark --std 0.5")),
    Wrong("a mean that no pixel has", search("--mean 127 --std 0.5")),
    Wrong("a deviation of 0", search("--mean 0.5 --std 0")),
    Wrong("three means for grey images", search("--mean 0.5,0.4,0.4 --std 0.2,0.2,0.2")),
]
RUNS = [
    Wrong("a run that is there already", search(), run()),
    Wrong("a folder with something else in it", search(), written("run/letter.txt", "Dear all")),
    Wrong("a file in place of the folder", search(), written("run", "")),
    Wrong("a folder below a file", search(out="{tmp}/file/run"), written("file", "")),
    Wrong("a folder where none can be", search(out="/proc/none/run")),
    Wrong("another seed than the run's", search("--resume --seed 1"), run()),
    Wrong("another budget than the run's", search("--resume", budget="macs<=50%"), run()),
    Wrong("another space than the run's", search("--resume --space.width 2"), run()),
    Wrong("other data than the run's", search("--resume --train_images 300"), run()),
    Wrong("another mean than the run's", search("--resume --mean 0.4 --std 0.5"), run()),
    Wrong("options that are gone", RESUME, run("options.json", lambda content: None)),
    Wrong("options that are cut short", RESUME, run("options.json", lambda content: content[:50])),
    Wrong("options that are a list", RESUME, run("options.json", lambda content: "[]")),
    Wrong("options nested without end", RESUME, run("options.json", lambda content: "[" * 100000)),
    Wrong(
        "options with a number that is none",
        RESUME,
        run("options.json", lambda content: content.replace(b'"seed": 0', b'"seed": NaN')),
    ),
    Wrong("options that lack the data", RESUME, values("options.json", lambda options: options.pop("data"))),
    Wrong(
        "options with threads in words", RESUME, values("options.json", lambda options: options.update(threads="two"))
    ),
    Wrong("metrics that are cut short", RESUME, run("metrics.jsonl", lambda content: content[:-40])),
    Wrong(
        "metrics with a number that is none",
        RESUME,
        run("metrics.jsonl", lambda content: content.replace(b'"step": 2', b'"step": Infinity')),
    ),
    Wrong("metrics that are no text", RESUME, run("metrics.jsonl", lambda content: b"\xff\xfe\n" + content)),
    Wrong("metrics that lack an epoch", RESUME, run("metrics.jsonl", lambda content: content.split(b"\n", 1)[1])),
    Wrong("an architecture that is cut short", RESUME, run("architecture.json", lambda content: content[:99])),
]
CHECKPOINT = "checkpoint/latest.safetensors"
WEIGHT, MOMENTUM = "network.modules_on_edges.0.0.weight", "optimizer.weights.0.momentum_buffer"
CHECKPOINTS = [
    Wrong("a checkpoint that is cut short", RESUME, run(CHECKPOINT, lambda content: content[:-100])),
    Wrong("a checkpoint that is empty", RESUME, run(CHECKPOINT, lambda content: b"")),
    Wrong("a pickle in place of a checkpoint", RESUME, run(CHECKPOINT, lambda content: pickle.dumps(Trap()))),
    Wrong("torch's own format in place of a checkpoint", RESUME, run(CHECKPOINT, lambda content: trapped())),
    Wrong(
        "a checkpoint without metadata",
        RESUME,
        lambda tmp, runs: (run()(tmp, runs), save_file({"a": torch.zeros(1)}, tmp / "run" / CHECKPOINT)),
    ),
    Wrong("a checkpoint that lacks a weight", RESUME, tensor(WEIGHT, None)),
    Wrong(
        "a checkpoint that lacks a tensor it lists",
        RESUME,
        checkpoint(lambda tensors, known: tensors.pop(MOMENTUM), listed=False),
    ),
    Wrong("a weight too many", RESUME, tensor("network.extra", torch.zeros(1))),
    Wrong("a tensor too many", RESUME, tensor("extra", torch.zeros(1))),
    Wrong("a weight of another shape", RESUME, tensor(WEIGHT, torch.zeros(4, 1, 3, 4))),
    Wrong("a weight of another type", RESUME, tensor(WEIGHT, torch.zeros(4, 1, 3, 3, dtype=torch.float64))),
    Wrong("a weight that is no number", RESUME, tensor(WEIGHT, torch.full((4, 1, 3, 3), torch.nan))),
    Wrong("a momentum of another shape", RESUME, tensor(MOMENTUM, torch.zeros(3))),
    Wrong("a momentum of no parameter", RESUME, tensor("optimizer.weights.999.momentum_buffer", torch.zeros(3))),
    Wrong("half of what Adam knows", RESUME, tensor("optimizer.gates.0.exp_avg", None)),
    Wrong("an epoch before the first", RESUME, state(epoch=-5)),
    Wrong("an epoch after the last", RESUME, state(epoch=10**9)),
    Wrong("an epoch in words", RESUME, state(epoch="x")),
    Wrong("an epoch that is missing", RESUME, checkpoint(lambda tensors, known: known.pop("epoch"))),
    Wrong("a batch after the last", RESUME, state(batch=99)),
    Wrong("images that were never seen", RESUME, state(images=7)),
    Wrong("seconds without end", RESUME, state(seconds=float("inf"))),
    Wrong("sums over other batches", RESUME, checkpoint(lambda tensors, known: known["sums"].update(images=0))),
    Wrong("sums that are a list", RESUME, state(sums=[])),
    Wrong("candidates that are numbers", RESUME, state(candidates=[1])),
    Wrong("a price in words in the checkpoint", RESUME, state(prices=[{"value": "x", "accumulated": 0.0}])),
    Wrong("a negative price in the checkpoint", RESUME, state(prices=[{"value": -1.0, "accumulated": 0.0}])),
    Wrong("a limit too many", RESUME, state(limits=[{"limit": 1.0, "full": 2.0}] * 2)),
    Wrong("a price too many", RESUME, state(prices=[{"value": 1.0, "accumulated": 0.0}] * 2)),
    Wrong("a search that never began", RESUME, state(starts=[])),
    Wrong(
        "a state that is a list",
        RESUME,
        lambda tmp, runs: (
            run()(tmp, runs),
            save_file({}, tmp / "run" / CHECKPOINT, metadata={"state": "[]", "tensors": "[]"}),
        ),
    ),
    Wrong("a chosen architecture over the budget", RESUME, tensor("chosen", torch.ones(1, 10))),
    Wrong("a chosen architecture of half gates", RESUME, tensor("chosen", torch.full((1, 10), 0.5))),
    Wrong("a chosen architecture of another space", RESUME, tensor("chosen", torch.ones(1, 3))),
    Wrong("no chosen architecture while it is tuned", RESUME, tensor("chosen", None)),
]
PT2, ONNX = "measure {tmp}/network.pt2", "measure {tmp}/network.onnx"
FILES = [
    Wrong("nothing to measure", "measure"),
    Wrong("something unknown to measure", "measure vgg"),
    Wrong("a cost to measure that does not exist", "measure resnet_fabric --costs macs,watts"),
    Wrong(
        "a cost that a file does not have", "measure {tmp}/network.onnx --costs steps:2", written("network.onnx", "")
    ),
    Wrong("the space of a run beside what is no run", "measure resnet_fabric --space conv_fabric"),
    Wrong("an architecture the space does not have", "measure conv_fabric --architecture resnet"),
    Wrong("a folder that is no run", "measure {tmp}"),
    Wrong(
        "an architecture.json that is cut short",
        "measure {tmp}/run",
        run("architecture.json", lambda content: content[:99], of="finished"),
    ),
    Wrong(
        "a run of no space",
        "measure {tmp}/run",
        values("options.json", lambda options: options["space"].update(name=["resnet_fabric"]), of="finished"),
    ),
    Wrong(
        "a run of a space of its own",
        "measure {tmp}/run",
        values("options.json", lambda options: options["space"].update(name="own"), of="finished"),
    ),
    Wrong(
        "a run with an option the space does not have",
        "measure {tmp}/run",
        values("options.json", lambda options: options["space"]["options"].update(layers=3), of="finished"),
    ),
    Wrong("an .onnx file that is not there", ONNX),
    Wrong(
        "an .onnx file that is cut short",
        ONNX,
        lambda tmp, runs: written("network.onnx", (runs.finished / "network.onnx").read_bytes()[:9999])(tmp, runs),
    ),
    Wrong("an .onnx file of random bytes", ONNX, written("network.onnx", np.random.default_rng(0).bytes(999))),
    Wrong("an .onnx file of text", ONNX, written("network.onnx", "a network")),
    Wrong("an .onnx file that takes whole numbers", ONNX, onnx_file("INT64", [1, 4])),
    Wrong("MACs of a file that looks at its input", f"{ONNX} --costs latency,macs", branching),
    Wrong("bytes of a file that looks at its input", f"{ONNX} --costs memory:params", branching),
    Wrong("an .onnx file of images of any size", ONNX, onnx_file("FLOAT", ["batch", "width"])),
    Wrong("a .pt2 file that is packed", PT2, archive(lambda name, content: content, packed=True)),
    Wrong(
        "a .pt2 file that is cut short",
        PT2,
        lambda tmp, runs: written("network.pt2", (runs.finished / "network.pt2").read_bytes()[:9999])(tmp, runs),
    ),
    Wrong("a .pt2 file of random bytes", PT2, written("network.pt2", np.random.default_rng(0).bytes(999))),
    Wrong("a .pt2 file of text", PT2, written("network.pt2", "a network")),
    Wrong("torch's own format in place of a .pt2 file", PT2, written("network.pt2", trapped())),
    Wrong(
        "a .pt2 file with a pickle in it",
        PT2,
        archive(lambda name, content: trapped() if name.endswith(".pt") else content),
    ),
    Wrong(
        "a .pt2 file with a pickled weight",
        PT2,
        swapped("weights_config.json", '"use_pickle": false', '"use_pickle": true'),
    ),
    Wrong(
        "a .pt2 file with weights in the old format",
        PT2,
        archive(lambda name, content: content, ("archive/data/weights/model.pt", trapped())),
    ),
    Wrong(
        "a .pt2 file with a library in it",
        PT2,
        archive(lambda name, content: content, ("archive/data/aotinductor/model/model.so", b"")),
    ),
    Wrong("a .pt2 file with a member outside of it", PT2, archive(lambda name, content: content, ("../trap", b""))),
    Wrong(
        "a .pt2 file that calls a function of Python's",
        PT2,
        swapped("model.json", "torch.ops.aten.relu.default", "torch.serialization.os.remove"),
    ),
    Wrong(
        "a .pt2 file with a size to be evaluated",
        PT2,
        swapped("model.json", "Symbol('s77', positive=True, integer=True)", "open('trap', 'w')"),
    ),
    Wrong(
        "a .pt2 file with a check to be evaluated",
        PT2,
        swapped("model.json", '"guards_code": []', '"guards_code": ["f()"]'),
    ),
    Wrong("a file of another kind", "measure {tmp}/network.pkl", written("network.pkl", pickle.dumps(Trap()))),
    Wrong("nothing to export", "export"),
    Wrong("a folder that is no run to export from", "export {tmp}/none"),
    Wrong("a run to export that goes on", "export {tmp}/run --out {tmp}/a.onnx", run()),
    Wrong(
        "a result that is cut short",
        "export {tmp}/run --out {tmp}/a.onnx",
        run("result.json", lambda content: content[:99], of="finished"),
    ),
    Wrong(
        "a network that is cut short",
        "export {tmp}/run --out {tmp}/a.onnx",
        run("network.onnx", lambda content: content[:999], of="finished"),
    ),
    Wrong("a format that does not exist", "export {tmp}/run --format gguf", run(of="finished")),
    Wrong("an ending of another format", "export {tmp}/run --format pt2 --out {tmp}/a.onnx", run(of="finished")),
    Wrong("a file to write in no folder", "export {tmp}/run --out {tmp}/none/a.onnx", run(of="finished")),
    Wrong("a block of no channels", "export {tmp}/run --fill 0 --out {tmp}/a.onnx", run(of="finished")),
    Wrong("filled for torch", "export {tmp}/run --format pt2 --fill 8 --out {tmp}/a.pt2", run(of="finished")),
    Wrong("nothing to report", "report"),
    Wrong("a report of no run", "report {tmp}"),
    Wrong("a report of two runs without a file", "report {tmp}/run {tmp}/run", run()),
    Wrong("a report to write in no folder", "report {tmp}/run --out {tmp}/none/a.html", run()),
    Wrong(
        "a result that is cut short, reported",
        "report {tmp}/run",
        run("result.json", lambda content: content[:99], of="finished"),
    ),
    Wrong(
        "a result whose budget is no number",
        "report {tmp}/run",
        values("result.json", lambda result: result["budgets"][0].update(value=None), of="finished"),
    ),
]
COMMANDS = [*REQUESTS, *BUDGETS, *SPACES, *DATA, *RUNS, *CHECKPOINTS, *FILES]


def network(*pairs: tuple[str, str, nn.Module], **given: Any) -> Callable[[], SuperNetwork]:
    edges = [Edge(start=start, end=end, module=module) for start, end, module in pairs]
    return lambda: SuperNetwork(edges, **{"input_shape": (1, 8, 8), **given})


def step() -> nn.Module:
    return nn.Conv2d(1, 1, 1)


def wide() -> nn.Module:
    return nn.Conv2d(3, 3, 1)


def chain() -> SuperNetwork:
    return network(("x", "a", step()), ("a", "y", step()), architectures={"one": ["x>a", "a>y"]})()


def looking() -> ConditionalNetwork:
    gated = Edge(start="x", end="y", module=step(), name="gated", gate=ConditionalGates)
    return conditional(
        SuperNetwork([gated, Edge(start="x", end="y", module=step(), fixed=True)], input_shape=(1, 8, 8))
    )


CALLS = [
    Refused("a node that nothing enters", network(("x", "y", step()), ("b", "y", step()))),
    Refused("a second output", network(("x", "y", step()), ("x", "b", step()))),
    Refused("an edge into the input", network(("x", "a", step()), ("a", "x", step()), ("a", "y", step()))),
    Refused("an edge into the input alone", network(("b", "x", step()), ("x", "y", step()))),
    Refused(
        "a graph with a cycle", network(("x", "a", step()), ("a", "b", step()), ("b", "a", step()), ("b", "y", step()))
    ),
    Refused("an output that is the input", network(("x", "y", step()), sink="x")),
    Refused("two edges of one name", network(("x", "y", step()), ("x", "y", step()))),
    Refused("two nodes of one name", network(("x", "y", step()), nodes=[Node(name="y"), Node(name="y")])),
    Refused("an edge to a node that is not there", lambda: Graph(("x", "y"), ((0, 2),), 0, 1)),
    Refused(
        "shapes that cannot be added", network(("x", "a", step()), ("a", "y", step()), ("x", "y", nn.MaxPool2d(2)))
    ),
    Refused("a module that does not take its input", network(("x", "y", wide()))),
    Refused("an architecture of missing edges", network(("x", "y", step()), architectures={"one": ["z"]})),
    Refused("an architecture of another length", lambda: chain().used(torch.ones(1, 3))),
    Refused("an architecture of no such name", lambda: chain().architecture("two")),
    Refused("a cost without a limit", lambda: Budget(costs.MACs())),
    Refused("a budget with two limits", lambda: Budget(costs.MACs(), at_most="25%", target="25%")),
    Refused("a limit that is not a number", lambda: Budget(costs.MACs(), at_most=float("nan"))),
    Refused("epochs that are true", lambda: SearchOptions(epochs=True)),
    Refused("a device of no number", lambda: resolve_device("cuda:x")),
    Refused("a space of half a block", lambda: spaces.resnet_fabric(width=1.5)),
    Refused("a file of another kind to export to", lambda: export(step(), "network.pkl", torch.zeros(1, 1, 8, 8))),
    Refused("a .pt2 file of gates that look at the input", lambda: export(looking(), "n.pt2", torch.zeros(1, 1, 8, 8))),
    Refused(
        "latency in torch where gates look at the input",
        lambda: Budget.parse("latency[runtime=torch]<=2").bind(spaces.resnet(depth=8, conditional=True)),
    ),
    Refused("images that are no bytes", lambda: Split(np.zeros((1, 1, 8, 8)), np.zeros(1, np.int64))),
    Refused("targets of another length", lambda: Split(np.zeros((1, 1, 8, 8), np.uint8), np.zeros(2, np.int64))),
]


@pytest.mark.parametrize("wrong", COMMANDS, ids=lambda wrong: wrong.what)
def test_a_wrong_command_is_one_line_and_changes_nothing(wrong, runs, tmp_path, monkeypatch, capsys):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a wrong request was trained")

    if wrong.prepare:
        wrong.prepare(tmp_path, runs)
    monkeypatch.setattr(Learner, "step", never)
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    assert cli.main(shlex.split(wrong.command.format(tmp=tmp_path))) == wrong.status
    out, errors = capsys.readouterr()
    status, line = documented()[wrong.what]
    assert status == str(wrong.status)
    *table, last = errors.splitlines()
    assert re.fullmatch(line, last), errors
    table = [line for line in table if not line.startswith("calling ")]  # what takes its time is announced
    assert bool(table) == (wrong.status == cli.UNREACHABLE)  # which limits, and what they are beside
    assert out == ""
    assert contents(tmp_path) == before  # no run begun, none harmed, no trap sprung


@pytest.mark.parametrize("wrong", CALLS, ids=lambda wrong: wrong.what)
def test_a_wrong_call_raises_one_line(wrong):
    with pytest.raises(BudgetnetError) as caught:
        wrong.call()
    kind, line = documented()[wrong.what]
    assert kind == f"`{caught.type.__name__}`"
    assert re.fullmatch(line, str(caught.value)), caught.value


def test_the_document_lists_what_is_tested_and_nothing_else():
    tested = [wrong.what for wrong in (*COMMANDS, *CALLS)]
    assert sorted(tested) == sorted(documented())
    assert len(set(tested)) == len(tested)


def documented() -> dict[str, tuple[str, str]]:
    """By what is wrong: the exit status or the error, and the pattern of the line."""
    rows = re.findall(r"^\| (.+?) \| (\d|`\w+`) \| `(.+)` \|$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    return {what: (kind, ".*".join(map(re.escape, line.split("…")))) for what, kind, line in rows}


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below a folder."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}
