"""The upstream names that FlowKV stands on, by what it does with them."""

from __future__ import annotations

from penstock.plugins.seams import Seam, Use
from penstock.plugins.sglang.plain_caches import SEAMS as PLAIN_CACHES
from penstock.plugins.sglang.scheduler_seams import read

_CONN = "sglang.srt.disaggregation.common.conn"
_MANAGER = f"{_CONN}:CommonKVManager"
_SENDER = f"{_CONN}:CommonKVSender"
_RECEIVER = f"{_CONN}:CommonKVReceiver"
_UTILS = "sglang.srt.disaggregation.utils"
_PLATFORM = "sglang.srt.platforms.interface:SRTPlatform"
_POOL = "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool"
_ALLOCATOR = "sglang.srt.mem_cache.allocator.paged:PagedTokenToKVPoolAllocator"
_CONTEXT = "sglang.srt.runtime_context"


def override(owner: str, **methods: str) -> tuple[Seam, ...]:
    """Methods of ``owner`` that upstream calls and we provide."""
    return tuple(Seam(f"{owner}.{name}", Use.OVERRIDE, signature) for name, signature in methods.items())


REGISTRY = (
    *PLAIN_CACHES,
    *read(f"{_UTILS}:TransferBackend", "NIXL"),
    *read(f"{_UTILS}:KVClassType", "KVARGS", "MANAGER", "SENDER", "RECEIVER", "BOOTSTRAP_SERVER"),
    Seam(f"{_UTILS}:get_kv_class", Use.PATCH, "(transfer_backend, class_type)", wraps=True),
    Seam(f"{_PLATFORM}.get_kv_pool_cls", Use.PATCH, "(self, *, kind)", wraps=True),
    Seam(f"{_PLATFORM}.get_paged_allocator_cls", Use.PATCH, "(self)", wraps=True),
    Seam(f"{_CONN}:CommonKVBootstrapServer.__init__", Use.CALL, "(self, host, port)"),
    Seam(f"{_CONTEXT}:get_disagg", Use.CALL, "()"),
    Seam(f"{_CONTEXT}:get_exec", Use.CALL, "()"),
    Seam(f"{_CONTEXT}:get_memory", Use.CALL, "()"),
    Seam(f"{_CONTEXT}:get_parallel", Use.CALL, "()"),
)
"""How SGLang comes to our classes."""

MANAGER = (
    Seam(
        f"{_MANAGER}.__init__",
        Use.CALL,
        "(self, args, disaggregation_mode, server_args, is_mla_backend=...)",
    ),
    *override(
        _MANAGER,
        try_ensure_parallel_info="(self, bootstrap_addr)",
        build_receiver_registration_message="(self)",
        build_receiver_metadata_message=(
            "(self, *, bootstrap_room, required_dst_info_num, kv_indices, aux_index, state_indices,"
            " decode_prefix_len, is_dummy, device_kv_indices=...)"
        ),
        is_abort_release_safe="(self, bootstrap_room, required_acks)",
    ),
    *override("sglang.srt.disaggregation.base.conn:BaseKVManager", teardown="(self)"),
    Seam(f"{_MANAGER}.update_status", Use.CALL, "(self, bootstrap_room, status)"),
    Seam(f"{_MANAGER}.record_failure", Use.CALL, "(self, bootstrap_room, failure_reason)"),
    Seam(f"{_MANAGER}.conclude_failure", Use.CALL, "(self, *, bootstrap_room, failure_reason)"),
    Seam(
        f"{_MANAGER}.send_kv_status_message",
        Use.CALL,
        "(self, *, targets, bootstrap_room, status, failure_reason=...)",
    ),
    Seam(f"{_MANAGER}.parse_kv_status_message", Use.CALL, "(self, msg)"),
    Seam(
        f"{_MANAGER}.apply_prefill_status",
        Use.CALL,
        "(self, *, bootstrap_room, status, prefill_rank, failure_reason=...)",
    ),
    Seam(f"{_MANAGER}._send_multipart_locked", Use.CALL, "(self, endpoint, parts, is_ipv6=...)"),
    Seam(f"{_MANAGER}._make_worker_recv", Use.CALL, "(self, socket)"),
    Seam(f"{_MANAGER}._start_heartbeat_checker_thread", Use.CALL, "(self)"),
    *read(
        _MANAGER,
        "kv_status_msg_tag",
        "kv_status_msg_carries_reason",
        "reports_transfer_latency",
        "request_status",
        "transfer_infos",
        "req_to_decode_prefix_len",
        "prefill_info_table",
        "addr_to_rooms_tracker",
        "attn_tp_size",
        "local_ip",
        "rank_port",
        "server_socket",
        "_heartbeat_shutdown",
        "_zmq_ctx",
    ),
    Seam(f"{_CONN}:AbortNotification.from_zmq", Use.CALL, "(cls, msg)"),
    Seam("sglang.srt.utils.network:get_local_ip_auto", Use.READ),
    *read("sglang.srt.utils.network:NetworkAddress", "to_tcp", "is_ipv6"),
)
"""The manager, which SGLang's own base drives."""

ENDS = (
    *override(_SENDER, poll="(self)", abort="(self)", clear="(self)"),
    # It hands every chunk to the manager.
    Seam(
        f"{_SENDER}.send",
        Use.CALL,
        "(self, kv_indices, state_indices=..., num_kv_tokens=..., indices_event=...)",
    ),
    *override(_RECEIVER, poll="(self)", clear="(self)", failure_exception="(self)"),
    Seam(
        f"{_RECEIVER}._get_bootstrap_info_from_server",
        Use.CALL,
        "(self, prefill_dp_rank, prefill_cp_rank, target_tp_rank, target_pp_rank)",
    ),
    Seam(f"{_RECEIVER}.ensure_abort_notified", Use.CALL, "(self)"),
    *read(_RECEIVER, "bootstrap_addr", "bootstrap_infos", "abort_notified"),
    Seam(
        f"{_RECEIVER}.send_metadata",
        Use.CALL,
        "(self, kv_indices, aux_index=..., state_indices=..., decode_prefix_len=...)",
    ),
)
"""One request's half on either server."""

POOL = (
    *override(
        _POOL,
        _create_buffers_normal="(self)",
        get_contiguous_buf_infos="(self)",
    ),
    Seam(f"{_POOL}._kv_buffer_shapes", Use.CALL, "(self)"),
    *read(_POOL, "k_buffer", "v_buffer", "kv_cache_layout", "head_num", "head_dim"),
)
"""The pool in one region."""

ALLOCATION = (
    *override(
        _ALLOCATOR,
        clear="(self)",
        available_size="(self)",
        get_all_free_pages="(self)",
        merge_and_sort_free="(self)",
        alloc="(self, need_size)",
        alloc_extend=(
            "(self, prefix_lens, prefix_lens_cpu, seq_lens, seq_lens_cpu, last_loc, extend_num_tokens,"
            " num_new_pages=...)"
        ),
        alloc_decode="(self, seq_lens, seq_lens_cpu, last_loc)",
        _release_page_ids="(self, *page_ids)",
    ),
    *override(
        "sglang.srt.mem_cache.allocator.base:BaseTokenToKVPoolAllocator",
        resize="(self, config)",
        evict_to_free_tokens="(self, tree_cache, num_tokens)",
    ),
    *read(_ALLOCATOR, "free_pages", "staged_pages", "num_staged_pages", "num_pages"),
    Seam(
        "sglang.srt.utils.common:get_num_new_pages",
        Use.CALL,
        "(seq_lens, page_size, prefix_lens=..., decode=...)",
    ),
)
"""The allocator that prefers runs."""

SERIES = (
    Seam("sglang.srt.managers.scheduler:Scheduler.init_metrics_collector", Use.PATCH, "(self)", wraps=True),
    *read("sglang.srt.managers.scheduler:Scheduler", "metrics_collector"),
    *read("sglang.srt.observability.metrics_collector:SchedulerMetricsCollector", "labels"),
)
"""The labels of the scheduler's series."""
