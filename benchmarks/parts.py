"""A bench that has parts: which of them run, and what is made of their findings."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path

import click
from rich.console import Console

from penstock.benchmarks.flowkv_part import Finding, Options
from penstock.benchmarks.narrator import Narrator
from penstock.benchmarks.processes import ServerError, termination_unwinds
from penstock.benchmarks.report import Cell, Claim, Environment, Report, write_plot

FILE_WIDTH = 220


def chosen(text: str | None, known: Sequence[str], default: Sequence[str]) -> list[str]:
    """The parts that ``--parts`` names, in the order of ``known``; ``default`` without it.

    Raises:
        click.BadParameter: there is no such part.
    """
    if text is None:
        return list(default)
    asked = [part.strip() for part in text.split(",") if part.strip()]
    if not asked or any(part not in known for part in asked):
        raise click.BadParameter(f"given {text!r}, allowed: {', '.join(known)}", param_hint="--parts")
    return [part for part in known if part in asked]


def run(
    bench: str,
    modules: Mapping[str, str],
    options: Options,
    console: Console,
    *,
    json_file: Path | None,
    plot_file: Path,
) -> None:
    """Measure and show each part of ``modules``, and write the report of all.

    A module has a ``measure(options, tell)``. Ends the process with status 1 if a server or the system fails.
    """
    environment = Environment.detect(options.seed)
    rows: list[dict[str, Cell]] = []
    claims: list[Claim] = []
    try:
        with termination_unwinds():
            for part, module in modules.items():
                found = _measured(f"{bench} {part}", module, options, Narrator(console))
                _show(console, bench, part, environment, found, plot_file)
                rows += [{"part": part, **row} for row in found.rows]
                claims += found.claims
    except (ServerError, OSError) as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    if json_file is not None:
        report = Report(bench=bench, environment=environment, rows=tuple(rows), claims=tuple(claims))
        report.write_json(json_file)
        console.print(f"wrote {json_file}")


def wide(console: Console) -> Console:
    """The console itself on a terminal; elsewhere one whose lines hold a table."""
    return console if console.is_terminal else Console(width=FILE_WIDTH)


def _measured(title: str, module: str, options: Options, narrator: Narrator) -> Finding:
    with narrator.step(title) as tell:
        found = import_module(module).measure(options, tell)
    assert isinstance(found, Finding)
    return found


def _show(
    console: Console, bench: str, part: str, environment: Environment, found: Finding, plot_file: Path
) -> None:
    report = Report(bench=bench, environment=environment, rows=tuple(found.rows), claims=tuple(found.claims))
    report.show(console, title=f"{bench} {part}")
    for note in found.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    if found.draw is not None:
        file = plot_file.with_name(f"{plot_file.stem}-{part}{plot_file.suffix}")
        console.print(f"wrote {write_plot(file, found.draw)}")
