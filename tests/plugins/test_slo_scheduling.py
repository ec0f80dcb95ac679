"""The SLO planner in vLLM's real scheduler: stock without targets, nothing lost with them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

pytest.importorskip("vllm")

from loading_connector import LoadingConnector
from prometheus_client import REGISTRY
from slo_traffic import Time, TimedStepper, blocking, kind_of, ours, settings_of, slo_request, traffic
from stepped_scheduler import Settings, build, request, token
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from penstock.patches.slo_gauges import TOTALS, slo_gauges
from penstock.plugins.configuration import ConfigurationError
from penstock.plugins.vllm.request_scheduler import make_scheduler
from penstock.plugins.vllm.slo_scheduling import AsyncSLOScheduler, SyncSLOScheduler
from penstock.schedulers.slo.plan import Plan

BOTH = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


@BOTH
def test_without_targets_every_step_is_stocks(is_async):
    preemptions = 0
    for seed in range(4):
        settings = settings_of(seed, is_async)
        stock_kind = blocking(AsyncScheduler if is_async else Scheduler, seed)
        stock, sent = traffic(build(settings, stock_kind), seed, is_async, targets=0.0)
        time = Time()
        scheduler = build(settings, kind_of(is_async, seed), clock=time, wall_clock=time)
        found, _ = traffic(scheduler, seed, is_async, targets=0.0, time=time)
        for number, (one, other) in enumerate(zip(stock.steps, found.steps, strict=True)):
            assert one == other, f"seed {seed}, step {number}"
        preemptions += sum(sample.num_preemptions for sample in sent)
    assert preemptions > 5


def test_a_preempted_request_that_ends_with_a_token_in_flight_leaves_the_queue():
    """vLLM frees it first, and then takes it from its queue."""
    scheduler = ours(Settings(blocks=400, is_async=True), Time())
    sample, other = slo_request("preempted", 40), slo_request("other", 40)
    for one in (sample, other):
        scheduler.add_request(one)
    scheduler.planner.leave(sample.request_id)
    scheduler.waiting.remove_requests([sample])
    assert list(scheduler.waiting) == [other]
    scheduler.waiting.check_integrity()


@BOTH
@pytest.mark.parametrize("share", [0.6, 1.0])
def test_with_targets_no_request_is_lost_or_runs_twice(is_async, share):
    thrown_out = preempted = 0
    for seed in range(4):
        time = Time()
        settings = settings_of(seed, is_async)
        scheduler = build(settings, kind_of(is_async, seed), clock=time, wall_clock=time)
        stepper, sent = traffic(scheduler, seed, is_async, targets=share, time=time)
        first = Counter(new[0] for step in stepper.steps for new in step[0])
        assert set(first.values()) == {1}
        for sample in sent:
            assert sample.is_finished()
            answer = [
                token(sample.request_id, sample.num_prompt_tokens + i) for i in range(sample.max_tokens)
            ]
            given = list(sample.output_token_ids)
            assert given == answer[: len(given)]
            if sample.status != RequestStatus.FINISHED_ABORTED:
                assert given == answer
        assert not scheduler.requests
        assert not scheduler.running
        assert not scheduler.waiting
        assert len(scheduler.records) == scheduler.records.with_targets == 0
        scheduler.check_integrity()
        thrown_out += scheduler.planner.counters.preempted
        preempted += sum(sample.num_preemptions for sample in sent)
    assert preempted > 5
    if share < 1:
        assert thrown_out > 0


@BOTH
def test_nobody_in_the_batch_is_passed_over_for_longer_than_the_bound(is_async):
    longest = 0
    for seed in range(4):
        time = Time()
        settings = settings_of(seed, is_async)
        settings.blocks = 400
        settings.ours["slo"] = {"most_skipped_steps": 5, "patience_s": 1.0}
        scheduler = build(
            settings, AsyncSLOScheduler if is_async else SyncSLOScheduler, clock=time, wall_clock=time
        )
        stepper, _ = traffic(scheduler, seed, is_async, targets=0.6, time=time, jumps=False)
        longest = max(longest, stepper.longest_passed_over)
    # A request whose last token is in flight, or whose output has not come, cannot run.
    assert 1 <= longest <= 5 + is_async


def test_the_tighter_deadline_is_served_first():
    scheduler = ours(Settings(budget=64, seqs=1))
    for name, ttft_ms in (("late", 60_000.0), ("soon", 2_000.0)):
        scheduler.add_request(slo_request(name, 60, ttft_ms=ttft_ms))
    scheduler.add_request(request("whenever", [7] * 60))
    stepper = TimedStepper(scheduler, scheduler.clock)
    order = []
    while scheduler.has_unfinished_requests():
        order += [new.req_id for new in stepper.step().scheduled_new_reqs]
    assert order == ["soon", "late", "whenever"]


@pytest.mark.parametrize(("lent_step_s", "least", "most"), [(0.0, 1, 320), (0.1, 320, 800)])
def test_a_long_prompt_is_cut_so_that_a_decode_keeps_its_pace(lent_step_s, least, most):
    time = Time()
    settings = Settings(budget=1024, blocks=400, ours={"slo": {"lent_step_s": lent_step_s}})
    scheduler = ours(settings, time)
    stepper = TimedStepper(scheduler, time, fixed_s=0.02, token_s=1e-4)
    for number in range(40):
        scheduler.add_request(slo_request(f"warm{number}", 10 + 20 * number, output=4))
        stepper.drain()
    scheduler.add_request(slo_request("decodes", 20, output=60, ttft_ms=60_000.0, tpot_ms=50.0))
    stepper.step()
    scheduler.add_request(slo_request("long", 900, ttft_ms=60_000.0))
    assert least <= stepper.step().num_scheduled_tokens["long"] < most
    assert scheduler.max_num_scheduled_tokens == 1024
    stepper.drain()
    requests, attained, tokens, attained_tokens = scheduler._stats.payload()["tiers"]["50 ms"]
    assert (requests, attained, tokens, attained_tokens) == (1, 1, 80, 80)


def test_a_best_effort_request_is_thrown_out_for_one_with_a_target_and_resumes():
    time = Time()
    scheduler = ours(Settings(budget=256, blocks=14, caching=False, seqs=4), time)
    stepper = TimedStepper(scheduler, time)
    free = request("free", [7] * 120, 60)
    scheduler.add_request(free)
    for _ in range(4):
        stepper.step()
    scheduler.add_request(slo_request("urgent", 120, output=4, ttft_ms=1_000.0))
    output = stepper.step()
    assert output.preempted_req_ids == {"free"}
    assert [new.req_id for new in output.scheduled_new_reqs] == ["urgent"]
    stepper.drain()
    assert free.num_output_tokens == 60
    scheduler.check_integrity()


STATES = {
    "waiting": (0, RequestStatus.WAITING),
    "in the middle of its prefill": (1, RequestStatus.RUNNING),
    "decoding": (8, RequestStatus.RUNNING),
}


@BOTH
@pytest.mark.parametrize(("steps", "status"), STATES.values(), ids=STATES)
def test_a_request_aborted_in_any_state_leaves_nothing(steps, status, is_async):
    time = Time()
    scheduler = ours(Settings(budget=32, is_async=is_async), time)
    sample = slo_request("r", 80, output=20)
    scheduler.add_request(sample)
    stepper = TimedStepper(scheduler, time, depth=1 + is_async)
    for _ in range(steps):
        stepper.step()
    assert sample.status == status
    stepper.abort("r")
    while stepper.in_flight:
        stepper.receive()
    assert len(scheduler.records) == len(scheduler.waiting) == len(scheduler.planner.backlog) == 0
    assert scheduler.records.with_targets == scheduler.planner.backlog.with_targets == 0
    assert scheduler._stats.payload()["tiers"]["100 ms"][0] == 0
    scheduler.check_integrity()


def test_a_plan_that_serves_nobody_is_not_made_twice():
    class Nobody:
        def __init__(self, planner: Any) -> None:
            self.planner = planner

        def __getattr__(self, name: str) -> Any:
            return getattr(self.planner, name)

        def plan(self, *_: Any) -> Plan:
            return Plan(active=True, step_tokens=1)

    scheduler = ours()
    scheduler.planner = Nobody(scheduler.planner)
    scheduler.add_request(slo_request("r", 40, output=3))
    stepper = TimedStepper(scheduler, scheduler.clock)
    stepper.drain(limit=40)
    assert scheduler._stats.yielded_steps > 0


def test_a_request_larger_than_what_the_planner_would_reserve_is_served():
    scheduler = ours(Settings(blocks=12, budget=64))
    scheduler.add_request(slo_request("r", 150, output=8))
    TimedStepper(scheduler, scheduler.clock).drain(limit=300)


@pytest.mark.parametrize("factor", [10.0, 0.1])
def test_a_prior_that_is_ten_times_wrong_is_corrected(factor):
    time = Time()
    scheduler = ours(Settings(budget=256, blocks=400), time)
    stepper = TimedStepper(scheduler, time, fixed_s=0.0275 * factor, token_s=4e-5 * factor)
    for number in range(12):
        scheduler.add_request(slo_request(f"r{number}", 100, output=8, ttft_ms=60_000.0))
    stepper.drain()
    assert scheduler.planner.model.error() < 0.1


@BOTH
def test_step_times_are_those_between_the_ends_of_steps(is_async):
    time = Time()
    scheduler = ours(Settings(budget=256, is_async=is_async), time)
    stepper = TimedStepper(scheduler, time, depth=1 + is_async, fixed_s=0.03, token_s=0.0)
    for number in range(4):
        scheduler.add_request(slo_request(f"r{number}", 40, output=12))
    stepper.drain()
    measured = scheduler._stats.measured_s
    assert measured == pytest.approx(0.03 * stepper.computed_steps, rel=1e-6)
    assert scheduler._steps.left_s(time()) == 0


def test_targets_of_the_deployment_apply_to_requests_that_name_none():
    settings = Settings(ours={"default_ttft_slo_ms": 500.0, "default_tpot_slo_ms": 40.0})
    scheduler = ours(settings)
    scheduler.add_request(request("plain", [7] * 20))
    scheduler.add_request(request("own", [7] * 20, tpot_slo_ms=80.0))
    scheduler.waiting.join()
    plain, own = (scheduler.planner.backlog.get(name).targets for name in ("plain", "own"))
    assert (plain.ttft_s, plain.tpot_s) == (0.5, 0.04)
    assert (own.ttft_s, own.tpot_s) == (float("inf"), 0.08)


def test_time_on_the_way_from_the_front_end_counts():
    time = Time(100.0)
    scheduler = build(Settings(ours={"policy": "slo"}), make_scheduler, clock=time, wall_clock=lambda: 5000.0)
    for name, arrival in (("near", 4999.5), ("other clock", 17.0), ("future", 5001.0)):
        sample = slo_request(name, 20)
        sample.arrival_time = arrival
        scheduler.add_request(sample)
    scheduler.waiting.join()
    found = {job.request_id: job.arrival_s for job in scheduler.planner.backlog}
    assert found == {"near": 99.5, "other clock": 100.0, "future": 100.0}


def test_a_padded_draft_is_taken_whole_or_not_at_all():
    """vLLM asserts later that a padded request has all its rows; 0 only keeps it waiting."""
    scheduler = ours()
    sample = slo_request("r", 80)
    sample.status = RequestStatus.PREEMPTED
    scheduler.plan = Plan(active=True, caps={"r": 1})
    assert scheduler._reserve_prefill_lookahead(sample, sample.num_tokens - 1, 5) == 5
    assert scheduler._reserve_prefill_lookahead(sample, 0, 50) == 1
    scheduler.plan = Plan(active=True, caps={})
    assert scheduler._reserve_prefill_lookahead(sample, sample.num_tokens - 1, 5) == 0


def test_a_request_that_holds_its_cache_does_not_keep_out_those_that_are_planned():
    """vLLM takes it in before all others; 0 would end the admissions of the step."""
    scheduler = ours()
    sample = slo_request("loaded", 80)
    sample.num_computed_tokens = 48
    scheduler.kv_holding_waiting.add_request(sample)
    scheduler.plan = Plan(active=True, caps={"other": 5})
    assert scheduler._reserve_prefill_lookahead(sample, 48, 32) == 1
    scheduler.plan = Plan(active=True, caps={"loaded": 7})
    assert scheduler._reserve_prefill_lookahead(sample, 48, 32) == 7


def test_a_running_request_keeps_its_drafts_and_may_be_passed_over():
    scheduler = ours()
    sample = slo_request("r", 80)
    sample.status, sample.spec_token_ids = RequestStatus.RUNNING, [1, 2, 3]
    scheduler.plan = Plan(active=True, caps={"r": 1})
    assert scheduler._reserve_prefill_lookahead(sample, 80, 4) == 4
    scheduler.plan = Plan(active=True, caps={})
    assert scheduler._reserve_prefill_lookahead(sample, 80, 4) == 0


@pytest.mark.parametrize("later", [False, True], ids=["loaded inside the step", "loaded beside steps"])
def test_a_request_whose_cache_a_connector_loads_is_served_beside_others(later):
    time = Time()
    scheduler = ours(Settings(blocks=400), time)
    scheduler.connector = LoadingConnector(48, later=later)
    samples = [slo_request(f"r{number}", 80, output=6) for number in range(4)]
    stepper = TimedStepper(scheduler, time)
    for sample in samples:
        scheduler.add_request(sample)
    for _ in range(80):
        loading = [s for s in samples if s.status == RequestStatus.WAITING_FOR_REMOTE_KVS]
        scheduler.finished_recving_kv_req_ids.update(s.request_id for s in loading)
        stepper.step()
    assert all(sample.num_output_tokens == 6 for sample in samples)
    assert len(scheduler.records) == 0
    scheduler.check_integrity()


def test_each_turn_of_a_session_has_a_deadline_of_its_own():
    time = Time()
    scheduler = ours(Settings(blocks=400), time)
    session = slo_request("s", 30, output=3, ttft_ms=500.0)
    session.resumable = True
    stepper = TimedStepper(scheduler, time)
    scheduler.add_request(session)
    for _ in range(6):
        stepper.step()
    assert session.status == RequestStatus.WAITING_FOR_STREAMING_REQ
    time.now = 100.0
    turn = slo_request("s", 20, output=3, ttft_ms=500.0)
    turn.resumable, turn.arrival_time = True, 99.9
    scheduler.add_request(turn)
    for _ in range(6):
        stepper.step()
    record = scheduler.records.of(session)
    assert record.running.arrival_s == pytest.approx(99.9)
    assert record.ttft_met
    stepper.abort("s")
    assert len(scheduler.records) == 0
    scheduler.check_integrity()


def test_what_came_of_the_targets_reaches_the_front_end_s_series():
    time = Time()
    scheduler = ours(Settings(budget=256, blocks=400), time)
    stepper = TimedStepper(scheduler, time)
    scheduler.add_request(slo_request("met", 40, output=5, ttft_ms=5_000.0, tpot_ms=200.0))
    scheduler.add_request(slo_request("missed", 40, output=5, ttft_ms=0.001, tpot_ms=200.0))
    stepper.drain()
    payload = scheduler._stats.payload()
    slo_gauges().show(payload, "7")

    def value(series: str, **labels: str) -> float | None:
        return REGISTRY.get_sample_value(f"penstock_slo_{series}", {"engine": "7", **labels})

    assert value("requests", tier="100 ms") == 2
    assert value("attained_requests", tier="100 ms") == 1
    assert value("attained_tokens", tier="100 ms") == 45
    assert value("requests", tier="25 ms") == 0
    assert value("plans") == len(stepper.steps)
    assert set(payload["totals"]) == set(TOTALS)


def test_the_factory_follows_the_engine():
    assert type(ours()) is SyncSLOScheduler
    assert type(ours(Settings(is_async=True))) is AsyncSLOScheduler


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"slo": {"replan_s": -1}}, r"scheduler\.slo\.replan_s: given -1"),
        ({"slo": {"profile": "abacus"}}, "profile: given 'abacus', allowed: a100"),
        ({"slo": {"tiers_s": [0.1, 0.05]}}, "tiers: given"),
        ({"default_tpot_slo_ms": 0.0}, r"scheduler\.default_tpot_slo_ms: given 0\.0"),
    ],
)
def test_an_impossible_value_stops_the_start_with_its_name(given, says):
    with pytest.raises(ConfigurationError, match=says):
        ours(Settings(ours=given))


def test_chunked_prefill_is_needed():
    config = Settings(ours={"policy": "slo"}).config()
    config.scheduler_config.enable_chunked_prefill = False
    with pytest.raises(ConfigurationError, match="chunked prefill"):
        make_scheduler(vllm_config=config)


@pytest.mark.parametrize("second_runner", [False, True])
def test_passing_a_decode_over_costs_nothing_where_workers_keep_its_tokens(second_runner, monkeypatch):
    config = Settings().config()
    monkeypatch.setattr(type(config), "use_v2_model_runner", second_runner)
    scheduler = build(Settings(), SyncSLOScheduler, vllm_config=config)
    assert (scheduler.planner.config.resumed_token_s == 0) is second_runner
