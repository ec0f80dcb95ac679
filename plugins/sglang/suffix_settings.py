"""What ``--speculative-algorithm SUFFIX`` is given, and what it cannot stand beside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from penstock.plugins.configuration import NAMESPACE, ConfigurationError
from penstock.plugins.configuration import suffix_config as _suffix_config
from penstock.schedulers.suffix.config import SuffixConfig

SECTION = "suffix"
ALGORITHM = "SUFFIX"
FLAG = "--speculative-algorithm"
DRAFT_TOKENS = 8
"""Positions that a request has in a verification, its last sure token included, where none are given."""
BRANCHES = 4
"""Drafts in one place, where none are given and branches can be verified."""
RUNNING_REQUESTS = 48
"""Most requests that run, where no number is given: as SGLang has it for every speculation."""
BRANCHING_BACKEND = "flashinfer"
"""The one whose verification of branches is right with pages of several tokens, by SGLang's own rule."""


def suffix_config(given: Mapping[str, Any]) -> SuffixConfig:
    """The drafter's settings in ``given``.

    Raises:
        ConfigurationError: an unknown key, a wrong type or an impossible value.
    """
    return _suffix_config({NAMESPACE: given})


def is_asked_for(settings: Any) -> bool:
    """Whether the parsed arguments name the algorithm; SGLang takes any case of letters."""
    return (settings.speculative_algorithm or "").upper() == ALGORITHM


def branches_of(settings: Any) -> int:
    """Most drafts in one place, settled from what is given.

    Raises:
        ConfigurationError: branches are asked for that SGLang cannot verify.
    """
    given: int | None = settings.speculative_eagle_topk
    branching = (settings.page_size or 1) == 1 or settings.attention_backend == BRANCHING_BACKEND
    if given is None:
        return BRANCHES if branching else 1
    if given > 1 and not branching:
        raise ConfigurationError(
            f"--speculative-eagle-topk: given {given} with --page-size {settings.page_size}, allowed beside "
            f"{FLAG} {ALGORITHM}: 1, or pages of one token, or --attention-backend {BRANCHING_BACKEND}"
        )
    return given


def require_draftable(settings: Any) -> None:
    """Refuse settings of SGLang's that drafts from suffixes cannot serve. ``settings`` are the parsed
    arguments or the ``ServerArgs``.

    Raises:
        ConfigurationError: naming the setting.
    """
    beside = f"beside {FLAG} {ALGORITHM}"
    for name, least, what in (
        ("speculative_num_draft_tokens", 2, ", one of which is the last sure token"),
        ("speculative_eagle_topk", 1, ""),
    ):
        if (value := getattr(settings, name)) is not None and value < least:
            flag = "--" + name.replace("_", "-")
            raise ConfigurationError(f"{flag}: given {value}, allowed {beside}: {least} or more{what}")
    for name, why in (
        ("speculative_draft_model_path", "it drafts without a model"),
        ("speculative_num_steps", "give --speculative-num-draft-tokens"),
        ("speculative_adaptive", "it takes no steps that could be adapted"),
        ("speculative_ngram_external_corpus_path", "it drafts from requests alone"),
        ("enable_mixed_chunk", "SGLang verifies model-free drafts apart from prompts"),
        ("enable_dp_attention", "SGLang refuses it to its own model-free drafts"),
    ):
        if getattr(settings, name):
            raise ConfigurationError(f"--{name.replace('_', '-')} contradicts {FLAG} {ALGORITHM}: {why}")
    if settings.pp_size != 1:
        raise ConfigurationError(f"--pp-size: given {settings.pp_size}, allowed {beside}: 1")
    if settings.disaggregation_mode != "null":
        raise ConfigurationError(
            f"--disaggregation-mode {settings.disaggregation_mode} contradicts {FLAG} {ALGORITHM}: "
            "SGLang hands no model-free drafts from prefill to decode"
        )
    branches_of(settings)
