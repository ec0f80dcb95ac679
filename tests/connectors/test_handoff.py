"""F12 and F13: ``kv_transfer_params`` from outside give a sound hand-off or a HandOffError, nothing else."""

from __future__ import annotations

import json
from array import array

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from seeded import seeded

from penstock.connectors.errors import HandOffError
from penstock.connectors.handoff import (
    HandOff,
    fingerprint,
    parse_hand_off,
    wants_remote_decode,
    wants_remote_prefill,
)
from penstock.connectors.runs import count_blocks

GOOD = HandOff(
    remote_engine_id="engine",
    remote_request_id="request",
    remote_host="10.0.0.7",
    remote_port=5600,
    remote_key=None,
    remote_instance="a" * 32,
    remote_lease="b" * 32,
    remote_runs=[(7, 3), (100, 1)],
    remote_num_tokens=61,
    remote_prompt="c" * 32,
    block_size=16,
    tp_size=2,
).to_params()

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-2, 1 << 33)
    | st.floats()
    | st.text(st.characters(codec=None), max_size=40)
    | st.binary(max_size=8)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)
texts = st.text(st.characters(codec=None), max_size=12)


def check(params) -> None:
    """A hand-off that parses keeps every promise of its type; all else is a HandOffError."""
    try:
        hand_off = parse_hand_off(params)
    except HandOffError:
        return
    assert count_blocks(hand_off.runs) == -(-hand_off.remote_num_tokens // hand_off.block_size)
    assert all(run.start >= 0 and run.length > 0 for run in hand_off.runs)
    assert 1 <= hand_off.remote_port <= 65535
    for identity in (hand_off.remote_instance, hand_off.remote_lease, hand_off.remote_prompt):
        assert len(identity) == 32
        assert set(identity) <= set("0123456789abcdef")
    assert hand_off.remote_host.isascii()
    assert not set(hand_off.remote_host) & set(" \n\r\t\0/@#?")
    assert parse_hand_off(hand_off.to_params()) == hand_off


def test_a_hand_off_survives_its_way_through_json_and_a_proxy():
    params = json.loads(json.dumps(GOOD)) | {"proxy_added": {"deep": [1]}}
    assert parse_hand_off(params).to_params() == msgspec.to_builtins(GOOD)
    assert wants_remote_prefill(params)
    assert not wants_remote_decode(params)


@pytest.mark.parametrize("key", sorted(GOOD.keys() - {"do_remote_prefill", "do_remote_decode"}))
def test_each_missing_key_is_named(key):
    params = {k: v for k, v in GOOD.items() if k != key}
    with pytest.raises(HandOffError, match=f"`{key}`"):
        parse_hand_off(params)


@pytest.mark.parametrize("key", sorted(GOOD.keys() - {"do_remote_prefill", "do_remote_decode"}))
@seeded
@given(value=values)
def test_any_value_of_any_key(key, value):
    check({**GOOD, key: value})


@seeded
@given(st.dictionaries(texts | st.sampled_from(sorted(GOOD)), values, max_size=14))
def test_any_dictionary(params):
    check(params)


@seeded
@given(st.dictionaries(st.integers() | st.none() | texts | st.tuples(), values, max_size=3))
def test_keys_of_any_type(extra):
    check({**GOOD, **extra})


@seeded
@given(
    st.lists(st.tuples(st.integers(-3, 1 << 32), st.integers(-3, 1 << 32)), max_size=6),
    st.integers(-1, 1 << 33),
)
def test_runs_and_tokens_must_agree(runs, tokens):
    check({**GOOD, "remote_runs": runs, "remote_num_tokens": tokens})


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("remote_runs", [[0, 4]] * ((1 << 17) + 1), "length <= 131072"),
        ("remote_runs", [], "length >= 1"),
        ("remote_runs", [[0, 5]], "hold 5 blocks, but 61 tokens in blocks of 16 take 4"),
        ("remote_runs", [[0, 1 << 40]], "<= 2147483648"),
        ("remote_runs", [[0, 4, 4]], "length 2"),
        ("remote_request_id", "x" * 1025, "length <= 1024"),
        ("remote_engine_id", "", "length >= 1"),
        ("remote_host", "h" * 256, "length <= 255"),
        ("remote_host", "host/../../etc", "regex"),
        ("remote_host", "host\n", "regex"),
        ("remote_lease", "b" * 32 + "\n", "regex"),
        ("remote_lease", "B" * 32, "regex"),
        ("remote_port", 0, ">= 1"),
        ("remote_port", 65536, "<= 65535"),
        ("remote_port", "5600", "got `str`"),
        ("remote_port", True, "got `bool`"),
        ("remote_num_tokens", 0, ">= 1"),
        ("remote_num_tokens", 61.5, "got `float`"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_was_wrong_and_what_is_allowed_is_said(key, value, reason):
    with pytest.raises(HandOffError) as refusal:
        parse_hand_off({**GOOD, key: value})
    assert reason in str(refusal.value)
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize("params", [None, {}, {"do_remote_prefill": "true", "do_remote_decode": 1}])
def test_only_true_asks_for_a_transfer(params):
    assert not wants_remote_prefill(params)
    assert not wants_remote_decode(params)


tokens = st.lists(st.integers(0, (1 << 32) - 1), max_size=8)
extras = st.lists(st.text(max_size=5), max_size=3)


@seeded
@given(tokens, extras, tokens, extras)
def test_fingerprints_tell_prompts_and_what_enters_their_kv_apart(a, a_extras, b, b_extras):
    assert (fingerprint(a, a_extras) == fingerprint(b, b_extras)) == ((a, a_extras) == (b, b_extras))
    assert fingerprint(array("I", a), tuple(a_extras)) == fingerprint(a, a_extras)
