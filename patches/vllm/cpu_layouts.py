"""Let vLLM's CPU attention backend accept the block-outermost layout ``BLHNC``.

Why: FlowKV asks for ``BLHNC``, in which a run of blocks is one contiguous byte range over all layers. The CPU
backend declares ``LBHNC`` only, although its kernels follow the strides of the cache; greedy tokens are the
same in both layouts.

Remove when: ``CPUAttentionBackend.supported_kv_cache_layouts`` of every supported vLLM declares ``BLHNC``.
"""

from __future__ import annotations

from typing import Any

from penstock.patches.attribute import AttributePatch
from penstock.patches.vllm.builds import is_cpu_build


def accept_block_outermost(original: Any) -> Any:
    """A classmethod that declares the original's layouts first, then ``BLHNC``."""

    def supported_kv_cache_layouts(cls: type) -> tuple[Any, ...]:
        from vllm.v1.kv_cache_layout import KVCacheLayout

        declared: tuple[Any, ...] = original.__func__(cls)
        extra = KVCacheLayout.BLHNC
        return declared if extra in declared else (*declared, extra)

    return classmethod(supported_kv_cache_layouts)


PATCH = AttributePatch(
    target="vllm.v1.attention.backends.cpu_attn:CPUAttentionBackend.supported_kv_cache_layouts",
    signature="(cls)",
    replace=accept_block_outermost,
    fingerprints=("8eb3cb462f2a",),
    needed=is_cpu_build,
)
