"""Sealed frames: with a shared key, only what the other side said, once and lately, comes through."""

from __future__ import annotations

import hmac

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from seeded import seeded
from two_engines import Clock

from penstock.connectors.envelope import WINDOW_S, Frame, Seal
from penstock.connectors.errors import MessageError

bodies = st.binary(max_size=200)


def pair(key: str | None = "secret") -> tuple[Seal, Seal, Clock]:
    clock = Clock()
    return Seal(key, clock), Seal(key, clock), clock


def frame_of(data: bytes) -> Frame:
    return msgspec.msgpack.decode(data, type=Frame)


@seeded
@given(bodies)
def test_what_is_sealed_opens_once(body):
    asker, server, _ = pair()
    question, nonce = asker.seal(body)
    opened = server.open_question(question)
    assert (opened.body, opened.nonce) == (body, nonce)
    answer, _ = server.seal(body, answers=opened.nonce)
    assert asker.open_answer(answer).answers == nonce
    with pytest.raises(MessageError, match="replayed"):
        server.open_question(question)


@pytest.mark.parametrize("flip", [0x01, 0x20, 0x80, 0xFF])
def test_any_altered_byte_is_refused_or_changes_nothing(flip):
    asker, server, _ = pair()
    question, _ = asker.seal(b"release everything")
    refused = 0
    for at in range(len(question)):
        altered = bytearray(question)
        altered[at] ^= flip
        try:
            opened = server.open_question(bytes(altered))
        except MessageError:
            refused += 1
        else:
            assert opened == frame_of(question)
    assert refused >= len(question) - 2


@seeded
@given(bodies, st.data())
def test_bytes_cannot_wander_between_the_parts_of_a_signed_frame(body, data):
    asker, server, _ = pair()
    sealed, _ = asker.seal(body, answers=data.draw(st.binary(max_size=16)))
    frame = frame_of(sealed)
    whole = frame.nonce + frame.answers + frame.body
    a, b = sorted(data.draw(st.tuples(*[st.integers(0, min(32, len(whole)))] * 2)))
    moved = msgspec.structs.replace(frame, nonce=whole[:a], answers=whole[a:b], body=whole[b:])
    if moved == frame or len(moved.nonce) > 16 or len(moved.answers) > 16:
        return
    for opener in (server.open_question, server.open_answer):
        with pytest.raises(MessageError):
            opener(msgspec.msgpack.encode(moved))


@pytest.mark.parametrize("key", [None, "another", "secret "])
def test_unsigned_and_foreign_frames_are_refused(key):
    stranger, (_, server, clock) = Seal(key, Clock()), pair()
    question, nonce = stranger.seal(b"hello")
    with pytest.raises(MessageError, match="unsigned or was altered"):
        server.open_question(question)
    answer, _ = stranger.seal(b"hello", answers=nonce)
    with pytest.raises(MessageError, match="unsigned or was altered"):
        server.open_answer(answer)
    assert clock.now


def test_a_question_cannot_be_passed_off_as_an_answer_nor_the_other_way_round():
    asker, server, _ = pair()
    question, nonce = asker.seal(b"hello")
    with pytest.raises(MessageError, match="answers nothing"):
        asker.open_answer(question)
    answer, _ = server.seal(b"hello", answers=nonce)
    with pytest.raises(MessageError, match="an answer"):
        server.open_question(answer)


@pytest.mark.parametrize(
    "skew", [-WINDOW_S - 1, WINDOW_S + 1, 1e9, float("inf"), float("-inf"), float("nan")]
)
def test_a_time_stamp_outside_the_window_is_refused(skew):
    clock = Clock()
    sealed, _ = Seal("secret", lambda: clock.now + skew).seal(b"hello")
    with pytest.raises(MessageError, match="s old"):
        Seal("secret", clock).open_question(sealed)


def test_clocks_may_differ_by_the_window():
    for skew in (-WINDOW_S, WINDOW_S):
        clock = Clock()
        sealed, _ = Seal("secret", lambda clock=clock, skew=skew: clock.now + skew).seal(b"hello")
        assert Seal("secret", clock).open_question(sealed).body == b"hello"


@seeded
@given(st.lists(st.floats(0, 3 * WINDOW_S), max_size=60), st.floats(-WINDOW_S, WINDOW_S))
def test_no_replay_gets_through_at_any_later_time(waits, skew):
    asker_clock, clock = Clock(), Clock()
    asker, server = Seal("secret", asker_clock), Seal("secret", clock)
    said = []
    for wait in waits:
        clock.now += wait
        asker_clock.now = clock.now + skew
        said.append(asker.seal(b"x")[0])
        server.open_question(said[-1])
        for old in said:
            with pytest.raises(MessageError):
                server.open_question(old)


def test_memory_of_nonces_is_bounded_in_time():
    asker, server, clock = pair()
    for _ in range(1000):
        server.open_question(asker.seal(b"x")[0])
    assert len(server._seen) == 1000
    clock.advance(2 * WINDOW_S + 1)
    server.open_question(asker.seal(b"x")[0])
    assert len(server._seen) == 1


@pytest.mark.parametrize("key", [None, "secret"])
def test_nothing_unsigned_is_remembered(key):
    _, server, _ = pair(key)
    stranger = Seal("foreign" if key else None, Clock())
    for _ in range(100):
        try:
            server.open_question(stranger.seal(b"x")[0])
        except MessageError:
            assert key
    assert not server._seen


@seeded
@given(st.binary(max_size=300))
def test_random_bytes_raise_nothing_but_message_errors(data):
    for key in (None, "secret"):
        for opener in (Seal(key, Clock()).open_question, Seal(key, Clock()).open_answer):
            try:
                opener(data)
            except MessageError:
                continue
            assert key is None


@seeded
@given(st.data())
def test_mutated_frames_raise_nothing_but_message_errors(data):
    sealed, _ = Seal(None, Clock()).seal(data.draw(bodies), answers=data.draw(st.binary(max_size=16)))
    mutated = bytearray(sealed)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutated)))
        mutated[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=6))
    for opener in (Seal(None, Clock()).open_question, Seal(None, Clock()).open_answer):
        try:
            opener(bytes(mutated))
        except MessageError:
            continue


@pytest.mark.parametrize("nested", [b"\x91", b"\x81\xa1a"], ids=["arrays", "maps"])
def test_a_deeply_nested_frame_is_refused(nested):
    good, _ = Seal(None, Clock()).seal(b"x")
    deep = b"\x96" + good[1:] + nested * 100_000
    with pytest.raises(MessageError):
        Seal(None, Clock()).open_question(deep)


@seeded
@given(st.floats(allow_nan=True) | st.integers(-(1 << 63), (1 << 64) - 1), st.binary(max_size=16))
def test_any_signed_time_and_nonce_is_judged_without_a_crash(sent, nonce):
    """The holder of the key may be buggy too."""
    _, server, _ = pair()
    frame = Frame(sent, nonce, b"", b"x")
    try:
        proof = server._proof(frame)
    except (TypeError, OverflowError):
        return
    assert hmac.compare_digest(proof, server._proof(frame))
    try:
        server.open_question(msgspec.msgpack.encode(msgspec.structs.replace(frame, proof=proof)))
    except MessageError:
        return
    assert abs(float(sent) - 1000.0) <= WINDOW_S
