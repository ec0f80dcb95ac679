"""The ``penstock`` command: sub-commands are lazy, and say what to install."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from penstock.plugins import cli


def test_help_lists_every_command_and_imports_none():
    code = (
        "import sys; from penstock.plugins.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'vllm', 'aiohttp', 'matplotlib', 'openai', 'msgspec'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, entry in cli.COMMANDS.items():
        assert name in done.stdout
        assert entry.summary in done.stdout


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_each_command_exists_and_explains_itself(name):
    pytest.importorskip("aiohttp")
    result = CliRunner().invoke(cli.main, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert isinstance(cli.load(name, cli.COMMANDS[name]), click.Command)


def test_missing_extra_is_one_line_that_says_what_to_install(monkeypatch):
    monkeypatch.setitem(cli.COMMANDS, "proxy", cli.Entry("penstock_no_such_package:proxy", "proxy", ""))
    result = CliRunner().invoke(cli.main, ["proxy"])
    assert result.exit_code == 1
    assert result.output == (
        "Error: penstock proxy needs the package penstock_no_such_package; pip install 'penstock[proxy]'\n"
    )


def test_unknown_command_is_refused():
    assert CliRunner().invoke(cli.main, ["talk"]).exit_code == 2
