"""What a waiting order need not know during a step it hears of behind the model: once, in the order in which
it came up, and whether the engine leaves time for it or not.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

pytest.importorskip("vllm")

from arrival_order import ArrivalOrder
from request_scheduler_kit import POLICIES, blocking, ours, settings_of, traffic
from stepped_scheduler import Settings, Stepper, build, request
from vllm.v1.request import RequestStatus

from penstock.plugins.vllm import charged_queue
from penstock.plugins.vllm.request_scheduler import AsyncRequestScheduler, SyncRequestScheduler

BOTH = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


class Noted(ArrivalOrder):
    """Notes who stands in line, and every call by name."""

    def __init__(self) -> None:
        super().__init__(expected=5)
        self.heard: list[tuple[str, str]] = []

    def add(self, job: Any) -> None:
        self.heard.append(("add", job.request_id))
        super().add(job)

    def pop(self) -> Any:
        job = super().pop()
        self.heard.append(("pop", job.request_id))
        return job

    def observe_output(self, client: str, tokens: int) -> None:
        self.heard.append(("end", client))
        super().observe_output(client, tokens)


def filled(is_async: bool, waiting: int = 6) -> tuple[Any, Noted, Stepper]:
    """Two requests run, others wait at their seats; each bears the name of its client."""
    order = Noted()
    scheduler = ours(Settings(blocks=400, budget=256, seqs=2, is_async=is_async), order)
    for number in range(2 + waiting):
        scheduler.add_request(request(f"r{number}", [number] * 20, 8 + number, client_id=f"r{number}"))
    stepper = Stepper(scheduler, depth=1 + is_async)
    for _ in range(3):
        stepper.step()
    order.heard.clear()
    return scheduler, order, stepper


@pytest.fixture
def long_lines(monkeypatch):
    """Every line counts as long."""
    monkeypatch.setattr(charged_queue, "SHORT_LINE", -1)


@BOTH
@pytest.mark.parametrize("asked", [0.0, 0.6])
@pytest.mark.parametrize("policy", POLICIES)
def test_long_lines_lose_nobody_and_charge_for_all_however_often_the_engine_asks(
    policy, is_async, asked, long_lines
):
    for seed in range(2):
        settings = settings_of(seed, policy)
        settings.is_async = is_async
        kind = blocking(AsyncRequestScheduler if is_async else SyncRequestScheduler, seed)
        scheduler = build(settings, kind)
        rng = random.Random(f"asks {seed}")
        _, sent = traffic(
            scheduler, seed, 1 + is_async, names=True, asks=lambda rng=rng: rng.random() < asked
        )
        assert all(sample.is_finished() for sample in sent)
        assert not scheduler.waiting.arrivals
        assert not len(scheduler._later)
        assert len(scheduler.charges) == 0
        generated: Counter[str] = Counter()
        for sample in sent:
            generated[sample.sampling_params.extra_args["client_id"]] += sample.num_output_tokens
        had = {one.client: one.output_tokens for one in scheduler.waiting.order.clients()}
        assert {client: tokens for client, tokens in had.items() if tokens} == +generated
        scheduler.check_integrity()


@BOTH
@pytest.mark.parametrize("policy", POLICIES)
def test_without_clients_a_long_line_is_served_as_stock_serves_it(policy, is_async, long_lines):
    for seed in range(2):
        more = {"unnamed_by_arrival": True} if policy == "lpm" else {}
        settings = settings_of(seed, policy, **more)
        settings.is_async = is_async
        stock, _ = traffic(build(settings), seed, 1 + is_async)
        rng = random.Random(f"asks {seed}")
        kind = AsyncRequestScheduler if is_async else SyncRequestScheduler
        found, _ = traffic(build(settings, kind), seed, 1 + is_async, asks=lambda rng=rng: rng.random() < 0.7)
        assert found.steps == stock.steps


@BOTH
def test_a_step_that_admits_one_tells_the_order_once_the_model_computes(is_async, long_lines):
    scheduler, order, stepper = filled(is_async)
    inside: list[list[tuple[str, str]]] = []
    ask = scheduler.get_grammar_bitmask

    def asked(output: Any) -> Any:
        inside.append(order.heard.copy())
        order.heard.clear()
        found = ask(output)
        inside.append(order.heard.copy())
        order.heard.clear()
        return found

    scheduler.get_grammar_bitmask = asked
    scheduler.add_request(request("late", [77] * 20, client_id="late"))
    while "r2" not in [one.request_id for one in scheduler.running]:
        stepper.step()
    assert ("add", "late") in [call for calls in inside[1::2] for call in calls]
    assert inside[-1] == [("end", "r0"), ("pop", "r2")]
    assert not any(inside[::2])
    assert order.extend["r2"] == 20
    assert order.reserved["r2"] == 5


@BOTH
def test_the_second_of_a_step_is_picked_by_an_order_that_heard_of_the_first(is_async, long_lines):
    scheduler, order, stepper = filled(is_async)
    for name in ("r0", "r1"):
        stepper.abort(name)
    order.heard.clear()
    order.calls.clear()
    scheduler.schedule()
    assert [one.request_id for one in scheduler.running] == ["r2", "r3"]
    assert order.calls == [("pop", "r2", 0), ("extend", "r2", 20)]
    assert [job.request_id for job in scheduler.waiting.order][:1] == ["r4"]
    assert order.calls[2:] == [("pop", "r3", 0), ("extend", "r3", 20)]


@BOTH
def test_who_is_aborted_at_the_door_was_never_there(is_async, long_lines):
    scheduler, order, stepper = filled(is_async)
    scheduler.add_request(request("gone", [9] * 20, client_id="gone"))
    assert (len(scheduler.waiting), len(order.jobs)) == (7, 6)
    stepper.abort("gone")
    stepper.step()
    assert ("add", "gone") not in order.heard
    scheduler.check_integrity()


@BOTH
def test_an_id_that_has_just_ended_may_come_again(is_async, long_lines):
    scheduler, order, stepper = filled(is_async)
    for _ in range(3):
        stepper.abort("r7")
        scheduler.add_request(request("r7", [7] * 30, 3, client_id="again"))
        assert list(scheduler.waiting)[-1].request_id == "r7"
    while "r0" in scheduler.requests:
        stepper.step()
    scheduler.add_request(request("r0", [7] * 30, 3, client_id="again"))
    stepper.drain()
    assert order.output["r0"] == 8
    assert order.extend["again"] == 60 - 16
    assert order.output["again"] == 6
    scheduler.check_integrity()


@BOTH
def test_when_nothing_runs_nothing_is_left_for_later(is_async, long_lines):
    scheduler, order, stepper = filled(is_async)
    scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    assert not any(order.reserved.values())
    assert len(scheduler.charges) == len(order.jobs) == 0
    stepper.drain()


@BOTH
def test_in_a_short_line_who_came_last_may_be_next(is_async):
    """The one client with credit has only just come."""
    policy = {"policy": "dlpm", "quantum_tokens": 10}
    settings = Settings(blocks=400, budget=64, seqs=2, is_async=is_async, ours=policy)
    scheduler = ours(settings)
    for number in range(6):
        scheduler.add_request(request(f"r{number}", [number] * 20, 6, client_id="flood"))
    stepper = Stepper(scheduler, depth=1 + is_async)
    for _ in range(3):
        stepper.step()
    stepper.abort("r0")
    scheduler.add_request(request("newcomer", [77] * 20, client_id="newcomer"))
    output = stepper.step()
    assert [new.req_id for new in output.scheduled_new_reqs] == ["newcomer"]


def test_heads_are_looked_up_before_the_step_that_picks_one(long_lines):
    scheduler = ours(Settings(blocks=400, budget=256, seqs=2, ours={"policy": "dlpm"}))
    for number in range(8):
        scheduler.add_request(request(f"r{number}", [number] * 40, 5 + number, client_id=f"c{number % 3}"))
    stepper = Stepper(scheduler)
    looked_up: list[str] = []
    look_up = scheduler._cached.tokens_of
    scheduler._cached.tokens_of = lambda one, *more: looked_up.append(one.request_id) or look_up(one, *more)
    behind = 0
    schedule = scheduler.schedule

    def scheduled() -> Any:
        nonlocal behind
        behind += len(looked_up)
        looked_up.clear()
        output = schedule()
        if len(stepper.steps) > 1 and len(output.scheduled_new_reqs) == 1:
            assert not looked_up
        return output

    scheduler.schedule = scheduled
    stepper.drain()
    assert behind > 8
