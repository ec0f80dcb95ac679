"""A decode server's queues under a policy: memory, seats and memory taken away, with made-up requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest

from penstock.plugins.sglang.decode_side import DecodeSide
from penstock.plugins.sglang.passes import Passes
from penstock.schedulers.asking import Asking
from penstock.schedulers.config import SchedulerConfig
from penstock.schedulers.policies import waiting_order


@dataclass(eq=False)
class Request:
    """What is read of SGLang's ``Req``."""

    rid: str
    client: str
    prompt: int = 60
    cached: int = 0
    output_ids: list[int] = field(default_factory=list)
    done: bool = False
    sampling_params: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(max_new_tokens=50))

    @property
    def origin_input_ids(self) -> range:
        return range(self.prompt)

    @property
    def kv(self) -> SimpleNamespace:
        return SimpleNamespace(cache_protected_len=self.cached)

    @property
    def finished_reason(self) -> str | None:
        return "stop" if self.done else None

    def finished(self) -> bool:
        return self.done


@dataclass(eq=False)
class Waiting:
    """What is read of SGLang's ``DecodeRequest``."""

    req: Request
    waiting_for_input: bool = True
    metadata_buffer_index: int = -1


class Decode:
    """What SGLang's scheduler and its queues do: three walks of the queue, the second of which gives memory
    until one does not fit."""

    def __init__(self, policy: str = "vtc", memory: int = 10**6, **keys: object) -> None:
        order = waiting_order(SchedulerConfig(policy=policy, **keys), lambda: 0.0, lambda _: 0)
        self.passes = Passes(order, lambda: 0.0, lambda request: Asking(client=request.client))
        self.memory = memory
        self.queue: list[Waiting] = []
        self.retracted_queue: list[Request] = []
        self.held_rebootstrap_reqs: list[Request] = []
        self.transfer_queue = SimpleNamespace(queue=[])
        self.waiting_queue: list[Request] = []
        self.running_batch = SimpleNamespace(reqs=[])
        self.side = DecodeSide(self, self.passes)

    def come(self, *requests: Request) -> None:
        self.queue = [*self.queue, *map(Waiting, requests)]

    def give(self) -> list[str]:
        self.side.line_up(self)
        gone = {place for place, one in enumerate(self.queue) if one.req.done}
        given = []
        for place, one in enumerate(self.queue):
            if place in gone or not one.waiting_for_input:
                continue
            if one.req.prompt > self.memory:
                break
            self.memory -= one.req.prompt
            one.metadata_buffer_index = 0
            given.append(one)
            gone.add(place)
        self.queue = [one for place, one in enumerate(self.queue) if place not in gone]
        self.transfer_queue.queue += given
        return [one.req.rid for one in given]

    def arrive(self) -> None:
        """All prompts are there."""
        self.waiting_queue += [one.req for one in self.transfer_queue.queue]
        self.transfer_queue.queue = []

    def seat(self, seats: int) -> list[str]:
        self.side.seat(self.running_batch.reqs)
        taken, self.waiting_queue = self.waiting_queue[:seats], self.waiting_queue[seats:]
        self.running_batch.reqs += taken
        return [request.rid for request in taken]

    def retract(self, *requests: Request) -> None:
        for request in requests:
            self.running_batch.reqs.remove(request)
            self.memory += request.prompt
            self.retracted_queue.append(request)

    def resume(self) -> list[str]:
        def resume() -> list[Request]:
            back = []
            for request in self.retracted_queue:
                if request.prompt > self.memory:
                    break
                self.memory -= request.prompt
                back.append(request)
            self.retracted_queue = [one for one in self.retracted_queue if one not in back]
            return back

        back = self.side.resume(self, resume)
        self.waiting_queue += back
        return [request.rid for request in back]

    def expected(self) -> float:
        return sum(account.expected for account in self.passes.order._book)

    def service(self) -> dict[str, tuple[int, int]]:
        self.passes.settle()
        return {one.client: (one.extend_tokens, one.output_tokens) for one in self.passes.order.clients()}


def requests(client: str, number: int, prompt: int = 60) -> list[Request]:
    return [Request(f"{client or 'x'}{index}", client, prompt) for index in range(number)]


@pytest.mark.parametrize("policy", ["dlpm", "vtc"])
def test_memory_goes_round_the_clients_and_each_one_s_in_order_of_arrival(policy):
    decode = Decode(policy, memory=6 * 60, quantum_tokens=60)
    decode.come(*requests("flood", 10), *requests("light", 3))
    given = decode.give()
    assert sorted(given) == ["flood0", "flood1", "flood2", "light0", "light1", "light2"]
    assert [rid for rid in given if rid.startswith("flood")] == ["flood0", "flood1", "flood2"]
    decode.memory = 10**6
    assert decode.give() == [f"flood{n}" for n in range(3, 10)]
    assert decode.queue == []


def test_those_of_nobody_have_it_in_order_of_arrival():
    decode = Decode(memory=200)
    decode.come(*requests("", 7))
    given = decode.give()
    assert [one.req.rid for one in decode.queue] == ["x3", "x4", "x5", "x6"]
    decode.memory = 10**6
    assert [*given, *decode.give()] == [f"x{n}" for n in range(7)]


def test_who_has_not_met_its_prefill_server_is_left_in_its_place():
    decode = Decode(memory=10**6)
    decode.come(*requests("a", 2), *requests("b", 2))
    for one in decode.queue[::2]:
        one.waiting_for_input = False
    assert sorted(decode.give()) == ["a1", "b1"]
    assert [one.req.rid for one in decode.queue] == ["a0", "b0"]
    for one in decode.queue:
        one.waiting_for_input = True
    assert sorted(decode.give()) == ["a0", "b0"]


def test_one_that_ended_in_the_queue_leaves_it_and_costs_nothing():
    decode = Decode(memory=60)
    decode.come(*requests("a", 3), *requests("b", 2))
    assert decode.give() == ["a0"]
    for one in decode.queue:
        one.req.done = one.req.rid in ("a1", "b1")
    decode.memory = 10**6
    assert decode.give() == ["b0", "a2"]
    assert decode.queue == []
    assert decode.service() == {"": (0, 0), "(others)": (0, 0), "a": (120, 0), "b": (60, 0)}


def test_memory_for_a_prompt_is_charged_once_and_what_the_cache_holds_is_not():
    decode = Decode(memory=10**6)
    (one,) = requests("a", 1)
    one.cached = 20
    decode.come(one)
    decode.give()
    decode.arrive()
    decode.seat(1)
    one.output_ids += [0, 0]
    decode.retract(one)
    assert decode.resume() == ["a0"]
    assert decode.service()["a"] == (40, 2)
    # Its memory was given up for good, and its prompt comes from the prefill server again.
    decode.waiting_queue.remove(one)
    decode.come(one)
    decode.give()
    assert decode.service()["a"] == (40, 2)


def running(*groups: list[Request], **keys: object) -> Decode:
    decode = Decode("dlpm", **keys)
    for group in groups:
        decode.come(*group)
    decode.give()
    decode.arrive()
    decode.seat(100)
    return decode


def test_a_seat_goes_to_the_client_that_holds_the_least_and_first_to_its_retracted_one():
    many, few = requests("many", 6), requests("few", 3)
    decode = running(many[:3], few[:1])
    decode.retract(few[0])
    decode.come(*many[3:], *few[1:])
    decode.give()
    decode.arrive()
    assert decode.resume() == ["few0"]
    assert decode.seat(3) == ["few0", "few1", "few2"]
    assert decode.seat(3) == ["many3", "many4", "many5"]


def test_a_long_prompt_does_not_wait_for_a_seat_behind_those_who_hold_something():
    small, (long,) = requests("small", 2), requests("long", 1, prompt=5000)
    decode = running(small[:1])
    decode.come(small[1], long)
    decode.give()
    decode.arrive()
    assert decode.seat(1) == ["long0"]


def test_memory_comes_back_first_to_the_client_that_holds_the_least():
    many, few = requests("many", 4), requests("few", 2)
    decode = running(many, few)
    decode.memory = 0
    decode.retract(many[3], few[1])
    decode.memory = 60
    assert decode.resume() == ["few1"]
    decode.memory = 60
    assert decode.resume() == ["many3"]


def test_output_is_expected_while_a_request_has_memory():
    one = Request("a0", "a")
    decode = running([one], first_output_tokens=10.0)
    assert decode.expected() == 20
    one.output_ids += [0, 0]
    decode.retract(one)
    decode.memory = 0
    decode.resume()
    assert decode.expected() == 0
    decode.memory = 60
    decode.resume()
    assert decode.expected() == 16
    one.done = True
    assert decode.service()["a"] == (60, 2)
    assert decode.expected() == len(decode.passes) == 0


@pytest.mark.parametrize(
    "where",
    [
        lambda decode: decode.retracted_queue,
        lambda decode: decode.waiting_queue,
        lambda decode: decode.running_batch.reqs,
    ],
)
def test_one_that_is_given_up_without_a_word_is_forgotten_in_the_next_round(
    where: Callable[[Decode], list[Request]],
):
    one, other = requests("a", 2)
    decode = running([other])
    where(decode).append(one)
    decode.passes.admit(one, 0, 60)
    decode.give()
    assert len(decode.passes) == 2
    where(decode).remove(one)
    decode.give()
    assert decode.passes.request("a1") is other
    assert len(decode.passes) == 1
    decode.running_batch.reqs.clear()
    decode.give()
    assert decode.expected() == len(decode.passes) == 0
