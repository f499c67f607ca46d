"""The method: warm up the full network, learn which edges to sample, choose what fits the budget, fine-tune it, hand it over."""

from __future__ import annotations

import copy
import os
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from budgetnet.budgets import BoundBudget, Budget, check_reachable
from budgetnet.data import Batches, Dataset
from budgetnet.errors import ConfigError, FileError
from budgetnet.evaluation import Predict, evaluate, recalibrate
from budgetnet.export import difference, export, latency, load
from budgetnet.extraction import count, extract, fold_batch_norm
from budgetnet.options import SearchOptions, resolve_device, resolve_precision
from budgetnet.runs import RunFolder, next_folder
from budgetnet.selection import keeps, probable
from budgetnet.sites import entropy
from budgetnet.supernet import SuperNetwork, evaluating
from budgetnet.training import Learner, Sums
from budgetnet.version import VERSION

CHECKPOINT_SECONDS = 60  # within an epoch; where a checkpoint falls changes no result


@dataclass(frozen=True, eq=False)
class Found:
    """What a search returns.

    Attributes:
        plain: the network that was found, plain `torch.nn`, in evaluation mode, on the CPU.
        architecture: `(1, G)` its decisions.
        supernet: the network with choices that it came from.
        result: what `result.json` holds.
        run: the run folder.
    """

    plain: fx.GraphModule
    architecture: Tensor
    supernet: SuperNetwork
    result: dict[str, Any]
    run: Path

    def network(self) -> fx.GraphModule:
        """A copy of the plain network."""
        return copy.deepcopy(self.plain)


class Progress(Protocol):
    """Who is told how it goes."""

    def begin(self, limits: list[dict[str, Any]], options: SearchOptions) -> None:
        """Before training: the smallest, expected and full cost beside each limit."""

    def step(self, epoch: int, done: int, batches: int, sums: Sums) -> None:
        """After each batch."""

    def epoch(self, line: dict[str, Any]) -> None:
        """After each epoch: its line of metrics.jsonl."""


def search(
    space: SuperNetwork,
    data: Dataset,
    budgets: Sequence[Budget | str],
    options: SearchOptions | None = None,
    *,
    architecture: str | Tensor | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    command: str | None = None,
    progress: Progress | None = None,
) -> Found:
    """Learns architecture and weights together, and returns the plain network that keeps every budget.

    Args:
        space: the network with choices; learned on a copy.
        data: its training images learn, its validation images choose, its test images are looked at once.
        budgets: at least one; texts are read by `Budget.parse`.
        options: None for the defaults.
        architecture: a name or `(1, G)` bits: train this one on the same schedule in place of searching, as
            a baseline; budgets may then be empty.
        out: the run folder; None for a new one under `runs/`.
        resume: take up the run in `out` where it was stopped.
        command: what the user typed, kept with the run.
        progress: is told how it goes.

    Raises:
        ConfigError: space, data and options do not fit together, or `out` holds another run.
        UnreachableBudget: no architecture keeps the budgets.
        DivergenceError: the loss became infinite; the last checkpoint is kept.
    """
    options = options or SearchOptions()
    check_fit(space, data)
    if not budgets and architecture is None:
        raise ConfigError("a search needs at least one budget, such as macs<=25%, got none")
    asked = [Budget.parse(budget) if isinstance(budget, str) else budget for budget in budgets]
    network = copy.deepcopy(space)
    with torch.no_grad():
        network.gates.logits.fill_(options.gate_start)
    bound = [budget.bind(network) for budget in asked]
    limits = check_reachable(network, bound)
    device = resolve_device(options.device)
    dtype = resolve_precision(options.precision, device)
    run = RunFolder(out if out is not None else next_folder(Path("runs"), f"{data.name}-{space.name}"))
    fixed = space.architecture(architecture) if isinstance(architecture, str) else architecture
    asked_for = provenance(space, data, asked, options, fixed, command, device, dtype)
    run.create(asked_for, resume=resume)
    learner = Learner(network, bound, options, ignore=data.ignore, device=device, dtype=dtype)
    learner.chosen = fixed
    session = Session(run, data, learner, options)
    if progress:
        progress.begin(limits, options)
    session.take_up()
    while session.epoch < options.epochs:
        session.run_epoch(progress)
    return session.finish(limits)


class Session:
    """One run: where it stands, and how it goes on from there."""

    def __init__(self, run: RunFolder, data: Dataset, learner: Learner, options: SearchOptions) -> None:
        self.run, self.data, self.learner, self.options = run, data, learner, options
        self.network, self.budgets = learner.network, learner.budgets
        common: dict[str, Any] = {"batch_size": options.batch_size, "device": learner.device}
        self.train = Batches(data.train, augmentation=data.augmentation, seed=options.seed, **common)
        self.validation = Batches(data.validation, shuffle=False, **common)
        self.epoch = self.batch = 0
        self.sums = Sums()
        self.images, self.seconds = 0, 0.0
        self.candidates: list[dict[str, Any]] = []
        self.fixed = learner.chosen is not None  # no search: this architecture is trained from the start

    def phase(self) -> str:
        """What this epoch is for."""
        return "finetune" if self.fixed else self.options.phase(self.epoch)

    def take_up(self) -> None:
        """Goes to where the last checkpoint was written."""
        saved = self.run.load_checkpoint()
        if saved is None:
            return
        tensors, state = saved
        self.learner.load_state(tensors, state)
        try:
            self.epoch, self.batch, self.images = (int(state[key]) for key in ("epoch", "batch", "images"))
            self.seconds, self.sums = float(state["seconds"]), Sums(**state["sums"])
            self.candidates = list(state["candidates"])
        except (KeyError, TypeError, ValueError) as error:
            raise FileError(f"the checkpoint of {self.run.path} does not say where the run stood: {error}") from error

    def save(self) -> None:
        """Writes a checkpoint."""
        tensors, state = self.learner.state()
        state |= {"epoch": self.epoch, "batch": self.batch, "images": self.images, "seconds": self.seconds}
        self.run.save_checkpoint(tensors, {**state, "sums": asdict(self.sums), "candidates": self.candidates})

    def run_epoch(self, progress: Progress | None) -> None:
        """One pass over the training images in the phase whose turn it is, a look at the validation data, a checkpoint."""
        phase, batches, started = self.phase(), len(self.train), time.monotonic()
        if phase == "search" and not self.learner.starts:
            self.learner.begin_search()
        if phase == "finetune" and self.learner.chosen is None:
            self.choose()
        self.network.train()
        last = time.monotonic()
        for x, y in self.train.epoch(self.epoch, start=self.batch):
            position = self.epoch + self.batch / batches
            self.learner.step(
                x, y, phase,
                generator=seeded(self.learner.device, self.options.seed, self.epoch * batches + self.batch),
                rate=self.options.rate(position / self.options.epochs),
                progress=self.options.search_progress(position), sums=self.sums,
            )  # fmt: skip
            self.batch += 1
            self.images += len(x)
            if progress:
                progress.step(self.epoch, self.batch, batches, self.sums)
            if time.monotonic() - last > CHECKPOINT_SECONDS:
                last = time.monotonic()
                self.save()
        self.seconds += time.monotonic() - started
        line = self.line(phase)
        self.run.append_metrics(line)
        self.epoch, self.batch, self.sums = self.epoch + 1, 0, Sums()
        self.save()
        if progress:
            progress.epoch(line)

    def line(self, phase: str) -> dict[str, Any]:
        """This epoch's line of metrics.jsonl."""
        searching, sums = phase == "search", self.sums
        position = self.epoch + 1.0
        kept = self.current(phase)
        used = self.network.used(kept)
        looked = (self.epoch + 1) % self.options.validate_every == 0 or self.epoch + 1 == self.options.epochs
        validation = self.judge(kept, afresh=searching) if looked and bool(used.any()) else None
        limits = self.learner.limits(self.options.search_progress(position)) if searching else [None] * len(self.budgets)
        costs = [total / sums.samples for total in sums.costs] or [None] * len(self.budgets)
        self.write_architecture(kept)
        return {
            "epoch": self.epoch, "phase": phase, "step": (self.epoch + 1) * len(self.train),
            "images_seen": self.images, "seconds": self.seconds,
            "learning_rate": self.options.rate(position / self.options.epochs),
            "train": {"loss": sums.loss / sums.images, "accuracy": sums.right / sums.images},
            "validation": validation,
            "entropy": float(entropy(self.network.gates.logits.detach()).mean()) if searching else None,
            "connected": sums.connected / sums.samples if searching else None,
            "budgets": [
                {"cost": budget.name, "unit": budget.unit, "limit": budget.limit, "target": limit, "sampled": cost,
                 "mode": float(budget.model(used)[0]), "price": price.value if searching else None}
                for budget, limit, cost, price in zip(self.budgets, limits, costs, self.learner.prices, strict=True)
            ],
        }  # fmt: skip

    def current(self, phase: str) -> Tensor:
        """The architecture that stands for this phase: the full, the most probable or the chosen one, `(1, G)`."""
        if phase == "warmup":
            return self.network.architecture("full")
        if phase == "search":
            return (self.network.gates.logits.detach().cpu() > 0).float()[None]
        assert self.learner.chosen is not None
        return self.learner.chosen

    def judge(self, kept: Tensor, *, afresh: bool) -> dict[str, float]:
        """Quality of an architecture on the validation data; `afresh` sets its own batch norms first."""
        plain = extract(self.network, kept)
        predict = self.predict(plain)
        if afresh:
            recalibrate(plain, predict, islice(self.train.epoch(self.epoch), self.options.recalibration))
        plain.eval()
        return self.quality(predict, self.validation)

    def choose(self) -> None:
        """Projects onto the budgets: of the most probable architectures that keep them all, the best on validation data."""
        generator = torch.Generator().manual_seed(self.options.seed)
        pool = probable(self.network, self.budgets, count=self.options.candidates, generator=generator)
        qualities = [self.judge(kept[None], afresh=True) for kept in pool]
        measure = "mean_iou" if self.data.task == "segmentation" else "accuracy"
        scores = [quality[measure] for quality in qualities]
        best = scores.index(max(scores))
        used = self.network.used(pool)
        costs = {budget.name: budget.model(used).tolist() for budget in self.budgets}
        self.candidates = [
            {"costs": {name: values[place] for name, values in costs.items()}, "validation": quality,
             "chosen": place == best}
            for place, quality in enumerate(qualities)
        ]  # fmt: skip
        self.learner.chosen = pool[best : best + 1]
        self.settle(used[best : best + 1])

    def settle(self, used: Tensor) -> None:
        """Sets the batch norms of an architecture, `(1, E)` used edges, to what its own activations are."""
        batches = islice(self.train.epoch(self.epoch), self.options.recalibration)
        recalibrate(self.network, self.predict(lambda x: self.network.run(x, used)), batches)

    def finish(self, limits: list[dict[str, Any]]) -> Found:
        """Extracts the network, proves it equal, looks at the test images once, writes every file."""
        from budgetnet import report

        if self.learner.chosen is None:
            self.choose()
        kept = self.learner.chosen
        assert kept is not None
        if not self.fixed and not bool(keeps(self.network, self.budgets, kept)[0]):
            raise FileError(f"the architecture in the checkpoint of {self.run.path} does not keep the budgets")
        started = time.monotonic()
        used = self.network.used(kept)
        self.settle(used)
        plain = extract(self.network, kept).eval()
        validation = self.quality(self.predict(plain), self.validation)
        test_batches = Batches(
            self.data.test, batch_size=self.options.batch_size, device=self.learner.device, shuffle=False
        )
        test = self.quality(self.predict(plain), test_batches)
        supernet = self.network.cpu().eval()
        plain = plain.cpu()
        x = next(iter(test_batches.epoch(0)))[0].cpu()
        folded = fold_batch_norm(plain)
        files = {kind: export(folded, self.run.path / f"network.{kind}", x[:1]) for kind in ("onnx", "pt2")}
        equivalence = {"extracted": difference(lambda x: supernet.run(x, used), plain, x)}
        equivalence |= {kind: difference(plain, load(path), x) for kind, path in files.items()}
        timing = latency(load(files["onnx"], threads=1), x[:1])
        full = supernet.used(supernet.architecture("full"))
        result = {
            "space": {"name": supernet.name, "options": supernet.options},
            "data": self.data.name, "seed": self.options.seed, "images_seen": self.images,
            "seconds": self.seconds + time.monotonic() - started,
            "budgets": [
                {"cost": budget.name, "unit": budget.unit, "limit": budget.limit, "value": float(budget.model(used)[0]),
                 "met": bool(budget.met(budget.model(used))[0])}
                for budget in self.budgets
            ],
            "before": limits,
            "full": count(extract(supernet, supernet.architecture("full")), x[:1]) if bool(full.any()) else {},
            "network": {
                **count(plain, x[:1]),
                "memory": sum(value.numel() * value.element_size() for value in folded.state_dict().values()),
                "latency_ms": {**timing, "runtime": "onnxruntime", "threads": 1, "batch": 1},
            },
            "validation": validation, "test": test, "equivalence": equivalence, "candidates": self.candidates,
        }  # fmt: skip
        self.write_architecture(kept)
        self.run.write("result.json", result)
        report.write(self.run.path)
        return Found(plain, kept, supernet, result, self.run.path)

    def predict(self, network: Predict) -> Predict:
        """The forward pass in the run's precision."""

        def run(x: Tensor) -> Tensor:
            with torch.autocast(self.learner.device.type, self.learner.dtype, enabled=self.learner.dtype != torch.float32):
                return network(x.contiguous(memory_format=torch.channels_last))

        return run

    def quality(self, predict: Predict, batches: Batches) -> dict[str, float]:
        """Quality over all of some batches."""
        return evaluate(predict, batches.epoch(0), classes=self.data.num_classes, ignore=self.data.ignore)

    def write_architecture(self, kept: Tensor) -> None:
        """Writes architecture.json: the graph, what is kept and used, how probable and how costly it is."""
        self.run.write("architecture.json", describe(self.network, kept, self.budgets))


def describe(network: SuperNetwork, kept: Tensor, budgets: Sequence[BoundBudget]) -> dict[str, Any]:
    """An architecture as data: what `architecture.json` holds and `read_architecture` reads."""
    bits, used = network.edges(kept)[0].bool().tolist(), network.used(kept)[0].bool().tolist()
    column = {edge: place for place, edge in enumerate(network.columns)}
    probability = network.gates.logits.detach().sigmoid().tolist()
    priced = [(budget.name, getattr(budget.model, "along_path", None)) for budget in budgets]
    return {
        "space": {"name": network.name, "options": network.options},
        "nodes": [
            {"name": name, "position": list(position), "shape": list(shape)}
            for name, position, shape in zip(network.graph.nodes, network.positions, network.shapes, strict=True)
        ],
        "edges": [
            {
                "name": network.edge_names[edge], "source": start, "target": end, "kind": network.kinds[edge],
                "fixed": edge not in column, "kept": bits[edge], "used": used[edge],
                "probability": probability[column[edge]] if edge in column else None,
                "costs": {name: weights[edge] for name, weights in priced if weights is not None},
            }
            for edge, (start, end) in enumerate(network.graph.edges)
        ],
    }  # fmt: skip


def check_fit(space: SuperNetwork, data: Dataset) -> None:
    """Raises ConfigError where the space does not take the data's images or give its classes."""
    if space.input_shape != data.image_shape:
        raise ConfigError(f"{space.name} takes images of shape {space.input_shape}, but {data.name} has {data.image_shape}")
    output = space.shapes[space.graph.sink]
    dense = data.task == "segmentation"
    expected = (data.num_classes, *data.image_shape[1:]) if dense else (data.num_classes,)
    if output != expected:
        raise ConfigError(f"{data.name} needs an output of shape {expected}, but {space.name} gives {output}")


def provenance(
    space: SuperNetwork, data: Dataset, budgets: Sequence[Budget], options: SearchOptions, fixed: Tensor | None,
    command: str | None, device: torch.device, dtype: torch.dtype,
) -> dict[str, Any]:  # fmt: skip
    """What options.json holds: all that was asked, and where it ran."""
    return {
        "command": command,
        "budgetnet": VERSION,
        "torch": torch.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "device": str(device),
        "precision": str(dtype).removeprefix("torch."),
        "space": {"name": space.name, "options": space.options},
        "data": {
            "name": data.name, "task": data.task, "classes": len(data.classes), "ignore": data.ignore,
            "train": len(data.train), "validation": len(data.validation), "test": len(data.test),
        },
        "budgets": [str(budget) for budget in budgets],
        "architecture": None if fixed is None else "".join(str(int(bit)) for bit in fixed[0].tolist()),
        "search": asdict(options),
    }  # fmt: skip


def seeded(device: torch.device, seed: int, step: int) -> torch.Generator:
    """The randomness of one step: a function of the seed and the step, so that none needs to be saved."""
    return torch.Generator(device).manual_seed((seed << 40) + step)
