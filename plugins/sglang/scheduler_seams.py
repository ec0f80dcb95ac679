"""The upstream names that request scheduling stands on, by what it does with them."""

from __future__ import annotations

from penstock.plugins.seams import Seam, Use

_SCHEDULER = "sglang.srt.managers.scheduler:Scheduler"
_POLICY = "sglang.srt.managers.schedule_policy:SchedulePolicy"
_ADDER = "sglang.srt.managers.schedule_policy:PrefillAdder"
_REQUEST = "sglang.srt.managers.schedule_batch:Req"
_BATCH = "sglang.srt.managers.schedule_batch:ScheduleBatch"
_DECODE = "sglang.srt.disaggregation.decode"
_PREALLOC = f"{_DECODE}:DecodePreallocQueue"
_METRICS = "sglang.srt.observability.metrics_collector:SchedulerMetricsCollectorContext"
_STATE = "sglang.srt.managers.scheduler_components.internal_state:SchedulerInternalStateController"


def read(owner: str, *names: str) -> tuple[Seam, ...]:
    """Names that are read."""
    return tuple(Seam(f"{owner}.{name}", Use.READ) for name in names)


PASSES = (
    Seam(f"{_SCHEDULER}.init_schedule_policy", Use.PATCH, "(self)", wraps=True),
    Seam(f"{_SCHEDULER}.get_prefill_adder_class", Use.PATCH, "(self)", wraps=True),
    Seam(
        "sglang.srt.sampling.sampling_params:SamplingParams.verify",
        Use.PATCH,
        "(self, vocab_size)",
        wraps=True,
    ),
    # Its walk of the waiting list is what the order relies on: one, after ``calc_priority``.
    Seam(
        f"{_SCHEDULER}._get_new_batch_prefill_raw",
        Use.PATCH,
        "(self, prefill_delayer_single_pass, running_batch)",
        fingerprints=("a7cfd4d598bb", "ea6fa4541a12"),
        wraps=True,
    ),
    *read(
        _SCHEDULER,
        "policy",
        "schedule_policy",
        "server_args",
        "tree_cache",
        "waiting_queue",
        "enable_hierarchical_cache",
        "enable_priority_scheduling",
        "schedule_low_priority_values_first",
        "disaggregation_mode",
    ),
    *read("sglang.srt.disaggregation.utils:DisaggregationMode", "PREFILL", "DECODE"),
)
"""How a pass over the waiting requests begins, goes on and ends."""

POLICY = (
    Seam(
        f"{_POLICY}.__init__",
        Use.CALL,
        "(self, policy, tree_cache, enable_hierarchical_cache, enable_priority_scheduling,"
        " schedule_low_priority_values_first)",
    ),
    Seam(f"{_POLICY}.calc_priority", Use.OVERRIDE, "(self, waiting_queue, *args, **kwargs)"),
    Seam("sglang.srt.mem_cache.common:match_kv_cache", Use.CALL, "(req, tree_cache)"),
)
"""The policy object that is replaced."""

ADMISSION = (
    Seam(f"{_ADDER}.add_one_req", Use.OVERRIDE, "(self, req, *args, **kwargs)"),
    Seam(f"{_ADDER}.add_chunked_req", Use.OVERRIDE, "(self, req)"),
    *read(_ADDER, "can_run_list"),
)
"""Where a request, or its next chunk, joins a batch."""

REQUESTS = (
    *read(
        _REQUEST,
        "rid",
        "origin_input_ids",
        "output_ids",
        "sampling_params",
        "prefix_len",
        "extend_end",
        "num_matched_prefix_tokens",
        "finished",
        "finished_reason",
        "routing_key",
        "kv",
    ),
    *read("sglang.srt.managers.schedule_batch:ReqKvInfo", "holds_kv"),
    *read("sglang.srt.sampling.sampling_params:SamplingParams", "custom_params", "max_new_tokens"),
)
"""What is read of a request."""

RESULTS = (
    Seam(f"{_SCHEDULER}.process_batch_result", Use.PATCH, "(self, batch, result)", wraps=True),
    Seam(f"{_SCHEDULER}.on_idle", Use.PATCH, "(self)", wraps=True),
    *read(_SCHEDULER, "metrics_collector"),
    *read("sglang.srt.observability.metrics_collector:SchedulerMetricsCollector", "labels"),
    *read(_SCHEDULER, "metrics_collector_context"),
    Seam("sglang.srt.runtime_context:get_parallel", Use.CALL, "()"),
    *read(_METRICS, "current_scheduler_metrics_enabled", "is_stats_logging_rank"),
)
"""Where tokens come back, and where a scheduler has nothing to do."""

RETRACTION = (Seam(f"{_BATCH}._get_decode_retraction_order", Use.PATCH, "(reqs)", wraps=True),)
"""Whom a batch throws out when memory runs out."""

RUNTIME = (
    Seam(f"{_STATE}.set_internal_state", Use.PATCH, "(self, recv_req)", wraps=True),
    *read(_STATE, "scheduler"),
    *read("sglang.srt.managers.io_struct:SetInternalStateReq", "server_args"),
    *read("sglang.srt.managers.io_struct:SetInternalStateReqOutput", "updated"),
)
"""Changes at run time."""

DECODE_QUEUES = (
    Seam(f"{_PREALLOC}.resume_retracted_reqs", Use.PATCH, "(self, rids_to_check=...)", wraps=True),
    Seam(
        f"{_PREALLOC}._update_handshake_waiters",
        Use.PATCH,
        "(self, rids_to_check=..., pp_good_rids=..., pp_bad_rids=...)",
        wraps=True,
    ),
    # Its walks of the queue are what the order relies on: after the one above, the second gives memory.
    Seam(
        f"{_PREALLOC}.pop_preallocated",
        Use.PATCH,
        "(self, rids_to_check=..., pp_good_rids=..., pp_bad_rids=...)",
        fingerprints=("e4ef9db33ab7", "911bc49f5a02"),
        wraps=True,
    ),
    Seam(
        f"{_DECODE}:SchedulerDisaggregationDecodeMixin.get_new_prebuilt_batch",
        Use.PATCH,
        "(self, running_batch)",
        wraps=True,
    ),
    *read(_PREALLOC, "queue", "retracted_queue", "held_rebootstrap_reqs", "scheduler", "transfer_queue"),
    *read(f"{_DECODE}:DecodeTransferQueue", "queue"),
    *read(f"{_DECODE}:DecodeRequest", "req", "waiting_for_input", "metadata_buffer_index"),
    *read(_SCHEDULER, "running_batch", "result_queue"),
    *read(_REQUEST, "kv"),
    *read("sglang.srt.managers.schedule_batch:ReqKvInfo", "cache_protected_len"),
)
"""Where a decode server gives memory and seats."""

PLANS = (
    Seam(f"{_SCHEDULER}.run_batch", Use.PATCH, "(self, batch, pp_proxy_tensors=...)", wraps=True),
    Seam(f"{_SCHEDULER}._add_request_to_queue", Use.CALL, "(self, req, is_retracted=...)"),
    Seam(f"{_BATCH}.release_req", Use.CALL, "(self, idx, remaing_req_count)"),
    Seam(f"{_BATCH}.filter_batch", Use.CALL, "(self, keep_indices=...)"),
    *read(
        _BATCH,
        "reqs",
        "forward_mode",
        "prefix_lens",
        "extend_num_tokens",
        "batch_is_full",
        "seq_lens_cpu",
    ),
    *read(
        _SCHEDULER,
        "chunked_req",
        "chunked_prefill_size",
        "device",
        "is_mixed_chunk",
        "max_running_requests",
        "page_size",
        "result_queue",
        "token_to_kv_pool_allocator",
    ),
    *read(
        _ADDER,
        "rem_chunk_tokens",
        "chunked_req_limit",
        "cur_rem_tokens",
        "memory_budget",
        "per_req_token_overhead",
    ),
    Seam("sglang.srt.managers.schedule_policy:CLIP_MAX_NEW_TOKENS", Use.READ),
    *read("sglang.srt.mem_cache.prefill_budget:PrefillBudget", "total_offset"),
    *read("sglang.srt.managers.schedule_policy:AddReqResult", "OTHER"),
    *read(_REQUEST, "beam_group", "full_untruncated_fill_ids", "time_stats"),
    *read("sglang.srt.managers.schedule_batch:FINISH_ABORT", "to_json"),
    *read("sglang.srt.mem_cache.allocator.base:BaseTokenToKVPoolAllocator", "available_size"),
    *read("sglang.srt.mem_cache.base_prefix_cache:BasePrefixCache", "evictable_size"),
)
"""What a plan is made of, and carried out with."""

RANKS = (
    # All that a pass hears goes through it, in one list, and comes out of it on every rank.
    Seam(
        "sglang.srt.managers.scheduler_components.request_receiver"
        ":SchedulerRequestReceiver._broadcast_reqs_across_ranks",
        Use.PATCH,
        "(self, recv_reqs, local_reqs=...)",
        fingerprints=("454ec15bc71c",),
        wraps=True,
    ),
    # Its loop sends what a pass heard, once, and nothing else that way.
    Seam(
        "sglang.srt.managers.scheduler_pp_mixin:SchedulerPPMixin._pp_send_pyobj_to_next_stage",
        Use.PATCH,
        "(self, data, async_send=...)",
        wraps=True,
    ),
    Seam(
        "sglang.srt.managers.scheduler_pp_mixin:SchedulerPPMixin.event_loop_pp",
        Use.READ,
        "(self)",
        fingerprints=("d5d32db53dd9",),
        wraps=True,
    ),
)
"""Where one rank tells the others what it heard."""

EDGE = (
    Seam(
        "sglang.srt.entrypoints.http_server:launch_server",
        Use.PATCH,
        "(server_args, init_tokenizer_manager_func=..., run_scheduler_process_func=..., "
        "run_detokenizer_process_func=..., execute_warmup_func=..., launch_callback=...)",
        wraps=True,
    ),
    Seam("sglang.srt.entrypoints.http_server:app", Use.READ),
)
"""Where requests come in."""
