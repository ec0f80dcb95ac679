"""A plan that stands for several steps serves and counts as a plan for each would."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

pytest.importorskip("vllm")

from slo_traffic import Time, TimedStepper, kind_of, ours, settings_of, slo_request, traffic
from stepped_scheduler import Settings, build

from penstock.schedulers.slo.decodes import BEGIN, Columns, foreseen
from penstock.schedulers.slo.plan import Plan
from penstock.schedulers.slo.step_time import StepFeatures

BOTH = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


@BOTH
def test_the_plan_of_a_batch_that_decodes_on_serves_what_a_plan_by_slack_would(is_async):
    stood = 0
    for seed in range(2):
        time = Time()
        scheduler = build(settings_of(seed, is_async), kind_of(is_async, seed), clock=time, wall_clock=time)
        planner, whole = scheduler.planner, scheduler.planner.whole

        def compared(
            now_s: float, *arguments: Any, whole=whole, planner=planner, scheduler=scheduler
        ) -> Plan | None:
            nonlocal stood
            stands = whole(now_s, *arguments)
            live = scheduler.records.running(scheduler.running, now_s)
            # One that has its last token in flight keeps its seat; the plan by slack counts that as free.
            if stands is not None and len(live) == len(scheduler.running):
                stood += 1
                by_slack = planner.plan(now_s, live, *arguments[1:])
                assert by_slack.caps == stands.caps
                assert (by_slack.waiting, by_slack.preempt) == (stands.waiting, stands.preempt) == ((), ())
            return stands

        planner.whole = compared
        traffic(scheduler, seed, is_async, targets=1.0, time=time)
    assert stood > 20


@BOTH
def test_what_a_batch_that_decodes_on_has_computed_is_counted_on(is_async):
    """Steps are learned from by the tokens that they attend to, whether summed up or counted on."""
    counted = 0
    for seed in range(2):
        time = Time()
        scheduler = build(settings_of(seed, is_async), kind_of(is_async, seed), clock=time, wall_clock=time)
        features_of, went_on = scheduler._features, scheduler._decoding.went_on

        def compared(output: Any, features_of=features_of, scheduler=scheduler) -> StepFeatures:
            found = features_of(output)
            computed = sum(scheduler.requests[one].num_computed_tokens for one in output.num_scheduled_tokens)
            assert found.context_tokens == computed - output.total_num_scheduled_tokens
            return found

        def on(went_on=went_on, batch=scheduler._decoding) -> int:
            nonlocal counted
            counted += batch._computed is not None
            return went_on()

        scheduler._features = compared
        scheduler._decoding.went_on = on
        traffic(scheduler, seed, is_async, targets=1.0, time=time)
    assert counted > 20


@BOTH
def test_requests_that_are_not_looked_at_again_are_planned_as_they_are(is_async):
    """A plan for those who come in beside a batch that decodes on is made from counted records."""
    known = 0
    for seed in range(3):
        time = Time()
        scheduler = build(settings_of(seed, is_async), kind_of(is_async, seed), clock=time, wall_clock=time)
        columns_of = scheduler._decoding.columns

        def compared(output_s: float, columns_of=columns_of, scheduler=scheduler) -> Columns:
            nonlocal known
            found = columns_of(output_s)
            counted = [msgspec.structs.astuple(found.request(place)) for place in range(len(found))]
            running = scheduler.running[: len(scheduler._decoding.names)]
            live = scheduler.records.running(running, scheduler._output_s, output_s)
            assert counted == [msgspec.structs.astuple(one) for one in live]
            fresh = Columns.of([foreseen(one, output_s) for one in live], scheduler.config.slo.pace)
            # When a first token that is on the way comes may be foreseen, and is again at the next look.
            begun = np.array([one.first_token_s is not None for one in live], np.bool_)
            np.testing.assert_array_equal(found.values[:BEGIN], fresh.values[:BEGIN])
            np.testing.assert_array_equal(found.values[:, begun], fresh.values[:, begun])
            known += len(found)
            return found

        scheduler._decoding.columns = compared
        traffic(scheduler, seed, is_async, targets=1.0, time=time)
    assert known > 20


@BOTH
@pytest.mark.parametrize("place", [0, -1])
def test_a_running_request_that_is_set_back_is_planned_anew(is_async, place):
    """As vLLM does where a load of its KV cache failed."""
    time = Time()
    scheduler = ours(Settings(budget=256, blocks=400, is_async=is_async), time)
    stepper = TimedStepper(scheduler, time, depth=1 + is_async)
    for name in ("a", "b", "c"):
        scheduler.add_request(slo_request(name, 60, output=200))
    for _ in range(8):
        stepper.step()
    assert scheduler.plan.whole
    while stepper.in_flight:
        stepper.receive()
    request = scheduler.running[place]
    scheduler.recompute_kv_load_failures = True
    (blocks,) = scheduler.kv_cache_manager.get_block_ids(request.request_id)
    scheduler._handle_invalid_blocks({blocks[0]}, {})
    assert request.num_computed_tokens == 0
    served = [stepper.step().total_num_scheduled_tokens for _ in range(3)]
    assert sum(served) >= 48 + 3
    stepper.step()
    assert scheduler.plan.whole


@BOTH
def test_a_late_token_counts_although_later_ones_catch_up(is_async):
    """Of a batch that goes on as planned, tokens are noted only when one may have been late."""
    time = Time()
    scheduler = ours(Settings(budget=256, blocks=400, is_async=is_async), time)
    stepper = TimedStepper(scheduler, time, fixed_s=0.02, token_s=0.0)
    scheduler.add_request(slo_request("stalled", 40, output=200, ttft_ms=30.0, tpot_ms=22.0))
    scheduler.add_request(slo_request("patient", 40, output=200, ttft_ms=5_000.0, tpot_ms=500.0))
    noted = []
    note = scheduler.records._note
    scheduler.records._note = lambda *args: (noted.append(len(args[0])), note(*args))[1]
    for _ in range(6):
        stepper.step()
    time.now += 0.05
    stepper.step()
    stepper.fixed_s = 0.001
    stepper.drain()
    tiers = scheduler._stats.payload()["tiers"]
    assert [tier[:2] for tier in tiers.values() if tier[0]] == [[1, 0], [1, 1]]
    assert sum(noted) < len(stepper.steps) / 2
