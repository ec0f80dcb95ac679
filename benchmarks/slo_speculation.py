"""Speculation under latency targets: the SLO bench's applications on an engine that drafts.

Both sides may draft. Stock drafts by its own schedule, one length for all by the number of requests; so does
the SLO policy without draft lengths of ours. A request's class fixes how predictable its output is, and every
way to choose lengths meets the same luck. vLLM's own scheduler is stepped on a virtual clock; a step pays for
each pass of the draft model, whether its tokens are verified or not.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec

from penstock.benchmarks.report import Cell, Claim
from penstock.benchmarks.slo_apps import APPS, window
from penstock.benchmarks.slo_capacity import capacity, geometric_mean, ratio_interval
from penstock.benchmarks.slo_run import ATTAINED, KV_TOKENS, MAX_MODEL_LEN, Curve, Score, mean_share, score_of
from penstock.simulation.engine import Simulation, VirtualClock
from penstock.simulation.step_time import load_step_time
from penstock.simulation.workloads import Fixed

DRAFT_TOKENS = 5
SEATS = 256
STEP_TIME, PROFILE = "opt-6.7b-a100+kv", "a100-7b"
PREDICTABLE = {
    "chat": 0.6,
    "coder": 0.8,
    "summary": 0.75,
    "tool": 0.75,
    "thinking": 0.7,
    "loose": 0.55,
    "tight": 0.8,
}
"""By tier; invented, of the size that drafters of one to five tokens reach on such text."""
Schedule = tuple[tuple[int, int, int], ...]
SCHEDULES: dict[str, Schedule] = {
    "off": (),
    "2": ((1, SEATS, 2),),
    "3": ((1, SEATS, 3),),
    "5": ((1, SEATS, 5),),
    "5 to 16, 3 to 64, 1": ((1, 16, 5), (17, 64, 3), (65, SEATS, 1)),
    "5 to 32, 2 to 128, 0": ((1, 32, 5), (33, 128, 2), (129, SEATS, 0)),
}
"""First and last batch size, draft tokens: what ``num_speculative_tokens_per_batch_size`` can say."""
PAPER, STOCK, PLAIN, SCHEDULED, OURS = (
    "stock, 512 tokens, no drafts",
    "stock, schedule",
    "slo, no drafts",
    "slo, schedule",
    "slo, lengths by slack",
)
STEP, FURTHEST = 1.15, 16
FIRST_TUNING_SEED, FIRST_SCORING_SEED = 1, 600_001


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """A scheduler and how it drafts. ``schedule`` names vLLM's, "" leaves lengths to us."""

    kind: str
    schedule: str
    budget: int = 8192


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """One window by name, so that it can be sent to another process."""

    app: str
    way: Way
    seed: int
    rate: float
    requests: int


def candidates() -> dict[str, list[Way]]:
    """What is tried on the tuning windows; ours and the paper's have nothing to tune."""
    stock = [Way(kind="stock", schedule=name, budget=budget) for name in SCHEDULES for budget in (2048, 8192)]
    return {
        PAPER: [Way(kind="stock", schedule="off", budget=512)],
        STOCK: stock,
        PLAIN: [Way(kind="slo", schedule="off")],
        SCHEDULED: [Way(kind="slo", schedule=name) for name in SCHEDULES],
        OURS: [Way(kind="slo", schedule="")],
    }


def run_window(one: Window) -> Score:
    """One window to its end."""
    from penstock.simulation.vllm_engine import EngineShape, VllmEngine, resolve

    app, way, step_time = APPS[one.app], one.way, load_step_time(STEP_TIME)
    asks = [
        replace(ask, predictable=PREDICTABLE[ask.tier])
        for ask in window(app, one.seed, one.rate, one.requests, step_time)
    ]
    ours: dict[str, Any] = {"policy": "slo", "slo": {"profile": PROFILE}}
    if not way.schedule:
        ours["speculation"] = {"profile": PROFILE}
    clock = VirtualClock()
    shape = EngineShape(
        kv_tokens=KV_TOKENS,
        max_model_len=MAX_MODEL_LEN,
        max_num_batched_tokens=way.budget,
        max_num_seqs=SEATS,
        prefix_caching=False,
        additional_config={"penstock": {"scheduler": ours}} if way.kind == "slo" else {},
        draft_tokens=0 if way.schedule == "off" else DRAFT_TOKENS,
        draft_schedule=SCHEDULES.get(way.schedule, ()),
    )
    make = resolve("vllm.v1.core.sched.scheduler.Scheduler")
    if way.kind == "slo":
        make = partial(
            resolve("penstock.plugins.vllm.request_scheduler.make_scheduler"), clock=clock, wall_clock=clock
        )
    engine = VllmEngine(shape, make)
    return score_of(Simulation(engine, Fixed(asks), step_time, clock).run().served, app)
