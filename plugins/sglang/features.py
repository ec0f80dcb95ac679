"""The features for SGLang, the seams that each stands on, and its hooks.

A hook loads the code behind it when it is first called: declaring features imports nothing of SGLang.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

from penstock.plugins.features import Feature
from penstock.plugins.seams import Seam, Use
from penstock.plugins.sglang import flags, transfer_backend
from penstock.plugins.sglang.flowkv_seams import ALLOCATION, ENDS, MANAGER, POOL, REGISTRY, SERIES
from penstock.plugins.sglang.flowkv_settings import BACKEND
from penstock.plugins.sglang.hooks import Around, Instead
from penstock.plugins.sglang.scheduler_seams import (
    ADMISSION,
    DECODE_QUEUES,
    EDGE,
    PASSES,
    PLANS,
    POLICY,
    RANKS,
    REQUESTS,
    RESULTS,
    RETRACTION,
    RUNTIME,
)
from penstock.plugins.sglang.settings import judges_at_the_edge
from penstock.plugins.sglang.sparse_attention import BACKEND_HOOK
from penstock.plugins.sglang.sparse_seams import BACKEND as SPARSE_BACKEND
from penstock.plugins.sglang.sparse_seams import LAYERS, PAGES
from penstock.plugins.sglang.sparse_seams import METRICS as SPARSE_METRICS
from penstock.plugins.sglang.suffix_corpus import NoCorpus
from penstock.plugins.sglang.suffix_seams import CORPUS, COUNTING, METRICS, WORKER, Algorithm
from penstock.plugins.sglang.suffix_seams import REGISTRY as ALGORITHMS
from penstock.schedulers.config import SchedulerConfig

_SERVER_ARGS = "sglang.srt.server_args:ServerArgs"
_SCHEDULER = "sglang.srt.managers.scheduler:Scheduler"
_PLATFORM = "sglang.srt.platforms.interface:SRTPlatform"
_TRANSFER = "sglang.srt.disaggregation.utils"
_SAMPLING = "sglang.srt.sampling.sampling_params:SamplingParams"
_BATCH = "sglang.srt.managers.schedule_batch:ScheduleBatch"
_ALLOCATOR = "sglang.srt.mem_cache.allocator.paged:PagedTokenToKVPoolAllocator"
_PREALLOC = "sglang.srt.disaggregation.decode:DecodePreallocQueue"
_DECODING = "sglang.srt.disaggregation.decode:SchedulerDisaggregationDecodeMixin"
_STATE = "sglang.srt.managers.scheduler_components.internal_state:SchedulerInternalStateController"


def _around(target: str, module: str, name: str) -> Around:
    """A hook on ``target`` whose code is ``name`` of a module beside this one."""

    @cache
    def function() -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(
            importlib.import_module(f"penstock.plugins.sglang.{module}"), name
        )
        return found

    def hook(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function()(original, *args, **kwargs)

    return Around(target, hook)


COMMAND_LINE = Feature(
    name="command-line",
    summary="--penstock-config, and our values of SGLang's own options",
    seams=(
        Seam(f"{_SERVER_ARGS}.add_cli_args", Use.PATCH, "(parser)", wraps=True),
        Seam(f"{_SERVER_ARGS}.from_cli_args", Use.PATCH, "(cls, args)", wraps=True),
        Seam("sglang.srt.plugins.hook_registry:HookRegistry.apply_hooks", Use.CALL, "(cls)"),
        Seam(
            "sglang.srt.plugins.hook_registry:HookRegistry.register",
            Use.CALL,
            "(cls, target, hook, hook_type=...)",
        ),
    ),
    hooks=(
        Around(f"{_SERVER_ARGS}.add_cli_args", flags.add_cli_args),
        Around(f"{_SERVER_ARGS}.from_cli_args", flags.from_cli_args),
    ),
)

_EVERY_POLICY = (
    _around(f"{_SCHEDULER}.init_schedule_policy", "scheduler_hooks", "init_schedule_policy"),
    _around(f"{_SCHEDULER}.get_prefill_adder_class", "scheduler_hooks", "get_prefill_adder_class"),
    _around(f"{_SCHEDULER}.process_batch_result", "scheduler_hooks", "process_batch_result"),
    _around(f"{_SCHEDULER}.on_idle", "scheduler_hooks", "on_idle"),
    _around(f"{_BATCH}._get_decode_retraction_order", "scheduler_hooks", "retraction_order"),
    _around(f"{_STATE}.set_internal_state", "scheduler_hooks", "set_internal_state"),
    _around(f"{_SAMPLING}.verify", "request_check", "verify"),
)
_SEAMS = (*PASSES, *POLICY, *ADMISSION, *REQUESTS, *RESULTS, *RETRACTION, *RUNTIME)

REQUEST_SCHEDULER = Feature(
    name="request-scheduler",
    summary="--schedule-policy dlpm and vtc: waiting requests in an order that is fair to clients",
    seams=(*_SEAMS, *DECODE_QUEUES),
    hooks=(
        *_EVERY_POLICY,
        _around(f"{_PREALLOC}.resume_retracted_reqs", "decode_hooks", "resume_retracted_reqs"),
        _around(f"{_PREALLOC}._update_handshake_waiters", "decode_hooks", "update_handshake_waiters"),
        _around(f"{_DECODING}.get_new_prebuilt_batch", "decode_hooks", "get_new_prebuilt_batch"),
    ),
)

FLOWKV = Feature(
    name="flowkv",
    summary="--disaggregation-transfer-backend flowkv: prefill to decode in few, verified transfers",
    seams=(*REGISTRY, *MANAGER, *ENDS, *POOL, *ALLOCATION, *SERIES),
    hooks=(
        transfer_backend.Member(f"{_TRANSFER}:TransferBackend", "FLOWKV", BACKEND),
        Around(f"{_SERVER_ARGS}.resolve_once", transfer_backend.resolve_once),
        Around(f"{_TRANSFER}:get_kv_class", transfer_backend.get_kv_class),
        Around(f"{_PLATFORM}.get_kv_pool_cls", transfer_backend.get_kv_pool_cls),
        Around(f"{_PLATFORM}.get_paged_allocator_cls", transfer_backend.get_paged_allocator_cls),
        _around(f"{_SCHEDULER}.init_metrics_collector", "transfer_series", "init_metrics_collector"),
    ),
)

SUFFIX_DRAFTER = Feature(
    name="suffix-drafter",
    summary="--speculative-algorithm SUFFIX: drafts from what requests said, without a model",
    seams=(*ALGORITHMS, *WORKER, *METRICS),
    hooks=(
        Algorithm(),
        Instead(CORPUS, NoCorpus),
        _around(COUNTING, "suffix_metrics", "update_spec_metrics"),
    ),
)

SPARSE_ATTENTION = Feature(
    name="sparse-attention",
    summary="--attention-backend tactic: decodes read the pages that hold a share of attention, on CPU",
    seams=(*SPARSE_BACKEND, *LAYERS, *PAGES, *SPARSE_METRICS),
    hooks=(
        BACKEND_HOOK,
        _around(f"{_SERVER_ARGS}.resolve_once", "sparse_attention", "resolve_once"),
        *(
            _around(f"{_ALLOCATOR}.{name}", "sparse_pages", "allocate")
            for name in ("alloc", "alloc_extend", "alloc_decode")
        ),
        _around(f"{_SCHEDULER}.process_batch_result", "sparse_metrics", "process_batch_result"),
        _around(f"{_SCHEDULER}.on_idle", "sparse_metrics", "on_idle"),
    ),
)

SLO_SCHEDULER = Feature(
    name="slo-scheduler",
    summary="--schedule-policy slo: passes are planned to meet latency targets",
    seams=(*_SEAMS, *PLANS),
    hooks=(
        *_EVERY_POLICY,
        _around(f"{_SCHEDULER}._get_new_batch_prefill_raw", "scheduler_hooks", "get_new_batch_prefill"),
        _around(f"{_SCHEDULER}.run_batch", "scheduler_hooks", "run_batch"),
    ),
)

SHARED_CLOCK = Feature(
    name="shared-clock",
    summary="--schedule-policy dlpm, vtc and slo on several ranks, which go by one clock",
    seams=RANKS,
    hooks=(
        _around(RANKS[0].name, "scheduler_hooks", "broadcast_requests"),
        _around(RANKS[1].name, "scheduler_hooks", "send_to_next_stage"),
    ),
)

REQUEST_IDENTITY = Feature(
    name="request-identity",
    summary="headers of a gateway and API keys say who asks",
    seams=EDGE,
    hooks=(_around("sglang.srt.entrypoints.http_server:launch_server", "asker_middleware", "launch_server"),),
)

FEATURES = {
    feature.name: feature
    for feature in (
        COMMAND_LINE,
        REQUEST_SCHEDULER,
        SLO_SCHEDULER,
        SHARED_CLOCK,
        REQUEST_IDENTITY,
        FLOWKV,
        SUFFIX_DRAFTER,
        SPARSE_ATTENTION,
    )
}


def scheduler_feature(config: SchedulerConfig) -> Feature:
    """The feature that a configuration's policy is."""
    return SLO_SCHEDULER if config.policy == "slo" else REQUEST_SCHEDULER


def server_features(config: SchedulerConfig) -> tuple[Feature, ...]:
    """What a configuration needs in the process that serves HTTP."""
    if judges_at_the_edge(config):
        return (scheduler_feature(config), REQUEST_IDENTITY)
    return (scheduler_feature(config),)
