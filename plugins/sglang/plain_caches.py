"""Whether a model's cache is one pool of plain keys and values: its configuration tells before it loads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from penstock.plugins.configuration import ConfigurationError
from penstock.plugins.seams import Seam, Use
from penstock.plugins.sglang.scheduler_seams import read

_MODEL = "sglang.srt.configs.model_config"
SEAMS = (
    Seam("sglang.srt.server_args:ServerArgs.resolve_once", Use.PATCH, "(self)", wraps=True),
    Seam(f"{_MODEL}:ModelConfig.from_server_args", Use.CALL, "(server_args)"),
    *read(f"{_MODEL}:ModelConfig", "attention_arch", "hf_config", "is_hybrid_swa"),
    *read(f"{_MODEL}:AttentionArch", "MLA"),
    *read("sglang.srt.server_args:ServerArgs", "_resolution_finished"),
    Seam(f"{_MODEL}:is_minimax_sparse", Use.CALL, "(config)"),
    Seam("sglang.srt.configs.hybrid_arch:mambaish_config", Use.CALL, "(model_config)"),
)
"""By which SGLang chooses the kind of a model's pool (``KVCacheConfigurator._build_token_to_kv_pool``)."""


def resolve_once(original: Callable[[Any], Any], settings: Any, what: str) -> Any:
    """``ServerArgs.resolve_once`` with a refusal of models whose cache is another; ``what`` is the option
    that needs a plain one. Records that come resolved, as in the processes of an engine, were looked at.

    It comes after the resolution, which decides for some models that windows have no pool of their own.

    Raises:
        ConfigurationError: saying what the model brings, and what is allowed.
        SystemExit: the same, in one line, where a command line was read.
    """
    if getattr(settings, "_resolution_finished", False):
        return original(settings)
    resolved = original(settings)
    if (found := _other_cache(settings)) is not None:
        from penstock.plugins.sglang.flags import refuse_settings

        refuse_settings(settings, ConfigurationError(f"{what}: given {settings.model_path}, {found}"))
    return resolved


def _other_cache(settings: Any) -> str | None:
    from sglang.srt.configs.hybrid_arch import mambaish_config
    from sglang.srt.configs.model_config import AttentionArch, ModelConfig, is_minimax_sparse

    model = ModelConfig.from_server_args(settings)
    if model.attention_arch == AttentionArch.MLA:
        return "a model with MLA, allowed: MHA and GQA"
    if mambaish_config(model) is not None:
        return "a model with states (Mamba, linear attention), allowed: attention in all layers"
    if model.is_hybrid_swa:
        return (
            "a model with a pool of its own for sliding windows, allowed: one pool for all layers (give "
            "--disable-hybrid-swa-memory)"
        )
    if is_minimax_sparse(model.hf_config):
        return "a model with an index of its own in its cache, allowed: plain keys and values"
    return None
