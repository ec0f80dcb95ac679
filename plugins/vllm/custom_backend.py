"""Where vLLM's registry finds the backend ``CUSTOM``; the engine's configuration says whose it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

BACKEND = "penstock.plugins.vllm.custom_backend.Backend"


def __getattr__(name: str) -> Any:
    if name != "Backend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.config import get_current_vllm_config_or_none

    from penstock.plugins.vllm import shared_prefix, sparse_attention

    settings = get_current_vllm_config_or_none()
    additional = None if settings is None else settings.additional_config
    if isinstance(additional, Mapping) and shared_prefix.asks(additional):
        shared_prefix.enable()
        from penstock.plugins.vllm.prefix_backend import PrefixCPUBackend

        return PrefixCPUBackend
    return sparse_attention.SparseBackend
