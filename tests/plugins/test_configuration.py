"""Configuration: every bad value stops with one line that names key, given and allowed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.connectors.config import FlowKVConfig
from penstock.plugins.configuration import ConfigurationError, flowkv_config, scheduler_config
from penstock.schedulers.config import SchedulerConfig


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


def scheduling(**keys: object) -> dict[str, object]:
    return {"penstock": {"scheduler": keys}}


BAD_SCHEDULING = [
    ({"policy": "slow"}, ("scheduler.policy", "'slow'", "dlpm, fcfs, lpm, slo, vtc")),
    ({"quantum_tokens": 0}, ("scheduler.quantum_tokens", "0", "> 0")),
    ({"quantum_tokens": float("nan")}, ("scheduler.quantum_tokens", "nan")),
    ({"quantum": 5}, ("scheduler.quantum", "did you mean quantum_tokens?")),
    ({"trust_headers": 1}, ("scheduler.trust_headers", "1", "bool")),
    ({"weights": {"a": 0}}, ("scheduler.weights", "0.01")),
    ({"weights": {"a": -1}}, ("scheduler.weights", "0.01")),
    ({"weights": {"a": 1e9}}, ("scheduler.weights", "100")),
    ({"weights": {"a": float("nan")}}, ("scheduler.weights", "nan")),
    ({"weights": {"a": "heavy"}}, ("scheduler.weights", "'heavy'")),
    ({"newcomers_per_refill": -1}, ("scheduler.newcomers_per_refill", "-1", ">= 0")),
    ({"weights": {"a" * 300: 1}}, ("scheduler.longest_client_id", "128", "300")),
    ({"max_clients": 0}, ("scheduler.max_clients", "0", ">= 1")),
    ({"extend_weight": 0, "output_weight": 0}, ("scheduler.extend_weight", "above 0")),
]


@pytest.mark.parametrize(
    ("keys", "parts"), BAD_SCHEDULING, ids=[str(keys)[:40] for keys, _ in BAD_SCHEDULING]
)
def test_bad_scheduling_names_key_given_and_allowed(keys, parts):
    with pytest.raises(ConfigurationError) as caught:
        scheduler_config(scheduling(**keys))
    (line,) = str(caught.value).splitlines()
    assert all(part in line for part in parts), line


def test_scheduling_flags_and_json_merge():
    assert scheduler_config(None) == SchedulerConfig()
    config = scheduler_config(scheduling(quantum_tokens=7), {"policy": "vtc"})
    assert (config.policy, config.quantum_tokens) == ("vtc", 7.0)


def test_api_keys_are_never_shown():
    with pytest.raises(ConfigurationError) as caught:
        scheduler_config(scheduling(clients={"sk-very-secret": {"client": ""}}))
    assert "scheduler.clients" in str(caught.value)
    assert "sk-very-secret" not in str(caught.value)


def test_unnamed_requests_are_ordered_by_prefix_for_lpm_alone():
    by_arrival = {
        policy: SchedulerConfig(policy=policy).orders_unnamed_by_arrival for policy in ("dlpm", "vtc", "lpm")
    }
    assert by_arrival == {"dlpm": True, "vtc": True, "lpm": False}
    assert SchedulerConfig(policy="lpm", unnamed_by_arrival=True).orders_unnamed_by_arrival
