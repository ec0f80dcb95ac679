"""The request scheduler under random traffic: stock order where nobody is named, and no request lost."""

from __future__ import annotations

import random
from collections import Counter
from functools import cache

import pytest

pytest.importorskip("vllm")

from arrival_order import ArrivalOrder
from request_scheduler_kit import POLICIES, blocking, settings_of, traffic
from stepped_scheduler import Settings, Stepper, build, request
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from penstock.plugins.vllm.request_scheduler import AsyncRequestScheduler, SyncRequestScheduler


@cache
def stocks(seed: int, is_async: bool) -> tuple[list, int]:
    """The steps of vLLM's own scheduler, and how often it preempted."""
    settings = settings_of(seed)
    settings.is_async = is_async
    kind = blocking(AsyncScheduler if is_async else Scheduler, seed)
    stepper, sent = traffic(build(settings, kind), seed, 2 if is_async else 1)
    return stepper.steps, sum(sample.num_preemptions for sample in sent)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("policy", [*POLICIES, "reference"])
def test_without_clients_every_step_is_stocks(policy, is_async):
    preemptions = 0
    for seed in range(4):
        more = {"unnamed_by_arrival": True} if policy == "lpm" else {}
        settings = settings_of(seed, "dlpm" if policy == "reference" else policy, **more)
        settings.is_async = is_async
        our_kind = blocking(AsyncRequestScheduler if is_async else SyncRequestScheduler, seed)
        arguments = {"order_of": lambda *_: ArrivalOrder()} if policy == "reference" else {}
        steps, preempted = stocks(seed, is_async)
        found, _ = traffic(build(settings, our_kind, **arguments), seed, 2 if is_async else 1)
        for number, (one, other) in enumerate(zip(steps, found.steps, strict=True)):
            assert one == other, f"seed {seed}, step {number}"
        preemptions += preempted
    assert preemptions > 5


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("policy", POLICIES)
def test_with_clients_no_request_is_lost_or_run_twice(policy, is_async):
    for seed in range(3):
        settings = settings_of(seed, policy)
        settings.is_async = is_async
        kind = blocking(AsyncRequestScheduler if is_async else SyncRequestScheduler, seed)
        scheduler = build(settings, kind)
        stepper, sent = traffic(scheduler, seed, 2 if is_async else 1, names=True)
        assert all(sample.is_finished() for sample in sent)
        first = Counter(new[0] for step in stepper.steps for new in step[0])
        assert set(first.values()) == {1}
        assert not scheduler.requests
        assert not scheduler.running
        assert not scheduler.waiting
        assert len(scheduler.charges) == 0
        scheduler.check_integrity()


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_storm_of_preemptions_loses_nobody_and_charges_each_prompt_once(policy, is_async):
    """Room for hardly more than one of many requests that all want to grow."""
    settings = Settings(
        blocks=16, budget=256, seqs=8, caching=False, is_async=is_async, ours={"policy": policy}
    )
    scheduler = build(settings, AsyncRequestScheduler if is_async else SyncRequestScheduler)
    sent = [request(f"r{n}", [n] * 40, 90, client_id="abc"[n % 3]) for n in range(9)]
    for sample in sent:
        scheduler.add_request(sample)
    Stepper(scheduler, 2 if is_async else 1).drain()
    assert sum(sample.num_preemptions for sample in sent) > 10
    assert all(sample.num_output_tokens == 90 for sample in sent)
    had = {row.client: (row.extend_tokens, row.output_tokens) for row in scheduler.waiting.order.clients()}
    assert [had[client] for client in "abc"] == [(3 * 40, 3 * 90)] * 3
    scheduler.check_integrity()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_clock_that_runs_backwards_loses_nobody(policy):
    rng = random.Random(5)
    now = [1e6]

    def clock():
        now[0] += rng.choice((0.01, 0.01, 5.0, -3.0, -5000.0))
        return now[0]

    scheduler = build(
        Settings(ours={"policy": policy, "client_idle_s": 1.0}), SyncRequestScheduler, clock=clock
    )
    _, sent = traffic(scheduler, 3, 1, names=True)
    assert all(sample.is_finished() for sample in sent)
    assert sum(row.output_tokens for row in scheduler.waiting.order.clients()) == sum(
        sample.num_output_tokens for sample in sent
    )
    scheduler.check_integrity()
    scheduler.waiting.order.check_integrity()


@pytest.mark.parametrize("policy", ["dlpm", "vtc"])
def test_a_client_that_names_itself_anew_for_every_request_starves_nobody(policy):
    ours = {"policy": policy, "newcomers_per_refill": 1, "quantum_tokens": 100}
    scheduler = build(Settings(budget=128, seqs=2, caching=False, ours=ours), SyncRequestScheduler)
    stepper = Stepper(scheduler)
    honest = [request(f"h{n}", [n] * 50, 1, client_id="honest") for n in range(20)]
    for sample in honest:
        scheduler.add_request(sample)
    for number in range(300):
        scheduler.add_request(request(f"f{number}", [number] * 50, 1, client_id=f"flood{number}"))
    for _ in range(70):
        for number in range(2):
            name = f"more{len(stepper.steps)}-{number}"
            scheduler.add_request(request(name, [number] * 50, 1, client_id=name))
        stepper.step()
    assert all(sample.is_finished() for sample in honest)
    assert len(list(scheduler.waiting.order.clients())) < 100
    stepper.drain()
    scheduler.check_integrity()
