from __future__ import annotations

import importlib.util
import sys
import types

import click
from click.testing import CliRunner

from penstock.benchmarks import cli


def test_the_list_imports_no_bench_and_an_unknown_one_is_an_error(monkeypatch):
    monkeypatch.setattr(cli, "BENCHES", {"fast": "no_such_module:bench"})
    runner = CliRunner()
    assert cli.bench.list_commands(click.Context(cli.bench)) == ["fast"]
    unknown = runner.invoke(cli.bench, ["slow"])
    assert unknown.exit_code == 2
    assert "slow" in unknown.output


def test_a_bench_is_found_by_its_name(monkeypatch):
    fake = types.ModuleType("fake_bench")
    fake.bench = click.Command("fast", callback=lambda: click.echo("measured"))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fake_bench", fake)
    monkeypatch.setattr(cli, "BENCHES", {"fast": "fake_bench:bench"})
    assert CliRunner().invoke(cli.bench, ["fast"]).output == "measured\n"


def test_every_listed_bench_exists():
    for target in cli.BENCHES.values():
        assert importlib.util.find_spec(target.partition(":")[0]) is not None
