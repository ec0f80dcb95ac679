"""The ``penstock`` command. Sub-commands are imported when they run, so that none needs another's extras."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import click


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a sub-command lives, and what installs the packages it needs."""

    target: str
    extra: str
    summary: str


COMMANDS = {
    "bench": Entry("penstock.benchmarks.cli:bench", "bench", "Measure a feature beside its peers."),
    "demo": Entry(
        "penstock.benchmarks.demo:demo", "bench", "Prefill and decode servers side by side, checked."
    ),
    "doctor": Entry(
        "penstock.plugins.doctor:doctor", "", "Say what works with the installed engine, and why."
    ),
    "profile": Entry("penstock.plugins.profile:profile", "", "Measure what a step costs on this engine."),
    "proxy": Entry(
        "penstock.routers.cli:proxy", "proxy", "Send requests through prefill and decode servers."
    ),
}


class LazyGroup(click.Group):
    """A group whose commands are named up front and imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = COMMANDS.get(cmd_name)
        return None if entry is None else load(cmd_name, entry)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name].summary) for name in self.list_commands(ctx)])


def load(name: str, entry: Entry) -> click.Command:
    """Import a sub-command.

    Raises:
        click.ClickException: a package that it needs is not installed.
    """
    module, _, attribute = entry.target.partition(":")
    try:
        command = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        hint = f"; pip install 'penstock[{entry.extra}]'" if entry.extra else ""
        raise click.ClickException(f"penstock {name} needs the package {error.name}{hint}") from None
    assert isinstance(command, click.Command)
    return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="penstock")
def main() -> None:
    """Plugins for stock vLLM and stock SGLang."""
