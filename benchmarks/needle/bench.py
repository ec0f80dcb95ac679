"""``penstock bench needle``: how often dense attention finds what the needle's prompts ask for.

The trained model answers through transformers and through stock ``vllm serve``. Sparse attention is
compared with these figures: what it loses is then its own doing.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from penstock.benchmarks.narrator import Narrator
from penstock.benchmarks.report import Claim, Environment, Report, write_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LENGTHS = (4096, 8192, 16384)
LEAST = 0.95
FILE_WIDTH = 200
Rows = list[dict[str, Any]]


@click.command("needle")
@click.option("--quick", is_flag=True, help="4k tokens, transformers alone, under a minute on two cores.")
@click.option("--contexts", default=4, show_default=True, help="Contexts for each task and length.")
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
    help="Accuracy by length.",
)
@click.option("--seed", default=0, show_default=True)
def bench(
    quick: bool, contexts: int, folder: Path | None, json_file: Path | None, plot_file: Path, seed: int
) -> None:
    """Measure the dense accuracy of the needle, through transformers and through vLLM.

    A claim that does not hold is shown as such; the exit status is 0 all the same, since this measures.
    """
    from penstock.benchmarks.needle.checkpoint import shipped

    console = Console()
    console = console if console.is_terminal else Console(width=FILE_WIDTH)
    rows = _measure(quick, contexts, folder or shipped(), seed, Narrator(console))
    report = Report(
        bench="needle", environment=Environment.detect(seed), rows=tuple(rows), claims=tuple(claims(rows))
    )
    report.show(console)
    console.print(f"wrote {write_plot(plot_file, lambda axes: _draw(axes, rows))}")
    if json_file is not None:
        report.write_json(json_file)
        console.print(f"wrote {json_file}")


def _measure(quick: bool, contexts: int, folder: Path, seed: int, narrator: Narrator) -> Rows:
    from penstock.benchmarks.needle.answers import ServerScore, TransformersScore, accuracies
    from penstock.benchmarks.servers import Engine, engine_server, serving

    lengths = LENGTHS[:1] if quick else LENGTHS
    contexts = 1 if quick else contexts
    with narrator.step("needle, transformers") as tell:
        rows = accuracies("transformers", lengths, contexts, seed, TransformersScore(folder), tell)
    if quick:
        return rows
    # Room for the answer on top of the prompt.
    engine = Engine(model=str(folder), max_model_len=max(lengths) + 64)
    with tempfile.TemporaryDirectory(prefix="penstock-needle-") as logs:
        server = engine_server(engine, Path(logs))
        with serving([server]), narrator.step("needle, vLLM") as tell:
            score = ServerScore(server.url, engine.model)
            rows += accuracies("vLLM", lengths, contexts, seed, score, tell)
    return rows


def claims(rows: Rows) -> list[Claim]:
    """What is promised of every task, at the length where it goes worst."""
    from penstock.benchmarks.needle.task import TASKS

    ways = list(dict.fromkeys(row["way"] for row in rows))
    return [
        Claim.of(
            f"{task} through {way}, worst length",
            min(row[task] for row in rows if row["way"] == way),
            ">=",
            LEAST,
        )
        for way in ways
        for task in TASKS
    ]


def _draw(axes: Axes, rows: Rows) -> None:
    from penstock.benchmarks.needle.task import TASKS

    for way, style in zip(dict.fromkeys(row["way"] for row in rows), ("-o", "--x"), strict=False):
        mine = [row for row in rows if row["way"] == way]
        for number, task in enumerate(TASKS):
            lengths, shares = [row["tokens"] for row in mine], [row[task] for row in mine]
            axes.plot(lengths, shares, style, color=f"C{number}", label=f"{task}, {way}")
    axes.axhline(LEAST, color="grey", linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("share of the references found")
    axes.legend(fontsize="small")
