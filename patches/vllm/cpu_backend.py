"""Let ``--attention-backend CUSTOM`` mean the registered backend on CPUs too.

Why: GPU platforms use the class that a plugin registers as ``AttentionBackendEnum.CUSTOM``; the CPU platform
says that it cannot and goes on with its own.

Remove when: ``CpuPlatform.get_attn_backend_cls`` returns the path of ``CUSTOM`` where that is selected.
"""

from __future__ import annotations

from typing import Any

from penstock.patches.attribute import AttributePatch
from penstock.patches.vllm.builds import is_cpu_build


def honour_custom(original: Any) -> Any:
    """A classmethod that answers for ``CUSTOM`` and leaves every other choice to the original."""

    def get_attn_backend_cls(
        cls: type, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        if selected_backend != AttentionBackendEnum.CUSTOM:
            path: str = original.__func__(cls, selected_backend, attn_selector_config, num_heads)
            return path
        if attn_selector_config.use_mla or attn_selector_config.use_sparse:
            raise ValueError(
                "attention backend CUSTOM: given a model with MLA or sparse attention of its own, "
                "allowed on CPU: models with ordinary multi-head or grouped-query attention"
            )
        return AttentionBackendEnum.CUSTOM.get_path()

    return classmethod(get_attn_backend_cls)


PATCH = AttributePatch(
    target="vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls",
    signature="(cls, selected_backend, attn_selector_config, num_heads=...)",
    replace=honour_custom,
    wraps=True,
    needed=is_cpu_build,
)
