"""``penstock bench shared-prefix``: decode steps that read a shared prefix once, beside stock's, on a CPU.

``kernel`` times one layer, ``served`` two real servers.
"""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from penstock.benchmarks import parts as parted
from penstock.benchmarks.flowkv_part import Options

MODULES = {
    "kernel": "penstock.benchmarks.shared_prefix_kernel",
    "served": "penstock.benchmarks.shared_prefix_served",
}
QUICK = ("kernel",)


@click.command("shared-prefix")
@click.option("--quick", is_flag=True, help="Few shapes of the kernel alone, under a minute.")
@click.option(
    "--parts", help=f"Of {', '.join(MODULES)}, separated by commas.  [default: all, kernel with --quick]"
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write rows and claims here.")
@click.option(
    "--plot",
    "plot_file",
    type=click.Path(path_type=Path),
    default=Path("shared-prefix.svg"),
    show_default=True,
    help="Plot; the part goes before the suffix.",
)
@click.option("--seed", default=0, show_default=True)
def bench(quick: bool, parts: str | None, json_file: Path | None, plot_file: Path, seed: int) -> None:
    """Time attention that reads a shared prefix once against stock's.

    A claim that does not hold is shown as such; the exit status is 0 all the same, since this measures.
    """
    names = parted.chosen(parts, tuple(MODULES), QUICK if quick else tuple(MODULES))
    modules = {name: MODULES[name] for name in names}
    options = Options(quick=quick, seed=seed)
    console = parted.wide(Console())
    parted.run("shared-prefix", modules, options, console, json_file=json_file, plot_file=plot_file)
