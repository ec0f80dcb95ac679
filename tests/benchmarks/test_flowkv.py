"""The FlowKV bench: which parts run, and what is made of their measurements."""

from __future__ import annotations

import json

import click
import pytest
from click.testing import CliRunner

from penstock.benchmarks import flowkv, parts
from penstock.benchmarks.flowkv_part import Finding, percentile
from penstock.benchmarks.report import Claim


def test_all_parts_by_default_and_none_that_starts_servers_when_quick():
    assert flowkv.chosen(None, quick=False) == list(flowkv.PARTS)
    assert flowkv.chosen(None, quick=True) == ["pool", "transfer", "digest"]


def test_parts_run_in_their_own_order_whatever_the_order_asked():
    assert flowkv.chosen("off, digest", quick=True) == ["digest", "off"]


@pytest.mark.parametrize("text", ["", "pools", "pool,nothing"])
def test_an_unknown_part_is_refused_with_the_known_ones(text):
    with pytest.raises(click.BadParameter, match="pool, transfer, digest, serving, off"):
        flowkv.chosen(text, quick=False)


def test_the_report_has_the_rows_of_every_part_and_all_claims(monkeypatch, tmp_path):
    asked = []

    class Module:
        @staticmethod
        def measure(options, tell):
            asked.append(options)
            claim = Claim.of("it is small", 1.0, "<=", 2.0)
            return Finding(rows=[{"case": "a", "x": 1}], claims=[claim], draw=lambda axes: axes.plot([1, 2]))

    monkeypatch.setattr(parts, "import_module", lambda name: Module)
    report, plot = tmp_path / "r.json", tmp_path / "p.svg"
    arguments = ["--parts", "pool,digest", "--seed", "7", "--json", str(report), "--plot", str(plot)]
    result = CliRunner().invoke(flowkv.bench, arguments)
    assert result.exit_code == 0, result.output
    written = json.loads(report.read_text())
    assert written["bench"] == "flowkv"
    assert written["environment"]["seed"] == 7
    assert [row["part"] for row in written["rows"]] == ["pool", "digest"]
    assert [claim["holds"] for claim in written["claims"]] == [True, True]
    assert {o.seed for o in asked} == {7}
    assert {f.name for f in tmp_path.iterdir()} == {"r.json", "p-pool.svg", "p-digest.svg"}


def test_a_quick_run_says_what_it_leaves_out(monkeypatch, tmp_path):
    class Module:
        @staticmethod
        def measure(options, tell):
            return Finding(rows=[{"x": 1}])

    monkeypatch.setattr(parts, "import_module", lambda name: Module)
    result = CliRunner().invoke(flowkv.bench, ["--quick"])
    assert "not measured with --quick: serving, off" in result.output


@pytest.mark.parametrize(("share", "value"), [(0.0, 1), (0.5, 3), (0.99, 5), (1.0, 5)])
def test_percentile(share, value):
    assert percentile([5, 3, 1, 2, 4], share) == value
