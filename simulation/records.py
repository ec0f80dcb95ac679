"""What is asked of a simulated engine, and what is known of each request afterwards."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import NamedTuple


class Piece(NamedTuple):
    """``tokens`` tokens of one content: equal keys are equal text, up to the shorter of two lengths."""

    key: int
    tokens: int


Prompt = tuple[Piece, ...]
"""Pieces in order. Two prompts share a prefix as far as their pieces agree, the last one in part."""


def tokens_of(prompt: Prompt) -> int:
    """Length of a prompt in tokens."""
    return sum(piece.tokens for piece in prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One request before it is served.

    ``answer`` is the content key of the tokens that will be generated: a later prompt that goes on with
    ``Piece(answer, n)`` shares the KV cache of the answer. ``tier`` names a class of latency targets for the
    measures; ``workflow`` is what a closed-loop workload knows the request by. Targets are milliseconds.
    """

    request_id: str
    arrival_s: float
    prompt: Prompt
    output_tokens: int
    answer: int = 0
    client: str = ""
    weight: float = 1.0
    priority: int = 0
    ttft_slo_ms: float | None = None
    tpot_slo_ms: float | None = None
    tier: str = ""
    workflow: tuple[int, ...] = ()
    predictable: float = 0.0
    """Share of its output tokens that a draft foresees."""
    most_output_tokens: int | None = None
    """What the client allows. The answer then ends by a stop token, and no scheduler can know when; without,
    it is as long as was allowed."""

    def __post_init__(self) -> None:
        if self.output_tokens < 1 or tokens_of(self.prompt) < 1:
            raise ValueError(f"request {self.request_id!r} needs a prompt and at least one output token")
        if self.most_output_tokens is not None and self.most_output_tokens < self.output_tokens:
            raise ValueError(
                f"most_output_tokens of request {self.request_id!r}: given {self.most_output_tokens}, "
                f"allowed: at least its {self.output_tokens} tokens"
            )

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt in tokens."""
        return tokens_of(self.prompt)

    @property
    def allowed_tokens(self) -> int:
        """Length that the answer may have at most, as the engine is told."""
        return self.output_tokens if self.most_output_tokens is None else self.most_output_tokens


@dataclass(slots=True, eq=False)
class Served:
    """How one request fared; times are virtual seconds, None until they come.

    ``extend_tokens`` are prompt tokens that were computed for the first time, ``cached_tokens`` those that
    the prefix cache held: together they are the prompt once it is prefilled. What is computed again after a
    preemption, or in place of a draft that was wrong, counts in ``recomputed_tokens`` alone; ``reached`` is
    the position up to which anything was ever computed. ``token_times[i]`` is when output token ``i`` came.
    """

    ask: Ask
    prompt_tokens: int
    admitted_s: float | None = None
    finished_s: float | None = None
    extend_tokens: int = 0
    cached_tokens: int = 0
    recomputed_tokens: int = 0
    preemptions: int = 0
    reached: int = 0
    token_times: array[float] = field(default_factory=lambda: array("d"))

    @property
    def output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_times)

    @property
    def first_token_s(self) -> float | None:
        """When the first token came."""
        return self.token_times[0] if self.token_times else None

    @property
    def ttft_s(self) -> float | None:
        """Time from arrival to the first token."""
        return self.token_times[0] - self.ask.arrival_s if self.token_times else None

    def compute(self, start: int, tokens: int) -> tuple[int, int]:
        """Book that positions ``start`` to ``start + tokens`` were computed; returns new (extend, cached).

        Positions below ``start`` that were never reached before came from the prefix cache.
        """
        end, prompt = start + tokens, self.prompt_tokens
        before = min(self.reached, prompt)
        cached = max(min(start, prompt) - before, 0)
        extend = max(min(end, prompt) - max(start, before), 0)
        self.cached_tokens += cached
        self.extend_tokens += extend
        self.recomputed_tokens += max(min(end, self.reached) - start, 0)
        self.reached = max(self.reached, end)
        return extend, cached


class Row(NamedTuple):
    """A request's part of one step: positions ``start`` to ``start + tokens`` are computed."""

    request_id: str
    start: int
    tokens: int


class Progress(NamedTuple):
    """What a step gave one request."""

    request_id: str
    new_tokens: int
    finished: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """What an engine chose to compute in one step. ``token`` is the engine's own, given back to it;
    ``draft_steps`` are passes that a drafter makes in it."""

    rows: list[Row]
    preempted: tuple[str, ...] = ()
    token: object = None
    draft_steps: int = 0
