"""What the layers of a vLLM worker share, and what they are dense for."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from penstock.kernels.sparse.serving import ServingConfig
from penstock.plugins import sparse_worker
from penstock.plugins.configuration import ConfigurationError
from penstock.plugins.vllm.sparse_stats import sources


class SparseWorker(sparse_worker.SparseWorker):
    """A ``SparseWorker`` that is counted in what travels with vLLM's outputs."""

    def __init__(self, config: ServingConfig) -> None:
        super().__init__(config, logging.getLogger("vllm.penstock"))
        sources.add(self)


def check(kv_cache_dtype: str, head_size: int, head_sizes: Sequence[int]) -> None:
    """Refuse what no layer could be sparse with.

    Raises:
        ConfigurationError: a quantised KV cache, or a head size that the kernels lack.
    """
    if kv_cache_dtype.startswith("fp8"):
        raise ConfigurationError(
            f"sparse attention: given a KV cache of {kv_cache_dtype}, allowed: one of 16 or 32 bits, "
            "by which pages are chosen"
        )
    if head_size not in head_sizes:
        ranged = isinstance(head_sizes, range)
        allowed = f"{head_sizes[0]} to {head_sizes[-1]}" if ranged else ", ".join(map(str, head_sizes))
        raise ConfigurationError(f"sparse attention: given heads of {head_size}, allowed: {allowed}")


def dense_reason(impl: Any) -> str | None:
    """Why a layer stays dense in every step, or None."""
    # GPU backends have the rows before and after, of which the query's own is not one.
    given = impl.sliding_window
    window = given[0] + (given[0] >= 0) if isinstance(given, tuple) else given
    return sparse_worker.first_reason(
        {
            f"attention of type {impl.attn_type}": impl.attn_type != "decoder",
            f"a sliding window of {window}": window != -1,
            "ALiBi": impl.alibi_slopes is not None,
            "a soft cap on logits": impl.logits_soft_cap != 0,
            "attention sinks": impl.sinks is not None,
            "KV cache of another layer": impl.kv_sharing_target_layer_name is not None,
        }
    )
