"""Passes over SGLang's waiting list: order, charges and who is remembered, with made-up requests."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.plugins.sglang.passes import Passes, PassList
from penstock.schedulers.asking import Asking
from penstock.schedulers.config import SchedulerConfig
from penstock.schedulers.policies import waiting_order
from penstock.schedulers.waiting import WaitingOrder

BUDGET = 100
"""Prompt tokens of one pass."""


@dataclass(eq=False)
class Request:
    """What ``Passes`` reads of SGLang's ``Req``."""

    rid: str
    client: str
    prompt: int
    output_ids: list[int] = field(default_factory=list)
    prefix_len: int = 0
    extend_end: int = 0
    done: bool = False
    sampling_params: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(max_new_tokens=50))

    @property
    def origin_input_ids(self) -> range:
        return range(self.prompt)

    @property
    def finished_reason(self) -> str | None:
        return "stop" if self.done else None

    def finished(self) -> bool:
        return self.done


class Expectations:
    """What is said to an order of output to come, counted."""

    def __init__(self, order: WaitingOrder) -> None:
        self.open, self.observed = 0, []
        for name in ("reserve_output", "release_output", "charge_output", "observe_output"):
            setattr(order, name, partial(getattr(self, name), getattr(order, name)))

    def reserve_output(self, original, client, generated, at_most):
        tokens = original(client, generated, at_most)
        self.open += tokens
        return tokens

    def release_output(self, original, client, tokens):
        original(client, tokens)
        self.open -= tokens

    def charge_output(self, original, client, tokens, expected):
        original(client, tokens, expected)
        self.open -= expected

    def observe_output(self, original, client, tokens):
        original(client, tokens)
        self.observed.append(tokens)


class Engine:
    """What SGLang's scheduler does with its list: a pass fills a budget, and cuts what does not fit."""

    def __init__(self, policy: str = "dlpm", **keys: object) -> None:
        config = SchedulerConfig(policy=policy, **keys)
        self.hits: dict[str, int] = {}
        order = waiting_order(config, lambda: 0.0, lambda request_id: self.hits.get(request_id, 0))
        self.expectations = Expectations(order)
        self.passes = Passes(order, lambda: 0.0, lambda request: Asking(client=request.client))
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.chunked: Request | None = None
        self.served: list[str] = []

    def come(self, *requests: Request) -> None:
        self.waiting = [*self.waiting, *requests]

    def step(self, budget: int = BUDGET, skip: frozenset[str] = frozenset()) -> None:
        self.passes.begin(self.waiting)
        self.waiting = PassList(self.waiting, self.passes.picks)
        if self.chunked is not None:
            budget -= self.compute(self.chunked, budget)
        taken = set()
        for request in self.waiting:
            if budget <= 0:
                break
            if request.rid in skip:
                continue
            request.extend_end = request.prefix_len
            budget -= self.compute(request, budget)
            taken.add(request)
            self.served.append(request.rid)
            self.running.append(request)
        self.waiting = [request for request in self.waiting if request not in taken]

    def compute(self, request: Request, budget: int) -> int:
        request.prefix_len = request.extend_end
        request.extend_end = min(request.prompt + len(request.output_ids), request.prefix_len + budget)
        self.passes.compute(request)
        self.chunked = request if request.extend_end < request.prompt else None
        if self.chunked is None:
            request.output_ids.append(0)
        return request.extend_end - request.prefix_len

    def drain(self) -> list[str]:
        while self.waiting or self.chunked is not None:
            self.step()
        return self.served

    def retract(self, request: Request) -> None:
        request.prefix_len = request.extend_end = 0
        self.running.remove(request)
        self.come(request)

    def service(self) -> dict[str, tuple[int, int]]:
        self.passes.begin(self.waiting)
        return {
            found.client: (found.extend_tokens, found.output_tokens) for found in self.passes.order.clients()
        }


def requests(client: str, number: int, prompt: int = 60) -> list[Request]:
    return [Request(f"{client or 'x'}{index}", client, prompt) for index in range(number)]


def test_who_left_is_forgotten_in_an_order_that_every_process_has():
    """Sets of requests have another order in each, and what is learned of clients depends on it."""
    engine, gone = Engine(), []
    engine.come(*requests("left", 40))
    engine.passes.begin(engine.waiting)
    remove = engine.passes.order.remove
    engine.passes.order.remove = lambda name: gone.append(name) or remove(name)
    engine.passes.begin([])
    assert gone == [f"left{number}" for number in range(40)]


@pytest.mark.parametrize("policy", ["dlpm", "vtc"])
def test_a_flood_does_not_keep_another_client_waiting(policy):
    engine = Engine(policy, quantum_tokens=100)
    engine.come(*requests("flood", 10), *requests("light", 2))
    served = engine.drain()
    assert max(served.index("light0"), served.index("light1")) < 5
    assert [rid for rid in served if rid.startswith("flood")] == [f"flood{i}" for i in range(10)]


@pytest.mark.parametrize("policy", ["dlpm", "vtc"])
def test_requests_of_nobody_are_served_as_they_came_and_as_they_were_thrown_out(policy):
    engine = Engine(policy)
    engine.come(*requests("", 4))
    engine.step()
    first = engine.running[0]
    assert engine.served == ["x0", "x1"]
    engine.retract(first)
    assert engine.drain() == ["x0", "x1", "x2", "x3", "x0"]


def test_a_named_request_that_was_thrown_out_goes_before_its_client_s_others():
    engine = Engine("vtc")
    engine.come(*requests("a", 4))
    engine.step()
    engine.retract(engine.running[0])
    assert engine.drain() == ["a0", "a1", "a0", "a2", "a3"]


def test_the_next_request_is_chosen_when_the_one_before_has_been_charged():
    engine = Engine("vtc")
    engine.come(*requests("a", 2, prompt=40), *requests("b", 1, prompt=40))
    engine.step(budget=200)
    assert engine.served == ["a0", "b0", "a1"]


def test_a_prompt_is_charged_once_however_it_is_cut_and_however_often_it_is_computed():
    engine = Engine()
    (long,) = requests("a", 1, prompt=3 * BUDGET + 20)
    engine.come(long)
    engine.drain()
    assert engine.service()["a"] == (320, 1)
    engine.retract(long)
    engine.drain()
    assert engine.service()["a"] == (320, 2)


def test_what_the_prefix_cache_holds_is_not_charged():
    engine = Engine()
    (hit,) = requests("a", 1, prompt=90)
    hit.prefix_len = 80
    engine.come(hit)
    engine.drain()
    assert engine.service()["a"] == (10, 1)


def test_a_retracted_request_that_is_passed_over_still_goes_before_its_client_s_others():
    engine = Engine("dlpm")
    engine.come(*requests("a", 4, prompt=50))
    engine.step()
    engine.retract(engine.running[0])
    engine.step(budget=50, skip=frozenset({"a0"}))
    engine.hits["a3"] = 40
    engine.step(budget=50)
    assert engine.served == ["a0", "a1", "a2", "a0"]


def test_output_is_expected_at_the_admission_and_put_right_at_the_end():
    engine = Engine("dlpm", quantum_tokens=100, first_output_tokens=40.0)
    engine.come(*requests("flood", 4, prompt=10), *requests("light", 1, prompt=10))
    engine.step(budget=1000)
    # Ten tokens of a prompt alone would let the whole flood go first.
    assert engine.served.index("light0") == 2
    for request in engine.running:
        request.done = True
    service = engine.service()
    assert (service["flood"], service["light"]) == ((40, 4), (10, 1))
    standing = {found.client: found.standing for found in engine.passes.order.clients()}
    assert standing["light"] == 100 - (10 + 2 * 1)


def test_a_request_that_is_passed_over_keeps_its_place():
    engine = Engine("vtc")
    engine.come(*requests("a", 3))
    engine.step(skip=frozenset({"a0"}))
    engine.passes.check_integrity(engine.waiting)
    assert engine.served == ["a1", "a2"]
    assert engine.drain() == ["a1", "a2", "a0"]


def test_one_that_left_without_being_served_is_forgotten_and_its_name_may_come_again():
    engine = Engine()
    gone, again = requests("a", 1)[0], requests("a", 1)[0]
    engine.come(gone)
    engine.passes.begin(engine.waiting)
    engine.waiting = [again]
    engine.passes.begin(engine.waiting)
    assert engine.passes.request("a0") is again
    engine.waiting = []
    engine.passes.begin(engine.waiting)
    assert len(engine.passes) == 0


def test_who_holds_the_most_by_its_share_gives_until_another_one_holds_more():
    engine = Engine("vtc")
    many, few, nobody = (
        requests("many", 4, prompt=40),
        requests("few", 1, prompt=90),
        requests("", 2, prompt=10),
    )
    engine.come(*many, *few, *nobody)
    engine.passes.begin(engine.waiting)
    assert engine.passes.held([*many, *few, *nobody]) == [40, 80, 120, 160, 90, 10, 20]
    engine.passes.reweigh("many", 2.0)
    assert engine.passes.held([*few, *many]) == [90, 20, 40, 60, 80]


def test_a_share_that_changes_counts_for_requests_that_wait_already():
    engine = Engine("vtc")
    engine.come(*requests("gold", 6, prompt=50), *requests("plain", 6, prompt=50))
    engine.passes.begin(engine.waiting)
    engine.passes.reweigh("gold", 4.0)
    engine.drain()
    assert [rid[0] for rid in engine.served[:6]].count("g") == 5


def test_later_walks_see_a_plain_list():
    engine = Engine("vtc")
    engine.come(*requests("a", 3))
    engine.passes.begin(engine.waiting)
    walked = PassList(engine.waiting, engine.passes.picks)
    assert list(walked) == engine.waiting
    assert list(walked) == engine.waiting
    engine.passes.begin(engine.waiting)
    engine.passes.check_integrity(engine.waiting)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), policy=st.sampled_from(["dlpm", "vtc"]))
def test_whatever_happens_every_token_is_charged_once_and_nobody_is_lost(seed, policy):
    draw = random.Random(seed)
    engine = Engine(policy, quantum_tokens=50, first_output_tokens=4.0)
    every: list[Request] = []
    for _ in range(30):
        match draw.choice(["come", "step", "step", "retract", "abort", "end"]):
            case "come":
                new = Request(f"r{len(every)}", draw.choice(["", "a", "b", "c"]), draw.randrange(1, 250))
                every.append(new)
                engine.come(new)
            case "step":
                engine.step(
                    skip=frozenset(draw.sample([r.rid for r in engine.waiting], len(engine.waiting) // 3))
                )
            case "retract" if still := [r for r in engine.running if r is not engine.chunked]:
                engine.retract(draw.choice(still))
            case "abort" if engine.waiting:
                gone = draw.choice(engine.waiting)
                engine.waiting = [request for request in engine.waiting if request is not gone]
                gone.done = True
            case "end" if still := [r for r in engine.running if r is not engine.chunked]:
                (ended := draw.choice(still)).done = True
                engine.running.remove(ended)
        engine.passes.begin(engine.waiting)
        engine.passes.check_integrity(engine.waiting)
    engine.drain()
    computed = SimpleNamespace(extend={}, output={})
    for request in every:
        if request.rid in engine.served:
            whole = request.prompt
            computed.extend[request.client] = computed.extend.get(request.client, 0) + whole
            computed.output[request.client] = computed.output.get(request.client, 0) + len(request.output_ids)
    service = engine.service()
    for client, tokens in computed.extend.items():
        assert service[client] == (tokens, computed.output[client])
    for request in every:
        request.done = True
    engine.passes.begin(engine.waiting)
    assert len(engine.passes) == 0
    assert engine.expectations.open == 0
    ran = [len(request.output_ids) for request in every if request.output_ids]
    assert sorted(engine.expectations.observed) == sorted(ran)


@pytest.mark.parametrize("policy", ["dlpm", "vtc"])
def test_who_is_offered_to_a_full_batch_stays_where_it_stood(policy, monkeypatch):
    engine = Engine(policy)
    engine.come(*requests("a", 3, prompt=BUDGET), *requests("b", 3, prompt=BUDGET))
    put_back = []
    monkeypatch.setattr(engine.passes.order, "put_back", lambda *job, preempted: put_back.extend(job))
    served = engine.drain()
    assert sorted(served) == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert put_back == []


def test_a_request_that_is_admitted_beside_the_walk_is_not_offered_again():
    engine = Engine("vtc")
    first, second = requests("a", 2)
    engine.come(first, second)
    engine.passes.begin(engine.waiting)
    walk = engine.passes.picks()
    assert next(walk) is first
    assert next(walk) is second
    engine.passes.admit(first, 0, 60)
    walk.close()
    engine.passes.begin([second])
    engine.passes.check_integrity([second])
    assert list(engine.passes.picks()) == [second]
