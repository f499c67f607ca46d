"""The report says what the run folder says, draws every edge, and stays one safe file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from budgetnet.errors import ConfigError, FileError
from budgetnet.report import write
from budgetnet.report.figures import comparison
from budgetnet.report.quantities import SPACE, apart, duration, percent, shape, si
from budgetnet.report.run import Run

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
    return {"space": {"name": "fabric", "options": {}}, "nodes": nodes, "edges": edges}


def epochs(count: int = 9) -> list[dict[str, Any]]:
    """Three epochs of each phase."""
    lines = []
    for epoch in range(count):
        phase = ("warmup", "search", "finetune")[min(epoch // 3, 2)]
        searching = phase == "search"
        cost = {"cost": "macs", "unit": "MAC", "limit": LIMIT, "target": 2 * LIMIT if searching else None,
                "sampled": 1.1e7 if searching else None, "mode": 1.05e7,
                "price": 1.3 if searching else None}  # fmt: skip
        lines.append(
            {"epoch": epoch, "phase": phase, "step": 12 * epoch, "images_seen": 1437 * (epoch + 1),
             "seconds": 3.2 * epoch, "learning_rate": 0.1, "train": {"loss": 2 / (1 + epoch), "accuracy": 0.9},
             "validation": {"loss": 0.4, "accuracy": 0.961} if epoch % 2 == 0 else None,
             "entropy": 0.3 if searching else None, "connected": 0.98 if searching else None, "budgets": [cost]}
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
        "space": "fabric", "data": "digits", "seed": 7, "images_seen": 12933, "seconds": 3805.0,
        "budgets": [{"cost": "macs", "unit": "MAC" + mark, "limit": LIMIT, "value": value, "met": value <= LIMIT}],
        "full": {"macs": FULL, "params": 750_000},
        "network": {"macs": value, "params": 120_000, "memory": 500_000,
                    "latency_ms": {"median": 1.234, "p10": 1.1, "p90": 1.5, "runtime": "onnxruntime" + mark,
                                   "threads": 1, "batch": 1}},
        "validation": {"accuracy": 0.979}, "test": {"accuracy": 0.986},
        "equivalence": {"extracted": 0.0, "onnx": 1.4e-6, "pt2": 4.8e-7},
        "candidates": [{"costs": {"macs": value}, "validation": {"accuracy": 0.979}, "chosen": True},
                       {"costs": {"macs": 9e6}, "validation": {"accuracy": 0.97}, "chosen": False}], **result,
    }  # fmt: skip
    lines = [json.dumps(line) for line in epochs(9 if finished else 5)]
    (path / "options.json").write_text(json.dumps(options))
    (path / "metrics.jsonl").write_text("\n".join([*lines, '{"epoch": 9, "pha']))
    (path / "architecture.json").write_text(json.dumps(fabric(mark=mark)))
    if finished:
        (path / "result.json").write_text(json.dumps(outcome))
    return path


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
    budget = {"cost": "macs", "unit": "MAC", "limit": LIMIT, "value": value, "met": met}
    text = page(write(folder(tmp_path / "run", budgets=[budget])))
    assert '<span class="badge broken">✗ budget not kept</span>' in text
    assert "✗ no" in text
    assert "✓" not in text


def test_a_target_may_be_passed_from_above(tmp_path):
    run = folder(tmp_path / "run")
    change(run / "options.json", "budgets.0", "macs~=25%")
    change(
        run / "result.json", "budgets.0", {"cost": "macs", "unit": "MAC", "limit": LIMIT, "value": 1.03e7, "met": True}
    )
    text = page(write(run))
    assert "uses 10.3 M of about 10.2 M MACs" in text
    assert "✓ budget kept" in text


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
    assert len(re.findall("<script", text)) == len(re.findall("</script>", text)) == 7  # 5 figures, plotly, ours
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


def test_numbers_are_told_apart_where_three_digits_do_not():
    assert si(9_818_112) == f"9.82{SPACE}M"
    assert si(999_999) == f"1{SPACE}M"
    assert si(0.25) == "0.25"
    assert apart(10_201_000, 10_200_000) == (f"10.201{SPACE}M", f"10.2{SPACE}M")
    assert percent(0.99996) == f"99.996{SPACE}%"
    assert percent(1) == f"100{SPACE}%"
    assert duration(192.4) == f"3{SPACE}min{SPACE}12{SPACE}s"
