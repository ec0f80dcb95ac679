"""Each policy in vLLM's real scheduler under everything at once: adapters that take turns, grammars that are
compiled meanwhile, KV cache that a connector loads, clients, latency targets, preemptions and aborts.
"""

from __future__ import annotations

import random
from collections import Counter
from concurrent.futures import Future
from typing import Any

import pytest

pytest.importorskip("vllm")

import stepped_scheduler
from loading_connector import LoadingConnector
from request_scheduler_kit import PASSES_OVER
from slo_traffic import Time, TimedStepper
from stepped_scheduler import HASHER, Settings, Stepper, build, token
from vllm.config.lora import LoRAConfig
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.request import Request, RequestStatus

from penstock.plugins.vllm.request_scheduler import make_scheduler

pytestmark = PASSES_OVER

LOADED = 48
REQUESTS = 60
ADAPTERS = {"miller": 1, "keeper": 2, "eel": 3}
MOST_ADAPTERS = 2


class AnyToken:
    """A grammar that takes every token."""

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        return True

    def is_terminated(self) -> bool:
        return False


class SomeLoaded(LoadingConnector):
    """Has the first tokens of the prompts of some requests elsewhere, as often as they are asked for."""

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        tokens, later = self.answer
        if not request.request_id.endswith("-remote") or tokens <= num_computed_tokens:
            return 0, False
        return tokens - num_computed_tokens, later


def some_request(rng: random.Random, number: int) -> Request:
    """Of any kind; its name says which."""
    extra: dict[str, Any] = {"client_id": rng.choice("abc")}
    if rng.random() < 0.5:
        extra |= {"ttft_slo_ms": rng.choice((100, 3000)), "tpot_slo_ms": rng.choice((20, 300))}
    kind = rng.choice(("plain", "adapter", "grammar", "remote"))
    form = StructuredOutputsParams(regex=".*") if kind == "grammar" else None
    adapter = rng.choice(list(ADAPTERS)) if kind == "adapter" else None
    least = LOADED + 1 if kind == "remote" else 1
    made = Request(
        f"r{number}-{kind}",
        [rng.randrange(5) * 100 + 7] * rng.randrange(least, 150),
        SamplingParams(
            max_tokens=rng.randrange(1, 30), ignore_eos=True, extra_args=extra, structured_outputs=form
        ),
        None,
        arrival_time=0.0,
        lora_request=LoRARequest(adapter, ADAPTERS[adapter], "nowhere") if adapter else None,
        block_hasher=HASHER,
    )
    if form is not None:
        made.structured_output_request.grammar = Future()
    return made


class Soak:
    """Requests of every kind through one scheduler; what must hold is asserted in every step."""

    def __init__(self, policy: str, is_async: bool, seed: int) -> None:
        self.rng = random.Random(f"{policy} {is_async} {seed}")
        settings = Settings(
            blocks=self.rng.choice((28, 40)), budget=128, seqs=8, is_async=is_async, ours={"policy": policy}
        )
        config = settings.config()
        config.lora_config = LoRAConfig(max_lora_rank=8, max_loras=MOST_ADAPTERS)
        self.time = Time()
        self.scheduler = build(
            settings, make_scheduler, vllm_config=config, clock=self.time, **self._more(policy)
        )
        self.scheduler.connector = SomeLoaded(LOADED, later=seed % 2 == 0)
        self.stepper = TimedStepper(self.scheduler, self.time, 1 + is_async)
        self.sent: dict[str, Request] = {}
        self.unready: set[str] = set()
        self.broken: set[str] = set()
        self.first: Counter[str] = Counter()

    def _more(self, policy: str) -> dict[str, Any]:
        return {"wall_clock": self.time} if policy == "slo" else {}

    def run(self) -> None:
        while len(self.sent) < REQUESTS:
            for _ in range(self.rng.choice((0, 0, 1, 4))):
                self._arrive(some_request(self.rng, len(self.sent)))
            if self.sent and self.rng.random() < 0.05:
                name = self.rng.choice(list(self.sent))
                self.stepper.abort(name)
            self._turn()
        for _ in range(3000):
            if not self.scheduler.has_unfinished_requests() and not self.stepper.in_flight:
                return
            self._turn()
        raise AssertionError(f"left: {list(self.scheduler.requests)}")

    def _arrive(self, request: Request) -> None:
        self.sent[request.request_id] = request
        if request.structured_output_request is not None:
            self.unready.add(request.request_id)
        self.scheduler.add_request(request)

    def _turn(self) -> None:
        """The world moves on, then one step."""
        for name in sorted(self.unready):
            if self.rng.random() < 0.2:
                self._compiled(name)
        for request in self.sent.values():
            if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS and self.rng.random() < 0.5:
                self.scheduler.finished_recving_kv_req_ids.add(request.request_id)
        if not self.scheduler.has_unfinished_requests():
            if self.stepper.in_flight:
                self.stepper.receive()
            return
        self._check(self.stepper.step())

    def _compiled(self, name: str) -> None:
        self.unready.discard(name)
        future: Any = self.sent[name].structured_output_request._grammar
        if self.rng.random() < 0.2:
            self.broken.add(name)
            future.set_exception(ValueError("no such grammar"))
        else:
            future.set_result(AnyToken())

    def _check(self, output: Any) -> None:
        scheduled = output.num_scheduled_tokens
        assert not scheduled.keys() & (self.unready | self.broken)
        adapters = {self.sent[name].lora_request for name in scheduled} - {None}
        assert len(adapters) <= MOST_ADAPTERS
        for new in output.scheduled_new_reqs:
            self.first[new.req_id] += 1
            if new.req_id.endswith("-remote"):
                assert new.num_computed_tokens >= LOADED


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("policy", ["dlpm", "vtc", "lpm", "slo"])
def test_adapters_grammars_and_loaded_caches_go_together(policy, is_async):
    preemptions = 0
    ends: Counter[Any] = Counter()
    for seed in range(2):
        soak = Soak(policy, is_async, seed)
        soak.run()
        assert set(soak.first.values()) == {1}
        for name, sample in soak.sent.items():
            answer = [token(name, sample.num_prompt_tokens + i) for i in range(sample.max_tokens)]
            given = list(sample.output_token_ids)
            assert given == answer[: len(given)]
            ends[sample.status] += 1
            if sample.status == RequestStatus.FINISHED_LENGTH_CAPPED:
                assert given == answer
            elif sample.status == RequestStatus.FINISHED_ERROR:
                assert name in soak.broken
                assert given == []
            else:
                assert sample.status == RequestStatus.FINISHED_ABORTED
        scheduler = soak.scheduler
        assert not scheduler.requests
        assert not scheduler.waiting
        pool = scheduler.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        scheduler.check_integrity()
        preemptions += sum(sample.num_preemptions for sample in soak.sent.values())
    assert preemptions > 0
    assert ends[RequestStatus.FINISHED_ERROR] > 0
    assert ends[RequestStatus.FINISHED_LENGTH_CAPPED] > REQUESTS


@pytest.mark.parametrize("policy", ["dlpm", "vtc", "lpm", "fcfs", "slo"])
def test_a_session_preempted_with_the_last_token_of_a_turn_in_flight_ends_nobody_else(policy):
    """vLLM queues it for its next turn, though it waits already, and then takes it from its queue."""
    scheduler = build(Settings(is_async=True, ours={"policy": policy}), make_scheduler)
    stepper = Stepper(scheduler, depth=3)
    session = stepped_scheduler.request("session", [7] * 40, output=2, ttft_slo_ms=1000.0, client_id="a")
    session.resumable = True
    scheduler.add_request(session)
    stepper.step()
    stepper.step()
    stepper.receive()
    scheduler.running.remove(session)
    scheduler._preempt_request(session, 0.0)
    stepper.receive()
    assert session.num_output_tokens == 2
    scheduler.check_integrity()
    stepper.abort("session")
    other = stepped_scheduler.request("other", [8] * 40, ttft_slo_ms=1000.0, client_id="b")
    scheduler.add_request(other)
    stepper.drain()
    assert other.status == RequestStatus.FINISHED_LENGTH_CAPPED
    assert not scheduler.requests
    scheduler.check_integrity()
