"""How SGLang comes to FlowKV's classes: a member of its enumeration, and functions that name classes."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from penstock.plugins.sglang.flowkv_settings import BACKEND, FLAG


@dataclass(frozen=True, slots=True)
class Member:
    """One more member of an enumeration of SGLang's (``package.module:Enumeration``) that has no registry."""

    target: str
    name: str
    value: str

    def register(self) -> None:
        """Add it; a second time without effect."""
        if self.in_place():
            return
        enumeration = pkgutil.resolve_name(self.target)
        member = object.__new__(enumeration)
        member._name_, member._value_ = self.name, self.value
        member.__objclass__ = enumeration
        member._sort_order_ = len(enumeration)
        enumeration._member_names_.append(self.name)
        enumeration._member_map_[self.name] = member
        enumeration._value2member_map_[self.value] = member

    def in_place(self) -> bool:
        """Whether the enumeration knows the value."""
        enumeration = pkgutil.resolve_name(self.target)
        return self.value in {member.value for member in enumeration}


def resolve_once(original: Callable[[Any], Any], settings: Any) -> Any:
    """Around ``ServerArgs.resolve_once``: a model whose cache FlowKV does not move is not loaded."""
    from penstock.plugins.sglang import plain_caches

    if settings.disaggregation_transfer_backend != BACKEND:
        return original(settings)
    return plain_caches.resolve_once(original, settings, f"{FLAG} {BACKEND}")


def get_kv_class(original: Callable[..., Any], transfer_backend: Any, class_type: Any) -> Any:
    """Around ``get_kv_class``: FlowKV's classes for its member."""
    if transfer_backend.value != BACKEND:
        return original(transfer_backend, class_type)
    from sglang.srt.disaggregation.base import KVArgs
    from sglang.srt.disaggregation.common.conn import CommonKVBootstrapServer

    from penstock.plugins.sglang.kv_manager import FlowKVManager
    from penstock.plugins.sglang.kv_requests import FlowKVReceiver, FlowKVSender

    classes = {
        "kvargs": KVArgs,
        "manager": FlowKVManager,
        "sender": FlowKVSender,
        "receiver": FlowKVReceiver,
        "bootstrap_server": CommonKVBootstrapServer,
    }
    return classes[class_type.value]


def get_kv_pool_cls(original: Callable[..., Any], platform: Any, *, kind: str) -> Any:
    """Around ``SRTPlatform.get_kv_pool_cls``: the pool in one region, unless the platform has its own."""
    found = original(platform, kind=kind)
    if found is not None or kind != "mha" or not _is_asked_for():
        return found
    from penstock.plugins.sglang.kv_pool import RegionPool

    return RegionPool


def get_paged_allocator_cls(original: Callable[..., Any], platform: Any) -> Any:
    """Around ``SRTPlatform.get_paged_allocator_cls``: the allocator that prefers runs."""
    found = original(platform)
    if found is not None or not _is_asked_for() or _allocation() == "stock":
        return found
    from penstock.plugins.sglang.run_allocator import RunPagedAllocator

    return RunPagedAllocator


def _is_asked_for() -> bool:
    from sglang.srt.runtime_context import get_disagg

    disagg = get_disagg()
    return disagg.disaggregation_mode != "null" and disagg.disaggregation_transfer_backend == BACKEND


def _allocation() -> str:
    from penstock.plugins.sglang.flowkv_settings import flowkv_config
    from penstock.plugins.sglang.settings import inherited

    return flowkv_config(inherited()).allocation
