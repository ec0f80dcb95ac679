"""F15, F16, F24: engines that differ are refused, and each refusal names the field with both values."""

from __future__ import annotations

import msgspec
import pytest
from two_engines import CONFIG, PREFILL, Site

from penstock.connectors.compat import CompatibilityRecord, mismatches, require_compatible
from penstock.connectors.errors import IncompatibleError
from penstock.connectors.messages import Hello, Refused, Welcome

KEYS = [1, 2, 3]
OTHER = {
    "protocol": 2,
    "engine": "test 1.1",
    "model": "small",
    "cache_dtype": "fp8_e4m3",
    "block_size": 8,
    "tensor_parallel_size": 2,
    "num_layers": 4,
    "num_kv_heads": 1,
    "head_size": 16,
    "layout": "LBHNC",
    "attention_backend": "other",
    "packing": "amx",
    "layer_order": "other order",
    "strip_widths": (32, 32, 32),
    "digest": "xxh3-64 sampled",
}


def test_every_field_of_the_record_is_tested():
    assert set(OTHER) == set(CompatibilityRecord.__struct_fields__)


@pytest.mark.parametrize("field", OTHER)
def test_the_sender_refuses_and_the_receiver_says_why_from_its_own_side(field):
    site = Site(prefill_record={field: OTHER[field]})
    ours = getattr(site.decode.receivers[0]._record, field)
    error = site.outcome(KEYS)
    assert isinstance(error, IncompatibleError)
    assert f"{field} is {ours!r} here and {OTHER[field]!r} at prefill.test:5600" in str(error)
    refused = site.prefill.sender.answer(Hello(0, site.decode.receivers[0]._record))
    assert isinstance(refused, Refused)
    assert str(refused.mismatches[0]) == f"{field} is {OTHER[field]!r} here and {ours!r} at the peer"
    assert site.decode.transports[0].reads == 0
    assert site.decode.pool.num_free == site.decode.pool.num_blocks


@pytest.mark.parametrize("field", OTHER)
def test_the_receiver_checks_a_sender_that_does_not(field):
    site = Site()

    def careless(answer):
        if not isinstance(answer, Welcome):
            return answer
        record = msgspec.structs.replace(answer.record, **{field: OTHER[field]})
        return msgspec.structs.replace(answer, record=record)

    site.wire.alter = careless
    ours = getattr(site.decode.receivers[0]._record, field)
    error = site.outcome(KEYS)
    assert isinstance(error, IncompatibleError)
    assert f"{field} is {ours!r} here and {OTHER[field]!r} at the peer" in str(error)
    assert "prefill.test:5600" in str(error)
    site.wire.alter = lambda answer: answer
    site.check()


def test_all_differing_fields_are_named_at_once():
    record = Site().prefill.record
    other = msgspec.structs.replace(record, **OTHER)
    assert [m.field for m in mismatches(record, other)] == list(OTHER)
    with pytest.raises(IncompatibleError) as refusal:
        require_compatible(record, other, "peer")
    assert all(f"{name} is " in str(refusal.value) for name in OTHER)
    assert mismatches(record, record) == []


def test_f15_a_rank_that_the_sender_does_not_have_is_refused_by_number():
    site = Site(ranks=2)
    site.prefill.sender.open({0: site.prefill.sender._welcomes[0]})
    request_id = site.request(KEYS)
    site.run()
    assert "serves ranks 0 to 0, not rank 1" in str(site.decode.error_of(request_id))


def test_a_sender_that_is_still_starting_says_so_and_is_asked_again(site):
    welcomes = site.prefill.sender._welcomes
    site.prefill.sender.open({})
    assert "serves no rank yet" in str(site.outcome(KEYS))
    site.prefill.sender.open(welcomes)
    site.check()


def test_f24_after_the_upgrade_of_the_sender_the_pair_works_again(site):
    site.prefill.record = msgspec.structs.replace(site.prefill.record, engine="test 0.9")
    site.prefill.start()
    assert isinstance(site.outcome(KEYS), IncompatibleError)
    site.prefill.die()
    site.prefill.record = msgspec.structs.replace(site.prefill.record, engine="test 1.0")
    site.prefill.start()
    assert site.outcome(KEYS) is None
    assert PREFILL in site.wire.servers
    assert CONFIG.digest == "full"
    site.check()
