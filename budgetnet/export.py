"""Files that run without this package (.onnx, .pt2), their agreement with the network, and their latency."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, nn

from budgetnet.errors import ConfigError, FileError

FORMATS = ("onnx", "pt2")


def export(network: nn.Module, path: str | Path, example: Tensor) -> Path:
    """Writes a plain network to a file; the ending, .onnx or .pt2, says which kind. The batch size stays free.

    Args:
        network: maps `(B, C, H, W)` to its output; exported as it stands in evaluation mode.
        path: where to.
        example: `(B, C, H, W)`.

    Raises:
        ConfigError: the ending is another.
    """
    path = Path(path)
    kind = path.suffix.removeprefix(".")
    if kind not in FORMATS:
        raise ConfigError(f"a network is exported to a .onnx or .pt2 file, got {path.name!r}")
    example = torch.cat([example, example])[:2].cpu().float()  # a free batch size needs an example of two
    network = network.cpu().eval()
    part = path.with_name(path.name + ".part")
    with _quiet():
        program = torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        if kind == "pt2":
            with part.open("wb") as file:
                torch.export.save(program, file)
        else:
            onnx = torch.onnx.export(program, (), input_names=["x"], output_names=["y"], dynamo=True, verbose=False)
            assert onnx is not None
            onnx.save(str(part), external_data=False)
    part.replace(path)
    return path


def load(path: str | Path, *, threads: int = 1) -> Callable[[Tensor], Tensor]:
    """A function `(B, C, H, W)` to output that runs an exported file in its own runtime.

    Raises:
        FileError: the file is missing, or is no network of its kind.
    """
    path = Path(path)
    if not path.is_file():
        raise FileError(f"expected an exported network at {path}, found no file")
    if path.suffix == ".onnx":
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        try:
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises classes of its own for each kind of broken file
            raise FileError(f"{path} is no ONNX network that onnxruntime loads: {_line(error)}") from error
        name = session.get_inputs()[0].name
        return lambda x: torch.from_numpy(np.asarray(session.run(None, {name: x.cpu().float().numpy()})[0]))
    if path.suffix == ".pt2":
        try:
            with _quiet():
                module = torch.export.load(path).module()
        except Exception as error:  # torch.export names no one error for a broken file
            raise FileError(f"{path} is no network that torch.export loads: {_line(error)}") from error
        return lambda x: module(x.cpu().float())
    raise FileError(f"an exported network ends in .onnx or .pt2, got {path.name!r}")


@torch.no_grad()
def difference(a: Callable[[Tensor], Tensor], b: Callable[[Tensor], Tensor], x: Tensor) -> float:
    """Largest absolute difference of two networks' outputs on the examples `x`."""
    return float((a(x).cpu().float() - b(x).cpu().float()).abs().max())


@torch.no_grad()
def latency(run: Callable[[Tensor], Tensor], x: Tensor, *, runs: int = 200, warm_up: int = 20) -> dict[str, float]:
    """Milliseconds of `run(x)`: median, 10th and 90th percentile of `runs` calls after a warm-up."""
    for _ in range(warm_up):
        run(x)
    times = []
    for _ in range(runs):
        start = time.perf_counter_ns()
        run(x)
        times.append((time.perf_counter_ns() - start) / 1e6)
    p10, median, p90 = np.percentile(times, [10, 50, 90])
    return {"median": float(median), "p10": float(p10), "p90": float(p90)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporters' own progress and deprecation notes from the console."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _line(error: Any) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
