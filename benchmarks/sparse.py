"""``penstock bench sparse``: the attention mass that selectors attain, by the tokens that they read.

Every selector sees the same queries and keys: made up at three levels of peakiness, those of the trained
needle, or captured from another model. Margins are learned on layers or prompts that are not scored. Nothing
here is timed: this is about accuracy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import torch
from rich.console import Console

from penstock.benchmarks.narrator import Narrator
from penstock.benchmarks.parts import wide
from penstock.benchmarks.report import Environment, Report, rows_table, write_plot
from penstock.benchmarks.sparse_claims import Rows, budget_rows, claims, curve_rows, promise_rows
from penstock.benchmarks.sparse_keys import LEVELS, Layer, load_captured, made_up
from penstock.benchmarks.sparse_run import contenders, run_case
from penstock.kernels.sparse.config import SparseConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SHOWN = ("oracle", "hybrid", "hybrid, pages of 16", "tactic", "pruner", "quest")
SCORED_FROM = 700
NEEDLE = "needle"
NEEDLE_SEED = 90_000
"""Seeds of the needle's prompts begin here, apart from those that its accuracy is measured with."""
Sets = Iterator[tuple[str, list[Layer], list[Layer]]]


@click.command("sparse")
@click.option("--quick", is_flag=True, help="In small, under a minute on two cores.")
@click.option(
    "--captured",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Layers of a model, as benchmarks/sparse_keys.py saves them, alone.",
)
@click.option(
    "--keys",
    type=click.Choice([*LEVELS, NEEDLE]),
    multiple=True,
    help="May be given more than once.  [default: all]",
)
@click.option("--tokens", type=click.IntRange(1024), help="Of a layer.  [default: 8192, 4096 with --quick]")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write rows and claims here.")
@click.option(
    "--plot",
    "plot_file",
    type=click.Path(path_type=Path),
    default=Path("sparse.svg"),
    show_default=True,
    help="Plots; the keys they are of go before the suffix.",
)
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="cuda times decode attention on a GPU instead.",
)
@click.option("--mass", default=0.9, show_default=True, help="P, of what is timed on a GPU.")
@click.option("--seed", default=0, show_default=True)
def bench(
    quick: bool,
    captured: Path | None,
    keys: tuple[str, ...],
    tokens: int | None,
    json_file: Path | None,
    plot_file: Path,
    device: str,
    mass: float,
    seed: int,
) -> None:
    """Measure sparse attention beside Quest, Tactic, a pruner and exact top-p.

    A claim that does not hold is shown as such; the exit status is 0 all the same, since this measures.
    """
    if device == "cuda":
        _on_gpu(mass, seed, json_file, quick=quick)
        return
    if captured is None:
        length = tokens or (4096 if quick else 8192)
        levels = [level for level in LEVELS if level in keys or not keys]
        sets = _made_up(levels, length, seed, quick=quick)
        if NEEDLE in keys or not keys:
            sets = chain(sets, _needle(length, seed, quick=quick))
    else:
        sets = _captured(captured)
    console = wide(Console())
    config = SparseConfig()
    entries = contenders(config)
    promised: Rows = []
    curves: Rows = []
    budgets: Rows = []
    with Narrator(console).step("sparse") as tell:
        for name, calibrating, scored in sets:
            case = run_case(name, config, calibrating, scored, tell)
            promised += promise_rows(case, entries)
            curves += curve_rows(case, entries)
            budgets += budget_rows(case, entries)
    environment, found = Environment.detect(seed), tuple(claims(promised, budgets))
    console.print(rows_table(promised), rows_table(budgets))
    Report(bench="sparse", environment=environment, rows=(), claims=found).show(console)
    for name in dict.fromkeys(str(row["keys"]) for row in curves):
        file = plot_file.with_name(f"{plot_file.stem}-{name}{plot_file.suffix}")
        console.print(f"wrote {write_plot(file, partial(draw, rows=curves, keys=name))}")
    if json_file is not None:
        parts = {"promise": promised, "same budget": budgets, "curve": curves}
        rows = tuple({"part": part, **row} for part, found_rows in parts.items() for row in found_rows)
        Report(bench="sparse", environment=environment, rows=rows, claims=found).write_json(json_file)
        console.print(f"wrote {json_file}")


def _on_gpu(mass: float, seed: int, json_file: Path | None, *, quick: bool) -> None:
    if not torch.cuda.is_available():
        told = f"given cuda, but torch {torch.__version__} sees no CUDA device here"
        raise click.BadParameter(told, param_hint="--device")
    from penstock.benchmarks.sparse_device import measure

    console = wide(Console())
    with Narrator(console).step("sparse on a GPU") as tell:
        tell(torch.cuda.get_device_name())
        rows, found = measure(mass, seed, tell, quick=quick)
    console.print(rows_table(rows))
    report = Report(
        bench="sparse", environment=Environment.detect(seed), rows=tuple(rows), claims=tuple(found)
    )
    report.show(console)
    if json_file is not None:
        report.write_json(json_file)
        console.print(f"wrote {json_file}")


def _made_up(levels: Sequence[str], tokens: int, seed: int, *, quick: bool) -> Sets:
    layers, steps = (1, 5) if quick else (2, 8)
    for level in levels:
        make = partial(made_up, level, tokens=tokens, steps=steps)
        first = 1000 * seed
        yield (
            level,
            [make(seed=first + number) for number in range(layers)],
            [make(seed=first + SCORED_FROM + number) for number in range(layers)],
        )


def _needle(tokens: int, seed: int, *, quick: bool) -> Sets:
    from penstock.benchmarks.needle.captured import needle_layers
    from penstock.benchmarks.needle.checkpoint import load
    from penstock.benchmarks.needle.task import TASKS

    tasks = ("multikey", "crowded") if quick else TASKS
    first = NEEDLE_SEED + 1000 * seed
    model = load()
    learned, scored = (needle_layers(model, tasks, tokens, [at]) for at in (first, first + SCORED_FROM))
    for calibrating, others in zip(learned, scored, strict=True):
        yield calibrating[0].name, calibrating, others


def _captured(file: Path) -> Sets:
    try:
        layers = load_captured(file)
    except (ValueError, OSError) as error:
        raise click.BadParameter(str(error), param_hint="--captured") from error
    for layer in layers:
        first, second = layer.halves()
        yield layer.name, [first], [second]


def draw(axes: Axes, rows: Sequence[Mapping[str, Any]], keys: str) -> None:
    """Mass that nine of ten query heads and steps have at least, by budget."""
    for name in SHOWN:
        points = [row for row in rows if row["keys"] == keys and row["selector"] == name]
        axes.plot(
            [row["tokens"] for row in points],
            [row["mass P10"] for row in points],
            marker="o",
            markersize=3,
            label=name,
        )
    axes.set_xscale("log")
    axes.set_xlabel("share of the tokens read, mean of KV heads and steps")
    axes.set_ylabel("attention mass, P10 of query heads and steps")
    axes.set_title(keys)
    axes.legend(fontsize=8)
