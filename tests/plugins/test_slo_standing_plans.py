"""A plan that stands for several steps serves and counts as a plan for each would."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

from slo_traffic import Time, TimedStepper, kind_of, ours, settings_of, slo_request, traffic
from stepped_scheduler import Settings, build

from penstock.plugins import features, ledger
from penstock.schedulers.slo.plan import Plan
from penstock.schedulers.slo.requests import Limits

BOTH = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


@pytest.fixture(autouse=True)
def _own_process_state(monkeypatch):
    monkeypatch.setattr(ledger, "_entries", {})
    monkeypatch.delenv(features.ASKED_FOR, raising=False)


@BOTH
def test_a_plan_that_stands_for_another_step_serves_what_a_new_one_would(is_async):
    stood = 0
    for seed in range(4):
        time = Time()
        scheduler = build(settings_of(seed, is_async), kind_of(is_async, seed), clock=time, wall_clock=time)
        planner, again = scheduler.planner, scheduler.planner.again

        def compared(
            now_s: float, running: int, limits: Limits, again=again, planner=planner, scheduler=scheduler
        ) -> Plan | None:
            nonlocal stood
            stands = again(now_s, running, limits)
            if stands is not None:
                stood += 1
                live = scheduler.records.running(scheduler.running)
                new = planner.plan(now_s, live, scheduler._free_kv_tokens(), limits)
                assert new.caps == stands.caps
                assert (new.waiting, new.preempt) == (stands.waiting, stands.preempt) == ((), ())
            return stands

        planner.again = compared
        traffic(scheduler, seed, is_async, targets=1.0, time=time)
    assert stood > 20


@BOTH
def test_a_late_token_counts_although_later_ones_catch_up(is_async):
    """Of a batch that goes on as planned, tokens are noted only when one may have been late."""
    time = Time()
    scheduler = ours(Settings(budget=256, blocks=400, is_async=is_async), time)
    stepper = TimedStepper(scheduler, time, fixed_s=0.02, token_s=0.0)
    scheduler.add_request(slo_request("stalled", 40, output=200, ttft_ms=30.0, tpot_ms=22.0))
    scheduler.add_request(slo_request("patient", 40, output=200, ttft_ms=5_000.0, tpot_ms=500.0))
    noted = []
    note = scheduler.records.produced
    scheduler.records.produced = lambda *args: (noted.append(time()), note(*args))
    for _ in range(6):
        stepper.step()
    time.now += 0.05
    stepper.step()
    stepper.fixed_s = 0.001
    stepper.drain()
    tiers = scheduler._stats.payload()["slo"]["tiers"]
    assert [tier[:2] for tier in tiers.values() if tier[0]] == [[1, 0], [1, 1]]
    assert len(noted) < len(stepper.steps) / 4
