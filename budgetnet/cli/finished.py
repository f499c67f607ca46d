"""What commands read of a run: its weights, its data, and what its gates decide by the input."""

from __future__ import annotations

from typing import Any

from budgetnet import data as datasets
from budgetnet.console import quantity
from budgetnet.delivery import restored
from budgetnet.report.records import Record
from budgetnet.runs import RunFolder
from budgetnet.search import check_fit
from budgetnet.supernet import SuperNetwork


def as_learned(run: RunFolder, network: SuperNetwork) -> SuperNetwork:
    """The space of a run with its weights and gates, once there is a checkpoint."""
    return network if run.load_checkpoint() is None else restored(run, network)


def data_of_run(run: RunFolder, network: SuperNetwork, given: Any) -> datasets.Dataset:
    """The data that were named, or those of the run: seen, and augmented, as the run did its own, of its size."""
    own = Record(run.read("options.json"), str(run.path / "options.json")).record("data")
    _, height, width = network.input_shape
    data = datasets.load(
        given.data or own.text("name"),
        root=given.root,
        image_size=height if height == width else None,  # only squares are ever resized to
        ignore=own.maybe_whole("ignore"),
    )
    check_fit(network, data)
    data = data.augmented(pad=own.whole("pad"), flip=own.flag("flip"))
    return data.normalised(own.numbers("mean"), own.numbers("std"))


def decided_by_input(result: dict[str, Any], run: RunFolder) -> Record | None:
    """What result.json says of gates that look at the input, None where none does."""
    return Record(result, str(run.path / "result.json")).maybe_record("inference")


def shown(name: str, value: float) -> str:
    """A quality or a cost for a person to read."""
    if name == "macs":
        return quantity(value, "MAC")
    return f"{value:.4f}" if name == "loss" else f"{100 * value:.2f} %"
