"""Seeded traffic with latency targets, on a clock that steps take time on and that may jump."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from stepped_scheduler import Settings, Stepper, build, request
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from penstock.plugins.vllm.request_scheduler import make_scheduler
from penstock.plugins.vllm.slo_scheduling import AsyncSLOScheduler, SyncSLOScheduler


class Time:
    """Seconds that a test sets."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class TimedStepper(Stepper):
    """Moves the clock by what a step takes, before its output comes back."""

    def __init__(
        self, scheduler: Any, time: Time, depth: int = 1, fixed_s: float = 0.02, token_s: float = 5e-5
    ) -> None:
        super().__init__(scheduler, depth)
        self.time, self.fixed_s, self.token_s = time, fixed_s, token_s
        self.computed_steps = 0
        self.passed_over: Counter[str] = Counter()
        self.longest_passed_over = 0

    def step(self) -> SchedulerOutput:
        output = super().step()
        served = output.num_scheduled_tokens
        running = {live.request_id for live in self.scheduler.running}
        self.passed_over = Counter({n: self.passed_over[n] + 1 for n in running - served.keys()})
        if served:
            self.longest_passed_over = max(self.longest_passed_over, *self.passed_over.values(), 0)
        return output

    def receive(self) -> None:
        tokens = self.in_flight[0][0].total_num_scheduled_tokens
        self.computed_steps += tokens > 0
        self.time.now += self.fixed_s + self.token_s * tokens if tokens else 0.001
        super().receive()


def slo_request(
    name: str,
    prompt: int,
    output: int = 4,
    ttft_ms: float | None = 1_000.0,
    tpot_ms: float | None = 100.0,
    tokens: list[int] | None = None,
) -> Request:
    asked = {"ttft_slo_ms": ttft_ms, "tpot_slo_ms": tpot_ms}
    given = {key: value for key, value in asked.items() if value is not None}
    return request(name, tokens or [sum(name.encode())] * prompt, output, **given)


def blocking(kind: type, seed: int) -> type:
    """``kind``, with requests that are passed over now and then, as those that wait for a grammar are."""

    class Blocking(kind):
        def _handle_blocked_waiting_request(self, request: Request) -> bool:
            key = f"{seed} {self.current_step} {request.request_id}"
            return random.Random(key).random() > 0.3 and super()._handle_blocked_waiting_request(request)

    return Blocking


def settings_of(seed: int, is_async: bool) -> Settings:
    rng = random.Random(f"settings {seed}")
    return Settings(
        blocks=rng.choice((30, 45, 60, 400)),
        budget=rng.choice((32, 64, 256)),
        seqs=rng.choice((3, 8, 16)),
        caching=rng.random() < 0.7,
        long_prefill=rng.choice((0, 24)),
        is_async=is_async,
        ours={"policy": "slo"},
    )


def traffic(
    scheduler: Any,
    seed: int,
    is_async: bool,
    *,
    targets: float,
    time: Time | None = None,
    jumps: bool = True,
    asks: Callable[[], bool] = lambda: True,
) -> tuple[TimedStepper, list[Request]]:
    """Seeded arrivals, shared prefixes, aborts in any state, resets of the prefix cache, a clock that jumps
    (back as well), and steps of up to ten times the prior's length. ``targets`` is the share that has some;
    ``asks`` says whether the engine asks for the grammar of a step.
    """
    rng = random.Random(seed)
    time = time or Time()
    stepper = TimedStepper(scheduler, time, 1 + is_async, fixed_s=rng.choice((0.003, 0.03, 0.3)))
    stepper.asks = asks
    prefixes = [[100 * i + j for j in range(rng.choice((0, 40, 90)))] for i in range(4)]
    sent: list[Request] = []
    while len(sent) < 40:
        for _ in range(rng.choice((0, 0, 1, 3))):
            prompt = rng.choice(prefixes) + [rng.randrange(5000, 9000) for _ in range(rng.randrange(1, 150))]
            output = rng.randrange(1, 40)
            ttft_ms, tpot_ms = rng.choice(((100, 20), (1000, 50), (3000, None), (None, 100), (9000, 300)))
            if rng.random() >= targets:
                ttft_ms = tpot_ms = None
            sent.append(slo_request(f"r{len(sent)}", 0, output, ttft_ms, tpot_ms, tokens=prompt))
            scheduler.add_request(sent[-1])
        if sent and rng.random() < 0.1:
            stepper.abort(rng.choice(sent).request_id)
        if rng.random() < 0.02:
            scheduler.reset_prefix_cache(reset_running_requests=True)
        jump = rng.choice((-5.0, -0.01, 3.0)) if rng.random() < 0.03 else 0.0
        time.now += jump if jumps else 0.0
        if scheduler.has_unfinished_requests():
            stepper.step()
    stepper.drain()
    return stepper, sent


def ours(settings: Settings | None = None, time: Time | None = None, **arguments: Any) -> Any:
    settings = settings or Settings()
    settings.ours = {"policy": "slo", **settings.ours}
    time = time or Time()
    return build(settings, make_scheduler, clock=time, wall_clock=time, **arguments)


def kind_of(is_async: bool, seed: int) -> type:
    return blocking(AsyncSLOScheduler if is_async else SyncSLOScheduler, seed)
