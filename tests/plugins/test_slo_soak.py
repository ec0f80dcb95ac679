"""Thousands of random operations on the SLO policy in vLLM's real scheduler, beside a small reference model:
no request is lost, none runs twice, and every counter balances.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import pytest

pytest.importorskip("vllm")

from slo_traffic import Time, TimedStepper, slo_request
from stepped_scheduler import Settings, build, token
from vllm.v1.request import Request

from penstock.plugins.vllm.request_scheduler import make_scheduler
from penstock.schedulers.slo.attainment import attains
from penstock.schedulers.slo.targets import Targets

OPERATIONS = 2_500
TARGETS = ((100, 20), (1000, 50), (3000, None), (None, 100), (9000, 300), (None, None))
TIERS_MS = (25.0, 50.0, 100.0, 250.0)


@dataclass
class Fate:
    """What the outside saw of one request."""

    request: Request
    ttft_ms: float | None
    tpot_ms: float | None
    sent_s: float
    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    ends: int = 0
    aborted: bool = False

    @property
    def attained(self) -> bool:
        """By each token's cumulative deadline."""
        targets = Targets(*(math.inf if ms is None else ms / 1e3 for ms in (self.ttft_ms, self.tpot_ms)))
        return attains(targets, self.sent_s, self.times_s, "cumulative")

    @property
    def tier(self) -> str:
        """The slowest tier that is no slower than what is asked for, or else the first."""
        allowed = [tier for tier in TIERS_MS if self.tpot_ms is None or tier <= self.tpot_ms]
        return f"{max(allowed, default=TIERS_MS[0]):g} ms"


class Told(TimedStepper):
    """Keeps what the scheduler tells the front end."""

    def __init__(self, *args: Any, fates: dict[str, Fate]) -> None:
        super().__init__(*args)
        self.fates = fates

    def receive(self) -> None:
        output, sampled = self.in_flight.popleft()
        tokens = output.total_num_scheduled_tokens
        self.time.now += self.fixed_s + self.token_s * tokens if tokens else 0.001
        for outputs in self.scheduler.update_from_output(output, sampled).values():
            for one in outputs.outputs:
                fate = self.fates[one.request_id]
                fate.tokens += one.new_token_ids
                fate.times_s += [self.time.now] * len(one.new_token_ids)
                fate.ends += one.finish_reason is not None


class World:
    """One scheduler and everything that happens to it."""

    def __init__(self, is_async: bool) -> None:
        self.rng = random.Random(f"soak {is_async}")
        self.time, self.fates = Time(1_000.0), {}
        settings = Settings(blocks=40, budget=64, seqs=8, is_async=is_async, ours={"policy": "slo"})
        self.scheduler = build(settings, make_scheduler, clock=self.time, wall_clock=self.time)
        self.stepper = Told(self.scheduler, self.time, 1 + is_async, fates=self.fates)
        self.resets = 0

    def operate(self) -> None:
        (operation,) = self.rng.choices(
            (self.step, self.arrive, self.abort, self.jump, self.slow_down, self.reset),
            (70, 22, 4, 2, 1, 1),
        )
        operation()

    def step(self) -> None:
        if self.scheduler.has_unfinished_requests():
            self.stepper.step()
        elif self.stepper.in_flight:
            self.stepper.receive()

    def arrive(self) -> None:
        rng, name = self.rng, f"r{len(self.fates)}"
        prompt = [100 * rng.randrange(4) + n for n in range(rng.choice((0, 40, 90)))]
        prompt += [rng.randrange(5000, 9000) for _ in range(rng.randrange(1, 100))]
        ttft_ms, tpot_ms = rng.choice(TARGETS)
        sample = slo_request(name, 0, rng.randrange(1, 16), ttft_ms, tpot_ms, tokens=prompt)
        sample.arrival_time = self.time.now
        self.fates[name] = Fate(sample, ttft_ms, tpot_ms, self.time.now)
        self.scheduler.add_request(sample)

    def abort(self) -> None:
        """One of the last to come: in any state, or ended already."""
        names = list(self.fates)[-12:]
        if names:
            fate = self.fates[self.rng.choice(names)]
            fate.aborted |= not fate.request.is_finished()
            self.stepper.abort(fate.request.request_id)

    def jump(self) -> None:
        self.time.now += self.rng.choice((-5.0, -0.01, 3.0))

    def slow_down(self) -> None:
        self.stepper.fixed_s = self.rng.choice((0.003, 0.03, 0.3))

    def reset(self) -> None:
        self.scheduler.reset_prefix_cache(reset_running_requests=True)
        self.resets += 1


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_after_thousands_of_operations_nobody_is_lost_and_counters_balance(is_async):
    world = World(is_async)
    for number in range(OPERATIONS):
        world.operate()
        if number % 50 == 0:
            world.scheduler.check_integrity()
    world.stepper.drain()
    check_answers(world)
    check_counters(world)
    check_nothing_is_left(world.scheduler)
    assert world.resets > 5
    assert world.scheduler.planner.counters.clock_steps_back > 5
    assert sum(fate.request.num_preemptions for fate in world.fates.values()) > 20


def check_answers(world: World) -> None:
    """Every token once and in order; an end for each request, and none for one that was aborted."""
    first = Counter(new[0] for step in world.stepper.steps for new in step[0])
    assert set(first.values()) == {1}
    for name, fate in world.fates.items():
        sample = fate.request
        answer = [token(name, sample.num_prompt_tokens + i) for i in range(sample.max_tokens)]
        assert fate.tokens == (answer[: len(fate.tokens)] if fate.aborted else answer)
        assert fate.ends == (not fate.aborted)


def check_counters(world: World) -> None:
    """What is exported equals what the outside saw."""
    tiers: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for fate in world.fates.values():
        if fate.aborted or (fate.ttft_ms is None and fate.tpot_ms is None):
            continue
        size = fate.request.num_tokens
        for place, value in enumerate((1, fate.attained, size, size * fate.attained)):
            tiers[fate.tier][place] += value
    payload = world.scheduler._stats.payload()
    assert payload["tiers"] == {f"{tier:g} ms": tiers[f"{tier:g} ms"] for tier in TIERS_MS}
    assert sum(requests for requests, *_ in tiers.values()) > 200
    totals = payload["totals"]
    assert 0 < sum(attained for _, attained, *_ in tiers.values()) < sum(row[0] for row in tiers.values())
    assert totals["plans"] + totals["yielded_steps"] == len(world.stepper.steps)
    assert totals["admitted_requests"] + totals["demoted_requests"] > 0


def check_nothing_is_left(scheduler: Any) -> None:
    assert not scheduler.requests
    assert not scheduler.running
    assert not scheduler.waiting
    assert len(scheduler.records) == scheduler.records.with_targets == len(scheduler.planner.backlog) == 0
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    scheduler.check_integrity()
