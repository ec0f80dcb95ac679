"""What the SLO benches have in common: their options, their stages, and what is shown of them.

The capacity of an application is the highest rate at which 90 % of the requests meet both targets. Stock
settings and ours are tuned with equal effort, on windows that are not those they are scored on. Output
lengths are unknown to every scheduler.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec
from rich.console import Console

from penstock.benchmarks.journal import Journal
from penstock.benchmarks.narrator import Narrator
from penstock.benchmarks.parts import wide
from penstock.benchmarks.report import Environment, Report, rows_table, write_plot
from penstock.benchmarks.slo_apps import APPS
from penstock.benchmarks.slo_capacity import capacity_interval
from penstock.benchmarks.slo_claims import claims, overload_rows, rows
from penstock.benchmarks.slo_run import Curve, Task, mean_share
from penstock.benchmarks.slo_stages import PRIORITY, SLO, STOCK, Families, RunEach, Scale, Scored, run_stages
from penstock.benchmarks.step_time_option import loaded
from penstock.simulation.step_time import StepTime

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CODE = ("schedulers", "simulation", "plugins", "benchmarks")
"""Packages that searches depend on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """An SLO bench of one engine: what is run, and what runs it."""

    name: str
    module: str
    """Of the engine; without it there is nothing to measure."""
    missing: str
    families: Callable[..., Families]
    """Settings by family, called with ``quick``."""
    workers: Callable[[], AbstractContextManager[RunEach]]
    quick_apps: tuple[str, ...]
    quick_requests: int
    """Of a window."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What the command line says."""

    quick: bool
    traces: Path | None
    apps: tuple[str, ...]
    windows: int | None
    tuning: int | None
    requests: int | None
    gaps: bool | None
    profile: StepTime
    journal: Path | None
    json_file: Path | None
    plot_file: Path


def options(bench: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The command-line options of ``bench``, as the fields of ``Given``."""
    path = partial(click.Path, path_type=Path)
    given = (
        click.option("--quick", is_flag=True, help="In small, under a minute on two cores."),
        click.option(
            "--traces",
            type=path(exists=True, file_okay=False),
            help="Folder with Azure's traces of 2023: lengths of chat and coder instead of generated ones.",
        ),
        click.option(
            "--app", "apps", type=click.Choice(list(APPS)), multiple=True, help="Only these applications."
        ),
        click.option(
            "--windows", type=click.IntRange(2), help="Windows to score.  [default: 10, 2 with --quick]"
        ),
        click.option(
            "--tuning", type=click.IntRange(1), help="Windows to tune on.  [default: 4, 1 with --quick]"
        ),
        click.option(
            "--requests", type=click.IntRange(20), help="A window.  [default: 200, fewer with --quick]"
        ),
        click.option(
            "--gaps/--no-gaps",
            default=None,
            help="Score by the largest gap between tokens, too.  [default: not with --quick]",
        ),
        click.option(
            "--step-time",
            "profile",
            callback=loaded,
            default="opt-6.7b-a100+kv",
            show_default=True,
            help="A shipped profile or a JSON file.",
        ),
        click.option(
            "--journal",
            type=path(dir_okay=False),
            help="Keep finished searches here. Those it has of the same code and settings are not run again.",
        ),
        click.option("--json", "json_file", type=path(), help="Write rows and claims here."),
        click.option(
            "--plot",
            "plot_file",
            type=path(),
            default=Path(f"{bench}.svg"),
            show_default=True,
            help="Plots; what they show goes before the suffix.",
        ),
    )

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        for option in reversed(given):
            command = option(command)
        return command

    return decorate


def run(bench: Bench, given: Given) -> None:
    """Measure, and show and write what was found. Ends the process with status 130 if it is interrupted.

    Raises:
        click.ClickException: the engine is not installed, or the journal is none.
    """
    if find_spec(bench.module) is None:
        raise click.ClickException(bench.missing)
    console, quick = wide(Console()), given.quick
    gaps = not quick if given.gaps is None else given.gaps
    environment = Environment.detect(0)
    scale = Scale(
        apps=given.apps or (bench.quick_apps if quick else tuple(APPS)),
        requests=given.requests or (bench.quick_requests if quick else 200),
        tuning=given.tuning or (1 if quick else 4),
        scoring=given.windows or (2 if quick else 10),
        rules=("deadline", "mean", "gap") if gaps else ("deadline", "mean"),
        families=bench.families(quick=quick),
        refinements=1 if quick else 2,
    )
    try:
        journal = Journal(given.journal, CODE, bench.name, environment.engine)
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    try:
        with bench.workers() as run_each:
            searches = Searches(bench.name, run_each, journal, Narrator(console))
            scored = run_stages(scale, given.profile, given.traces, searches)
    except KeyboardInterrupt:
        sys.exit(130)
    report = Report(
        bench=bench.name,
        environment=environment,
        rows=(*rows(scale, scored), *overload_rows(scored)),
        claims=tuple(claims(scale, scored)),
    )
    _show(report, scale, scored, given, console)


def _show(report: Report, scale: Scale, scored: Scored, given: Given, console: Console) -> None:
    console.print(rows_table(overload_rows(scored)))
    shown = msgspec.structs.replace(report, rows=tuple(rows(scale, scored)))
    shown.show(console, title=f"{report.bench}, step time {given.profile.name} ({given.profile.source})")
    plot = given.plot_file
    for name, draw in (("capacity", draw_capacity), ("attainment", draw_attainment)):
        file = plot.with_name(f"{plot.stem}-{name}{plot.suffix}")
        console.print(f"wrote {write_plot(file, partial(draw, scale=scale, scored=scored))}")
    if given.json_file is not None:
        report.write_json(given.json_file)
        console.print(f"wrote {given.json_file}")


@dataclass(frozen=True, slots=True)
class Searches:
    """Runs tasks that are not in the journal, and tells how far they are."""

    bench: str
    run_each: RunEach
    journal: Journal
    narrator: Narrator

    def __call__(self, tasks: Sequence[Task]) -> list[Curve]:
        """The curves of the tasks, in the same order."""
        found: dict[int, Any] = {place: self.journal.find(task, Curve) for place, task in enumerate(tasks)}
        missing = [place for place, curve in found.items() if curve is None]
        with self.narrator.step(self.bench) as tell:
            curves = self.run_each([tasks[place] for place in missing])
            for number, (place, curve) in enumerate(zip(missing, curves, strict=True), start=1):
                found[place], task = curve, tasks[place]
                self.journal.keep(task, curve)
                tell(f"{number} of {len(missing)} searches, the last {task.app} under {task.setting.name}")
        return [found[place] for place in range(len(tasks))]


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
