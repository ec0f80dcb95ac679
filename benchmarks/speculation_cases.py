"""The experiments with draft lengths: every batch size, and a trace of requests with several paces."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from penstock.benchmarks.speculation_model import Asked, BySchedule, ByWorth, Knowing, Loop, Outcome
from penstock.schedulers.slo.profiles import Profile, find_profile

BATCHES = (1, 2, 4, 8, 16, 32, 64)
RATES = (0.0, 0.3, 0.6, 0.9)
WARM_STEPS = 40
ENGINES = {
    "h100-13b": find_profile("h100-13b"),
    "dear tokens": Profile(base_s=0.004, token_s=4e-4, source="invented: a small machine, bound by compute"),
    "cheap tokens": Profile(base_s=0.02, token_s=2e-6, source="invented: bound by memory alone"),
}
SCHEDULES: dict[str, tuple[tuple[int, int], ...]] = {
    "off": (),
    "1": ((10**6, 1),),
    "2": ((10**6, 2),),
    "3": ((10**6, 3),),
    "5": ((10**6, 5),),
    "5 to 8, 3 to 32, 1 to 128": ((8, 5), (32, 3), (128, 1)),
    "5 to 16, 3 to 64, 1": ((16, 5), (64, 3), (10**6, 1)),
    "5 to 32, 2 to 128": ((32, 5), (128, 2)),
    "3 to 16, 1 to 64": ((16, 3), (64, 1)),
    "5 to 64, 3": ((64, 5), (10**6, 3)),
}
"""Largest batch and its draft tokens: what ``num_speculative_tokens_per_batch_size`` can say."""

PRIOR = "a100-7b"
"""Where ours starts from on every engine."""


@dataclass(frozen=True, slots=True)
class Drafter:
    """Who drafts, on which engine, and the arrival rates around what that sustains."""

    name: str
    profile: str
    in_passes: bool
    rates: tuple[float, ...]


MIXED = (
    Drafter("n-grams", "h100-13b", False, (12.0, 15.0, 18.0, 21.0)),
    Drafter("draft model", "a100-13b-tp2", True, (6.0, 7.5, 9.0, 10.5)),
)
"""A pass is priced where its time was published: a 125M model beside 13B, a tenth of an empty step."""


def batch_rows(steps: int, seed: int) -> list[dict[str, Any]]:
    """One row an engine, batch size and acceptance: output tokens a second over those without drafts."""
    return [
        _batch_row(engine, batch, rate, steps, seed)
        for engine in ENGINES
        for batch in BATCHES
        for rate in RATES
    ]


def _batch_row(engine: str, batch: int, rate: float, steps: int, seed: int) -> dict[str, Any]:
    speeds = {}
    for name, make in {"off": None, "ours": ours, "full": partial(scheduled, "5")}.items():
        loop = Loop(ENGINES[engine], make, seed)
        trace = [Asked(f"r{i}", 0.0, 100, 10**9, "c", rate) for i in range(batch)]
        loop.run(trace, WARM_STEPS)
        before = loop.now_s, _made(loop)
        loop.run((), WARM_STEPS + steps)
        speeds[name] = (_made(loop) - before[1]) / (loop.now_s - before[0])
    return {
        "case": "batch",
        "engine": engine,
        "batch": batch,
        "acceptance": rate,
        "ours_to_off": round(speeds["ours"] / speeds["off"], 4),
        "full_to_off": round(speeds["full"] / speeds["off"], 4),
    }


def _made(loop: Loop) -> int:
    return sum(live.num_output_tokens for live in loop.running)


def ours(clock: Callable[[], float]) -> ByWorth:
    """Draft lengths by worth."""
    return ByWorth(clock, PRIOR)


def scheduled(name: str, _: Callable[[], float]) -> BySchedule:
    """Draft lengths by batch size."""
    return BySchedule(SCHEDULES[name])


def mixed_trace(rate_per_s: float, seconds: float, seed: int) -> list[Asked]:
    """Poisson arrivals: edits and agents with a tight pace that drafts suit, chats that they suit less, and
    jobs without a pace."""
    rng = random.Random(f"trace {seed}")
    kinds = (
        (0.25, "edit", 0.85, 0.035, 800, 250),
        (0.35, "chat", 0.45, 0.06, 400, 200),
        (0.20, "prose", 0.25, 0.1, 300, 300),
        (0.20, "batch", 0.55, None, 600, 300),
    )
    trace: list[Asked] = []
    now_s = 0.0
    while (now_s := now_s + rng.expovariate(rate_per_s)) < seconds:
        _, client, accepted, tpot_s, prompt, output = rng.choices(kinds, [kind[0] for kind in kinds])[0]
        length = max(2, int(rng.expovariate(1 / output)))
        asked = max(1, int(rng.expovariate(1 / prompt)))
        trace.append(Asked(f"r{len(trace)}", now_s, asked, length, client, accepted, tpot_s))
    return trace


def attained(drafter: Drafter, make: Any, rate_per_s: float, seconds: float, seed: int) -> Outcome:
    """One trace through one engine."""
    return Loop(find_profile(drafter.profile), make, seed).run(mixed_trace(rate_per_s, seconds, seed))


def best_schedule(drafter: Drafter, seconds: float, seed: int) -> str:
    """The schedule with the highest capacity on a trace that is not scored, the fullest among equals."""

    def merit(name: str) -> tuple[float, int]:
        make = partial(scheduled, name)
        found = [(rate, attained(drafter, make, rate, seconds, seed)) for rate in drafter.rates]
        rows = [_mixed_row(drafter, rate, name, [outcome]) for rate, outcome in found]
        return capacity(rows, name), sum(outcome.attained for _, outcome in found)

    return max(SCHEDULES, key=merit)


def mixed_rows(drafter: Drafter, seconds: float, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """One row an arrival rate and a way to choose lengths. The last ways are out of reach: ours with the true
    rate of each request, and knowing which tokens are right."""
    best = best_schedule(drafter, seconds, seed=10_000)
    passes, profile = drafter.in_passes, drafter.profile
    ways: dict[str, Any] = {
        "off": None,
        f"schedule ({best})": partial(scheduled, best),
        "ours": partial(ByWorth, prior=PRIOR, in_passes=passes),
        "known rates": partial(Knowing, profile=profile, tokens=False, in_passes=passes),
        "known tokens": partial(Knowing, profile=profile, tokens=True, in_passes=passes),
    }
    return [
        _mixed_row(drafter, rate, name, [attained(drafter, make, rate, seconds, seed) for seed in seeds])
        for rate in drafter.rates
        for name, make in ways.items()
    ]


def _mixed_row(drafter: Drafter, rate: float, name: str, found: Sequence[Outcome]) -> dict[str, Any]:
    drafted = sum(outcome.drafted for outcome in found)
    hit = sum(outcome.attained for outcome in found)
    return {
        "case": "mixed",
        "drafter": drafter.name,
        "arrivals_per_s": rate,
        "lengths": name,
        "attainment": round(hit / sum(outcome.requests for outcome in found), 4),
        "attained_per_s": round(hit / sum(outcome.ended_s for outcome in found), 3),
        "accepted_share": round(sum(outcome.accepted for outcome in found) / max(1, drafted), 3),
        "drafted_per_token": round(drafted / sum(outcome.output_tokens for outcome in found), 3),
    }


def capacity(rows: Sequence[dict[str, Any]], way: str, share: float = 0.9) -> float:
    """The arrival rate at which attainment falls to ``share``, between the measured rates linearly; those
    below the first crossing count."""
    points = [(row["arrivals_per_s"], row["attainment"]) for row in rows if row["lengths"].startswith(way)]
    if points[0][1] < share:
        return 0.0
    for (rate, found), (next_rate, next_found) in pairwise(points):
        if next_found < share:
            return float(rate + (next_rate - rate) * (found - share) / (found - next_found))
    return float(points[-1][0])
