"""Leave memory of a GPU for what an attention backend keeps beside the KV cache.

Why: vLLM gives the KV cache all that a profiling run leaves of ``gpu_memory_utilization``. A backend whose
own memory grows with the number of blocks cannot have it counted: at that time there are no blocks.

Remove when: an attention backend can tell vLLM what it keeps for a block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from penstock.patches.attribute import AttributePatch
from penstock.patches.vllm.builds import is_cpu_build


def is_gpu_build() -> bool:
    """Whether the installed vLLM runs on GPUs."""
    return not is_cpu_build()


def leaving(left: Callable[[Any, int], int]) -> AttributePatch:
    """A patch after which the KV cache gets ``left(worker, available)`` of the bytes that are available."""

    def replace(original: Any) -> Any:
        @wraps(original)
        def determine_available_memory(self: Any) -> int:
            return left(self, original(self))

        return determine_available_memory

    return AttributePatch(
        target="vllm.v1.worker.gpu_worker:Worker.determine_available_memory",
        signature="(self)",
        replace=replace,
        wraps=True,
        needed=is_gpu_build,
    )
