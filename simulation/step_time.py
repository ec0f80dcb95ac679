"""How long a step takes: the largest of several affine functions of what the step computes.

The form is that of SLOs-Serve (arXiv 2504.08784): compute-bound and memory-bound steps are two planes, and
the slower one counts. A term for reading the KV cache, which that paper leaves out, can be added to any
profile: without it, decoding over long shared prefixes looks cheaper than it is.
"""

from __future__ import annotations

import math
from functools import cache
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import msgspec

KV_READ_S = 8e-8
"""Seconds to read one token's KV cache: 131 kB (8B model, grouped-query, bfloat16) at about 1.6 TB/s."""


class Load(NamedTuple):
    """What one step computes.

    ``context_tokens`` are KV tokens read: what stood before each row's first token, shared or not.
    ``draft_steps`` is how often a draft model runs one after the other in the step.
    """

    prefill_tokens: int
    decode_tokens: int
    requests: int
    context_tokens: int
    draft_steps: int = 0


class Piece(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One affine function; seconds for each unit."""

    fixed_s: float
    per_token_s: float
    per_request_s: float = 0.0
    per_context_token_s: float = 0.0
    per_draft_step_s: float = 0.0


class StepTime(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Seconds that a step takes, as the largest of its pieces. ``source`` says where the figures are from."""

    name: str
    source: str
    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        if not self.pieces:
            raise ValueError("a step time needs at least one piece")
        for piece in self.pieces:
            for key, value in msgspec.structs.asdict(piece).items():
                if not (math.isfinite(value) and value >= 0):
                    raise ValueError(f"{key} of {self.name!r}: given {value}, allowed: 0 or more, finite")

    def __call__(self, load: Load) -> float:
        """Seconds for ``load``."""
        tokens = load.prefill_tokens + load.decode_tokens
        return max(
            piece.fixed_s
            + piece.per_token_s * tokens
            + piece.per_request_s * load.requests
            + piece.per_context_token_s * load.context_tokens
            + piece.per_draft_step_s * load.draft_steps
            for piece in self.pieces
        )

    def with_kv_read(self, per_context_token_s: float = KV_READ_S) -> StepTime:
        """The same step time plus the reading of the KV cache."""
        pieces = tuple(
            msgspec.structs.replace(
                piece, per_context_token_s=piece.per_context_token_s + per_context_token_s
            )
            for piece in self.pieces
        )
        return msgspec.structs.replace(self, name=f"{self.name}+kv", pieces=pieces)


@cache
def shipped() -> dict[str, StepTime]:
    """Published profiles by name."""
    text = resources.files("penstock.simulation").joinpath("step_times.json").read_bytes()
    return {profile.name: profile for profile in msgspec.json.decode(text, type=list[StepTime])}


def load_step_time(name_or_file: str) -> StepTime:
    """A shipped profile by name, with ``+kv`` behind it for the KV-read term, or one from a JSON file.

    Raises:
        ValueError: there is neither, or the file is no profile; with what is allowed.
    """
    name, plus, _ = name_or_file.partition("+kv")
    if name in shipped():
        return shipped()[name].with_kv_read() if plus else shipped()[name]
    file = Path(name_or_file)
    if not file.is_file():
        raise ValueError(f"no step time {name_or_file!r}; allowed: {', '.join(shipped())}, or a JSON file")
    try:
        return msgspec.json.decode(file.read_bytes(), type=StepTime)
    except msgspec.DecodeError as error:
        raise ValueError(f"{file} is no step time: {error}") from error
