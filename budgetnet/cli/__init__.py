"""The command line: decides nothing, its flags are the fields of the options and the arguments of the spaces."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence

import jsonargparse
from rich.console import Console

from budgetnet.cli.evaluate import evaluate_command
from budgetnet.cli.export import export_command
from budgetnet.cli.flags import one_line
from budgetnet.cli.measure import measure_command
from budgetnet.cli.report import report_command
from budgetnet.cli.search import search_command
from budgetnet.console import print_limits
from budgetnet.errors import BudgetnetError, ConfigError, UnreachableBudget
from budgetnet.version import __version__

OK, WRONG, UNREACHABLE, INTERRUPTED = 0, 2, 3, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status: 0 done, 2 wrong request, 3 budget not kept, 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--version"]:
        print(__version__)
        return OK
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
        print_limits(errors, error.limits)
        errors.print(f"budgetnet: {' '.join(str(error).split())}")
        return UNREACHABLE
    except (BudgetnetError, OSError) as error:  # an OSError: a full disk, a folder that cannot be written
        errors.print(f"budgetnet: {' '.join(str(error).split())}")
        return WRONG
    except jsonargparse.ArgumentError as error:
        errors.print(f"budgetnet {arguments[0]}: {one_line(str(error))}")
        return WRONG
    except KeyboardInterrupt as interrupt:
        how = "; the same command with --resume --out {} goes on from there".format
        errors.print(f"budgetnet: interrupted{how(shlex.quote(str(interrupt))) if interrupt.args else ''}")
        return INTERRUPTED
    return OK


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

`budgetnet COMMAND --help` lists every option; --json prints one JSON object for programs. Exit status: 0 done, 2 the
request is wrong, 3 a budget cannot be kept, or was not kept by the network that was found, which is written all the
same, 130 interrupted."""
