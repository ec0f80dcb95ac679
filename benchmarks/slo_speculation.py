"""Speculation under latency targets: the SLO bench's applications on an engine that drafts.

Both sides may draft. Stock drafts by its own schedule, one length for all by the number of requests; so does
the SLO policy without draft lengths of ours. A request's class fixes how predictable its output is, and every
way to choose lengths meets the same luck. vLLM's own scheduler is stepped on a virtual clock; a step pays for
each pass of the draft model, whether its tokens are verified or not.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
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
        drafter="draft_model",
        draft_schedule=SCHEDULES.get(way.schedule, ()),
    )
    make = resolve("vllm.v1.core.sched.scheduler.Scheduler")
    if way.kind == "slo":
        make = partial(
            resolve("penstock.plugins.vllm.request_scheduler.make_scheduler"), clock=clock, wall_clock=clock
        )
    engine = VllmEngine(shape, make)
    return score_of(Simulation(engine, Fixed(asks), step_time, clock).run().served, app)


RunAll = Callable[[Sequence[Window]], Sequence[Score]]


@contextmanager
def workers() -> Iterator[RunAll]:
    """Runs as many windows at once as there are cores; scores in the order of the windows."""
    # Workers inherit the environment; vLLM's start-up lines would drown the table.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as pool:
        yield lambda windows: list(pool.map(run_window, windows))


def search(jobs: Sequence[tuple[str, Way]], seeds: Sequence[int], requests: int, run: RunAll) -> list[Curve]:
    """Raise every job's rate, side by side, until 90 % attain no more; or lower it until they do."""
    curves: list[Curve] = [{} for _ in jobs]
    exponents = dict.fromkeys(range(len(jobs)), 0)
    for _ in range(FURTHEST):
        if not exponents:
            break
        rates = {place: APPS[jobs[place][0]].rate * STEP**power for place, power in exponents.items()}
        windows = [
            Window(app=jobs[place][0], way=jobs[place][1], seed=seed, rate=rate, requests=requests)
            for place, rate in rates.items()
            for seed in seeds
        ]
        scores = run(windows)
        for number, (place, rate) in enumerate(rates.items()):
            curves[place][rate] = list(scores[number * len(seeds) : (number + 1) * len(seeds)])
        exponents = {
            place: power for place in exponents if (power := _next_exponent(curves[place])) is not None
        }
    return curves


def _next_exponent(curve: Curve) -> int | None:
    """The next power of ``STEP``, counted from the first rate; None where the crossing is enclosed."""
    held = [mean_share(curve[rate], "deadline") >= ATTAINED for rate in sorted(curve)]
    if held[0] and not held[-1]:
        return None
    tried = len(held)
    return tried if held[0] else -tried


def speculation_rows(
    apps: Sequence[str], windows: int, requests: int, run: RunAll, tuning: int = 1
) -> list[dict[str, Cell]]:
    """One row an application and way: the way that was best on tuning windows, its capacity on others, and
    that to stock with its schedule."""
    best = _tune(apps, range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + tuning), requests, run)
    seeds = range(FIRST_SCORING_SEED, FIRST_SCORING_SEED + windows)
    jobs = [(app, way) for (app, _), way in best.items()]
    curves = dict(zip(best, search(jobs, seeds, requests, run), strict=True))
    rows: list[dict[str, Cell]] = []
    for (app, name), way in best.items():
        ratio = ratio_interval(curves[app, name], curves[app, STOCK], "deadline")
        rows.append(
            {
                "case": "latency targets",
                "application": app,
                "way": name,
                "schedule": way.schedule or "ours",
                "budget": way.budget,
                "capacity": round(capacity(curves[app, name], "deadline", range(windows)), 3),
                "to stock": round(ratio.value, 3),
                "low": round(ratio.low, 3),
                "high": round(ratio.high, 3),
            }
        )
    return rows


def _tune(
    apps: Sequence[str], seeds: Sequence[int], requests: int, run: RunAll
) -> dict[tuple[str, str], Way]:
    """The candidate with the highest capacity for each application and way."""
    jobs = [(app, name, way) for app in apps for name, ways in candidates().items() for way in ways]
    contested = [job for job in jobs if len(candidates()[job[1]]) > 1]
    curves = search([(app, way) for app, _, way in contested], seeds, requests, run)
    best = {(app, name): way for app, name, way in jobs}
    highest: dict[tuple[str, str], float] = {}
    for (app, name, way), curve in zip(contested, curves, strict=True):
        found = capacity(curve, "deadline", range(len(seeds)))
        if found > highest.get((app, name), -1.0):
            highest[app, name], best[app, name] = found, way
    return best


def speculation_claims(rows: Sequence[dict[str, Any]]) -> list[Claim]:
    """What is promised of drafts under latency targets, geometric means over the applications."""
    capacities = {(row["application"], row["way"]): row["capacity"] for row in rows}
    apps = list(dict.fromkeys(row["application"] for row in rows))

    def mean(ours: str, theirs: str) -> float:
        ratios = [capacities[app, ours] / max(1e-9, capacities[app, theirs]) for app in apps]
        return geometric_mean([(ratio, ratio, ratio) for ratio in ratios]).value

    return [
        Claim.of("both sides draft: capacity to stock with its best schedule", mean(OURS, STOCK), ">=", 1.2),
        Claim.of("to the same policy without drafts", mean(OURS, PLAIN), ">=", 1.0),
        Claim.of("to the same policy with vLLM's best schedule", mean(OURS, SCHEDULED), ">=", 1.0),
        Claim.of("to the paper's baseline, a small budget without drafts", mean(OURS, PAPER), ">=", 2.2),
    ]
