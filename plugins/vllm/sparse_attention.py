"""What ``CUSTOM`` stands for under sparse attention (``custom_backend``), and how Python code asks for it.

Looking the class up is what asking for sparse attention means, as it is for FlowKV (``flowkv``).
"""

from __future__ import annotations

from typing import Any


def enable() -> None:
    """Make ``attention_backend="CUSTOM"`` mean sparse attention in this process and in those that it starts.

    For code that builds an engine without a command line; call it before.

    Raises:
        FeatureError: sparse attention cannot be applied to this vLLM.
    """
    from penstock.plugins.features import require
    from penstock.plugins.vllm.features import SPARSE_ATTENTION
    from penstock.plugins.vllm.installation import upstream

    require(SPARSE_ATTENTION, upstream())


def __getattr__(name: str) -> Any:
    if name != "SparseBackend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from penstock.plugins.features import asked_for
    from penstock.plugins.vllm.features import SPARSE_ATTENTION
    from penstock.plugins.vllm.sparse_stats import sources

    if SPARSE_ATTENTION.name not in asked_for():
        # ``--attention-backend CUSTOM`` alone: the process that started this one knows nothing of us.
        sources.mute()
    enable()
    return _backend()


def _backend() -> type:
    """The class for this platform: over the stock backend that it would run ordinary attention with."""
    from vllm.platforms import current_platform

    from penstock.plugins.configuration import ConfigurationError

    if current_platform.is_cpu():
        from penstock.plugins.vllm.sparse_backend import SparseCPUBackend

        return SparseCPUBackend
    if not current_platform.is_cuda():
        raise ConfigurationError(
            f"sparse attention: given a platform {current_platform.device_type}, allowed: cpu, cuda"
        )
    if current_platform.has_device_capability(80):
        from penstock.plugins.vllm.sparse_flash import SparseFlashBackend

        return SparseFlashBackend
    from penstock.plugins.vllm.sparse_triton import SparseTritonBackend

    return SparseTritonBackend
