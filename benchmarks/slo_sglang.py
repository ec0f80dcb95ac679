"""The SLO bench on SGLang: its own scheduler, stepped through windows of requests.

Prefix cache and all other settings are SGLang's defaults, and no two prompts have anything in common.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from penstock.benchmarks.sglang_dlpm import VARIABLE, import_quietly
from penstock.benchmarks.slo_apps import APPS
from penstock.benchmarks.slo_run import (
    KV_TOKENS,
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
from penstock.schedulers.waiting import Clock
from penstock.simulation.engine import Simulation, VirtualClock
from penstock.simulation.workloads import Fixed

Made = TypeVar("Made")
QUICK_STOCK = ("stock fcfs 2048, mixed", "stock shortest first 1024, mixed")


def families(*, quick: bool) -> Families:
    """Settings by family; ``quick`` keeps those that win most often.

    The best stock setting is that of three: first come, first served, with prompts before decodes as SGLang
    has them by default or mixed with them, and the shortest prompt first. ``lpm`` orders prompts that have
    nothing in common by their arrival, and is not run.
    """
    budgets = (512, 1024, 2048, 8192)
    shortest = {"schedule_policy": "shortest-prefill-first"}
    priority = {"enable_priority_scheduling": True, "schedule_low_priority_values_first": True}
    stock = [_setting("fcfs", budget, mixed=mixed) for mixed in (True, False) for budget in budgets]
    stock += [_setting("shortest first", budget, mixed=True, **shortest) for budget in budgets[1:]]
    if quick:
        stock = [one for one in stock if one.name in QUICK_STOCK]
    return {
        STOCK: tuple(stock),
        PRIORITY: tuple(
            _setting("priority", budget, mixed=True, more=priority)
            for budget in budgets[2 : 3 if quick else 4]
        ),
        **our_families(2 if quick else 4, "rest", mixed_chunk=True),
    }


def _setting(policy: str, budget: int, *, mixed: bool, **engine: Any) -> Setting:
    name = f"stock {policy} {budget}{', mixed' if mixed else ''}"
    return Setting(name=name, kind="stock", budget=budget, engine={"mixed_chunk": mixed, **engine})


@contextmanager
def workers() -> Iterator[RunEach]:
    """A process for each task, since one has one engine; they share what importing SGLang made."""
    import_quietly()
    # What is there to stay is not looked at again in each process that is forked.
    gc.collect()
    gc.freeze()
    try:
        yield _run
    finally:
        gc.unfreeze()


def _run(tasks: Sequence[Task]) -> Iterator[Curve]:
    number = min(len(os.sched_getaffinity(0)), len(tasks))
    if number:
        with multiprocessing.get_context("fork").Pool(number, maxtasksperchild=1) as pool:
            yield from pool.imap(measure, tasks)


def measure(task: Task) -> Curve:
    """Search the capacity, or run the rates that are given, in a process that has made no engine."""
    setting = task.setting
    section = {"scheduler": {"policy": "slo", "slo": setting.slo}} if setting.kind == "slo" else None
    os.environ[VARIABLE] = json.dumps(section) if section else ""
    from penstock.simulation.sglang_engine import EngineShape, SglangEngine

    shape = EngineShape(kv_tokens=KV_TOKENS, chunked_prefill_size=setting.budget, **setting.engine)
    clock = VirtualClock()
    engine = SglangEngine(
        shape, clock=clock, prepare=partial(planned, setting) if setting.kind == "slo" else None
    )

    def run_window(task: Task, seed: int, rate: float) -> Score:
        asks = asks_of(task, seed, rate)
        result = Simulation(engine, Fixed(asks), task.step_time, clock).run()
        engine.idle()
        return score_of(result.served, APPS[task.app])

    return measure_with(lambda *window: in_a_fork(partial(run_window, *window)), task)


def planned(setting: Setting, scheduler: Any, clock: Clock) -> None:
    """Give the scheduler the SLO policy on ``clock``."""
    from penstock.plugins.sglang.scheduler_hooks import install_policy
    from penstock.plugins.sglang.settings import inherited, scheduler_config

    config = scheduler_config(inherited())
    assert config is not None
    install_policy(scheduler, config, clock, model_of(setting))


def in_a_fork(make: Callable[[], Made]) -> Made:
    """What ``make`` returns in a copy of this process, which stays as it is.

    Raises:
        RuntimeError: it raised something, which is on standard error.
    """
    reader, writer = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if not child:
        status = 1
        try:
            writer.send(make())
            status = 0
        finally:
            if status:
                traceback.print_exc()
            os._exit(status)
    writer.close()
    try:
        with reader:
            made: Made = reader.recv()
    except EOFError:
        raise RuntimeError("a window failed") from None
    finally:
        os.waitpid(child, 0)
    return made
