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
from typing import Any, NamedTuple

import msgspec

from penstock.schedulers.slo.profiles import KNEES, Profile, find_profile, read_profile, shipped_profiles

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
    """One affine function; seconds for each unit. ``fixed_s`` may be below 0 beside one that is not."""

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
        highest = max(self.pieces, key=lambda piece: piece.fixed_s)
        for piece in self.pieces:
            for key, value in msgspec.structs.asdict(piece).items():
                may_be_negative = key == "fixed_s" and piece is not highest
                if not math.isfinite(value) or (value < 0 and not may_be_negative):
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


def of_profile(name: str, profile: Profile) -> StepTime:
    """A prior of the SLO policy as a step time: a piece begins where tokens begin to cost more."""
    pieces: list[Piece] = []
    per_token_s, fixed_s = 0.0, profile.base_s
    for knee, slope in zip((0, *KNEES), (profile.token_s, *profile.knees_s), strict=True):
        per_token_s += slope
        fixed_s -= slope * knee
        if slope or not pieces:
            pieces.append(
                Piece(
                    fixed_s=fixed_s,
                    per_token_s=per_token_s,
                    per_request_s=profile.request_s,
                    per_context_token_s=profile.context_s,
                    per_draft_step_s=profile.pass_s,
                )
            )
    return StepTime(name=name, source=profile.source, pieces=tuple(pieces))


@cache
def shipped() -> dict[str, StepTime]:
    """Published profiles by name."""
    text = resources.files("penstock.simulation").joinpath("step_times.json").read_bytes()
    return {profile.name: profile for profile in msgspec.json.decode(text, type=list[StepTime])}


def load_step_time(name_or_file: str) -> StepTime:
    """A shipped step time by name, with ``+kv`` behind it for the KV-read term; a shipped prior of the SLO
    policy by name; or a JSON file that holds one or the other, as ``penstock profile`` writes it.

    Raises:
        ValueError: there is none of these, or the file is no step time; with what is allowed.
    """
    name, plus, _ = name_or_file.partition("+kv")
    if name in shipped():
        return shipped()[name].with_kv_read() if plus else shipped()[name]
    if name_or_file in shipped_profiles():
        return of_profile(name_or_file, find_profile(name_or_file))
    file = Path(name_or_file)
    if not file.is_file():
        names = ", ".join((*shipped(), *shipped_profiles()))
        raise ValueError(f"no step time {name_or_file!r}; allowed: {names}, or a JSON file")
    return _read(file)


def _read(file: Path) -> StepTime:
    try:
        fields = msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
        if "base_s" in fields:
            return of_profile(file.stem, read_profile(file))
        return msgspec.convert(fields, StepTime)
    except (msgspec.DecodeError, ValueError) as error:
        raise ValueError(f"{file} is no step time: {error}") from error
