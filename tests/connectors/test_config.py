"""FlowKV's configuration refuses what cannot work, before anything listens."""

import msgspec
import pytest

from penstock.connectors.config import ANY_ADDRESS, FlowKVConfig


@pytest.mark.parametrize("host", ANY_ADDRESS)
def test_all_interfaces_need_an_address_for_peers(host):
    with pytest.raises(msgspec.ValidationError, match="advertise_host"):
        msgspec.convert({"host": host}, FlowKVConfig)
    assert msgspec.convert({"host": host, "advertise_host": "10.1.2.3"}, FlowKVConfig).host == host


def test_by_default_only_this_machine_is_served():
    assert FlowKVConfig().host == "127.0.0.1"
