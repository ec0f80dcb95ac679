"""``penstock bench sglang-dlpm``: waiting policies inside SGLang's real scheduler, on a virtual clock.

Workloads, measures and claims are those of ``penstock bench dlpm``. SGLang's own ``fcfs`` and ``lpm`` are the
peers, ``lpm`` as it is: above 128 waiting requests it goes by arrival.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from penstock.benchmarks.dlpm_cases import QUANTUM, Case, Policy, cases, fair
from penstock.benchmarks.dlpm_claims import AGAIN, Results, claims, faults, summary
from penstock.benchmarks.dlpm_run import DeficitWatch, Outcome, Task, outcome_of
from penstock.benchmarks.narrator import Narrator
from penstock.benchmarks.parts import wide
from penstock.benchmarks.report import Environment, Report
from penstock.benchmarks.step_time_option import loaded
from penstock.schedulers.waiting import Clock
from penstock.simulation.engine import Simulation, VirtualClock
from penstock.simulation.fairness import FairnessMeter
from penstock.simulation.step_time import StepTime

POLICIES = (
    Policy("fcfs"),
    Policy("lpm", scheduling_policy="lpm"),
    fair("vtc"),
    fair("dlpm", quantum_tokens=QUANTUM),
)
QUICK_CASES = frozenset({"long documents", "flood"})
VARIABLE = "PENSTOCK_CONFIG"


@click.command("sglang-dlpm")
@click.option("--quick", is_flag=True, help="Two workloads, in small.")
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
def bench(quick: bool, seeds: int | None, profile: StepTime, json_file: Path | None) -> None:
    """Measure DLPM and VTC beside SGLang's own fcfs and lpm.

    A claim that does not hold is shown as such; the exit status is 0 all the same, since this measures.
    """
    if find_spec("sglang") is None:
        raise click.ClickException("this bench steps SGLang's own scheduler: install penstock[sglang]")
    console = wide(Console())
    scored = range(1, 1 + (seeds or (1 if quick else 3)))
    chosen = [case for case in cases(quick=quick) if case.peers and (not quick or case.name in QUICK_CASES)]
    tasks = plan(chosen, scored, profile, quick=quick)
    try:
        results = run_all(tasks, Narrator(console))
    except KeyboardInterrupt:
        sys.exit(130)
    report = Report(
        bench="sglang-dlpm",
        environment=Environment.detect(scored[0]),
        rows=tuple(summary(results)),
        claims=tuple(claims(results, {case.name: case for case in chosen})),
    )
    report.show(console, title=f"sglang-dlpm, step time {profile.name} ({profile.source})")
    for note in faults(results):
        console.print(note, style="red", markup=False, highlight=False, soft_wrap=True)
    if json_file is not None:
        report.write_json(json_file)
        console.print(f"wrote {json_file}")


def plan(chosen: Sequence[Case], seeds: Sequence[int], profile: StepTime, *, quick: bool) -> list[Task]:
    """All runs; the first case is run under DLPM once more."""
    runs = [
        (policy.name, case.name, policy, seed) for case in chosen for seed in seeds for policy in POLICIES
    ]
    runs.append((AGAIN, chosen[0].name, POLICIES[-1], seeds[0]))
    return [
        Task(label=label, case=case, policy=policy, seed=seed, step_time=profile, quick=quick)
        for label, case, policy, seed in runs
    ]


def run_all(tasks: Sequence[Task], narrator: Narrator) -> Results:
    """Run each task in a process of its own: a process has one policy. They share what importing SGLang
    made."""
    workers = min(len(os.sched_getaffinity(0)), len(tasks))
    results = []
    with narrator.step("sglang-dlpm") as tell:
        import_quietly()
        with multiprocessing.get_context("fork").Pool(workers, maxtasksperchild=1) as pool:
            for task, outcome in zip(tasks, pool.imap(measure, tasks), strict=True):
                results.append((task, outcome))
                tell(f"{len(results)} of {len(tasks)} runs, the last {task.case} under {task.label}")
    return results


def import_quietly() -> None:
    """Import SGLang, which warns of all that this machine cannot do."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Model classes, which an engine asks for, take most of the time to make one.
    import sglang.srt.models.registry  # noqa: F401

    import penstock.simulation.sglang_engine  # noqa: F401


def measure(task: Task) -> Outcome:
    """Run one task, in a process that SGLang has loaded no plugins in."""
    section = task.policy.additional_config.get("penstock")
    os.environ[VARIABLE] = json.dumps(section) if section else ""
    from penstock.simulation.sglang_engine import EngineShape, SglangEngine

    case = next(case for case in cases(quick=task.quick) if case.name == task.case)
    clock = VirtualClock()
    shape = EngineShape(
        kv_tokens=case.kv_tokens,
        max_running_requests=case.max_num_seqs,
        schedule_policy=task.policy.scheduling_policy,
    )
    engine = SglangEngine(shape, clock=clock, prepare=on_virtual_clock if section else None)
    passes = getattr(engine.scheduler.policy, "passes", None)
    meter = FairnessMeter(case.clients)
    watch = DeficitWatch(None if passes is None else passes.order)
    result = Simulation(engine, case.make(task.seed), task.step_time, clock, (meter, watch)).run()
    engine.idle()
    if passes is not None:
        passes.settle()
    return outcome_of(case, task.policy, result, meter, watch)


def on_virtual_clock(scheduler: Any, clock: Clock) -> None:
    """Give the scheduler the policy that this process was asked for, on ``clock``."""
    from penstock.plugins.sglang.scheduler_hooks import install_policy
    from penstock.plugins.sglang.settings import inherited, scheduler_config

    config = scheduler_config(inherited())
    assert config is not None
    install_policy(scheduler, config, clock)
