"""Control messages: what is said is what is heard, and bytes from outside raise nothing but MessageError."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from seeded import seeded
from two_engines import CONFIG, Pool, record_of

from penstock.connectors.compat import Mismatch
from penstock.connectors.errors import MessageError
from penstock.connectors.messages import (
    MAX_LEASES,
    MAX_QUESTION_BYTES,
    Confirmed,
    EndOfRead,
    Hello,
    NotYet,
    Refused,
    Release,
    Released,
    Renew,
    Renewed,
    Stale,
    Welcome,
    decode_answer,
    decode_question,
    encode,
)

POOL = Pool(__import__("random").Random(0), 16, "LBHNC", 1)
RECORD = record_of(POOL, CONFIG)
LEASE = "0123456789abcdef" * 2
QUESTIONS = [
    Hello(3, RECORD),
    Renew([LEASE] * 3),
    EndOfRead(LEASE, 1),
    Release([LEASE], "given up"),
]
ANSWERS = [
    Welcome(LEASE, RECORD, POOL.geometries[0], "nixl", b"\x00\xff" * 30),
    Refused("no", [Mismatch("layout", "'a'", "'b'")]),
    Renewed([LEASE]),
    Confirmed(b"\x01" * 24),
    NotYet(),
    Stale(),
    Released(2),
]


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda q: type(q).__name__)
def test_questions_arrive_as_asked_and_are_not_answers(question):
    assert decode_question(encode(question)) == question
    with pytest.raises(MessageError):
        decode_answer(encode(question))


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda a: type(a).__name__)
def test_answers_arrive_as_given_and_are_not_questions(answer):
    assert decode_answer(encode(answer)) == answer
    with pytest.raises(MessageError):
        decode_question(encode(answer))


@seeded
@given(st.binary(max_size=400))
def test_random_bytes_raise_nothing_but_message_errors(data):
    for decode in (decode_question, decode_answer):
        try:
            decode(data)
        except MessageError:
            continue


@seeded
@given(st.sampled_from(QUESTIONS + ANSWERS), st.data())
def test_mutated_messages_raise_nothing_but_message_errors(message, data):
    frame = bytearray(encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(frame)))
        frame[at : at + data.draw(st.integers(0, 3))] = data.draw(
            st.binary(max_size=6)
            | st.sampled_from([b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"])
        )
    for decode in (decode_question, decode_answer):
        try:
            decode(bytes(frame))
        except MessageError:
            continue


@pytest.mark.parametrize("head", [b"\x91", b"\x81\xa1a", b"\x82\xa4type\xa5hello\xa6record\x81\xa1a"])
def test_deep_nesting_is_refused(head):
    with pytest.raises(MessageError):
        decode_question(head * 50_000)


def test_sizes_are_limited_before_anything_is_parsed():
    with pytest.raises(MessageError, match=f"at most {MAX_QUESTION_BYTES}"):
        decode_question(b"\x00" * (MAX_QUESTION_BYTES + 1))
    assert decode_question(encode(Renew([LEASE] * MAX_LEASES)))
    with pytest.raises(MessageError, match=str(MAX_LEASES)):
        decode_question(encode(Renew([LEASE] * (MAX_LEASES + 1))))


@pytest.mark.parametrize("lease", ["", "x" * 32, LEASE[:-1], LEASE + "0", LEASE + "\n", LEASE.upper()])
def test_a_lease_that_is_no_lease_is_refused(lease):
    with pytest.raises(MessageError, match="lease"):
        decode_question(encode(EndOfRead(lease, 0)))


def test_a_later_version_of_the_protocol_can_still_be_told_apart():
    """F24: fields that this version does not know do not hide the version number."""
    fields = {**msgspec.to_builtins(RECORD), "protocol": 2, "added_in_version_2": [1, 2]}
    hello = {"type": "hello", "rank": 0, "record": fields, "more": True}
    heard = decode_question(msgspec.msgpack.encode(hello))
    assert isinstance(heard, Hello)
    assert heard.record.protocol == 2
    welcome = {**msgspec.to_builtins(ANSWERS[0]), "record": fields, "more": True, "endpoint": b"x"}
    answer = decode_answer(msgspec.msgpack.encode(welcome))
    assert isinstance(answer, Welcome)
    assert answer.record.protocol == 2
