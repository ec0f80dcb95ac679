"""The SLO bench on vLLM: its own scheduler, stepped through windows of requests."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial

import msgspec

from penstock.benchmarks.slo_apps import APPS
from penstock.benchmarks.slo_prefill_first import PrefillFirst
from penstock.benchmarks.slo_run import (
    KV_TOKENS,
    MAX_MODEL_LEN,
    Curve,
    Score,
    Setting,
    Task,
    asks_of,
    measure_with,
    model_of,
    score_of,
)
from penstock.benchmarks.slo_stages import PRIORITY, STOCK, Families, RunEach, our_families
from penstock.schedulers.slo.config import SLOConfig
from penstock.schedulers.slo.planner import Planner
from penstock.simulation.engine import Simulation, VirtualClock
from penstock.simulation.workloads import Fixed

PREFILL_FIRST = "prefill-first"
PLANNED = ("slo", PREFILL_FIRST)
"""Kinds of settings that a planner carries out."""


def families(*, quick: bool) -> Families:
    """Settings by family, four each; ``quick`` keeps those that win most often."""
    budgets = (2048, 8192) if quick else (512, 1024, 2048, 8192)
    found = {STOCK: _budgets(STOCK, STOCK, budgets), PRIORITY: _budgets(PRIORITY, "priority", budgets[-1:])}
    if not quick:
        found[PRIORITY] = _budgets(PRIORITY, "priority", budgets)
        found[PREFILL_FIRST] = _budgets(PREFILL_FIRST, PREFILL_FIRST, budgets)
    return {**found, **our_families(1 if quick else 4, "losses")}


def _budgets(family: str, kind: str, budgets: Iterable[int]) -> tuple[Setting, ...]:
    return tuple(Setting(name=f"{family} {budget}", kind=kind, budget=budget) for budget in budgets)


@contextmanager
def workers() -> Iterator[RunEach]:
    """As many processes as there are cores, kept for all stages."""
    # Workers inherit the environment; vLLM's start-up lines would drown the table.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context)
    try:
        yield partial(_run, pool)
    finally:
        pool.shutdown(cancel_futures=True)


def _run(pool: ProcessPoolExecutor, tasks: Sequence[Task]) -> Iterator[Curve]:
    return pool.map(measure, tasks)


def measure(task: Task) -> Curve:
    """Search the capacity, or run the rates that are given."""
    return measure_with(run_window, task)


def run_window(task: Task, seed: int, rate: float) -> Score:
    """One window to its end."""
    from penstock.simulation.vllm_engine import EngineShape, VllmEngine, resolve

    setting, clock = task.setting, VirtualClock()
    shape = EngineShape(
        kv_tokens=KV_TOKENS,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=setting.budget,
        prefix_caching=False,
        policy="priority" if setting.kind == "priority" else "fcfs",
        additional_config=(
            {"penstock": {"scheduler": {"policy": "slo", "slo": setting.slo}}}
            if setting.kind in PLANNED
            else {}
        ),
    )
    make = resolve("vllm.v1.core.sched.scheduler.Scheduler")
    if setting.kind in PLANNED:
        ours = resolve("penstock.plugins.vllm.request_scheduler.make_scheduler")
        make = partial(ours, clock=clock, wall_clock=clock, planner=planner_of(setting))
    engine = VllmEngine(shape, make)
    result = Simulation(engine, Fixed(asks_of(task, seed, rate)), task.step_time, clock).run()
    return score_of(result.served, APPS[task.app])


def planner_of(setting: Setting) -> Planner:
    """Ours, or the baseline that plans no targets."""
    if setting.kind == PREFILL_FIRST:
        return PrefillFirst()
    return Planner(msgspec.convert(setting.slo, SLOConfig), model_of(setting))
