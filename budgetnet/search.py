"""The method: warm up the full network, learn what to sample, choose what fits the budget, fine-tune, hand it over."""

from __future__ import annotations

import copy
import os
import platform
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from budgetnet.architectures import named
from budgetnet.budgets import Budget
from budgetnet.costs import Latency
from budgetnet.costs.latency import LatencyByInput
from budgetnet.costs.measured import LearningModel
from budgetnet.data import Batches, Dataset
from budgetnet.delivery import Found, deliver
from budgetnet.errors import ConfigError
from budgetnet.onnx_pieces import check_writable
from budgetnet.options import SearchOptions, resolve_device, resolve_precision
from budgetnet.runs import RunFolder, next_folder
from budgetnet.session import Progress, Session
from budgetnet.steering import prepare
from budgetnet.supernet import SuperNetwork
from budgetnet.training import Learner
from budgetnet.version import __version__


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
    """Learns architecture and weights together, and returns the plain network that was found under the budgets.

    Args:
        space: the network with choices; learned on a copy.
        data: its training images learn, its validation images choose, its test images are looked at once.
        budgets: at least one; texts are read by `Budget.parse`.
        options: None for the defaults.
        architecture: a name, an architecture.json or `(1, G)` bits: train this one on the same schedule in place
            of searching, as a baseline; budgets may then be empty.
        out: the run folder; None for a new one under `runs/`.
        resume: take up the run in `out` where it was stopped.
        command: what the user typed, kept with the run.
        progress: is told how it goes.

    Returns:
        The network, and what it costs: `result["budgets"][i]["met"]` is False where budget i is not kept after all, as
        only a cost that has to be measured may not be, or one of an `architecture` that was given.

    Raises:
        ConfigError: space, data, budgets and options do not fit together, torch's exporters cannot write a layer, or
            `out` holds another run.
        FileError: a file of the run to take up, of a cost or of the architecture is damaged, or of something else.
        UnreachableBudget: no architecture keeps the budgets.
        DivergenceError: the loss became infinite; the last checkpoint is kept.
    """
    options = options or SearchOptions()
    check_fit(space, data)
    if not budgets and architecture is None:
        raise ConfigError("a search needs at least one budget, such as macs<=25%, got none")
    fixed = named(space, architecture) if isinstance(architecture, str) else architecture
    if fixed is not None:
        # nothing larger is there to learn from
        options = replace(options, distillation=0.0, distillation_temperature=1.0)
        if not bool(space.connects(space.used(fixed))[0]):
            raise ConfigError("an architecture to train must connect input and output, got one that does not")
    device = resolve_device(options.device)
    dtype = resolve_precision(options.precision, device)
    with nullcontext(Path(out)) if out is not None else next_folder(Path("runs"), f"{data.name}-{space.name}") as path:
        run = RunFolder(path)
        run.check(resume=resume)
        begun = resume and run.begun
        if not begun:
            check_writable(space, None if fixed is None else space.used(fixed))
        looked_at = Batches(data.validation, batch_size=options.batch_size, seed=options.seed, drop_last=False)
        network = copy.deepcopy(space)
        ready = prepare(
            network,
            budgets,
            options,
            placed=lambda budget: in_folder(budget, run.path).on(lambda: (x for x, _ in looked_at.epoch(0))),
            say=progress.say if progress else lambda text: None,
            steered=fixed is None,
            begun=begun,
        )
        options, limits = ready.options, ready.limits
        run.create(provenance(space, data, ready.asked, options, fixed, command, device, dtype), resume=resume)
        for budget in ready.budgets:
            if isinstance(budget.model, LearningModel | LatencyByInput):
                budget.model.save()
        learner = Learner(network, ready.budgets, options, ignore=data.ignore, device=device, dtype=dtype)
        learner.chosen = fixed
        session = Session(run, data, learner)
        try:
            session.take_up()
            pairs = zip(limits, session.budgets, strict=True)  # as they were when the run began
            limits = [{**row, "limit": budget.limit, "full": budget.full} for row, budget in pairs]
            if progress:
                parts = (len(data.train), len(data.validation), len(data.test))
                progress.say(
                    "{}: {:,} images to train on, {:,} to choose by, {:,} to test on".format(data.name, *parts)
                )
                if resume and not begun:
                    progress.say(f"{run.path} held no run to resume: it begins anew")
                progress.begin(limits, options)
            while session.epoch < options.epochs:
                session.run_epoch(progress)
            return deliver(session, limits)
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(str(run.path)) from interrupt  # where it can be gone on with


def in_folder(budget: Budget, folder: Path) -> Budget:
    """The budget with the file that its cost keeps, where it keeps one, in a run's folder."""
    cost = budget.cost
    return replace(budget, cost=cost.kept_in(folder)) if isinstance(cost, Latency) else budget


def check_fit(space: SuperNetwork, data: Dataset) -> None:
    """Raises ConfigError where the space does not take the data's images or give its classes."""
    if space.input_shape != data.image_shape:
        raise ConfigError(
            f"{space.name} takes images of shape {space.input_shape}, but {data.name} has {data.image_shape}"
        )
    output = space.shapes[space.graph.sink]
    dense = data.task == "segmentation"
    expected = (data.num_classes, *data.image_shape[1:]) if dense else (data.num_classes,)
    if output != expected:
        raise ConfigError(f"{data.name} needs an output of shape {expected}, but {space.name} gives {output}")


def provenance(
    space: SuperNetwork,
    data: Dataset,
    budgets: Sequence[Budget],
    options: SearchOptions,
    fixed: Tensor | None,
    command: str | None,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """What options.json holds: all that was asked, and where it ran."""
    return {
        "command": command or "budgetnet.search, from Python",
        "budgetnet": __version__,
        "torch": torch.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "device": str(device),
        "precision": str(dtype).removeprefix("torch."),
        "space": {"name": space.name, "options": space.options},
        "data": {
            "name": data.name,
            "task": data.task,
            "classes": list(data.classes),
            "ignore": data.ignore,
            "pad": data.augmentation.pad,
            "flip": data.augmentation.flip,
            "mean": data.normalisation.mean,
            "std": data.normalisation.std,
            "train": len(data.train),
            "validation": len(data.validation),
            "test": len(data.test),
        },
        "budgets": [str(budget) for budget in budgets],
        "architecture": None if fixed is None else "".join(str(int(bit)) for bit in fixed[0].tolist()),
        "search": asdict(options),
    }
