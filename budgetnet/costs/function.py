"""A cost of one's own: a Python function of what is used, of the network that this makes, or of examples too."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Collection
from functools import partial
from hashlib import sha256
from pathlib import Path
from reprlib import repr as shortened
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from budgetnet.costs.additive import decided_once
from budgetnet.costs.drawn import DrawnModel, ExactModel, Examples, Value
from budgetnet.costs.measured import Measured
from budgetnet.errors import ConfigError
from budgetnet.extraction import extract
from budgetnet.gated import contiguous
from budgetnet.supernet import SuperNetwork

FORMS = {
    frozenset({"architecture"}): "architecture",
    frozenset({"network"}): "network",
    frozenset({"architecture", "x"}): "examples",
    frozenset({"network", "x"}): "examples",
}
"""What a function is of, by the names of its parameters."""
OPTIONS = ("unit", "noisy")


class Function:
    """A Python function as a cost; it needs no gradient, need not grow with the network, and may be random.

    Args:
        call: gives a number >= 0 in `unit`.
        of: "architecture": `call` takes the frozenset of the names of used edges and of open groups inside them, as
            `SuperNetwork.unit_names` has them; "network": the plain network of `extract`, in evaluation mode,
            which it leaves as it is; "examples": `architecture` or `network`, whichever it names, and
            `x`, `(b, C, H, W)`, by name, for one number or `(b,)`. "": as the names of its parameters tell.
        unit: what the numbers count; "" for what the function's attribute `unit` says, if anything.
        noisy: whether equal calls differ; also where the function's attribute `noisy` is true. What is not noisy and
            reads no examples is called once for each architecture: a cost that follows the weights is noisy.
        key: how it is written in budgets; "" for its name.

    Raises:
        ConfigError: `call` is no function, takes other parameters, or has attributes of another type.

    Source: BSN, section 3.3 and appendix ("Stochastic costs in the REINFORCE algorithm").
    """

    def __init__(
        self, call: Callable[..., Any], of: str = "", unit: str = "", noisy: bool = False, *, key: str = ""
    ) -> None:
        if not callable(call):
            raise ConfigError(f"{key or 'a cost of your own'} must be a function, got {shortened(call)}")
        self.call, self.key = call, key or getattr(call, "__name__", type(call).__name__)
        self.unit, self.noisy = unit or getattr(call, "unit", ""), noisy or getattr(call, "noisy", False)
        if not isinstance(self.unit, str) or not isinstance(self.noisy, bool):
            raise ConfigError(
                f"{self.key} must have a text as unit and true or false as noisy, got {self.unit!r} and {self.noisy!r}"
            )
        if of not in ("", *FORMS.values()):
            raise ConfigError(f"of must be architecture, network or examples, got {of!r}")
        names = required(call) if of in ("", "examples") else (of,)
        self.of, self.beside = FORMS.get(frozenset(names), ""), "network" if "network" in names else "architecture"
        if not self.of or of not in ("", self.of):
            raise ConfigError(
                f"{self.key} must take architecture or network, or one of them and x, got ({', '.join(names)})"
            )
        self.by_name = of == "" and self.beside in required(call, kind=inspect.Parameter.KEYWORD_ONLY)
        self.examples: Examples | None = None

    @property
    def drawn(self) -> bool:
        """Whether its value is drawn, or takes its time, so that much goes by predictions."""
        return self.noisy or self.of != "architecture"

    def on(self, examples: Examples) -> Function:
        """The same, measured on these batches of examples, where it reads any."""
        other = copy.copy(self)
        other.examples = examples if self.of == "examples" else None
        return other

    def bind(self, network: SuperNetwork) -> ExactModel | DrawnModel:
        """The cost of this network's architectures; one that is drawn is asked for some of them.

        Raises:
            ConfigError: as `measured`.
        """
        model = self._model(network)
        if isinstance(model, DrawnModel):
            model.begin()
        return model

    def measured(self, network: SuperNetwork, kept: Tensor) -> Measured:
        """What an architecture, `(1, G)`, costs; nothing is predicted, and no other is asked for.

        Raises:
            ConfigError: the network has gates that look at the input, examples are read and there are none, or the
                function raises an error or returns something else than numbers >= 0.
        """
        model = self._model(network)
        if isinstance(model, DrawnModel):
            return model.measure(kept)[0]
        value = float(model(network.used(kept))[0])
        return Measured(value, value, value)

    def _model(self, network: SuperNetwork) -> ExactModel | DrawnModel:
        """The cost of this network's architectures, none of which was asked for yet."""
        decided_once(self.key, network)
        if self.of == "examples" and self.examples is None:
            raise ConfigError(f"{self.key} reads examples, and there are none here")
        at = partial(self._at, network, network.unit_names())
        if not self.drawn:
            return ExactModel(network, at, self.unit)
        return DrawnModel(network, at, self.unit, noisy=self.noisy, examples=self.examples)

    def _at(self, network: SuperNetwork, names: list[str], bits: Tensor) -> Value:
        """The function on one architecture, `(U,)` bits."""
        given: frozenset[str] | nn.Module
        if self.beside == "network":
            given = contiguous(extract(network, network.gates_of(bits[None].float()))).eval()
        else:
            given = frozenset(name for name, bit in zip(names, bits.tolist(), strict=True) if bit)
        return partial(self._call, given)

    @torch.no_grad()
    def _call(self, given: frozenset[str] | nn.Module, x: Tensor | None) -> Tensor:
        """`(n,)` float64: the number it returns, or those of the examples."""
        try:
            if self.of == "examples":
                found = self.call(**{self.beside: given, "x": x})
            else:
                found = self.call(**{self.beside: given}) if self.by_name else self.call(given)
        except (Exception, SystemExit) as error:  # the user's own code may raise anything
            raise ConfigError(f"{self.key} raised {type(error).__name__}: {error}") from error
        if type(found) is float and 0 <= found < math.inf:  # as most do, many times a step
            return torch.tensor([found], dtype=torch.float64)
        try:
            values = torch.as_tensor(found, dtype=torch.float64).cpu()
        except (TypeError, ValueError, RuntimeError):
            values = None
        one = values is not None and values.numel() == 1 and not isinstance(found, bool)
        if values is None or not (one or (self.of == "examples" and x is not None and values.shape == x.shape[:1])):
            several = ", or one for each example" if self.of == "examples" else ""
            raise ConfigError(f"{self.key} must return a number{several}, got {shortened(found)}")
        wrong = values[~((values >= 0) & values.isfinite())]
        if wrong.numel():
            raise ConfigError(f"{self.key} must return finite numbers >= 0, got {float(wrong[0]):g}")
        return values.reshape(-1)


def function_in(text: str, *, taken: Collection[str]) -> Function | None:
    """The cost that `FILE.py:NAME` or `package.module:NAME` names, None where the text has another form.

    Args:
        text: may have options in brackets behind it: `costs.py:energy[unit=mJ,noisy=true]`.
        taken: names of costs, which are no modules.

    Raises:
        ConfigError: there is no such function, or it is no cost.
    """
    match = re.fullmatch(
        r"(?P<place>.+?\.py|[^\W\d][\w.]*):(?P<name>[^\W\d]\w*)(?:\[(?P<options>[^\[\]]*)\])?", text.strip()
    )
    if match is None or (not match["place"].endswith(".py") and match["place"].partition(".")[0] in taken):
        return None
    pairs = [part.partition("=") for part in (match["options"] or "").split(",") if part.strip()]
    given = {name.strip(): value.strip() for name, _, value in pairs}
    key = f"{match['place']}:{match['name']}"
    for name in given:
        if name not in OPTIONS:
            raise ConfigError(f"{key} has the options {', '.join(OPTIONS)}, got {name!r}")
    noisy = given.get("noisy", "false")
    if noisy not in ("true", "false"):
        raise ConfigError(f"noisy must be true or false, got {noisy!r}")
    call = getattr(module_at(match["place"]), match["name"], None)
    if call is None:
        raise ConfigError(f"{match['place']} has no function {match['name']!r}")
    written = ",".join(f"{name}={value}" for name, value in given.items())
    return Function(
        call, unit=given.get("unit", ""), noisy=noisy == "true", key=f"{key}[{written}]" if written else key
    )


def module_at(place: str) -> ModuleType:
    """The module in a file, read anew under a name of its own, or the one of a name, also in the working directory.

    Raises:
        ConfigError: there is none, or it raises an error.
    """
    path = Path(place)
    try:
        if not place.endswith(".py"):
            if not {"", os.getcwd()} & set(sys.path):  # of a console script; `python -m` looks there by itself
                sys.path.append(os.getcwd())
            return importlib.import_module(place)
        if not path.is_file():
            raise ConfigError(f"expected a Python file at {place}, found none")
        name = f"_budgetnet_{path.stem}_{sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
        specification = importlib.util.spec_from_file_location(name, path)
        assert specification is not None
        assert specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        sys.modules[name] = module  # where dataclasses look for it
        specification.loader.exec_module(module)
        return module
    except ConfigError:
        raise
    except ModuleNotFoundError as error:
        if not f"{place}.".startswith(f"{error.name}."):
            raise ConfigError(f"{place} raised {type(error).__name__}: {error}") from error
        raise ConfigError(f"expected a Python module {place}, found none") from None
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise ConfigError(f"{place} raised {type(error).__name__}: {error}") from error


def required(call: Callable[..., Any], *, kind: Any = None) -> tuple[str, ...]:
    """Names of the parameters that have to be given.

    Args:
        call: the function.
        kind: of `inspect.Parameter`, for those alone.

    Raises:
        ConfigError: the function does not tell.
    """
    try:
        known = inspect.signature(call).parameters.values()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"a function that does not tell its parameters needs `of`, got {shortened(call)}") from error
    spread = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    given = [each for each in known if each.default is each.empty and each.kind not in spread]
    return tuple(each.name for each in given if kind in (None, each.kind))
