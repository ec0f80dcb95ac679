"""The upstream names that request scheduling stands on, by what it does with them."""

from __future__ import annotations

from penstock.plugins.seams import Seam, Use
from penstock.plugins.vllm.flowkv_seams import override, read

_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_QUEUE = "vllm.v1.core.sched.request_queue:RequestQueue"

STEPS = (
    *override(
        _SCHEDULER,
        __init__="(self, vllm_config, *args, **kwargs)",
        schedule="(self, *args, **kwargs)",
        make_stats="(self, *args, **kwargs)",
        _reserve_prefill_lookahead="(self, request, num_computed_tokens, num_new_tokens)",
        _update_request_as_session="(self, session, *args, **kwargs)",
        _free_request="(self, request, *args, **kwargs)",
    ),
    # Without it what is done behind the model is done before the next step.
    Seam(f"{_SCHEDULER}.get_grammar_bitmask", Use.OVERRIDE, "(self, *args, **kwargs)", optional=True),
    Seam(f"{_SCHEDULER}.has_unfinished_requests", Use.READ, optional=True),
    *read(_SCHEDULER, "waiting", "running", "requests", "vllm_config"),
    *read("vllm.v1.core.sched.output:SchedulerOutput", "num_scheduled_tokens"),
    *read("vllm.v1.metrics.stats:SchedulerStats", "kv_connector_stats"),
)
"""What a step does, and when a request ends."""

QUEUE = (
    *override(
        _QUEUE,
        add_request="(self, request)",
        pop_request="(self)",
        peek_request="(self)",
        prepend_request="(self, request)",
        prepend_requests="(self, requests)",
        remove_request="(self, request)",
        remove_requests="(self, requests)",
        __bool__="(self)",
        __len__="(self)",
        __iter__="(self)",
    ),
)
"""The queue that is replaced."""

REQUESTS = (
    *read(
        "vllm.v1.request:Request",
        "request_id",
        "status",
        "sampling_params",
        "num_prompt_tokens",
        "num_tokens",
        "num_computed_tokens",
        "num_output_tokens",
        "block_hashes",
        "skip_reading_prefix_cache",
        "resumable",
    ),
    *read("vllm.v1.request:RequestStatus", "RUNNING", "PREEMPTED"),
    *read("vllm.sampling_params:SamplingParams", "extra_args"),
)
"""What is read of a request."""

CACHE = (
    *read(_SCHEDULER, "kv_cache_manager", "kv_cache_config", "hash_block_size"),
    *read("vllm.v1.core.kv_cache_manager:KVCacheManager", "coordinator", "block_pool", "enable_caching"),
    Seam(
        "vllm.v1.core.block_pool:BlockPool.get_cached_block",
        Use.CALL,
        "(self, block_hash, kv_cache_group_ids)",
    ),
    Seam("vllm.v1.kv_cache_interface:FullAttentionSpec", Use.READ),
    Seam(
        "vllm.v1.core.kv_cache_coordinator:KVCacheCoordinator.find_longest_cache_hit",
        Use.CALL,
        "(self, block_hashes, max_cache_hit_length)",
    ),
)
"""How much of a waiting request's prompt is cached."""

PLANS = (
    Seam(f"{_SCHEDULER}._handle_invalid_blocks", Use.OVERRIDE, "(self, *args, **kwargs)", optional=True),
    Seam(
        f"{_SCHEDULER}._preempt_request",
        Use.CALL,
        "(self, request, timestamp, drop_stale_output)",
    ),
    Seam(f"{_SCHEDULER}._request_blocks_can_be_freed", Use.CALL, "(self, request)"),
    *(
        Seam(f"{_SCHEDULER}.{name}", Use.READ)
        for name in (
            "kv_holding_waiting",
            "max_num_scheduled_tokens",
            "max_num_active_reqs",
            "num_waiting_for_streaming_input",
            "finished_recving_kv_req_ids",
            "requires_kv_delivery",
            "num_spec_tokens",
            "num_prefill_lookahead",
            "need_mamba_block_aligned_split",
            "lora_config",
            "block_size",
            "_pause_state",
        )
    ),
    *read("vllm.config.vllm:VllmConfig", "use_v2_model_runner"),
    *read("vllm.v1.core.sched.interface:PauseState", "UNPAUSED"),
    *read("vllm.v1.core.sched.output:SchedulerOutput", "total_num_scheduled_tokens"),
    *read("vllm.v1.core.block_pool:BlockPool", "get_num_free_blocks"),
    *read(
        "vllm.v1.request:Request",
        "arrival_time",
        "max_tokens",
        "num_output_placeholders",
        "spec_token_ids",
        "has_encoder_inputs",
        "lora_request",
    ),
    *read(
        "vllm.v1.request:RequestStatus",
        "WAITING",
        "WAITING_FOR_REMOTE_KVS",
        "FINISHED_STOPPED",
        "FINISHED_LENGTH_CAPPED",
    ),
)
"""What the SLO policy needs beside the rest, to carry out a plan."""

SETTINGS = (
    *read("vllm.config.scheduler:SchedulerConfig", "policy", "async_scheduling", "scheduler_cls"),
    *read("vllm.config.vllm:VllmConfig", "additional_config", "scheduler_config", "model_config"),
)
"""What is read of the engine's configuration."""
