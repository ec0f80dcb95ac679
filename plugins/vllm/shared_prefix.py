"""How Python code asks for shared prefixes to be read once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.patches.vllm.builds import is_cpu_build
from penstock.plugins.configuration import NAMESPACE, ConfigurationError

SECTION = "shared_prefix_attention"


def enable() -> None:
    """Have ``attention_backend="CUSTOM"`` read shared prefixes once, in this process and in those that it
    starts, where ``additional_config`` has a section ``penstock.shared_prefix_attention``.

    For code that builds an engine without a command line; call it before.

    Raises:
        ConfigurationError: this is no vLLM for CPUs.
        FeatureError: it cannot be applied to this vLLM.
    """
    from penstock.plugins.features import require
    from penstock.plugins.vllm.features import SHARED_PREFIX_ATTENTION
    from penstock.plugins.vllm.installation import upstream

    if not is_cpu_build():
        raise ConfigurationError("shared prefixes: given a vLLM that is not for CPUs, allowed: vLLM for CPUs")
    require(SHARED_PREFIX_ATTENTION, upstream())


def asks(additional_config: Mapping[str, Any]) -> bool:
    """Whether ``additional_config`` has the section.

    Raises:
        ConfigurationError: it has that of sparse attention, too.
    """
    ours = additional_config.get(NAMESPACE, {})
    asked = isinstance(ours, Mapping) and SECTION in ours
    if asked and "sparse_attention" in ours:
        raise ConfigurationError(
            "penstock.shared_prefix_attention (--shared-prefix-attention) and penstock.sparse_attention "
            "(--sparse-attention) both choose what a decode step reads; give one of them"
        )
    return asked
