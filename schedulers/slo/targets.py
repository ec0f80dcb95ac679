"""What a request asks for: time to its first token, time for each further token, and when each one is due.

Deadlines are cumulative (PolyServe's DSLO, section 4.1): token ``i`` is due at ``arrival + TTFT + i * TPOT``,
so that a token which comes early banks slack for the ones after it.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Literal

import msgspec

Pace = Literal["cumulative", "mean", "gap"]
"""How a time per token is meant: from the first token's deadline, from the first token, or from the last."""


class TargetError(ValueError):
    """A target that no request can have; the message names the field, what was given, and what is allowed."""


class Targets(msgspec.Struct, frozen=True, gc=False):
    """Latency targets of one request, in seconds. Infinite means that the request does not ask for it.

    Raises:
        TargetError: a target is not a number, not positive, or both are infinite.
    """

    ttft_s: float = math.inf
    tpot_s: float = math.inf

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise TargetError(f"{name}: given {value!r}, allowed: a number of seconds above 0")
        if math.isinf(self.ttft_s) and math.isinf(self.tpot_s):
            raise TargetError("ttft_s, tpot_s: both are infinite, allowed: no targets at all instead")

    def due_s(self, arrival_s: float, token: int, first_token_s: float | None = None) -> float:
        """When output token ``token`` (from 0) is due; infinite if nothing asks for it.

        A first token that came late moves the ones behind it (SLOs-Serve starts decode deadlines at the later
        of the two): the first target is lost, the pace can still be kept. Without a target for the first
        token the pace counts from ``first_token_s``.
        """
        if token == 0:
            return arrival_s + self.ttft_s
        if math.isinf(self.tpot_s):
            return math.inf
        return self.paced_from_s(arrival_s, first_token_s) + token * self.tpot_s

    def paced_from_s(self, arrival_s: float, first_token_s: float | None) -> float:
        """When the pace of the tokens after the first one begins to count."""
        start = arrival_s + self.ttft_s
        if first_token_s is not None and (first_token_s > start or math.isinf(start)):
            return first_token_s
        return start


class Tiers:
    """Requests bucketed by their time for each token, so that a plan depends on how many are in each bucket.

    ``tpots_s`` ascend; a request belongs to the slowest tier that is no slower than it asks for, and one that
    asks for more than the first tier gives belongs to the first.

    Raises:
        ValueError: no tier, or tiers that do not ascend or are not positive.
    """

    def __init__(self, tpots_s: Sequence[float]) -> None:
        ascending = all(left < right for left, right in itertools.pairwise(tpots_s))
        if not tpots_s or not ascending or not tpots_s[0] > 0 or math.isinf(tpots_s[-1]):
            raise ValueError(f"tiers: given {tuple(tpots_s)}, allowed: ascending seconds above 0")
        self.tpots_s = tuple(tpots_s)

    def index(self, tpot_s: float) -> int:
        """The tier of a request; an infinite ``tpot_s`` is the last one's."""
        return max(0, bisect_right(self.tpots_s, tpot_s) - 1)

    def __len__(self) -> int:
        return len(self.tpots_s)
