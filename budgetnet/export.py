"""Files that run without this package (.onnx, .pt2), their agreement with the network, and their latency."""

from __future__ import annotations

import copy
import io
import json
import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from budgetnet.apart import onnx_session
from budgetnet.errors import ConfigError, FileError
from budgetnet.files import aside
from budgetnet.gated import contiguous
from budgetnet.timing import Timing, interleaved, rested

FORMATS = ("onnx", "pt2")
PT2_FILE = re.compile(
    r"[^/]+/(archive_format|archive_version|byteorder|\.data/version|\.data/serialization_id|models/model\.json"
    r"|data/sample_inputs/model\.pt|data/weights/(weight_\d+|model_weights_config\.json)"
    r"|data/constants/(tensor_\d+|model_constants_config\.json))"
)
PT2_TEXTS = {  # of model.json, by key
    "target": r"torch\.ops\.aten\.\w+\.\w+|_operator\.(add|sub|mul|floordiv|getitem)",
    "expr_str": r"((Symbol\('[su]\d+'|Integer|Mul|Add|Pow|positive=True|nonnegative=True|integer=True)|[\d(), -])*",
    "path_name": r"(weight|tensor)_\d+",
}
PT2_ABSENT = ("use_pickle", "guards_code", "as_operator", "as_custom_obj", "as_graph", "treespec_namedtuple_fields")
"""What stands for a pickle, for text to be evaluated, or for a function looked up by name."""


def export(network: nn.Module, path: str | Path, example: Tensor) -> Path:
    """Writes a plain network to a file; the ending, .onnx or .pt2, says which kind. The batch size stays free.

    Args:
        network: maps `(B, C, H, W)` to its output; exported as it stands in evaluation mode, itself unchanged.
        path: where to.
        example: `(B, C, H, W)`.

    Returns:
        The path.

    Raises:
        ConfigError: the ending is another, or torch's exporter cannot write a layer; the file is then as it was.
    """
    return export_all(network, [path], example)[0]


def export_all(network: nn.Module, paths: Sequence[str | Path], example: Tensor) -> list[Path]:
    """Writes a plain network to several files as `export` does one, and has torch follow its layers once for all.

    Raises:
        ConfigError: as `export`; all files are then as they were.
    """
    files = [Path(path) for path in paths]
    for path in files:
        if path.suffix.removeprefix(".") not in FORMATS:
            raise ConfigError(f"a network is exported to a .onnx or .pt2 file, got {path.name!r}")
    example = torch.cat([example, example])[:2].cpu().float()  # a free batch size needs an example of two
    # channels last would be written into the graph, as strides
    network = contiguous(copy.deepcopy(network)).cpu().eval()
    with exporting(f"the network cannot be written to {' and '.join(path.name for path in files)}"):
        program = torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # paths of this machine
        told: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"], "dynamo": True, "verbose": False}
        written = [torch.onnx.export(program, (), **told) if path.suffix == ".onnx" else None for path in files]
    for path, done in zip(files, written, strict=True):
        with aside(path) as part, quiet():
            if done is not None:
                part.write_bytes(compacted(done.model_proto, network.state_dict()).SerializeToString())
            else:
                with part.open("wb") as file:
                    torch.export.save(program, file)
    return files


@contextmanager
def exporting(refusal: str) -> Iterator[None]:
    """Keeps torch's exporters quiet, and what they raise, of classes of their own, to one line behind `refusal`.

    Raises:
        ConfigError: an exporter does not know what it is to write.
    """
    try:
        with quiet():
            yield
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:  # what is raised last tells where to report bugs, and not which layer it was
            cause = cause.__cause__
        raise ConfigError(f"{refusal}: {_line(cause)}") from error


def compacted(model: onnx.ModelProto, names: Collection[str]) -> onnx.ModelProto:
    """The same model, changed in place, without what its exporter notes beside the graph: half of a small file.

    Args:
        model: from one input to one output, whose first size is that of the batch.
        names: of weights that keep theirs; all other values are called by the operator that they come from.
    """
    graph = model.graph
    model.producer_name, model.producer_version, graph.name = "pytorch", torch.__version__, "network"
    for part in (model, graph, *graph.input, *graph.output, *graph.initializer, *graph.node):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    graph.ClearField("value_info")
    for value in (*graph.input, *graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    if any(attribute.HasField("g") for node in graph.node for attribute in node.attribute):
        return model  # whose branches use these names
    ends = {value.name for value in (*graph.input, *graph.output)}
    others = {weight.name: weight for weight in graph.initializer if weight.name not in names}
    read = dict.fromkeys(name for node in graph.node for name in node.input if name in others)
    new = {name: f"/constant_{place}" for place, name in enumerate(read)}
    for place, node in enumerate(graph.node):
        node.ClearField("name")
        given = [name for name in node.output if name and name not in ends]
        new |= {
            name: f"/{node.op_type.lower()}_{place}" + f"_{count}" * (count > 0) for count, name in enumerate(given)
        }
    for name in read:
        others[name].name = new[name]
    for node in graph.node:
        node.input[:] = [new.get(name, name) for name in node.input]
        node.output[:] = [new.get(name, name) for name in node.output]
    return model


def load(path: str | Path, *, threads: int = 1) -> Callable[[Tensor], Tensor]:
    """A function `(B, C, H, W)` to output that runs an exported file in its own runtime.

    Args:
        path: of the file.
        threads: of onnxruntime; a .pt2 file runs with as many as torch has when it is called.

    Raises:
        FileError: the file is missing, or is no network of its kind.
    """
    path = Path(path)
    if path.suffix == ".pt2":
        module = load_program(path).module()
        return lambda x: module(x.cpu().float())
    if not path.is_file():
        raise FileError(f"expected an exported network at {path}, found no file")
    if path.suffix == ".onnx":
        try:
            session = onnx_session(str(path), threads)
        except Exception as error:  # onnxruntime raises classes of its own for each kind of broken file
            raise FileError(f"{path} is no ONNX network that onnxruntime loads: {_line(error)}") from error
        inputs = [(each.name, each.type) for each in session.get_inputs()]
        if len(inputs) != 1 or inputs[0][1] != "tensor(float)":
            raise FileError(f"{path} must take one input of floats, got {inputs}")
        name = inputs[0][0]
        return lambda x: torch.from_numpy(np.asarray(session.run(None, {name: x.cpu().float().numpy()})[0]))
    raise FileError(f"an exported network ends in .onnx or .pt2, got {path.name!r}")


def load_program(path: str | Path) -> torch.export.ExportedProgram:
    """Reads a .pt2 file that holds weights and a graph of torch's own operators, and nothing else.

    torch's reader would unpickle what an archive asks it to, look functions up by name, load
    libraries and evaluate formulas, so all of that is refused before it sees the file.

    Raises:
        FileError: the file is missing, is no such network, or holds anything that could run code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileError(f"expected an exported network at {path}, found no file")
    try:
        with quiet():
            _refuse_code(path)
            return torch.export.load(path)
    except Exception as error:  # torch.export names no one error for a broken file
        raise FileError(f"{path} is no network that torch.export loads: {_line(error)}") from error


@torch.no_grad()
def difference(a: Callable[[Tensor], Tensor], b: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Largest absolute difference of two networks' outputs on the examples `x`."""
    return float((a(x).cpu().float() - b(x).cpu().float()).abs().max())


@torch.no_grad()
def latency(
    run: Callable[[Tensor], object], x: Tensor, *, calls: int = 200, seconds: float = 0.0, patience: float = 0.0
) -> dict[str, float]:
    """Milliseconds of `run(x)` on the machine at rest: median, 10th and 90th percentile, as `timing.rested` has it.

    Args:
        run: the network.
        x: what it takes.
        calls: timed in a look.
        seconds: that it is looked at for at least.
        patience: seconds that it is looked at for at most while the machine is not at rest.
    """

    def look() -> list[Timing]:
        return interleaved([lambda: run(x)], calls=calls, seconds=min(1.0, seconds))

    (timing,) = rested(look, calls=calls // 4, seconds=seconds, patience=patience)
    return {"median": timing.quantile(0.5), "p10": timing.quantile(0.1), "p90": timing.quantile(0.9)}


def file_latency(
    path: str | Path,
    x: Tensor,
    *,
    threads: int = 1,
    calls: int = 200,
    seconds: float = 0.0,
    patience: float = 0.0,
) -> dict[str, float]:
    """`latency` of an exported file in its own runtime with so many threads, with nothing of ours around the call.

    Raises:
        FileError: as `load`.
    """
    run = load(path, threads=threads)
    if Path(path).suffix != ".onnx":
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return latency(run, x, calls=calls, seconds=seconds, patience=patience)
        finally:
            torch.set_num_threads(before)
    session = onnx_session(str(path), threads)
    feed = {session.get_inputs()[0].name: x.cpu().float().numpy()}
    return latency(lambda x: session.run(None, feed), x, calls=calls, seconds=seconds, patience=patience)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps the exporters' own progress and deprecation notes, and graphs that they print, from the console."""
    names = ("torch.onnx", "torch.export", "torch.fx.experimental.symbolic_shapes", "onnxscript", "onnx_ir")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _refuse_code(path: Path) -> None:
    """Raises FileError, ValueError or OSError where an archive holds more than arrays and a plain graph."""
    with zipfile.ZipFile(path) as archive:
        names = [info.filename for info in archive.infolist()]
        foreign = [info.filename for info in archive.infolist() if not PT2_FILE.fullmatch(info.filename)]
        packed = any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist())
        if foreign or packed or len({name.partition("/")[0] for name in names}) != 1 or len(set(names)) < len(names):
            raise FileError(f"expected the arrays and the graph of one network, got {(foreign or names)[0]!r}")
        for name in names:
            if name.endswith(".json"):
                _refuse_names(json.loads(archive.read(name)))
            elif name.endswith(".pt"):
                try:
                    torch.load(io.BytesIO(archive.read(name)), weights_only=True)
                except pickle.UnpicklingError as error:
                    raise FileError(f"expected plain arrays in {name!r}, got a pickle that asks for more") from error


def _refuse_names(value: Any, key: str = "") -> None:
    """Raises FileError where a graph names anything but torch's own operators and sizes."""
    if isinstance(value, dict):
        for inner, below in value.items():
            _refuse_names(below, inner)
    elif isinstance(value, list):
        for below in value:
            _refuse_names(below, key)
    pattern = PT2_TEXTS.get(key)
    if (pattern and isinstance(value, str) and not re.fullmatch(pattern, value)) or (key in PT2_ABSENT and value):
        raise FileError(f"expected torch's own operators, got {key} {str(value)[:60]!r}")


def _line(error: Any) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
