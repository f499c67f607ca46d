"""How the wrong files of test_wrong_inputs.py are made: each function gives one that prepares a test's folder."""

from __future__ import annotations

import io
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

Prepare = Callable[[Path, Any], object]  # a test's folder, and the `Runs` to copy from


def written(name: str, content: str | bytes) -> Prepare:
    """A file of that content in the test's folder."""

    def prepare(tmp: Path, runs: Any) -> None:
        (tmp / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return prepare


def run(
    name: str = "", change: Callable[[bytes], bytes | str | None] | None = None, *, of: str = "unfinished"
) -> Prepare:
    """A copy of a run, one file of it changed, or gone where the change gives None."""

    def prepare(tmp: Path, runs: Any) -> None:
        shutil.copytree(getattr(runs, of), tmp / "run")
        if change is not None:
            file = tmp / "run" / name
            content = change(file.read_bytes())
            file.unlink()
            if content is not None:
                file.write_bytes(content if isinstance(content, bytes) else content.encode())

    return prepare


def values(name: str, change: Callable[[dict[str, Any]], object], *, of: str = "unfinished") -> Prepare:
    """A copy of a run, with other values in a JSON file of it."""

    def changed(content: bytes) -> str:
        loaded = json.loads(content)
        change(loaded)
        return json.dumps(loaded)

    return run(name, changed, of=of)


def checkpoint(change: Callable[[dict[str, torch.Tensor], dict[str, Any]], object], *, listed: bool = True) -> Prepare:
    """A copy of the stopped run, with other tensors or another state in its checkpoint."""

    def prepare(tmp: Path, runs: Any) -> None:
        shutil.copytree(runs.unfinished, tmp / "run")
        file = tmp / "run" / "checkpoint" / "latest.safetensors"
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        state = json.loads(metadata["state"])
        change(tensors, state)
        if listed:
            metadata["tensors"] = json.dumps(sorted(tensors))
        save_file(tensors, file, metadata={**metadata, "state": json.dumps(state)})

    return prepare


def state(**given: Any) -> Prepare:
    return checkpoint(lambda tensors, known: known.update(given))


def tensor(name: str, value: torch.Tensor | None) -> Prepare:
    """A tensor replaced, added, or left out where the value is None."""

    def change(tensors: dict[str, torch.Tensor], known: dict[str, Any]) -> None:
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value

    return checkpoint(change)


class Trap:
    """Makes a file named `trap` where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("trap", "w"))


def onnx_file(kind: str, shape: list[int | str]) -> Prepare:
    """A network of one identity."""

    def prepare(tmp: Path, runs: Any) -> None:
        values = [helper.make_tensor_value_info(name, getattr(TensorProto, kind), shape) for name in "xy"]
        graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", values[:1], values[1:])
        onnx.save(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp / "network.onnx"
        )

    return prepare


def branching(tmp: Path, runs: Any) -> None:
    """A network that computes what its input needs: one identity or another."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, 4, 4]) for name in "xy"]
    ways = {
        f"{name}_branch": helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], name, [], values[1:])
        for name in ("then", "else")
    }
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["top"], keepdims=0),
        helper.make_node("Cast", ["top"], ["bright"], to=TensorProto.BOOL),
        helper.make_node("If", ["bright"], ["y"], **ways),
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp / "network.onnx")


def archive(change: Callable[[str, bytes], bytes], *extra: tuple[str, bytes], packed: bool = False) -> Prepare:
    """A copy of the finished run's .pt2, its members changed and others added."""

    kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED

    def prepare(tmp: Path, runs: Any) -> None:
        with (
            zipfile.ZipFile(runs.finished / "network.pt2") as old,
            zipfile.ZipFile(tmp / "network.pt2", "w", kind) as new,
        ):
            for name in old.namelist():
                new.writestr(name, change(name, old.read(name)))
            for name, content in extra:
                new.writestr(name, content)

    return prepare


def swapped(member: str, old: str, new: str) -> Prepare:
    def change(name: str, content: bytes) -> bytes:
        if not name.endswith(member):
            return content
        assert old.encode() in content
        return content.replace(old.encode(), new.encode())

    return archive(change)


def trapped() -> bytes:
    buffer = io.BytesIO()
    torch.save(Trap(), buffer)
    return buffer.getvalue()


def saved(name: str, content: object) -> Prepare:
    """A file in the test's folder as `torch.save` writes it."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return written(name, buffer.getvalue())


def images(*files: str, broken: str = "", sizes: dict[str, int] | None = None, names: str = "") -> Prepare:
    """A folder of small images; `broken` is cut in half."""

    def prepare(tmp: Path, runs: Any) -> None:
        for number, name in enumerate(files):
            path = tmp / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            side = (sizes or {}).get(name, 8)
            shape = (side, side) if "masks" in name else (side, side, 3)
            Image.fromarray(np.random.default_rng(number).integers(0, 3, shape, np.uint8)).save(path)
        if broken:
            path = tmp / "data" / broken
            path.write_bytes(path.read_bytes()[:60])
        if names:
            (tmp / "data" / "classes.txt").write_text(names)

    return prepare
