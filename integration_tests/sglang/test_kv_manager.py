"""Servers that cannot work together: the checks of SGLang and ours fail the request by name, no scheduler."""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from types import SimpleNamespace

import msgspec
import pytest
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common import conn

from penstock.connectors.compat import CompatibilityRecord
from penstock.plugins.sglang.kv_manager import FlowKVManager
from penstock.plugins.sglang.room_messages import Greeting, Wanted, frames
from penstock.plugins.sglang.transfer_series import TransferSeries

ADDRESS, ROOM, AGENT = "10.0.0.1:8998", 7, "a" * 32
PREFILL = {
    "attn_tp_size": 1,
    "attn_cp_size": 1,
    "dp_size": 1,
    "pp_size": 1,
    "page_size": 16,
    "kv_cache_dtype": "float32",
    "follow_bootstrap_room": True,
}
RECORD = CompatibilityRecord(
    engine="sglang 0.5",
    model="m",
    cache_dtype="float32",
    block_size=16,
    tensor_parallel_size=1,
    num_layers=2,
    num_kv_heads=2,
    head_size=8,
    layout="tokens",
    attention_backend="any",
    packing="nhd",
    layer_order="0 to 2",
    strip_widths=(1024,),
    digest="off",
)


@pytest.fixture
def manager() -> FlowKVManager:
    """A manager with the books that ``CommonKVManager`` keeps, and nothing that listens."""
    made = object.__new__(FlowKVManager)
    made.__dict__.update(
        kv_args=SimpleNamespace(page_size=16, state_types=[], engine_rank=0),
        kv_cache_dtype_str="float32",
        kv_layout=None,
        dsv41_spec_layout=None,
        is_mla_backend=False,
        is_hybrid_mla_backend=False,
        attn_tp_size=1,
        dcp_size=1,
        prefill_info_table={},
        addr_to_rooms_tracker=defaultdict(set, {ADDRESS: {ROOM}}),
        request_status={ROOM: KVPoll.Bootstrapping},
        failure_records={},
        failure_lock=threading.Lock(),
        transfer_infos={},
        incompatible=set(),
        _objections={},
        _record=RECORD,
        refused={},
        _series=TransferSeries(time.monotonic, logging.getLogger("test"), {}),
    )
    return made


@pytest.mark.parametrize(
    ("field", "theirs", "said"),
    [
        ("page_size", 32, "page_size=32"),
        ("kv_cache_dtype", "fp8_e4m3", "kv_cache_dtype=fp8_e4m3"),
        ("attn_tp_size", 2, "tensor_parallel_size is 2 at prefill and 1 at decode"),
    ],
)
def test_a_prefill_server_that_differs_fails_its_rooms_by_name(
    manager: FlowKVManager, monkeypatch, field: str, theirs: object, said: str
):
    answer = SimpleNamespace(status_code=200, json=lambda: {**PREFILL, field: theirs})
    monkeypatch.setattr(conn.requests, "get", lambda *args, **kwargs: answer)
    monkeypatch.setattr(conn.CommonKVManager, "_resolve_rank_mapping", lambda self, info: None)
    assert not manager.try_ensure_parallel_info(ADDRESS)
    assert manager.request_status[ROOM] == KVPoll.Failed
    assert said in manager.failure_records[ROOM]
    assert manager.prefill_info_table == {}
    assert manager.incompatible == {ADDRESS}


def test_a_decode_server_that_differs_is_told_every_field(manager: FlowKVManager, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(manager, "send_kv_status_message", lambda **said: told.append(said["failure_reason"]))
    theirs = msgspec.structs.replace(RECORD, layout="layers", digest="xxh3-64 full")
    manager._from_decode(frames(Greeting(AGENT, theirs)))
    manager._from_decode(frames(Wanted(AGENT, ROOM, "10.0.0.2", 5600, 0)))
    assert manager.request_status[ROOM] == KVPoll.Failed
    (reason,) = told
    assert "layout is 'tokens' at prefill and 'layers' at decode" in reason
    assert "digest is 'off' at prefill" in reason


def test_a_room_that_is_refused_before_its_request_comes_is_remembered(manager: FlowKVManager):
    del manager.request_status[ROOM]
    manager._from_decode(frames(Wanted(AGENT, ROOM, "10.0.0.2", 5600, 0)))
    assert "has not introduced itself" in manager.refused[ROOM]
