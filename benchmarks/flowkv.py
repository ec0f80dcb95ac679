"""``penstock bench flowkv``: block pools, transfers, digests, real servers, and the price of being off."""

from __future__ import annotations

import os
from pathlib import Path

import click
from rich.console import Console

from penstock.benchmarks import parts as parted
from penstock.benchmarks.flowkv_part import Options

PARTS = {
    "pool": "penstock.benchmarks.flowkv_pool",
    "transfer": "penstock.benchmarks.flowkv_transfer",
    "digest": "penstock.benchmarks.flowkv_digest",
    "serving": "penstock.benchmarks.flowkv_serving",
    "off": "penstock.benchmarks.flowkv_off",
}
"""Modules with a ``measure(options, tell)``, in the order in which they run."""
WITH_SERVERS = ("serving", "off")


def chosen(text: str | None, *, quick: bool) -> list[str]:
    """The parts that ``--parts`` names, in running order; all of them, or without servers if ``quick``.

    Raises:
        click.BadParameter: there is no such part.
    """
    default = [part for part in PARTS if not (quick and part in WITH_SERVERS)]
    return parted.chosen(text, list(PARTS), default)


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
    console = parted.wide(Console())
    options = Options(quick=quick, trace=trace, seed=seed, seeds=seeds)
    todo = chosen(parts, quick=quick)
    modules = {part: PARTS[part] for part in todo}
    parted.run("flowkv", modules, options, console, json_file=json_file, plot_file=plot_file)
    left_out = [part for part in WITH_SERVERS if quick and part not in todo]
    if left_out:
        console.print(f"not measured with --quick: {', '.join(left_out)} (--parts {','.join(left_out)})")
