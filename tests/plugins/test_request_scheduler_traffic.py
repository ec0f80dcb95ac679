"""The request scheduler under random traffic: stock order where nobody is named, and no request lost."""

from __future__ import annotations

from collections import Counter

import pytest

pytest.importorskip("vllm")

from arrival_order import ArrivalOrder
from request_scheduler_kit import POLICIES, blocking, settings_of, traffic
from stepped_scheduler import build
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from penstock.plugins import features, ledger
from penstock.plugins.vllm.request_scheduler import AsyncRequestScheduler, SyncRequestScheduler


@pytest.fixture(autouse=True)
def _own_process_state(monkeypatch):
    monkeypatch.setattr(ledger, "_entries", {})
    monkeypatch.delenv(features.ASKED_FOR, raising=False)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("policy", [*POLICIES, "reference"])
def test_without_clients_every_step_is_stocks(policy, is_async):
    preemptions = 0
    for seed in range(6):
        more = {"unnamed_by_arrival": True} if policy == "lpm" else {}
        settings = settings_of(seed, "dlpm" if policy == "reference" else policy, **more)
        settings.is_async = is_async
        depth = 2 if is_async else 1
        stock_kind = blocking(AsyncScheduler if is_async else Scheduler, seed)
        our_kind = blocking(AsyncRequestScheduler if is_async else SyncRequestScheduler, seed)
        arguments = {"order_of": lambda *_: ArrivalOrder()} if policy == "reference" else {}
        stock, sent = traffic(build(settings, stock_kind), seed, depth)
        found, _ = traffic(build(settings, our_kind, **arguments), seed, depth)
        for number, (one, other) in enumerate(zip(stock.steps, found.steps, strict=True)):
            assert one == other, f"seed {seed}, step {number}"
        preemptions += sum(sample.num_preemptions for sample in sent)
    assert preemptions > 5


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("policy", POLICIES)
def test_with_clients_no_request_is_lost_or_run_twice(policy, is_async):
    for seed in range(4):
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
