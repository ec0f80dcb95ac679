"""``penstock bench needle``: what the trained needle answers with dense attention, and what sparse attention
costs it.
"""

from __future__ import annotations

from pathlib import Path

import click
from rich.console import Console

from penstock.benchmarks import parts as parted

PARTS = {
    "dense": "penstock.benchmarks.needle.dense",
    "peers": "penstock.benchmarks.needle.peers",
    "served": "penstock.benchmarks.needle.served",
}
"""Modules with a ``measure(options, tell)``, in the order in which they run."""
QUICK = ("peers",)
QUICK_PROMPTS = 4


@click.command("needle")
@click.option("--quick", is_flag=True, help="Part peers at 4k tokens, under a minute on two cores.")
@click.option("--parts", help=f"Comma-separated, of {', '.join(PARTS)}.  [default: all]")
@click.option(
    "--prompts", type=click.IntRange(1), help="Of each task and length.  [default: 16, 4 with --quick]"
)
@click.option(
    "--tokens",
    "lengths",
    type=click.IntRange(2048, 32_000),
    multiple=True,
    help="Of a prompt; may be given more than once.  [default: 4096, 8192 and 16384; 4096 with --quick]",
)
@click.option(
    "--model",
    "folder",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A checkpoint that was trained here; default: the shipped one.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write rows and claims here.")
@click.option(
    "--plot",
    "plot_file",
    type=click.Path(path_type=Path),
    default=Path("needle.svg"),
    show_default=True,
    help="Plots; the part's name goes before the suffix.",
)
@click.option("--seed", default=0, show_default=True)
def bench(
    quick: bool,
    parts: str | None,
    prompts: int | None,
    lengths: tuple[int, ...],
    folder: Path | None,
    json_file: Path | None,
    plot_file: Path,
    seed: int,
) -> None:
    """Measure the needle's answers through transformers, through vLLM, and with sparse attention.

    A claim that does not hold is shown as such; the exit status is 0 all the same, since this measures.
    """
    from penstock.benchmarks.needle.part import LENGTHS, PROMPTS, NeedleOptions

    todo = parted.chosen(parts, list(PARTS), QUICK if quick else list(PARTS))
    parted.run(
        "needle",
        {part: PARTS[part] for part in todo},
        NeedleOptions(
            quick=quick,
            seed=seed,
            prompts=prompts or (QUICK_PROMPTS if quick else PROMPTS),
            lengths=lengths or (LENGTHS[:1] if quick else LENGTHS),
            folder=folder,
        ),
        parted.wide(Console()),
        json_file=json_file,
        plot_file=plot_file,
    )
