"""A receiver outlives a sender that lies: each load is reported once, with a typed error or right bytes."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from seeded import seeded
from two_engines import CONFIG, PREFILL, Site

from penstock.connectors.errors import (
    DigestMismatchError,
    FlowKVError,
    IncompatibleError,
    MessageError,
    TransferFailedError,
)
from penstock.connectors.geometry import Strip
from penstock.connectors.messages import (
    Confirmed,
    EndOfRead,
    Hello,
    NotYet,
    Refused,
    Released,
    Renewed,
    Stale,
    Welcome,
)
from penstock.connectors.receiver import Load
from penstock.connectors.runs import Run

KEYS = list(range(8))


def failure_with(site: Site, answer_type: type, lie) -> FlowKVError | None:
    """The outcome of a request for which answers of one type are replaced."""
    site.wire.alter = lambda answer: lie(answer) if isinstance(answer, answer_type) else answer
    request_id = site.request(KEYS)
    for _ in range(4):
        site.run()
        site.clock.advance(CONFIG.transfer_timeout_s)
    site.wire.alter = lambda answer: answer
    return site.decode.error_of(request_id)


@pytest.mark.parametrize(
    "digests",
    [b"abc", b"", b"x" * 8 * 7, b"x" * 8 * 9, b"x" * 8 * 8],
    ids=["odd", "none", "few", "many", "wrong"],
)
def test_digests_of_any_size_are_compared_without_a_crash(site, digests):
    assert isinstance(failure_with(site, Confirmed, lambda _: Confirmed(digests)), DigestMismatchError)
    site.check()


@pytest.mark.parametrize(
    "field",
    [
        {"base_address": (1 << 64) - 1},
        {"base_address": (1 << 63) - 8},
        {"base_address": -1},
        {"size": (1 << 64) - 1, "num_blocks": 1 << 60},
        {"num_blocks": 0},
        {"num_blocks": -5},
        {"strips": ()},
        {"strips": (Strip(0, 96, -96),)},
        {"strips": (Strip(0, 96, 0),)},
        {"strips": (Strip(0, 8, 96),)},
        {"strips": (Strip(0, 96, 96),) * 5000},
    ],
    ids=str,
)
def test_an_impossible_geometry_fails_the_requests_that_rely_on_it(site, field):
    def lie(welcome: Welcome) -> Welcome:
        # A map of the same shape: the wire knows no constructors.
        return msgspec.structs.replace(
            welcome, geometry={**msgspec.structs.asdict(welcome.geometry), **field}
        )

    failure = failure_with(site, Welcome, lie)
    assert isinstance(failure, MessageError | TransferFailedError | DigestMismatchError)
    site.decode.receivers[0]._peers.clear()
    site.check()


@pytest.mark.parametrize("endpoint", [b"", b"\xff\xff", b"\x81\xa4name\xa4nope"])
def test_an_endpoint_that_makes_no_sense_is_a_typed_failure(site, endpoint):
    def lie(welcome: Welcome) -> Welcome:
        return msgspec.structs.replace(welcome, endpoint=endpoint)

    assert isinstance(failure_with(site, Welcome, lie), TransferFailedError)
    site.check()


def test_another_transport_is_named_with_both_values(site):
    failure = failure_with(site, Welcome, lambda w: msgspec.structs.replace(w, transport="carrier pigeon"))
    assert isinstance(failure, IncompatibleError)
    assert "loopback here and carrier pigeon at prefill.test:5600" in str(failure)
    site.check()


@pytest.mark.parametrize("answer", [Stale(), Renewed([]), NotYet(), Released(0), Refused("no")], ids=repr)
def test_answers_to_another_question_are_typed_failures(answer):
    for replaced in (Welcome, Confirmed):
        site = Site()
        assert failure_with(site, replaced, lambda _, answer=answer: answer) is not None
        site.check()


def test_a_transport_that_cannot_forget_a_peer_costs_nobody_anything(site):
    """NIXL may refuse to invalidate the metadata of an agent that is gone."""
    assert site.outcome(KEYS) is None

    def fails(peer: str) -> None:
        raise TransferFailedError(f"cannot forget {peer}")

    site.decode.transports[0].disconnect = fails
    hand_offs = [site.prefill.prefill([k + 10 * i for k in KEYS]) for i in range(1, 4)]
    site.prefill.die()
    requests = [site.decode.pull(h, KEYS) for h in hand_offs]
    site.prefill.start()
    site.run(8)
    assert all(site.decode.error_of(r) is not None for r in requests)
    site.check()


def test_a_load_of_no_blocks_is_reported_too(site):
    hand_off = site.prefill.prefill(KEYS)
    receiver = site.decode.receivers[0]
    receiver.submit(Load("empty", hand_off, len(KEYS), ()))
    receiver.submit(Load("beyond", hand_off, len(KEYS) + 1, (Run(0, 1),)))
    ended = []
    for _ in range(6):
        receiver.step()
        ended += receiver.outcomes()
    assert {outcome.load.request_id for outcome in ended} == {"empty", "beyond"}
    site.prefill.sweep()
    site.check()


small = st.integers(-2, 200) | st.sampled_from([1 << 31, 1 << 62, (1 << 63) - 1])
answers = st.one_of(
    st.builds(Confirmed, st.binary(max_size=80)),
    st.just(Stale()),
    st.just(NotYet()),
    st.builds(Released, st.integers(0, 9)),
    st.builds(Renewed, st.just([])),
    st.builds(Refused, st.text(max_size=9)),
    st.none(),
)


@seeded
@given(st.lists(answers, min_size=1, max_size=12), st.integers(0, 99))
def test_whatever_is_answered_every_load_is_reported_once(lies, seed):
    site = Site(seed=seed, checks_bytes=True)
    remaining = list(lies)

    def lie(answer):
        told = remaining.pop() if remaining else None
        return answer if told is None else told

    site.wire.alter = lie
    site.wire.lost = lambda question: isinstance(question, Hello | EndOfRead) and site.rng.random() < 0.2
    requests = [site.request([k + 10 * i for k in KEYS]) for i in range(3)]
    for _ in range(6):
        site.run()
        site.clock.advance(CONFIG.transfer_timeout_s)
    site.wire.alter, site.wire.lost = (lambda answer: answer), (lambda question: False)
    assert set(requests) == site.decode.done.keys()
    site.check()


def test_dead_instances_of_a_restarting_server_are_forgotten(site):
    """A prefill server that restarts every day does not fill the decode server's tables."""
    for _ in range(20):
        assert site.outcome(KEYS) is None
        site.prefill.die()
        site.prefill.start()
    assert site.outcome(KEYS) is None
    assert len(site.decode.receivers[0]._peers) == 1
    assert len(site.decode.receivers[0]._transport.connected) == 1
    assert PREFILL in site.wire.servers
