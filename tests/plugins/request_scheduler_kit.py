"""Schedulers under seeded traffic, for the tests of the request scheduler."""

from __future__ import annotations

import random
from typing import Any

import pytest
from arrival_order import ArrivalOrder
from stepped_scheduler import Settings, Stepper, build, request
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from penstock.plugins.vllm.request_scheduler import make_scheduler

POLICIES = ("dlpm", "vtc", "lpm", "fcfs")

PASSES_OVER = pytest.mark.skipif(
    not hasattr(Scheduler, "_handle_blocked_waiting_request"),
    reason="vLLM 0.30 asks nobody whether to pass over a request, and has a queue of its own for those",
)


def ours(settings: Settings, order: ArrivalOrder | None = None, **arguments: Any) -> Any:
    if order is not None:
        arguments["order_of"] = lambda *_: order
    return build(settings, make_scheduler, **arguments)


def blocking(kind: type, seed: int) -> type:
    """``kind``, with requests that are passed over now and then, as those that wait for a grammar are."""

    class Blocking(kind):
        def _handle_blocked_waiting_request(self, request: Request) -> bool:
            key = f"{seed} {self.current_step} {request.request_id}"
            return random.Random(key).random() > 0.3 and super()._handle_blocked_waiting_request(request)

    return Blocking


def traffic(
    scheduler: Any, seed: int, depth: int, names: bool = False, **more: Any
) -> tuple[Stepper, list[Request]]:
    """Seeded arrivals, shared prefixes, aborts of requests in any state, and resets of the prefix cache."""
    rng = random.Random(seed)
    stepper = Stepper(scheduler, depth, **more)
    prefixes = [[100 * i + j for j in range(rng.choice((0, 40, 90)))] for i in range(4)]
    sent: list[Request] = []
    while len(sent) < 40:
        for _ in range(rng.choice((0, 0, 1, 3))):
            prompt = rng.choice(prefixes) + [rng.randrange(5000, 9000) for _ in range(rng.randrange(1, 150))]
            extra = {"client_id": rng.choice("abc")} if names else {}
            sent.append(request(f"r{len(sent)}", prompt, rng.randrange(1, 40), **extra))
            scheduler.add_request(sent[-1])
        if sent and rng.random() < 0.1:
            stepper.abort(rng.choice(sent).request_id)
        if rng.random() < 0.02:
            scheduler.reset_prefix_cache(reset_running_requests=True)
        if scheduler.has_unfinished_requests():
            stepper.step()
    stepper.drain()
    return stepper, sent


def settings_of(seed: int, policy: str = "dlpm", **more: Any) -> Settings:
    rng = random.Random(f"settings {seed}")
    return Settings(
        blocks=rng.choice((30, 60, 400)),
        budget=rng.choice((32, 64, 256)),
        seqs=rng.choice((3, 8, 16)),
        caching=rng.random() < 0.7,
        long_prefill=rng.choice((0, 24)),
        ours={"policy": policy, **more},
    )
