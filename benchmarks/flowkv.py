"""``penstock bench flowkv``: block pools, transfers, digests, real servers, and the price of being off."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path

import click
from rich.console import Console

from penstock.benchmarks.flowkv_part import Finding, Options
from penstock.benchmarks.narrator import Narrator
from penstock.benchmarks.processes import ServerError, termination_unwinds
from penstock.benchmarks.report import Cell, Claim, Environment, Report, write_plot

PARTS = {
    "pool": "penstock.benchmarks.flowkv_pool",
    "transfer": "penstock.benchmarks.flowkv_transfer",
    "digest": "penstock.benchmarks.flowkv_digest",
    "serving": "penstock.benchmarks.flowkv_serving",
    "off": "penstock.benchmarks.flowkv_off",
}
"""Modules with a ``measure(options, tell)``, in the order in which they run."""
WITH_SERVERS = ("serving", "off")
FILE_WIDTH = 220


def chosen(text: str | None, *, quick: bool) -> list[str]:
    """The parts that ``--parts`` names, in running order; all of them, or without servers if ``quick``.

    Raises:
        click.BadParameter: there is no such part.
    """
    if text is None:
        return [part for part in PARTS if not (quick and part in WITH_SERVERS)]
    asked = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [part for part in asked if part not in PARTS]
    if unknown or not asked:
        raise click.BadParameter(f"given {text!r}, allowed: {', '.join(PARTS)}", param_hint="--parts")
    return [part for part in PARTS if part in asked]


@click.command("flowkv")
@click.option("--quick", is_flag=True, help="In small, about a minute on two cores, without servers.")
@click.option("--parts", help=f"Comma-separated, of {', '.join(PARTS)}.  [default: all]")
@click.option(
    "--trace",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Replay a Mooncake trace instead of generated requests.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write rows and claims here.")
@click.option(
    "--plot",
    "plot_file",
    type=click.Path(path_type=Path),
    default=Path("flowkv.svg"),
    show_default=True,
    help="Plots; the part's name goes before the suffix.",
)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    help="Seeds for the pools; hit rates need about 24.  [default: 3, with --quick 1]",
)
def bench(
    quick: bool,
    parts: str | None,
    trace: Path | None,
    json_file: Path | None,
    plot_file: Path,
    seed: int,
    seeds: int | None,
) -> None:
    """Measure FlowKV beside vLLM's own NixlConnector, in the same run.

    A claim that does not hold is shown as such; the exit status is 0 all the same, since this measures.
    """
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    console = wide(Console())
    options = Options(quick=quick, trace=trace, seed=seed, seeds=seeds)
    environment = Environment.detect(seed)
    rows: list[dict[str, Cell]] = []
    claims: list[Claim] = []
    todo = chosen(parts, quick=quick)
    try:
        with termination_unwinds():
            for part in todo:
                found = _measured(part, options, Narrator(console))
                _show(console, part, environment, found, plot_file)
                rows += [{"part": part, **row} for row in found.rows]
                claims += found.claims
    except (ServerError, OSError) as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    left_out = [part for part in WITH_SERVERS if quick and part not in todo]
    if left_out:
        console.print(f"not measured with --quick: {', '.join(left_out)} (--parts {','.join(left_out)})")
    if json_file is not None:
        report = Report(bench="flowkv", environment=environment, rows=tuple(rows), claims=tuple(claims))
        report.write_json(json_file)
        console.print(f"wrote {json_file}")


def wide(console: Console) -> Console:
    """The console itself on a terminal; elsewhere one whose lines hold a table."""
    return console if console.is_terminal else Console(width=FILE_WIDTH)


def _measured(part: str, options: Options, narrator: Narrator) -> Finding:
    with narrator.step(f"flowkv {part}") as tell:
        found = import_module(PARTS[part]).measure(options, tell)
    assert isinstance(found, Finding)
    return found


def _show(console: Console, part: str, environment: Environment, found: Finding, plot_file: Path) -> None:
    report = Report(
        bench="flowkv", environment=environment, rows=tuple(found.rows), claims=tuple(found.claims)
    )
    report.show(console, title=f"flowkv {part}")
    for note in found.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)
    if found.draw is not None:
        file = plot_file.with_name(f"{plot_file.stem}-{part}{plot_file.suffix}")
        console.print(f"wrote {write_plot(file, found.draw)}")
