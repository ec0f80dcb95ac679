"""``penstock bench sglang-flowkv``: what a request's KV cache takes to move between two SGLang servers."""

from __future__ import annotations

import os
from pathlib import Path

import click
from rich.console import Console

from penstock.benchmarks import parts as parted
from penstock.benchmarks.flowkv_part import Options
from penstock.plugins.sglang.installation import installed_version

PARTS = {
    "pages": "penstock.benchmarks.sglang_pages",
    "prefixes": "penstock.benchmarks.sglang_prefixes",
    "transfer": "penstock.benchmarks.sglang_transfer",
}
"""Modules with a ``measure(options, tell)``, in the order in which they run."""


@click.command("sglang-flowkv")
@click.option("--quick", is_flag=True, help="In small, within a minute on two cores.")
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
    default=Path("sglang-flowkv.svg"),
    show_default=True,
    help="Plots; the part's name goes before the suffix.",
)
@click.option("--seed", default=0, show_default=True)
@click.option("--seeds", type=click.IntRange(min=1), help="Seeds of the pools.  [default: 3, with --quick 1]")
def bench(
    quick: bool,
    parts: str | None,
    trace: Path | None,
    json_file: Path | None,
    plot_file: Path,
    seed: int,
    seeds: int | None,
) -> None:
    """Measure FlowKV beside SGLang's own transfer backends, with SGLang's own allocators and no engine.

    Runs in an environment with SGLang (make env-sglang). A claim that does not hold is shown as such; the
    exit status is 0 all the same, since this measures.
    """
    if installed_version() is None:
        raise click.ClickException("SGLang is not installed here: make env-sglang, or pip install sglang")
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    options = Options(quick=quick, trace=trace, seed=seed, seeds=seeds)
    modules = {part: PARTS[part] for part in parted.chosen(parts, list(PARTS), list(PARTS))}
    parted.run(
        "sglang-flowkv",
        modules,
        options,
        parted.wide(Console()),
        json_file=json_file,
        plot_file=plot_file,
    )
