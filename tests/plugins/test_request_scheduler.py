"""The request scheduler in vLLM's real scheduler: stock order where nobody is named, and honest charges."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

pytest.importorskip("vllm")

from arrival_order import ArrivalOrder
from stepped_scheduler import LoadingConnector, Settings, Stepper, build, request
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from penstock.plugins import features, ledger
from penstock.plugins.configuration import ConfigurationError
from penstock.plugins.vllm.request_scheduler import (
    AsyncRequestScheduler,
    SyncRequestScheduler,
    make_scheduler,
)

POLICIES = ("dlpm", "vtc", "lpm")


@pytest.fixture(autouse=True)
def _own_process_state(monkeypatch):
    monkeypatch.setattr(ledger, "_entries", {})
    monkeypatch.delenv(features.ASKED_FOR, raising=False)


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


def traffic(scheduler: Any, seed: int, depth: int, names: bool = False) -> tuple[Stepper, list[Request]]:
    """Seeded arrivals, shared prefixes, aborts of requests in any state, and resets of the prefix cache."""
    rng = random.Random(seed)
    stepper = Stepper(scheduler, depth)
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
        order = ArrivalOrder()
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


def test_an_admission_is_charged_before_the_next_one_is_chosen():
    order = ArrivalOrder()
    scheduler = ours(Settings(budget=64), order)
    for number, name in enumerate(("r0", "r1", "r2")):
        scheduler.add_request(request(name, [number] * 20, client_id=name))
    Stepper(scheduler).step()
    assert order.calls == [
        call for name in ("r0", "r1", "r2") for call in (("pop", name, 0), ("extend", name, 20))
    ]


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


def test_a_request_that_loads_can_be_aborted():
    scheduler = ours(Settings())
    scheduler.connector = LoadingConnector(48, later=True)
    scheduler.add_request(request("r", list(range(80)), client_id="a"))
    stepper = Stepper(scheduler)
    stepper.step()
    stepper.abort("r")
    assert len(scheduler.charges) == 0
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
