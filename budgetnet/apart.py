"""Models of ONNX timed in a process of their own: a new one, that holds nothing else than them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnxruntime as ort

from budgetnet.timing import Timing, interleaved

START = """
import sys, types
package = types.ModuleType("budgetnet")
package.__path__ = [sys.argv[1]]
sys.modules["budgetnet"] = package
from budgetnet.apart import serve
serve()
"""
"""Begins it without what `import budgetnet` imports, torch among it, which takes 6 seconds and memory."""


def onnx_session(model: str | bytes, threads: int) -> ort.InferenceSession:
    """A file, or a model's bytes, in onnxruntime on the CPU."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class Apart:
    """A new process that builds models and times them; it ends with the `with` that it is entered by.

    It has this one's processors, environment and path of modules. It begins without a script's `__main__`, and with
    nothing of this one's memory.
    """

    def __init__(self) -> None:
        self.said = tempfile.TemporaryFile()  # noqa: SIM115  # has no name: gone once it is closed
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", START, str(Path(__file__).parent)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.said,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        except BaseException:
            self.said.close()
            raise
        self.built = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        for file in (self.process.stdin, self.process.stdout, self.said):
            try:
                file.close()  # type: ignore[union-attr]
            except OSError:  # what it did not read before it ended
                continue

    def build(self, model: bytes, shape: Sequence[int], threads: int) -> Callable[[], object]:
        """A model's bytes with an input of this shape, to be timed there.

        Raises:
            ChildProcessError: the runtime refuses it, or the process ended.
        """
        self._ask({"model": len(model), "shape": list(shape), "threads": threads}, model)
        self.built += 1
        return Built(self, self.built - 1)

    def times(self, ways: Sequence[Callable[[], object]], calls: int, seconds: float = 0.0) -> list[Timing]:
        """As `interleaved`, of what it has built.

        Raises:
            ChildProcessError: the runtime cannot run one, or the process ended.
        """
        numbers = [way.number for way in ways if isinstance(way, Built)]
        found = self._ask({"ways": numbers, "calls": calls, "seconds": seconds})
        return [Timing(np.array(taken), disturbed, np.array(bursts, int)) for taken, disturbed, bursts in found]

    def _ask(self, request: dict[str, Any], content: bytes = b"") -> Any:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(json.dumps(request).encode() + b"\n" + content)
            stdin.flush()
            line = stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            raise ChildProcessError(f"the process that times it ended: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise ChildProcessError(answer["error"])
        return answer["found"]

    def _last_words(self) -> str:
        status = self.process.wait()
        if status < 0:
            return f"signal {-status}"
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit status {status}"


@dataclass(frozen=True, eq=False)
class Built:
    """A model that another process has built, by its number there; to call it is to time a few calls of it."""

    there: Apart
    number: int

    def __call__(self) -> object:
        """Calls it there."""
        return self.there.times([self], calls=1)


def serve() -> None:
    """What the new process does: it answers each request until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that asks is interrupted too, and ends this one
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what else is printed is no answer
    built: list[Callable[[], object]] = []
    while line := sys.stdin.buffer.readline():
        request, answer = json.loads(line), dict[str, Any](found=[])
        try:
            if "model" in request:
                model = sys.stdin.buffer.read(request["model"])
                built.append(_run(model, request["shape"], request["threads"]))
            else:
                ways = [built[number] for number in request["ways"]]
                timed = interleaved(ways, calls=request["calls"], seconds=request["seconds"])
                answer["found"] = [[one.calls.tolist(), one.disturbed, one.bursts.tolist()] for one in timed]
        except Exception as error:  # runtimes name no one error
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)


def _run(model: bytes, shape: Sequence[int], threads: int) -> Callable[[], object]:
    feed = {"x": np.random.default_rng(0).standard_normal(shape, np.float32)}
    session = onnx_session(model, threads)
    return lambda: session.run(None, feed)
