"""What an adapter says about requests and about the engine, once a step."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from penstock.schedulers.slo.targets import Pace, Targets
from penstock.schedulers.waiting import Job


class Running(msgspec.Struct, gc=False, kw_only=True):
    """A request of the running batch. An adapter may keep one and bring it up to date before each plan.

    Token counts are those after the steps that were already handed to the model: ``tokens`` are all tokens
    of the request (prompt and generated), ``computed_tokens`` those whose KV cache exists or is under way.
    Times are on the planner's clock.
    """

    request_id: str
    arrival_s: float
    tokens: int
    computed_tokens: int
    output_tokens: int = 0
    max_output_tokens: int = 1 << 20
    targets: Targets | None = None
    class_name: str = ""
    draft_tokens: int = 0
    """Draft tokens that there are for its next step, beside those counted above."""
    first_token_s: float | None = None
    last_token_s: float | None = None

    @property
    def missing_tokens(self) -> int:
        """Tokens to compute before the next one can be sampled; 1 for a request that decodes."""
        return max(1, self.tokens - self.computed_tokens)

    @property
    def decodes(self) -> bool:
        """Whether the next step with one token samples one."""
        return self.output_tokens > 0 and self.tokens - self.computed_tokens <= 1

    def due_s(self, targets: Targets, pace: Pace) -> float:
        """When its next token is due under a reading of the pace. Where the tokens before it have not come
        yet, the cumulative deadline stands for the others."""
        token, first_s, last_s = self.output_tokens, self.first_token_s, self.last_token_s
        if token == 0 or pace == "cumulative" or first_s is None or last_s is None:
            return targets.due_s(self.arrival_s, token, first_s)
        if pace == "mean":
            return first_s + token * targets.tpot_s
        return last_s + targets.tpot_s


@dataclass(frozen=True, slots=True)
class Waiting(Job):
    """A waiting request with its targets.

    ``tokens`` are those to have in the KV cache before the next token is sampled, generated ones included
    when it was preempted; ``cached_tokens`` of them need no computing, by a prefix hit or a transfer.
    """

    targets: Targets | None = None
    class_name: str = ""
    cached_tokens: int = 0
    output_tokens: int = 0
    max_output_tokens: int = 1 << 20
    first_token_s: float | None = None

    @property
    def missing_tokens(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return max(1, self.tokens - self.cached_tokens)

    @property
    def due_s(self) -> float:
        """When its next token is due; infinite without targets."""
        if self.targets is None:
            return float("inf")
        return self.targets.due_s(self.arrival_s, self.output_tokens, self.first_token_s)


class Limits(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """What one step of the engine may hold.

    ``in_flight_s`` is how long the steps before this one will still take (0 where scheduling is synchronous).
    ``block_tokens`` is the KV cache that a decode may need for its next token.
    """

    step_tokens: int
    running_requests: int
    in_flight_s: float = 0.0
    block_tokens: int = 1
