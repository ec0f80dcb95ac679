"""What ``--attention-backend tactic`` is given, what it cannot stand beside, and what it means to SGLang."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.kernels.sparse.serving import ServingConfig
from penstock.plugins.configuration import NAMESPACE, ConfigurationError, convert, merge, section

BACKEND = "tactic"
SECTION = "sparse_attention"
FLAG = "--attention-backend"
DECODE_FLAG = "--decode-attention-backend"
DENSE = "torch_native"
"""SGLang's backend that computes what is dense."""
PAGE_TOKENS = 16
"""Of a page where nothing else is asked for: SGLang's own default, 1, leaves nothing to summarise."""
PLAIN_CACHES = ("auto", "bf16", "bfloat16")
CONTRADICTIONS = {
    "speculative_algorithm": "a sparse step has one query row a request",
    "dllm_algorithm": "a sparse step has one query row a request",
    "enable_two_batch_overlap": "halves of a batch would share no index",
    "enable_pdmux": "groups of a device would share no index",
    "enable_hisparse": "its pages are not the pool's",
    "enable_unified_memory": "its pages are not the pool's",
    "prefill_only_disable_kv_cache": "nothing is decoded",
}
"""Settings of SGLang's that must be off, and why."""


def is_asked_for(settings: Any) -> bool:
    """Whether a flag names our backend. ``settings`` are the parsed arguments or the ``ServerArgs``."""
    return BACKEND in (settings.attention_backend, settings.decode_attention_backend)


def sparse_config(given: Mapping[str, Any], *, flag: bool = False) -> ServingConfig | None:
    """Sparse attention as the section in ``given`` and a flag ask for it; None if neither does.

    Raises:
        ConfigurationError: an unknown key, a wrong type or an impossible value.
    """
    if not flag and SECTION not in given:
        return None
    ours = section({NAMESPACE: given}, SECTION)
    merged = merge(SECTION, {"--penstock-config": ours, FLAG: {"selector": BACKEND} if flag else {}})
    return convert(SECTION, merged, ServingConfig)


def require_sparse(settings: Any, config: ServingConfig) -> None:
    """Refuse settings of SGLang's that sparse decode cannot serve.

    Raises:
        ConfigurationError: naming the setting.
    """
    what = f"{FLAG} {BACKEND}"
    _require_backends(settings, what)
    if settings.device not in (None, "cpu"):
        raise ConfigurationError(
            f"--device: given {settings.device}, allowed beside {what}: cpu, as its kernels for GPUs are not "
            "connected to SGLang yet"
        )
    if settings.kv_cache_dtype not in PLAIN_CACHES:
        raise ConfigurationError(
            f"--kv-cache-dtype: given {settings.kv_cache_dtype}, allowed beside {what}: "
            f"{', '.join(PLAIN_CACHES)}, by whose keys pages are chosen"
        )
    page_tokens = settings.page_size
    if page_tokens is not None and page_tokens < config.summary_tokens:
        raise ConfigurationError(
            f"--page-size: given {page_tokens}, allowed beside {what}: at least "
            f"{SECTION}.summary_tokens, {config.summary_tokens}; {PAGE_TOKENS} if none is given"
        )
    for name, why in CONTRADICTIONS.items():
        if getattr(settings, name):
            raise ConfigurationError(f"--{name.replace('_', '-')} contradicts {what}: {why}")
    for name in ("attn_cp_size", "dcp_size"):
        if (size := getattr(settings, name)) != 1:
            flag = "--" + name.replace("_", "-")
            raise ConfigurationError(f"{flag}: given {size}, allowed beside {what}: 1")


def _require_backends(settings: Any, what: str) -> None:
    for flag, given, allowed in (
        (FLAG, settings.attention_backend, (None, BACKEND, DENSE)),
        ("--prefill-attention-backend", settings.prefill_attention_backend, (None, DENSE)),
        (DECODE_FLAG, settings.decode_attention_backend, (None, BACKEND)),
    ):
        if given not in allowed:
            names = ", ".join(name for name in allowed if name)
            raise ConfigurationError(f"{flag}: given {given}, allowed beside {what}: {names}")


def settle(settings: Any) -> None:
    """Say in SGLang's words what is asked for: its own backend for prompts, ours for decodes, and pages of
    several tokens. Again without effect, as ``ServerArgs`` that are resolved take no changes."""
    if settings.attention_backend == BACKEND:
        settings.attention_backend = None
    if settings.decode_attention_backend != BACKEND:
        settings.decode_attention_backend = BACKEND
    if settings.page_size is None:
        settings.page_size = PAGE_TOKENS
