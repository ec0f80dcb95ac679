"""The request scheduler inside vLLM: aborts, configuration, what is passed on, who asks."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("vllm")

from arrival_order import ArrivalOrder
from loading_connector import LoadingConnector
from request_scheduler_kit import PASSES_OVER, POLICIES, ours
from stepped_scheduler import Settings, Stepper, build, request
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from penstock.plugins.configuration import ConfigurationError
from penstock.plugins.vllm.request_scheduler import (
    AsyncRequestScheduler,
    SyncRequestScheduler,
    make_scheduler,
)


def test_a_request_that_loads_can_be_aborted():
    scheduler = ours(Settings())
    scheduler.connector = LoadingConnector(48, later=True)
    scheduler.add_request(request("r", list(range(80)), client_id="a"))
    stepper = Stepper(scheduler)
    stepper.step()
    stepper.abort("r")
    assert len(scheduler.charges) == 0
    scheduler.check_integrity()


STATES = {
    "waiting": (0, RequestStatus.WAITING),
    "in the middle of its prefill": (1, RequestStatus.RUNNING),
    "decoding": (5, RequestStatus.RUNNING),
}


@pytest.mark.parametrize(("steps", "status"), STATES.values(), ids=STATES)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_request_aborted_in_any_state_leaves_nothing(policy, steps, status):
    scheduler = ours(Settings(budget=32, ours={"policy": policy}))
    sample = request("r", list(range(80)), 20, client_id="a")
    scheduler.add_request(sample)
    stepper = Stepper(scheduler)
    for _ in range(steps):
        stepper.step()
    assert sample.status == status
    stepper.abort("r")
    assert len(scheduler.charges) == len(scheduler.waiting) == len(scheduler.waiting.order) == 0
    scheduler.check_integrity()


def test_a_preempted_request_can_be_aborted():
    scheduler = ours(Settings(blocks=14, budget=256, caching=False))
    samples = [request(name, [7] * 90, 60, client_id=name) for name in ("r0", "r1")]
    for sample in samples:
        scheduler.add_request(sample)
    stepper = Stepper(scheduler)
    while samples[1].status != RequestStatus.PREEMPTED:
        stepper.step()
    stepper.abort("r1")
    scheduler.check_integrity()
    stepper.drain()
    assert len(scheduler.charges) == 0


def test_a_finished_request_is_forgotten_once_in_flight_steps_return():
    settings = Settings(is_async=True)
    scheduler = ours(settings)
    scheduler.add_request(request("r", [7] * 20, 9, client_id="a"))
    stepper = Stepper(scheduler, depth=2)
    stepper.step()
    stepper.step()
    stepper.abort("r")
    while stepper.in_flight:
        stepper.receive()
    assert len(scheduler.charges) == 0
    scheduler.check_integrity()


def test_the_factory_follows_the_engine():
    assert type(ours(Settings())) is SyncRequestScheduler
    assert type(ours(Settings(is_async=True))) is AsyncRequestScheduler


def test_priority_scheduling_is_a_contradiction():
    config = Settings().config()
    config.scheduler_config.policy = "priority"
    with pytest.raises(ConfigurationError, match="--scheduling-policy: given priority"):
        make_scheduler(vllm_config=config)


def test_waiting_requests_and_running_ones_keep_the_number_of_tokens_that_vllm_chose():
    """A smaller number for a waiting request would end the admissions of a step, or break padded drafts."""
    scheduler = ours(Settings())
    sample = request("r", list(range(80)))
    for status in (RequestStatus.WAITING, RequestStatus.PREEMPTED, RequestStatus.RUNNING):
        sample.status = status
        assert scheduler._reserve_prefill_lookahead(sample, 0, 33) == 33


def test_arguments_that_another_version_adds_are_passed_on():
    heard: list[tuple[Any, ...]] = []

    class Later(Scheduler):
        def schedule(self, *args, **kwargs):
            heard.append(("schedule", args, kwargs))
            return super().schedule()

        def _free_request(self, request, delay_free_blocks=False, extra=None):
            heard.append(("free", delay_free_blocks, extra))

        def _update_request_with_output(self, request, new_token_ids, is_stale=False, extra=None):
            heard.append(("update", is_stale, extra))
            return new_token_ids, False

    from penstock.plugins.vllm.request_scheduler import RequestScheduling

    class Adapter(RequestScheduling, Later):
        pass

    scheduler = build(Settings(), Adapter)
    scheduler.schedule(True, more=1)
    sample = request("r", [1])
    scheduler._update_request_with_output(sample, [5], True, extra=2)
    scheduler._free_request(sample, True, extra=3)
    assert heard == [("schedule", (True,), {"more": 1}), ("update", True, 2), ("free", True, 3)]


@PASSES_OVER
def test_an_order_that_serves_nobody_only_spins():
    class Stuck(SyncRequestScheduler):
        def _handle_blocked_waiting_request(self, request: Request) -> bool:
            return False

    scheduler = build(Settings(), Stuck)
    scheduler.add_request(request("r", [7] * 20, client_id="a"))
    stepper = Stepper(scheduler)
    for _ in range(50):
        assert stepper.step().total_num_scheduled_tokens == 0
    scheduler.check_integrity()
    assert len(scheduler.waiting) == 1


def test_looking_up_a_cached_prefix_changes_nothing():
    scheduler = ours(Settings())
    stepper = Stepper(scheduler)
    prompt = list(range(100))
    scheduler.add_request(request("warm", prompt))
    stepper.drain()
    scheduler.add_request(request("waits", [*prompt, 1]))
    pool = scheduler.kv_cache_manager.block_pool
    before = [(b.block_id, b.ref_cnt) for b in pool.blocks], pool.get_num_free_blocks()
    free = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
    assert scheduler._cached_prefix("waits") == 96
    assert ([(b.block_id, b.ref_cnt) for b in pool.blocks], pool.get_num_free_blocks()) == before
    assert [block.block_id for block in pool.free_block_queue.get_all_free_blocks()] == free


def test_time_is_the_clock_s(caplog):
    now = [1000.0]
    order = ArrivalOrder()
    scheduler = ours(Settings(), order, clock=lambda: now[0])
    scheduler.add_request(request("r", [7] * 20, client_id="a"))
    assert order.jobs[0].arrival_s == 1000.0
    now[0] = 900.0
    scheduler.add_request(request("s", [7] * 20, client_id="a"))
    Stepper(scheduler).drain()
    assert order.extend == {"a": 40 - 16}


@pytest.mark.parametrize(
    ("extra", "field"),
    [
        ({"client_id": "x" * 500}, "client_id"),
        ({"client_id": 7}, "client_id"),
        ({"client_id": "a", "weight": float("nan")}, "weight"),
        ({"client_id": "a", "weight": -1}, "weight"),
        ({"client_id": "a", "ttft_slo_ms": 10**18}, "ttft_slo_ms"),
        ({"client_id": "a", "tpot_slo_ms": "fast"}, "tpot_slo_ms"),
    ],
)
def test_a_bad_value_becomes_the_default_with_one_warning(extra, field, caplog):
    order = ArrivalOrder()
    scheduler = ours(Settings(), order)
    for name in ("r0", "r1"):
        scheduler.add_request(request(name, [7] * 20, **extra))
    assert {job.client for job in order.jobs} == {"a" if field != "client_id" else ""}
    assert {job.weight for job in order.jobs} == {1.0}
    (warning,) = [record for record in caplog.records if field in record.getMessage()]
    assert warning.levelname == "WARNING"


def test_the_operator_s_weight_outranks_the_request_s():
    order = ArrivalOrder()
    scheduler = ours(Settings(ours={"weights": {"a": 3.0}}), order)
    for client in ("a", "b"):
        scheduler.add_request(request(client, [7] * 20, client_id=client, weight=2.0))
    assert [job.weight for job in order.jobs] == [3.0, 2.0]


def test_one_client_with_credit_does_not_take_a_whole_step():
    scheduler = ours(Settings(budget=256, seqs=16, ours={"policy": "dlpm", "quantum_tokens": 50}))
    for name in ("a0", "a1", "a2", "a3", "b0"):
        scheduler.add_request(request(name, [hash(name) % 1000] * 60, client_id=name[0]))
    output = Stepper(scheduler).step()
    assert "b0" in list(output.num_scheduled_tokens)[:2]
