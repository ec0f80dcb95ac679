"""Configuration: every bad value stops with one line that names key, given and allowed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.connectors.config import FlowKVConfig
from penstock.plugins.configuration import ConfigurationError, flowkv_config


def ours(**keys: object) -> dict[str, object]:
    return {"penstock": {"flowkv": keys}, "of_someone_else": 1}


def test_nothing_given_is_the_default():
    assert flowkv_config(None, None) == flowkv_config({}, {}) == FlowKVConfig()


def test_both_sources_merge_and_may_agree():
    config = flowkv_config(ours(port=7, lease_s=20), {"lease_s": 20, "nixl_backends": ["UCX", "LIBFABRIC"]})
    assert (config.port, config.lease_s, config.nixl_backends) == (7, 20.0, ("UCX", "LIBFABRIC"))


BAD = [
    # keys, then what the line must name: the key, the value given, what is allowed
    ({"port": 70_000}, ("flowkv.port", "70000", "65535")),
    ({"port": -1}, ("flowkv.port", "-1", ">= 0")),
    ({"port": "7000"}, ("flowkv.port", "'7000'", "int")),
    ({"port": True}, ("flowkv.port", "True", "int")),
    ({"prot": 1}, ("flowkv.prot", "did you mean port?", "lease_s")),
    ({"host": ""}, ("flowkv.host", "''", "length >= 1")),
    ({"digest": "ful"}, ("flowkv.digest", "'ful'", "full, off, sampled")),
    ({"transport": "tcp"}, ("flowkv.transport", "'tcp'", "loopback, nixl")),
    ({"transfer_timeout_s": 0}, ("flowkv.transfer_timeout_s", "0", "> 0")),
    ({"handshake_timeout_s": float("inf")}, ("flowkv.handshake_timeout_s", "inf", "<= 86400")),
    ({"lease_s": 3}, ("flowkv.heartbeat_s", "5.0", "less than lease_s=3.0")),
    ({"lease_s": 700}, ("flowkv.lease_s", "700", "longest_lease_s=600.0")),
    ({"allowed_hosts": "a"}, ("flowkv.allowed_hosts", "'a'", "array")),
    ({"nixl_backends": ["UCX", 3]}, ("flowkv.nixl_backends", "3", "str")),
    ({1: 2}, ("flowkv.1", "unknown key", "port")),
]


@pytest.mark.parametrize(("keys", "parts"), BAD)
def test_impossible_value_is_one_line(keys, parts):
    for additional, extra in ((None, keys), ({"penstock": {"flowkv": keys}}, None)):
        with pytest.raises(ConfigurationError) as caught:
            flowkv_config(additional, extra)
        message = str(caught.value)
        assert "\n" not in message
        assert all(part in message for part in parts), message


def test_contradiction_names_both_sources_and_values():
    with pytest.raises(
        ConfigurationError, match="additional_config says 1, kv_connector_extra_config says 2"
    ):
        flowkv_config(ours(port=1), {"port": 2})


@pytest.mark.parametrize("section", [3, {"flowkv": 3}, {"flow": {}}, []])
def test_malformed_section_is_named(section):
    with pytest.raises(ConfigurationError, match="penstock"):
        flowkv_config({"penstock": section}, None)


def test_secret_is_never_shown():
    for additional, extra in ((None, {"shared_key": 123}), (ours(shared_key="hush"), {"shared_key": "mute"})):
        with pytest.raises(ConfigurationError) as caught:
            flowkv_config(additional, extra)
        assert not any(secret in str(caught.value) for secret in ("123", "hush", "mute"))


KEYS = st.fixed_dictionaries(
    {},
    optional={
        "port": st.integers(0, 65535),
        "lease_s": st.floats(6, 600),
        "digest": st.sampled_from(["off", "full"]),
    },
)


@given(KEYS, KEYS)
def test_where_a_key_is_given_does_not_matter(one, other):
    if any(one[key] != other[key] for key in one.keys() & other.keys()):
        with pytest.raises(ConfigurationError):
            flowkv_config(ours(**one), other)
    else:
        assert flowkv_config(ours(**one), other) == flowkv_config(None, one | other)
        assert flowkv_config(ours(**one), other) == flowkv_config(ours(**other), one)
