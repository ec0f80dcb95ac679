"""``penstock bench scheduler``: what a waiting policy costs a step of vLLM's scheduler, and a pick alone."""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from penstock.benchmarks import parts as parted
from penstock.benchmarks.flowkv_part import Options

PARTS = {
    "overhead": "penstock.benchmarks.scheduler_overhead",
    "picks": "penstock.benchmarks.scheduler_picks",
}
"""Modules with a ``measure(options, tell)``, in the order in which they run."""


@click.command("scheduler")
@click.option("--quick", is_flag=True, help="In small, under a minute on two cores.")
@click.option("--parts", help=f"Comma-separated, of {', '.join(PARTS)}.  [default: all]")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write rows and claims here.")
@click.option(
    "--plot",
    "plot_file",
    type=click.Path(path_type=Path),
    default=Path("scheduler.svg"),
    show_default=True,
    help="Plots; the part's name goes before the suffix.",
)
@click.option("--seed", default=0, show_default=True)
def bench(quick: bool, parts: str | None, json_file: Path | None, plot_file: Path, seed: int) -> None:
    """Measure vLLM's scheduler with each policy beside vLLM's own, in the same run.

    A claim that does not hold is shown as such; the exit status is 0 all the same, since this measures.
    """
    todo = parted.chosen(parts, list(PARTS), list(PARTS))
    parted.run(
        "scheduler",
        {part: PARTS[part] for part in todo},
        Options(quick=quick, seed=seed),
        parted.wide(Console()),
        json_file=json_file,
        plot_file=plot_file,
    )
