"""The features for SGLang, the seams that each stands on, and its hooks.

A hook loads the code behind it when it is first called: declaring features imports nothing of SGLang.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from penstock.plugins.features import Feature
from penstock.plugins.seams import Seam, Use
from penstock.plugins.sglang import flags, transfer_backend
from penstock.plugins.sglang.flowkv_seams import ALLOCATION, ENDS, MANAGER, POOL, REGISTRY
from penstock.plugins.sglang.flowkv_settings import BACKEND
from penstock.plugins.sglang.hooks import Around
from penstock.plugins.sglang.scheduler_seams import ADMISSION, PASSES, POLICY, REQUESTS

_SERVER_ARGS = "sglang.srt.server_args:ServerArgs"
_SCHEDULER = "sglang.srt.managers.scheduler:Scheduler"
_PLATFORM = "sglang.srt.platforms.interface:SRTPlatform"
_TRANSFER = "sglang.srt.disaggregation.utils"
_SAMPLING = "sglang.srt.sampling.sampling_params:SamplingParams"


def _init_schedule_policy(original: Callable[[Any], Any], scheduler: Any) -> Any:
    from penstock.plugins.sglang.request_scheduler import init_schedule_policy

    return init_schedule_policy(original, scheduler)


def _get_prefill_adder_class(original: Callable[[Any], type], scheduler: Any) -> type:
    from penstock.plugins.sglang.request_scheduler import get_prefill_adder_class

    return get_prefill_adder_class(original, scheduler)


def _verify(original: Callable[..., Any], parameters: Any, *args: Any, **kwargs: Any) -> Any:
    from penstock.plugins.sglang.request_check import verify

    return verify(original, parameters, *args, **kwargs)


COMMAND_LINE = Feature(
    name="command-line",
    summary="--penstock-config, and our values of --schedule-policy",
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

SCHEDULER_HOOKS = (
    Around(f"{_SCHEDULER}.init_schedule_policy", _init_schedule_policy),
    Around(f"{_SCHEDULER}.get_prefill_adder_class", _get_prefill_adder_class),
    Around(f"{_SAMPLING}.verify", _verify),
)

REQUEST_SCHEDULER = Feature(
    name="request-scheduler",
    summary="--schedule-policy dlpm and vtc: waiting requests in an order that is fair to clients",
    seams=(*PASSES, *POLICY, *ADMISSION, *REQUESTS),
    hooks=SCHEDULER_HOOKS,
)

FLOWKV = Feature(
    name="flowkv",
    summary="--disaggregation-transfer-backend flowkv: prefill to decode in few, verified transfers",
    seams=(*REGISTRY, *MANAGER, *ENDS, *POOL, *ALLOCATION),
    hooks=(
        transfer_backend.Member(f"{_TRANSFER}:TransferBackend", "FLOWKV", BACKEND),
        Around(f"{_TRANSFER}:get_kv_class", transfer_backend.get_kv_class),
        Around(f"{_PLATFORM}.get_kv_pool_cls", transfer_backend.get_kv_pool_cls),
        Around(f"{_PLATFORM}.get_paged_allocator_cls", transfer_backend.get_paged_allocator_cls),
    ),
)

FEATURES = {feature.name: feature for feature in (COMMAND_LINE, REQUEST_SCHEDULER, FLOWKV)}
