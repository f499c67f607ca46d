"""The report says what the run folder says, draws every edge, and stays one safe file."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from budgetnet.architectures import describe
from budgetnet.errors import ConfigError, FileError
from budgetnet.report import write
from budgetnet.report.architecture import Architecture
from budgetnet.report.cuts import crossing, sides
from budgetnet.report.figures import comparison
from budgetnet.report.network import draw
from budgetnet.report.page import picture
from budgetnet.report.quantities import MISSING, SPACE, apart, duration, exact, percent, shape, si
from budgetnet.report.records import Record
from budgetnet.report.run import Run
from budgetnet.session import Session
from budgetnet.spaces import resnet
from budgetnet.training import Sums

FULL, LIMIT, VALUE = 40.9e6, 10.2e6, 9.8e6


def fabric(width: int = 4, depth: int = 3, mark: str = "") -> dict[str, Any]:
    """A small fabric: a kept chain along the first row, an edge kept on no path, everything else dropped."""
    nodes = [{"name": "x" + mark, "position": [0, 0], "shape": [3, 32, 32]}]
    nodes += [
        {"name": f"l{column}.s{row}", "position": [column, row], "shape": [16, 32 >> row, 32 >> row]}
        for column in range(width)
        for row in range(depth)
    ]
    nodes.append({"name": "y", "position": [width, 0], "shape": [10]})

    def edge(source: int, target: int, kind: str, **given: Any) -> dict[str, Any]:
        start, end = nodes[source]["name"], nodes[target]["name"]
        usual = {"fixed": False, "kept": False, "used": False, "probability": 0.02}
        return {"name": f"{start}>{end}:{kind}", "source": source, "target": target, "kind": kind, **usual,
                "costs": {"macs": 0 if kind == "identity" else 1_200_000, "params": 2345}, **given}  # fmt: skip

    kept = {"kept": True, "used": True, "probability": 0.97}
    fixed = {"fixed": True, "kept": True, "used": True, "probability": None}
    edges = [edge(0, 1, "input", **fixed), edge(1 + depth * (width - 1), len(nodes) - 1, "output", **fixed)]
    for column in range(1, width):
        here = 1 + depth * column
        edges += [edge(here - depth, here, "block", **kept), edge(here - depth, here, "identity", **kept)]
        edges += [edge(here - depth + row - 1, here + row, "down") for row in range(1, depth)]
    edges[-1] |= {"kept": True, "probability": 0.6}  # but not used
    drawn = {"nodes": nodes, "edges": edges, "sites": [], "schedules": [], "cuts": []}
    return {"space": {"name": "fabric", "options": {}}, **drawn}


def gated() -> dict[str, Any]:
    """Four blocks in a row, two of which can be dropped; the last one is, and the first has no sites."""
    nodes = [{"name": f"n{place}", "position": [place, 0], "shape": [8, 4, 4]} for place in range(5)]
    blocks = [(True, True, None), (True, True, None), (False, True, 0.95), (False, False, 0.05)]
    edges = [
        {"name": f"b{place}", "source": place, "target": place + 1, "kind": "block", "fixed": fixed, "kept": used,
         "used": used, "probability": probability, "costs": {"macs": 1000}}
        for place, (fixed, used, probability) in enumerate(blocks)
    ]  # fmt: skip
    sites = [
        ("b1", "inner", [16] * 4, [True, False, False, False], [0.951, 0.049, 0.5, 0.02]),
        ("b1", "output", [3, 1], [True, True], [None, 0.949]),
        ("b2", "input", [2, 2], [True, False], [1, 0]),
        ("b2", "inner", [8], [True], [0.99]),
        ("b3", "inner", [8, 8], [True, True], [0.3, 0.7]),
    ]
    keys = ("edge", "name", "channels", "kept", "probability")
    listed = [dict(zip(keys, site, strict=True)) for site in sites]
    drawn = {"nodes": nodes, "edges": edges, "sites": listed, "schedules": [], "cuts": []}
    return {"space": {"name": "gated", "options": {}}, **drawn}


GATED = ["b1.inner", "b1.output", "b2", "b2.input", "b2.inner", "b3", "b3.inner"]
"""What can be closed in `gated`, in the network's order."""

INFERENCE = {
    "policy": "threshold",
    "tau": 0.625,
    "curve": [
        {"tau": tau, "accuracy": accuracy, "costs": {"macs": cost, "params": 10}}
        for tau, accuracy, cost in [(0.9, 0.5, 2e6), (0.5, 0.98, 12e6), (0.1, 0.97, 20e6)]
    ],
    "exits": [
        {"name": "first", "share": 0.25, "accuracy_all": 0.8125, "accuracy_chosen": 0.964},
        {"name": "second", "share": 0.0, "accuracy_all": 0.9, "accuracy_chosen": None},
        {"name": "end", "share": 0.75, "accuracy_all": 0.942, "accuracy_chosen": 0.925},
    ],
    "test_costs": {"macs": 9.7e6},
    "beside_full": {"torch 1": 0.84, "torch 16": 1.02, "onnxruntime 1": 1.21},
}


def rates(names: list[str], epoch: int) -> dict[str, float]:
    """An activation of each, different in every epoch."""
    return {name: (place + epoch / 10) / len(names) for place, name in enumerate(names)}


def epochs(count: int = 9, gates: list[str] | None = None) -> list[dict[str, Any]]:
    """Three epochs of each phase."""
    lines = []
    if gates is None:
        gates = [edge["name"] for edge in fabric()["edges"] if not edge["fixed"]]
    for epoch in range(count):
        phase = ("warmup", "search", "finetune")[min(epoch // 3, 2)]
        searching = phase == "search"
        cost = {"cost": "macs", "unit": "MAC", "limit": LIMIT, "at_most": True,
                "target": 2 * LIMIT if searching else None, "sampled": 1.1e7 if searching else None, "mode": 1.05e7,
                "price": 1.3 if searching else None}  # fmt: skip
        lines.append(
            {"epoch": epoch, "phase": phase, "step": 12 * epoch, "images_seen": 1437 * (epoch + 1),
             "seconds": 3.2 * epoch, "learning_rate": 0.1, "train": {"loss": 2 / (1 + epoch), "accuracy": 0.9},
             "validation": {"loss": 0.4, "accuracy": 0.961} if epoch % 2 == 0 else None,
             "entropy": 0.3 if searching else None, "connected": 0.98 if searching else None, "budgets": [cost],
             "activation": rates(gates, epoch) if searching else None}
        )  # fmt: skip
    return lines


def folder(path: Path, *, value: float = VALUE, finished: bool = True, mark: str = "", **result: Any) -> Path:
    """A realistic run folder; `mark` goes into every text that a stranger could have written."""
    path.mkdir(parents=True)
    options = {
        "command": "budgetnet search --data digits --budget 'macs<=25%'" + mark, "budgetnet": "0.1.0" + mark,
        "torch": "2.13.0" + mark, "created": "2031-05-06T07:08:09+00:00" + mark,
        "machine": "x86_64" + mark, "threads": 2,
        "space": {"name": "fabric" + mark, "options": {"width" + mark: mark}}, "data": {"name": "digits" + mark},
        "budgets": ["macs<=25%"], "search": {"epochs": 9, "schedule": [0.5, mark]},
    }  # fmt: skip
    outcome = {
        "space": "fabric", "data": "digits", "seed": 7, "images_seen": 12933, "images_taught": 0,
        "seconds": 3805.0,
        "budgets": [{"cost": "macs", "unit": "MAC" + mark, "limit": LIMIT, "at_most": True, "value": value,
                     "met": value <= LIMIT}],
        "before": [{"cost": "macs", "unit": "MAC" + mark, "limit": LIMIT, "smallest": 2e6, "bound": True,
                    "expected": 3e7, "full": FULL}],
        "full": {"macs": FULL, "params": 750_000},
        "network": {"macs": value, "params": 120_000, "memory:params": 500_000,
                    "latency_ms": {"median": 1.234, "p10": 1.1, "p90": 1.5, "runtime": "onnxruntime" + mark,
                                   "threads": 1, "batch": 1}},
        "validation": {"accuracy": 0.979}, "test": {"accuracy": 0.986},
        "equivalence": {"extracted": 0.0, "onnx": 1.4e-6, "pt2": 4.8e-7},
        "candidates": [{"costs": {"macs": value}, "validation": {"accuracy": 0.979}, "chosen": True},
                       {"costs": {"macs": 9e6}, "validation": {"accuracy": 0.97}, "chosen": False}], **result,
    }  # fmt: skip
    gates = [edge["name"] for edge in fabric(mark=mark)["edges"] if not edge["fixed"]]
    lines = [json.dumps(line) for line in epochs(9 if finished else 5, gates)]
    (path / "options.json").write_text(json.dumps(options))
    (path / "metrics.jsonl").write_text("\n".join([*lines, '{"epoch": 9, "pha']))
    (path / "architecture.json").write_text(json.dumps(fabric(mark=mark)))
    if finished:
        (path / "result.json").write_text(json.dumps(outcome))
    return path


def slim(path: Path, **result: Any) -> Path:
    """A run folder of the network with gates on its channels."""
    run = folder(path, **result)
    (run / "architecture.json").write_text(json.dumps(gated()))
    (run / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in epochs(9, sorted(GATED))))
    return run


def figure(text: str, name: str) -> dict[str, Any]:
    """A figure of a page."""
    (source,) = re.findall(rf'data-for="run1-{name}">(.*?)</script>', text)
    return json.loads(source)


def page(path: Path) -> str:
    """The report without plotly's own code, each no-break space as a space."""
    text = path.read_text(encoding="utf-8")
    library = max(re.findall(r"<script>(.*?)</script>", text, re.DOTALL), key=len)
    assert text.count(library) == 1  # inlined once
    return text.replace(library, "").replace(SPACE, " ")


def change(path: Path, edit: str, to: Any) -> None:
    """Sets `a.0.b` in a JSON file to a value, or takes it out where that is `...`."""
    content = json.loads(path.read_text())
    *way, last = [int(key) if key.isdigit() else key for key in edit.split(".")]
    place = content
    for key in way:
        place = place[key]
    if to is ...:
        del place[last]
    else:
        place[last] = to
    path.write_text(json.dumps(content))


def test_headline_table_and_evidence_give_the_numbers_of_the_run(tmp_path):
    run = folder(tmp_path / "run")
    assert write(run) == run / "report.html"
    text = page(run / "report.html")
    assert (
        "<h1>This network uses 9.8 M of at most 10.2 M MACs (24 % of the full super network) "
        "and answers 98.6 % of the test images right.</h1>" in text
    )
    assert '<span class="badge kept">✓ budget kept</span>' in text
    for fact in (
        "≤ 10.2 M", "40.9 M", '<td class="n">3.9 %</td>', "✓ yes", "outputs differ by at most 1.4e-06", "1 h 3 min",
        "1.23 ms (10th to 90th percentile 1.1 to 1.5 ms) in onnxruntime, 1 thread, batch of 1", "120,000 parameters",
        "budgetnet 0.1.0, torch 2.13.0", "macs&lt;=25%", "2031-05-06T07:08:09+00:00", shape((16, 8, 8)),
    ):  # fmt: skip
        assert fact in text


@pytest.mark.parametrize("unit", ["layer", "gate", "step", "parameter"])
def test_units_of_what_is_counted_are_words_of_the_headline(tmp_path, unit):
    budget = {"cost": "own", "unit": unit, "limit": 14.3, "at_most": True, "value": 13.9, "met": True}
    text = page(write(folder(tmp_path / "run", budgets=[budget])))
    assert f"uses 13.9 of at most 14.3 {unit}s" in text


def test_every_edge_is_drawn_and_kept_but_unused_ones_look_dropped(tmp_path):
    text = page(write(folder(tmp_path / "run")))
    edges = fabric()["edges"]
    used = sum(edge["used"] for edge in edges)
    assert text.count('<g class="edge used">') == used == 8
    assert text.count('<g class="edge dropped">') == len(edges) - used == 6
    assert text.count("kept, but on no path from input to output") == 1
    assert "6 of 12 choices are in the network" in text
    assert text.count('<circle class="node') == 14
    assert text.count('<circle class="node used"') == 6
    centres = re.findall(r'cx="([^"]+)" cy="([^"]+)"', text)
    assert len(set(centres)) == 14  # the input has moved off the layer at its place
    paths = re.findall(r'class="line" d="([^"]+)"', text)
    assert len(set(paths)) == len(edges)  # parallel edges lie side by side


def test_drawn_widths_are_shares_of_the_macs(tmp_path):
    text = page(write(folder(tmp_path / "run")))
    widths = {float(width) for width in re.findall(r'class="line"[^>]* stroke-width="([^"]+)"', text)}
    assert len(widths) == 2  # the identities cost nothing, all other modules the same
    assert "20 % the widest" in text  # each of the five others


@pytest.mark.parametrize(("value", "met"), [(10.3e6, False), (10.3e6, True), (9e6, False)])
def test_a_budget_counts_as_kept_only_if_verdict_and_numbers_agree(tmp_path, value, met):
    budget = {"cost": "macs", "unit": "MAC", "limit": LIMIT, "at_most": True, "value": value, "met": met}
    text = page(write(folder(tmp_path / "run", budgets=[budget])))
    assert '<span class="badge broken">✗ budget not kept</span>' in text
    assert "✗ no" in text
    assert "✓" not in text


def test_a_target_may_be_passed_from_above(tmp_path):
    run = folder(tmp_path / "run")
    for key, value in (("at_most", False), ("value", 1.03e7), ("met", True)):
        change(run / "result.json", f"budgets.0.{key}", value)
    text = page(write(run))
    assert "uses 10.3 M of about 10.2 M MACs" in text
    assert "✓ budget kept" in text


def test_what_only_a_measurement_shows_is_beside_what_it_was_before(tmp_path):
    budget = {
        "cost": "latency",
        "unit": "ms",
        "limit": 2.0,
        "at_most": True,
        "value": 1.9,
        "met": True,
        "low": 1.8,
        "high": 1.95,
        "error": 0.031,
        "slowness": 1.2,
    }
    before = {
        "cost": "latency",
        "unit": "ms",
        "limit": 2.0,
        "smallest": 0.1,
        "bound": True,
        "expected": 3.1,
        "alike": 0.01,
        "full": 3.8,
    }
    run = folder(tmp_path / "run", budgets=[budget], before=[before])
    change(run / "options.json", "budgets.0", "latency<=2ms")
    text = page(write(run))
    assert "uses 1.9 of at most 2 ms (50 % of the full super network)" in text
    assert "Half of the predictions for networks that were not known before lay within 3.1 %." in text
    assert "2.28 ms was seen, on a machine 1.20 times as slow as when the search began." in text


def test_segmentation_is_told_in_mean_iou(tmp_path):
    text = page(write(folder(tmp_path / "run", test={"loss": 0.2, "accuracy": 0.931, "mean_iou": 0.712})))
    assert "labels the test images with a mean IoU of 71.2 %, 93.1 % of the pixels right." in text


def test_figures_hold_what_the_metrics_hold(tmp_path):
    text = page(write(folder(tmp_path / "run")))
    (source,) = re.findall(r'data-for="run1-dynamics">(.*?)</script>', text)
    figure = json.loads(source)
    curves = {line["name"]: line["y"] for line in figure["data"]}
    assert curves["training"] == [line["train"]["loss"] for line in epochs()]  # the cut line is left out
    assert curves["limit"] == [LIMIT] * 9
    assert curves["target now"] == [None] * 3 + [2 * LIMIT] * 3 + [None] * 3
    words = [note["text"] for note in figure["layout"]["annotations"]]
    assert words[-3:] == ["warm-up", "search", "fine-tune"]
    assert [(shape["x0"], shape["x1"]) for shape in figure["layout"]["shapes"]] == [(-0.5, 2.5), (2.5, 5.5), (5.5, 8.5)]


def test_texts_of_a_run_folder_stay_texts(tmp_path):
    mark = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'"
    run = folder(tmp_path / "run", mark=mark)
    text = page(write([run, folder(tmp_path / "<b>run", mark=mark)], tmp_path / "both.html"))
    assert "&lt;script&gt;alert(1)" in text
    for broken in ("<script>alert", "<img", "<b>run", "onerror=alert(1)>"):
        assert broken not in text
    assert len(re.findall("<script", text)) == len(re.findall("</script>", text)) == 11  # 9 figures, plotly, ours
    for source in re.findall(r'class="figure"[^>]*>(.*?)</script>', text):
        assert not set("<>&") & set(source)
        json.loads(source)


def test_the_page_asks_for_nothing_outside_itself(tmp_path):
    text = page(write(folder(tmp_path / "run")))
    assert "default-src 'none'" in text
    assert not re.search(r"https?://|<link|src=|@import|url\((?!#)", text)


def test_an_unfinished_run_shows_what_is_there(tmp_path):
    run = folder(tmp_path / "run", finished=False)
    text = page(write(run))
    assert (
        "This run is not finished: 5 epochs so far. The most probable architecture uses 10.5 M MACs, more than the "
        "10.2 M allowed, and answers 96.1 % of the validation images right." in text
    )
    assert "… not finished" in text
    assert "Most probable so far" in text
    assert "✓" not in text
    assert "✗" not in text
    for name in ("metrics.jsonl", "architecture.json"):
        (run / name).unlink()
    text = page(write(run))
    assert "This run has not finished an epoch yet." in text
    assert "<svg class=" not in text


def test_several_runs_are_compared_first(tmp_path):
    runs = [folder(tmp_path / "small", value=5e6, test={"accuracy": 0.95}), folder(tmp_path / "large")]
    runs += [folder(tmp_path / "worse", value=11e6, test={"accuracy": 0.94}), folder(tmp_path / "open", finished=False)]
    text = page(write(runs, tmp_path / "all.html"))
    assert "<h1>2 of 3 returned networks keep their budget; 1 not finished.</h1>" in text
    assert text.index('class="comparison"') < text.index('class="run" id="run1"') < text.index('class="run" id="run4"')
    front, points = comparison([Run.read(run) for run in runs], "macs", "MAC").data
    assert list(zip(front.x, front.y, strict=True)) == [(5e6, 0.95), (9.8e6, 0.986)]
    assert list(points.text) == ["small", "large", "worse"]


def test_a_report_of_several_runs_needs_a_place(tmp_path):
    run = folder(tmp_path / "run")
    assert write([run]) == run / "report.html"
    with pytest.raises(ConfigError, match=r"needs a file to write to \(out\), got none for 2 runs"):
        write([run, run])
    with pytest.raises(ConfigError, match="at least one run folder"):
        write([])
    with pytest.raises(FileError, match="cannot be written"):
        write(run, tmp_path / "no" / "such" / "report.html")


@pytest.mark.parametrize(
    ("file", "edit", "to", "says"),
    [
        ("options.json", "command", ..., 'options.json: "command" is missing'),
        ("options.json", "space.name", 3, 'options.json: "space.name" must be a text, got 3'),
        ("result.json", "budgets.0.limit", ..., 'result.json: "budgets[0].limit" is missing'),
        ("result.json", "budgets.0.met", 1, 'result.json: "budgets[0].met" must be true or false, got 1'),
        ("result.json", "budgets.0.value", 1e999, 'result.json: "budgets[0].value" must be a finite number, got inf'),
        ("result.json", "network.latency_ms.p90", ..., 'result.json: "network.latency_ms.p90" is missing'),
        ("result.json", "seconds", 10**400, 'result.json: "seconds" must be a finite number'),
        (
            "architecture.json",
            "edges.2.target",
            99,
            'architecture.json: "edges[2].target" must be a node, 0..13, got 99',
        ),
        ("architecture.json", "nodes.1.position", [0], '"nodes[1].position" must be 2 numbers, got 1'),
        ("architecture.json", "nodes.1.position", [0, 1e300], '"nodes[1].position" must lie within 100000'),
        ("architecture.json", "edges", {}, 'architecture.json: "edges" must be a list of objects, got {}'),
        ("architecture.json", "sites", ..., 'architecture.json: "sites" is missing'),
        ("architecture.json", "schedules", ..., 'architecture.json: "schedules" is missing'),
        ("architecture.json", "cuts", ..., 'architecture.json: "cuts" is missing'),
        ("result.json", "equivalence", ..., 'result.json: "equivalence" is missing'),
        ("result.json", "candidates", ..., 'result.json: "candidates" is missing'),
        ("result.json", "candidates.0.validation", 0.97, '"candidates[0].validation" must be an object, got 0.97'),
        ("architecture.json", "edges.2.probability", 1.5, '"edges[2].probability" must be a number in [0, 1], got 1.5'),
    ],
)
def test_a_broken_file_is_one_clear_line(tmp_path, file, edit, to, says):
    run = folder(tmp_path / "run")
    change(run / file, edit, to)
    with pytest.raises(FileError, match=re.escape(says)) as error:
        write(run)
    assert "\n" not in str(error.value)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"a": ', "[" * 100_000, "\x00\xff"])
def test_a_file_that_is_no_json_object_is_one_clear_line(tmp_path, content):
    run = folder(tmp_path / "run")
    (run / "result.json").write_text(content)
    with pytest.raises(FileError, match=r"result\.json must hold (a )?JSON"):
        write(run)


def test_a_run_without_its_folder_options_or_with_a_broken_line_is_refused(tmp_path):
    with pytest.raises(FileError, match="must be a run folder"):
        write(tmp_path / "none")
    run = folder(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().split("\n")
    (run / "metrics.jsonl").write_text("\n".join([lines[0], lines[1][:40], *lines[2:]]))
    with pytest.raises(FileError, match=r"metrics\.jsonl, line 2 must hold JSON"):
        write(run)
    (run / "metrics.jsonl").write_text("\n".join([lines[0].replace('"phase"', '"phrase"'), lines[1]]))
    with pytest.raises(FileError, match=r'metrics\.jsonl, line 1: "phase" is missing'):
        write(run)
    (run / "options.json").unlink()
    with pytest.raises(FileError, match=r"options\.json is missing"):
        write(run)


def test_an_edge_shows_how_many_of_its_channels_are_left(tmp_path):
    run = slim(tmp_path / "run")
    text = page(write(run))
    titles = re.findall(r'<g class="edge (\w+)"><title>(.*?)</title>', text, re.DOTALL)
    assert {title.split(" ")[0]: re.findall(r"\w+: \d+ of \d+ channels", title) for _, title in titles} == {
        "b0": [],
        "b1": ["inner: 16 of 64 channels", "output: 4 of 4 channels"],
        "b2": ["input: 2 of 4 channels", "inner: 8 of 8 channels"],
        "b3": ["inner: 0 of 16 channels"],  # its groups are kept, but it is not
    }
    drawn = {}
    for group in re.findall(r'<g class="edge used">(.*?)</g>', text, re.DOTALL):
        widths = dict(re.findall(r'class="(band|line)"[^>]* stroke-width="([^"]+)"', group))
        drawn[re.findall(r"<title>(\w+)", group)[0]] = widths
    assert drawn["b1"]["band"] == drawn["b2"]["band"]
    assert "band" not in drawn["b0"]
    for name, share in (("b1", 20 / 68), ("b2", 10 / 12)):
        assert float(drawn[name]["line"]) / float(drawn[name]["band"]) == pytest.approx(share, abs=1e-3)
    assert "those that are left, 30 of 96" in text


def joined(*chosen: str) -> Architecture:
    """x to a to b to y, and x to b beside it: an edge for each "START>END:KIND", used but to c and where it is gone."""
    names, shapes = "xabcy", {"x": [1, 4, 4], "a": [6, 2, 2], "b": [2, 2, 2], "c": [2, 2, 2], "y": [5]}
    nodes = [{"name": name, "position": [place, 0], "shape": shapes[name]} for place, name in enumerate(names)]
    edges = [
        {"name": edge, "source": names.index(edge[0]), "target": names.index(edge[2]), "kind": edge[4:],
         "fixed": True, "kept": True, "used": "c" not in edge[:3] and edge[4:] != "gone", "probability": None,
         "costs": {}}
        for edge in chosen
    ]  # fmt: skip
    record = {"nodes": nodes, "edges": edges, "sites": [], "schedules": [], "cuts": []}
    return Architecture.read(Record(record, "architecture.json"))


WAYS = ("x>a:conv", "x>b:conv", "a>b:conv", "a>b:identity", "a>c:conv", "b>y:conv", "x>y:gone")


@pytest.mark.parametrize(
    ("device", "cloud", "carried", "marks"),
    [
        ((), "aby", {"x": ["x>a:conv", "x>b:conv"]}, ["64 B", "same"]),
        (("x>a:conv",), "by", {"x": ["x>b:conv"], "a": ["a>b:conv", "a>b:identity"]}, ["64 B", "96 B"]),
        # what has been added up so far is sent, and a for what is still to come; two edges side by side are one way
        (("x>a:conv", "x>b:conv"), "by", {"b": ["x>b:conv"], "a": ["a>b:conv", "a>b:identity"]}, ["32 B", "96 B"]),
        (WAYS[:3], "by", {"b": ["x>b:conv", "a>b:conv"], "a": ["a>b:identity"]}, ["32 B", "same", "96 B"]),
        (WAYS[:4], "y", {"b": ["b>y:conv"]}, ["32 B"]),
        (WAYS, "", {}, ["20 B sent"]),
    ],
)
def test_what_crosses_a_cut_stands_on_the_edges_that_cross(
    device: Sequence[str], cloud: str, carried: dict[str, list[str]], marks: list[str]
):
    """Four bytes a number; a value that two edges carry over is sent once."""
    architecture = joined(*WAYS)
    found = crossing(architecture, device)
    assert {"xabcy"[node]: [WAYS[edge] for edge in edges] for node, edges in found.items()} == carried
    assert sides(architecture, device) == [None if name == "c" else name in cloud for name in "xabcy"]
    drawing = draw(architecture, device, ["y"])
    assert sorted(mark.text.replace(SPACE, " ") for mark in drawing.marks) == sorted(marks)
    assert sum(field.cloud for field in drawing.fields) == len(cloud)
    assert len(drawing.fields) == 4
    assert [label.text for label in drawing.labels if label.kind] == (["device", "cloud"] if cloud else ["device"])


def test_an_identity_sends_on_what_it_read():
    """The sum that has begun is then the value of a, which another edge carries over too."""
    architecture = joined("x>a:conv", "a>b:identity", "a>b:conv", "b>y:conv")
    assert crossing(architecture, ["x>a:conv", "a>b:identity"]) == {1: [2, 1]}


def test_bytes_that_do_not_add_up_are_not_told():
    """Where layers are narrowed a value is smaller than its layer; a single one is as large as all that is sent."""
    architecture, texts = joined(*WAYS), []
    for device, size in ((WAYS[:1], 160), (WAYS[:1], 100), (WAYS[:4], 32), (WAYS[:4], 16)):
        drawing = draw(architecture, device, ["a"], size)
        texts.append([mark.text.replace(SPACE, " ") for mark in drawing.marks])
    assert texts == [["64 B", "96 B"], ["sent", "sent"], ["32 B"], ["16 B"]]


def test_marks_keep_clear_of_each_other_and_of_dots():
    """Two edges that cross in the middle do not have their marks there."""
    crossed = fabric(width=2, depth=2)
    crossed["edges"] = [
        {**edge, "used": True, "kept": True, "name": f"{source}{target}", "source": source, "target": target}
        for source, target in [(0, 1), (1, 2), (1, 4), (2, 3), (3, 5), (4, 5)]
        for edge in crossed["edges"][:1]
    ]  # x to l0.s0 and from there to l0.s1 and, on a diagonal, to l1.s1; from l0.s1 on the other diagonal to l1.s0
    drawing = draw(Architecture.read(Record(crossed, "architecture.json")), ["01", "12"])
    assert len(drawing.marks) == 2
    boxes = [(mark.x, mark.y, mark.width, mark.height) for mark in drawing.marks]
    boxes += [(dot.x, dot.y, 6.0, 6.0) for dot in drawing.dots]
    for place, one in enumerate(boxes):
        for other in boxes[:place]:
            assert any(abs(one[i] - other[i]) >= (one[i + 2] + other[i + 2]) / 2 for i in (0, 1))


def test_the_page_shows_the_cut(tmp_path):
    run = folder(tmp_path / "run")
    assert not re.search(r'<rect class="(device|cloud)"|in the cloud', page(write(run)))
    content = json.loads((run / "architecture.json").read_text())
    device = [edge["name"] for edge in content["edges"] if edge["used"] and edge["target"] in (1, 4)]
    cut = {"cost": "transfer:5M", "size": 60000.0, "macs": 2.4e6, "device": device, "sent": ["l1.s0"]}
    change(run / "architecture.json", "cuts", [cut])
    text = page(write(run))
    assert (text.count('<rect class="device"'), text.count('<rect class="cloud"')) == (3, 3)
    (mark,) = re.findall(r'<g class="mark">.*?>([^<]+)</text>', text)
    assert mark == "60 KB"  # as it is one value, whatever its layer holds
    assert (text.count("runs on the device"), text.count("runs in the cloud")) == (3, 5)
    assert "For transfer:5M it is cut in two: the device runs 3 of its modules, 2.4 M MACs, and sends" in text
    assert "60,000 bytes" in text


def test_a_network_is_a_picture_of_its_own():
    """XML that needs no style sheet, whatever its title says."""
    drawing = draw(joined(*WAYS), WAYS[:1], ["x", "a"])
    root = ElementTree.fromstring(picture(drawing, "<b> & 'c'"))
    found = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert found[0] == "<b> & 'c'"
    assert {"device", "cloud", f"64{SPACE}B", "on the device"} < set(found)
    style = root.find("{http://www.w3.org/2000/svg}style")
    assert style is not None
    assert "var(" not in style.text
    plain = picture(draw(joined(*WAYS)), "no cut")
    assert "on the device" not in plain
    ElementTree.fromstring(plain)


def test_channels_left_are_listed_in_the_networks_order(tmp_path):
    text = page(write(slim(tmp_path / "run")))
    assert "30 of 96 channels at 5 places with gates are in the network (31.2 %)" in text
    (table,) = re.findall(r'<div class="channels">(.*?)</div>', text, re.DOTALL)
    assert re.findall(r'<th colspan="2">(\w+)</th>', table) == ["input", "inner", "output"]
    rows = re.findall(r"<tr( class=\"dropped\")?><td>(\w+)</td>(.*?)</tr>", table)
    assert [(name, bool(dropped)) for dropped, name, _ in rows] == [("b1", False), ("b2", False), ("b3", True)]
    cells = [re.findall(r"(\d+) of (\d+)|<td></td><td></td>", cells) for *_, cells in rows]
    assert cells == [
        [("", ""), ("16", "64"), ("4", "4")],
        [("2", "4"), ("8", "8"), ("", "")],
        [("", ""), ("0", "16"), ("", "")],
    ]
    bars = re.findall(r'class="all" style="width:([\d.]+)%"><i style="width:([\d.]+)%"', table)
    assert bars == [("100.0", "25.0"), ("100.0", "100.0"), ("100.0", "50.0"), ("12.5", "100.0"), ("25.0", "0.0")]


def test_sites_of_many_names_are_a_row_each(tmp_path):
    run = slim(tmp_path / "run")
    content = json.loads((run / "architecture.json").read_text())
    content["sites"] = [
        {"edge": edge, "name": f"s{place}", "channels": [4], "kept": [True], "probability": [None]}
        for edge in ("b0", "b1")
        for place in range(6)
    ]
    (run / "architecture.json").write_text(json.dumps(content))
    names = [f"{site['edge']}.{site['name']}" for site in content["sites"]]
    (run / "metrics.jsonl").write_text("\n".join(json.dumps(line) for line in epochs(9, [*names, "b2", "b3"])))
    text = page(write(run))
    assert re.findall(r"<tr><td>(b\d\.s\d)</td>", text) == names
    assert text.count("<thead><tr><th>Module</th><th colspan") == 2  # side by side
    assert "48 of 48 channels" in text


def test_probabilities_of_all_gates_are_counted_and_the_polarised_named(tmp_path):
    text = page(write(slim(tmp_path / "run")))
    bars = {bar["name"]: bar["y"] for bar in figure(text, "probabilities")["data"]}
    # 0.05 and 0.95 themselves, those of the edges, are not polarised; a group without a gate does not count
    assert {place: count for place, count in enumerate(bars["edges"]) if count} == {1: 1, 18: 1}
    assert {place: count for place, count in enumerate(bars["groups of channels"]) if count} == {
        0: 3, 6: 1, 10: 1, 14: 1, 18: 1, 19: 3,
    }  # fmt: skip
    assert "6 of 12 gates (50 %) are polarised: open with a probability below 0.05 or above 0.95" in text


def test_gates_that_sites_share_count_once(tmp_path):
    run = slim(tmp_path / "run")
    for site in (2, 4):  # both of two groups
        change(run / "architecture.json", f"sites.{site}.lock", "twins")
        change(run / "architecture.json", f"sites.{site}.probability", [0.99, 0.4])
    text = page(write(run))
    bars = {bar["name"]: bar["y"] for bar in figure(text, "probabilities")["data"]}
    assert sum(bars["groups of channels"]) == 8
    assert "5 of 10 gates (50 %) are polarised" in text


def test_gates_on_edges_alone_have_their_probabilities_shown_once_they_were_learned(tmp_path):
    run = folder(tmp_path / "run")
    text = page(write(run))
    (bars,) = figure(text, "probabilities")["data"]
    edges = [edge for edge in fabric()["edges"] if not edge["fixed"]]
    assert {place: count for place, count in enumerate(bars["y"]) if count} == {
        0: sum(edge["probability"] == 0.02 for edge in edges), 12: 1, 19: 6,
    }  # fmt: skip
    assert f"{len(edges) - 1} of {len(edges)} gates" in text
    never = [line | {"phase": "finetune" if line["phase"] == "search" else line["phase"]} for line in epochs(9)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, never)))
    text = page(write(run))
    assert "-probabilities" not in text
    assert "are polarised" not in text


def test_activation_over_the_epochs_is_what_the_metrics_say(tmp_path):
    text = page(write(slim(tmp_path / "run")))
    (cells,) = figure(text, "activation")["data"]
    lines = [line for line in epochs(9, sorted(GATED)) if line["activation"] is not None]
    assert cells["x"] == [line["epoch"] for line in lines] == [3, 4, 5]
    assert cells["y"] == GATED != sorted(GATED)
    assert cells["z"] == [[line["activation"][name] for line in lines] for name in GATED]
    assert (cells["zmin"], cells["zmax"]) == (0, 1)
    plain = figure(page(write(folder(tmp_path / "plain"))), "activation")["data"][0]
    assert len(plain["y"]) == 12
    assert plain["y"][0] == "l0.s0&gt;l1.s0:block"  # as text, not as markup


def test_what_the_report_takes_for_gated_is_what_a_search_records():
    """The names in architecture.json and in metrics.jsonl are made in different places."""
    network = resnet(depth=14, channels=4, in_channels=1, image_size=8, gates="both", where="ends", granularity=2)
    written = json.loads(json.dumps(describe(network, network.architecture("full"), [])))
    shape = Architecture.read(Record(written, "architecture.json"))
    sums = Sums(samples=2, opened=[1.0] * network.gate_count)
    recorded = Session.activation(SimpleNamespace(network=network, sums=sums))  # type: ignore[arg-type]
    assert sorted(shape.gated()) == sorted(recorded)
    assert [(site.edge, site.name, site.all) for site in shape.sites] == [
        (site.edge, site.name, sum(site.sizes)) for site in network.sites
    ]
    assert all(site.left == site.all for site in shape.sites)


def test_thresholds_show_the_curve_the_one_in_use_and_the_limit(tmp_path):
    text = page(write(slim(tmp_path / "run", inference=INFERENCE)))
    assert "This network uses on average 9.8 M of at most 10.2 M MACs" in text
    assert "A gate is open where its probability is above 0.625." in text
    assert "9.7 M MACs" in text
    drawn = figure(text, "thresholds")
    lines = [line for line in drawn["data"] if line["name"] != "in use"]
    assert [line["name"] for line in lines] == ["Accuracy", "macs (MAC)", "params"]
    assert all(line["x"] == [0.1, 0.5, 0.625, 0.9] for line in lines)
    assert [line["y"] for line in lines] == [
        [0.97, 0.98, 0.979, 0.5], [20e6, 12e6, VALUE, 2e6], [10, 10, None, 10],  # at 0.625 what result.json says
    ]  # fmt: skip
    used = [(line["x"], line["y"]) for line in drawn["data"] if line["name"] == "in use"]
    assert used == [([0.625], [0.979]), ([0.625], [VALUE]), ([0.625], [None])]
    limits = [shape["y0"] for shape in drawn["layout"]["shapes"] if shape["y0"] == shape["y1"]]
    assert limits == [LIMIT]


def test_the_time_beside_the_full_network_is_told_and_where_it_is_slower_what_to_do(tmp_path):
    text = page(write(slim(tmp_path / "run", inference=INFERENCE)))
    assert "0.84 in torch at batch 1, 1.02 in torch at batch 16, 1.21 in onnxruntime at batch 1" in text
    assert "It is slower than the full network without gates in onnxruntime at batch 1: `budgetnet export" in text
    faster = INFERENCE | {"beside_full": {"torch 1": 0.84}}
    assert "slower than" not in page(write(slim(tmp_path / "faster", inference=faster)))


def test_exits_are_a_table(tmp_path):
    text = page(write(slim(tmp_path / "run", inference=INFERENCE)))
    (table,) = re.findall(r'<table class="exits">(.*?)</table>', text, re.DOTALL)
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", table)[1:]]
    assert rows == [
        ["first", "25 %", "96.4 %", "81.2 %"],
        ["second", "0 %", MISSING, "90 %"],
        ["end", "75 %", "92.5 %", "94.2 %"],
    ]


def test_where_there_is_nothing_of_gates_nothing_is_shown(tmp_path):
    def shown(text: str) -> set[str]:
        plots = set(re.findall(r'data-for="run1-(\w+)"', text)) & {"activation", "probabilities", "thresholds"}
        return plots | set(re.findall(r'class="(channels|exits|band|scale)"', text))

    assert shown(page(write(folder(tmp_path / "plain")))) == {"activation", "scale", "probabilities"}
    everything = {"activation", "scale", "probabilities", "channels", "band"}
    assert shown(page(write(slim(tmp_path / "slim")))) == everything
    bare = INFERENCE | {"curve": INFERENCE["curve"][:1], "exits": []}
    assert shown(page(write(slim(tmp_path / "bare", inference=bare)))) == everything
    assert shown(page(write(slim(tmp_path / "full", inference=INFERENCE)))) == {*everything, "thresholds", "exits"}
    once = slim(tmp_path / "once")
    kept = [line | {"activation": line["activation"] if line["epoch"] == 3 else None} for line in epochs(9, GATED)]
    (once / "metrics.jsonl").write_text("\n".join(map(json.dumps, kept)))
    assert shown(page(write(once))) == everything - {"activation", "scale"}  # one epoch is no development
    none = slim(tmp_path / "none")
    for site in range(len(gated()["sites"])):
        groups = len(gated()["sites"][site]["channels"])
        change(none / "architecture.json", f"sites.{site}.probability", [None] * groups)
    for edge in (2, 3):
        change(none / "architecture.json", f"edges.{edge}.probability", None)
    assert "probabilities" not in shown(page(write(none)))


@pytest.mark.parametrize(
    ("edit", "to", "says"),
    [
        ("sites.0.edge", "b9", """"sites[0].edge" must be the name of an edge, got 'b9'"""),
        ("sites.0.name", 3, '"sites[0].name" must be a text, got 3'),
        ("sites.0.lock", 3, '"sites[0].lock" must be a text, got 3'),
        ("sites.1.name", "inner", """"sites[1].name" must be another one on 'b1', got 'inner' again"""),
        ("sites.0.channels", [], '"sites[0].channels" must be whole numbers >= 1, got []'),
        ("sites.0.channels.1", 0, '"sites[0].channels" must be whole numbers >= 1'),
        ("sites.0.channels.1", 1.5, '"sites[0].channels" must be whole numbers >= 1'),
        ("sites.0.kept", [True] * 3, '"sites[0].kept" must be 4 values, got 3'),
        ("sites.0.kept.2", 1, '"sites[0].kept" must be true or false, got 1'),
        ("sites.0.kept.0", False, """"sites[0].kept" must keep a channel of 'b1', which is used"""),
        ("sites.2.probability", [0.5], '"sites[2].probability" must be 2 values, got 1'),
        ("sites.2.probability.1", -0.1, '"sites[2].probability" must be a number in [0, 1], got -0.1'),
        ("sites.2.probability.1", float("nan"), '"sites[2].probability" must be a number in [0, 1], got nan'),
        ("sites.2.probability.1", "0.5", '"sites[2].probability" must be a number in [0, 1]'),
        ("sites.4", ..., "gated edges and sites of architecture.json, 'b3.inner' is in one and not in the other"),
        ("edges.2.fixed", True, "gated edges and sites of architecture.json, 'b2' is in one and not in the other"),
    ],
)
def test_broken_sites_are_one_clear_line(tmp_path, edit, to, says):
    run = slim(tmp_path / "run")
    change(run / "architecture.json", edit, to)
    with pytest.raises(FileError, match=re.escape(says)) as error:
        write(run)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("to", "says"),
    [
        (..., 'metrics.jsonl, line 4: "activation" is missing'),
        ([0.5], 'metrics.jsonl, line 4: "activation" must be an object, got [0.5]'),
        ({"b2": 1.01}, 'metrics.jsonl, line 4: "activation.b2" must be a number in [0, 1], got 1.01'),
        ({"b2": None}, 'metrics.jsonl, line 4: "activation.b2" must be a number in [0, 1], got None'),
        ({"b2": 0.5}, """metrics.jsonl, epoch 3: "activation" must name the gated edges and sites of"""),
    ],
)
def test_broken_activation_is_one_clear_line(tmp_path, to, says):
    run = slim(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().split("\n")
    line = json.loads(lines[3])
    line = line | {"activation": to} if to is not ... else {key: line[key] for key in line if key != "activation"}
    (run / "metrics.jsonl").write_text("\n".join([*lines[:3], json.dumps(line), *lines[4:]]))
    with pytest.raises(FileError, match=re.escape(says)) as error:
        write(run)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("edit", "to", "says"),
    [
        ("inference", [], '"inference" must be an object, got []'),
        ("inference.policy", ..., '"inference.policy" is missing'),
        ("inference.tau", 1.5, '"inference.tau" must be a number in [0, 1], got 1.5'),
        ("inference.curve", ..., '"inference.curve" is missing'),
        ("inference.curve.1.tau", -1, '"inference.curve[1].tau" must be a number in [0, 1], got -1'),
        ("inference.curve.1.accuracy", None, '"inference.curve[1].accuracy" must be a number in [0, 1], got None'),
        ("inference.curve.1.costs", 3, '"inference.curve[1].costs" must be an object, got 3'),
        ("inference.exits.0.share", 25, '"inference.exits[0].share" must be a number in [0, 1], got 25'),
        ("inference.exits.0.accuracy_chosen", 2, '"inference.exits[0].accuracy_chosen" must be a number in [0, 1]'),
        ("inference.exits.0.name", None, '"inference.exits[0].name" must be a text, got None'),
        ("inference.test_costs", 3, '"inference.test_costs" must be an object, got 3'),
        ("inference.beside_full", ..., '"inference.beside_full" is missing'),
    ],
)
def test_broken_inference_is_one_clear_line(tmp_path, edit, to, says):
    run = slim(tmp_path / "run", inference=INFERENCE)
    change(run / "result.json", edit, to)
    with pytest.raises(FileError, match=re.escape(f"result.json: {says}")) as error:
        write(run)
    assert "\n" not in str(error.value)


def test_numbers_are_told_apart_where_three_digits_do_not():
    assert si(9_818_112) == f"9.82{SPACE}M"
    assert si(999_999) == f"1{SPACE}M"
    assert si(0.25) == "0.25"
    assert apart(10_201_000, 10_200_000) == (f"10.201{SPACE}M", f"10.2{SPACE}M")
    assert [exact(value) for value in (12_345, 1_136_609.36, 0.25)] == ["12,345", "1,136,609", "0.25"]
    assert percent(0.99996) == f"99.996{SPACE}%"
    assert percent(1) == f"100{SPACE}%"
    assert duration(192.4) == f"3{SPACE}min{SPACE}12{SPACE}s"
