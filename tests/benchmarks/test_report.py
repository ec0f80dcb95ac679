from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from penstock.benchmarks.report import Claim, Environment, Report, format_cell, write_plot


@pytest.fixture
def report() -> Report:
    return Report(
        bench="flow",
        environment=Environment.detect(seed=7),
        rows=({"setup": "stock", "runs": 102, "ms": 1.5}, {"setup": "ours", "runs": 2, "equal": True}),
        claims=(Claim.of("median runs", 2, "<=", 2), Claim.of("cut", 3.0, ">=", 20)),
    )


@pytest.mark.parametrize(
    ("value", "relation", "bound", "holds"),
    [
        (2, "<=", 2, True),
        (2.1, "<=", 2, False),
        (20, ">=", 20, True),
        (19.9, ">=", 20, False),
        (16, "==", 16, True),
        (15, "==", 16, False),
        (float("nan"), "<=", 1, False),
        (float("nan"), ">=", 1, False),
    ],
)
def test_a_claim_holds_exactly_when_the_value_meets_its_bound(value, relation, bound, holds):
    claim = Claim.of("c", value, relation, bound)
    assert claim.holds is holds
    assert claim.target == f"{relation} {bound}"


def test_one_broken_claim_breaks_the_report(report):
    assert not report.holds
    assert Report(bench="b", environment=report.environment, rows=()).holds


def test_json_has_the_promised_keys(report, tmp_path):
    file = tmp_path / "results" / "flow.json"
    report.write_json(file)
    written = json.loads(file.read_text())
    assert list(written) == ["bench", "environment", "rows", "claims"]
    assert written["rows"][0] == {"setup": "stock", "runs": 102, "ms": 1.5}
    assert written["claims"][1] == {"name": "cut", "value": 3.0, "target": ">= 20", "holds": False}
    assert {"penstock", "engine", "torch", "nixl", "python", "cpu", "cores", "seed"} <= set(
        written["environment"]
    )
    assert written["environment"]["seed"] == 7
    assert written["environment"]["cores"] >= 1


@pytest.mark.parametrize("across", [None, "setup"])
def test_the_table_shows_every_row_and_claim(report, across):
    text = io.StringIO()
    report.show(Console(file=text, width=200), across=across)
    shown = text.getvalue()
    for piece in ("stock", "ours", "102", "1.5", "median runs", "<= 2", "cut", ">= 20", "seed 7"):
        assert piece in shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "-"),
        (True, "yes"),
        (False, "no"),
        (1234567, "1,234,567"),
        (0.012345, "0.0123"),
        (1234.5, "1,234"),
        ("text", "text"),
    ],
)
def test_cells(value, shown):
    assert format_cell(value) == shown


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_plot_becomes_a_file_and_equal_figures_equal_files(tmp_path, suffix):
    pytest.importorskip("matplotlib", reason="comes with the bench extra")
    files = [write_plot(tmp_path / f"{name}.{suffix}", lambda axes: axes.plot([1, 4, 9])) for name in "ab"]
    assert files[0].stat().st_size > 1000
    assert files[0].read_bytes() == files[1].read_bytes()
