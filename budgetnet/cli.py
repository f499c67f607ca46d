"""The command line: decides nothing, its flags are the fields of the options and the arguments of the spaces."""

from __future__ import annotations

import importlib.util
import inspect
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import jsonargparse
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from budgetnet import data as datasets
from budgetnet import report, spaces
from budgetnet.architectures import named
from budgetnet.conditional import export_fastest
from budgetnet.console import Bars, quantity
from budgetnet.delivery import TIMED, Found, evaluate_architecture, evaluate_gates, fold_gates, restored
from budgetnet.errors import BudgetnetError, ConfigError, FileError, UnreachableBudget
from budgetnet.export import FORMATS, load
from budgetnet.inference import POLICIES, Inference
from budgetnet.measure import DEFAULT, measure_file, measure_network
from budgetnet.options import SearchOptions
from budgetnet.report.records import Record
from budgetnet.runs import RunFolder, replace
from budgetnet.search import check_fit, search
from budgetnet.supernet import SuperNetwork

OK, WRONG, UNREACHABLE, INTERRUPTED = 0, 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status: 0 done, 2 wrong request, 3 budget out of reach, 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        return OK if arguments else WRONG
    errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    try:
        if arguments[0] not in COMMANDS:
            raise ConfigError(f"commands are {', '.join(COMMANDS)}, got {arguments[0]!r}")
        COMMANDS[arguments[0]](arguments[1:])
    except SystemExit as error:  # --help, once it is printed
        return int(error.code or OK)
    except UnreachableBudget as error:
        errors.print(f"budgetnet: {' '.join(str(error).split())}")
        return UNREACHABLE
    except (BudgetnetError, OSError) as error:  # an OSError: a full disk, a folder that cannot be written
        errors.print(f"budgetnet: {' '.join(str(error).split())}")
        return WRONG
    except jsonargparse.ArgumentError as error:
        errors.print(f"budgetnet {arguments[0]}: {_one_line(str(error))}")
        return WRONG
    except KeyboardInterrupt:
        errors.print("budgetnet: interrupted; the same command with --resume and --out RUN goes on from there")
        return INTERRUPTED
    return OK


def search_command(arguments: list[str]) -> None:
    """Budgetnet search"""
    space, rest = _take(arguments, "--space", "resnet_fabric")
    parser = _parser("search", "Learns a network that keeps its budget.", space, "--space NAME")
    parser.add_class_arguments(SearchOptions, None)
    parser.add_argument("--data", default="digits", help=f"{', '.join(datasets.NAMES)}, or a folder of images")
    parser.add_argument("--root", default="data", help="folder of the named datasets")
    parser.add_argument("--image_size", type=int | None, default=None, help="resize images to this side")
    parser.add_argument("--ignore", type=int | None, default=None, help="mask value without loss")
    parser.add_argument("--train_images", type=int | None, default=None, help="take so many training images only")
    parser.add_argument("--pad", type=int | None, default=None, help="pixels a side before the random crop")
    parser.add_argument("--flip", type=bool | None, default=None, help="mirror training images at random, or not")
    parser.add_argument("--mean", type=str | None, default=None, help="of pixels in [0, 1], M or R,G,B; 0.5")
    parser.add_argument("--std", type=str | None, default=None, help="likewise: a network sees (pixel - mean) / std")
    parser.add_argument("--budget", action="append", default=[], metavar="COST<=LIMIT", help="repeat for several")
    parser.add_argument("--architecture", type=str | None, default=None, help="train this one, without a search")
    parser.add_argument("--out", type=str | None, default=None, metavar="RUN", help="run folder")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_argument("--json", action="store_true", help="print result.json on stdout and nothing else")
    given = parser.parse_args(rest)
    options = SearchOptions(**{field.name: getattr(given, field.name) for field in fields(SearchOptions)})
    if given.resume and given.out is None:
        raise ConfigError("--resume needs the run to go on with: --out RUN")
    data = datasets.load(given.data, root=given.root, image_size=given.image_size, ignore=given.ignore)
    if given.train_images is not None:
        data = data.subset(given.train_images, seed=0)
    data = data.augmented(pad=given.pad, flip=given.flip)
    if (given.mean is None) != (given.std is None):
        raise ConfigError("images are seen by --mean and --std together, got one of them")
    if given.mean is not None:
        data = data.normalised(_numbers("--mean", given.mean), _numbers("--std", given.std))
    torch.manual_seed(options.seed)
    network = _build(
        space,
        given,
        rest,
        {
            "classes": data.num_classes,
            "in_channels": data.image_shape[0],
            "image_size": data.image_shape[1] if data.image_shape[1] == data.image_shape[2] else data.image_shape[1:],
            "task": data.task,
        },
    )
    bars = Bars(Console(stderr=True, quiet=given.json))
    command = shlex.join(["budgetnet", "search", *arguments])
    try:
        found = search(
            network,
            data,
            given.budget,
            options,
            architecture=given.architecture,
            out=given.out,
            resume=given.resume,
            command=command,
            progress=bars,
        )
    finally:
        bars.close()
    if given.json:
        print(json.dumps(found.result))
    else:
        _tell(found)


def measure_command(arguments: list[str]) -> None:
    """Budgetnet measure"""
    target, rest = _positional(arguments, "measure RUN|FILE.onnx|FILE.pt2|SPACE")
    space = target if target in spaces.BY_NAME or ":" in target else ""
    own, rest = _take(rest, "--space", "")
    parser = _parser("measure", "Prints what a space, a run or a file costs.", space, "RUN|FILE.onnx|FILE.pt2|SPACE")
    parser.add_argument(
        "--costs", type=str | None, default=None, help="macs,macs:paper,params,steps:2,memory:file,latency"
    )
    parser.add_argument(
        "--architecture", type=str | None, default=None, help="a sub-network: a name or an architecture.json"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(rest)
    if own and not Path(target).is_dir():
        raise ConfigError(f"--space says what space of your own a run folder is of, got {own!r} beside {target!r}")
    asked = _costs(given.costs) if given.costs else []
    if space:
        network = _build(space, given, rest, {})
        kept = named(network, given.architecture or "full")
        found = measure_network(network, kept, asked or _defaults(network))
    elif Path(target).is_dir():
        network = _space_of_run(RunFolder(target), own)
        if network.heads and given.architecture is None:
            found = _measured_by_run(RunFolder(target), asked)
        else:
            kept = named(network, given.architecture or str(Path(target) / "architecture.json"))
            found = measure_network(network, kept, asked or _defaults(network))
    elif Path(target).suffix.removeprefix(".") in FORMATS:
        found = measure_file(target, asked)
    else:
        known = ", ".join(spaces.BY_NAME)
        raise ConfigError(f"measure takes a run folder, a .onnx or .pt2 file, or a space ({known}), got {target!r}")
    if given.json:
        print(json.dumps(found))
        return
    table = Table("cost", "value", "exactly")
    for name, value in found["costs"].items():
        table.add_row(escape(name), quantity(value, found["units"][name]), f"{value:,}")
    Console().print(table)


def export_command(arguments: list[str]) -> None:
    """Budgetnet export"""
    target, rest = _positional(arguments, "export RUN")
    own, rest = _take(rest, "--space", "")
    parser = _parser("export", "Copies the network of a finished run to a file.", "", "RUN")
    parser.add_argument("--format", default="onnx", help=" or ".join(FORMATS))
    parser.add_argument("--out", type=str | None, default=None, metavar="FILE", help="network.FORMAT unless given")
    parser.add_argument(
        "--fold",
        type=float | None,
        default=None,
        metavar="MARGIN",
        help="gates that look at the input become constants where, on the validation images, they are open more seldom "
        "than this share, such as 0.05, or closed",
    )
    parser.add_argument("--data", type=str | None, default=None, help="to fold on: the run's own unless given")
    parser.add_argument("--root", default="data", help="folder of the named datasets")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(rest)
    if given.format not in FORMATS:
        raise ConfigError(f"format must be {' or '.join(FORMATS)}, got {given.format!r}")
    run = RunFolder(target)
    decided = _decided(run.read("result.json"), run)
    source, out = run.path / f"network.{given.format}", Path(given.out or f"network.{given.format}")
    if out.suffix != source.suffix:
        raise ConfigError(f"a file of format {given.format} ends in {source.suffix}, got {out}")
    if not out.parent.is_dir() or out.is_dir():
        raise ConfigError(f"expected a file in a folder that exists, got {out}")
    if given.fold is not None:
        if decided is None:
            raise ConfigError(f"--fold takes a run whose gates look at the input, got {target}")
        if given.format != "onnx":
            raise ConfigError(f"a folded network is exported to onnx, got {given.format!r}")
        _fold(run, decided.share("tau"), out, own, given)
        return
    load(source)  # a broken file is not passed on
    replace(out, source.read_bytes())
    print(json.dumps({"file": str(out), "bytes": out.stat().st_size}) if given.json else f"wrote {out}")


def _fold(run: RunFolder, tau: float, out: Path, own: str, given: Any) -> None:
    """Writes the network of a run with near-constant gates folded, and prints what it gives beside the original."""
    network = restored(run, _space_of_run(run, own))
    data = _data_of_run(run, network, given)
    folded, told = fold_gates(network, data, tau, given.fold)
    examples = next(iter(datasets.Batches(data.validation, batch_size=TIMED, shuffle=False).epoch(0)))[0]
    told |= {"onnx": export_fastest(folded, out, examples)}
    if given.json:
        print(json.dumps({"file": str(out), "bytes": out.stat().st_size, **told}))
        return
    table = Table("", "original", "folded", title=f"{told['constants']} of {told['gates']} gates are constants now")
    for name, value in told["validation"]["original"].items():
        table.add_row(name, *[_shown(name, one) for one in (value, told["validation"]["folded"][name])])
    Console().print(table)
    print(f"wrote {out}")


def report_command(arguments: list[str]) -> None:
    """Budgetnet report"""
    parser = _parser("report", "Writes the page of a run, or of several beside each other.", "", "RUN ...")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, finished or not")
    parser.add_argument(
        "--out", type=str | None, default=None, metavar="FILE.html", help="report.html in the folder of a single run"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(arguments)
    page = report.write(given.runs, given.out)
    print(json.dumps({"report": str(page)}) if given.json else f"wrote {page}")


def evaluate_command(arguments: list[str]) -> None:
    """Budgetnet evaluate"""
    target, rest = _positional(arguments, "evaluate RUN")
    own, rest = _take(rest, "--space", "")
    parser = _parser("evaluate", "Looks at the test images with the gates of a run, decided in one way.", "", "RUN")
    parser.add_argument(
        "--policy",
        type=str | None,
        default=None,
        help=f"{', '.join(POLICIES)}; unless given, the network that was handed over",
    )
    parser.add_argument(
        "--tau", type=float | None, default=None, help="a gate is open above this probability; the run's own, else 0.5"
    )
    parser.add_argument("--runs", type=int, default=5, help="stochastic runs of an ensemble")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument(
        "--recalibration",
        type=int | None,
        default=None,
        help="training batches that set the batch norms first; 10, but none where gates are decided as in the run",
    )
    parser.add_argument("--batch_size", type=int, default=128, help="images a batch")
    parser.add_argument("--costs", type=str, default="macs", help="macs,params,steps:2")
    parser.add_argument("--data", type=str | None, default=None, help="the run's own unless given")
    parser.add_argument("--root", default="data", help="folder of the named datasets")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(rest)
    run = RunFolder(target)
    result = run.read("result.json") if (run.path / "result.json").exists() else None
    decided = None if result is None else _decided(result, run)
    own_tau = None if decided is None else decided.share("tau")
    tau = next(value for value in (given.tau, own_tau, 0.5) if value is not None)
    inference = Inference(given.policy or "threshold", tau, given.runs, given.seed)
    network = _space_of_run(run, own)
    if result is not None and decided is None and given.policy is None and given.tau is None:
        data = _data_of_run(run, network, given)
        found = evaluate_architecture(run, network, data, _costs(given.costs), batch_size=given.batch_size)
    else:
        network = restored(run, network)
        as_in_run = inference.policy == "threshold" and tau == own_tau
        found = evaluate_gates(
            network,
            _data_of_run(run, network, given),
            inference,
            _costs(given.costs),
            recalibration=(0 if as_in_run else 10) if given.recalibration is None else given.recalibration,
            batch_size=given.batch_size,
        )
    if given.json:
        print(json.dumps(found))
        return
    table = Table("", "value", title=f"{found['policy']}, test images")
    for name, value in found["quality"].items():
        table.add_row(name, _shown(name, value))
    for name, value in found["costs"].items():
        table.add_row(name, quantity(value, found["units"][name]))
    Console().print(table)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "search": search_command,
    "measure": measure_command,
    "export": export_command,
    "evaluate": evaluate_command,
    "report": report_command,
}
HELP = """budgetnet learns neural networks that fit a budget.

  budgetnet search   --data DATA --space NAME --budget 'macs<=25%' [--out RUN] [--resume]
  budgetnet measure  RUN|FILE.onnx|FILE.pt2|SPACE [--costs macs,params,steps:2] [--architecture NAME]
  budgetnet export   RUN --format onnx|pt2 --out FILE [--fold 0.05]
  budgetnet evaluate RUN [--policy threshold|stochastic|always-on|ensemble] [--tau 0.5]
  budgetnet report   RUN ... [--out FILE.html]

`budgetnet COMMAND --help` lists every option; --json prints one JSON object for programs."""


def _parser(command: str, description: str, space: str, first: str) -> jsonargparse.ArgumentParser:
    parser = jsonargparse.ArgumentParser(
        prog=f"budgetnet {command} {first}",
        description=description,
        exit_on_error=False,
        epilog=f"spaces: {', '.join(spaces.BY_NAME)}, or path/to/file.py:function"
        if "SPACE" in first or space
        else None,
    )
    if space:
        for name, parameter in inspect.signature(_builder(space)).parameters.items():
            default = None if parameter.default is parameter.empty else parameter.default
            kind = inspect.get_annotations(_builder(space), eval_str=True).get(name, str)
            parser.add_argument(f"--space.{name}", type=kind, default=default)
    return parser


def _builder(space: str) -> Callable[..., SuperNetwork]:
    """The function that builds a space: a named one, or the user's by file and name."""
    if space in spaces.BY_NAME:
        return spaces.BY_NAME[space]
    file, _, function = space.rpartition(":")
    if not file:
        raise ConfigError(f"spaces are {', '.join(spaces.BY_NAME)}, or path/to/file.py:function, got {space!r}")
    specification = importlib.util.spec_from_file_location(Path(file).stem, file)
    if not Path(file).is_file() or specification is None or specification.loader is None:
        raise ConfigError(f"expected a Python file at {file}, found none")
    module = importlib.util.module_from_spec(specification)
    with _blaming(file):
        specification.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise ConfigError(f"{file} has no function {function!r}")
    builder: Callable[..., SuperNetwork] = getattr(module, function)
    return builder


@contextmanager
def _blaming(whose: str) -> Iterator[None]:
    """Turns what the user's own code raises into one line; it may raise anything."""
    try:
        yield
    except BudgetnetError:
        raise
    except Exception as error:
        raise ConfigError(f"{whose} raised {type(error).__name__}: {error}") from error


def _build(space: str, given: Any, arguments: list[str], defaults: dict[str, Any]) -> SuperNetwork:
    """Builds a space from what was given, else from what the data need, else from its own defaults."""
    builder = _builder(space)
    names = inspect.signature(builder).parameters
    told = vars(given.space) if hasattr(given, "space") else {}
    typed = {name for name in names if any(re.match(rf"--space\.{name}(=|$)", word) for word in arguments)}
    options = {**told, **{name: value for name, value in defaults.items() if name in names and name not in typed}}
    lacking = [name for name in names if options.get(name) is None and names[name].default is inspect.Parameter.empty]
    if lacking:
        raise ConfigError(f"{space} needs --space.{lacking[0]}, got nothing for it")
    with _blaming(space):
        network = builder(**options)
    if not isinstance(network, SuperNetwork):
        raise ConfigError(f"{space} must return a SuperNetwork, got {type(network).__name__}")
    return network


def _space_of_run(run: RunFolder, own: str) -> SuperNetwork:
    space = run.read("options.json").get("space")
    if not isinstance(space, dict) or [type(space.get(key)) for key in ("name", "options")] != [str, dict]:
        raise FileError(f"{run.path / 'options.json'} must name its space and the space's options")
    if space["name"] not in spaces.BY_NAME and not own:
        raise ConfigError(f"{run.path} was learned in a space of its own: name it again with --space file.py:function")
    builder = _builder(own or space["name"])
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in space["options"].items()}
    try:
        return builder(**options)
    except TypeError as error:
        raise FileError(
            f"{run.path / 'options.json'} has options that {space['name']} does not take: {error}"
        ) from error


def _data_of_run(run: RunFolder, network: SuperNetwork, given: Any) -> datasets.Dataset:
    """The data that were named, or those of the run, seen as the run saw its own."""
    own = Record(run.read("options.json"), str(run.path / "options.json")).record("data")
    data = datasets.load(given.data or own.text("name"), root=given.root)
    check_fit(network, data)
    return data.normalised(own.numbers("mean"), own.numbers("std"))


def _decided(result: dict[str, Any], run: RunFolder) -> Record | None:
    """What result.json says of gates that look at the input, None where none does."""
    return Record(result, str(run.path / "result.json")).maybe_record("inference")


def _defaults(network: SuperNetwork) -> list[str]:
    """What is measured of a space or a run where nothing is asked: what its gates allow."""
    return [cost for cost in DEFAULT if cost != "params" or not network.heads]


def _measured_by_run(run: RunFolder, costs: Sequence[str]) -> dict[str, Any]:
    """What a finished run says its network costs: of gates that look at the input, as expected on validation images."""
    record = Record(run.read("result.json"), str(run.path / "result.json"))
    network = record.record("network")
    units = {"macs": "MAC", "params": "parameter", "memory:params": "B", "latency": "ms"}
    values = {name: network.number(name) for name in units if name != "latency"}
    values["latency"] = network.record("latency_ms").number("median")
    for budget in record.records("budgets"):
        values[budget.text("cost")], units[budget.text("cost")] = budget.number("value"), budget.text("unit")
    for text in costs:
        if text not in values:
            raise ConfigError(
                f"of a run whose gates look at the input can be measured {', '.join(values)}, got {text!r}: "
                "name an --architecture for others"
            )
    asked = list(costs) or list(values)
    return {
        "costs": {name: int(values[name]) if values[name].is_integer() else values[name] for name in asked},
        "units": {name: units[name] for name in asked},
    }


def _shown(name: str, value: float) -> str:
    """A quality or a cost for a person to read."""
    if name == "macs":
        return quantity(value, "MAC")
    return f"{value:.4f}" if name == "loss" else f"{100 * value:.2f} %"


def _tell(found: Found) -> None:
    result, console = found.result, Console()
    table = Table("cost", "network", "limit", "kept", title="budget")
    for row in result["budgets"]:
        numbers = [quantity(row[key], row["unit"]) for key in ("value", "limit")]
        unsure = ", within the noise" if row.get("noise") else ""
        table.add_row(escape(row["cost"]), *numbers, ("yes" if row["met"] else "NO") + unsure)
    if result["budgets"]:
        console.print(table)
    for row in result["budgets"]:
        for note in row.get("notes", []):
            console.print(f"{row['cost']}: {note}", highlight=False, markup=False)
    quality = ", ".join(f"{name} {100 * value:.2f} %" for name, value in result["test"].items() if name != "loss")
    console.print(f"test {quality}", highlight=False)
    for name in ("network.onnx", "network.pt2", "report.html"):
        if not (found.run / name).exists():  # branches are exported to ONNX alone
            continue
        console.print(f"{found.run / name}", highlight=False, soft_wrap=True)


def _take(arguments: list[str], flag: str, default: str) -> tuple[str, list[str]]:
    """The value of a flag that decides which other flags there are, and the arguments without it."""
    value, rest, words = default, [], iter(arguments)
    for word in words:
        if word == flag:
            value = next(words, "")
            if not value or value.startswith("-"):
                raise ConfigError(f"{flag} needs a value")
        elif word.startswith(f"{flag}="):
            value = word.partition("=")[2]
        else:
            rest.append(word)
    return value, rest


def _positional(arguments: list[str], usage: str) -> tuple[str, list[str]]:
    if arguments and arguments[0] in ("-h", "--help"):
        return "", arguments
    if not arguments or arguments[0].startswith("-"):
        raise ConfigError(f"expected: budgetnet {usage}, got {shlex.join(arguments) or 'nothing'}")
    return arguments[0], arguments[1:]


def _costs(text: str) -> list[str]:
    """Costs with commas between them; those inside brackets part a cost's options."""
    return [cost.strip() for cost in re.split(r",(?![^\[]*\])", text)]


def _numbers(flag: str, text: str) -> list[float]:
    """Numbers with commas between them."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise ConfigError(f"{flag} must be numbers with commas between them, got {text!r}") from None


def _one_line(message: str) -> str:
    text = " ".join(message.split())
    text = re.sub(r"^Parser key \"([\w.]+)\": ", r"--\1: ", text)
    text = re.sub(r"<class '(\w+)'>", r"\1", text).replace("typing.", "")
    union = re.fullmatch(r"(--[\w.]+): Does not validate.* Errors: - (.*) Given value type: .* Given value: (.*)", text)
    if union:
        kinds = re.findall(r"Expected an? (.+?)(?= - |$)", union[2])
        return f"{union[1]}: expected {' or '.join(kinds)}, got {union[3]}"
    return re.sub(r"Expected an? (.*?)\. Got value: ", r"expected \1, got ", text)[:300]


if __name__ == "__main__":
    sys.exit(main())
