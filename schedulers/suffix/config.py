"""The suffix drafter's configuration: one frozen struct, the same keys in every engine."""

from __future__ import annotations

from typing import Annotated

import msgspec

Tokens = Annotated[int, msgspec.Meta(ge=0, le=100_000_000)]


class SuffixConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All knobs of drafts from suffixes. Sizes are in tokens."""

    context_tokens: Annotated[int, msgspec.Meta(ge=1, le=256)] = 24
    """Longest suffix that is looked up: more tells apart what is longer alike, and costs more a token."""
    least_match_tokens: Annotated[int, msgspec.Meta(ge=1, le=256)] = 2
    """Shortest suffix that a draft may rest on."""
    least_probability: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.1
    """A draft ends before the first token that is accepted, with all before it, less likely than this."""
    shared_tokens: Tokens = 262_144
    """Most tokens of a group's outputs that are remembered, the oldest half forgotten at once; 0 remembers
    none."""
    prompt_tokens: Tokens = 32_768
    """Most tokens at the end of a request's prompt that it may draft from."""
    indexed_per_step: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 1024
    """Prompt tokens that are indexed in one step; longer prompts take several."""

    def __post_init__(self) -> None:
        if self.least_match_tokens > self.context_tokens:
            raise ValueError(
                f"least_match_tokens: given {self.least_match_tokens}, "
                f"allowed: at most context_tokens={self.context_tokens}"
            )
