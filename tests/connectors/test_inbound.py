"""The decode side's book: one leader a lease, every lease ended once, nothing kept of what has ended."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.connectors.errors import HandOffError, StaleReadError
from penstock.connectors.handoff import HandOff
from penstock.connectors.inbound import InboundRequests, Verdict


def hand_off(lease: int) -> HandOff:
    return HandOff(
        remote_engine_id="engine",
        remote_request_id="request",
        remote_host="127.0.0.1",
        remote_port=1,
        remote_key=None,
        remote_instance="0" * 32,
        remote_lease=f"{lease:032x}",
        remote_runs=[(0, 1)],
        remote_num_tokens=1,
        remote_prompt="0" * 32,
        block_size=16,
        tp_size=1,
    )


class Recorder:
    """What the book tells the lease keeper."""

    def __init__(self) -> None:
        self.watched: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.lost: set[str] = set()

    def watch(self, hand_off: HandOff) -> None:
        self.watched[hand_off.remote_lease] += 1

    def unwatch(self, hand_off: HandOff) -> None:
        self.ended[hand_off.remote_lease] += 1

    def release(self, hand_off: HandOff, reason: str) -> None:
        assert reason
        self.ended[hand_off.remote_lease] += 1

    def is_lost(self, hand_off: HandOff) -> bool:
        return hand_off.remote_lease in self.lost


@pytest.fixture
def leases() -> Recorder:
    return Recorder()


@pytest.fixture
def book(leases) -> InboundRequests:
    return InboundRequests(leases)


def test_one_request_pulls_and_the_lease_ends_with_its_read(book, leases):
    book.add("a", hand_off(1))
    assert book.verdict("a") is Verdict.PULL
    book.start("a")
    assert book.verdict("a") is Verdict.LOCAL
    assert not leases.ended
    book.finish_load("a", failed=False)
    assert leases.ended == {hand_off(1).remote_lease: 1}
    book.end("a")
    assert book.num_open == 0


def test_others_with_the_same_hand_off_wait_for_the_leader_then_look_in_the_local_cache(book, leases):
    for name in "abc":
        book.add(name, hand_off(1))
    book.start("b")
    assert [book.verdict(name) for name in "ac"] == [Verdict.WAIT, Verdict.WAIT]
    book.finish_load("b", failed=True)
    assert [book.verdict(name) for name in "ac"] == [Verdict.LOCAL, Verdict.LOCAL]
    book.skip("a")
    book.end("c")
    assert leases.ended == {hand_off(1).remote_lease: 1}


def test_an_abort_while_bytes_move_keeps_the_lease_until_they_have_landed(book, leases):
    book.add("a", hand_off(1))
    book.start("a")
    book.end("a")
    assert not leases.ended
    assert book.num_open == 1
    book.finish_load("a", failed=False)
    assert leases.ended.total() == 1
    assert book.num_open == 0


def test_one_of_two_that_goes_before_the_pull_leaves_the_lease_to_the_other(book, leases):
    book.add("a", hand_off(1))
    book.add("b", hand_off(1))
    book.end("a")
    assert not leases.ended
    assert book.verdict("b") is Verdict.PULL


def test_what_cannot_be_pulled_says_why(book, leases):
    book.add_broken("a", HandOffError("no hand-off"))
    book.add("b", hand_off(2))
    leases.lost.add(hand_off(2).remote_lease)
    assert (book.verdict("a"), book.verdict("b")) == (Verdict.BROKEN, Verdict.BROKEN)
    assert isinstance(book.error_of("a"), HandOffError)
    assert isinstance(book.error_of("b"), StaleReadError)


def test_a_stand_in_gives_back_only_what_nobody_uses(book, leases):
    book.add("a", hand_off(1))
    book.give_back(hand_off(1), "refused")
    assert not leases.ended
    book.give_back(hand_off(2), "refused")
    assert leases.ended == {hand_off(2).remote_lease: 1}


def test_a_request_without_a_hand_off_is_none_of_the_book(book):
    assert book.verdict("x") is Verdict.LOCAL
    assert book.hand_off_of("x") is None
    book.skip("x")
    book.finish_load("x", failed=True)
    book.end("x")
    assert book.num_open == 0


@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 4))
def test_any_order_of_events_ends_every_lease_once(seed, num_requests, num_leases):
    rng = random.Random(seed)
    leases = Recorder()
    book = InboundRequests(leases)
    lease_of = {f"r{i}": i % num_leases for i in range(num_requests)}
    for name, lease in lease_of.items():
        book.add(name, hand_off(lease))
    loading: set[str] = set()
    pulled: Counter[int] = Counter()
    alive = set(lease_of)
    while alive or loading:
        name = rng.choice(sorted(alive | loading))
        match rng.randrange(4):
            case 0 if name in alive and book.verdict(name) is Verdict.PULL:
                book.start(name)
                loading.add(name)
                pulled[lease_of[name]] += 1
            case 1 if name in loading:
                book.finish_load(name, failed=rng.random() < 0.5)
                loading.discard(name)
            case 2 if name in alive:
                book.end(name)
                alive.discard(name)
            case 3 if name in alive and name not in loading and book.verdict(name) is Verdict.LOCAL:
                book.skip(name)
        book.check_integrity()
        for other in alive:
            if book.verdict(other) is Verdict.WAIT:
                assert any(lease_of[busy] == lease_of[other] for busy in loading)
    assert book.num_open == 0
    assert max(pulled.values(), default=0) <= 1
    assert leases.ended == Counter({hand_off(lease_of[name]).remote_lease: 1 for name in lease_of})
