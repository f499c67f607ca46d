"""`budgetnet report`: the page of one run, or of several beside each other."""

from __future__ import annotations

import json

from budgetnet import report
from budgetnet.cli.flags import parser_of


def report_command(arguments: list[str]) -> None:
    """Writes the page of a run, or of several beside each other."""
    parser = parser_of("report", "Writes the page of a run, or of several beside each other.", "", "RUN ...")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, finished or not")
    parser.add_argument(
        "--out", type=str | None, default=None, metavar="FILE.html", help="report.html in the folder of a single run"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(arguments)
    page = report.write(given.runs, given.out)
    print(json.dumps({"report": str(page)}) if given.json else f"wrote {page}")
