"""What the request scheduler charges: every prompt token once, when it is computed, and nothing else."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

pytest.importorskip("vllm")

from arrival_order import ArrivalOrder
from loading_connector import LoadingConnector
from request_scheduler_kit import PASSES_OVER, ours, settings_of, traffic
from stepped_scheduler import HASHER, Settings, Stepper, build, request
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request, RequestStatus

from penstock.plugins.vllm.charging import Charges
from penstock.plugins.vllm.request_scheduler import AsyncRequestScheduler, SyncRequestScheduler


def watched(kind: type, spans: list[dict[str, tuple[int, int]]]) -> type:
    """``kind``, noting which token positions each step computes."""

    class Watched(kind):
        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            output = super().schedule(*args, **kwargs)
            tokens = output.num_scheduled_tokens
            ends = {name: self.requests[name].num_computed_tokens for name in tokens}
            spans.append({name: (ends[name] - tokens[name], ends[name]) for name in tokens})
            return output

    return Watched


def computed_first(steps: list[dict[str, tuple[int, int]]], prompts: dict[str, int]) -> Counter[str]:
    """Reference: the prompt positions that a step computes beyond the furthest one reached before."""
    reached: dict[str, int] = {}
    charged: Counter[str] = Counter()
    for step in steps:
        for name, (start, end) in step.items():
            new = range(max(start, reached.get(name, 0)), min(end, prompts[name]))
            charged[name] += len(new)
            reached[name] = max(reached.get(name, 0), min(end, prompts[name]))
    return charged


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_charges_are_the_tokens_computed_for_the_first_time(is_async):
    preempted = 0
    for seed in range(8):
        order = ArrivalOrder(expected=12)
        spans: list[dict[str, tuple[int, int]]] = []
        kind = watched(AsyncRequestScheduler if is_async else SyncRequestScheduler, spans)
        settings = settings_of(seed)
        settings.is_async = is_async
        scheduler = build(settings, kind, order_of=lambda *_, order=order: order)
        _, sent = traffic(scheduler, seed, 2 if is_async else 1, names=True)
        first = computed_first(spans, {sample.request_id: sample.num_prompt_tokens for sample in sent})
        extend: Counter[str] = Counter()
        output: Counter[str] = Counter()
        for sample in sent:
            client = sample.sampling_params.extra_args["client_id"]
            extend[client] += first[sample.request_id]
            output[client] += sample.num_output_tokens
        assert order.extend == extend
        assert order.output == output
        assert not any(order.reserved.values())
        # One that was given up before its first token says nothing of how long answers are.
        lengths = sorted(sample.num_output_tokens for sample in sent if sample.num_output_tokens)
        assert sorted(tokens for ended in order.observed.values() for tokens in ended) == lengths
        preempted += sum(sample.num_preemptions for sample in sent)
    assert preempted > 5


def test_the_cached_part_of_a_prompt_is_free():
    order = ArrivalOrder()
    scheduler = ours(Settings(), order)
    stepper = Stepper(scheduler)
    prompt = list(range(100))
    for client in ("first", "second"):
        scheduler.add_request(request(client, prompt, client_id=client))
        stepper.drain()
    assert order.extend == {"first": 100, "second": 100 - 96}


def test_a_long_prompt_is_charged_chunk_by_chunk():
    order = ArrivalOrder()
    scheduler = ours(Settings(budget=32), order)
    scheduler.add_request(request("r", list(range(80)), client_id="a"))
    stepper = Stepper(scheduler)
    charged = []
    for _ in range(4):
        stepper.step()
        charged.append(order.extend["a"])
    assert charged == [32, 64, 80, 80]


def test_output_is_reserved_while_a_request_runs_and_no_more_than_it_may_generate():
    order = ArrivalOrder(expected=6)
    scheduler = ours(Settings(budget=64), order)
    stepper = Stepper(scheduler)
    for name, most in (("short", 2), ("long", 9)):
        scheduler.add_request(request(name, [len(name)] * 20, output=most, client_id=name))
    assert not order.reserved
    left = []
    for _ in range(4):
        stepper.step()
        scheduler._charge_all_output()
        left.append((order.reserved["short"], order.reserved["long"]))
    assert left == [(1, 5), (0, 4), (0, 3), (0, 2)]
    scheduler.finish_requests("long", RequestStatus.FINISHED_ABORTED)
    assert not any(order.reserved.values())
    assert order.observed == {"short": [2], "long": [4]}


def test_a_preempted_request_reserves_nothing_until_it_runs_again():
    order = ArrivalOrder(expected=6)
    scheduler = ours(Settings(budget=64), order)
    scheduler.add_request(request("r", [1] * 20, output=9, client_id="a"))
    stepper = Stepper(scheduler)
    stepper.step()
    stepper.step()
    (running,) = scheduler.running
    scheduler.running.remove(running)
    scheduler._preempt_request(running, 0.0)
    assert order.reserved["a"] == 0
    stepper.step()
    scheduler._charge_all_output()
    assert order.reserved["a"] == 6 - 3


def test_an_admission_is_charged_before_the_next_one_is_chosen():
    order = ArrivalOrder()
    scheduler = ours(Settings(budget=64), order)
    for number, name in enumerate(("r0", "r1", "r2")):
        scheduler.add_request(request(name, [number] * 20, client_id=name))
    Stepper(scheduler).step()
    assert order.calls == [
        call for name in ("r0", "r1", "r2") for call in (("pop", name, 0), ("extend", name, 20))
    ]


@PASSES_OVER
def test_a_request_that_is_passed_over_is_charged_nothing():
    class Stuck(SyncRequestScheduler):
        def _handle_blocked_waiting_request(self, request: Request) -> bool:
            return False

    order = ArrivalOrder()
    scheduler = build(Settings(), Stuck, order_of=lambda *_: order)
    for name in ("r0", "r1", "r2"):
        scheduler.add_request(request(name, [7] * 20, client_id=name))
    output = Stepper(scheduler).step()
    assert output.total_num_scheduled_tokens == 0
    assert order.extend == {}
    assert [job.request_id for job in order.jobs] == ["r0", "r1", "r2"]
    assert (len(order.put_back_skipped), order.put_back_preempted) == (3, [])


@pytest.mark.parametrize("later", [False, True], ids=["loaded inside the step", "loaded beside steps"])
def test_what_a_connector_loads_is_free(later):
    order = ArrivalOrder()
    scheduler = ours(Settings(), order)
    scheduler.connector = LoadingConnector(48, later=later)
    stepper = Stepper(scheduler)
    sample = request("r", list(range(80)), client_id="a")
    scheduler.add_request(sample)
    stepper.step()
    if later:
        assert sample.status == RequestStatus.WAITING_FOR_REMOTE_KVS
        assert (order.extend, len(scheduler.waiting)) == ({}, 0)
        scheduler.finished_recving_kv_req_ids.add("r")
    stepper.drain()
    assert order.extend == {"a": 80 - 48}
    scheduler.check_integrity()


def test_a_refused_allocation_is_charged_nothing():
    order = ArrivalOrder()
    scheduler = ours(Settings(blocks=9, budget=256), order)
    scheduler.add_request(request("fits", [7] * 100, client_id="a"))
    scheduler.add_request(request("waits", [8] * 100, client_id="b"))
    Stepper(scheduler).step()
    assert order.extend == {"a": 100}
    assert len(scheduler.waiting) == 1


def test_a_preempted_request_is_told_from_one_that_was_passed_over():
    order = ArrivalOrder()
    scheduler = ours(Settings(blocks=14, budget=256, caching=False), order)
    for name in ("r0", "r1"):
        scheduler.add_request(request(name, [7] * 90, 60, client_id=name))
    Stepper(scheduler).drain()
    assert order.put_back_preempted[0] == "r1"
    assert order.put_back_skipped == []
    assert order.extend == {"r0": 90, "r1": 90}
    assert order.output == {"r0": 60, "r1": 60}


def session(prompt: list[int], output: int) -> Any:
    return Request(
        "s",
        prompt,
        SamplingParams(max_tokens=output, ignore_eos=True, extra_args={"client_id": "a"}),
        None,
        arrival_time=0.0,
        block_hasher=HASHER,
        resumable=True,
    )


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_session_pays_for_the_output_of_every_turn_though_it_becomes_prompt(is_async):
    order = ArrivalOrder()
    scheduler = ours(Settings(is_async=is_async), order)
    stepper = Stepper(scheduler, 2 if is_async else 1)
    for turn, prompt in enumerate(([7] * 40, [8] * 30, [9] * 20)):
        scheduler.add_request(session(prompt, 6))
        for _ in range(12):
            stepper.step()
        scheduler.charges.charge_output(scheduler.requests.values())
        assert order.output["a"] == 6 * (turn + 1)
    stepper.abort("s")
    assert order.output["a"] == 18
    # What was sampled last in a turn is dropped, what was computed of its output is not computed again.
    assert order.extend["a"] == 40 + 30 + 20
    assert len(scheduler.charges) == 0


def test_of_many_that_run_each_is_charged_within_a_few_steps():
    order = ArrivalOrder()
    scheduler = ours(Settings(blocks=2000, budget=4096, seqs=100), order)
    for number in range(100):
        scheduler.add_request(request(f"r{number}", [number] * 20, 200, client_id=f"c{number}"))
    stepper = Stepper(scheduler)
    for _ in range(60):
        stepper.step()
        for sample in scheduler.running:
            due = sample.num_output_tokens - order.output[sample.sampling_params.extra_args["client_id"]]
            assert 0 <= due <= Charges.EVERY
    assert order.output["c0"] > 40


def test_a_step_without_a_free_seat_asks_the_order_for_nobody():
    asked = []

    class Asked(ArrivalOrder):
        def begin_step(self):
            asked.append("step")

        def peek(self):
            asked.append("peek")
            return super().peek()

    scheduler = ours(Settings(seqs=2), Asked())
    for number in range(4):
        scheduler.add_request(request(f"r{number}", [number] * 20, 30, client_id="a"))
    stepper = Stepper(scheduler)
    stepper.step()
    assert asked[:2] == ["step", "peek"]
    asked.clear()
    for _ in range(10):
        stepper.step()
    # Prepared behind the model for the step after it, which may be another.
    assert asked == ["step"] * 10
